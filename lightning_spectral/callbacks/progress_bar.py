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
    """Print a report above the Trainer's progress bar without breaking the bar; without one, just print it.

    Args:
        trainer: Trainer with the bar.
        report: report to print.
        title: title of the table.
        layers: names of the layers that get a row.
    """
    bar = trainer.progress_bar_callback
    live = getattr(getattr(bar, "progress", None), "console", None)
    terminal = live or Console()
    text = io.StringIO()
    console = Console(
        file=text, force_terminal=terminal.is_terminal, width=width_for(terminal), no_color=terminal.no_color
    )
    print_report(report, title, layers=layers, console=console)
    if isinstance(live, Console):
        # A line cut to the width of the bar would lose its figures.
        live.print(Text.from_ansi(text.getvalue()), soft_wrap=True)
    elif hasattr(bar, "train_progress_bar"):
        # The bar's own `print` is silent once the bar is closed, as it may be when training ends.
        bar.train_progress_bar.write(text.getvalue())
    elif bar is not None:
        bar.print(text.getvalue())
    else:
        print(text.getvalue())
