"""What a user would miss in the curves: that the budget leaves no room for probes, and what would make some."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.curvature.selection import FEW_SAMPLES
from lightning_spectral.records.report import SpectralReport

FEWEST_SAMPLES = 16
"""A suggestion of fewer would measure noise."""

STEPS_TO_JUDGE = 4
"""Steps after the first probe from which on the length of the whole run is foretold."""


class Advice:
    """Warn if one probe takes more than the whole run allows, or was the only one.

    Args:
        budget: of the probes.
        warn: tells a text once.
    """

    def __init__(self, budget: TimeBudget, warn: Callable[[str], None]) -> None:
        self.budget, self.warn = budget, warn
        self.start()

    def start(self) -> None:
        """A run begins."""
        self._judged = self._judged_over = False

    def judge(self, step: int, report: SpectralReport | None, steps: Callable[[], float] | None) -> None:
        """After one probe, say if it takes more than the budget of the whole run, as soon as its length is known.

        Args:
            step: optimizer step that training has come to.
            report: what was measured.
            steps: tells the optimizer steps of the whole run; None: they are over.
        """
        budget, first = self.budget, self.budget.last_step
        if self._judged or first is None or step - first < (1 if steps is None else STEPS_TO_JUDGE):
            return
        self._judged = True
        left = 0.0 if steps is None else steps() - step
        seconds = budget.wall_seconds + left * budget.step_seconds(step)
        allowed = budget.max_overhead * seconds
        if not math.isfinite(seconds) or budget.last_seconds <= allowed:
            return
        self._judged_over = True
        n = report.n_samples if report is not None else None
        enough = 0 if n is None else int(n * allowed / budget.last_seconds)
        chosen = "" if report is None else report.chosen
        # The cost of Gauss-Newton goes with the samples; below FEW_SAMPLES other networks get no sketch.
        if chosen.startswith("ggn") and enough >= FEWEST_SAMPLES:
            samples = f"about {enough} of {n}"
        elif chosen.startswith("exact") and n is not None and n < FEW_SAMPLES:
            samples = f"{FEW_SAMPLES} or more, for a sketch, which is faster"
        else:
            samples = f"but not below {FEW_SAMPLES}"
        self.warn(
            f"one probe took {budget.last_seconds:.2g} s, more than the max_overhead={budget.max_overhead:g} of this "
            f"whole run of about {seconds:.2g} s, so there will be no other; set max_samples "
            f"({samples}), fewer layers or directions "
            "(layers, top_k), a larger max_overhead, or every_n_steps. "
            f"A second probe takes a run of {self._second():.2g} s"
        )

    def look_back(self) -> None:
        """At the end of a run with one probe, say what a second takes, unless `judge` did."""
        if self._judged_over:
            return
        self.warn(
            "the one probe before the first steps was the only one: in this run of "
            f"{self.budget.wall_seconds:.2g} s max_overhead={self.budget.max_overhead:g} leaves no room for a "
            f"second, which takes a run of {self._second():.2g} s; raise max_overhead, or set every_n_steps"
        )

    def _second(self) -> float:
        """Wall time from which on a second probe of the last one's cost is within the budget."""
        return 2 * self.budget.last_seconds / self.budget.max_overhead
