"""`ReportWriter`: a probe's report in loggers, for callbacks to monitor, in the run's folder and in the terminal."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_spectral._validation import flag, optional_positive_int
from lightning_spectral.callbacks.alerts import Alerts
from lightning_spectral.callbacks.log_selection import SUMMARIZED, LogSelection, charts
from lightning_spectral.callbacks.report_file import ReportFile
from lightning_spectral.callbacks.terminal import closing_line, log_above_bar, print_above_bar
from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.numerics.statistics import evenly
from lightning_spectral.records.log_keys import former_key
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.records.step import StepMeasurement
from lightning_spectral.report import figures
from lightning_spectral.report.page.build import write_page
from lightning_spectral.report.runs.read import read_run
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
    """Write each probe, and the step after it, on rank 0, and give callbacks of all ranks their values to monitor.

    Attributes:
        monitored: key -> its last value, in `trainer.callback_metrics`. A NaN does not replace the value before it:
            EarlyStopping ends training at a NaN, and a probe that fails must not. A key without a value is absent.
    """

    def __init__(
        self,
        prefix: str,
        options: OutputOptions,
        config: Mapping[str, Any],
        selection: LogSelection,
        budget: TimeBudget,
        warn: Callable[[str], None],
    ) -> None:
        self.prefix, self.options, self.warn = _check_prefix(prefix), options, warn
        self.config, self.selection, self.budget = dict(config), selection, budget
        self.file = ReportFile(prefix, warn)
        self.monitored: dict[str, float] = {}
        self._reset()

    def _reset(self) -> None:
        self._trackers: list[Tracker] = []
        self._charted: list[str] = []
        self._printed: SpectralReport | None = None
        self._alerts = Alerts(self.prefix)

    def start(self, trainer: Any) -> None:
        """Begin a run: write the probe's options into its configuration, and publish what a checkpoint held."""
        self._reset()
        self._publish(trainer, {})
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
        history: Sequence[SpectralReport],
        counts: tuple[int, int],
        *,
        report: SpectralReport | None,
        alphas: Mapping[str, float],
        later: Sequence[str],
    ) -> None:
        """Write a probe.

        Args:
            counts: number of probes since the start, with this one, and of those that failed.
            alphas: full keys -> values, with charts if any are left.
            later: keys without a prefix that `write_later` adds, with which these share the charts.
        """
        started = self.budget.clock()
        scalars = self.selection.scalars(report) | {
            "failed_probes": float(counts[1]),
            "probe_seconds": self.budget.last_seconds,
            "probe_overhead": self.budget.overhead,
        }
        if trainer.is_global_zero:
            names = {key: f"{self.prefix}/{key}" for key in (*scalars, *later)} | {key: key for key in alphas}
            shown = charts([*scalars, *alphas, *later], self.options.wandb_charts)
            self._charted = [names[key] for key in shown]
            row = self._row(trainer, step, {names[key]: value for key, value in {**scalars, **alphas}.items()})
            if report is None:
                self._write(row)
            else:
                self._write_report(trainer, row, report, history, counts[0] - 1)
        self._publish(trainer, scalars)
        self.budget.extend_probe(self.budget.clock() - started)

    def _write_report(
        self, trainer: Any, row: Row, report: SpectralReport, history: Sequence[SpectralReport], earlier: int
    ) -> None:
        self._configure(trainer, report)
        self._write(self._with_media(row, report, history, earlier))
        if self.options.keep_reports:
            self.file.append(trainer, report)
            for tracker in self._trackers:
                tracker.keep_growing(self.file.path)
        every = self.options.print_every
        if every is not None and earlier % every == 0:
            self._print(trainer, report)

    def write_later(
        self, trainer: Any, step: int, scalars: Mapping[str, float], measurement: StepMeasurement | None = None
    ) -> None:
        """Write what is known of the last probe only now, in a row of its own at the probe's step.

        Args:
            step: optimizer steps before the probe, so that no logger's axis goes back.
            scalars: keys without a prefix -> values.
            measurement: of the step after the probe.
        """
        if trainer.is_global_zero:
            self._write(self._row(trainer, step, {f"{self.prefix}/{key}": value for key, value in scalars.items()}))
            if measurement is not None and self.options.keep_reports:
                self.file.append(trainer, measurement)
        self._publish(trainer, scalars)

    def _publish(self, trainer: Any, scalars: Mapping[str, float]) -> None:
        former = {name: value for key, value in scalars.items() if (name := former_key(key))}
        values = {f"{self.prefix}/{key}": value for key, value in {**former, **scalars}.items()}
        self.monitored |= {key: value for key, value in values.items() if math.isfinite(value)}
        # `LightningModule.log` raises before the first batch of a resumed run.
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self.monitored.items()})

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

    def close(self, trainer: Any, step: int, report: SpectralReport | None) -> None:
        """Write what there was when training has ended: the share of the whole run, files, a table, a line."""
        budget = self.budget
        if budget.probes and budget.last_step != step:
            # The last probe's row has the share up to that step.
            self.write_later(trainer, step, {"probe_overhead": budget.overhead})
        prints = self.options.print_end
        if prints is None:
            prints = not trainer.loggers and trainer.progress_bar_callback is not None
        if trainer.is_global_zero:
            self._keep_files()
            if prints and report is not None and report is not self._printed:
                self._print(trainer, report)
        if budget.probes:
            log_above_bar(trainer, closing_line(self.prefix, budget, step, report, self.file.path))

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
            print_above_bar(trainer, report, self.prefix, self.selection.layers(list(report.layers)))
        except Exception as error:
            self.warn(f"the table of the last probe could not be printed: {error}")

    def _with_media(self, row: Row, report: SpectralReport, history: Sequence[SpectralReport], earlier: int) -> Row:
        every = self.options.log_figures_every
        if every is not None and earlier % every == 0 and self._any_takes("figures", "log_figures_every"):
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
