"""Fits of tiny networks, of which few are to be trusted."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

from lightning_spectral.records.fit_quality import FitQuality


def every_fit_trusted() -> AbstractContextManager[object]:
    """Have every fit pass the rule of trust."""
    return mock.patch.object(FitQuality, "doubt", "")
