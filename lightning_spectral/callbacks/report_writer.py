"""Where a probe's report goes: loggers, figures and tables in them, and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from lightning_spectral.callbacks.log_selection import charts
from lightning_spectral.callbacks.progress_bar import print_above_bar
from lightning_spectral.numerics.statistics import evenly
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report import figures
from lightning_spectral.report.trackers import Row, Tracker, tracker_of

MOST_ROWS = 256
"""Layers in a table, evenly over depth."""

MOST_LINES = 10
"""Probes in the chart of alpha by depth, evenly over training."""

FIGURES: dict[str, Callable[[SpectralReport, Sequence[SpectralReport]], Any]] = {
    "alpha_by_depth": lambda report, history: figures.plot_alpha_by_depth(report),
    "power_law": lambda report, history: figures.plot_power_law(report),
    "transfer_identity": lambda report, history: figures.plot_transfer_identity(report),
    "rank_models": lambda report, history: figures.plot_rank_models_over_training(history),
}
"""Name -> how to draw it of the last report and the ones kept."""


@dataclass(frozen=True)
class OutputOptions:
    """What a probe gives beside scalars, as documented of `SpectralProbe`.

    Raises:
        ValueError: for an option out of range.
        ImportError: for figures without matplotlib.
    """

    log_figures_every: int | None = None
    log_tables: bool = False
    wandb_charts: int | None = 40
    print_every: int | None = None
    print_end: bool | None = None

    def __post_init__(self) -> None:
        """Check each of them."""
        for option in ("log_figures_every", "print_every", "wandb_charts"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{option} must be None or a whole number of at least 1, got {value!r}")
        if not isinstance(self.log_tables, bool):
            raise ValueError(f"log_tables must be True or False, got {self.log_tables!r}")
        if self.print_end not in (None, True, False):
            raise ValueError(f"print_end must be None, True or False, got {self.print_end!r}")
        if self.log_figures_every is not None and find_spec("matplotlib") is None:
            raise ImportError('log_figures_every needs matplotlib: pip install "lightning-spectral[plot]"')


class ReportWriter:
    """Give each report to the loggers of a Trainer and to the terminal, from the first process alone.

    Args:
        prefix: first part of the keys.
        options: what to give.
        layers: of the names of all layers, those shown one by one.
        warn: tells a text once.
    """

    def __init__(
        self,
        prefix: str,
        options: OutputOptions,
        layers: Callable[[Sequence[str]], list[str]],
        warn: Callable[[str], None],
    ) -> None:
        self.prefix, self.options, self.layers, self.warn = prefix, options, layers, warn
        self.start()

    def start(self) -> None:
        """Another run begins."""
        self._trackers: list[Tracker] = []
        self._printed: SpectralReport | None = None

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
    ) -> None:
        """Log a probe.

        Args:
            trainer: whose loggers and terminal.
            step: optimizer steps before the probe.
            scalars: keys without a prefix -> values.
            extra: whole keys -> values, with charts if there are any left.
            report: what was measured; None where nothing was.
            history: the reports kept, with this one.
            probes: how many there were so far, with this one.
        """
        if not trainer.is_global_zero:
            return
        if [tracker.logger for tracker in self._trackers] != list(trainer.loggers):
            self._trackers = [tracker_of(logger, self.warn) for logger in trainer.loggers]
        whole = {f"{self.prefix}/{key}": value for key, value in scalars.items()} | (extra or {})
        shown = charts([*scalars, *(extra or {})], self.options.wandb_charts)
        row = Row(self.prefix, step, whole, [key if key in (extra or {}) else f"{self.prefix}/{key}" for key in shown])
        if report is not None:
            row = self._with_media(row, report, history, probes)
        for tracker in self._trackers:
            tracker.write(row)
        every = self.options.print_every
        if report is not None and every is not None and (probes - 1) % every == 0:
            self._print(trainer, report)

    def end(self, trainer: Any, report: SpectralReport | None) -> None:
        """Training ends: print the last report, if it is to be and was not yet."""
        wanted = self.options.print_end
        if wanted is None:
            wanted = not trainer.loggers and trainer.progress_bar_callback is not None
        if wanted and report is not None and report is not self._printed and trainer.is_global_zero:
            self._print(trainer, report)

    def _print(self, trainer: Any, report: SpectralReport) -> None:
        self._printed = report
        try:
            print_above_bar(trainer, report, self.prefix, self.layers(list(report.layers)))
        except Exception as error:
            self.warn(f"the table of the last probe could not be printed: {error}")

    def _with_media(self, row: Row, report: SpectralReport, history: Sequence[SpectralReport], probes: int) -> Row:
        every = self.options.log_figures_every
        if every is not None and (probes - 1) % every == 0 and self._takers("figures", "log_figures_every"):
            row = replace(row, figures=self._figures(report, history))
        if self.options.log_tables and self._takers("tables", "log_tables"):
            row = replace(row, table=self._table(report), lines=alpha_by_depth(history))
        return row

    def _takers(self, what: str, option: str) -> bool:
        if any(getattr(tracker, what) for tracker in self._trackers):
            return True
        names = ", ".join(type(tracker.logger).__name__ for tracker in self._trackers)
        self.warn(
            f"{option}: no logger of the Trainer takes {what} ({names or 'it has none'}); "
            f"WandbLogger, TensorBoardLogger and MLFlowLogger do{', and CSVLogger' * (what == 'tables')}"
        )
        return False

    def _figures(self, report: SpectralReport, history: Sequence[SpectralReport]) -> dict[str, Any]:
        drawn: dict[str, Any] = {}
        for name, draw in FIGURES.items():
            try:
                drawn[name] = draw(report, history)
            except Exception as error:
                self.warn(f"the figure {name} could not be drawn: {error}")
        return drawn

    def _table(self, report: SpectralReport) -> list[dict[str, Any]]:
        rows = report.rows()
        if len(rows) <= MOST_ROWS:
            return rows
        self.warn(f"log_tables: {MOST_ROWS} of {len(rows)} layers are in the table, evenly over depth")
        return [rows[i] for i in evenly(len(rows), MOST_ROWS)]


def alpha_by_depth(history: Sequence[SpectralReport]) -> dict[str, tuple[list[float], list[float]]]:
    """Alpha against the layer's place in the network, a line for each of up to `MOST_LINES` reports."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for i in evenly(len(history), MOST_LINES) if history else ():
        layers = list(history[i].layers.values())
        known = [(j, x.alpha.exponent) for j in evenly(len(layers), MOST_ROWS) if (x := layers[j]).alpha.n_used]
        known = [(j + 1, alpha) for j, alpha in known if alpha == alpha]
        if known:
            places, alphas = zip(*known, strict=True)
            lines[f"step {history[i].step}"] = (list(places), list(alphas))
    return lines
