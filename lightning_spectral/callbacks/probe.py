"""`SpectralProbe`: measure curvature along gradient directions while a network trains, and log it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from lightning_spectral._validation import flag, positive_int
from lightning_spectral.callbacks._lightning import AnyCallback, optimizer_steps, overrides, process_group_of
from lightning_spectral.callbacks.alerts import WarnOnce
from lightning_spectral.callbacks.alpha_transfer import probe_alpha_optimizers, transfer_alphas, warn_of_unmeasured
from lightning_spectral.callbacks.batch_source import BatchChoice, BatchSource
from lightning_spectral.callbacks.log_selection import LogSelection
from lightning_spectral.callbacks.probe_trigger import ProbeTrigger
from lightning_spectral.callbacks.report_file import saved_report
from lightning_spectral.callbacks.report_writer import OutputOptions, ReportWriter
from lightning_spectral.callbacks.run_config import run_config
from lightning_spectral.callbacks.safe_measurement import SafeMeasurement, attempt
from lightning_spectral.callbacks.step_probe import StepProbe
from lightning_spectral.callbacks.swap import SwapOptimizer
from lightning_spectral.callbacks.time_budget import MAX_OVERHEAD, MIN_PROBES, TimeBudget
from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.batch_tree import FirstSamples
from lightning_spectral.layers.kinds import Kind
from lightning_spectral.layers.matrices import LayerSelection, NoMatrixError, find_layers
from lightning_spectral.measurement.loss import LossFunction, checked_loss_fn, resolve_loss
from lightning_spectral.options import Mode, Options, Precision, from_arguments
from lightning_spectral.records.log_keys import STEP_CURVATURE
from lightning_spectral.records.report import SpectralReport


class SpectralProbe(AnyCallback):
    """Measure alpha, gamma, s and the participation ratios of every layer while a network trains, and log them.

    The probe runs before an optimizer step, on the batch about to be trained on and, with gradient accumulation, on the
    step's first micro-batch; gradient and curvature are those of one loss on that batch. It probes before the first
    step, then as often as ``max_overhead`` allows and at least ``min_probes`` times, or at fixed steps, and at last
    the final weights, on batches of a further pass over the data. Training goes on as without it: weights,
    buffers, optimizer, gradients, metrics and random states are bit-identical. What it cannot measure it logs as NaN,
    with a count, and warns about once per cause; it never stops training.

    Every logger of the Trainer gets one dict per probe: `<prefix>/<quantity>_median` over all layers,
    `<prefix>/<quantity>/median_<kind>`, `<prefix>/<quantity>/<layer>`, and counts; on request figures and tables;
    and another, `<prefix>/step/...`, once the optimizer has taken the step.
    `trainer.callback_metrics` holds the last value of each that is not NaN, for every callback with a `monitor`.

    In distributed training (DDP, FSDP2) the ranks measure together, each the samples of its own batch, and all have the
    same report, weighted by samples; rank 0 logs it. Where one rank fails, all skip the probe and go on.

    Training does change with a `SpectralNewton` with alpha="probe" in the same Trainer: it steps with the measured
    exponents, which are logged as `spectral_newton/alpha/<layer>`.

    Args:
        every_n_steps: probe before optimizer step 0, N, 2 N, ... whatever it costs; None: by max_overhead.
        max_overhead: share of wall time, validation and all, that probes may take from the second one on; of no effect
            beside every_n_steps.
        min_probes: up to so many, evenly over a run whose length is known (steps, epochs or max_time), come within 20 %
            of its wall time, and so does one of the final weights when training ends, which every_n_steps takes at any
            cost. In a run of unknown length they come as soon as 20 % allow. 0: neither.
        top_k: directions per layer, K, 3 or more.
        curvature: "exact", double backward, a product per layer and direction; "ggn", Gauss-Newton of all layers at
            once; "sketch", products for all layers and several directions of each, with standard errors; "auto", the
            fastest of them that gives the Hessian's curvature.
        layers: glob patterns on names, or a callable (`MatrixLayer` -> bool); None: all matrices but embeddings.
        kinds: glob pattern -> kind of layer, where the inferred one is wrong.
        fused_qkv: glob patterns of projections that hold query, key and value in equal blocks of rows, to be measured
            apart; or pattern -> their three numbers of rows. `nn.MultiheadAttention` is split by itself.
        mode: "eval" or "train": BatchNorm's statistics and dropout in the measurement.
        max_samples: measure on the first so many samples of each batch; None: on all, or with gradient_samples on 64
            where the loss is a mean or sum of parts. A sketch of fewer than 32 takes more passes the fewer there are.
        gradient_samples: samples whose mean gradient gives sigma, u and v, of which curvature is measured on the first
            max_samples; "auto": as many as leave 5 % of sampling noise in the squared gradient of the median layer;
            None: the same for both.
        gradient_samples_max: most samples that gradient_samples="auto" takes.
        batch: "train", the batch about to be trained on; "fixed", the first of the run, kept in the CPU's memory, so
            that curves are steadier (after a resume, the first one then); or a DataLoader, whose first batch is kept.
        n_batches: average gradient and curvature over so many batches: those from the probe's step on, measured before
            the last of them, or the first ones. Gradient accumulation over as many makes it the step's whole batch.
        fixed_samples: with batch="fixed", keep as many batches as hold so many samples instead.
        micro_batch_size: samples whose graph is in memory at once; None: as many as keep the peak within about three
            times a training step's, if a batch's loss is a mean or sum of parts. Out of memory it is halved, twice.
        precision: "float32" or "float64", the lowest precision to compute in, whatever the weights' or the Trainer's.
        spectrum_top_k: singular values that the rank models are fitted to; None: top_k. They cost no curvature.
        weight_spectra: take the singular values of each weight matrix, too (`WeightSpectrum`).
        bootstrap: draws for 95 % intervals of alpha, gamma and s (`Intervals`); None or 0: none.
        curvature_fraction: draws for the trace of each layer's Hessian block, with curvature="ggn" too, and its
            fraction along the directions (`CurvatureFraction`), a Hessian-vector product each; None or 0: none.
        alignment: also take the Kronecker factors of each layer, and split alpha by them (`LayerAlignment`).
        step: also measure the optimizer's step after each probe, what it was to do to the loss and did
            (`StepMeasurement`); None: where Lightning steps one optimizer, and no parameter is in shards.
        loss_fn: (module, batch) -> scalar. None: the module's `spectral_loss(batch)`, else its `training_step`, with
            automatic optimization.
        log_layers: "auto", up to 24 layers evenly over depth; "all"; "none"; or glob patterns.
        log_quantities: of each of these layers: "auto", alpha, its r2, the largest sigma and h, and what is measured on
            request; "all"; or names.
        log_figures_every: log figures with the first probe and every so many from it on; None: never.
        log_tables: log a table of all layers with each probe.
        wandb_charts: keys that W&B makes a chart of; the others are logged, and hidden. None: all.
        wandb_alerts: send W&B alerts of a failed probe, and of steps that are too long: `step/scale` below 1/2 at three
            probes in a row.
        wandb_artifact: log the reports and their page as a W&B artifact too, when training ends.
        print_every: print a table with the first probe and every so many from it on; None: never.
        print_end: print the last probe's table when training ends; None: where the Trainer has a bar and no logger.
        swap_optimizer: train with `SpectralNewton`, at the configured rates, in place of the configured optimizer, as
            with a `SwapOptimizer` beside the probe.
        keep_reports: append each report to `spectra.jsonl` in the run's folder, for `lightning-spectral report`.
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
        min_probes: int = MIN_PROBES,
        kinds: Mapping[str, Kind] | None = None,
        fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] = (),
        mode: Mode = "eval",
        max_samples: int | None = None,
        gradient_samples: int | Literal["auto"] | None = "auto",
        gradient_samples_max: int = 4096,
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
        step: bool | None = None,
        loss_fn: LossFunction | None = None,
        log_layers: str | Sequence[str] = "auto",
        log_quantities: str | Sequence[str] = "auto",
        log_figures_every: int | None = None,
        log_tables: bool = False,
        wandb_charts: int | None = 40,
        wandb_alerts: bool = False,
        wandb_artifact: bool = False,
        print_every: int | None = None,
        print_end: bool | None = None,
        swap_optimizer: bool = False,
        keep_reports: bool = True,
        prefix: str = "spectral",
        history_size: int = 100,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.options = from_arguments(Options, arguments)
        if fixed_samples is not None and max_samples is not None:
            raise ValueError("max_samples cuts each batch, fixed_samples what is kept in all; give one of them")
        self.every_n_steps, self.prefix, self.loss_fn = every_n_steps, prefix, checked_loss_fn(loss_fn)
        self.swap = SwapOptimizer() if flag("swap_optimizer", swap_optimizer) else AnyCallback()
        self._warn_once = WarnOnce()
        self.measurement = SafeMeasurement(self.options, loss_fn, self._warn_once)
        self.budget = TimeBudget(max_overhead, min_probes)
        self.source = BatchSource(batch, n_batches, fixed_samples, gradient_samples, gradient_samples_max)
        self.trigger = ProbeTrigger(every_n_steps, self.budget, self.source, self._warn_once)
        parts = self.options.parts | (set() if step is False else {STEP_CURVATURE.part})
        self.logged = LogSelection(log_layers, log_quantities, parts, self._warn_once)
        outputs, config = from_arguments(OutputOptions, arguments), run_config(arguments)
        self.outputs = ReportWriter(prefix, outputs, config, self.logged, self.budget, self._warn_once)
        self.step_probe = StepProbe(step, self.options, loss_fn, self.outputs, self._warn_once)
        self._history: deque[SpectralReport] = deque(maxlen=positive_int("history_size", history_size))
        self.last_report: SpectralReport | None = None
        """Last report, also after a resume; None before the first probe."""
        self.probes = self.failed_probes = 0

    @property
    def state_key(self) -> str:
        """Key of this probe's state in a checkpoint."""
        return f"SpectralProbe{{'prefix': {self.prefix!r}}}"

    @property
    def history(self) -> list[SpectralReport]:
        """Last reports of this rank, the oldest first."""
        return list(self._history)

    def should_measure(self, step: int) -> bool:
        """Return whether to probe before optimizer step ``step``, counted from 0 and asked for once.

        Override for another schedule. In distributed training all ranks must give the same answer.
        """
        return self.trigger.is_due(step)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin anew, and swap the optimizer on request. Lightning loads a checkpoint after this hook."""
        self.trigger.reset()
        self.swap.setup(trainer, pl_module, stage)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        self.swap.teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop the clock, and leave the module as it was: Lightning does not call `teardown` after an error."""
        self.budget.stop()
        self.step_probe.drop()
        self.swap.on_exception(trainer, pl_module, exception)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse the state of an optimizer that is swapped out."""
        if isinstance(self.swap, SwapOptimizer):
            state = checkpoint.get("callbacks", {}).get(self.state_key) or {}
            self.swap.check(checkpoint, state.get("swap"))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what depends on the module before the first step: patterns without a layer, the loss, the strategy."""
        self._warn_once.muted = not trainer.is_global_zero
        if not self.trigger.is_resumed:
            self.outputs.monitored = {}
        self.trigger.prepare(trainer, pl_module, self)
        try:
            self.trigger.group = process_group_of(trainer)
            loss = resolve_loss(pl_module, self.loss_fn)
        except (ValueError, MeasurementError) as error:
            self.trigger.turn_off(str(error))
            return
        if loss.name.endswith(".training_step") and overrides(pl_module, "on_train_batch_start"):
            self._warn_once(
                f"{type(pl_module).__name__}.on_train_batch_start runs after the probe, which sees what it set for the "
                "batch before; if the loss depends on that, give loss_fn or spectral_loss"
            )
        try:
            options = self.options
            layers = find_layers(pl_module, layers=options.layers, kinds=options.kinds, fused_qkv=options.fused_qkv)
            self.logged.check(list(layers.layers))
        except NoMatrixError as error:
            self._warn_once(str(error))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock, and warn of matrices of alpha="probe" that are not measured."""
        self.trigger.start(trainer)
        self.outputs.start(trainer)
        if not self.trigger.off:
            self.step_probe.start(trainer, pl_module, self.trigger.group)
            warn_of_unmeasured(probe_alpha_optimizers(trainer), pl_module, self.options, self._warn_once)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Probe the final weights, stop the clock, warn of what is missing in the curves, and say what there was."""
        step = optimizer_steps(trainer)
        self.step_probe.drop()
        noise_scale = partial(self.measurement.noise_scale, pl_module, 0, self.trigger.group)
        if (batches := self.trigger.final_batches(trainer, pl_module, noise_scale)) is not None:
            # No step will be taken with the exponents of the final weights.
            alphas = transfer_alphas(None, probe_alpha_optimizers(trainer), pl_module, self.options, self.logged.layers)
            self._finish(trainer, pl_module, self._measure(trainer, pl_module, batches, 0), alphas)
        self.trigger.end(trainer)
        self.outputs.close(trainer, step, self.last_report)
        self.budget.stop()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Probe before the step on this batch, if a probe is due."""
        if self.trigger.off:
            return
        step, optimizers = optimizer_steps(trainer), probe_alpha_optimizers(trainer)
        if self.trigger.enter_step(trainer) and not self.trigger.is_pending:
            asked = attempt(partial(self.should_measure, step), self._warn_once, "no probe: should_measure failed")
            self.trigger.is_pending = bool(asked)
        noise_scale = partial(self.measurement.noise_scale, pl_module, batch_idx, self.trigger.group)
        if (batches := self.trigger.batches(trainer, pl_module, batch, noise_scale)) is None:
            return
        report = self._measure(trainer, pl_module, batches, batch_idx)
        alphas = transfer_alphas(report, optimizers, pl_module, self.options, self.logged.layers)
        first = FirstSamples(batches, None, self.source.n_batches)
        self.step_probe.keep(trainer, pl_module, first, report, batch_idx=batch_idx, step=step)
        self._finish(trainer, pl_module, report, alphas)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure the optimizer's step that followed a probe, once it is taken."""
        self.step_probe.finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return counters and last report, as plain values that load with weights_only=True."""
        return {
            **self.trigger.state_dict(),
            "swap": self.swap.state_dict() or None,
            "probes": self.probes,
            "failed_probes": self.failed_probes,
            "monitored": dict(self.outputs.monitored),
            "last_report": None if self.last_report is None else self.last_report.to_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`. The schedule given at construction counts; another one is warned of."""
        self.trigger.load_state_dict(state_dict)
        if state_dict.get("swap"):
            self.swap.load_state_dict(state_dict["swap"])
        self.outputs.monitored = dict(state_dict.get("monitored", {}))
        self.probes, self.failed_probes = state_dict.get("probes", 0), state_dict.get("failed_probes", 0)
        self.last_report = saved_report(state_dict.get("last_report"), self._warn_once)
        self.trigger.follow(self.last_report)

    def _measure(self, trainer: Any, module: Any, batches: Sequence[Any], batch_idx: int) -> SpectralReport | None:
        where: dict[str, Any] = {"step": optimizer_steps(trainer), "batch_idx": batch_idx, "group": self.trigger.group}
        report = self.measurement.report(trainer, module, batches, n_batches=self.source.n_batches, **where)
        if report is not None:
            self.last_report = report
            self._history.append(report)
        return report

    def _finish(self, trainer: Any, module: Any, report: SpectralReport | None, alphas: dict[str, float]) -> None:
        self.probes += 1
        self.failed_probes += report is None
        step, counts = optimizer_steps(trainer), (self.probes, self.failed_probes)
        self.trigger.finish(module, step, report)
        # The final weights, which no step follows, share the charts of the others.
        later = self.step_probe.keys(report)
        self.outputs.write(trainer, step, self.history, counts, report=report, alphas=alphas, later=later)
