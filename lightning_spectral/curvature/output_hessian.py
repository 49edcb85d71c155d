"""Square roots of the Hessian of known losses in the network's output: columns S with S S^T = d2L / dz2.

Shapes: N rows (samples, tokens, pixels), C classes. Rows do not interact in any of these losses, so a column may seed
all rows at once as long as rows of one sample are told apart afterwards, by position or by random signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral.curvature.forward_recorder import LossCall, Recorder
from lightning_spectral.curvature.layer_taps import REMEDY
from lightning_spectral.errors import MeasurementError


@dataclass(frozen=True, eq=False)
class OutputHessian:
    """The Hessian of one loss call in its input z, block by block.

    Attributes:
        output: z, with its graph.
        curvature: softmax: (N,) factors a of the blocks a (diag(p) - p p^T). Elementwise: z's second derivatives.
        probabilities: softmax: (N, C) p. Elementwise: None.
        samples: B; the rows of z are sample by sample.
    """

    output: Tensor
    curvature: Tensor
    probabilities: Tensor | None
    samples: int

    @property
    def columns(self) -> int:
        """Number of columns that hold the Hessian exactly."""
        per_sample = self.curvature.numel() // self.samples
        return per_sample * (1 if self.probabilities is None else self.probabilities.shape[1] - 1)

    def exact(self) -> Iterator[Tensor]:
        """Yield the columns, each in z's shape, with S S^T equal to the Hessian within every sample."""
        per_sample = self.curvature.numel() // self.samples
        for position in range(per_sample):
            at = torch.zeros(per_sample, dtype=self.curvature.dtype, device=self.curvature.device)
            at[position] = 1
            scale = (self.curvature.reshape(self.samples, -1) * at).reshape(self.curvature.shape).sqrt()
            if self.probabilities is None:
                yield scale
            else:
                for c in range(self.probabilities.shape[1] - 1):
                    yield self._as_output(scale[:, None] * _softmax_column(self.probabilities, c))

    def random(self, generator: torch.Generator) -> Tensor:
        """Return one random column r in z's shape, with E[r r^T] equal to the Hessian."""
        shape = self.curvature.shape if self.probabilities is None else self.probabilities.shape
        signs = torch.randint(0, 2, shape, generator=generator).to(self.curvature) * 2 - 1
        if self.probabilities is None:
            return self.curvature.sqrt() * signs
        q_nc = self.probabilities.sqrt()
        column = q_nc * (signs - q_nc * (q_nc * signs).sum(1, keepdim=True))
        return self._as_output(self.curvature.sqrt()[:, None] * column)

    def _as_output(self, rows_nc: Tensor) -> Tensor:
        """Return (N, C) in z's shape, whose class dimension is the second, or the only one."""
        z = self.output
        if z.ndim < 3:
            return rows_nc.reshape(z.shape)
        return rows_nc.reshape(z.shape[0], *z.shape[2:], z.shape[1]).movedim(-1, 1)


def output_hessian(call: LossCall, weight: Tensor, samples: int) -> OutputHessian:
    """Return the Hessian of ``weight * loss`` in the input of a loss call.

    Args:
        call: what was called.
        weight: dL / d(loss), in the shape of the call's output.
        samples: B, which the leading dimension of the input is a multiple of.

    Raises:
        MeasurementError: if the target has a gradient of its own, or a weight is negative.
    """
    _check(call, samples)
    name, z = call.function.__name__, call.input.detach()
    softmax = call.function is F.cross_entropy
    scale, p = _cross_entropy(call, z) if softmax else (_elementwise(call, z), None)
    # A mean or a sum has one weight for all rows; a loss without reduction one for each.
    curvature = scale * (weight.flatten() if softmax and weight.ndim else weight)
    if bool((curvature < 0).any()):
        raise MeasurementError(
            f"{name} enters the loss with a negative weight, where Gauss-Newton has no square root; {REMEDY}"
        )
    return OutputHessian(call.input, curvature, p, samples)


def columns_of(call: LossCall, samples: int) -> int:
    """Return `OutputHessian.columns` of a loss call, from its shapes alone.

    Raises:
        MeasurementError: if the target has a gradient of its own, or rows are no multiple of the samples.
    """
    _check(call, samples)
    z = call.input
    if call.function is not F.cross_entropy:
        return z.numel() // samples
    classes = z.shape[0] if z.ndim == 1 else z.shape[1]
    return z.numel() // classes // samples * (classes - 1)


def _check(call: LossCall, samples: int) -> None:
    name = call.function.__name__
    if call.target.requires_grad:
        raise MeasurementError(f"the target of {name} depends on the parameters; {REMEDY}")
    if call.input.shape[0] % samples:
        raise MeasurementError(
            f"the input of {name} has {call.input.shape[0]} rows, no multiple of the {samples} samples; {REMEDY}"
        )


@dataclass(frozen=True)
class LossValue:
    """A loss at one call.

    Attributes:
        value: of the loss.
        dtype: of the loss.
        casts: narrower types that the network goes down to by itself.
        normalizer: what its one call of a known loss divides by; None where that is not known.
    """

    value: float
    dtype: torch.dtype
    casts: set[torch.dtype]
    normalizer: float | None


def loss_value(evaluate: Callable[[], Tensor]) -> LossValue:
    """Return the value of a loss, and what can be seen of how it came about."""
    with Recorder(set()) as recorder:
        loss = evaluate().detach()
    calls = recorder.trace.losses
    normalizer = None
    if len(calls) == 1 and _reduction(calls[0]) == "mean":
        z = calls[0].input.detach()
        softmax = calls[0].function is F.cross_entropy
        normalizer = float(_cross_entropy_targets(calls[0], z)[1] if softmax else _elementwise_total(calls[0], z))
    return LossValue(float(loss), loss.dtype, recorder.trace.casts, normalizer)


def _softmax_column(p_nc: Tensor, c: int) -> Tensor:
    """Return column c of diag(q) Q, q = sqrt(p), Q an orthonormal basis of what is orthogonal to q.

    diag(p) - p p^T = diag(q) (I - q q^T) diag(q). Q is the Householder reflection that takes q to the last axis.
    """
    q = p_nc.sqrt()
    last = q.shape[1] - 1
    reflected = -q * (q[:, c : c + 1] / (1 + q[:, last:]))
    reflected[:, last] = -q[:, c]
    reflected[:, c] += 1
    return q * reflected


def _reduction(call: LossCall) -> str:
    if call.options.get("size_average") is not None or call.options.get("reduce") is not None:
        raise MeasurementError(f"{call.function.__name__} was called with size_average or reduce; use reduction")
    return str(call.options.get("reduction", "mean"))


def _cross_entropy(call: LossCall, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N,) factors a of the blocks a (diag(p) - p p^T), and (N, C) p."""
    a_n, total = _cross_entropy_targets(call, z)
    z_nc = z[None] if z.ndim == 1 else z.movedim(1, -1).reshape(-1, z.shape[1])
    return (a_n / total if _reduction(call) == "mean" else a_n), z_nc.softmax(1)


def _cross_entropy_targets(call: LossCall, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N,) weights of the targets, and what a mean divides by."""
    classes = z.shape[0] if z.ndim == 1 else z.shape[1]
    smoothing = float(call.options.get("label_smoothing", 0.0))
    weight = call.options.get("weight")
    w_c = torch.ones(classes, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
    if call.target.is_floating_point():
        t = call.target[None] if z.ndim == 1 else call.target.movedim(1, -1).reshape(-1, classes)
        a_n = (t * (1 - smoothing) + smoothing / classes) @ w_c
        total = torch.tensor(float(len(t)))
    else:
        y = call.target.reshape(-1)
        counts = y != call.options.get("ignore_index", -100)
        picked = w_c[y.where(counts, 0)] * counts
        a_n = (1 - smoothing) * picked + smoothing / classes * w_c.sum() * counts
        total = picked.sum()
    return a_n, total


def _elementwise(call: LossCall, z: Tensor) -> Tensor:
    """Return second derivatives in z's shape."""
    if call.target.shape != z.shape:
        raise MeasurementError(f"{call.function.__name__} broadcasts its target {tuple(call.target.shape)}; {REMEDY}")
    if call.function is F.mse_loss:
        second = torch.full_like(z, 2.0)
    else:
        positive, p = call.options.get("pos_weight"), z.sigmoid()
        second = p * (1 - p) * (1 if positive is None else 1 + (positive - 1) * call.target)
    weight = call.options.get("weight")
    if weight is not None:
        second = second * weight
    return second / _elementwise_total(call, z) if _reduction(call) == "mean" else second


def _elementwise_total(call: LossCall, z: Tensor) -> Tensor:
    """Return what a mean divides by: the sum of its weights, of binary cross-entropy the number of elements."""
    weight = call.options.get("weight")
    if weight is not None and call.function is F.mse_loss:
        return weight.expand_as(z).sum()  # type: ignore[no-any-return]
    return torch.tensor(float(math.prod(z.shape)))
