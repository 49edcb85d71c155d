"""`ProbeLog`: what a probe, and the step after it, log: which scalars, where, and in whose time."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_spectral.callbacks.log_selection import LogSelection
from lightning_spectral.callbacks.report_writer import ReportWriter, log_above_bar
from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.records.log_keys import former_key
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.records.step import StepMeasurement
from lightning_spectral.report.terminal.formatting import duration, fixed, percent


class CallbackMetrics:
    """Keep the last value of each key, and publish it in `trainer.callback_metrics`.

    A NaN does not replace the value before it: EarlyStopping ends training at a NaN, and a probe that fails must not.
    A key that never had a value is absent.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def write(self, trainer: Any, scalars: Mapping[str, float]) -> None:
        """Keep and publish the scalars of a probe."""
        self.values |= {key: value for key, value in scalars.items() if math.isfinite(value)}
        self.publish(trainer)

    def publish(self, trainer: Any) -> None:
        """Publish the values, also in a resumed run that has yet to probe."""
        # `LightningModule.log` raises before the first batch of a resumed run.
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self.values.items()})


class ProbeLog:
    """Write scalars to loggers, the run's folder, the terminal and `trainer.callback_metrics`."""

    def __init__(
        self, budget: TimeBudget, selection: LogSelection, outputs: ReportWriter, monitored: CallbackMetrics
    ) -> None:
        self.budget, self.selection, self.outputs, self.monitored = budget, selection, outputs, monitored

    def write(
        self,
        trainer: Any,
        step: int,
        history: Sequence[SpectralReport],
        counts: tuple[int, int],
        *,
        report: SpectralReport | None,
        alphas: dict[str, float],
        later: Sequence[str],
    ) -> None:
        """Write a probe; ``counts`` are those since the start, with this one: of all, and of those that failed."""
        probes, failed_probes = counts
        started = self.budget.clock()
        scalars = self.selection.scalars(report) | {
            "failed_probes": float(failed_probes),
            "probe_seconds": self.budget.last_seconds,
            "probe_overhead": self.budget.overhead,
        }
        self.outputs.write(trainer, step, scalars, alphas, report=report, history=history, probes=probes, later=later)
        self._publish(trainer, scalars)
        self.budget.record_logging(self.budget.clock() - started)

    def write_later(
        self, trainer: Any, step: int, scalars: Mapping[str, float], measurement: StepMeasurement | None = None
    ) -> None:
        """Write what is known of the last probe only now: keys without a prefix -> values, and the step after it."""
        self.outputs.write_later(trainer, step, scalars, measurement)
        self._publish(trainer, scalars)

    def close(self, trainer: Any, step: int, report: SpectralReport | None) -> None:
        """Write what there was when training has ended: the share of the whole run, a line, a table where wanted."""
        if self.budget.probes and self.budget.last_step != step:
            # The last probe's row has the share up to that step.
            self.write_later(trainer, step, {"probe_overhead": self.budget.overhead})
        self.outputs.end(trainer, report)
        if self.budget.probes:
            log_above_bar(trainer, closing_line(self.outputs.prefix, self.budget, step, report, self.outputs.file.path))

    def _publish(self, trainer: Any, scalars: Mapping[str, float]) -> None:
        former = {name: value for key, value in scalars.items() if (name := former_key(key))}
        names = {f"{self.outputs.prefix}/{key}": value for key, value in (former | dict(scalars)).items()}
        self.monitored.write(trainer, names)


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
