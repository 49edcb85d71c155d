"""What a forward pass did with each measured matrix, and which loss it called: seen without touching user code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_spectral._torch_private import as_non_view, on_saved_tensors_hooks, patched_linear
from lightning_spectral.curvature.activations import cheap_twin

Function = Callable[..., Any]

CONVOLUTIONS: tuple[Function, ...] = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED: tuple[Function, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
LOSSES: tuple[Function, ...] = (F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss)

CASTS: tuple[Function, ...] = (
    torch.Tensor.bfloat16, torch.Tensor.float, torch.Tensor.half, torch.Tensor.to, torch.Tensor.type,
    torch.Tensor.type_as,
)  # fmt: skip

ARGUMENTS: dict[Function, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys(CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    **dict.fromkeys(
        TRANSPOSED, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    ),
}


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One product of a parameter with an activation: z = W a.

    Attributes:
        function: F.linear or a convolution.
        input: a, detached.
        output: z, for its shape: what comes after may have written over its entries.
        edge: z in the graph, to differentiate in; None where it has none.
        options: stride, padding and the like of a convolution.
        time_first: how many samples there are where rows run over time first, as inside `nn.MultiheadAttention`;
            None where they run over samples first.
        zero: the leaf of zeros that was added to z; None where none was.
    """

    function: Function
    input: Tensor
    output: Tensor
    edge: GradientEdge | None
    options: Mapping[str, Any]
    time_first: int | None = None
    zero: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LossCall:
    """A call of a known loss: ``output = function(input, target, **options)``."""

    function: Function
    input: Tensor
    target: Tensor
    options: Mapping[str, Any]
    output: Tensor


@dataclass(eq=False)
class Trace:
    """Record of one forward pass.

    Attributes:
        calls: id of a parameter -> the products it took part in.
        losses: the calls of known losses that can be differentiated, in order.
        hooked: whether activations were saved through hooks, as checkpointing does, which computes them again later.
        casts: floating types that the network goes down to by itself on the way to the loss.
    """

    calls: dict[int, list[LayerCall]] = field(default_factory=dict)
    losses: list[LossCall] = field(default_factory=list)
    hooked: bool = False
    casts: set[torch.dtype] = field(default_factory=set)


class Recorder(TorchFunctionMode):
    """While active, note products with given parameters and calls of known losses.

    Args:
        parameters: ids of the parameters in question.
        add_zeros: add a leaf of zeros to the output of each product, to differentiate in.
        cheap: give activations their twins with a cheap second derivative.
    """

    def __init__(self, parameters: set[int], *, add_zeros: bool = False, cheap: bool = False) -> None:
        super().__init__()
        self.parameters = parameters
        self.add_zeros = add_zeros
        self.cheap = cheap
        self.trace = Trace()
        self._undo = ExitStack()

    def __enter__(self) -> Recorder:
        """Start to note."""
        self._undo.enter_context(on_saved_tensors_hooks(self._note_hooks))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._undo.close()

    def _note_hooks(self) -> None:
        self.trace.hooked = True

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function; note what it did."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self._inside_attention(args[0]):
                return func(*args, **kwargs)
        twin = cheap_twin(func, args, kwargs) if self.cheap else None
        if twin is not None:
            return twin
        output = func(*args, **kwargs)
        if func in ARGUMENTS:
            return self._product(func, args, kwargs, output)
        if func in CASTS and isinstance(output, Tensor) and output.requires_grad and _is_narrower(output, args[0]):
            self.trace.casts.add(output.dtype)
        if func in LOSSES and isinstance(output, Tensor) and output.requires_grad:
            arguments = inspect.signature(func).bind(*args, **kwargs).arguments
            tensors = arguments.pop("input"), arguments.pop("target")
            self.trace.losses.append(LossCall(func, *tensors, arguments, output))
        return output

    def _product(
        self, func: Function, args: Any, kwargs: dict[str, Any], output: Tensor, time_first: int | None = None
    ) -> Tensor:
        options = dict(zip(ARGUMENTS[func], args, strict=False)) | kwargs
        weight = options.pop("weight", None)
        if id(weight) not in self.parameters:
            return output
        a = options.pop("input").detach()
        options.pop("bias", None)
        # Of a linear layer on tokens torch gives a view, of what nothing else can reach.
        output = as_non_view(output)
        zero = torch.zeros_like(output, requires_grad=True) if self.add_zeros else None
        output = output if zero is None else output + zero
        # Taken now: after an operation in place, the tensor stands for what that made of it.
        edge = get_gradient_edge(output) if output.requires_grad else None
        self.trace.calls.setdefault(id(weight), []).append(LayerCall(func, a, output, edge, options, time_first, zero))
        return output

    @contextmanager
    def _inside_attention(self, query: Tensor) -> Iterator[None]:
        """See the projections of nn.MultiheadAttention, whose function runs with this mode switched off."""
        samples = query.shape[1] if query.ndim == 3 else 1

        def recorded(linear: Function) -> Function:
            return lambda *args, **kwargs: self._product(linear, args, kwargs, linear(*args, **kwargs), samples)

        with patched_linear(recorded):
            yield


def _is_narrower(tensor: Tensor, than: Tensor) -> bool:
    both = tensor.is_floating_point() and than.is_floating_point()
    return both and torch.finfo(tensor.dtype).eps > torch.finfo(than.dtype).eps
