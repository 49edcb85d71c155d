"""The types that are computed and summed in, and float32 products that are float32, whatever the user allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_spectral._torch_private import inert_cudnn_tf32

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
"""Values of the option `precision`, the lowest types that are computed in."""


def at_least(dtype: torch.dtype, lowest: torch.dtype) -> torch.dtype:
    """Return a type that is raised to another where it is a lower one of real or complex floating point.

    Types of a byte, which torch computes nothing but products of its own kernels in, stay.

    >>> at_least(torch.bfloat16, torch.float32), at_least(torch.complex64, torch.float64)
    (torch.float32, torch.complex128)
    """
    is_raised = (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1
    return torch.promote_types(dtype, lowest) if is_raised else dtype


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return what to sum in: float64, which Apple's GPUs do not have."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def exact_device(device: torch.device) -> torch.device:
    """Return where matrices are factorised, in float64 if need be: the device, or the CPU for Apple's GPUs.

    >>> exact_device(torch.device("cuda:1")), exact_device(torch.device("mps"))
    (device(type='cuda', index=1), device(type='cpu'))
    """
    return torch.device("cpu") if device.type == "mps" else device


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two tensors."""
    return float((a * b).sum(dtype=accumulation_dtype(a)))


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep TF32 and bfloat16 out of float32 matrix products and convolutions.

    Torch has an older and a newer set of switches for them, and to read one raises where the other says something
    else. Code that runs inside may read and set either, as `torch.backends.cudnn.flags` does.
    """
    backends: Any = torch.backends
    with ExitStack() as stack:
        matmul_precision = _older_matmul_precision()
        if hasattr(backends, "fp32_precision"):
            _set(stack, backends, "fp32_precision", "ieee")
            _set_exact(stack, backends, backends.cudnn)
            _set_exact(stack, backends.cudnn, backends.cuda.matmul)
            for holder in (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn):
                _set_exact(stack, backends, holder)
            for holder in (backends.cudnn.conv, backends.cudnn.rnn):
                # Torch's own default for these two follows, too, and cannot be set back.
                if holder.fp32_precision != "ieee":
                    _set(stack, holder, "fp32_precision", "ieee")
        else:
            _set(stack, backends.cudnn, "allow_tf32", False)
        if matmul_precision != "highest":
            stack.callback(torch.set_float32_matmul_precision, matmul_precision)
            torch.set_float32_matmul_precision("highest")
        stack.enter_context(inert_cudnn_tf32())
        yield


def _older_matmul_precision() -> str:
    """Return the older setting; "highest", the one that is wanted, where a mixture of both makes it unreadable."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


def _set_exact(stack: ExitStack, parent: Any, holder: Any) -> None:
    """Set a switch below ``parent``, and at the end what it was set to by itself, or that it follows."""
    readings = []
    for value in ("tf32", "ieee"):
        parent.fp32_precision = value
        readings.append(holder.fp32_precision)
    stack.callback(setattr, holder, "fp32_precision", readings[0] if readings[0] == readings[1] else "none")
    holder.fp32_precision = "ieee"


def _set(stack: ExitStack, holder: Any, name: str, value: Any) -> None:
    stack.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, value)


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Keep TF32, bfloat16 and autocast on this type of device out of matrix products, but not out of convolutions."""
    with ExitStack() as stack:
        if not _products_are_exact():
            stack.enter_context(full_float32())
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _products_are_exact() -> bool:
    """Return whether no switch has to be set, which takes as long as twenty operations."""
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):
        holders = (backends, backends.cuda.matmul, backends.mkldnn.matmul)
        return all(holder.fp32_precision in ("none", "ieee") for holder in holders)
    return _older_matmul_precision() == "highest"
