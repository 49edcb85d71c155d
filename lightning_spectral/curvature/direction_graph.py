"""The loss as a function of amplitudes: every layer's output is moved along its directions, each sample by its own.

With e_lbk the amplitude of direction k of layer l at sample b, dL/de_lbk = <u_k v_k^T, gradient of sample b>, and where
samples do not interact h_lk = sum_b d2L / de_lbk^2. One graph serves all layers and directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_spectral.curvature.autograd_graph import Dependence, GraphCut, find_cut, outer_cut
from lightning_spectral.curvature.forward_recorder import Recorder
from lightning_spectral.curvature.ports import Port, SampleLayout
from lightning_spectral.curvature.problem import DifferentiableLoss, scalar_loss
from lightning_spectral.curvature.products import LayerCall
from lightning_spectral.curvature.seen_layers import SeenLayers
from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.matmul_precision import accumulation_dtype
from lightning_spectral.numerics.svd import SingularTriplets

Layouts = Mapping[str, Sequence[SampleLayout]]
"""Layer name -> where the samples are among the rows of each of its calls."""

NOT_THE_SAME = "the loss does not compute the same at each call; use curvature='exact'"


class DirectionGraph:
    """One forward pass with an amplitude for each direction and sample, all of them zero."""

    def __init__(
        self,
        problem: DifferentiableLoss,
        seen: SeenLayers,
        directions: Mapping[str, SingularTriplets],
        layouts: Layouts,
        samples: int,
    ) -> None:
        self.problem, self.seen, self.layouts, self.samples = problem, seen, layouts, samples
        self.names = list(layouts)
        self.triplets = {name: directions[name] for name in self.names}
        self.e: dict[str, Tensor] = {}
        for name in self.names:
            leaf, shape = problem.parameters[name], (self.samples, len(self.triplets[name]))
            self.e[name] = torch.zeros(shape, dtype=accumulation_dtype(leaf), device=leaf.device, requires_grad=True)
        self._ports: dict[str, list[Port]] = {name: [] for name in self.names}
        self.by_leaf: dict[int, list[str]] = {}
        for name in self.names:
            self.by_leaf.setdefault(id(problem.parameters[name]), []).append(name)
        # Only amplitudes are differentiated in; without weights in its graph a product costs a quarter less. What is
        # checkpointed is computed again in each product, with weights that require a gradient, and must save the same.
        hooked = problem.trace.hooked
        weights = [leaf for leaf in problem.parameters.values() if leaf.requires_grad and not hooked]
        for leaf in weights:
            leaf.requires_grad_(False)
        try:
            with Recorder(set(self.by_leaf), move=self._move, cheap=not hooked) as recorder:
                self.loss = scalar_loss(problem.evaluate())
        finally:
            for leaf in weights:
                leaf.requires_grad_(True)
        self._products = recorder.trace.products
        recorded = {name: recorder.trace.calls.get(id(problem.parameters[name]), []) for name in self.names}
        before = {name: problem.trace.calls[id(problem.parameters[name])] for name in self.names}
        if any(len(recorded[name]) != len(before[name]) for name in self.names):
            raise MeasurementError(NOT_THE_SAME)
        self.calls = {name: [recorded[name][number] for number in seen.numbers[name]] for name in self.names}

    def cut(self) -> GraphCut:
        """Return the cut of this graph that is nearest to the loss."""
        return find_cut(self._dependence, self._nodes)

    @cached_property
    def outer_cut(self) -> GraphCut:
        """Cut behind the last products with parameters, and what is linear after them."""
        return outer_cut(self._dependence, self._products)

    @cached_property
    def product_cut(self) -> GraphCut:
        """Cut behind the last products with parameters alone."""
        return outer_cut(self._dependence, self._products, grow=False)

    @cached_property
    def _dependence(self) -> Dependence:
        root = self.loss.grad_fn
        assert root is not None
        return Dependence(root, {id(e) for e in self.e.values()})

    @cached_property
    def _nodes(self) -> dict[str, list[Node]]:
        return {name: [call.edge.node for call in calls if call.edge] for name, calls in self.calls.items()}

    def columns(self, edges: Sequence[GradientEdge], x: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return per layer (B, K) x_b^T J_b d_k, J the Jacobian of the tensors at these edges."""
        r = torch.autograd.grad(edges, list(self.e.values()), x, retain_graph=True, allow_unused=True)
        return {
            name: torch.zeros_like(e) if r_l is None else r_l for (name, e), r_l in zip(self.e.items(), r, strict=True)
        }

    @contextmanager
    def only(self, indices: Mapping[str, Tensor]) -> Iterator[None]:
        """Have products within move along these directions of each layer alone, and read no other."""
        for name, k in indices.items():
            for port in self._ports[name]:
                port.select(None if port.attached else k.to(self.e[name].device))
        try:
            yield
        finally:
            for ports in self._ports.values():
                for port in ports:
                    port.select(None)

    def _move(self, leaf: int, call: LayerCall, number: int) -> Tensor | None:
        """Return what moves the output of one call along the directions of all layers of its parameter."""
        total = None
        for name in self.by_leaf[leaf]:
            numbers, parameter = self.seen.numbers[name], self.problem.parameters[name]
            if number not in numbers:
                continue
            layout = self.layouts[name][numbers.index(number)]
            attached = name in self.seen.nested and number != numbers[0]
            port = Port(
                self.problem.layers[name], call, parameter.shape, self.triplets[name], layout, attached=attached
            )
            self._ports[name].append(port)
            shift = port.shift(self.e[name])
            total = shift if total is None else total + shift
        return total
