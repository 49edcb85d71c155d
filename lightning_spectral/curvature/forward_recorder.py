"""What a forward pass did with each measured matrix, and which loss it called by what divisor."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_spectral._torch_private import as_non_view, on_saved_tensors_hooks, patched_linear
from lightning_spectral.curvature.activations import cheap_twin
from lightning_spectral.curvature.products import LINEAR, Function, LayerCall, Product, as_product, multiplies_parameter

LOSSES: tuple[Function, ...] = (F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss)

CASTS: tuple[Function, ...] = (
    torch.Tensor.bfloat16, torch.Tensor.float, torch.Tensor.half, torch.Tensor.to, torch.Tensor.type,
    torch.Tensor.type_as,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LossCall:
    """A call of a known loss: ``output = function(input, target, **options)``."""

    function: Function
    input: Tensor
    target: Tensor
    options: dict[str, Any]
    output: Tensor


@dataclass(eq=False)
class Trace:
    """Record of one forward pass.

    Attributes:
        calls: id of a parameter -> the products it took part in.
        products: nodes of the graph that gave the outputs of products with any parameter of the network.
        losses: the calls of known losses that can be differentiated, in order.
        hooked: whether activations were saved through hooks, as checkpointing does, which computes them again later.
        casts: floating types that the network goes down to by itself on the way to the loss.
    """

    calls: dict[int, list[LayerCall]] = field(default_factory=dict)
    products: list[Node] = field(default_factory=list)
    losses: list[LossCall] = field(default_factory=list)
    hooked: bool = False
    casts: set[torch.dtype] = field(default_factory=set)


Move = Callable[[int, LayerCall, int], Tensor | None]
"""Id of a parameter, its call, and the number of that among its calls -> what is added to the output."""


class Recorder(TorchFunctionMode):
    """While active, note products with given parameters and calls of known losses.

    Args:
        cheap: give activations their twins with a cheap second derivative.
    """

    def __init__(self, parameters: set[int], *, move: Move | None = None, cheap: bool = False) -> None:
        super().__init__()
        self.parameters = parameters
        self.move = move
        self.cheap = cheap
        self.trace = Trace()
        self._undo = ExitStack()

    def __enter__(self) -> Recorder:
        self._undo.enter_context(on_saved_tensors_hooks(lambda: setattr(self.trace, "hooked", True)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._undo.close()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self._inside_attention(args[0]):
                return func(*args, **kwargs)
        twin = cheap_twin(func, args, kwargs) if self.cheap else None
        if twin is not None:
            return twin
        output = func(*args, **kwargs)
        product = as_product(func, args, kwargs, self.parameters)
        # Samples of a nested tensor lie in no dimension that a part of it could be moved along.
        if product is not None and not output.is_nested:
            return self._note_product(product, output)
        self._note_other_product(func, args, kwargs, output)
        if func in CASTS and isinstance(output, Tensor) and output.requires_grad and _is_narrower(output, args[0]):
            self.trace.casts.add(output.dtype)
        if func in LOSSES and isinstance(output, Tensor) and output.requires_grad:
            arguments = inspect.signature(func).bind(*args, **kwargs).arguments
            tensors = arguments.pop("input"), arguments.pop("target")
            self.trace.losses.append(LossCall(func, *tensors, arguments, output))
        return output

    def _note_product(self, product: Product, output: Tensor, time_first: int | None = None) -> Tensor:
        # Of a linear layer on tokens torch gives a view, of what nothing else can reach.
        output = as_non_view(output)
        calls = self.trace.calls.setdefault(id(product.parameter), [])
        a = product.input
        of_product = {**vars(product), "input": a.detach()}
        call = LayerCall(**of_product, output=output, attached=a, source=a.grad_fn, time_first=time_first)
        moved = None if self.move is None else self.move(id(product.parameter), call, len(calls))
        output = output if moved is None else output + moved
        # Taken now: after an operation in place, the tensor stands for what that made of it.
        edge = get_gradient_edge(output) if output.requires_grad else None
        if output.grad_fn is not None:
            self.trace.products.append(output.grad_fn)
        calls.append(replace(call, output=output, edge=edge, attached=None))
        return output

    def _note_other_product(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        node = output.grad_fn if isinstance(output, Tensor) else None
        if node is not None and multiplies_parameter(func, args, kwargs):
            self.trace.products.append(node)

    @contextmanager
    def _inside_attention(self, query: Tensor) -> Iterator[None]:
        """See the projections of nn.MultiheadAttention, whose function runs with this mode switched off."""
        samples = query.shape[1] if query.ndim == 3 else 1

        def recorded(linear: Function) -> Function:
            def run(*args: Any, **kwargs: Any) -> Tensor:
                output: Tensor = linear(*args, **kwargs)
                product = as_product(LINEAR, args, kwargs, self.parameters)
                if product is not None:
                    return self._note_product(product, output, samples)
                self._note_other_product(LINEAR, args, kwargs, output)
                return output

            return run

        with patched_linear(recorded):
            yield


def _is_narrower(tensor: Tensor, than: Tensor) -> bool:
    both = tensor.is_floating_point() and than.is_floating_point()
    return both and torch.finfo(tensor.dtype).eps > torch.finfo(than.dtype).eps


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
