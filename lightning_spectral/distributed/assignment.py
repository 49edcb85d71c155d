"""Work shared out over ranks, and several tensors as one for one collective."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)


def assign_owners(costs: Mapping[Name, float], size: int) -> dict[Name, int]:
    """Return name -> rank, so that no rank has much more to do than another: the dearest first, to who has the least.

    >>> assign_owners({"a": 3, "b": 1, "c": 2}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    loads = [0.0] * size
    owners: dict[Name, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = loads.index(min(loads))
        loads[rank] += costs[name]
        owners[name] = rank
    return {name: owners[name] for name in costs}


def flat_by_dtype(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, dict[str, torch.Size]]]:
    """Return a flat tensor for each dtype among these tensors, with the names and shapes in it."""
    flats = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        of_dtype = {name: tensor for name, tensor in tensors.items() if tensor.dtype is dtype}
        flat = torch.cat([tensor.flatten() for tensor in of_dtype.values()])
        flats.append((flat, {name: tensor.shape for name, tensor in of_dtype.items()}))
    return flats


def local_device(device: torch.device) -> torch.device:
    """Return this rank's device of the same kind."""
    return (
        device if device.type == "cpu" else torch.device(device.type, torch.get_device_module(device).current_device())
    )
