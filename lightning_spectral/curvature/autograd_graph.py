"""What the autograd graph says of a loss: which parameters reach it how, and whether it is piecewise linear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.autograd.graph import Node

from lightning_spectral._autograd import operation
from lightning_spectral._torch_private import trained_on_batch_statistics

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
