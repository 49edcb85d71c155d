"""The value of a loss, and by what its one call of a known loss divides: how losses of micro-batches add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral.curvature.forward_recorder import LossCall, Recorder, Trace


@dataclass(frozen=True)
class LossValue:
    """A loss at one call.

    Attributes:
        casts: narrower types that the network goes down to by itself.
        normalizer: what its one call of a known loss divides by; None where that is not known.
    """

    value: float
    dtype: torch.dtype
    casts: set[torch.dtype]
    normalizer: float | None

    @classmethod
    def of(cls, loss: Tensor, trace: Trace) -> LossValue:
        """Return the value of a loss that was computed, and what its record shows of how it came about."""
        calls = trace.losses
        normalizer = None
        if len(calls) == 1 and _is_mean(calls[0]):
            softmax = calls[0].function is F.cross_entropy
            normalizer = float(_target_weight(calls[0]) if softmax else _element_weight(calls[0]))
        return cls(float(loss.detach()), loss.dtype, trace.casts, normalizer)


def loss_value(evaluate: Callable[[], Tensor], again: Callable[[Tensor], bool] = lambda loss: False) -> LossValue:
    """Return the value of a loss, and what can be seen of how it came about."""
    with Recorder(set()) as recorder:
        loss = evaluate()
    if again(loss):
        return loss_value(evaluate, again)
    return LossValue.of(loss, recorder.trace)


def _is_mean(call: LossCall) -> bool:
    old = call.options.get("size_average") is not None or call.options.get("reduce") is not None
    return not old and call.options.get("reduction", "mean") == "mean"


def _target_weight(call: LossCall) -> Tensor:
    """Return what a mean cross-entropy divides by: the weights of the targets that count, of soft ones their number."""
    z, weight = call.input.detach(), call.options.get("weight")
    classes = z.shape[0] if z.ndim == 1 else z.shape[1]
    if call.target.is_floating_point():
        return torch.tensor(call.target.numel() / classes)
    y = call.target.reshape(-1)
    counts = y != call.options.get("ignore_index", -100)
    w_c = torch.ones(classes, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
    return (w_c[y.where(counts, 0)] * counts).sum()  # type: ignore[no-any-return]


def _element_weight(call: LossCall) -> Tensor:
    """Return what a mean divides by: the sum of its weights, of binary cross-entropy the number of elements."""
    weight = call.options.get("weight")
    if weight is not None and call.function is F.mse_loss:
        return weight.expand_as(call.input).sum()  # type: ignore[no-any-return]
    return torch.tensor(float(math.prod(call.input.shape)))
