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
        generators: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
            (random.getstate, random.setstate),
            (torch.get_rng_state, torch.set_rng_state),
        ]
        if numpy:
            generators.append((numpy.random.get_state, numpy.random.set_state))
        for device in devices:
            backend = torch.get_device_module(device)
            where = {} if device.type == "mps" else {"device": device}
            generators.append((partial(backend.get_rng_state, **where), partial(backend.set_rng_state, **where)))
        self._states = [(get, put, get()) for get, put in generators]

    def restore(self) -> None:
        """Restore them, as often as needed."""
        for _, put, state in self._states:
            put(state)

    def now(self) -> list[Any]:
        """Return the states as they are by now."""
        return [get() for get, _, _ in self._states]


def are_equal(one: Any, other: Any) -> bool:
    """Return whether states of generators, nested in any way, are the same."""
    if isinstance(one, dict):
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (tuple, list)):
        return all(map(are_equal, one, other))
    equal = one == other
    return bool(equal if isinstance(equal, bool) else equal.all())
