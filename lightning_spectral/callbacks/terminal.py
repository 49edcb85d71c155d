"""What a probe says in the terminal: its table above the progress bar, and a line on the run that has ended."""

from __future__ import annotations

import importlib
import io
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_spectral.callbacks._lightning import package_of
from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.terminal.formatting import duration, fixed, percent, width_for
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
    """Log a line on rank 0 as Lightning does its own; above a bar of rich, into whose line the logger would write."""
    live, utilities = _live_console(trainer), f"{package_of(type(trainer))}.utilities"
    if not isinstance(live, Console):
        importlib.import_module(utilities).rank_zero_info(text)
    elif trainer.is_global_zero and logging.getLogger(f"{utilities}.rank_zero").isEnabledFor(logging.INFO):
        live.print(Text(text), soft_wrap=True)


def _live_console(trainer: Any) -> Any:
    """Return the terminal that a bar of rich draws in; None without one."""
    return getattr(getattr(trainer.progress_bar_callback, "progress", None), "console", None)


def closing_line(prefix: str, budget: TimeBudget, step: int, report: SpectralReport | None, path: Path | None) -> str:
    """Return one line on a run that has ended: its probes, their share of time, last alpha and page."""
    probes = f"{budget.probes} probe{'s' * (budget.probes != 1)}"
    name = "SpectralProbe" if prefix == "spectral" else f"SpectralProbe, {prefix}"
    if budget.last_step != step:
        # Without one of the final weights: the report is of a network that went on training.
        probes += f", the last at step {budget.last_step} of {step}"
    parts = [f"{name}: {probes}, {percent(budget.overhead)} of {duration(budget.wall_seconds)}"]
    if report is None:
        parts.append("nothing was measured")
    else:
        trusted, layers = len(report.trusted), f"{len(report.layers)} layer{'s' * (len(report.layers) != 1)}"
        alpha = f"median alpha {fixed(report.medians()['alpha_median'])}, trusted in {trusted} of {layers}"
        parts.append(alpha if trusted else f"no alpha to trust in {layers} at the last probe")
    if path is not None:
        # In a folder of several probes the command asks for the file of one.
        only = len(list(path.parent.glob("spectra*.jsonl"))) < 2
        parts.append(f"lightning-spectral report {_shown(path.parent if only else path)} makes its page")
    return "; ".join(parts)


def _shown(path: Path) -> str:
    """Return a path as a word of a command: relative to the current one if it lies below."""
    try:
        # Without following links, as the user sees it.
        relative = os.path.relpath(path)
    except (ValueError, OSError):
        # Another drive, or the current folder is gone.
        relative = ".."
    return shlex.quote(str(path) if relative.startswith("..") else relative)
