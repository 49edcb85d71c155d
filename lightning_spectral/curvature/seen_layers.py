"""Which layers of a loss can be moved at their outputs: those whose every use is a product that was seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.autograd.graph import Node

from lightning_spectral._autograd import operation
from lightning_spectral._torch_private import output_shape
from lightning_spectral.curvature.autograd_graph import VIEWS, Dependence, GraphCut, find_cut, outer_cut
from lightning_spectral.curvature.problem import DifferentiableLoss
from lightning_spectral.curvature.products import TRANSPOSED, LayerCall
from lightning_spectral.layers.matrices import MatrixLayer

NO_PRODUCT = "no product of it with activations was seen"
OTHER_USE = "it is also used in another way than multiplied with activations"
BY_ITSELF = "it is multiplied with itself, or with a part of itself as bias"
OTHER_LAYOUT = "it is applied in another layout than its layer's, as a convolution's filters are in a transposed one"
UNBATCHED = "a convolution without a dimension for samples"
IN_CHECKPOINT = "it is applied to what it gave before, within a checkpoint"


NO_MATRIX = "it is never multiplied with activations as a matrix"
ELEMENTWISE = frozenset([
    "Add", "Sub", "Mul", "Div", "Neg", "Exp", "Softplus", "Sigmoid", "Tanh", "Index", "IndexSelect", "Gather",
    "Repeat",
])  # fmt: skip
"""What is done with a parameter that is no matrix."""


@dataclass(frozen=True, eq=False)
class SeenLayers:
    """What the graph of a loss shows of its layers.

    Attributes:
        calls: layer name -> its calls, all that the loss depends on.
        numbers: layer name -> which of all calls that were recorded these are; the others do not reach the loss.
        unseen: the other layers -> why they cannot be moved at their outputs.
        nested: layers with a call that depends on an earlier one.
        products: nodes of the outputs of all products with a parameter.
        dependence: of the graph on the layers in ``calls``.
    """

    calls: dict[str, list[LayerCall]]
    numbers: dict[str, list[int]]
    unseen: dict[str, str]
    nested: frozenset[str]
    products: Sequence[Node]
    dependence: Dependence

    @cached_property
    def cut(self) -> GraphCut:
        """Cut of the graph, at the layers in ``calls``."""
        nodes = {name: [call.edge.node for call in own if call.edge is not None] for name, own in self.calls.items()}
        return find_cut(self.dependence, nodes)

    @cached_property
    def outer_cut(self) -> GraphCut:
        """Cut behind the last products with parameters."""
        return outer_cut(self.dependence, self.products)

    @cached_property
    def n_nodes(self) -> int:
        """Nodes of the graph that depend on a layer."""
        return sum(mask != 0 for mask in self.dependence.masks.values())


def see_layers(problem: DifferentiableLoss, names: Iterable[str]) -> SeenLayers:
    """Read off the graph of a loss that was run at which calls each layer takes part."""
    names = list(names)
    if problem.seen is None or problem.seen[0] != names:
        problem.seen = names, _see_layers(problem, names)
    seen: SeenLayers = problem.seen[1]
    return seen


def _see_layers(problem: DifferentiableLoss, names: Sequence[str]) -> SeenLayers:
    root = problem.value.grad_fn
    assert root is not None
    leaves = {id(problem.parameters[name]) for name in names}
    dependence = Dependence(root, leaves)
    uses = _uses(dependence)
    calls: dict[str, list[LayerCall]] = {}
    numbers: dict[str, list[int]] = {}
    unseen: dict[str, str] = {}
    nested = set()
    for name in names:
        leaf = id(problem.parameters[name])
        recorded = problem.trace.calls.get(leaf, [])
        reached = {i: c for i, c in enumerate(recorded) if c.edge is not None and c.edge.node in dependence.masks}
        # Where a view of it was taken without a gradient, a product does not depend on it.
        numbered = {i: c for i, c in reached.items() if _products_at(c, uses[leaf])}
        own = list(numbered.values())
        covered = set().union(*(_products_at(call, uses[leaf]) for call in own)) if own else set()
        bit = dependence.bits[leaf]
        is_nested = any(call.source is not None and dependence.masks.get(call.source, 0) & bit for call in own)
        if not own:
            unseen[name] = NO_PRODUCT
        elif uses[leaf] - covered:
            unseen[name] = OTHER_USE
        elif any(sum(_shows(n, leaf) for n, _ in node.next_functions) > 1 for node in covered):
            unseen[name] = BY_ITSELF
        elif misfit := next(filter(None, (_misfit(call, problem.layers[name]) for call in own)), ""):
            unseen[name] = misfit
        elif is_nested and problem.trace.hooked:
            unseen[name] = IN_CHECKPOINT
        else:
            calls[name], numbers[name] = own, list(numbered)
            if is_nested:
                nested.add(name)
    if unseen:
        # Layers that are measured one by one do not stand in the way of the others.
        dependence = Dependence(root, {id(problem.parameters[name]) for name in calls})
    return SeenLayers(calls, numbers, unseen, frozenset(nested), problem.trace.products, dependence)


def not_matrices(problem: DifferentiableLoss) -> dict[str, str]:
    """Return layers of a loss that was run which are never multiplied as a matrix, with what is done with them.

    Tables of positions, decay rates and the like: they are added, scaled with or looked up, entry by entry. What a mask
    or a scale makes of a matrix counts as the matrix.
    """
    root = problem.value.grad_fn
    assert root is not None
    leaves = {id(leaf): leaf.shape for leaf in problem.parameters.values()}
    uses = _uses(Dependence(root, set(leaves)), leaves)
    reasons = {}
    for name, leaf in problem.parameters.items():
        operations = {operation(node) for node in uses[id(leaf)]}
        if operations and operations <= ELEMENTWISE:
            reasons[name] = f"{NO_MATRIX} ({', '.join(sorted(operations))})"
    return reasons


def _uses(dependence: Dependence, shapes: Mapping[int, torch.Size] | None = None) -> dict[int, set[Node]]:
    """Return leaf -> the nodes that use it, or a view of it, for anything but another view.

    With the leaves' shapes, what is made of a leaf, entry by entry and from no activations, is a view of it, too.
    """
    views: dict[Node, int] = {}
    uses: dict[int, set[Node]] = {leaf: set() for leaf in dependence.bits}
    for node, mask in dependence.masks.items():
        if not mask:
            continue
        if hasattr(node, "variable"):
            views[node] = id(node.variable)
            continue
        inputs = [n for n, _ in node.next_functions if n is not None]
        if operation(node) in VIEWS and len(inputs) == 1 and inputs[0] in views:
            views[node] = views[inputs[0]]
            continue
        made_of = None
        if shapes and operation(node) in ELEMENTWISE and all(n in views or hasattr(n, "variable") for n in inputs):
            sources = (views[n] for n in inputs if n in views)
            made_of = next((leaf for leaf in sources if shapes[leaf] == output_shape(node, 0)), None)
            if made_of is not None:
                views[node] = made_of
        for n in inputs:
            if n in views and views[n] != made_of:
                uses[views[n]].add(node)
    return uses


def _shows(node: Node | None, leaf: int) -> bool:
    """Return whether what a node gives is a leaf, or a view of it."""
    while node is not None and not hasattr(node, "variable"):
        inputs = [n for n, _ in node.next_functions if n is not None]
        node = inputs[0] if operation(node) in VIEWS and len(inputs) == 1 else None
    return node is not None and id(node.variable) == leaf


def _misfit(call: LayerCall, layer: MatrixLayer) -> str:
    """Return why a call does not take a parameter for the matrix that its layer is; empty if it does."""
    if not call.is_convolution:
        return OTHER_LAYOUT if layer.transposed and call.parameter.ndim > 2 else ""
    if call.input.ndim != call.parameter.ndim:
        return UNBATCHED
    same = (call.function in TRANSPOSED, call.options.get("groups", 1)) == (layer.transposed, layer.groups)
    return OTHER_LAYOUT if layer.stack or not same else ""


def _products_at(call: LayerCall, uses: set[Node]) -> set[Node]:
    """Return the uses of the parameter behind a call's output, with views and a sum with the bias between at most."""
    stack = [] if call.edge is None else [call.edge.node]
    products = set()
    while stack:
        node = stack.pop()
        if node in uses:
            products.add(node)
        elif operation(node) in VIEWS or operation(node) == "Add":
            stack.extend(n for n, _ in node.next_functions if n is not None)
    return products
