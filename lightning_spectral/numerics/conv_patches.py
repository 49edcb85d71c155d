"""Unfolded input of a convolution: the vectors that its weights are multiplied with.

At each output position p the input gives a patch a_p = x[c, s p + d i] over channels c of a group and places i of the
kernel, with stride s, dilation d and x padded. A transposed convolution is one of stride 1 with a flipped kernel, on
an input with s - 1 zeros between its entries.

Shapes: B samples, C channels in g groups, kernel of K places, n = C / g * K, P output positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNFOLDED_ENTRIES = 2**21
"""Entries of patches that are held at a time."""


@dataclass(frozen=True, eq=False)
class Patches:
    """Unfolded input of one convolution.

    Attributes:
        x: (B, C, *S) padded input.
        kernel, stride, dilation: per dimension.
        groups: g.
        flipped: whether the kernel runs backwards, as that of a transposed convolution.
    """

    x: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    flipped: bool

    @classmethod
    def of(
        cls, x: Tensor, kernel: Sequence[int], options: Mapping[str, Any], *, groups: int, transposed: bool
    ) -> Patches:
        """Return the patches of an input (B, C, *S) under the options of ``F.conv2d`` or ``F.conv_transpose2d``."""
        dims, kernel = len(kernel), tuple(kernel)
        stride, dilation = (_each(options.get(name, 1), dims) for name in ("stride", "dilation"))
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = options.get("padding", 0)
        if padding == "same":
            margins = [(r // 2, r - r // 2) for r in reach]
        else:
            margins = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]
        if transposed:
            after = _each(options.get("output_padding", 0), dims)
            margins = [(r - p, r - p + o) for r, (p, _), o in zip(reach, margins, after, strict=True)]
            spread = x.new_zeros(
                *x.shape[:2], *((size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True))
            )
            _part(spread, [slice(None, None, s) for s in stride]).copy_(x)
            x, stride = spread, (1,) * dims
        padded = F.pad(x, [side for pair in reversed(margins) for side in pair])
        return cls(padded, kernel, stride, dilation, groups, transposed)

    @property
    def reach(self) -> tuple[int, ...]:
        """Extent of a patch per dimension, d (k - 1)."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def positions(self) -> tuple[int, ...]:
        """Number of output positions per dimension."""
        sizes = zip(self.x.shape[2:], self.reach, self.stride, strict=True)
        return tuple((size - reach - 1) // s + 1 for size, reach, s in sizes)

    @property
    def rows(self) -> int:
        """Number of patches, B P."""
        return int(self.x.shape[0]) * math.prod(self.positions)

    @property
    def length(self) -> int:
        """Entries of a patch, n."""
        return int(self.x.shape[1]) // self.groups * math.prod(self.kernel)

    def unfolded(self) -> Iterator[Tensor]:
        """Yield the patches (g, rows, n), those of some samples at a time."""
        b = max(1, UNFOLDED_ENTRIES // max(1, math.prod(self.positions) * self.length * self.groups))
        dims = len(self.kernel)
        for x in torch.split(self.x, b):
            for i, (reach, s) in enumerate(zip(self.reach, self.stride, strict=True)):
                x = x.unfold(2 + i, reach + 1, s)
            x = _part(x, [slice(None, None, d) for d in self.dilation])
            x = x.flip(list(range(-dims, 0))) if self.flipped else x
            x = x.reshape(len(x), self.groups, -1, *x.shape[2:]).movedim(1, 0).movedim(2, 2 + dims)
            yield x.reshape(self.groups, -1, self.length)


def _part(x: Tensor, slices: Sequence[slice]) -> Tensor:
    """Return the slices of the last dimensions."""
    index: tuple[Any, ...] = (..., *slices)
    return x[index]


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
