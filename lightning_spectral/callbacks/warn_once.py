"""Warnings that come once per cause, and never end a run."""

from __future__ import annotations

import logging
import re
import warnings

from lightning_spectral.errors import SpectralWarning

logger = logging.getLogger(__name__)

MOST_CAUSES = 100
"""Warnings of one probe: a text that says something new each time would fill the terminal, and memory."""

CHANGING = re.compile(
    r"\b0x[0-9a-f]+"  # an object's address
    r"|(?<![\w.])\d+(?:x\d+)+(?!\w)"  # a shape, as PyTorch writes it of a matrix product
    r"|(?<![\w.])\d[\d.e+-]*(?![\w.])"
    r"|\bnan\b|\binf\b"
)
"""What differs from probe to probe in texts of one cause."""


class WarnOnce:
    """Warn of each cause once: steps, sizes and values change from probe to probe; the cause, and the layer, do not."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self.muted = False
        """Whether another process tells it."""

    def __call__(self, text: str) -> None:
        """Warn, unless the text differs from an earlier one by its numbers only, or `MOST_CAUSES` were told."""
        cause = CHANGING.sub("#", text)
        if cause in self._told or self.muted or len(self._told) > MOST_CAUSES:
            return
        self._told.add(cause)
        if len(self._told) > MOST_CAUSES:
            text = (
                f"{MOST_CAUSES} different warnings were given, and the probe gives no more; what it cannot measure is "
                "still NaN and counted in failed_probes and layers_failed, and probe.last_report.problems() names it"
            )
        try:
            warnings.warn(text, SpectralWarning, stacklevel=2)
        except SpectralWarning:
            # Where warnings are errors they still must not end the run.
            logger.warning(text)
