"""Warning that a run has room for one probe alone, and which options would make some."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.terminal.formatting import duration

FEWEST_SAMPLES = 16
"""Number of samples below which a suggested max_samples would measure noise."""

FEW_SAMPLES = 32
"""Number of samples below which a sketch takes the more passes the fewer there are."""

STEPS_TO_JUDGE = 4
"""Number of steps after the first probe from which the length of the whole run is predicted."""


class BudgetAdvice:
    """Warn if a run has room for one probe alone, as soon as that can be told, or when it has ended with one.

    Args:
        budget: time budget of the probes.
        warn: warns once per cause.

    Attributes:
        report: of the last probe; None if it failed.
    """

    def __init__(self, budget: TimeBudget, warn: Callable[[str], None]) -> None:
        self.budget, self.warn = budget, warn
        self.report: SpectralReport | None = None
        self.start()

    def start(self) -> None:
        """Begin a run."""
        self._is_judged = self._has_warned = False

    def judge(self, step: int) -> None:
        """Warn of a whole run without room for a second probe, some steps after the first."""
        budget = self.budget
        if self._is_judged or budget.probes != 1 or step - (budget.last_step or 0) < STEPS_TO_JUDGE:
            return
        self._is_judged = True
        seconds = budget.training_seconds(step)
        if math.isfinite(seconds) and self._allowed(seconds) < 2 * budget.last_seconds:
            self._warn(seconds)

    def end(self) -> None:
        """Warn when training has ended with one probe, unless `judge` did."""
        budget = self.budget
        if budget.probes == 1 and not self._has_warned:
            self._warn(budget.wall_seconds - budget.probe_seconds)

    def _allowed(self, training_seconds: float) -> float:
        """Return the seconds of all probes that are the share beside so many of training."""
        share = self.budget.share
        return share / (1 - share) * training_seconds

    def _warn(self, training_seconds: float) -> None:
        self._has_warned = True
        budget, allowed, cost = self.budget, self._allowed(training_seconds), self.budget.last_seconds
        rule = f"min_probes={budget.min_probes}" if budget.min_probes else f"max_overhead={budget.max_overhead:g}"
        remedy = f"a max_overhead above {budget.share:g}" if budget.min_probes else "min_probes, a larger max_overhead"
        samples = _max_samples(self.report, allowed / (2 * cost))
        self.warn(
            f"a run of {duration(training_seconds + cost)} has room for one probe alone: one takes {duration(cost)}, "
            f"and together they may take {100 * budget.share:g} % of the time ({rule}). For a curve set max_samples "
            f"({samples}), fewer layers or directions (layers, top_k), {remedy} or "
            f"every_n_steps; or train longer: from {duration(2 * cost / budget.share)} on there are two"
        )


def _max_samples(report: SpectralReport | None, share: float) -> str:
    """Return the max_samples to advise where a probe may take this share of its time."""
    n = None if report is None else report.curvature_samples
    method = "" if report is None else report.chosen
    # The cost of the columns goes with the samples; that of a sketch does so down to FEW_SAMPLES.
    if n is not None and method.startswith("ggn") and FEWEST_SAMPLES <= int(n * share) < n:
        return f"about {int(n * share)} of {n}"
    if n is not None and method.startswith("exact") and n < FEW_SAMPLES:
        return f"{FEW_SAMPLES} or more, for a sketch, which is faster"
    return f"but not below {FEW_SAMPLES}"
