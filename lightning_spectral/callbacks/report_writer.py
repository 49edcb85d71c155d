"""`ReportWriter`: a probe's report in loggers, with figures and tables, in the run's folder and in the terminal."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_spectral._validation import flag, optional_positive_int
from lightning_spectral.callbacks._lightning import rank_zero_info
from lightning_spectral.callbacks.alerts import Alerts
from lightning_spectral.callbacks.log_selection import SUMMARIZED, charts
from lightning_spectral.callbacks.report_file import ReportFile
from lightning_spectral.numerics.statistics import evenly
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.records.step import StepMeasurement
from lightning_spectral.report import figures
from lightning_spectral.report.page.build import write_page
from lightning_spectral.report.runs.read import read_run
from lightning_spectral.report.terminal.formatting import width_for
from lightning_spectral.report.terminal.tables import print_report
from lightning_spectral.report.trackers import Row, Tracker, tracker_of

logger = logging.getLogger(__name__)

MAX_ROWS = 256
"""Number of layers in a table, evenly over depth."""

MAX_LINES = 10
"""Number of probes in the chart of alpha by depth, evenly over training."""

FIGURES: dict[str, Callable[[SpectralReport, Sequence[SpectralReport]], Any]] = {
    "alpha_by_depth": lambda report, history: figures.plot_alpha_by_depth(report),
    "power_law": lambda report, history: figures.plot_power_law(report),
    "transfer_identity": lambda report, history: figures.plot_transfer_identity(report),
    "scale": lambda report, history: figures.plot_scale_over_training(history),
    "rank_models": lambda report, history: figures.plot_rank_models_over_training(history),
}
"""Name -> function that draws the figure from the last report and `history`."""


@dataclass(frozen=True)
class OutputOptions:
    """Options of a probe's output beside scalars, documented in `SpectralProbe`."""

    log_figures_every: int | None = None
    log_tables: bool = False
    wandb_charts: int | None = 40
    wandb_alerts: bool = False
    wandb_artifact: bool = False
    print_every: int | None = None
    print_end: bool | None = None
    keep_reports: bool = True

    def __post_init__(self) -> None:
        for option in ("log_figures_every", "print_every", "wandb_charts"):
            optional_positive_int(option, getattr(self, option))
        for option in ("log_tables", "wandb_alerts", "wandb_artifact", "keep_reports"):
            flag(option, getattr(self, option))
        if self.wandb_artifact and not self.keep_reports:
            raise ValueError("wandb_artifact holds the reports that keep_reports=False does not keep; leave one out")
        flag("print_end", self.print_end, none=True)
        if self.log_figures_every is not None and find_spec("matplotlib") is None:
            raise ImportError('log_figures_every needs matplotlib: pip install "lightning-spectral[plot]"')


class ReportWriter:
    """Write each report to the loggers of a Trainer, the run's folder and the terminal, on rank 0.

    Args:
        layers: names of all layers -> those shown one by one.
    """

    def __init__(
        self,
        prefix: str,
        options: OutputOptions,
        config: Mapping[str, Any],
        layers: Callable[[Sequence[str]], list[str]],
        warn: Callable[[str], None],
    ) -> None:
        self.prefix, self.options, self.layers, self.warn = _check_prefix(prefix), options, layers, warn
        self.config = dict(config)
        self.file = ReportFile(prefix, warn)
        self._reset()

    def _reset(self) -> None:
        self._trackers: list[Tracker] = []
        self._charted: list[str] = []
        self._printed: SpectralReport | None = None
        self._alerts = Alerts(self.prefix)

    def start(self, trainer: Any) -> None:
        """Begin a run: write the probe's options into its configuration."""
        self._reset()
        self.file.start(trainer)
        if trainer.is_global_zero:
            self._configure(trainer)

    def _configure(self, trainer: Any, report: SpectralReport | None = None) -> None:
        """Write the options, with the method by which curvature is measured once that is known."""
        method = {} if report is None else {"method": report.chosen.partition(":")[0] or report.curvature}
        if report is not None and self.config | method == self.config:
            return
        self.config |= method
        for tracker in self._trackers_of(trainer):
            with tracker.warn_on_error(" the probe's options"):
                tracker.write_config(self.prefix, self.config)

    def _trackers_of(self, trainer: Any) -> list[Tracker]:
        if [tracker.logger for tracker in self._trackers] != list(trainer.loggers):
            self._trackers = [tracker_of(logger, self.warn) for logger in trainer.loggers]
        return self._trackers

    def write(
        self,
        trainer: Any,
        step: int,
        scalars: dict[str, float],
        extra: dict[str, float] | None = None,
        *,
        report: SpectralReport | None = None,
        history: Sequence[SpectralReport] = (),
        probes: int = 0,
        later: Iterable[str] = (),
    ) -> None:
        """Write a probe's results.

        Args:
            extra: full keys -> values, with charts if any are left.
            later: keys without a prefix that `write_later` adds, with which these share the charts.
        """
        if not trainer.is_global_zero:
            return
        names = {key: f"{self.prefix}/{key}" for key in (*scalars, *later)} | {key: key for key in extra or {}}
        keys = [*scalars, *(extra or {}), *later]
        self._charted = [names[key] for key in charts(keys, self.options.wandb_charts)]
        row = self._row(trainer, step, {names[key]: value for key, value in (scalars | (extra or {})).items()})
        if report is not None:
            self._configure(trainer, report)
            row = self._with_media(row, report, history, probes)
        self._write(row)
        if report is None:
            return
        if self.options.keep_reports:
            self.file.append(trainer, report)
            for tracker in self._trackers:
                tracker.keep_growing(self.file.path)
        every = self.options.print_every
        if every is not None and (probes - 1) % every == 0:
            self._print(trainer, report)

    def write_later(
        self, trainer: Any, step: int, scalars: Mapping[str, float], measurement: StepMeasurement | None = None
    ) -> None:
        """Write what is known of the last probe only now, in a row of its own at the probe's step.

        Args:
            step: optimizer steps before the probe, so that no logger's axis goes back.
        """
        if not trainer.is_global_zero:
            return
        self._write(self._row(trainer, step, {f"{self.prefix}/{key}": value for key, value in scalars.items()}))
        if measurement is not None and self.options.keep_reports:
            self.file.append(trainer, measurement)

    def _row(self, trainer: Any, step: int, logged: Mapping[str, float]) -> Row:
        self._trackers_of(trainer)
        charted = [key for key in self._charted if key in logged]
        return Row(self.prefix, step, logged, charted, [f"{self.prefix}/{key}" for key in SUMMARIZED])

    def _write(self, row: Row) -> None:
        alerts = self._alerts.of(row) if self.options.wandb_alerts else []
        for tracker in self._trackers:
            tracker.write(row)
            for title, text in alerts:
                tracker.alert(title, text)

    def end(self, trainer: Any, report: SpectralReport | None) -> None:
        """Give the run's files to the trackers that keep them, and print the last report where that is wanted."""
        if trainer.is_global_zero:
            self._keep_files()
        prints = self.options.print_end
        if prints is None:
            prints = not trainer.loggers and trainer.progress_bar_callback is not None
        if prints and report is not None and report is not self._printed and trainer.is_global_zero:
            self._print(trainer, report)

    def _keep_files(self) -> None:
        trackers = [tracker for tracker in self._trackers if tracker.files]
        if not trackers or self.file.path is None:
            return
        paths = [self.file.path, *self._page(self.file.path)]
        artifact = self.prefix.replace("/", ".") if self.options.wandb_artifact else None
        for tracker in trackers:
            with tracker.warn_on_error(" files"):
                tracker.keep(paths, artifact)

    def _page(self, spectra: Path) -> list[Path]:
        """Write the page of the reports in a file beside it, and return its path; nothing where that fails."""
        if find_spec("plotly") is None:
            logger.info('the page of a run needs plotly: pip install "lightning-spectral[report]"')
            return []
        try:
            return [write_page(read_run([spectra]), spectra.with_suffix(".html"))]
        except Exception as error:
            self.warn(f"the page of the run could not be written: {error}")
            return []

    def _print(self, trainer: Any, report: SpectralReport) -> None:
        self._printed = report
        try:
            print_above_bar(trainer, report, self.prefix, self.layers(list(report.layers)))
        except Exception as error:
            self.warn(f"the table of the last probe could not be printed: {error}")

    def _with_media(self, row: Row, report: SpectralReport, history: Sequence[SpectralReport], probes: int) -> Row:
        every = self.options.log_figures_every
        if every is not None and (probes - 1) % every == 0 and self._any_takes("figures", "log_figures_every"):
            row = replace(row, figures=self._figures(report, history))
        if self.options.log_tables and self._any_takes("tables", "log_tables"):
            row = replace(row, table=self._table(report), lines=alpha_by_depth(history))
        return row

    def _any_takes(self, media: str, option: str) -> bool:
        if any(getattr(tracker, media) for tracker in self._trackers):
            return True
        names = ", ".join(type(tracker.logger).__name__ for tracker in self._trackers)
        self.warn(
            f"{option}: no logger of the Trainer takes {media} ({names or 'it has none'}); "
            f"WandbLogger, TensorBoardLogger and MLFlowLogger do{', and CSVLogger' * (media == 'tables')}"
        )
        return False

    def _figures(self, report: SpectralReport, history: Sequence[SpectralReport]) -> dict[str, Any]:
        drawings: dict[str, Any] = {}
        for name, draw in FIGURES.items():
            try:
                drawings[name] = draw(report, history)
            except Exception as error:
                self.warn(f"the figure {name} could not be drawn: {error}")
        return drawings

    def _table(self, report: SpectralReport) -> list[dict[str, Any]]:
        rows = [{"step": report.step, **row} for row in report.rows()]
        if len(rows) <= MAX_ROWS:
            return rows
        self.warn(f"log_tables: {MAX_ROWS} of {len(rows)} layers are in the table, evenly over depth")
        return [rows[i] for i in evenly(len(rows), MAX_ROWS)]


def _check_prefix(prefix: str) -> str:
    # Trackers make paths of files of it.
    if {"", ".", ".."} & set(re.split(r"[/\\]", prefix)):
        raise ValueError(
            f"prefix must be a name without slashes at its ends, or names with one slash between them, none of "
            f"them . or .., got {prefix!r}"
        )
    return prefix


def alpha_by_depth(history: Sequence[SpectralReport]) -> dict[str, tuple[list[float], list[float]]]:
    """Return alpha against the layer's place in the network, a line for each of up to `MAX_LINES` reports."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for i in evenly(len(history), MAX_LINES) if history else ():
        layers = list(history[i].layers.values())
        fits = [(j, layers[j].alpha) for j in evenly(len(layers), MAX_ROWS)]
        points = [(j + 1, fit.exponent) for j, fit in fits if fit.n_used and not math.isnan(fit.exponent)]
        if points:
            places, alphas = zip(*points, strict=True)
            lines[f"step {history[i].step}"] = (list(places), list(alphas))
    return lines


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
