"""From gradients to the directions u_k v_k^T along which curvature is measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_spectral.distributed.assignment import assign_owners
from lightning_spectral.errors import MeasurementError, is_out_of_memory
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.gradients import ObjectiveGradients, SquaredNorms
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.numerics.gradient_noise import GradientNoise, gradient_noise
from lightning_spectral.numerics.matmul_precision import accumulation_dtype
from lightning_spectral.numerics.power_law import noise_floor
from lightning_spectral.numerics.svd import SingularTriplets, singular_values, top_singular_triplets
from lightning_spectral.options import Options

COMMON = 0.5
"""Signal from which on a gradient is more than rounding, however small it is."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Singular triplets and values of the gradients.

    Attributes:
        triplets: layer name -> singular triplets of its gradient, on the window of ``top_k``.
        spectra: layer name -> leading singular values of its gradient, ``spectrum_top_k`` of them.
        usable: layer name -> its triplets above the noise floor, of the layers that have any.
        failed: layer name -> why it has no triplets.
        skipped: layer name -> why it is no matrix.
        truncated: layer name -> why its ``spectra`` are those of the window alone, though more were asked for.
        noise: layer name -> signal and sampling noise of its gradient.
    """

    triplets: dict[str, SingularTriplets] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    usable: dict[str, SingularTriplets] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    truncated: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    noise: dict[str, GradientNoise] = field(default_factory=dict)


def leading_directions(
    gradients: ObjectiveGradients, parts: Sequence[SquaredNorms], objective: Objective, options: Options
) -> Directions:
    """Return the leading singular triplets of the gradients summed over all ranks, each layer's taken by its owner.

    Args:
        parts: of the gradients, which tell their sampling noise; none where they cannot.
    """
    layers, group = objective.layers, objective.group
    skipped = gradients.skipped(options)
    present = (gradients.unreduced | gradients.reduced) - gradients.failed.keys() - skipped.keys()
    matrices, owners = _reduced(gradients, objective, present)
    with group.step() as step:
        owned = _decompose(matrices, layers, options)
        above = {name: _count_above_noise(name, t.sigma, gradients, objective) for name, t in owned.triplets.items()}
        noise = {name: _noise(name, matrix, parts, objective) for name, matrix in matrices.items()}
        step.send((owned.failed, owned.truncated, above, noise))
    failed, truncated, counts, noises = zip(*step.received, strict=True)
    noise = {name: of_layer for of_rank in noises for name, of_layer in of_rank.items()}
    n_usable = {name: n for of_rank in counts for name, n in of_rank.items() if n}
    shared = group.broadcast_from_owners(
        {name: [t.u, t.sigma, t.v, owned.spectra[name]] for name, t in owned.triplets.items()}, owners
    )
    triplets = {name: SingularTriplets(u, sigma, v) for name, (u, sigma, v, _) in shared.items()}
    rounding = _of_rounding(triplets, noise, gradients, objective)
    missing = dict.fromkeys(layers.keys() - present - gradients.failed.keys() - skipped.keys(), objective.unreached)
    return Directions(
        triplets=triplets,
        spectra={name: values for name, (*_, values) in shared.items()},
        usable={name: t.first(n_usable[name]) for name, t in triplets.items() if name in n_usable.keys() - rounding},
        failed=_in_order(layers, gradients.failed, missing, *failed, rounding),
        truncated=_in_order(layers, *truncated),
        skipped=_in_order(layers, skipped),
        noise=noise,
    )


def noise_of_layers(
    gradients: ObjectiveGradients, parts: Sequence[SquaredNorms], objective: Objective
) -> dict[str, GradientNoise]:
    """Return signal and sampling noise of the gradients summed over all ranks, without their triplets."""
    present = (gradients.unreduced | gradients.reduced) - gradients.failed.keys() - gradients.not_matrices.keys()
    matrices, _ = _reduced(gradients, objective, present)
    with objective.group.step() as step:
        step.send({name: _noise(name, matrix, parts, objective) for name, matrix in matrices.items()})
    return {name: noise for of_rank in step.received for name, noise in of_rank.items()}


def _reduced(
    gradients: ObjectiveGradients, objective: Objective, names: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the gradients, summed over all ranks, of the layers that this rank owns, and the owners of all."""
    layers, leaves, group, reducer = objective.layers, objective.parameters, objective.group, objective.reducer
    costs = {name: layer.decomposition_cost for name, layer in layers.items() if name in names}
    owners = assign_owners(costs, group.size) if reducer is None else {n: reducer.owners[id(leaves[n])] for n in costs}

    def matrix(name: str) -> Tensor:
        gradient = gradients.values.get(name)
        return _zeros(layers[name], leaves[name]) if gradient is None else layers[name].to_matrix(gradient)

    unreduced = {name: owner for name, owner in owners.items() if name in gradients.unreduced}
    matrices = group.reduce_to_owners(unreduced, matrix)
    if reducer is not None:
        for name in [n for n, owner in owners.items() if n in gradients.reduced and owner == group.rank]:
            total = layers[name].to_matrix(reducer.sums[id(leaves[name])])
            matrices[name] = matrices[name] + total if name in matrices else total
        reducer.clear()
    return matrices, owners


def _noise(name: str, matrix: Tensor, parts: Sequence[SquaredNorms], objective: Objective) -> GradientNoise:
    norm = float(torch.linalg.vector_norm(matrix, dtype=accumulation_dtype(matrix)))
    of_parts = [(part.share, part.of_layers.get(name, 0.0)) for part in parts]
    return gradient_noise(norm**2, of_parts, objective.samples)


def _of_rounding(
    triplets: Mapping[str, SingularTriplets],
    noise: Mapping[str, GradientNoise],
    gradients: ObjectiveGradients,
    objective: Objective,
) -> dict[str, str]:
    """Return the layers whose gradient is what rounding left of zero, and why.

    Where terms cancel, what is left is up to eps times the largest of them. A gradient as small as that which all parts
    of the samples have in common is no such remainder.
    """
    largest = max((float(t.sigma[0]) for t in triplets.values() if len(t)), default=0.0)
    reasons: dict[str, str] = {}
    for name, t in triplets.items():
        share = float(t.sigma[0]) / largest if len(t) and largest else 1.0
        eps = objective.eps(name, gradients.narrow_dtypes)
        if 0 < share <= eps and not noise[name].signal >= COMMON:
            reasons[name] = (
                f"its gradient is rounding: its largest singular value is {share:.0e} of the largest layer's, below "
                f"the {eps:.0e} of the dtype it was computed in"
                + ("" if eps == torch.finfo(torch.float64).eps else "; precision='float64' tells")
            )
    return reasons


def _zeros(layer: MatrixLayer, parameter: Tensor) -> Tensor:
    # Only the parameter's shape is read.
    shape = layer.to_matrix(torch.empty_like(parameter, device="meta"))
    return torch.zeros_like(shape, device=parameter.device)


def _in_order(layers: Mapping[str, MatrixLayer], *reasons: Mapping[str, str]) -> dict[str, str]:
    merged = {name: why for of_rank in reasons for name, why in of_rank.items()}
    return {name: merged[name] for name in layers if name in merged}


def _decompose(matrices: Mapping[str, Tensor], layers: Mapping[str, MatrixLayer], options: Options) -> Directions:
    owned = Directions()
    for name, matrix in matrices.items():
        layer = layers[name]
        try:
            triplets = top_singular_triplets(matrix, options.top_k, groups=layer.groups)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            cause = (
                ", as of a root or a logarithm at zero, or of an overflow" if type(error) is MeasurementError else ""
            )
            owned.failed[name] = f"its gradient has no singular values: {error}{cause}"
            continue
        owned.triplets[name], owned.spectra[name] = triplets, triplets.sigma
        try:
            owned.spectra[name] = _spectrum(matrix, layer, triplets.sigma, options)
        except (RuntimeError, MemoryError) as error:
            # Smaller micro-batches would not help: the matrix is as large as it is.
            owned.truncated[name] = (
                f"only the {len(triplets)} singular values of the window ({type(error).__name__}: {error})"
            )
    return owned


def _spectrum(matrix: Tensor, layer: MatrixLayer, sigma: Tensor, options: Options) -> Tensor:
    """Return the ``spectrum_top_k`` leading singular values, of which sigma holds those of the window."""
    k = options.spectrum_top_k or options.top_k
    # A window that is not full holds all there are.
    if k == options.top_k or len(sigma) < options.top_k:
        return sigma
    values = singular_values(matrix, groups=layer.groups)
    return torch.cat([sigma, values[len(sigma) : k].to(sigma)])


def _count_above_noise(name: str, sigma: Tensor, gradients: ObjectiveGradients, objective: Objective) -> int:
    """Count the singular values above the noise floor: no product is spent on rounding noise."""
    layer, eps = objective.layers[name], objective.eps(name, gradients.narrow_dtypes)
    return int((sigma > noise_floor(sigma, layer.shape, layer.groups, eps)).sum())
