"""The trace of every layer's Hessian block by random signs, one Hessian-vector product for all layers (Hutchinson).

For random signs z of all layers, E[z_l^T (H z)_l] = tr H_ll: terms of two entries, of one layer or of two, carry the
product of their signs, whose mean is zero. What they add to the variance is large: curvature lies along few directions,
and layers share them. Where samples do not interact, H is a sum over them, and each sample b has signs of its own,
z_lb = u_lb v_lb^T, which move the layer's output by u_lb (v_lb^T a_b). Then the noise of the samples averages out. Of
one draw it was 0.24 of the trace in the median layer of a ResNet on 128 images, and 2.0 with one z for all samples; on
a GPT, 64 sequences, 0.14 and 0.38. A layer's signs are scaled by the root of its curvature along its gradient
directions, so that stiff layers do not drown the others.

Source: M. Hutchinson, Communications in Statistics 18 (1989), 1059.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_spectral._messages import group_by_reason
from lightning_spectral.curvature.custom_functions import custom_functions, unverified
from lightning_spectral.curvature.direction_graph import DirectionGraph
from lightning_spectral.curvature.head import powers_of_two, scales_by_sample
from lightning_spectral.curvature.ports import move_by_sample
from lightning_spectral.curvature.problem import Curvatures, DifferentiableLoss, Gradients, together_or_alone
from lightning_spectral.curvature.sample_search import INTERACT, move_network
from lightning_spectral.curvature.seen_layers import see_layers
from lightning_spectral.errors import MeasurementError, is_out_of_memory
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.numerics.matmul_precision import dot
from lightning_spectral.numerics.svd import SingularTriplets


@dataclass(frozen=True)
class HutchinsonTrace:
    """Estimates z_l^T (H z)_l of each layer's trace, for each of some draws of z, in the place of curvatures.

    They are linear in the loss, so those of micro-batches add up. Layers whose samples cannot be told apart, and those
    that are applied to what they gave before, have one z for all samples.

    Args:
        h: layer name -> (K,) curvatures, to scale by.
    """

    draws: int
    h: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    name: str = "trace"
    differentiates_gradients: bool = False
    memory: float = 6.2

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Return (N,) draws for each layer in ``directions``."""
        problem.run()
        draws: dict[str, Tensor] = {}
        if not custom_functions(problem.value):
            try:
                draws = self._per_sample_draws(problem, directions)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
        remaining = [name for name in directions if name not in draws]
        of_batch, failed, notes = self._whole_batch_draws(problem, remaining)
        nothing = torch.full((self.draws,), float("nan"), dtype=torch.float64)
        h = {name: (draws | of_batch).get(name, nothing) for name in directions}
        return Curvatures(h, self.name, failed, notes=notes)

    def _per_sample_draws(
        self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]
    ) -> dict[str, Tensor]:
        """Draw signs for each sample, with products in the layers' outputs."""
        seen = see_layers(problem, directions)
        # What a layer does to its own input again is no move of its outputs alone.
        seen = replace(seen, calls={name: calls for name, calls in seen.calls.items() if name not in seen.nested})
        if not seen.calls:
            return {}
        # Any direction shows where the samples are.
        leading = {name: directions[name].first(1) for name in seen.calls}
        moves = _Moves(move_network(problem, seen, leading, nearest=False).graph, _generator(self.seed, problem))
        scale = {name: self._scale(name) for name in moves.graph.names}
        moves.check_samples_apart(scale)
        draws = []
        for _ in range(self.draws):
            pairs = moves.draw({name: torch.tensor(scale[name]) for name in scale})
            along = {name: sum(dot(move, product) for move, product in pairs[name]) for name in scale}
            draws.append([along[name] / scale[name] ** 2 for name in scale])
        drawn = torch.tensor(draws, dtype=torch.float64)
        return {name: drawn[:, i] for i, name in enumerate(scale)}

    def _scale(self, name: str) -> float:
        """Return about 1 / sqrt(sum_k h_k), a power of 2, by which signs are multiplied without rounding."""
        held = float(self.h[name].nansum().abs()) if name in self.h else 1.0
        return 2.0 ** max(-60, min(60, round(-math.log2(held) / 2))) if held else 1.0

    def _whole_batch_draws(
        self, problem: DifferentiableLoss, names: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
        """Draw one z for all samples, with products in the weights; where those fail together, layer by layer."""
        if not names:
            return {}, {}, ()
        alone = problem.of(names)
        gradients = alone.gradients(keep_graph=True)
        failed = {name: gradients.failed[name] for name in names if name in gradients.failed}
        left = [name for name in names if name not in failed]
        found, others = together_or_alone(left, lambda some: self._draw(alone, gradients, some))
        trusted = {name: unverified(gradients.trusted[name]) for name in found if name in gradients.trusted}
        return found, failed | others, tuple(group_by_reason(trusted))

    def _draw(self, problem: DifferentiableLoss, gradients: Gradients, names: Sequence[str]) -> dict[str, Tensor]:
        layers = {name: problem.layers[name] for name in names}
        leaves = {name: problem.parameters[name] for name in names}
        draws, generator = [], _generator(self.seed, problem)
        for _ in range(self.draws):
            z = {name: _random_signs(layer.shape, generator) for name, layer in layers.items()}
            scaled = {name: z[name] * self._scale(name) for name in names}
            product = _product(gradients, leaves, _by_leaf(layers, leaves, scaled))
            draws.append(
                [_inner(layers[name], z[name], product[id(leaves[name])]) / self._scale(name) for name in names]
            )
        drawn = torch.tensor(draws, dtype=torch.float64)
        return {name: drawn[:, i] for i, name in enumerate(names)}


def _generator(seed: int, problem: DifferentiableLoss) -> torch.Generator:
    # Pieces of a batch draw signs of their own, so that their errors average out.
    return torch.Generator().manual_seed(seed + (problem.place.first if problem.place else 0))


def _random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


class _Moves:
    """Moves of the layers' outputs along random signs u_b v_b^T, and what the gradients in them change by."""

    def __init__(self, graph: DirectionGraph, generator: torch.Generator) -> None:
        self.graph, self.generator = graph, generator
        self.edges = [call.edge for name in graph.names for call in graph.calls[name] if call.edge is not None]
        self.gradients = torch.autograd.grad(graph.loss, self.edges, create_graph=True)

    def check_samples_apart(self, scales: Mapping[str, float]) -> None:
        """Raise MeasurementError unless what comes back scales sample by sample with the moves."""
        powers, state = powers_of_two(self.graph.samples), self.generator.get_state()
        once = self.draw({name: torch.tensor(scale) for name, scale in scales.items()})
        self.generator.set_state(state)
        scaled = self.draw({name: powers[:, 0] * scale for name, scale in scales.items()})
        for name, calls in self.graph.calls.items():
            for i, (call, layout) in enumerate(zip(calls, self.graph.layouts[name], strict=True)):
                one, other = (
                    (product if call.is_convolution else call.to_rows(product)).reshape(call.lead.numel(), -1)
                    for product in (once[name][i][1], scaled[name][i][1])
                )
                if not scales_by_sample(one, other, layout.spread(powers).to(one)):
                    raise MeasurementError(INTERACT)

    def draw(self, scales: Mapping[str, Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Return each layer's moves at its calls, times a scale or one for each sample (B,), and the products."""
        graph, moves = self.graph, []
        for name in graph.names:
            layer, shape = graph.problem.layers[name], graph.problem.parameters[name].shape
            u, v = (_random_signs((graph.samples, size), self.generator).T for size in layer.shape)
            for call, layout in zip(graph.calls[name], graph.layouts[name], strict=True):
                moves.append(move_by_sample(layer, call, shape, u * scales[name], v, layout))
        products = torch.autograd.grad(self.gradients, self.edges, moves, retain_graph=True, allow_unused=True)
        pairs = iter(
            (move, torch.zeros_like(move) if product is None else product)
            for move, product in zip(moves, products, strict=True)
        )
        return {name: [next(pairs) for _ in graph.calls[name]] for name in graph.names}


def _product(gradients: Gradients, leaves: Mapping[str, Tensor], z: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
    """Return H z, by the leaves' ids; None for zero."""
    outputs, inputs = {}, {id(leaf): leaf for leaf in leaves.values()}
    for name, leaf in leaves.items():
        gradient = gradients.values[name]
        # The gradient of a loss that is linear in the weights has no graph: its Hessian is zero.
        if gradient is not None and gradient.requires_grad:
            outputs[id(leaf)] = gradient
    if not outputs:
        return dict.fromkeys(inputs)
    products = torch.autograd.grad(
        list(outputs.values()), list(inputs.values()), [z[key] for key in outputs], retain_graph=True, allow_unused=True
    )
    return dict(zip(inputs, products, strict=True))


def _by_leaf(
    layers: Mapping[str, MatrixLayer], leaves: Mapping[str, Tensor], z: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """Return the signs in the shape of the parameters; parts of a fused projection share one."""
    full: dict[int, Tensor] = {}
    for name, layer in layers.items():
        leaf = leaves[name]
        part = layer.to_tensor(z[name].to(leaf), leaf)
        full[id(leaf)] = part if id(leaf) not in full else full[id(leaf)] + part
    return full


def _inner(layer: MatrixLayer, z: Tensor, product: Tensor | None) -> float:
    if product is None:
        return 0.0
    matrix = layer.to_matrix(product)
    return dot(matrix, z.to(matrix))
