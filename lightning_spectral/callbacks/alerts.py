"""`Alerts`: what of a run's probes its user should know at once."""

from __future__ import annotations

import math

from lightning_spectral.callbacks.log_selection import STEP_SCALE
from lightning_spectral.report.trackers import Row

TOO_LONG = 0.5
"""Best factor on a step below which the step raises the loss of its batch, to second order."""

IN_A_ROW = 3
"""Number of probes with such a factor in a row: one batch alone says little."""


class Alerts:
    """Tell failed probes, and steps that are too long, once each until it gets better.

    Args:
        prefix: first part of the probe's keys.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._fails = False
        self._too_long = 0

    def of(self, row: Row) -> list[tuple[str, str]]:
        """Return title and text of each alert that a row gives cause for.

        >>> alerts = Alerts("spectral")
        >>> [len(alerts.of(Row("spectral", step, {"spectral/step/scale": 0.3}))) for step in range(5)]
        [0, 0, 1, 0, 0]
        """
        found = []
        measured = row.scalars.get(f"{self.prefix}/layers_measured")
        if measured is not None:
            failed = math.isnan(measured)
            if failed and not self._fails:
                text = f"The probe before step {row.step} measured nothing; the warnings in the run's log say why."
                found.append((f"{self.prefix}: a probe failed", text))
            self._fails = failed
        scale = row.scalars.get(f"{self.prefix}/{STEP_SCALE}", math.nan)
        # NaN: the curvature along the step is not positive, which says nothing of its length.
        if not math.isnan(scale):
            self._too_long = self._too_long + 1 if scale < TOO_LONG else 0
            if self._too_long == IN_A_ROW:
                text = (
                    f"At {IN_A_ROW} probes in a row the best factor on the optimizer's step was below 1/2, {scale:.2g} "
                    f"at step {row.step}: such a step raises the loss of its batch, to second order. A lower learning "
                    "rate, or less momentum, may help."
                )
                found.append((f"{self.prefix}: steps are too long", text))
        return found
