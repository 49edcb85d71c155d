"""From the raw measurement to the spectrum and the fits of each layer, and to what a reader must know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_spectral._messages import group_by_reason
from lightning_spectral.curvature import Curvatures
from lightning_spectral.distributed.assignment import assign_owners
from lightning_spectral.errors import MeasurementError, SecondDerivativeError
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.directions import Directions
from lightning_spectral.measurement.kronecker_factors import KroneckerResult
from lightning_spectral.measurement.layer_fit import fit_layer, points_of_alpha
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.numerics.bootstrap import exponent_intervals
from lightning_spectral.numerics.gradient_noise import UNKNOWN_NOISE
from lightning_spectral.numerics.power_law import noise_floor
from lightning_spectral.options import Options
from lightning_spectral.records.alignment import LayerAlignment
from lightning_spectral.records.layer_spectrum import LayerMeasurement, LayerSpectrum
from lightning_spectral.records.on_request import CurvatureFraction, WeightSpectrum


@dataclass(frozen=True, eq=False)
class RawMeasurement:
    """Measurement of an objective, the same on all ranks but for ``micro_batch_sizes``.

    Attributes:
        loss: value of the objective.
        directions: singular triplets of the gradients.
        curvatures: along the triplets above the noise floor.
        traces: draws of the trace of each layer's Hessian block; empty where none were asked for.
        factors: Kronecker factors; empty where they were not asked for.
        layers: of the objective, with the kinds that its graph shows.
        narrow_dtypes: half-precision types that the network casts to by itself.
        micro_batch_sizes: samples of the largest micro-batch of this rank, for the curvatures and for the traces.
        curvature_samples: samples that the curvatures are of; None where they cannot be counted.
        gradient_seconds: time that the gradients took.
        no_signal: why the sampling noise of the gradient is not known; empty where it is.
        notes: of the operations that the loss was computed with.
    """

    loss: float
    directions: Directions
    curvatures: Curvatures
    traces: Curvatures
    factors: KroneckerResult
    layers: Mapping[str, MatrixLayer]
    narrow_dtypes: frozenset[torch.dtype]
    micro_batch_sizes: tuple[int | None, ...]
    curvature_samples: int | None
    gradient_seconds: float
    no_signal: str = ""
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> dict[str, str]:
        """Layer name -> why it has no curvatures."""
        return self.directions.failed | self.curvatures.failed

    @property
    def precision_notes(self) -> list[str]:
        """Limits to the precision of the measurement."""
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.narrow_dtypes))
        text = f"the network casts to {names} by itself, and nothing measured is more precise than that"
        return [text] if names else []

    def raise_if_nothing_measured(self, n_layers: int) -> None:
        """Raise the reasons if all of so many layers failed."""
        if len(self.failed) == n_layers > 0:
            error = SecondDerivativeError if self.curvatures.failed else MeasurementError
            raise error("; ".join(group_by_reason(self.failed)))


def fit_layers(
    objective: Objective, raw: RawMeasurement, options: Options
) -> tuple[dict[str, LayerSpectrum], int | None]:
    """Return the fitted spectra of all layers, each rank fitting its share, and the largest micro-batch of any rank."""
    group = objective.group
    layers = {name: layer for name, layer in raw.layers.items() if name not in raw.directions.skipped}
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
    whole = options.max_samples is not None and None in objective.all_sizes
    return [
        *(["max_samples: a batch whose tensors share no leading dimension is measured whole"] if whole else []),
        *([f"gradient_samples: {asked} were asked for, and there are {samples}"] if too_few else []),
        *([f"signal: {raw.no_signal}; several batches tell it (n_batches)"] if raw.no_signal else []),
        *(note for note in raw.traces.notes if note not in raw.curvatures.notes),
        *(f"curvature_fraction: {text}" for text in group_by_reason(raw.traces.failed)),
        *(f"spectrum_top_k: {text}" for text in group_by_reason(raw.directions.truncated)),
        *(f"weight_spectra: {text}" for text in group_by_reason(no_weights)),
        *group_by_reason(unaligned | partly),
    ]


def _fit(
    objective: Objective, name: str, raw: RawMeasurement, options: Options, weights: Tensor | None
) -> LayerSpectrum:
    layer, eps = raw.layers[name], objective.eps(name, raw.narrow_dtypes)
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
    spectrum = fit_layer(measurement)
    usable, used = spectrum.sigma > spectrum.noise_floor, points_of_alpha(spectrum, spectrum.alpha)
    parts: dict[str, Any] = {}
    if weights is not None:
        parts["weights"] = WeightSpectrum.of(weights, top_k=options.top_k, groups=layer.groups, eps=eps)
    if options.bootstrap:
        points = spectrum.sigma[usable], spectrum.h[usable]
        parts["intervals"] = exponent_intervals(*points, used=used[usable], draws=options.bootstrap)
    if options.curvature_fraction:
        draws, note = raw.traces.h.get(name), raw.traces.failed.get(name, "")
        parts["fraction"] = (
            CurvatureFraction.missing(note or spectrum.note)
            if draws is None
            else CurvatureFraction.of(draws, spectrum.h, shape=layer.shape, h_stderr=spectrum.h_stderr, note=note)
        )
    if name in factors.factors:
        parts["alignment"] = LayerAlignment.from_factors(
            factors.factors[name], spectrum.sigma, spectrum.h,
            used=used, h_stderr=spectrum.h_stderr, per_sample=factors.per_sample,
        )  # fmt: skip
    return replace(spectrum, **parts)
