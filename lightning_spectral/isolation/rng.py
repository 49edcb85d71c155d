"""States of random generators, held and restored."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


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


@contextmanager
def random_states_restored(model: nn.Module) -> Iterator[None]:
    """Restore the random states at the end."""
    states = RandomStates(model)
    try:
        yield
    finally:
        states.restore()
