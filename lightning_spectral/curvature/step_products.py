"""Slope and curvature of a loss along an update of all trained parameters, by one Hessian-vector product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.curvature.problem import (
    REMEDY,
    Curvatures,
    DifferentiableLoss,
    cause_of,
    dot,
    unverified,
)
from lightning_spectral.errors import is_out_of_memory
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.numerics.svd import SingularTriplets

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
