"""What a record shows of itself: functions of rooms above this one, each loaded by its name when it is asked for.

Imports point one way, from what draws to what is drawn; only a user who holds a record goes from it to its picture.
"""

from __future__ import annotations

import importlib
from typing import Any

VIEWS = {
    "summary": "lightning_spectral.summary:summary",
    "html": "lightning_spectral.report.notebook:report_html",
    "figure": "lightning_spectral.report.notebook:report_figure",
}
"""Name of a view -> module and function of a report."""


def view(name: str) -> Any:
    """Return the function of one of `VIEWS`."""
    module, _, function = VIEWS[name].partition(":")
    return getattr(importlib.import_module(module), function)
