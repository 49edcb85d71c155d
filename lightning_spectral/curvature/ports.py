"""A matrix at one of its calls: along its directions u_k v_k^T the output z moves by sum_k e_bk u_k (v_k^T a_b).

Shapes: B samples, K directions, e (B, K) amplitudes; z-like tensors in the call's own layout. `move` is linear in e,
and `read` its adjoint: (read(r))_bk = sum over the positions p of sample b of (u_k^T r_bp)(v_k^T a_bp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_spectral.curvature.products import TRANSPOSED, LayerCall
from lightning_spectral.errors import MeasurementError
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.numerics.matmul_precision import accumulation_dtype
from lightning_spectral.numerics.svd import SingularTriplets

REMEDY = "use curvature='exact'"
"""What measures every network in which samples cannot be told apart."""


@dataclass(frozen=True)
class SampleLayout:
    """Places of the samples among the rows of an activation.

    Attributes:
        shape: (before, samples, after): row (i, b, j) of that shape is of sample b.
        index: where they have no such order, (rows,) the sample of each.
    """

    shape: tuple[int, int, int]
    index: Tensor | None = None

    def spread(self, e: Tensor) -> Tensor:
        """Return (rows, K) of amplitudes (B, K)."""
        if self.index is not None:
            return e[self.index.to(e.device)]
        before, samples, after = self.shape
        rows = e[None, :, None].expand(before, samples, after, e.shape[1])
        return rows.reshape(before * samples * after, e.shape[1])

    def collect(self, rows: Tensor) -> Tensor:
        """Return (B, K) sums over the rows of each sample, in `accumulation_dtype`."""
        wide = accumulation_dtype(rows)
        if self.index is not None:
            zeros = torch.zeros(self.shape[1], rows.shape[1], dtype=wide, device=rows.device)
            return zeros.index_add(0, self.index.to(rows.device), rows.to(wide))
        return rows.reshape(*self.shape, rows.shape[1]).sum((0, 2), dtype=wide)

    def take(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Return the rows of samples start to stop, of a layout without an index."""
        return rows.reshape(*self.shape, *rows.shape[1:])[:, start:stop].flatten(0, 2)


def sample_layouts(lead: torch.Size, samples: int, time_first: int | None = None) -> Iterator[SampleLayout]:
    """Yield where the samples may be among rows of this shape, the likeliest first.

    They may be any dimension, alone or times others (tokens, views), and within it run slowest or fastest.
    """
    if not lead.numel() or lead.numel() % samples:
        return
    shapes = [(lead.numel() // samples, samples, 1)] if time_first == samples else []
    fits = [i for i, size in enumerate(lead) if size % samples == 0]
    order = sorted(fits, key=lambda i: (i > 0, lead[i] != samples, i))
    shapes += [(lead[:i].numel(), samples, lead[i:].numel() // samples) for i in order]
    shapes += [(lead[:i].numel() * lead[i] // samples, samples, lead[i + 1 :].numel()) for i in fits]
    for shape in dict.fromkeys(shapes):
        yield SampleLayout(shape)


def joint_layouts(calls: Sequence[LayerCall], samples: int) -> list[list[SampleLayout]]:
    """Return guesses of where the samples are at each of a layer's calls; none where there is none for one."""
    of_calls = [
        [layout for layout in sample_layouts(c.lead, samples, c.time_first) if layout.shape[0] % c.matrices == 0]
        for c in calls
    ]
    n = max(map(len, of_calls)) if all(of_calls) else 0
    return [[of_call[min(i, len(of_call) - 1)] for of_call in of_calls] for i in range(n)]


class CallRows:
    """Inputs, and gradients in the outputs, of all calls of one parameter, by rows.

    Args:
        deltas: of each call, None where the loss does not depend on it.
    """

    def __init__(self, calls: Sequence[LayerCall], deltas: Sequence[Tensor | None], shape: torch.Size) -> None:
        self.calls, self.shape = calls, shape
        self.rows = [call.rows(delta) for call, delta in zip(calls, deltas, strict=True) if delta is not None]

    def layouts(self, samples: int) -> list[list[SampleLayout]]:
        """Return guesses of where the samples are; none where some rows are not known, or not of samples."""
        apart = any(call.is_convolution and call.input.ndim != len(self.shape) for call in self.calls)
        return [] if apart or len(self.rows) < len(self.calls) else joint_layouts(self.calls, samples)

    def gradient(self, layouts: Sequence[SampleLayout], start: int, stop: int) -> Tensor:
        """Return what samples start to stop add to the gradient: sum r a^T over their rows."""
        terms = []
        for call, rows, layout in zip(self.calls, self.rows, layouts, strict=True):
            a, r = (layout.take(side, start, stop) for side in rows)
            terms.append(call.weight_gradient(a, r, self.shape))
        return reduce(torch.add, terms)


class Port:
    """One layer's directions at one of its calls.

    Args:
        attached: keep the graph of the input, which holds the same matrix already.

    Attributes:
        active: directions to move along and to read; None: all.
    """

    def __init__(
        self,
        layer: MatrixLayer,
        call: LayerCall,
        shape: torch.Size,
        triplets: SingularTriplets,
        layout: SampleLayout,
        *,
        attached: bool = False,
    ) -> None:
        self.layer, self.call, self.layout, self.attached = layer, call, layout, attached
        self.active: Tensor | None = None
        self._selected: tuple[Tensor, Tensor] | None = None
        a = call.attached if attached and call.attached is not None else call.input
        self.z_shape, dtype = call.output.shape, call.output.dtype
        self.rows: tuple[int, int] | None = None
        if call.is_convolution:
            self.rows = layer.rows
            self.y = triplets.u.to(dtype)
            self.c = convolved(call, a, layer, shape, triplets.v, groups_of(layer, triplets))
            return
        x, y = _vectors(layer, call, shape, triplets.u, triplets.v)
        self.y = y.to(dtype)
        if y.ndim == 2 and layer.rows is not None and call.block is None:
            self.rows, self.y = layer.rows, self.y[slice(*layer.rows)]
        if call.function is torch.nn.functional.embedding:
            self.c = x.to(dtype)[a]
            if (padding := call.options.get("padding")) is not None:
                self.c = self.c * (a != padding)[..., None]
        else:
            self.c = self._by_matrix(a) @ x.to(a.dtype)
        if call.scale != 1:
            self.c = self.c * call.scale

    def shift(self, e: Tensor) -> Tensor:
        """Return what moves z, with a graph."""
        if self.attached:
            return self.move(e)
        shift: Tensor = _Move.apply(e, self, False)  # type: ignore[no-untyped-call]
        return shift

    def move(self, e: Tensor) -> Tensor:
        """Return sum_k e_bk u_k (v_k^T a_b) in the layout of z, over the active directions."""
        y, c = self._selected or (self.y, self.c)
        spread = self.layout.spread((e if self.active is None else e[:, self.active]).to(c.dtype))
        if self.call.is_convolution:
            moved = _moved_images(y, c.flatten(2), spread.reshape(c.shape[:2]))
            if self.rows is not None:
                moved = _padded(moved, 1, self.rows, self.z_shape[1])
            return moved.reshape(self.z_shape)
        moved = (c * spread.reshape(c.shape)) @ y.mT
        moved = moved.reshape(*self.call.lead, moved.shape[-1])
        if self.rows is not None:
            moved = _padded(moved, moved.ndim - 1, self.rows, self.call.width)
        return self.call.from_rows(moved)

    def read(self, r: Tensor) -> Tensor:
        """Return (B, K) sum_p (u_k^T r_bp)(v_k^T a_bp), zero for directions that are not active."""
        y, c = self._selected or (self.y, self.c)
        if self.call.is_convolution:
            r = r.flatten(2)
            r = r if self.rows is None else r[:, slice(*self.rows)]
            read = self.layout.collect(_read_images(y, c.flatten(2), r))
        else:
            rows = self._by_matrix(self.call.to_rows(r))
            rows = rows if self.rows is None else rows[..., slice(*self.rows)]
            products = (rows @ y) * c
            read = self.layout.collect(products.reshape(products.shape[:-1].numel(), c.shape[-1]))
        if self.active is None:
            return read
        return read.new_zeros(len(read), self.y.shape[-1]).index_copy(1, self.active, read)

    def sides(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return u_k^T r and v_k^T a of each row, (..., K); of a convolution (N, K, P)."""
        if self.call.is_convolution:
            r = r.flatten(2)
            return self.y.mT @ (r if self.rows is None else r[:, slice(*self.rows)]), self.c.flatten(2)
        rows = self._by_matrix(self.call.to_rows(r))
        return (rows if self.rows is None else rows[..., slice(*self.rows)]) @ self.y, self.c

    def _by_matrix(self, rows: Tensor) -> Tensor:
        """Return rows (..., n); (E, rows, n) where each of a stack has vectors of its own."""
        is_stack = self.layer.stack and (self.call.block is None or self.call.block.expert is None)
        return rows.flatten(1, -2) if is_stack and rows.ndim > 3 else rows

    def select(self, active: Tensor | None) -> None:
        """Move along these directions alone, and read them: a product of few is cheaper. None: all."""
        self.active, self._selected = active, None
        if active is not None:
            dim = 1 if self.call.is_convolution else -1
            self._selected = self.y.index_select(-1, active), self.c.index_select(dim, active)


def move_by_sample(
    layer: MatrixLayer, call: LayerCall, shape: torch.Size, u: Tensor, v: Tensor, layout: SampleLayout
) -> Tensor:
    """Return u_b (v_b^T a_b) in the layout of z, each sample with a direction of its own: u (m, B), v (n, B)."""
    a = call.input
    u, v = u.to(call.output), v.to(call.output)
    sample = layout.spread(torch.arange(u.shape[1], device=a.device)[:, None]).squeeze(1)
    if call.is_convolution:
        # Of each image, every group of channels is convolved with the same v.
        images, g, kernel = a.shape[0], layer.groups, shape[2:]
        u = u if layer.rows is None else _padded(u, 0, layer.rows, call.output.shape[1])
        filters = v.T[sample].reshape(images, 1, -1, *kernel).repeat(1, g, *[1] * (1 + len(kernel))).flatten(0, 1)
        if call.function in TRANSPOSED:
            filters = filters.flatten(0, 1).unsqueeze(1)
        options = {**call.options, "groups": images * g}
        c_bgp = call.function(a.flatten(0, 1).unsqueeze(0), filters, None, **options).reshape(images, g, 1, -1)
        moved: Tensor = u.T[sample].reshape(images, g, -1, 1) * c_bgp
        return moved.reshape(call.output.shape)
    x, y = (side.mT for side in _vectors(layer, call, shape, u, v))
    row = torch.arange(len(sample), device=a.device)

    def of_rows(side: Tensor) -> Tensor:
        return side[sample] if side.ndim == 2 else side[row * len(side) // len(row), sample]

    if call.function is torch.nn.functional.embedding:
        c = x[sample, a.flatten()]
        if (padding := call.options.get("padding")) is not None:
            c = c * (a.flatten() != padding)
    else:
        c = (a.reshape(len(sample), -1) * of_rows(x)).sum(1)
    return call.from_rows(((c * call.scale)[:, None] * of_rows(y)).reshape(*call.lead, -1))


class _Move(Function):
    """`Port.move`, whose derivative is `Port.read`, and the other way round: neither saves anything of the graph.

    Hooks on saved tensors, as of checkpointing, thus find what the program itself saves and nothing else.
    """

    # A context set up apart from the forward pass costs three times as much at each call.
    @staticmethod
    def forward(ctx: Any, x: Tensor, port: Port, reads: bool) -> Tensor:
        ctx.port, ctx.reads = port, reads
        return port.read(x) if reads else port.move(x)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None, None]:
        return _Move.apply(x, ctx.port, not ctx.reads), None, None  # type: ignore[no-untyped-call]


def _moved_images(y: Tensor, c: Tensor, e: Tensor) -> Tensor:
    """Return sum_k y_mk e_bk c_bkp, (B, m, P), of y (m, K), c (B, K, P) and e (B, K), by the smaller intermediate."""
    return (y * e[:, None]) @ c if y.shape[0] < c.shape[2] else y @ (c * e[:, :, None])


def _read_images(y: Tensor, c: Tensor, r: Tensor) -> Tensor:
    """Return sum_mp y_mk r_bmp c_bkp, (B, K), of y (m, K), c (B, K, P) and r (B, m, P), by the smaller intermediate."""
    if y.shape[0] < c.shape[2]:
        return (y * (r @ c.mT)).sum(1, dtype=accumulation_dtype(r))
    return ((y.mT @ r) * c).sum(2, dtype=accumulation_dtype(r))


def _vectors(layer: MatrixLayer, call: LayerCall, shape: torch.Size, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (n, K), with which the rows of a are contracted, and y (m, K); of a stack (E, ., K) where they differ.

    With P the parameter's matrix, W = P or P^T as `MatrixLayer.to_matrix` takes it: the direction is p q^T in P's rows
    and columns.
    """
    block = call.block
    if layer.rows is not None:
        whole = shape[-1] if layer.transposed else shape[0]
        u = _padded(u, 0, layer.rows, whole)
    if layer.stack:
        u = u.reshape(shape[0], -1, u.shape[1])
        u = u if block is None or block.expert is None else u[block.expert]
    p, q = (v, u) if layer.transposed else (u, v)
    if block is None:
        return q, p
    p, q = p[..., slice(*block.rows), :], q[..., slice(*block.columns), :]
    return (q, p) if block.transposed else (p, q)


def _padded(tensor: Tensor, dim: int, rows: tuple[int, int], size: int) -> Tensor:
    """Return the tensor with zeros around its rows, ``size`` of them in that dimension."""
    shape = list(tensor.shape)
    before, after = list(shape), list(shape)
    before[dim], after[dim] = rows[0], size - rows[1]
    return torch.cat([tensor.new_zeros(before), tensor, tensor.new_zeros(after)], dim)


def convolved(call: LayerCall, a: Tensor, layer: MatrixLayer, shape: torch.Size, v: Tensor, groups: Tensor) -> Tensor:
    """Return v_k^T a, (images, K, positions...), each with the group of channels in which its u_k lies.

    Args:
        v: (n, K).
        groups: (K,) as `groups_of`.
    """
    kernel, k, g = shape[2:], v.shape[1], layer.groups
    v_ki = v.to(a.dtype).T.reshape(k, -1, *kernel)
    ins = v_ki.shape[1]
    filters = v_ki.new_zeros(k, g, ins, *kernel)
    filters[torch.arange(k, device=v.device), groups] = v_ki
    filters = filters.reshape(k, g * ins, *kernel)
    if call.function in TRANSPOSED:
        filters = filters.transpose(0, 1)
    result: Tensor = call.function(a, filters, None, **{**call.options, "groups": 1})
    return result


def groups_of(layer: MatrixLayer, triplets: SingularTriplets) -> Tensor:
    """Return (K,) the block of rows in which each u_k lies; MeasurementError if one lies in several."""
    u = triplets.u.reshape(layer.groups, -1, len(triplets))
    if layer.groups > 1 and bool(((u != 0).any(1).sum(0) > 1).any()):
        raise MeasurementError(f"{layer.name}: a direction reaches several groups of channels; {REMEDY}")
    return triplets.u.abs().argmax(0) // (layer.shape[0] // layer.groups)
