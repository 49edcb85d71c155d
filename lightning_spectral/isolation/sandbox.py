"""Context in which a measurement runs and leaves no trace.

A measurement runs on a copy of the network down to the attributes and closures of its modules. What code
outside the network does (a file it writes, a global it changes) is not undone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_spectral._torch_private import no_autocast_inside
from lightning_spectral.distributed.dtensor import is_dtensor
from lightning_spectral.isolation.batch_tree import map_leaves
from lightning_spectral.isolation.devices import RandomStates
from lightning_spectral.isolation.held_state import UNINITIALIZED, put_back
from lightning_spectral.isolation.interrupts import HeldInterrupts
from lightning_spectral.isolation.module_copy import Copier, ModuleCopy, copied_module
from lightning_spectral.numerics.matmul_precision import PRECISIONS, at_least, full_float32
from lightning_spectral.options import Mode, Precision


@contextmanager
def isolated(
    model: nn.Module,
    *,
    mode: Mode = "eval",
    precision: Precision = "float32",
    stand_ins: Mapping[int, Any] | None = None,
) -> Iterator[ModuleCopy]:
    """Yield a copy of the model to measure on, and restore all global state at the end.

    Held fixed for the caller: random states of torch (CPU and the model's devices), numpy and Python; buffers and
    training flags of the model; autocast, gradient mode, default dtype, float32 precision of matrix products,
    attention kernels, cuDNN for recurrent layers and torch.compile, which inside are set so that second derivatives
    exist and are exact.

    Args:
        model: left as it is, whatever happens inside, an interrupt included.
        mode: "eval", or "train": the flags as they are where the model is in training (frozen BatchNorm layers
            that a fine-tuning keeps in eval mode stay so), else all in training.
        precision: the lowest floating-point precision to compute in; parameters, buffers and tensors in attributes
            below it are raised, complex ones too.
        stand_ins: id of an object that the model holds -> what takes its place in the copy.
    """
    with ExitStack() as stack:
        interrupts = HeldInterrupts()
        stack.callback(interrupts.release)
        interrupts.take()
        stack.callback(RandomStates(model).restore)
        stack.enter_context(_buffers_and_flags(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # The caller's autocast, and any that the network opens by itself.
        for device_type in {p.device.type for p in model.parameters()} | {"cpu"}:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(no_autocast_inside())
        # No other attention kernel, and no cuDNN recurrence, has a second derivative.
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        stack.enter_context(full_float32())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        # Compiled graphs have no second derivative. Without torch._dynamo loaded nothing is compiled, and loading it
        # takes seconds.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        copy = stack.enter_context(copied_module(model, stand_ins, PRECISIONS[precision]))
        _raise_precision(copy.module, PRECISIONS[precision])
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        _set_default_dtype(copy.module)
        if mode == "eval" or not model.training:
            copy.module.train(mode == "train")
        interrupts.release()
        try:
            yield copy
        finally:
            interrupts.take()


def copy_batch(batch: Any, precision: Precision = "float32") -> Any:
    """Return a copy of a batch in which tensors are raised, so that a loss that works in place leaves the original."""
    copier = Copier(PRECISIONS[precision])
    return map_leaves(batch, lambda leaf: copier.copy(leaf, "batch"))


def _raise_precision(module: nn.Module, dtype: torch.dtype) -> None:
    """Raise what the copying did not: weights that stand in for others, and what copies itself."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, UNINITIALIZED):
            tensor.data = tensor.data.to(at_least(tensor.dtype, dtype))
    for part in module.modules():
        # What a LightningModule calls its dtype is an attribute, not its weights'.
        if isinstance(part.__dict__.get("_dtype"), torch.dtype) and part.__dict__["_dtype"].is_floating_point:
            part.__dict__["_dtype"] = torch.promote_types(part.__dict__["_dtype"], dtype)


def _set_default_dtype(module: nn.Module) -> None:
    """Have tensors created in the dtype of a float64 network, as Lightning's precision "64-true" does."""
    if {p.dtype for p in module.parameters() if p.is_floating_point()} == {torch.float64}:
        torch.set_default_dtype(torch.float64)
    elif torch.get_default_dtype() in (torch.float16, torch.bfloat16):
        torch.set_default_dtype(torch.float32)


@contextmanager
def _buffers_and_flags(model: nn.Module) -> Iterator[None]:
    """Guard the original against a loss that reaches it past the copy, through a global or a closure of its own."""
    flags = [(module, module.training) for module in model.modules()]
    initialized: list[Any] = [b for b in model.buffers() if not isinstance(b, nn.UninitializedBuffer)]
    # To compare shards takes all processes, of which one may have failed.
    buffers = [b.to_local() if is_dtensor(b) else b for b in initialized]
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
                    put_back(buffer, value)
