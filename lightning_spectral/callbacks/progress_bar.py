"""Tables in the terminal of a Trainer that draws a progress bar there."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.terminal.formatting import width_for
from lightning_spectral.report.terminal.tables import print_report


def print_above_bar(trainer: Any, report: SpectralReport, title: str, layers: Sequence[str]) -> None:
    """Print a report above the bar of the Trainer, which stays whole.

    Args:
        trainer: whose bar it is; without one the report is just printed.
        report: what was measured.
        title: of the table.
        layers: those that get a row.
    """
    bar = trainer.progress_bar_callback
    live = getattr(getattr(bar, "progress", None), "console", None)
    seen = live or Console()
    text = io.StringIO()
    console = Console(file=text, force_terminal=seen.is_terminal, width=width_for(seen), no_color=seen.no_color)
    print_report(report, title, layers=layers, console=console)
    if isinstance(live, Console):
        # A line cut to the width of the bar would lose its figures.
        live.print(Text.from_ansi(text.getvalue()), soft_wrap=True)
    elif hasattr(bar, "train_progress_bar"):
        # The bar's own `print` says nothing once it is closed, which it may be when training ends.
        bar.train_progress_bar.write(text.getvalue())
    elif bar is not None:
        bar.print(text.getvalue())
    else:
        print(text.getvalue())
