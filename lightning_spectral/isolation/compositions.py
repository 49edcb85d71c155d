"""Torch's operations whose higher derivatives are wrong without an error, composed of others whose are right.

Of layer norm, batch norm by the statistics of the batch and instance norm the third derivative is wrong, and the second
of one in forward mode: mean and variance are taken for constants. A loss that holds gradients of its own needs it for a
Hessian. Of weight norm, and of a linear cross-entropy in chunks, the second derivative is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral._autograd import operation, reachable
from lightning_spectral._torch_private import WEIGHT_NORM, trained_on_batch_statistics

BATCH_NORM = "batch_norm"

WRONG_TWICE = {
    "NativeLayerNormBackward": "layer_norm",
    **dict.fromkeys(("NativeBatchNormBackward", "CudnnBatchNormBackward", "MiopenBatchNormBackward"), BATCH_NORM),
    "WeightNormInterface": "weight_norm",
}
"""Nodes of the graph that cannot be differentiated twice -> the function of torch that they are of."""


def wrong_twice(outputs: Iterable[Tensor]) -> list[str]:
    """Return the functions in the graph of some tensors whose derivatives there are wrong from the second on."""
    nodes = reachable([output.grad_fn for output in outputs])
    found = [(node, WRONG_TWICE.get(operation(node))) for node in nodes]
    return sorted({name for node, name in found if name and (name != BATCH_NORM or trained_on_batch_statistics(node))})


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Return what `torch.nn.functional.layer_norm` does."""
    y = _affine(_standardized(input, range(-len(normalized_shape), 0), eps), weight, bias)
    # Autocast gives it in float32.
    return y if torch.is_autocast_enabled(input.device.type) else y.to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return what `torch.nn.functional.batch_norm` does, and update the running statistics as it does."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not training):
        fused = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _by_channel(input, (0, *range(2, input.ndim)), weight, bias, eps) if training else fused


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return what `torch.nn.functional.instance_norm` does, and update the running statistics as it does."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not use_input_stats):
        fused = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _by_channel(input, range(2, input.ndim), weight, bias, eps) if use_input_stats else fused


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return v scaled to the norms g, over all dimensions but one, as `torch.nn.utils.weight_norm` does."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Return what `torch.nn.functional.linear_cross_entropy` does, without chunks."""
    settings: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    if linear_weight.ndim > 2:
        settings |= {"linear_bias": linear_bias, "ignore_index": ignore_index}
        return LINEAR_CROSS_ENTROPY(input, linear_weight, target, **settings)  # type: ignore[no-any-return]
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(logits, target, ignore_index=-100 if ignore_index is None else ignore_index, **settings)


def _standardized(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    # Squares of float16 overflow; the fused norms take their statistics in float32, too.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = x - x.mean(tuple(dims), keepdim=True)
    return centered * (centered.square().mean(tuple(dims), keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, dims: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return x normalized over some dimensions, with a weight and a bias for each channel."""
    shape = (-1, *[1] * (x.ndim - 2))
    of_channels = (None if value is None else value.view(shape) for value in (weight, bias))
    return _affine(_standardized(x, dims, eps), *of_channels).to(x.dtype)


LINEAR_CROSS_ENTROPY: Any = getattr(F, "linear_cross_entropy", None)
"""It came with torch 2.13."""

RIGHT_SECOND: dict[Any, Callable[..., Tensor]] = {
    WEIGHT_NORM: weight_norm,
    **({} if LINEAR_CROSS_ENTROPY is None else {LINEAR_CROSS_ENTROPY: linear_cross_entropy}),
}
"""Function of torch -> what takes its place in every measurement."""

RIGHT_THIRD: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}
"""Function of torch -> what takes its place where the loss holds gradients of its own."""


def takes_statistics(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of a function of ``RIGHT_THIRD`` normalizes by the statistics of its input."""
    call = inspect.signature(RIGHT_THIRD[func]).bind(*args, **kwargs)
    call.apply_defaults()
    return bool(call.arguments.get("training", call.arguments.get("use_input_stats", True)))
