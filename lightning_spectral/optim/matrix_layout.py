"""Which parts of a parameter are the matrices that get the update: groups of a convolution, parts of a fused qkv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

STACK = -1
"""`Layout.input_first` of a stack of matrices."""


class Layout(TypedDict):
    """Plain numbers, so that it lives in `param_groups` and loads from a checkpoint with weights only.

    Attributes:
        input_first: 0, or the number of groups of a parameter that stores (in_channels, out_channels / groups, ...);
            `STACK` for a stack (E, m, n) of matrices.
        rows: numbers of rows of its matrices, which are stacked; empty for a single one.
    """

    input_first: int
    rows: list[int]


def whole_layout() -> Layout:
    """Return the parameter as one matrix, output first."""
    return Layout(input_first=0, rows=[])


def blocks(tensor: Tensor, layout: Layout) -> list[Tensor]:
    """Return views (m_i, ...) of a parameter-shaped tensor; `flatten(1)` of each is one of its matrices.

    >>> [tuple(b.shape) for b in blocks(torch.zeros(6, 2, 3, 3), Layout(input_first=0, rows=[3, 3]))]
    [(3, 2, 3, 3), (3, 2, 3, 3)]
    """
    if layout["input_first"] == STACK:
        return list(tensor.unbind())
    if groups := layout["input_first"]:
        parts = list(torch.unflatten(tensor, 0, (groups, -1)).transpose(1, 2).unbind())
        return list(torch.split(parts[0], layout["rows"])) if groups == 1 and layout["rows"] else parts
    return list(torch.split(tensor, layout["rows"])) if layout["rows"] else [tensor]


def row_counts(shape: Sequence[int], layout: Layout) -> list[int]:
    """Return m_i of `blocks`, without looking at the tensor, which may be spread over ranks.

    >>> row_counts((6, 2, 3, 3), Layout(input_first=0, rows=[3, 3])), row_counts((6, 2), whole_layout())
    ([3, 3], [6])
    """
    if layout["input_first"] == STACK:
        return [shape[1]] * shape[0]
    if (groups := layout["input_first"]) > 1:
        return [shape[1]] * groups
    return layout["rows"] or [shape[1] if groups else shape[0]]
