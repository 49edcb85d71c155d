"""From the raw measurement to the spectrum and the fits of each layer, and to what a reader must know of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_spectral._messages import group_by_reason
from lightning_spectral.distributed.assignment import assign_owners
from lightning_spectral.measurement.layer_fit import (
    Part,
    alignment_part,
    fit_layer,
    fraction_part,
    intervals_part,
    weights_part,
)
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.measurement.raw import RawMeasurement
from lightning_spectral.numerics.gradient_noise import UNKNOWN_NOISE
from lightning_spectral.numerics.power_law import noise_floor
from lightning_spectral.options import Options
from lightning_spectral.records.layer_measurement import LayerMeasurement
from lightning_spectral.records.layer_spectrum import LayerSpectrum


def fit_layers(
    objective: Objective, raw: RawMeasurement, options: Options
) -> tuple[dict[str, LayerSpectrum], int | None]:
    """Return the fitted spectra of all layers, each rank fitting its share, and the largest micro-batch of any rank."""
    group = objective.group
    layers = {name: layer for name, layer in objective.layers.items() if name not in raw.directions.skipped}
    owners = assign_owners({name: layer.decomposition_cost for name, layer in layers.items()}, group.size)
    own = [name for name, owner in owners.items() if owner == group.rank]
    with group.step() as step:
        weights = objective.weight_matrices(own) if options.weight_spectra else {}
        fitted = {name: _fit(objective, name, raw, options, weights.get(name)) for name in own}
        step.send((fitted, raw.micro_batch_sizes))
    merged = {name: spectrum for of_rank, _ in step.received for name, spectrum in of_rank.items()}
    sizes = [size for _, sizes in step.received for size in sizes if size is not None]
    return {name: merged[name] for name in layers}, max(sizes, default=None)


def omission_notes(
    objective: Objective, raw: RawMeasurement, spectra: Mapping[str, LayerSpectrum], options: Options
) -> list[str]:
    """Return which quantities asked for are missing of which layers, beyond what the layers' own notes say."""
    no_weights = {n: x.weights.note for n, x in spectra.items() if x.weights is not None and x.weights.note}
    unaligned = {
        name: f"no alignment: {x.alignment_note}" for name, x in spectra.items() if x.alignment_note and not x.note
    }
    partly = {name: f"alignment: {x.alignment.note}" for name, x in spectra.items() if x.alignment and x.alignment.note}
    asked, samples = options.gradient_samples, objective.samples
    too_few = isinstance(asked, int) and samples is not None and samples < asked
    return [
        *([f"gradient_samples: {asked} were asked for, and there are {samples}"] if too_few else []),
        *([f"signal: {raw.no_signal}; several batches tell it (gradient_samples)"] if raw.no_signal else []),
        *(note for note in raw.traces.notes if note not in raw.curvatures.notes),
        *(f"curvature_fraction: {text}" for text in group_by_reason(raw.traces.failed)),
        *(f"spectrum_top_k: {text}" for text in group_by_reason(raw.directions.truncated)),
        *(f"weight_spectra: {text}" for text in group_by_reason(no_weights)),
        *group_by_reason(unaligned | partly),
    ]


def _fit(
    objective: Objective, name: str, raw: RawMeasurement, options: Options, weights: Tensor | None
) -> LayerSpectrum:
    layer, eps = objective.layers[name], objective.eps(name, raw.narrow_dtypes)
    curvatures, factors, failed = raw.curvatures, raw.factors, raw.failed
    triplets, nothing = raw.directions.triplets.get(name), torch.zeros(0, dtype=torch.float64)
    sigma = nothing if triplets is None else triplets.sigma
    h, stderr = torch.full(sigma.shape, float("nan"), dtype=torch.float64), torch.zeros(len(sigma), dtype=torch.float64)
    if name in curvatures.h:
        h[: len(curvatures.h[name])] = curvatures.h[name].where(curvatures.h[name].isfinite(), float("nan"))
    if name in curvatures.stderr:
        stderr[: len(curvatures.stderr[name])] = curvatures.stderr[name]
    why = factors.notes.get(name) or failed.get(name) or "no direction above the noise floor"
    measurement = LayerMeasurement(
        name=name,
        kind=layer.kind,
        shape=layer.shape,
        groups=layer.groups,
        sigma=sigma,
        h=h,
        h_stderr=stderr,
        spectrum=raw.directions.spectra.get(name, nothing),
        noise_floor=noise_floor(sigma, layer.shape, layer.groups, eps),
        method=curvatures.methods.get(name, curvatures.method),
        gradient_noise=raw.directions.noise.get(name, UNKNOWN_NOISE),
        note=failed.get(name, ""),
        alignment_note=why if options.alignment and name not in factors.factors else "",
    )
    parts: dict[str, Part] = {}
    if weights is not None:
        parts["weights"] = weights_part(weights, top_k=options.top_k, groups=layer.groups, eps=eps)
    if options.bootstrap:
        parts["intervals"] = intervals_part(options.bootstrap)
    if options.curvature_fraction:
        parts["fraction"] = fraction_part(raw.traces.h.get(name), raw.traces.failed.get(name, ""))
    if name in factors.factors:
        parts["alignment"] = alignment_part(factors.factors[name], factors.per_sample)
    return fit_layer(measurement, parts)
