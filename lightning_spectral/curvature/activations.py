"""Activations with a cheap second derivative, for Hessian-vector products.

Autograd's own second derivative of GELU is a chain of a dozen elementwise passes, a sixth to half of a product's time.
Here phi' and phi'' are computed once, in the forward pass, and kept: for y = phi(x) and a gradient g of y, the gradient
of x is g phi'(x), whose derivatives along v are v phi'(x) in g and v g phi''(x) in x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def cheap_twin(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what a call returns, with a cheap second derivative; None where that call has no twin."""
    option, choices = _TWINS.get(function, ("", {}))
    if len(args) != 1 or type(args[0]) is not Tensor or not args[0].requires_grad or kwargs.keys() - {option}:
        return None
    derivatives = choices.get(kwargs.get(option, next(iter(choices)))) if choices else None
    if derivatives is None:
        return None
    y: Tensor = _Activation.apply(args[0], derivatives)[0]  # type: ignore[no-untyped-call]
    return y


class _Activation(Function):
    """phi, phi' and phi'' at x; a function of x is the first alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, derivatives: Derivatives) -> tuple[Tensor, Tensor, Tensor]:
        return derivatives(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if g is None:
            return None, None
        x, first, second = ctx.saved_tensors
        # The last pass of a product is differentiated no more.
        back = _Backward.apply(g, x, first, second) if torch.is_grad_enabled() else g * first  # type: ignore[no-untyped-call]
        return back, None


class _Backward(Function):
    """g phi'(x) as a function of g and x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return g * first

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        g, _, first, second = inputs
        ctx.save_for_backward(first, g * second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        first, bend = ctx.saved_tensors
        return v * first, v * bend, None, None


def _gelu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x Phi, Phi + x p and (2 - x^2) p, Phi and p the normal distribution and its density."""
    phi = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5)
    square = x.square()
    p = square.mul(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return x * phi, torch.addcmul(phi, x, p), square.neg_().add_(2).mul_(p)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x s with s = (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    c, square = math.sqrt(8 / math.pi), x.square()
    s = torch.sigmoid(c * x * (1 + 0.044715 * square))
    slope, bend = c * (1 + 3 * 0.044715 * square), c * 6 * 0.044715 * x
    ds = s * (1 - s)
    return x * s, s + x * ds * slope, ds * (2 * slope + x * (bend + (1 - 2 * s) * slope.square()))


def _silu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x s, s the logistic function."""
    s = torch.sigmoid(x)
    ds = s * (1 - s)
    return x * s, s + x * ds, ds * (2 + x * (1 - 2 * s))


# function: its one option, and the values it may have, the default first.
_TWINS: dict[Any, tuple[str, dict[Any, Derivatives]]] = {
    F.gelu: ("approximate", {"none": _gelu, "tanh": _gelu_tanh}),
    F.silu: ("inplace", {False: _silu}),
}
