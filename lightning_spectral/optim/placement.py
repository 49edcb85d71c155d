"""Where the matrices of a parameter lie: groups of a convolution, parts of a fused qkv, a rank's part of a DTensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.distributed.dtensor import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STACK = -1
"""`Layout.input_first` of a stack of matrices."""


class Layout(TypedDict):
    """Plain numbers, so that it lives in `param_groups` and loads from a checkpoint with weights only.

    Attributes:
        input_first: 0, or the number of groups of a parameter that stores (in_channels, out_channels / groups, ...);
            `STACK` for a stack (E, m, n) of matrices.
        rows: numbers of rows of its matrices, which are stacked; empty for a single one.
    """

    input_first: int
    rows: list[int]


def whole_layout() -> Layout:
    """Return the parameter as one matrix, output first."""
    return Layout(input_first=0, rows=[])


def blocks(tensor: Tensor, layout: Layout) -> list[Tensor]:
    """Return views (m_i, ...) of a parameter-shaped tensor; `flatten(1)` of each is one of its matrices.

    >>> [tuple(b.shape) for b in blocks(torch.zeros(6, 2, 3, 3), Layout(input_first=0, rows=[3, 3]))]
    [(3, 2, 3, 3), (3, 2, 3, 3)]
    """
    if layout["input_first"] == STACK:
        return list(tensor.unbind())
    if groups := layout["input_first"]:
        parts = list(torch.unflatten(tensor, 0, (groups, -1)).transpose(1, 2).unbind())
        return list(torch.split(parts[0], layout["rows"])) if groups == 1 and layout["rows"] else parts
    return list(torch.split(tensor, layout["rows"])) if layout["rows"] else [tensor]


def row_counts(shape: Sequence[int], layout: Layout) -> list[int]:
    """Return m_i of `blocks`, without looking at the tensor, which may be spread over ranks.

    >>> row_counts((6, 2, 3, 3), Layout(input_first=0, rows=[3, 3])), row_counts((6, 2), whole_layout())
    ([3, 3], [6])
    """
    if layout["input_first"] == STACK:
        return [shape[1]] * shape[0]
    if (groups := layout["input_first"]) > 1:
        return [shape[1]] * groups
    return layout["rows"] or [shape[1] if groups else shape[0]]


@dataclass(frozen=True)
class Sharding:
    """Split of a tensor over ranks.

    Attributes:
        counts: rows, or whatever the dimension holds, of each rank.
    """

    group: ProcessGroup
    dim: int
    shape: torch.Size
    counts: list[int]

    def part(self, rank: int) -> torch.Size:
        """Return the shape of what a rank holds."""
        return torch.Size([*self.shape[: self.dim], self.counts[rank], *self.shape[self.dim + 1 :]])


def local(tensor: Any) -> Any:
    """Return what this rank holds of a tensor; changes of it are changes of the tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_gradient(parameter: Any) -> Tensor | None:
    """Return the gradient of what this rank holds; sums still to be taken are, by all ranks."""
    grad = parameter.grad
    if grad is not None and is_dtensor(parameter) and tuple(grad.placements) != tuple(parameter.placements):
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    return local(grad) if grad is not None else None


def exchange_device(parameter: Any) -> torch.device:
    """Return the device on which the ranks that step a parameter exchange numbers; not the CPU if it is offloaded."""
    if is_dtensor(parameter) and parameter.device.type != parameter.device_mesh.device_type:
        return torch.device(parameter.device_mesh.device_type)
    device: torch.device = parameter.device
    return device


def sharding_of(parameter: Any) -> Sharding | None:
    """Return how a tensor is split; None for one that every rank holds in full."""
    if is_dtensor(parameter):
        for mesh_dim, placement in enumerate(parameter.placements):
            if not placement.is_replicate():
                group, m = parameter.device_mesh.get_group(mesh_dim), parameter.shape[placement.dim]
                n = dist.get_world_size(group)
                chunk = -(-m // n)  # as torch.chunk does it: the last ones get fewer, or nothing
                counts = [min(chunk, max(0, m - k * chunk)) for k in range(n)]
                return Sharding(group, placement.dim, parameter.shape, counts)
    return None


def check_dtensor(parameter: Any, name: str) -> None:
    """Raise ValueError for a DTensor whose matrices cannot be put together."""
    kinds = [type(placement).__name__ for placement in parameter.placements]
    if set(kinds) - {"Shard", "Replicate"} or kinds.count("Shard") > 1:
        raise ValueError(
            f"parameter {name} is a DTensor placed as {parameter.placements}; Spectral Newton takes one Shard, and "
            "Replicate in the other dimensions of the mesh, as FSDP2 alone, with replicas, or tensor parallelism "
            "alone make them"
        )
    if parameter.device_mesh.get_coordinate() is None:
        raise ValueError(f"parameter {name} is a DTensor on {parameter.device_mesh}, which this rank is not in")
    with torch.no_grad():
        part = parameter.to_local()
    if part.device.type == "cpu" != parameter.device_mesh.device_type:
        raise ValueError(
            f"parameter {name} is offloaded: its parts are on the CPU, and its ranks exchange what is on "
            f"{parameter.device_mesh.device_type}; train without offloading, or give its group update='adamw'"
        )
    sharding = sharding_of(parameter)
    if sharding is not None and part.shape != sharding.part(dist.get_rank(sharding.group)):
        raise ValueError(
            f"parameter {name} is a DTensor whose part here has the shape {tuple(part.shape)}, and an even split gives "
            f"{tuple(sharding.part(dist.get_rank(sharding.group)))}; let distribute_tensor or fully_shard split it"
        )
