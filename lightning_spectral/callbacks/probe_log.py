"""`ProbeLog`: what a probe, and the step after it, log: which scalars, where, and in whose time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_spectral.callbacks.callback_metrics import CallbackMetrics
from lightning_spectral.callbacks.log_selection import LogSelection
from lightning_spectral.callbacks.report_writer import ReportWriter
from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.records.log_keys import former_key
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.records.step import StepMeasurement


@dataclass(frozen=True)
class ProbeCounts:
    """Number of probes since the start with this one, and of those that failed."""

    probes: int
    failed_probes: int


class ProbeLog:
    """Write scalars to loggers, the run's folder, the terminal and `trainer.callback_metrics`.

    Args:
        budget: time budget, in which logging counts.
        selection: which scalars.
        outputs: loggers, folder and terminal.
        monitored: `trainer.callback_metrics`.
    """

    def __init__(
        self, budget: TimeBudget, selection: LogSelection, outputs: ReportWriter, monitored: CallbackMetrics
    ) -> None:
        self.budget, self.selection, self.outputs, self.monitored = budget, selection, outputs, monitored

    def write(
        self,
        trainer: Any,
        step: int,
        history: Sequence[SpectralReport],
        counts: ProbeCounts,
        *,
        report: SpectralReport | None,
        alphas: dict[str, float],
        later: Sequence[str],
    ) -> None:
        """Write a probe.

        Args:
            trainer: Trainer with the loggers.
            step: optimizer steps before the probe.
            history, counts: last reports and number of probes.
            report: report of the probe; None if it failed.
            alphas: logged key -> exponent that an optimizer steps with.
            later: keys without a prefix that `write_later` adds.
        """
        started = self.budget.clock()
        scalars = self.selection.scalars(report) | {
            "failed_probes": float(counts.failed_probes),
            "probe_seconds": self.budget.last_seconds,
            "probe_overhead": self.budget.overhead,
        }
        self.outputs.write(
            trainer, step, scalars, alphas, report=report, history=history, probes=counts.probes, later=later
        )
        self._publish(trainer, scalars)
        self.budget.record_logging(self.budget.clock() - started)

    def write_later(
        self, trainer: Any, step: int, scalars: Mapping[str, float], measurement: StepMeasurement | None = None
    ) -> None:
        """Write what is known of the last probe only now: keys without a prefix -> values, and the step after it."""
        self.outputs.write_later(trainer, step, scalars, measurement)
        self._publish(trainer, scalars)

    def _publish(self, trainer: Any, scalars: Mapping[str, float]) -> None:
        former = {name: value for key, value in scalars.items() if (name := former_key(key))}
        names = {f"{self.outputs.prefix}/{key}": value for key, value in (former | dict(scalars)).items()}
        self.monitored.write(trainer, names)
