"""Warnings that come once per cause, and never end a run."""

from __future__ import annotations

import logging
import re
import warnings

from lightning_spectral.errors import SpectralWarning

logger = logging.getLogger(__name__)


class WarnOnce:
    """Warn of each cause once: steps, sizes and values change from probe to probe; the cause, and the layer, do not."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self.muted = False
        """Whether another process tells it."""

    def __call__(self, text: str) -> None:
        """Warn, unless the text differs from an earlier one by its numbers only."""
        cause = re.sub(r"(?<![\w.])\d[\d.e+-]*(?![\w.])|\bnan\b|\binf\b", "#", text)
        if cause in self._told or self.muted:
            return
        self._told.add(cause)
        try:
            warnings.warn(text, SpectralWarning, stacklevel=2)
        except SpectralWarning:
            # Where warnings are errors they still must not end the run.
            logger.warning(text)
