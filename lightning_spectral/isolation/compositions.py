"""Torch's operations whose higher derivatives are wrong without an error, composed of others whose are right.

Of layer norm, batch norm by the statistics of the batch and instance norm the third derivative is wrong, and the second
of one in forward mode: mean and variance are taken for constants. A loss that holds gradients of its own needs it for a
Hessian. Of weight norm, and of a linear cross-entropy in chunks, the second derivative is.

Recurrent layers are written out, one step after the other: torch's own hide what their matrices are multiplied with. A
product with `weight_ih` takes all steps at once; one with `weight_hh`, and with `weight_hr`, is a step's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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


def _norm_of_statistics(fused: Callable[..., Tensor], flag: str, samples: Sequence[int]) -> Callable[..., Tensor]:
    """Return what a norm does, and updates the running statistics as it does.

    Args:
        fused: function of torch.
        flag: its argument that says whether the statistics are those of the input.
        samples: dimensions that they are taken over, beside those behind the channels.
    """
    signature = inspect.signature(fused)

    @functools.wraps(fused)
    def norm(*args: Any, **kwargs: Any) -> Tensor:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        with torch.set_grad_enabled(torch.is_grad_enabled() and not given[flag]):
            y = fused(*args, **kwargs)
        if not given[flag]:
            return y
        x, shape = given["input"], (-1, *[1] * (given["input"].ndim - 2))
        weight, bias = (None if given[name] is None else given[name].view(shape) for name in ("weight", "bias"))
        return _affine(_standardized(x, (*samples, *range(2, x.ndim)), given["eps"]), weight, bias).to(x.dtype)

    return norm


batch_norm = _norm_of_statistics(F.batch_norm, "training", (0,))
instance_norm = _norm_of_statistics(F.instance_norm, "use_input_stats", ())


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


State = tuple[Tensor, ...]
"""Hidden state, and the cell of an LSTM."""

Weights = Sequence[Any]
"""Tensors: of the input and the state, their biases or None, and with proj_size that of the output."""

Cell = Callable[[Tensor, State, Weights], State]
"""What a step makes of its part of the input's product, the state and the weights."""

NAMED = (
    *("input", "data", "batch_sizes", "hx", "params", "has_biases"),
    *("num_layers", "dropout", "train", "bidirectional", "batch_first"),
)
"""Names of the arguments of `torch.lstm` and the like, in their order."""

NAMED_OF_CELLS = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


def _plain(activation: Callable[[Tensor], Tensor], from_input: Tensor, state: State, weights: Weights) -> State:
    return (activation(from_input + _from_state(state[0], weights)),)


def _gru(from_input: Tensor, state: State, weights: Weights) -> State:
    h = state[0]
    reset_in, update_in, new_in = from_input.chunk(3, -1)
    reset_h, update_h, new_h = _from_state(h, weights).chunk(3, -1)
    update = torch.sigmoid(update_in + update_h)
    new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_h) * new_h)
    return (new + update * (h - new),)


def _lstm(from_input: Tensor, state: State, weights: Weights) -> State:
    h, c = state
    i, f, g, o = (from_input + _from_state(h, weights)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    # With proj_size the last of the weights makes a smaller h.
    return (F.linear(h, weights[-1]) if len(weights) in (3, 5) else h), c


def _from_state(h: Tensor, weights: Weights) -> Tensor:
    return F.linear(h, weights[1], weights[3] if len(weights) > 3 else None)


def _from_input(x: Tensor, weights: Weights) -> Tensor:
    return F.linear(x, weights[0], weights[2] if len(weights) > 3 else None)


def _written_out(cell: Cell) -> Callable[..., Any]:
    """Return what takes the place of `torch.lstm` and the like."""

    def run(*positional: Any, **named: Any) -> Any:
        x, *args = *positional, *(named[name] for name in NAMED if name in named)
        sizes, batch_first = None, False
        # Of a packed sequence the second argument is how many samples each step has.
        if isinstance(args[0], Tensor) and not args[0].is_floating_point():
            sizes, (hx, weights, _, n_layers, dropout, training, bidirectional) = args[0].tolist(), args[1:]
        else:
            hx, weights, _, n_layers, dropout, training, bidirectional, batch_first = args
        states: State = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        x_tbn, directions = x.transpose(0, 1) if batch_first else x, 2 if bidirectional else 1
        size = len(weights) // (n_layers * directions)
        last: list[State] = []
        for layer in range(n_layers):
            outputs = []
            for backward in range(directions):
                number = layer * directions + backward
                own = weights[number * size : (number + 1) * size]
                output, state = _run(cell, x_tbn, tuple(s[number] for s in states), own, sizes, bool(backward))
                outputs.append(output)
                last.append(state)
            x_tbn = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if dropout and training and layer < n_layers - 1:
                x_tbn = F.dropout(x_tbn, dropout)
        ends = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return x_tbn.transpose(0, 1) if batch_first else x_tbn, *ends

    return run


def _run(
    cell: Cell, x: Tensor, first: State, weights: Weights, sizes: list[int] | None, backward: bool
) -> tuple[Tensor, State]:
    """Return the hidden states of all steps, and each sample's last state, of one layer in one direction.

    With sizes, those of the steps, step t has the first sizes[t] samples.
    """
    product = _from_input(x, weights)
    steps = list(product.unbind(0) if sizes is None else torch.split(product, sizes))
    outputs: list[Tensor] = []
    ended: list[State] = []
    state = tuple(s[:0] for s in first) if backward else first
    for from_input in reversed(steps) if backward else steps:
        n, before = len(from_input), len(state[0])
        if n > before:
            state = tuple(torch.cat([s, start[before:n]]) for s, start in zip(state, first, strict=True))
        elif n < before:
            ended.insert(0, tuple(s[n:] for s in state))
            state = tuple(s[:n] for s in state)
        state = cell(from_input, state, weights)
        outputs.append(state[0])
    last = tuple(torch.cat(parts) for parts in zip(state, *ended, strict=True)) if ended else state
    return (torch.stack if sizes is None else torch.cat)(outputs[::-1] if backward else outputs), last


def _one_step(cell: Cell) -> Callable[..., Any]:
    """Return what takes the place of `torch.lstm_cell` and the like."""

    def run(*positional: Any, **named: Any) -> Any:
        call = [*positional, *(named.get(name) for name in NAMED_OF_CELLS[len(positional) :])]
        x, hx, weights = call[0], call[1], call[2:]
        states: State = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        state = cell(_from_input(x, weights), states, weights)
        return state if len(state) > 1 else state[0]

    return run


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_plain, torch.tanh),
    "rnn_relu": partial(_plain, torch.relu),
}


def _pairs() -> Iterator[tuple[Any, Callable[..., Any]]]:
    for name, cell in _CELLS.items():
        for fused, replacement in ((getattr(torch, name), _written_out), (getattr(torch, f"{name}_cell"), _one_step)):
            yield fused, replacement(cell)


WRITTEN_OUT: dict[Any, Callable[..., Any]] = dict(_pairs())
"""Function of torch -> what takes its place in every measurement."""
