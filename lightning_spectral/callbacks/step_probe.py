"""`StepProbe`: measure the optimizer's step that follows a probe, once it is taken, and log it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_spectral._validation import flag
from lightning_spectral.callbacks.report_writer import ReportWriter
from lightning_spectral.callbacks.safe_measurement import attempt
from lightning_spectral.distributed.dtensor import is_dtensor
from lightning_spectral.distributed.process_group import SINGLE_PROCESS, Group
from lightning_spectral.isolation.batch_tree import FirstSamples
from lightning_spectral.isolation.devices import synchronize
from lightning_spectral.isolation.sandbox import copy_batch
from lightning_spectral.measurement.loader_batches import CpuBatches
from lightning_spectral.measurement.loss import LossFunction
from lightning_spectral.measurement.step import Weights, measure_step
from lightning_spectral.options import Options
from lightning_spectral.records.log_keys import STEP_CURVATURE, STEP_KEYS, layer_key
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.records.step import StepMeasurement


@dataclass(frozen=True, eq=False)
class _Pending:
    """A step that is not taken yet.

    Attributes:
        weights: before it; None where they could not be kept.
        global_step: Lightning's count of them, which is another number once the step is taken.
    """

    weights: Weights | None
    batches: Sequence[Any]
    batch_idx: int
    report: SpectralReport
    step: int
    global_step: int


class StepProbe:
    """Keep the weights at a probe, and measure and log the step when the optimizer has taken it.

    The probe's batches are kept as they are before the step, on which `training_step` may write.

    Args:
        wanted: True; False; or None, where it can be done.
        outputs: of the probe, with the time budget in which the measurement counts.

    Attributes:
        off: why steps are not measured in this run; empty while they are.
        last: last measurement of this rank; None before the first.
    """

    def __init__(
        self,
        wanted: bool | None,
        options: Options,
        loss_fn: LossFunction | None,
        outputs: ReportWriter,
        warn: Callable[[str], None],
    ) -> None:
        self.wanted, self.loss_fn = flag("step", wanted, none=True), loss_fn
        # Of the samples of the curvature alone.
        self.options = replace(options, gradient_samples=None)
        self.outputs, self.warn = outputs, warn
        self.off = "step=False" if wanted is False else ""
        self.last: StepMeasurement | None = None
        self._group: Group = SINGLE_PROCESS
        self._pending: _Pending | None = None

    def start(self, trainer: Any, module: Any, group: Group) -> None:
        """Begin a run: decide whether its steps can be measured, alike on all ranks."""
        self._group, self._pending = group, None
        if self.wanted is False:
            return
        reasons = group.all_gather_object(obstacle(trainer, module))
        self.off = next(filter(None, reasons), "")
        if self.off and self.wanted:
            self.warn(f"step=True: the optimizer's steps are not measured, since {self.off}")

    def drop(self) -> None:
        """Let go of what is kept for a step that training did not take."""
        self._pending = None

    def keep(
        self,
        trainer: Any,
        module: Any,
        batches: Sequence[Any],
        report: SpectralReport | None,
        *,
        batch_idx: int,
        step: int,
    ) -> None:
        """Keep weights and batches at a probe, before the step; nothing if the probe failed."""
        self._pending = None
        if self.off or report is None:
            return
        kept = attempt(partial(self._copies, module, batches), self.warn, _failure(step))
        weights, batches = (None, ()) if kept is None else kept
        self._pending = _Pending(weights, batches, batch_idx, report, step, int(trainer.global_step))

    def keys(self, report: SpectralReport | None) -> list[str]:
        """Return the keys, without a prefix, that are logged of the step after this probe."""
        if self.off or report is None:
            return []
        return [*STEP_KEYS, *(layer_key(STEP_CURVATURE.name, name) for name in self._layers(report))]

    def finish(self, trainer: Any, module: Any) -> None:
        """Measure and log the step that was waited for, if it is taken."""
        pending = self._pending
        if pending is None or trainer.global_step == pending.global_step:
            return
        self._pending = None
        budget = self.outputs.budget
        synchronize(module.parameters())
        started = budget.clock()
        self.last = self._measure(module, pending)
        nothing = dict.fromkeys(self.keys(pending.report), float("nan"))
        scalars = nothing if self.last is None else nothing | self.last.scalars(self._layers(pending.report))
        self.outputs.write_later(trainer, pending.step, scalars, self.last)
        budget.extend_probe(budget.clock() - started)

    def _layers(self, report: SpectralReport) -> list[str]:
        return self.outputs.selection.step_layers(list(report.layers))

    def _copies(self, module: Any, batches: Sequence[Any]) -> tuple[Weights, Sequence[Any]]:
        if not isinstance(batches, CpuBatches):
            n = self.options.max_samples
            cut = batches if n is None else FirstSamples(batches, n)
            batches = [copy_batch(batch, self.options.precision) for batch in cut]
        return Weights.copied(module), batches

    def _measure(self, module: Any, pending: _Pending) -> StepMeasurement | None:
        # Where memory ran out on one rank alone, none must wait for it.
        kept = self._group.all_gather_object(pending.weights is not None)
        if pending.weights is None:
            # Why was said when they were not kept.
            return None
        if not all(kept):
            self.warn(f"{_failure(pending.step)}: rank {kept.index(False)} could not keep the weights before it")
            return None
        # Where the probe cut its batches, memory was enough for micro-batches of that size.
        size, samples = pending.report.micro_batch_size, pending.report.n_samples
        was_cut = size is not None and samples is not None and size * pending.report.n_batches < samples
        options = replace(self.options, micro_batch_size=size) if was_cut else self.options
        where: dict[str, Any] = {"before": pending.weights, "batch_idx": pending.batch_idx, "group": self._group}
        measure = partial(measure_step, module, pending.batches, options, self.loss_fn, **where)
        measurement = attempt(measure, self.warn, _failure(pending.step))
        if measurement is None:
            return None
        if measurement.failed:
            self.warn(f"{_failure(pending.step)}: {measurement.failed}")
        for note in measurement.notes:
            self.warn(f"the optimizer's step: {note}")
        return replace(measurement, step=pending.step)


def obstacle(trainer: Any, module: Any) -> str:
    """Return why the steps of a training cannot be measured; empty if they can."""
    name = type(module).__name__
    if not module.automatic_optimization:
        return (
            f"{name} optimizes manually, where nothing tells which of its optimizers' steps belong to a batch; use "
            "automatic optimization, or leave step out"
        )
    trained = set(map(id, module.parameters()))
    # Where configure_optimizers returns None, Lightning steps one of no parameter.
    stepped = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"])
    ]
    if len(stepped) != 1:
        return (
            f"configure_optimizers of {name} gave {len(stepped) or 'no'} optimizer{'s' * (len(stepped) > 1)} of its "
            "parameters, and a step is that of one; return one, or leave step out"
        )
    if shards := [parameter for parameter, value in module.named_parameters() if is_dtensor(value)]:
        return (
            f"{shards[0]} and {len(shards) - 1} more parameters are in shards (DTensor), of which no rank holds the "
            "whole update; train with DDP, or leave step out"
        )
    return ""


def _failure(step: int) -> str:
    return f"the optimizer's step {step} was not measured"
