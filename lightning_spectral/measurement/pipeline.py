"""One measurement, from a model and batches to a report, in the order of the stages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_spectral.curvature.selection import PRODUCT
from lightning_spectral.distributed.process_group import SINGLE_PROCESS, Group
from lightning_spectral.layers.matrices import LayerSet, with_seen_kinds
from lightning_spectral.measurement.directions import leading_directions, noise_of_layers
from lightning_spectral.measurement.estimation import Evaluation, estimate_curvature, estimate_trace, wants_graph
from lightning_spectral.measurement.fitting import RawMeasurement, fit_layers, omission_notes
from lightning_spectral.measurement.gradients import ObjectiveGradients, cut_for_gradient, gradient_parts, sum_gradients
from lightning_spectral.measurement.kronecker_factors import kronecker_factors
from lightning_spectral.measurement.loss import LossFunction, resolve_loss
from lightning_spectral.measurement.micro_batches import MicroBatch, within_memory
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.measurement.setup import NetworkCopy, isolated_copy, select_layers, set_up_objective
from lightning_spectral.measurement.train_mode import other_loss_in_training
from lightning_spectral.measurement.watch import Watch
from lightning_spectral.numerics.gradient_noise import GradientNoise
from lightning_spectral.numerics.statistics import median
from lightning_spectral.options import Options
from lightning_spectral.records.report import SpectralReport


def run_measurement(
    model: nn.Module,
    batches: Sequence[Any],
    options: Options,
    loss_fn: LossFunction | None = None,
    *,
    batch_idx: int = 0,
    n_batches: int | None = None,
    compare_modes: bool = True,
    group: Group = SINGLE_PROCESS,
) -> SpectralReport:
    """Measure gradient spectrum and curvature along it, of every layer; one joint result for all ranks of ``group``.

    Unlike `measure_spectra` it does not warn: callers read the report's ``failed`` and ``warnings`` themselves.

    Args:
        model, loss_fn: as in `measure_spectra`.
        batches: of this rank, which may have none; gradient and curvature are those of the mean of the losses of all
            ranks' batches, weighted by samples.
        batch_idx: what training_step is told.
        n_batches: of this rank's, with gradient_samples those that curvature is measured on; None: all.
        compare_modes: whether to compute the loss once in train mode, too, and say if it is another.
    """
    started = time.perf_counter()
    with (
        Watch(model) as watch,
        _prepared(model, batches, options, loss_fn, batch_idx, group) as (copy, layers, objective),
    ):
        watch.names(copy.module, objective.layers)
        raw = within_memory(
            objective, options.micro_batch_size, lambda size: measure(objective, options, size, n_batches, watch)
        )
        raw.raise_if_nothing_measured(len(layers.layers) - len(raw.directions.skipped))
        in_training = other_loss_in_training(objective, copy.module) if compare_modes and options.mode == "eval" else ""
        spectra, micro_batch_size = fit_layers(objective, raw, options)
    curvatures = raw.curvatures
    return SpectralReport(
        layers=spectra,
        skipped=layers.skipped | raw.directions.skipped,
        loss=raw.loss,
        n_samples=objective.samples,
        curvature_samples=raw.curvature_samples,
        n_batches=len(objective.all_sizes),
        micro_batch_size=micro_batch_size,
        curvature=options.curvature,
        mode=options.mode,
        precision=options.precision,
        top_k=options.top_k,
        spectrum_top_k=options.spectrum_top_k or options.top_k,
        seconds=time.perf_counter() - started,
        gradient_seconds=raw.gradient_seconds,
        warnings=(
            *copy.notes,
            *([in_training] if in_training else []),
            *raw.precision_notes,
            *raw.notes,
            *curvatures.notes,
            *omission_notes(objective, raw, spectra, options),
        ),
        chosen=curvatures.chosen,
        check_error=curvatures.check_error,
    )


def measure_noise_scale(
    model: nn.Module,
    batches: Sequence[Any],
    options: Options,
    loss_fn: LossFunction | None = None,
    *,
    batch_idx: int = 0,
    group: Group = SINGLE_PROCESS,
) -> float:
    """Return the noise scale, in samples, of the median layer's gradient; NaN where it cannot be told."""
    with _prepared(model, batches, options, loss_fn, batch_idx, group) as (_, _, objective):

        def noise(max_size: int | None) -> dict[str, GradientNoise]:
            micro_batches = objective.cut(max_size)
            gradients = sum_gradients(objective, micro_batches)
            norms, _ = gradient_parts(objective, gradients, micro_batches, options)
            return noise_of_layers(gradients, norms, objective)

        of_layers = within_memory(objective, options.micro_batch_size, noise)
    return median(of_layer.noise_scale for of_layer in of_layers.values())


@contextmanager
def _prepared(
    model: nn.Module,
    batches: Sequence[Any],
    options: Options,
    loss_fn: LossFunction | None,
    batch_idx: int,
    group: Group,
) -> Iterator[tuple[NetworkCopy, LayerSet, Objective]]:
    with isolated_copy(model, options.mode, options.precision, group) as copy:
        with group.step():
            layers = select_layers(copy.original, options)
            loss = resolve_loss(copy.original, loss_fn, batch_idx)
        yield copy, layers, set_up_objective(copy, loss, batches, layers.layers, options, group)


def measure(
    objective: Objective, options: Options, max_size: int | None, n_batches: int | None, watch: Watch
) -> RawMeasurement:
    """Measure an objective.

    Args:
        max_size: samples of the largest micro-batch; None: as memory asks for.
        n_batches: of each rank, with gradient_samples those that curvature is measured on; None: all.
    """
    started = time.perf_counter()
    few = objective if options.gradient_samples is None else objective.first(n_batches, options.max_samples)
    micro_batches = cut_for_gradient(objective, few, max_size)
    gradients = _gradients(objective, micro_batches, options, max_size, for_curvature=few is objective)
    norms, no_signal = gradient_parts(objective, gradients, micro_batches, options)
    gradient_seconds = time.perf_counter() - started
    watch.expect(gradient_seconds, PRODUCT * options.top_k * len(objective.layers))
    directions = leading_directions(gradients, norms, objective, options)
    n_products = sum(map(len, directions.usable.values())) + len(directions.usable) * (options.curvature_fraction or 0)
    watch.expect(time.perf_counter() - started, PRODUCT * n_products)
    loss, kinds = gradients.loss, gradients.kinds
    if few is not objective:
        # As large as the network.
        del gradients
        micro_batches = few.cut(max_size)
        gradients = _gradients(few, micro_batches, options, max_size, norms=False)
    evaluation = Evaluation(
        few,
        micro_batches,
        first=gradients.first,
        has_graph=gradients.has_graph,
        narrow_dtypes=gradients.narrow_dtypes,
        reference=gradients.smallest if max_size is None else None,
    )
    notes = gradients.notes
    del gradients
    factors = kronecker_factors(evaluation, directions.usable, wanted=options.alignment)
    curvatures = estimate_curvature(evaluation, directions.usable, options.curvature)
    size = objective.size_in_use
    traces = estimate_trace(evaluation, directions.usable, curvatures, options.curvature_fraction)
    return RawMeasurement(
        loss=loss,
        directions=directions,
        curvatures=curvatures,
        traces=traces,
        factors=factors,
        layers=with_seen_kinds(objective.layers, kinds, options.kinds),
        narrow_dtypes=evaluation.narrow_dtypes,
        micro_batch_sizes=(size, objective.size_in_use),
        curvature_samples=few.samples,
        gradient_seconds=gradient_seconds,
        no_signal=no_signal,
        notes=notes,
    )


def _gradients(
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    options: Options,
    max_size: int | None,
    *,
    for_curvature: bool = True,
    norms: bool = True,
) -> ObjectiveGradients:
    """Return the gradients of an objective, with what its curvature can go on from."""
    return sum_gradients(
        objective,
        micro_batches,
        keep_graph=for_curvature
        and wants_graph(options.curvature)
        and (max_size is not None or not objective.divisible),
        outputs=for_curvature and options.alignment and objective.samples is not None,
        norms=norms,
    )
