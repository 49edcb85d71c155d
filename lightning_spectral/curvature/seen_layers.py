"""Which layers of a loss can be moved at their outputs: those whose every use is a product that was seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.autograd.graph import Node

from lightning_spectral.curvature.autograd_graph import VIEWS, Dependence, operation
from lightning_spectral.curvature.graph_cut import (
    GraphCut,
    find_cut,
    outer_cut,
    products_with_parameters,
)
from lightning_spectral.curvature.problem import DifferentiableLoss
from lightning_spectral.curvature.products import LayerCall

NO_PRODUCT = "no product of it with activations was seen"
OTHER_USE = "it is also used in another way than multiplied with activations"
IN_CHECKPOINT = "it is applied to what it gave before, within a checkpoint"


@dataclass(frozen=True, eq=False)
class SeenLayers:
    """What the graph of a loss shows of its layers.

    Attributes:
        calls: layer name -> its calls, all that the loss depends on.
        unseen: the other layers -> why they cannot be moved at their outputs.
        nested: layers with a call that depends on an earlier one.
        cut: of the graph, at the layers in ``calls``.
        outer_cut: behind the last products with parameters.
        n_nodes: nodes of the graph that depend on a layer.
    """

    calls: dict[str, list[LayerCall]]
    unseen: dict[str, str]
    nested: frozenset[str]
    cut: GraphCut
    outer_cut: GraphCut
    n_nodes: int


def see_layers(problem: DifferentiableLoss, names: Iterable[str]) -> SeenLayers:
    """Read off the graph of a loss that was run at which calls each layer takes part."""
    names = list(names)
    root = problem.value.grad_fn
    assert root is not None
    leaves = {id(problem.parameters[name]) for name in names}
    dependence = Dependence(root, leaves)
    uses = _uses(dependence)
    calls: dict[str, list[LayerCall]] = {}
    unseen: dict[str, str] = {}
    nested = set()
    for name in names:
        leaf = id(problem.parameters[name])
        recorded = problem.trace.calls.get(leaf, [])
        own = [call for call in recorded if call.edge is not None and call.edge.node in dependence.masks]
        covered = set().union(*(_products_at(call, uses[leaf]) for call in own)) if own else set()
        bit = dependence.bits[leaf]
        is_nested = any(call.source is not None and dependence.masks.get(call.source, 0) & bit for call in own)
        if not own:
            unseen[name] = NO_PRODUCT
        elif uses[leaf] - covered:
            unseen[name] = OTHER_USE
        elif is_nested and problem.trace.hooked:
            unseen[name] = IN_CHECKPOINT
        else:
            calls[name] = own
            if is_nested:
                nested.add(name)
    nodes = {name: [call.edge.node for call in own if call.edge is not None] for name, own in calls.items()}
    products = {n for of_layer in nodes.values() for n in of_layer} | products_with_parameters(dependence)
    n_nodes = sum(mask != 0 for mask in dependence.masks.values())
    return SeenLayers(
        calls, unseen, frozenset(nested), find_cut(dependence, nodes), outer_cut(dependence, products), n_nodes
    )


def _uses(dependence: Dependence) -> dict[int, set[Node]]:
    """Return leaf -> the nodes that use it, or a view of it, for anything but another view."""
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
        for n in inputs:
            if n in views:
                uses[views[n]].add(node)
    return uses


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
