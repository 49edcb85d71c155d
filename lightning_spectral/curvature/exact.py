"""Curvature by double backward: exact for every network whose operations have second derivatives, and the reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_spectral._messages import group_by_reason
from lightning_spectral.curvature.problem import (
    Curvatures,
    DifferentiableLoss,
    accumulation_dtype,
    cause_of,
    unverified,
)
from lightning_spectral.errors import is_out_of_memory
from lightning_spectral.layers.matrices import MatrixLayer, matrix_direction
from lightning_spectral.numerics.svd import SingularTriplets


class ExactCurvature:
    """h_k = <D, H D> with D = u_k v_k^T: one Hessian-vector product per layer and direction on one retained graph."""

    name = "exact"
    differentiates_gradients = True
    memory = 4.0

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure each layer in turn; one that has no second derivative does not stop the others."""
        gradients = problem.gradients(keep_graph=True)
        h, failed = {}, {}
        for name, triplets in directions.items():
            if name in gradients.failed:
                failed[name] = gradients.failed[name]
                h[name] = _nothing(triplets)
                continue
            try:
                h[name] = _layer(problem.layers[name], problem.parameters[name], gradients.values[name], triplets)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                h[name] = _nothing(triplets)
                failed[name] = cause_of(error)
        trusted = {name: unverified(gradients.trusted[name]) for name in directions if name in gradients.trusted}
        return Curvatures(h, self.name, failed, notes=tuple(group_by_reason(trusted)))


def _layer(layer: MatrixLayer, leaf: Tensor, gradient: Tensor | None, triplets: SingularTriplets) -> Tensor:
    # The Hessian of a loss that is linear in this matrix is zero, and autograd has no graph for it.
    if gradient is None or not gradient.requires_grad:
        return torch.zeros(len(triplets), dtype=torch.float64)
    h_k = []
    for u, v in zip(triplets.u.T, triplets.v.T, strict=True):
        direction = matrix_direction(layer, u, v, leaf)
        (product,) = torch.autograd.grad(gradient, leaf, direction, retain_graph=True, allow_unused=True)
        h_k.append(
            torch.zeros((), device=leaf.device) if product is None else _bilinear(u, layer.to_matrix(product), v)
        )
    return torch.stack(h_k).cpu().double() if h_k else torch.zeros(0, dtype=torch.float64)


def _bilinear(u: Tensor, matrix: Tensor, v: Tensor) -> Tensor:
    """Return u^T M v, the inner product with u v^T, the last sum in float64 where the device has it."""
    wide = accumulation_dtype(matrix)
    return (u.to(matrix.dtype) @ matrix).to(wide) @ v.to(wide)


def _nothing(triplets: SingularTriplets) -> Tensor:
    return torch.full((len(triplets),), float("nan"), dtype=torch.float64)


def measured_exactly(
    problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets], why: Mapping[str, str]
) -> Curvatures:
    """Measure the layers in ``why`` by double backward."""
    if not why:
        return Curvatures({}, "exact")
    exact = ExactCurvature()(problem.of(why), {name: directions[name] for name in why})
    singly = {
        name: f"measured by double backward, since {reason}" for name, reason in why.items() if name not in exact.failed
    }
    notes = tuple(group_by_reason(singly))
    return Curvatures(exact.h, "exact", exact.failed, {}, dict.fromkeys(why, "exact"), notes)
