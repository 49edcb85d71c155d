"""Warnings that come once per cause, and never end a run."""

from __future__ import annotations

import logging
import re
import warnings

from lightning_spectral.errors import SpectralWarning

logger = logging.getLogger(__name__)

MAX_CAUSES = 100
"""Number of warnings of one probe: a text that differs each time would fill the terminal, and memory."""

VARYING = re.compile(
    r"\b0x[0-9a-f]+"  # an object's address
    r"|(?<![\w.])\d+(?:x\d+)+(?!\w)"  # a shape, as PyTorch writes it of a matrix product
    r"|(?<![\w.])\d[\d.e+-]*(?![\w.])"
    r"|\bnan\b|\binf\b"
)
"""Parts of a text that differ from probe to probe though the cause is the same."""


class WarnOnce:
    """Warn of each cause once: steps, sizes and values change from probe to probe; the cause and the layer do not."""

    def __init__(self) -> None:
        self._seen_causes: set[str] = set()
        self.muted = False
        """Set on all ranks but one, which warns for all."""

    def __call__(self, text: str) -> None:
        """Warn, unless the text differs from an earlier one only by its numbers, or `MAX_CAUSES` were reached."""
        cause = VARYING.sub("#", text)
        if cause in self._seen_causes or self.muted or len(self._seen_causes) > MAX_CAUSES:
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
