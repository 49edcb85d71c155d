"""Devices that tensors lie on: their memory and clocks, and the states of random generators."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def release_memory(tensors: Iterable[Tensor]) -> None:
    """Give freed memory back to the devices of these tensors."""
    gc.collect()
    for kind in {tensor.device.type for tensor in tensors} - {"cpu", "meta"}:
        torch.get_device_module(kind).empty_cache()


def synchronize(tensors: Iterable[Tensor]) -> None:
    """Wait until the devices of these tensors have done what they were given, so that a clock tells the truth."""
    for kind in {tensor.device.type for tensor in tensors} - {"cpu", "meta"}:
        torch.get_device_module(kind).synchronize()


class RandomStates:
    """Snapshot of the states of the random generators of torch (CPU and the model's devices), numpy and Python."""

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
        """Restore them, as often as needed."""
        for restore in self._restore:
            restore()
