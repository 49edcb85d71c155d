"""Work shared out over ranks, and several tensors as one for one collective."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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


def split_bytes(
    flat: Tensor, layout: Mapping[str, Sequence[tuple[torch.Size, torch.dtype, torch.device]]]
) -> dict[str, list[Tensor]]:
    """Return tensors from their bytes in a row."""
    sizes = [shape.numel() * dtype.itemsize for specs in layout.values() for shape, dtype, _ in specs]
    parts = iter(torch.split(flat, sizes))
    # Cloned, since a view as a wider type must start at a multiple of its size.
    return {
        name: [next(parts).clone().view(dtype).view(shape) for shape, dtype, _ in specs]
        for name, specs in layout.items()
    }


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in a row."""
    return tensor.contiguous().flatten().view(torch.uint8)


def local_device(device: torch.device) -> torch.device:
    """Return this rank's device of the same kind."""
    return (
        device if device.type == "cpu" else torch.device(device.type, torch.get_device_module(device).current_device())
    )
