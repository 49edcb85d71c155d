"""What the autograd graph says of a loss: which parameters reach it how, and where it stops being piecewise linear.

Below the cut between network and head every operation is linear, or piecewise so, or a product of factors that no layer
reaches two of. With z the tensors at the cut, the Hessian of the loss in one layer is J^T (d2L / dz2) J, J = dz / dW;
nothing else is in it. What lies above, the head, may be anything: a loss, its sums and products, a softmax, a
normalization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.autograd.graph import GradientEdge, Node

from lightning_spectral._autograd import operation, reachable
from lightning_spectral._torch_private import is_complex, trained_on_batch_statistics

# Linear in each input alone; piecewise so for the second group. Names as autograd gives them, without the version.
LINEAR = frozenset([
    "Add", "Sub", "Neg", "Sum", "Mean", "View", "Reshape", "ReshapeAlias", "UnsafeView", "Permute", "Transpose", "T",
    "Expand", "Squeeze", "Unsqueeze", "Cat", "Stack", "Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Index",
    "IndexSelect", "Gather", "ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D", "Clone", "ToCopy", "Alias",
    "AsStrided", "Repeat", "Roll", "Flip", "Unfold", "Im2Col", "Chunk", "Narrow", "Diagonal", "Contiguous", "Cumsum",
    "PixelShuffle", "AvgPool1D", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "MkldnnAdaptiveAvgPool2D",
    "AdaptiveAvgPool3D", "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleBilinear2D",
    "UpsampleBicubic2D", "MaskedFill", "MaskedSelect", "Where", "AccumulateGrad", "Embedding", "IndexAdd", "IndexPut",
    "NativeDropout", "NllLoss", "NllLoss2D", "Scatter", "ScatterAdd", "SelectScatter", "SliceScatter", "Tril", "Triu",
    "UnsafeSplit", "_Move",
])  # fmt: skip
VIEWS = frozenset([
    "Alias", "AsStrided", "Chunk", "Clone", "Contiguous", "Expand", "Narrow", "Permute", "Reshape", "ReshapeAlias",
    "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "T", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView",
    "Unsqueeze", "View",
])  # fmt: skip
"""Operations that only show a tensor, or part of it, in another shape."""

PIECEWISE = frozenset([
    "Relu", "Threshold", "LeakyRelu", "Hardtanh", "Clamp", "ClampMin", "ClampMax", "Abs", "Maximum", "Minimum", "Max",
    "Min", "Amax", "Amin", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D",
    "RreluWithNoise",
])  # fmt: skip
PRODUCTS = frozenset([
    "Mul", "Mm", "Bmm", "Addmm", "Baddbmm", "Mv", "Dot", "Linear", "Convolution", "MkldnnConvolution",
    "CudnnConvolution", "PreluKernel", "Einsum",
])  # fmt: skip
BATCH_NORM = frozenset(["NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "BatchNormWithUpdate"])


class Dependence:
    """Dependence of each node of a loss's graph on some leaves, as bit masks.

    Args:
        stops: nodes not to look behind; each counts as a leaf of its own.
    """

    def __init__(self, root: Node, leaves: Iterable[int], stops: Iterable[Node] = ()) -> None:
        self.bits = {leaf: 1 << i for i, leaf in enumerate(leaves)}
        self.stops = {node: 1 << (len(self.bits) + i) for i, node in enumerate(stops)}
        self.masks: dict[Node, int] = {}
        self._walk(root)

    def inputs(self, node: Node) -> list[int]:
        """Return the masks of a node's inputs."""
        return [0 if following is None else self.masks[following] for following, _ in node.next_functions]

    def obstacles(self, allowed: frozenset[str]) -> dict[str, int]:
        """Return operations that are none of the allowed and not multilinear -> the leaves behind them.

        A product is multilinear where no leaf reaches two of its factors.
        """
        obstacles: dict[str, int] = {}
        for node, mask in self.masks.items():
            if mask and node not in self.stops and not self.is_linear(node, allowed):
                obstacles[operation(node)] = obstacles.get(operation(node), 0) | mask
        return obstacles

    def is_linear(self, node: Node, allowed: frozenset[str]) -> bool:
        """Return whether an operation is one of the allowed, or multilinear in the leaves."""
        name, inputs = operation(node), self.inputs(node)
        # The head's Hessian is of real outputs, and the size of a complex number is not piecewise linear.
        if is_complex(node):
            return False
        if name in allowed:
            return True
        if name in BATCH_NORM:
            return not trained_on_batch_statistics(node) and _disjoint(inputs)
        if name == "Div":
            return not any(inputs[1:])
        return name in PRODUCTS and _disjoint(inputs)

    def _walk(self, root: Node) -> None:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, done = stack.pop()
            if node in self.masks:
                continue
            following = [] if node in self.stops else [n for n, _ in node.next_functions if n is not None]
            if not done:
                stack.append((node, True))
                stack.extend((n, False) for n in following if n not in self.masks)
                continue
            mask = self.stops.get(node, 0)
            if hasattr(node, "variable") and node not in self.stops:
                mask |= self.bits.get(id(node.variable), 0)
            for n in following:
                mask |= self.masks[n]
            self.masks[node] = mask


def _disjoint(masks: Iterable[int]) -> bool:
    union = 0
    for mask in masks:
        if union & mask:
            return False
        union |= mask
    return True


def named(obstacles: Mapping[str, int]) -> str:
    """Return the operations in words."""
    return ", ".join(sorted(obstacles))


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


def outer_cut(dependence: Dependence, products: Iterable[Node], *, grow: bool = True) -> GraphCut:
    """Return the cut above the last products with a parameter: z is the network's output, whatever is in the network.

    Args:
        products: nodes of the outputs of all products with a parameter.
        grow: have sums and shapes after the last products below the cut, as long as not all of the loss is.
    """
    products = {node for node in products if node in dependence.masks}
    inside = products | _behind(products)
    below = {node: not mask or node in inside for node, mask in dependence.masks.items()}
    grown = dict(below)
    for node in below if grow else ():
        inputs = _inputs(node, dependence)
        grown[node] |= bool(inputs) and dependence.is_linear(node, ALLOWED) and all(grown[n] for n, _ in inputs)
    below = below if all(grown.values()) else grown
    edges = _edges(dependence, below)
    # What grew above a tensor that is at the cut all the same goes back to the head.
    while above := [node for node in _above_another(dependence, below, edges) if node not in inside]:
        below |= dict.fromkeys(above, False)
        edges = _edges(dependence, below)
    head = [node for node, is_below in below.items() if not is_below]
    return GraphCut(list(edges.values()), head, frozenset(), "", bool(_above_another(dependence, below, edges)))
