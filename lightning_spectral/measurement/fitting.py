"""From what was measured to the spectrum and the fits of each layer, and to what a reader must know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_spectral._messages import group_by_reason
from lightning_spectral.distributed.process_group import SingleProcess, assign_owners
from lightning_spectral.measurement.layer_fit import (
    Part,
    alignment_part,
    fit_layer,
    fraction_part,
    intervals_part,
    weights_part,
)
from lightning_spectral.measurement.memory import RawMeasurement
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.numerics.power_law import noise_floor
from lightning_spectral.options import Options
from lightning_spectral.records.layer_measurement import LayerMeasurement
from lightning_spectral.records.layer_spectrum import LayerSpectrum


def spectra_of(
    losses: Objective, measured: RawMeasurement, options: Options, processes: SingleProcess
) -> dict[str, LayerSpectrum]:
    """The spectra and fits of the layers that fall to this process."""
    owners = assign_owners({name: layer.decomposition_cost for name, layer in losses.layers.items()}, processes.size)
    mine = [name for name, owner in owners.items() if owner == processes.rank]
    weights = losses.weights(mine) if options.weight_spectra else {}
    return {name: _spectrum(losses, name, measured, options, weights.get(name)) for name in mine}


def left_out(measured: RawMeasurement, spectra: Mapping[str, LayerSpectrum], told: Sequence[str]) -> list[str]:
    """What was measured on request could not be had of which layers, beside what the layers' own notes say."""
    no_weights = {n: x.weights.note for n, x in spectra.items() if x.weights is not None and x.weights.note}
    return [
        *(note for note in measured.traces.notes if note not in told),
        *(f"curvature_fraction: {text}" for text in group_by_reason(measured.traces.failed)),
        *(f"spectrum_top_k: {text}" for text in group_by_reason(measured.shorter)),
        *(f"weight_spectra: {text}" for text in group_by_reason(no_weights)),
        *_unaligned(spectra),
    ]


def _unaligned(spectra: Mapping[str, LayerSpectrum]) -> list[str]:
    """What of the alignment that was asked for is not there, beside the layers that were not measured at all."""
    missing = {
        name: f"no alignment: {x.alignment_note}" for name, x in spectra.items() if x.alignment_note and not x.note
    }
    partly = {name: f"alignment: {x.alignment.note}" for name, x in spectra.items() if x.alignment and x.alignment.note}
    return group_by_reason(missing | partly)


def _spectrum(
    losses: Objective, name: str, measured: RawMeasurement, options: Options, weights: Tensor | None
) -> LayerSpectrum:
    layer, eps = losses.layers[name], losses.eps(name)
    curvatures, factored = measured.curvatures, measured.alignment
    triplets, nothing = measured.triplets.get(name), torch.zeros(0, dtype=torch.float64)
    sigma = nothing if triplets is None else triplets.sigma
    h, stderr = torch.full(sigma.shape, float("nan"), dtype=torch.float64), torch.zeros(len(sigma), dtype=torch.float64)
    if name in curvatures.h:
        h[: len(curvatures.h[name])] = curvatures.h[name]
    if name in curvatures.stderr:
        stderr[: len(curvatures.stderr[name])] = curvatures.stderr[name]
    why = factored.notes.get(name) or measured.failed.get(name) or "no direction above the noise floor"
    measurement = LayerMeasurement(
        name=name,
        kind=layer.kind,
        shape=layer.shape,
        groups=layer.groups,
        sigma=sigma,
        h=h,
        h_stderr=stderr,
        spectrum=measured.spectra.get(name, nothing),
        noise_floor=noise_floor(sigma, layer.shape, layer.groups, eps),
        method=curvatures.methods.get(name, curvatures.method),
        note=measured.failed.get(name, ""),
        alignment_note=why if options.alignment and name not in factored.factors else "",
    )
    parts: dict[str, Part] = {}
    if weights is not None:
        parts["weights"] = weights_part(weights, top_k=options.top_k, groups=layer.groups, eps=eps)
    if options.bootstrap:
        parts["intervals"] = intervals_part(options.bootstrap)
    if options.curvature_fraction:
        parts["fraction"] = fraction_part(measured.traces.h.get(name), measured.traces.failed.get(name, ""))
    if name in factored.factors:
        parts["alignment"] = alignment_part(factored.factors[name], factored.per_sample)
    return fit_layer(measurement, parts)
