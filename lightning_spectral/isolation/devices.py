"""Memory and clocks of the devices that tensors lie on."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor


def release_memory(tensors: Iterable[Tensor]) -> None:
    """Give freed memory back to the devices of these tensors."""
    gc.collect()
    for kind in {tensor.device.type for tensor in tensors} - {"cpu", "meta"}:
        torch.get_device_module(kind).empty_cache()


def synchronize(tensors: Iterable[Tensor]) -> None:
    """Wait until the devices of these tensors have done what they were given, so that a clock tells the truth."""
    for kind in {tensor.device.type for tensor in tensors} - {"cpu", "meta"}:
        torch.get_device_module(kind).synchronize()
