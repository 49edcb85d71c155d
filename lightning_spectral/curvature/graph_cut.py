"""Find where a loss stops being piecewise linear in each of its layers: the cut between network and head.

Below the cut every operation is linear, or piecewise so, or a product of factors that no layer reaches two of. With z
the tensors at the cut, the Hessian of the loss in one layer is J^T (d2L / dz2) J, J = dz / dW; nothing else is in it.
What lies above, the head, may be anything: a loss, its sums and products, a softmax, a normalization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.autograd.graph import GradientEdge, Node

from lightning_spectral._autograd import operation, reachable
from lightning_spectral.curvature.autograd_graph import LINEAR, PIECEWISE, Dependence, named

ALLOWED = LINEAR | PIECEWISE


@dataclass(frozen=True, eq=False)
class GraphCut:
    """Cut of a loss's graph.

    Attributes:
        edges: z, the tensors at the cut; none where the loss itself is piecewise linear in each layer.
        head: the nodes above it that depend on a layer.
        inside: layers whose every call lies below it.
        operations: what else is behind a layer and is not piecewise linear, in words.
        is_nested: whether one of z is computed from another, so that their derivatives mix.
    """

    edges: Sequence[GradientEdge]
    head: Sequence[Node]
    inside: frozenset[str]
    operations: str
    is_nested: bool = False

    def name_head(self) -> str:
        """Return the operations of the head that are not piecewise linear, in words."""
        return named({operation(node): 1 for node in self.head if operation(node) not in ALLOWED})


def find_cut(dependence: Dependence, calls: Mapping[str, Iterable[Node]]) -> GraphCut:
    """Return the cut of a loss's graph that is nearest to the loss.

    Args:
        calls: layer name -> the nodes of its outputs.
    """
    below: dict[Node, bool] = {}
    bent = []
    # Every node comes after those that it depends on.
    for node, mask in dependence.masks.items():
        is_linear = not mask or dependence.is_linear(node, ALLOWED)
        below[node] = is_linear and all(below[n] for n, _ in _inputs(node, dependence))
        if not is_linear:
            bent.append(node)
    edges = _edges(dependence, below)
    # What is above one tensor at the cut must not be below another: derivatives in z take each of z by itself.
    while above := _above_another(dependence, below, edges):
        below |= dict.fromkeys(above, False)
        edges = _edges(dependence, below)
    reached = {name: [node for node in nodes if node in below] for name, nodes in calls.items()}
    behind = _behind(node for nodes in reached.values() for node in nodes)
    return GraphCut(
        list(edges.values()),
        [node for node, is_below in below.items() if not is_below],
        frozenset(name for name, nodes in reached.items() if all(below[node] for node in nodes)),
        named({operation(node): 1 for node in bent if node in behind}),
    )


def _inputs(node: Node, dependence: Dependence) -> list[tuple[Node, int]]:
    """Return those inputs of a node that depend on a layer."""
    return [(n, nr) for n, nr in node.next_functions if n is not None and dependence.masks[n]]


def _edges(dependence: Dependence, below: Mapping[Node, bool]) -> dict[tuple[Node, int], GradientEdge]:
    """Return the tensors that a node above the cut takes from below it."""
    head = (node for node, is_below in below.items() if not is_below)
    return {edge: GradientEdge(*edge) for node in head for edge in _inputs(node, dependence) if below[edge[0]]}


def _above_another(
    dependence: Dependence, below: Mapping[Node, bool], edges: Mapping[tuple[Node, int], GradientEdge]
) -> list[Node]:
    """Return the nodes below the cut that are computed from a tensor at the cut."""
    at_cut = {node for node, _ in edges}
    above: dict[Node, bool] = {}
    for node, is_below in below.items():
        above[node] = is_below and any(n in at_cut or above[n] for n, _ in _inputs(node, dependence))
    return [node for node, is_above in above.items() if is_above]


def _behind(nodes: Iterable[Node]) -> set[Node]:
    """Return the nodes that these are computed from."""
    return set(reachable(n for node in nodes for n, _ in node.next_functions))


def outer_cut(dependence: Dependence, products: Iterable[Node]) -> GraphCut:
    """Return the cut above the last products with a parameter: z is the network's output, whatever is in the network.

    Args:
        products: nodes of the outputs of all products with a parameter.
    """
    products = {node for node in products if node in dependence.masks}
    inside = products | _behind(products)
    below = {node: not mask or node in inside for node, mask in dependence.masks.items()}
    grown = dict(below)
    for node in below:
        # Sums and shapes after the last products are below the cut, as long as not all of the loss is.
        inputs = _inputs(node, dependence)
        grown[node] |= bool(inputs) and dependence.is_linear(node, ALLOWED) and all(grown[n] for n, _ in inputs)
    below = below if all(grown.values()) else grown
    head = [node for node, is_below in below.items() if not is_below]
    edges = _edges(dependence, below)
    return GraphCut(list(edges.values()), head, frozenset(), "", bool(_above_another(dependence, below, edges)))
