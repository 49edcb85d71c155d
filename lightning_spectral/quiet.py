"""The context in which a measurement runs and leaves no trace.

A measurement runs on a shadow: a copy of the network down to the attributes and closures of its modules. What code
outside the network does (a file it writes, a global it changes) is not undone.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_spectral.batch import map_leaves
from lightning_spectral.errors import MeasurementError
from lightning_spectral.precision import full_float32
from lightning_spectral.shadow import Copier, Shadow, shadow_of

Mode = Literal["eval", "train"]
Precision = Literal["float32", "float64"]
MODES: tuple[Mode, ...] = ("eval", "train")
UNINITIALIZED = (nn.UninitializedParameter, nn.UninitializedBuffer)
PRECISIONS: dict[Precision, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


@contextmanager
def quiet(
    model: nn.Module,
    *,
    mode: Mode = "eval",
    precision: Precision = "float32",
    stand_ins: Mapping[int, Any] | None = None,
) -> Iterator[Shadow]:
    """Yield a shadow of the model to measure on, and put back all global state at the end.

    Held fixed for the caller: random states of torch (CPU and the model's devices), numpy and Python; buffers and
    training flags of the model; autocast, gradient mode, default dtype, float32 precision of matrix products,
    attention kernels, cuDNN for recurrent layers and torch.compile, which inside are set so that second derivatives
    exist and are exact.

    Args:
        model: left as it is, whatever happens inside, an interrupt included.
        mode: "eval", or "train": the flags as they are where the model is in training (frozen BatchNorm layers
            that a fine-tuning keeps in eval mode stay so), else all in training.
        precision: the lowest floating-point precision to compute in; parameters and buffers below it are raised.
        stand_ins: id of an object that the model holds -> what takes its place in the shadow.
    """
    with ExitStack() as stack:
        stack.enter_context(_random_states(model))
        stack.enter_context(_buffers_and_flags(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_no_autocast({p.device.type for p in model.parameters()} | {"cpu"}))
        # No other attention kernel, and no cuDNN recurrence, has a second derivative.
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(full_float32())
        stack.enter_context(_eager())
        shadow = stack.enter_context(shadow_of(model, stand_ins))
        _raise_precision(shadow.module, PRECISIONS[precision])
        stack.enter_context(_default_dtype(shadow.module))
        if mode == "eval" or not model.training:
            shadow.module.train(mode == "train")
        yield shadow


def copy_batch(batch: Any, precision: Precision = "float32") -> Any:
    """A copy of a batch, so that a loss that works in place leaves the original; floating tensors are raised."""
    copier = Copier(lambda tensor: _at_least(tensor, PRECISIONS[precision]))
    return map_leaves(batch, lambda leaf: copier.copy(leaf, "batch"))


def _at_least(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, dtype)) if tensor.is_floating_point() else tensor


def _raise_precision(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        if not isinstance(parameter, nn.UninitializedParameter):
            parameter.data = _at_least(parameter.data, dtype)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, nn.UninitializedBuffer):
                part._buffers[name] = _at_least(buffer, dtype)
        # What a LightningModule calls its dtype is an attribute, not its weights'.
        if isinstance(part.__dict__.get("_dtype"), torch.dtype) and part.__dict__["_dtype"].is_floating_point:
            part.__dict__["_dtype"] = torch.promote_types(part.__dict__["_dtype"], dtype)


@contextmanager
def _default_dtype(module: nn.Module) -> Iterator[None]:
    """Create tensors in the dtype of a float64 network, as Lightning's precision "64-true" does."""
    before = torch.get_default_dtype()
    floating = {p.dtype for p in module.parameters() if p.is_floating_point()}
    try:
        if floating == {torch.float64}:
            torch.set_default_dtype(torch.float64)
        elif before in (torch.float16, torch.bfloat16):
            torch.set_default_dtype(torch.float32)
        yield
    finally:
        torch.set_default_dtype(before)


class RandomStates:
    """The states of the random generators of torch (CPU and the model's devices), numpy and Python."""

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
        numpy = sys.modules.get("numpy")
        self._restore: list[Callable[[], Any]] = [partial(random.setstate, random.getstate())]
        self._restore.append(partial(torch.set_rng_state, torch.get_rng_state()))
        if numpy:
            self._restore.append(partial(numpy.random.set_state, numpy.random.get_state()))
        for device in devices:
            backend = torch.get_device_module(device)
            if device.type == "mps":
                self._restore.append(partial(backend.set_rng_state, backend.get_rng_state()))
            else:
                self._restore.append(partial(backend.set_rng_state, backend.get_rng_state(device), device))

    def restore(self) -> None:
        """Put them back, as often as needed."""
        for restore in self._restore:
            restore()


@contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    states = RandomStates(model)
    try:
        yield
    finally:
        states.restore()


def repeatable(evaluate: Callable[[], Any], shadow: nn.Module) -> Callable[[], Any]:
    """The same loss at each call, with the weights, buffers and random states of the first one, or an error.

    Raises:
        MeasurementError: by the function returned, if the value is another one all the same.
    """
    states = RandomStates(shadow)
    values: list[float] = []
    tensors = [t for t in (*shadow.parameters(), *shadow.buffers()) if not isinstance(t, UNINITIALIZED)]
    start = [tensor.detach().clone() for tensor in tensors]

    def again() -> Any:
        states.restore()
        if values:
            # A step may write to weights. Through .data, so that the graph of the first call stays valid.
            for tensor, value in zip(tensors, start, strict=True):
                tensor.data.copy_(value)
        loss = evaluate()
        if isinstance(loss, Tensor) and loss.numel() == 1:
            values.append(float(loss.detach()))
            if not math.isclose(values[0], values[-1], rel_tol=1e-4, abs_tol=1e-12) and math.isfinite(values[0]):
                raise MeasurementError(
                    f"the loss is {values[-1]:.6g} at a second call on the same batch, after {values[0]:.6g}: it draws "
                    "from a generator of its own, or counts its calls; use curvature='exact', which calls it once"
                )
        return loss

    return again


@contextmanager
def _buffers_and_flags(model: nn.Module) -> Iterator[None]:
    """Guard the original against a loss that reaches it past the shadow, through a global or a closure of its own."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [b for b in model.buffers() if not isinstance(b, nn.UninitializedBuffer)]
    before = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        for buffer, value in zip(buffers, before, strict=True):
            # BatchNorm writes its statistics without raising their version, so only the values tell. An expanded
            # buffer cannot be written to, by the loss as little as by us.
            with suppress(RuntimeError):
                if not torch.equal(buffer, value):
                    buffer.data.copy_(value)


@contextmanager
def _no_autocast(device_types: set[str]) -> Iterator[None]:
    """Neither the caller's autocast nor one that the network opens by itself."""
    enter = torch.autocast.__enter__

    def enter_disabled(self: Any) -> Any:
        self._enabled = False
        return enter(self)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for device_type in device_types:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        torch.autocast.__enter__ = enter_disabled  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.autocast.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled code eagerly: compiled graphs have no second derivative."""
    # Without torch._dynamo loaded nothing is compiled, and loading it takes seconds.
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
