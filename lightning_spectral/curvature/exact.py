"""Curvature by double backward, exact where operations have second derivatives: the reference, and that of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral._messages import group_by_reason
from lightning_spectral.curvature.custom_functions import unverified
from lightning_spectral.curvature.problem import (
    REMEDY,
    Curvatures,
    DifferentiableLoss,
    cause_of,
    naming_what_stops_it,
)
from lightning_spectral.errors import is_out_of_memory
from lightning_spectral.layers.matrices import MatrixLayer, matrix_direction
from lightning_spectral.numerics.matmul_precision import accumulation_dtype, dot
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
        if product is None:
            h_k.append(torch.zeros((), device=leaf.device))
            continue
        # u^T M v, the last sum in float64 where the device has it.
        matrix = layer.to_matrix(product)
        wide = accumulation_dtype(matrix)
        h_k.append((u.to(matrix.dtype) @ matrix).to(wide) @ v.to(wide))
    return torch.stack(h_k).cpu().double() if h_k else torch.zeros(0, dtype=torch.float64)


def _nothing(triplets: SingularTriplets) -> Tensor:
    return torch.full((len(triplets),), float("nan"), dtype=torch.float64)


def measured_exactly(
    problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets], why: Mapping[str, str]
) -> Curvatures:
    """Measure the layers in ``why`` by double backward."""
    if not why:
        return Curvatures({}, "exact")
    exact = ExactCurvature()(problem.of(why), {name: directions[name] for name in why})
    measured = {n: f"measured by double backward, since {reason}" for n, reason in why.items() if n not in exact.failed}
    methods, notes = dict.fromkeys(why, "exact"), tuple(group_by_reason(measured))
    return Curvatures(exact.h, "exact", exact.failed, {}, methods, notes)


def with_unseen(
    problem: DifferentiableLoss,
    directions: Mapping[str, SingularTriplets],
    unseen: Mapping[str, str],
    method: str,
    measure: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]],
) -> Curvatures:
    """Return h and its standard errors, as a method measures them, and the layers that it does not see, exactly."""
    exact = measured_exactly(problem, directions, unseen)
    with naming_what_stops_it():
        h, stderr = measure()
    return Curvatures(h | exact.h, method, exact.failed, stderr, exact.methods, exact.notes)


LOSS, STEP = "loss", "step"
"""Names of what `StepProducts` gives: the loss; and g . Delta, Delta^T H Delta, and the part of that of each layer."""


@dataclass(frozen=True, eq=False)
class StepProducts:
    """g . Delta, Delta^T H Delta and its parts by layer, in the form of a curvature method, so that they add up.

    It takes a loss whose ``parameters`` are all that Delta moves.

    Attributes:
        delta: name of a parameter -> its update, in the parameter's shape.
        layers: matrix, and the name of the parameter that holds it.
    """

    delta: Mapping[str, Tensor]
    layers: Sequence[tuple[MatrixLayer, str]] = ()

    name = "step"
    differentiates_gradients = True
    # As of ExactCurvature, whose graph it is.
    memory = 4.0

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure; NaN, with the reason, where the loss has no second derivative. There are no directions."""
        gradients = problem.gradients(keep_graph=True)
        loss = torch.tensor([problem.loss], dtype=torch.float64)
        try:
            failed = next(iter(gradients.failed.values()), "")
            products = {} if failed else self._products(problem, gradients.values)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            failed = cause_of(error)
        if failed:
            nothing = torch.full((2 + len(self.layers),), float("nan"), dtype=torch.float64)
            return Curvatures({LOSS: loss, STEP: nothing}, self.name, {STEP: failed.removesuffix(f"; {REMEDY}")})
        values = {name: value.detach() for name, value in gradients.values.items() if value is not None}
        slope = sum(dot(value, self.delta[name]) for name, value in values.items())
        total = sum(dot(product, self.delta[name]) for name, product in products.items())
        parts = [
            dot(layer.to_matrix(products[name]), layer.to_matrix(self.delta[name])) if name in products else 0.0
            for layer, name in self.layers
        ]
        step = torch.tensor([slope, total, *parts], dtype=torch.float64)
        notes = tuple(dict.fromkeys(unverified(function) for function in gradients.trusted.values()))
        return Curvatures({LOSS: loss, STEP: step}, self.name, notes=notes)

    def _products(self, problem: DifferentiableLoss, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Return the parameters' parts of H Delta that are not zero."""
        # The gradient of a loss that is linear in a parameter has no graph.
        outputs = {name: value for name, value in gradients.items() if value is not None and value.requires_grad}
        if not outputs:
            return {}
        moves = [self.delta[name] for name in outputs]
        leaves = list(problem.parameters.values())
        products = torch.autograd.grad(list(outputs.values()), leaves, moves, allow_unused=True)
        named = zip(problem.parameters, products, strict=True)
        return {name: product for name, product in named if product is not None}
