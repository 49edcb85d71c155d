"""Float32 matrix products that are float32, whatever the user allows for the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
"""Values of the option `precision`, the lowest types that are computed in."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep TF32 and bfloat16 out of float32 matrix products and convolutions."""
    backends: Any = torch.backends
    with ExitStack() as stack:
        if hasattr(backends, "fp32_precision"):
            _set(stack, backends, "fp32_precision", "ieee")
            holders = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
            for holder in (*holders, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn):
                # One that still differs was set by itself; the others follow, and must go on following.
                if holder.fp32_precision not in ("ieee", "none"):
                    _set(stack, holder, "fp32_precision", "ieee")
        else:
            _set(stack, backends.cudnn, "allow_tf32", False)
            _set(stack, backends.cuda.matmul, "allow_tf32", False)
        yield


def _set(stack: ExitStack, holder: Any, name: str, value: Any) -> None:
    stack.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, value)


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Apply `full_float32`, and no autocast on this type of device."""
    with ExitStack() as stack:
        stack.enter_context(full_float32())
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
