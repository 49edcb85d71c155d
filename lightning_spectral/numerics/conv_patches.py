"""Unfolded input of a convolution, and the second moment of that without unfolding.

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

UNFOLDED_ENTRIES = 2**21
"""Entries of patches, or of the input, that are worked on at a time."""

WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}

Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Patches:
    """Unfolded input of one convolution.

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
        """Return the patches of an input (B, C, *S), with the options of ``F.conv2d`` or ``F.conv_transpose2d``."""
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
        """Reach of a patch, d (k - 1)."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def positions(self) -> tuple[int, ...]:
        """Output positions per dimension."""
        sizes = zip(self.x.shape[2:], self.reach, self.stride, strict=True)
        return tuple((size - reach - 1) // s + 1 for size, reach, s in sizes)

    @property
    def rows(self) -> int:
        """Number of patches, B P."""
        return int(self.x.shape[0]) * math.prod(self.positions)

    @property
    def length(self) -> int:
        """Length of a patch, n."""
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

    def correlates(self) -> bool:
        """Return whether `correlation` takes fewer products than the patches do."""
        if any(s != 1 for s in self.stride):
            return False
        products = sum(_volume(term.box) * math.prod(term.places) for term in self._terms())
        return products < math.prod(self.kernel) ** 2 * math.prod(self.positions)

    def correlation(self) -> Tensor:
        """Return the sum over samples and positions of a a^T, (g, n, n) in float64, for stride 1."""
        b = max(1, UNFOLDED_ENTRIES // max(1, self.x[0].numel()))
        first, *rest = torch.split(self.x, b)
        # Within a part rounding is that of one convolution; parts are summed in float64 where the device has it.
        gram = self._correlation(first).to(torch.float32 if self.x.device.type == "mps" else torch.float64)
        for x in rest:
            gram += self._correlation(x)
        return gram

    def _correlation(self, x: Tensor) -> Tensor:
        """Return the correlation of some samples. Pairs i, j with i_0 > j_0 are the others transposed."""
        g, c = self.groups, self.x.shape[1] // self.groups
        dims, places = len(self.kernel), math.prod(self.kernel)
        wide = F.pad(x, [side for reach in reversed(self.reach) for side in (reach, reach)])
        gram = x.new_zeros(g, c, *self.kernel, c, *self.kernel)
        for term in self._terms():
            products = self._products(wide, x, term)
            products = products.reshape(g, c, *products.shape[1:])
            for i in product(*(range(k) if at is None else (at,) for at, k in zip(term.at, self.kernel, strict=True))):
                row: tuple[Any, ...] = (slice(None), slice(None), *i, slice(None), slice(i[0], None))
                gram[row].add_(_part(products, self._shifts(term, i)), alpha=term.sign)
        gram = gram.flatten(2 + dims).flatten(1, 1 + dims)
        first = torch.arange(places, device=x.device) // (places // self.kernel[0])
        gram += gram.mT * (first[:, None] > first).repeat(c, c)
        return gram.reshape(g, c, places, c, places).flip(2, 4).reshape(gram.shape) if self.flipped else gram

    def _terms(self) -> Iterator[_Term]:
        """Return correlations over boxes of x, whose sum is that over the output positions.

        A place i lies at q for some output position where q is inside in each dimension; the product over dimensions of
        1 - outside is multiplied out. Outside depends on i in one dimension alone, so one correlation serves others.
        """
        for chosen in product((False, True), repeat=len(self.kernel)):
            places = (range(k) if c else (None,) for c, k in zip(chosen, self.kernel, strict=True))
            for at in product(*places):
                sides = [self._outside(e, i) if i is not None else [self.support[e]] for e, i in enumerate(at)]
                for box in product(*sides):
                    before = [r if i is None else i * d for i, r, d in zip(at, self.reach, self.dilation, strict=True)]
                    spans = [2 * k - 1 if i is None else k for i, k in zip(at, self.kernel, strict=True)]
                    before[0], spans[0] = 0, self.kernel[0] - (at[0] or 0)
                    yield _Term(-1 if sum(chosen) % 2 else 1, at, box, tuple(before), tuple(spans))

    def _shifts(self, term: _Term, i: Sequence[int]) -> list[slice]:
        """Return the places of a term that are the j of a pair i, j."""
        shifts = [slice(None) if at is not None else slice(k - 1 - place, 2 * k - 1 - place)
                  for at, place, k in zip(term.at, i, self.kernel, strict=True)]  # fmt: skip
        return [slice(self.kernel[0] - i[0]), *shifts[1:]]

    def _products(self, wide: Tensor, x: Tensor, term: _Term) -> Tensor:
        """Return (C, C / g, *places) of the sum over samples and q in the box of x[c, q] x[c', q - before + d t]."""
        small = _part(x, [slice(*sides) for sides in term.box])
        starts = [low - back + reach for (low, _), back, reach in zip(term.box, term.before, self.reach, strict=True)]
        ends = [
            start + high - low + d * (t - 1)
            for start, (low, high), d, t in zip(starts, term.box, self.dilation, term.places, strict=True)
        ]
        large = _part(wide, [slice(*sides) for sides in zip(starts, ends, strict=True)])
        shape = (x.shape[1], x.shape[1] // self.groups, *term.places)
        weight_gradient = WEIGHT_GRADIENTS[len(term.box)]
        found: Tensor = weight_gradient(  # type: ignore[no-untyped-call]
            large, shape, small, dilation=self.dilation, groups=self.groups
        )
        return found

    def _outside(self, dim: int, place: int) -> list[Range]:
        """Return where in one dimension the entries are that are not padding, and on which this place never lies."""
        first, (low, high) = place * self.dilation[dim], self.support[dim]
        sides = (low, min(high, first)), (max(low, first + self.positions[dim]), high)
        return [side for side in sides if side[0] < side[1]]


@dataclass(frozen=True)
class _Term:
    """One correlation: its sign; the place of i in those dimensions where it is for that alone; the entries x[c, q].

    ``places`` tells how many t there are per dimension of x[c', q - before + d t].
    """

    sign: int
    at: tuple[int | None, ...]
    box: tuple[Range, ...]
    before: tuple[int, ...]
    places: tuple[int, ...]


def convolution_gradient(
    x: Tensor, r: Tensor, shape: torch.Size, options: Mapping[str, Any], *, transposed: bool
) -> Tensor:
    """Return the gradient in a convolution's weight, of this shape, of inputs x and gradients r in its output."""
    # A transposed convolution is the adjoint of the convolution with the same weight.
    large, small, padding = r, x, options.get("padding", 0)
    if not transposed:
        large, small, padding = Patches.of(x, shape[2:], options, groups=1, transposed=False).x, r, 0
    stride, dilation, groups = (options.get(name, 1) for name in ("stride", "dilation", "groups"))
    weight_gradient = WEIGHT_GRADIENTS[len(shape) - 2]
    found: Tensor = weight_gradient(large, shape, small, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]
    return found


def _part(x: Tensor, slices: Sequence[slice]) -> Tensor:
    index: tuple[Any, ...] = (..., *slices)
    return x[index]


def _volume(box: Sequence[Range]) -> int:
    return math.prod(max(high - low, 0) for low, high in box)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
