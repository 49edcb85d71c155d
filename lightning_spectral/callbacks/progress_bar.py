"""Tables and lines in the terminal of a Trainer that draws a progress bar there."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_spectral.callbacks._lightning import rank_zero_info
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.terminal.formatting import width_for
from lightning_spectral.report.terminal.tables import print_report


def print_above_bar(trainer: Any, report: SpectralReport, title: str, layers: Sequence[str]) -> None:
    """Print a report above the Trainer's progress bar without breaking the bar; without one, just print it."""
    bar, live = trainer.progress_bar_callback, _live_console(trainer)
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


def log_above_bar(trainer: Any, text: str) -> None:
    """Log a line as Lightning does its own; above a bar of rich, into whose line the logger would write."""
    live = _live_console(trainer)
    if isinstance(live, Console):
        rank_zero_info(trainer, text, lambda line: live.print(Text(line), soft_wrap=True))
    else:
        rank_zero_info(trainer, text)


def _live_console(trainer: Any) -> Any:
    """Return the terminal that a bar of rich draws in; None without one."""
    return getattr(getattr(trainer.progress_bar_callback, "progress", None), "console", None)
