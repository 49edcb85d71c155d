"""Warnings that the time budget leaves no room for a second probe, and which options would make some."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.records.report import SpectralReport

FEWEST_SAMPLES = 16
"""Number of samples below which a suggested max_samples would measure noise."""

FEW_SAMPLES = 32
"""Number of samples below which a sketch takes the more passes the fewer there are."""

STEPS_TO_JUDGE = 4
"""Number of steps after the first probe from which the length of the whole run is predicted."""


class BudgetAdvice:
    """Warn if one probe takes more than the whole run allows, or was the only one.

    Args:
        budget: time budget of the probes.
        warn: warns once per cause.
    """

    def __init__(self, budget: TimeBudget, warn: Callable[[str], None]) -> None:
        self.budget, self.warn = budget, warn
        self.start()

    def start(self) -> None:
        """Begin a run."""
        self._is_judged = self._warned = False

    def judge(self, step: int, report: SpectralReport | None, total_steps: Callable[[], float] | None) -> None:
        """Warn if the first probe took more than the budget of the whole run, as soon as its length is known.

        Args:
            step: optimizer step that training has reached.
            report: report of the probe; None if it failed.
            total_steps: returns the optimizer steps of the whole run; None when the run is over.
        """
        budget, first = self.budget, self.budget.last_step
        if self._is_judged or first is None or step - first < (1 if total_steps is None else STEPS_TO_JUDGE):
            return
        self._is_judged = True
        steps_to_come = 0.0 if total_steps is None else total_steps() - step
        seconds = budget.wall_seconds + steps_to_come * budget.step_seconds(step)
        allowed = budget.max_overhead * seconds
        if not math.isfinite(seconds) or budget.last_seconds <= allowed:
            return
        self._warned = True
        self.warn(
            f"one probe took {budget.last_seconds:.2g} s, more than the max_overhead={budget.max_overhead:g} of this "
            f"whole run of about {seconds:.2g} s, so there will be no other; set max_samples "
            f"({_max_samples(report, allowed / budget.last_seconds)}), fewer layers or directions (layers, top_k), a "
            f"larger max_overhead, or every_n_steps. A second probe takes a run of {self._seconds_for_second():.2g} s"
        )

    def end(self, step: int, report: SpectralReport | None) -> None:
        """Warn at the end of a run with one probe, unless `judge` did, what a second probe takes."""
        self.judge(step, report, None)
        if self._warned or report is None:
            return
        self.warn(
            "the one probe before the first steps was the only one: in this run of "
            f"{self.budget.wall_seconds:.2g} s max_overhead={self.budget.max_overhead:g} leaves no room for a "
            f"second, which takes a run of {self._seconds_for_second():.2g} s; raise max_overhead, or set every_n_steps"
        )

    def _seconds_for_second(self) -> float:
        """Return the wall time from which on a second probe of the same cost is within the budget."""
        return 2 * self.budget.last_seconds / self.budget.max_overhead


def _max_samples(report: SpectralReport | None, share: float) -> str:
    """Return the max_samples to advise where a probe may take this share of its time."""
    n = None if report is None else report.curvature_samples
    method = "" if report is None else report.chosen
    # The cost of the columns goes with the samples; that of a sketch does so down to FEW_SAMPLES.
    if n is not None and method.startswith("ggn") and int(n * share) >= FEWEST_SAMPLES:
        return f"about {int(n * share)} of {n}"
    if n is not None and method.startswith("exact") and n < FEW_SAMPLES:
        return f"{FEW_SAMPLES} or more, for a sketch, which is faster"
    return f"but not below {FEW_SAMPLES}"
