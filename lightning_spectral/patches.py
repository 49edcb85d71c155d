"""What a convolution multiplies its weights with: its unfolded input, and the second moment of that without unfolding.

At each output position p the input gives a patch a_p = x[c, s p + d i] over channels c of a group and places i of the
kernel, with stride s, dilation d and x padded. A transposed convolution is one of stride 1 with a flipped kernel, on
an input with s - 1 zeros between its entries.

With stride 1, sum_p x[c, p + d i] x[c', p + d j] is the correlation of x with itself at d (j - i), less the terms at
the border for which p is no output position. There are (2k - 1)^2 differences j - i for the k^4 pairs of places of a
square kernel, so this takes a third of the products, and no memory beside x: both are weight gradients of convolutions.

Shapes: B samples, C channels in g groups, kernel of K places, n = C / g * K, P output positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

CHUNK = 2**21
"""Entries of patches, or of the input, that are worked on at a time."""

WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}

Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Patches:
    """The unfolded input of one convolution.

    Attributes:
        x: (B, C, *S) padded input.
        support: where in each dimension of S the entries are that are not padding.
        kernel, stride, dilation: per dimension.
        groups: g.
        flipped: whether the kernel runs backwards, as that of a transposed convolution.
    """

    x: Tensor
    support: tuple[Range, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    flipped: bool

    @classmethod
    def of(
        cls, x: Tensor, kernel: Sequence[int], options: Mapping[str, Any], *, groups: int, transposed: bool
    ) -> Patches:
        """From the input (B, C, *S) and the options of ``F.conv2d``, ``F.conv_transpose2d`` and their like."""
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
        sizes = [size + low + high for size, (low, high) in zip(x.shape[2:], margins, strict=True)]
        support = tuple(
            (max(low, 0), min(low + old, new)) for old, new, (low, _) in zip(x.shape[2:], sizes, margins, strict=True)
        )
        padded = F.pad(x, [side for pair in reversed(margins) for side in pair])
        return cls(padded, support, kernel, stride, dilation, groups, transposed)

    @property
    def reach(self) -> tuple[int, ...]:
        """d (k - 1), how far a patch reaches."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def positions(self) -> tuple[int, ...]:
        """Output positions per dimension."""
        sizes = zip(self.x.shape[2:], self.reach, self.stride, strict=True)
        return tuple((size - reach - 1) // s + 1 for size, reach, s in sizes)

    @property
    def rows(self) -> int:
        """B P."""
        return int(self.x.shape[0]) * math.prod(self.positions)

    @property
    def length(self) -> int:
        """n."""
        return int(self.x.shape[1]) // self.groups * math.prod(self.kernel)

    def unfolded(self) -> Iterator[Tensor]:
        """The patches (g, rows, n), those of some samples at a time."""
        b = max(1, CHUNK // max(1, math.prod(self.positions) * self.length * self.groups))
        dims = len(self.kernel)
        for x in torch.split(self.x, b):
            for i, (reach, s) in enumerate(zip(self.reach, self.stride, strict=True)):
                x = x.unfold(2 + i, reach + 1, s)
            x = _part(x, [slice(None, None, d) for d in self.dilation])
            x = x.flip(list(range(-dims, 0))) if self.flipped else x
            x = x.reshape(len(x), self.groups, -1, *x.shape[2:]).movedim(1, 0).movedim(2, 2 + dims)
            yield x.reshape(self.groups, -1, self.length)

    def correlates(self) -> bool:
        """Whether `correlation` takes fewer products than the patches do."""
        if any(s != 1 for s in self.stride):
            return False
        differences = math.prod(2 * k - 1 for k in self.kernel) * _volume(self.support)
        places = math.prod(self.kernel)
        border = sum(_volume(box) for i in self._places() for box in self._outside(i))
        return differences + places * border < places**2 * math.prod(self.positions)

    def correlation(self) -> Tensor:
        """The sum over samples and positions of a a^T, (g, n, n) in float64, for stride 1."""
        b = max(1, CHUNK // max(1, self.x[0].numel()))
        first, *rest = torch.split(self.x, b)
        gram = self._correlation(first)
        for x in rest:
            gram += self._correlation(x)
        return gram

    def _correlation(self, x: Tensor) -> Tensor:
        """The same of some samples. Pairs i, j with i_0 > j_0, in the first dimension, are the others transposed."""
        channels, (first, *rest) = self.x.shape[1] // self.groups, self.kernel
        wide = F.pad(x, [side for reach in reversed(self.reach) for side in (reach, reach)])
        everywhere = self._products(wide, x, self.support, (0, *self.reach[1:]), (first, *(2 * k - 1 for k in rest)))
        wide_type = torch.float32 if x.device.type == "mps" else torch.float64
        gram = x.new_zeros(self.groups, channels, *self.kernel, channels, *self.kernel, dtype=wide_type)
        for i in self._places():
            shifts = [slice(k - 1 - place, 2 * k - 1 - place) for k, place in zip(rest, i[1:], strict=True)]
            pairs = _part(everywhere, [slice(first - i[0]), *shifts])
            before = (0, *(place * d for place, d in zip(i[1:], self.dilation[1:], strict=True)))
            for box in self._outside(i):
                pairs = pairs - self._products(wide, x, box, before, (first - i[0], *rest))
            row: tuple[Any, ...] = (slice(None), slice(None), *i, slice(None), slice(i[0], None))
            gram[row] = pairs.reshape(self.groups, channels, *pairs.shape[1:])
        gram = gram.flatten(3 + len(rest)).flatten(1, 2 + len(rest))
        place = torch.arange(first, device=x.device).repeat_interleave(math.prod(rest)).repeat(channels)
        gram = gram + gram.mT * (place[:, None] > place)
        if not self.flipped:
            return gram
        by_place = gram.reshape(self.groups, channels, len(place) // channels, channels, -1)
        return by_place.flip(2, 4).reshape(gram.shape)

    def _products(
        self, wide: Tensor, x: Tensor, box: Sequence[Range], before: Sequence[int], places: Sequence[int]
    ) -> Tensor:
        """(C, C / g, *places) of the sum over samples and q in the box of x[c, q] x[c', q - before + d t]."""
        small = _part(x, [slice(*sides) for sides in box])
        starts = [low - back + reach for (low, _), back, reach in zip(box, before, self.reach, strict=True)]
        ends = [
            start + high - low + d * (t - 1)
            for start, (low, high), d, t in zip(starts, box, self.dilation, places, strict=True)
        ]
        large = _part(wide, [slice(*sides) for sides in zip(starts, ends, strict=True)])
        shape = (x.shape[1], x.shape[1] // self.groups, *places)
        weight_gradient = WEIGHT_GRADIENTS[len(box)]
        found: Tensor = weight_gradient(  # type: ignore[no-untyped-call]
            large, shape, small, dilation=self.dilation, groups=self.groups
        )
        return found

    def _places(self) -> Iterator[tuple[int, ...]]:
        return product(*(range(k) for k in self.kernel))

    def _outside(self, i: Sequence[int]) -> Iterator[tuple[Range, ...]]:
        """Boxes of entries that are not padding, at which place i of the kernel never lies."""
        inside: list[Range] = []
        sizes = zip(i, self.dilation, self.positions, self.support, strict=True)
        for e, (place, d, positions, (low, high)) in enumerate(sizes):
            first, last = place * d, place * d + positions
            for side in ((low, min(high, first)), (max(low, last), high)):
                if side[0] < side[1]:
                    yield (*inside, side, *self.support[e + 1 :])
            inside.append((max(low, first), min(high, last)))


def _part(x: Tensor, slices: Sequence[slice]) -> Tensor:
    """The slices of the last dimensions."""
    index: tuple[Any, ...] = (..., *slices)
    return x[index]


def _volume(box: Sequence[Range]) -> int:
    return math.prod(max(high - low, 0) for low, high in box)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
