"""A matrix seen through the output of its layer: along u v^T the output z = W a moves by u (v^T a).

Shapes: B samples, P positions (pixels, tokens), K directions; U (m, K), V (n, K), z-like tensors in the layer's own
layout, which a tap reads as (B, m, P).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_spectral._messages import group_by_reason
from lightning_spectral.curvature.autograd_graph import Dependence
from lightning_spectral.curvature.exact import ExactCurvature
from lightning_spectral.curvature.head import half_of
from lightning_spectral.curvature.ports import REMEDY, convolved
from lightning_spectral.curvature.problem import Curvatures, DifferentiableLoss
from lightning_spectral.curvature.products import TRANSPOSED, LayerCall
from lightning_spectral.errors import MeasurementError
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.numerics.svd import SingularTriplets


class Tap:
    """One layer's view on its activations.

    Args:
        layer: the matrix.
        call: of the layer.
        samples: B.
        shape: of the parameter.
    """

    def __init__(self, layer: MatrixLayer, call: LayerCall, samples: int, shape: torch.Size) -> None:
        self.layer, self.call, self.samples, self.shape = layer, call, samples, shape
        self.channels_last = call.function is F.linear

    @property
    def edge(self) -> GradientEdge:
        """Edge of z in the graph."""
        assert self.call.edge is not None
        return self.call.edge

    @staticmethod
    def fits(call: LayerCall, samples: int) -> bool:
        """Return whether the rows of an activation can be told apart by sample."""
        rows = call.output.shape[:-1].numel() if call.function is F.linear else call.output.shape[0]
        by_sample = call.time_first == samples if call.time_first else call.output.shape[0] % samples == 0
        return call.output.ndim > 1 and rows % samples == 0 and by_sample

    def right(self, v: Tensor, groups: Tensor) -> Tensor:
        """Return v_k^T a, (B, K, P). groups: (K,) the block of rows that each direction lies in."""
        a = self.call.input
        if self.channels_last:
            return v.to(a.dtype).T @ self.by_sample(a)
        return self.by_sample(convolved(self.call, a, self.layer, self.shape, v, groups))

    def left(self, r: Tensor, u: Tensor) -> Tensor:
        """Return u_k^T r, (B, K, P), of a tensor in the layout of z."""
        r_bmp, u = self.rows(r), u.to(r.dtype)
        return (r_bmp.mT @ u).mT if self.channels_last else u.T @ r_bmp

    def moved(self, u: Tensor, c_bkp: Tensor) -> Tensor:
        """Return sum_k u_k c_bk^T for each sample as a tensor in the layout of z, zero outside this layer's rows."""
        z, u = self.call.output, u.to(c_bkp.dtype)
        if self.layer.rows is not None:
            full = u.new_zeros(z.shape[-1 if self.channels_last else 1], u.shape[1])
            full[slice(*self.layer.rows)] = u
            u = full
        if not self.channels_last:
            move_bmp = u @ c_bkp
            images = z.shape[0] // self.samples
            return move_bmp.reshape(*move_bmp.shape[:2], images, -1).transpose(1, 2).reshape(z.shape)
        rows_pb = c_bkp.permute(2, 0, 1) if self.call.time_first else c_bkp.mT
        return (rows_pb @ u.T).reshape(z.shape)

    def moved_by_sample(self, u_bm: Tensor, v_bn: Tensor) -> Tensor:
        """Return u_b (v_b^T a_b), each sample with a direction of its own, as a tensor in the layout of z."""
        a, z = self.call.input, self.call.output
        u, v = self._whole_rows(u_bm.to(a)), v_bn.to(a)
        if self.channels_last:
            c_bp = (v[:, None] @ self.by_sample(a)).squeeze(1)
            move_bmp = u[:, :, None] * c_bp[:, None]
            return (move_bmp.permute(2, 0, 1) if self.call.time_first else move_bmp.mT).reshape(z.shape)
        # A sample may be several images; of each image, every group of channels is convolved with the same v.
        images, g, kernel = a.shape[0], self.layer.groups, self.shape[2:]
        u, v = (x.repeat_interleave(images // self.samples, 0) for x in (u, v))
        filters = v.reshape(images, 1, -1, *kernel).repeat(1, g, *[1] * (1 + len(kernel))).flatten(0, 1)
        if self.call.function in TRANSPOSED:
            filters = filters.flatten(0, 1).unsqueeze(1)
        options = {**self.call.options, "groups": images * g}
        c_bgp = self.call.function(a.flatten(0, 1).unsqueeze(0), filters, None, **options).reshape(images, g, 1, -1)
        return (u.reshape(images, g, -1, 1) * c_bgp).reshape(z.shape)  # type: ignore[no-any-return]

    def _whole_rows(self, u_bm: Tensor) -> Tensor:
        if self.layer.rows is None:
            return u_bm
        full = u_bm.new_zeros(len(u_bm), self.call.output.shape[-1 if self.channels_last else 1])
        full[:, slice(*self.layer.rows)] = u_bm
        return full

    def by_sample(self, x: Tensor) -> Tensor:
        """Return (B, channels, P)."""
        if not self.channels_last:
            # A sample may be several images: their pixels are its positions.
            return x.reshape(self.samples, -1, x.shape[1], x.shape[2:].numel()).transpose(1, 2).flatten(2)
        if self.call.time_first:
            return x.reshape(-1, self.samples, x.shape[-1]).permute(1, 2, 0)
        return x.reshape(self.samples, -1, x.shape[-1]).transpose(1, 2)

    def rows(self, r: Tensor) -> Tensor:
        """Return (B, m, P), those channels of a tensor in the layout of z that are this layer's."""
        r_bmp = self.by_sample(r)
        return r_bmp if self.layer.rows is None else r_bmp[:, slice(*self.layer.rows)]


def single_calls(problem: DifferentiableLoss, names: Iterable[str]) -> tuple[dict[str, LayerCall], dict[str, str]]:
    """Return the one product that each of these layers took part in, and why others have none or several."""
    root = problem.value.grad_fn
    assert root is not None
    counts = Dependence(root, {id(leaf) for leaf in problem.parameters.values()}).calls
    found, rest = {}, {}
    for name in names:
        leaf = problem.parameters[name]
        calls = [call for call in problem.trace.calls.get(id(leaf), []) if call.edge is not None]
        if len(calls) == 1 and counts[id(leaf)] == 1 and calls[0].is_whole:
            found[name] = calls[0]
        else:
            times = max(len(calls), counts[id(leaf)])
            rest[name] = f"it is used {times} times" if times > 1 else "it is not applied by linear or a convolution"
    return found, rest


def tapped(problem: DifferentiableLoss, names: Iterable[str]) -> tuple[dict[str, Tap], dict[str, str]]:
    """Return layers that can be seen through their output, and why the others cannot."""
    calls, rest = single_calls(problem, names)
    taps = {}
    for name, call in calls.items():
        if problem.samples is None or not Tap.fits(call, problem.samples):
            rest[name] = "the rows of its output cannot be told apart by sample"
        else:
            taps[name] = Tap(problem.layers[name], call, problem.samples, problem.parameters[name].shape)
    return taps, rest


def measured_exactly(
    problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets], why: Mapping[str, str]
) -> Curvatures:
    """Measure the layers in ``why`` by double backward, on a forward pass whose gradients keep their graph."""
    if not why:
        return Curvatures({}, "exact")
    layers = {name: problem.layers[name] for name in why}
    parameters = {name: problem.parameters[name] for name in why}
    exact = ExactCurvature()(
        DifferentiableLoss(problem.evaluate, layers, parameters, problem.samples),
        {name: directions[name] for name in why},
    )
    singly = {
        name: f"measured by double backward, since {reason}" for name, reason in why.items() if name not in exact.failed
    }
    notes = tuple(group_by_reason(singly))
    return Curvatures(exact.h, "exact", exact.failed, {}, dict.fromkeys(why, "exact"), notes)


def check_samples_apart(taps: Mapping[str, Tap], change: Mapping[str, Tensor | None]) -> None:
    """Raise MeasurementError unless what was done to `half_of` the samples shows at none of the others."""
    for name, moved in change.items():
        tap = taps[name]
        if moved is not None and bool(tap.by_sample(moved)[~half_of(tap.samples).to(moved.device)].any()):
            raise MeasurementError(
                f"samples depend on each other behind {name} (BatchNorm in train mode, a loss across the batch, or a "
                f"batch whose samples do not come first); {REMEDY}"
            )
