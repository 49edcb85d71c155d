"""What a user should know at once: `WarnOnce`, warnings once per cause, and `Alerts` of a tracker."""

from __future__ import annotations

import logging
import math
import re
import warnings

from lightning_spectral.callbacks.log_selection import STEP_SCALE
from lightning_spectral.errors import SpectralWarning
from lightning_spectral.report.trackers import Row

logger = logging.getLogger(__name__)

TOO_LONG = 0.5
"""Best factor on a step below which the step raises the loss of its batch, to second order."""

IN_A_ROW = 3
"""Number of probes with such a factor in a row: one batch alone says little."""


class Alerts:
    """Tell failed probes, and steps that are too long, once each until it gets better."""

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


MAX_CAUSES = 100
"""Number of warnings of one probe: a text that differs each time would fill the terminal, and memory."""

VARYING = re.compile(
    r"\b0x[0-9a-f]+"  # an object's address
    r"|(?<![\w.])\d+(?:x\d+)+(?!\w)"  # a shape, as PyTorch writes it of a matrix product
    r"|(?<![\w.])\d[\d.e+-]*(?![\w.])"
    r"|\bnan\b|\binf\b"
)
"""Parts of a text that differ from probe to probe though the cause is the same."""

LAYERS = re.compile(r"(?P<names>[\w.]+(, [\w.]+)*)(?P<more> and \d+ more)?: (?P<cause>.+)", re.DOTALL)
"""A text about layers, as `group_by_reason` writes it."""

ALL = "*"
"""In place of a layer: more were told of than their text names."""


class WarnOnce:
    """Warn of each cause once per layer: steps, sizes, values and the layers struck change from probe to probe."""

    def __init__(self) -> None:
        self._seen_causes: set[str] = set()
        self._told_layers: dict[str, set[str]] = {}
        self.muted = False
        """Set on all ranks but one, which warns for all."""

    def __call__(self, text: str) -> None:
        """Warn, unless the text differs from earlier ones only by its numbers, or `MAX_CAUSES` were reached.

        Of several layers those are named that were not; none, once there were more than a text names.
        """
        if self.muted or len(self._seen_causes) > MAX_CAUSES:
            return
        if (layers := LAYERS.fullmatch(text)) is not None:
            text = self._of_new_layers(text, layers)
        cause = VARYING.sub("#", text)
        if not text or cause in self._seen_causes:
            return
        self._seen_causes.add(cause)
        if len(self._seen_causes) > MAX_CAUSES:
            text = (
                f"{MAX_CAUSES} different warnings were given, and the probe gives no more; what it cannot measure is "
                "still NaN and counted in failed_probes and layers_failed, and probe.last_report.problems() names it"
            )
        try:
            warnings.warn(text, SpectralWarning, stacklevel=2)
        except SpectralWarning:
            # Where warnings are errors they still must not end the run.
            logger.warning(text)

    def _of_new_layers(self, text: str, layers: re.Match[str]) -> str:
        """Return the text with the layers alone that its cause was not told of; nothing if there is none."""
        cause = VARYING.sub("#", layers["cause"])
        told = self._told_layers.setdefault(cause, set())
        names = layers["names"].split(", ")
        new = [name for name in names if name not in told]
        if not new or ALL in told:
            return ""
        told |= {*names, *([ALL] if layers["more"] else [])}
        return text if layers["more"] or len(new) == len(names) else f"{', '.join(new)}: {layers['cause']}"
