"""`SpectralProbe`: measure curvature along gradient directions while a network trains, and log it."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_spectral._serialization import UNREADABLE
from lightning_spectral.callbacks._lightning import (
    AnyCallback,
    optimizer_steps,
    processes_of,
    repeats_a_batch,
    sharded,
    steps_in_all,
    to_device,
)
from lightning_spectral.callbacks.alpha_transfer import Fits, alphas_in_use, fits_of, takers, unmeasured, write_alphas
from lightning_spectral.callbacks.batch_source import BatchChoice, BatchSource
from lightning_spectral.callbacks.budget_advice import Advice
from lightning_spectral.callbacks.callback_metrics import CallbackMetrics
from lightning_spectral.callbacks.log_selection import Logged
from lightning_spectral.callbacks.report_writer import OutputOptions, ReportWriter
from lightning_spectral.callbacks.swap import SwapOptimizer
from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.callbacks.warn_once import WarnOnce
from lightning_spectral.distributed.process_group import SingleProcess
from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.interrupts import interruption
from lightning_spectral.isolation.sandbox import synchronize
from lightning_spectral.layers.kinds import Kind
from lightning_spectral.layers.matrices import LayerSelection, MatrixLayer, NoMatrixError, find_layers
from lightning_spectral.measurement.loss import LossFunction, resolve_loss
from lightning_spectral.measurement.pipeline import run_measurement
from lightning_spectral.optim.spectral_newton import SpectralNewton
from lightning_spectral.options import Mode, Options, Precision
from lightning_spectral.records.report import SpectralReport

logger = logging.getLogger(__name__)

NAMES_SHOWN = 8
"""How many layers a message names."""


MAX_OVERHEAD = 0.05
"""Share of wall time that probes take by default."""


class SpectralProbe(AnyCallback):
    """Measure alpha, gamma, s and the participation ratios of every layer while a network trains, and log them.

    The probe runs before an optimizer step, on the batch about to be trained on and, with gradient accumulation, on the
    first micro-batch of a window; gradient and curvature are those of one loss on that batch. It probes before the
    first step and then as often as ``max_overhead`` allows, or at fixed steps. Training goes on as if it had
    not been there: weights, buffers, optimizer, gradients, metrics and random states are bit-identical. What it cannot
    measure it logs as NaN, with a count, and warns about once per cause; it never stops training.

    Every logger of the Trainer gets one dict per probe: `<prefix>/<quantity>_median` over all layers,
    `<prefix>/kind/<kind>/<quantity>_median`, `<prefix>/<layer>/<quantity>`, and counts; on request figures and tables.
    `trainer.callback_metrics` holds the last of each that is not NaN, for `EarlyStopping`, `ModelCheckpoint` and
    schedulers with a `monitor`.

    In distributed training (DDP, FSDP2) the processes measure together: each takes the samples of its own batch, and
    gradient and curvature are those of all of them, weighted by samples, so that every process has the same report. The
    first one logs. Where one of them fails, all skip the probe, and go on.

    Training does change where a `SpectralNewton` with alpha="probe" is in the same Trainer: before the step it is given
    the alphas measured. The exponent that each layer then steps
    with is logged as `spectral_newton/<layer>/alpha`.

    Args:
        every_n_steps: probe before optimizer step 0, N, 2 N, ... whatever it costs; None: by max_overhead.
        max_overhead: share of wall time, validation and all, that probes may take from the second one on; of no effect
            beside every_n_steps.
        top_k: directions per layer, 3 or more.
        curvature: "exact", double backward, a product per layer and direction; "ggn", Gauss-Newton of all layers at
            once; "sketch", products for all layers and several directions of each, with standard errors; "auto", the
            fastest of them that gives the Hessian's curvature.
        layers: glob patterns on names of layers, or a callable; None: all matrices but embeddings.
        kinds: glob pattern -> kind of layer, where the inferred one is wrong.
        fused_qkv: glob patterns of projections that hold query, key and value in equal blocks of rows, to be measured
            apart; or pattern -> their three numbers of rows.
        mode: "eval" or "train": BatchNorm's statistics and dropout in the measurement.
        max_samples: measure on the first so many samples of each batch; None: on all. Below 32 there is no sketch, and
            the exact products in its place take longer.
        batch: "train", the batch about to be trained on; "fixed", the first of the run, kept in the CPU's memory, so
            that curves are steadier (after a resume, the first one then); or a DataLoader, whose first batch is kept.
        n_batches: average gradient and curvature over so many batches: those from the probe's step on, measured before
            the last of them, or the first ones. Gradient accumulation over as many makes it the step's whole batch.
        fixed_samples: with batch="fixed", keep as many batches as hold so many samples instead.
        micro_batch_size: samples whose graph is in memory at once; None: as many as keep the peak within about three
            times a training step's. Out of memory, a probe tries again with half as many, twice.
        precision: "float32" or "float64", the lowest precision to compute in, whatever the Trainer's.
        spectrum_top_k: singular values that the rank models are fitted to; None: top_k. They cost no curvature.
        weight_spectra: take the singular values of each weight matrix, too.
        bootstrap: draws for 95 % intervals of alpha, gamma and s; None or 0: none.
        curvature_fraction: draws for the trace of each layer's Hessian block, of which the fraction along the
            directions is logged; a Hessian-vector product each; None or 0: none.
        alignment: also take the Kronecker factors of each layer, and log how they split alpha (`LayerAlignment`).
        loss_fn: (module, batch) -> scalar. None: the module's `spectral_loss(batch)`, else its `training_step`, with
            automatic optimization.
        log_layers: "auto", up to 24 layers evenly over depth; "all"; "none"; or glob patterns.
        log_quantities: of each of these layers: "auto", alpha, its r2 and what is measured on request; "all"; or names.
        log_figures_every: log figures with the first probe and every so many from it on; None: never.
        log_tables: log a table of all layers with each probe.
        wandb_charts: keys that W&B makes a chart of; the others are logged, and hidden. None: all.
        print_every: print a table with the first probe and every so many from it on; None: never.
        print_end: print the last probe's table when training ends; None: where the Trainer has a bar and no logger.
        swap_optimizer: train with `SpectralNewton` and its defaults in place of the configured optimizer, as with a
            `SwapOptimizer` beside the probe.
        prefix: first part of the logged keys. Two probes in one Trainer need two.
        history_size: how many of the last reports are kept in `history`.

    Raises:
        ValueError: at construction, for an option out of range; when fitting starts, for a pattern without a layer.

    >>> probe = SpectralProbe(every_n_steps=500, max_samples=256)
    >>> probe.should_measure(1000), probe.should_measure(1001), probe.last_report
    (True, False, None)
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        max_overhead: float = MAX_OVERHEAD,
        top_k: int = 20,
        curvature: str = "auto",
        layers: LayerSelection = None,
        *,
        kinds: Mapping[str, Kind] | None = None,
        fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] = (),
        mode: Mode = "eval",
        max_samples: int | None = None,
        batch: BatchChoice = "train",
        n_batches: int = 1,
        fixed_samples: int | None = None,
        micro_batch_size: int | None = None,
        precision: Precision = "float32",
        spectrum_top_k: int | None = None,
        weight_spectra: bool = False,
        bootstrap: int | None = None,
        curvature_fraction: int | None = None,
        alignment: bool = False,
        loss_fn: LossFunction | None = None,
        log_layers: str | Sequence[str] = "auto",
        log_quantities: str | Sequence[str] = "auto",
        log_figures_every: int | None = None,
        log_tables: bool = False,
        wandb_charts: int | None = 40,
        print_every: int | None = None,
        print_end: bool | None = None,
        swap_optimizer: bool = False,
        prefix: str = "spectral",
        history_size: int = 100,
    ) -> None:
        super().__init__()
        self.options = Options(
            top_k=top_k,
            curvature=curvature,
            layers=layers,
            kinds=kinds,
            fused_qkv=fused_qkv,
            mode=mode,
            max_samples=max_samples,
            micro_batch_size=micro_batch_size,
            precision=precision,
            spectrum_top_k=spectrum_top_k,
            weight_spectra=weight_spectra,
            bootstrap=bootstrap,
            curvature_fraction=curvature_fraction,
            alignment=alignment,
        )
        self.every_n_steps = None if every_n_steps is None else _at_least_one("every_n_steps", every_n_steps)
        self.budget = TimeBudget(max_overhead)
        self.swap = SwapOptimizer() if swap_optimizer else None
        self.source = BatchSource(batch, n_batches, fixed_samples)
        if fixed_samples is not None and max_samples is not None:
            raise ValueError("max_samples cuts each batch, fixed_samples what is kept in all; give one of them")
        self._history: deque[SpectralReport] = deque(maxlen=_at_least_one("history_size", history_size))
        # Trackers make paths of files of it.
        if {"", ".", ".."} & set(re.split(r"[/\\]", prefix)):
            raise ValueError(
                f"prefix must be a name without slashes at its ends, or names with one slash between them, none of "
                f"them . or .., got {prefix!r}"
            )
        self.prefix = prefix
        self._warn_once = WarnOnce()
        self.logged = Logged(log_layers, log_quantities, self.options.parts, self._warn_once)
        outputs = OutputOptions(log_figures_every, log_tables, wandb_charts, print_every, print_end)
        self.outputs = ReportWriter(prefix, outputs, self.logged.layers, self._warn_once)
        self.advice = Advice(self.budget, self._warn_once)
        self.monitored = CallbackMetrics()
        if loss_fn is not None and not callable(loss_fn):
            raise ValueError(f"loss_fn must be a callable (module, batch) -> scalar, got {loss_fn!r}")
        self.loss_fn = loss_fn
        self.probes = 0
        self.failed_probes = 0
        self._disabled = False
        self._off = self._without_batches = ""
        self._processes = SingleProcess()
        self._last_report: SpectralReport | None = None
        self._resumed = False
        self._window: int | None = None
        self._collecting = False
        self._collected = 0.0
        self._agreed: Callable[[int], int] = int
        self._chosen = ""

    @property
    def state_key(self) -> str:
        """Tells this probe's state in a checkpoint from another probe's."""
        return f"SpectralProbe{{'prefix': {self.prefix!r}}}"

    @property
    def history(self) -> list[SpectralReport]:
        """The last reports of this process, the oldest first."""
        return list(self._history)

    @property
    def last_report(self) -> SpectralReport | None:
        """The last report, also after a resume; None before the first probe."""
        return self._last_report

    def should_measure(self, step: int) -> bool:
        """Whether to probe before optimizer step ``step``, counted from 0 and asked for once.

        Override for another schedule. In distributed training every process must give the same answer.
        """
        if self.every_n_steps is None:
            return self.budget.due(step, self._agreed)
        return step % self.every_n_steps == 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Swap the optimizer, on request."""
        # What a checkpoint says otherwise is loaded between this hook and `on_fit_start`.
        self._resumed = self._collecting = False
        if self.swap is not None:
            self.swap.setup(trainer, pl_module, stage)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        if self.swap is not None:
            self.swap.teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop the clock, and leave the module as it was: Lightning does not call `teardown` after an error."""
        self.budget.stop()
        if self.swap is not None:
            self.swap.on_exception(trainer, pl_module, exception)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse the state of an optimizer that is swapped out."""
        if self.swap is not None:
            own = checkpoint.get("callbacks", {}).get(self.state_key) or {}
            self.swap.check(checkpoint, own.get("swap"))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what depends on the module, before the first step: a pattern without a layer, a loss not known."""
        self._window = None
        self._disabled = False
        self._off = self._without_batches = ""
        self._processes = SingleProcess()
        self._warn_once.muted = not trainer.is_global_zero
        if not self._resumed:
            self.monitored.values = {}
        elif self.source.choice == "fixed":
            self._warn_once(
                "batch='fixed' keeps the first batches after the resume, not those before it; "
                "a DataLoader as batch gives the same ones"
            )
        self.source.forget()
        self.source.check_loader()
        taken = self.source.takes_per_probe
        if self.every_n_steps is not None and self.budget.max_overhead != MAX_OVERHEAD:
            self._warn_once(
                f"max_overhead={self.budget.max_overhead:g} has no effect beside every_n_steps={self.every_n_steps}, "
                "which probes at fixed steps whatever it costs; give one of them"
            )
        if self.every_n_steps is not None and self.every_n_steps * trainer.accumulate_grad_batches < taken:
            self._warn_once(
                f"a probe takes n_batches={taken} batches of training, more than there are in "
                f"every_n_steps={self.every_n_steps} steps, so probes come less often"
            )
        if strategy := sharded(trainer):
            self._disable(
                f"{strategy} flattens parameters into shards, where no matrix can be measured; train with "
                "ModelParallelStrategy (FSDP2) or DDP"
            )
            return
        try:
            self._processes = processes_of(trainer)
            resolve_loss(pl_module, self.loss_fn)
        except (ValueError, MeasurementError) as error:
            self._disable(str(error))
            return
        try:
            found = self._found(pl_module)
        except NoMatrixError as error:
            self._warn_once(str(error))
            return
        self.logged.check(list(found))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock, and say which matrices of alpha="probe" are not measured."""
        for rank, why in enumerate(self._processes.all_gather_object(self._off)):
            if why and not self._disabled:
                self._disable(f"process {rank}: {why}")
        if not self._disabled and (missing := unmeasured(takers(trainer), pl_module, self._layers(pl_module))):
            self._warn_once(
                f"alpha='probe': {', '.join(missing[:NAMES_SHOWN])}{' and others' * (len(missing) > NAMES_SHOWN)} are "
                "not measured, so their alpha stays as it is; choose them with layers, or leave them to AdamW"
            )
        self._agreed = trainer.strategy.broadcast if trainer.world_size > 1 else int
        self.advice.start()
        self.outputs.start()
        self.budget.start(optimizer_steps(trainer))
        self.monitored.publish(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock, say what a user would miss in the curves, and print the last probe where that is wanted."""
        if self.probes == 1 and self.every_n_steps is None:
            self.advice.judge(optimizer_steps(trainer), self._last_report, None)
        self._look_back()
        self.budget.stop()
        self.outputs.end(trainer, self._last_report)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Probe, if it is time, before the step on this batch."""
        if self._disabled:
            return
        optimizers = takers(trainer)
        step = optimizer_steps(trainer)
        if step != self._window:
            self._window = step
            self.budget.seen(step)
            if 1 < self.source.takes_per_probe <= trainer.accumulate_grad_batches:
                # An epoch's end cut the last window short; a probe takes the batches of one step.
                self.source.forget()
            if self.probes == 1 and self.every_n_steps is None:
                self.advice.judge(step, self._last_report, lambda: steps_in_all(trainer))
            self._collecting |= self.should_measure(step)
        if not (self._collecting or self.source.collects):
            return
        synchronize(pl_module.parameters())
        started = self.budget.clock()
        batches = self._batches(trainer, pl_module, batch)
        if not self._collecting:
            self._collected += self.budget.clock() - started
            return
        ready = self._all_ready(batches is not None)
        if batches is None or not ready:
            self._collected += self.budget.clock() - started
            return
        if self._processes.size > 1 and repeats_a_batch(trainer):
            batches = []
        report = self._measure(trainer, pl_module, batches, batch_idx, step)
        self._collecting = False
        alphas = self._set_alphas(optimizers, pl_module, fits_of(report))
        synchronize(pl_module.parameters())
        self.probes += 1
        self.failed_probes += report is None
        self.budget.probed(step, self._collected + self.budget.clock() - started)
        self._collected = 0.0
        self._write(trainer, report, alphas, step)

    def _write(self, trainer: Any, report: SpectralReport | None, alphas: dict[str, float], step: int) -> None:
        cost = {"probe_seconds": self.budget.last_seconds, "probe_overhead": self.budget.overhead}
        counts = {"failed_probes": float(self.failed_probes)}
        started = self.budget.clock()
        scalars = self.logged.scalars(report) | counts | cost
        self.outputs.write(trainer, step, scalars, alphas, report=report, history=self.history, probes=self.probes)
        self.monitored.write(trainer, {f"{self.prefix}/{key}": value for key, value in scalars.items()})
        self.budget.logged(self.budget.clock() - started)

    def state_dict(self) -> dict[str, Any]:
        """Counters and last report, as plain values that load with weights_only=True."""
        return {
            "every_n_steps": self.every_n_steps,
            "budget": self.budget.state_dict(),
            "swap": None if self.swap is None else self.swap.state_dict(),
            "probes": self.probes,
            "failed_probes": self.failed_probes,
            "collecting": self._collecting,
            "monitored": dict(self.monitored.values),
            "last_report": None if self._last_report is None else self._last_report.to_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`. The schedule given at construction counts; one that differs is told."""
        every = state_dict.get("every_n_steps", self.every_n_steps)
        if every != self.every_n_steps:
            self._warn_once(
                f"the checkpoint was written with every_n_steps={every}; going on with {self.every_n_steps}"
            )
        try:
            self.budget.load_state_dict(state_dict["budget"])
        except KeyError as error:
            self._warn_once(
                f"the checkpoint says nothing of the time probes took ({error}); it is counted from here on"
            )
        if self.swap is not None and state_dict.get("swap"):
            self.swap.load_state_dict(state_dict["swap"])
        self._resumed = bool(state_dict.get("probes"))
        # The batches are not in the checkpoint: a probe that was collecting them begins anew.
        self._collecting = state_dict.get("collecting", False)
        self.monitored.values = dict(state_dict.get("monitored", {}))
        self.probes, self.failed_probes = state_dict.get("probes", 0), state_dict.get("failed_probes", 0)
        saved = state_dict.get("last_report")
        try:
            self._last_report = None if saved is None else SpectralReport.from_dict(saved)
        except UNREADABLE as error:
            self._last_report = None
            self._warn_once(
                f"the checkpoint's last report cannot be read ({error}); there is none until the next probe"
            )

    def _batches(self, trainer: Any, module: Any, batch: Any) -> Sequence[Any] | None:
        if self._without_batches:
            return None
        try:
            if self.source.collects:
                self.source.collect(batch)
            if not self._collecting:
                return None
            return self.source.batches(
                batch, module, lambda loaded: to_device(trainer, module, loaded), self._processes
            )
        except Exception as error:
            self._without_batches = str(error)
            return None

    def _all_ready(self, ready: bool) -> bool:
        """Whether every process has its batches; where one of them cannot have them, all are off."""
        told = self._processes.all_gather_object((ready, self._without_batches))
        for rank, (_, why) in enumerate(told):
            if why:
                where = f"process {rank}: " if len(told) > 1 else ""
                self._disable(f"{where}its batches cannot be had: {why}")
                return False
        return all(ready for ready, _ in told)

    def _look_back(self) -> None:
        """Say at the end of training what a user would miss in the curves."""
        if self._disabled or self.failed_probes:
            return
        if not self.probes and self._collecting:
            self._warn_once(
                f"training ended before there were the batches that a probe takes ({self.source.told}): there was none"
            )
        elif self.probes == 1 and self.every_n_steps is None:
            self.advice.look_back()

    def _measure(
        self, trainer: Any, module: Any, batches: Sequence[Any], batch_idx: int, step: int
    ) -> SpectralReport | None:
        try:
            report = run_measurement(
                module, batches, self.options, self.loss_fn, batch_idx=batch_idx, group=self._processes
            )
        except Exception as error:
            # Whatever goes wrong in here, the training run is not ours to end; nor, where the user ends it and the
            # error is what that led to, ours to go on with.
            if end := interruption(error):
                raise end from error
            self._warn_once(f"nothing was measured at step {step}: {type(error).__name__}: {error}")
            return None
        report = report.at(step=step, epoch=trainer.current_epoch)
        for text in report.problems():
            self._warn_once(text)
        if report.chosen and report.chosen != self._chosen:
            self._chosen = report.chosen
            logger.info("step %d, curvature by %s", step, report.chosen)
        self._last_report = report
        self._history.append(report)
        return report

    def _set_alphas(self, optimizers: Sequence[SpectralNewton], module: Any, fits: Fits) -> dict[str, float]:
        """Give the optimizers what was measured; what to log of their exponents."""
        if not optimizers:
            return {}
        layers = self._layers(module)
        write_alphas(optimizers, module, layers, fits)
        logged = self.logged.layers(list(layers))
        return alphas_in_use(optimizers, module, {name: layers[name] for name in logged})

    def _layers(self, module: Any) -> dict[str, MatrixLayer]:
        try:
            return self._found(module)
        except Exception:
            # The measurement fails for the same reason, and says so.
            return {}

    def _found(self, module: Any) -> dict[str, MatrixLayer]:
        options = self.options
        return find_layers(module, layers=options.layers, kinds=options.kinds, fused_qkv=options.fused_qkv).layers

    def _disable(self, why: str) -> None:
        self._disabled, self._off = True, why
        self._warn_once(f"SpectralProbe is off: {why}")


def _at_least_one(option: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{option} must be a whole number of at least 1, got {value!r}")
    return value
