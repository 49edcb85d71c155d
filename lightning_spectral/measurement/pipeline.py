"""One measurement, from a model and batches to a report, in the order of the stages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_spectral.distributed.process_group import SINGLE_PROCESS, SingleProcess
from lightning_spectral.measurement.directions import leading_directions
from lightning_spectral.measurement.estimation import Evaluation, estimate_curvature, estimate_trace, wants_graph
from lightning_spectral.measurement.fitting import fit_layers, omission_notes
from lightning_spectral.measurement.kronecker_factors import kronecker_factors
from lightning_spectral.measurement.loss import LossFunction, resolve_loss
from lightning_spectral.measurement.memory import attempts
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.measurement.raw import RawMeasurement
from lightning_spectral.measurement.setup import isolated_copy, select_layers, set_up_objective
from lightning_spectral.options import Options
from lightning_spectral.records.report import SpectralReport


def run_measurement(
    model: nn.Module,
    batches: Sequence[Any],
    options: Options,
    loss_fn: LossFunction | None = None,
    *,
    batch_idx: int = 0,
    group: SingleProcess = SINGLE_PROCESS,
) -> SpectralReport:
    """Measure gradient spectrum and curvature along it, of every layer; one joint result for all ranks of ``group``.

    Unlike `measure_spectra` it does not warn: callers read the report's ``failed`` and ``warnings`` themselves.

    Args:
        model, loss_fn: as in `measure_spectra`.
        batches: of this rank, which may have none; gradient and curvature are those of the mean of the losses of all
            ranks' batches, weighted by samples.
        options: what to measure and how.
        batch_idx: what training_step is told.
        group: ranks that measure together.
    """
    started = time.perf_counter()
    with isolated_copy(model, options.mode, options.precision, group) as copy:
        with group.step():
            layers = select_layers(copy.original, options)
            loss = resolve_loss(copy.original, loss_fn, batch_idx)
        objective = set_up_objective(copy, loss, batches, layers.layers, options, group)
        for attempt in attempts(objective, options.micro_batch_size):
            with attempt:
                raw = measure(objective, options, attempt.max_size)
        raw.raise_if_nothing_measured(len(layers.layers) - len(raw.directions.skipped))
        spectra, micro_batch_size = fit_layers(objective, raw, options)
    curvatures = raw.curvatures
    return SpectralReport(
        layers=spectra,
        skipped=layers.skipped | raw.directions.skipped,
        loss=raw.loss,
        n_samples=objective.samples,
        n_batches=len(objective.all_sizes),
        micro_batch_size=micro_batch_size,
        curvature=options.curvature,
        mode=options.mode,
        precision=options.precision,
        top_k=options.top_k,
        spectrum_top_k=options.spectrum_top_k or options.top_k,
        seconds=time.perf_counter() - started,
        warnings=(*copy.notes, *raw.precision_notes, *curvatures.notes, *omission_notes(raw, spectra)),
        chosen=curvatures.chosen,
        check_error=curvatures.check_error,
    )


def measure(objective: Objective, options: Options, max_size: int | None) -> RawMeasurement:
    """Measure an objective by micro-batches of at most ``max_size`` samples; None: as memory asks for."""
    micro_batches = objective.cut(max_size)
    gradients = objective.gradients(
        micro_batches,
        keep_graph=wants_graph(options.curvature) and (max_size is not None or not objective.divisible),
        outputs=options.alignment and objective.samples is not None,
    )
    directions = leading_directions(gradients, objective, options)
    evaluation = Evaluation(
        objective,
        micro_batches,
        first=gradients.first,
        has_graph=gradients.has_graph,
        narrow_dtypes=gradients.narrow_dtypes,
        reference=gradients.smallest if max_size is None else None,
    )
    loss = gradients.loss
    # As large as the network.
    del gradients
    factors = kronecker_factors(evaluation, directions.usable, wanted=options.alignment)
    curvatures = estimate_curvature(evaluation, directions.usable, options.curvature)
    size = objective.size_in_use
    traces = estimate_trace(evaluation, directions.usable, curvatures, options.curvature_fraction)
    return RawMeasurement(
        loss, directions, curvatures, traces, factors, evaluation.narrow_dtypes, (size, objective.size_in_use)
    )
