"""The trace of every layer's Hessian block by Hutchinson's estimator, one Hessian-vector product for all layers.

For random signs z, of all layers at once, E[z_l^T (H z)_l] = tr H_ll: the terms of two entries, of one layer or of two,
carry the product of their signs, whose mean is zero. The variance is 2 sum_{i != j} H_ij^2 within the layer's block
and sum H_ij^2 between it and the others. (M. Hutchinson, Communications in Statistics 18, 1989.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.curvature.problem import (
    Curvatures,
    Gradients,
    Problem,
    accumulation_dtype,
    cause_of,
    unverified,
)
from lightning_spectral.errors import by_cause, is_out_of_memory
from lightning_spectral.layers import MatrixLayer
from lightning_spectral.svd import SingularTriplets


@dataclass(frozen=True)
class HutchinsonTrace:
    """z_l^T (H z)_l for each layer l and each of some draws of z, in the place of curvatures.

    Like them it is linear in the loss, so pieces of a batch add up; each piece takes the same z.

    Args:
        draws: N.
        seed: of a generator of its own.
    """

    draws: int
    seed: int = 0
    name: str = "trace"
    differentiates_gradients: bool = True
    memory: float = 4.0

    def __call__(self, problem: Problem, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """(N,) draws for each layer in ``directions``; where a joint product fails, each layer has its own."""
        gradients = problem.gradients(keep_graph=True)
        failed = {name: gradients.failed[name] for name in directions if name in gradients.failed}
        names = [name for name in directions if name not in failed]
        try:
            found = self._drawn(problem, gradients, names)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            found, without = self._one_by_one(problem, gradients, names)
            failed |= without
        nothing = torch.full((self.draws,), float("nan"), dtype=torch.float64)
        trusted = {name: unverified(gradients.trusted[name]) for name in found if name in gradients.trusted}
        return Curvatures(
            {name: found.get(name, nothing) for name in directions}, self.name, failed, notes=tuple(by_cause(trusted))
        )

    def _one_by_one(
        self, problem: Problem, gradients: Gradients, names: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A product per layer and draw, so that one without a second derivative does not stop the others."""
        found: dict[str, Tensor] = {}
        failed = {}
        for name in names:
            try:
                found |= self._drawn(problem, gradients, [name])
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                failed[name] = cause_of(error)
        return found, failed

    def _drawn(self, problem: Problem, gradients: Gradients, names: list[str]) -> dict[str, Tensor]:
        layers = {name: problem.layers[name] for name in names}
        leaves = {name: problem.parameters[name] for name in names}
        draws = []
        for z in _signs(layers, self.draws, self.seed):
            product = _product(gradients, leaves, _by_leaf(layers, leaves, z))
            draws.append([_inner(layers[name], z[name], product[id(leaves[name])]) for name in names])
        drawn = torch.tensor(draws, dtype=torch.float64)
        return {name: drawn[:, i] for i, name in enumerate(names)}


def _product(gradients: Gradients, leaves: Mapping[str, Tensor], z: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
    """H z, by the leaves' ids; None for zero."""
    outputs, inputs = {}, {id(leaf): leaf for leaf in leaves.values()}
    for name, leaf in leaves.items():
        gradient = gradients.values[name]
        # The gradient of a loss that is linear in the weights has no graph: its Hessian is zero.
        if gradient is not None and gradient.requires_grad:
            outputs[id(leaf)] = gradient
    if not outputs:
        return dict.fromkeys(inputs)
    found = torch.autograd.grad(
        list(outputs.values()),
        list(inputs.values()),
        [z[key] for key in outputs],
        retain_graph=True,
        allow_unused=True,
    )
    return dict(zip(inputs, found, strict=True))


def _signs(layers: Mapping[str, MatrixLayer], draws: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Per draw, signs (m, n) for each layer."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        yield {
            name: torch.empty(layer.shape, dtype=torch.float32).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            for name, layer in layers.items()
        }


def _by_leaf(
    layers: Mapping[str, MatrixLayer], leaves: Mapping[str, Tensor], z: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """The signs in the shape of the parameters; parts of a fused projection share one."""
    whole: dict[int, Tensor] = {}
    for name, layer in layers.items():
        leaf = leaves[name]
        part = layer.to_tensor(z[name].to(leaf), leaf)
        whole[id(leaf)] = part if id(leaf) not in whole else whole[id(leaf)] + part
    return whole


def _inner(layer: MatrixLayer, z: Tensor, product: Tensor | None) -> float:
    if product is None:
        return 0.0
    matrix = layer.to_matrix(product)
    return float((matrix * z.to(matrix)).sum(dtype=accumulation_dtype(matrix)))
