"""Find where a loss stops being piecewise linear in each of its layers: the cut between network and head.

Below the cut every operation is linear, or piecewise so, or a product of factors that no layer reaches two of. With z
the tensors at the cut, the Hessian of the loss in one layer is J^T (d2L / dz2) J, J = dz / dW; nothing else is in it.
What lies above, the head, may be anything: a loss, its sums and products, a softmax, a normalization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.autograd.graph import GradientEdge, Node

from lightning_spectral.curvature.autograd_graph import (
    LINEAR,
    PIECEWISE,
    PRODUCTS,
    VIEWS,
    Dependence,
    named,
    operation,
)


@dataclass(frozen=True, eq=False)
class GraphCut:
    """Cut of a loss's graph.

    Attributes:
        edges: z, the tensors at the cut; none where the loss itself is piecewise linear in each layer.
        head: the nodes above it that depend on a layer.
        inside: layers whose every call lies below it.
        operations: what else is behind a layer and is not piecewise linear, in words.
    """

    edges: Sequence[GradientEdge]
    head: Sequence[Node]
    inside: frozenset[str]
    operations: str

    def name_head(self) -> str:
        """Return the operations of the head that are not piecewise linear, in words."""
        return named({operation(node): 1 for node in self.head if operation(node) not in LINEAR | PIECEWISE})


def find_cut(dependence: Dependence, calls: Mapping[str, Iterable[Node]]) -> GraphCut:
    """Return the cut of a loss's graph that is nearest to the loss.

    Args:
        dependence: of the nodes of the graph on the layers' leaves.
        calls: layer name -> the nodes of its outputs.
    """
    allowed = LINEAR | PIECEWISE
    below: dict[Node, bool] = {}
    edges: dict[tuple[Node, int], GradientEdge] = {}
    head, bent = [], []
    # Every node comes after those that it depends on.
    for node, mask in dependence.masks.items():
        inputs = [(n, nr) for n, nr in node.next_functions if n is not None and dependence.masks[n]]
        is_linear = not mask or dependence.is_linear(node, allowed)
        below[node] = is_linear and all(below[n] for n, _ in inputs)
        if not below[node]:
            head.append(node)
            edges |= {(n, nr): GradientEdge(n, nr) for n, nr in inputs if below[n]}
        if not is_linear:
            bent.append(node)
    reached = {name: [node for node in nodes if node in below] for name, nodes in calls.items()}
    inside = frozenset(name for name, nodes in reached.items() if all(below[node] for node in nodes))
    behind = _behind(node for nodes in reached.values() for node in nodes)
    return GraphCut(
        list(edges.values()),
        head,
        inside,
        named({operation(node): 1 for node in bent if node in behind}),
    )


def _behind(nodes: Iterable[Node]) -> set[Node]:
    """Return the nodes that these are computed from."""
    visited: set[Node] = set()
    stack = [n for node in nodes for n, _ in node.next_functions if n is not None]
    while stack:
        node = stack.pop()
        if node not in visited:
            visited.add(node)
            stack.extend(n for n, _ in node.next_functions if n is not None)
    return visited


def outer_cut(dependence: Dependence, products: Iterable[Node]) -> GraphCut:
    """Return the cut above the last products with a parameter: z is the network's output, whatever is in the network.

    Args:
        dependence: of the nodes of the graph on the layers' leaves.
        products: nodes of the outputs of all products with a parameter.
    """
    products = {node for node in products if node in dependence.masks}
    below = products | _behind(products)
    head = [node for node, mask in dependence.masks.items() if mask and node not in below]
    edges = {
        (n, nr): GradientEdge(n, nr)
        for node in head
        for n, nr in node.next_functions
        if n is not None and dependence.masks[n] and n in below
    }
    return GraphCut(list(edges.values()), head, frozenset(), "")


def products_with_parameters(dependence: Dependence) -> set[Node]:
    """Return the nodes that multiply with a matrix, or a view of one, that is a leaf of the graph."""
    views = set()
    products = set()
    for node in dependence.masks:
        inputs = [n for n, _ in node.next_functions if n is not None]
        is_matrix = hasattr(node, "variable") and node.variable.ndim > 1
        if is_matrix or (operation(node) in VIEWS and len(inputs) == 1 and inputs[0] in views):
            views.add(node)
        elif operation(node) in PRODUCTS and any(n in views for n in inputs):
            products.add(node)
    return products
