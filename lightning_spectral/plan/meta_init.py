"""Models made without their weights.

A factory runs with real tensors, whose parameters go to the meta device as modules take them in, so that what it
computes of sizes and rates (`torch.linspace(...).tolist()`) has values.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from lightning_spectral._torch_private import is_fake
from lightning_spectral.isolation.held_state import UNINITIALIZED

LARGE_BUFFER = 2**16
"""Entries from which on a buffer goes to the meta device, too: an attention mask, whose values no factory reads."""

MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


@contextmanager
def weightless() -> Iterator[None]:
    """Have modules hold their parameters and large buffers on the meta device.

    A parameter is made as ever and let go when a module takes it in, so that at most one has memory at a time. What
    reads the values of weights fails.
    """
    # One that two modules share stays one.
    substitutes: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]] = {}

    def parameter_on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta or isinstance(parameter, nn.UninitializedParameter):
            return parameter
        original, substitute = substitutes.get(id(parameter), (lambda: None, None))
        if substitute is None or original() is not parameter:
            empty = torch.empty_like(parameter, device="meta")
            substitute = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            substitute.__dict__.update(vars(parameter))
            substitutes[id(parameter)] = weakref.ref(parameter), substitute
        return substitute

    def buffer_on_meta(module: nn.Module, name: str, buffer: Tensor) -> Tensor:
        large = not isinstance(buffer, UNINITIALIZED) and buffer.numel() >= LARGE_BUFFER
        return buffer.to("meta") if large else buffer

    with ExitStack() as stack:
        # Typed by torch as returning nothing, and documented to return what is registered.
        stack.callback(register_module_parameter_registration_hook(parameter_on_meta).remove)  # type: ignore[arg-type]
        stack.callback(register_module_buffer_registration_hook(buffer_on_meta).remove)  # type: ignore[arg-type]
        stack.enter_context(IgnoreDeviceMoves())
        stack.enter_context(warnings.catch_warnings())
        # Weights that a factory loads are let go like those that it draws.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        yield


class IgnoreDeviceMoves(TorchFunctionMode):
    """Leave tensors without values where they are, whatever device they are moved to; a change of type is made."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function as it is, moves of such tensors without the device."""
        kwargs = kwargs or {}
        if func not in MOVES or not is_fake(args[0]):
            return func(*args, **kwargs)
        values = [*args[1:], *kwargs.values()]
        dtypes = [value.dtype if isinstance(value, Tensor) else value for value in values]
        dtype = next((value for value in dtypes if isinstance(value, torch.dtype)), None)
        return args[0] if dtype is None else func(args[0], dtype=dtype)
