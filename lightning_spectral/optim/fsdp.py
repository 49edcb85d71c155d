"""The step of DTensors: each matrix is put together in one process, which sends the parts of its update back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.optim.ddp import in_rounds, owners_by_cost
from lightning_spectral.optim.matrix_layout import row_counts
from lightning_spectral.optim.matrix_update import computed_in, descend, matrix_cost, pieces_of, updates_of
from lightning_spectral.optim.placement import Sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ShardedMatrix:
    """What this process holds of the group's i-th parameter and of its momentum M."""

    target: Tensor
    momentum: Tensor
    sharding: Sharding
    group: Mapping[str, Any]
    i: int

    @property
    def numel(self) -> int:
        """Of the whole."""
        return self.sharding.shape.numel()

    @property
    def cost(self) -> int:
        """r^2 n, summed over its matrices."""
        rows = row_counts(self.sharding.shape, self.group["layouts"][self.i])
        return sum(matrix_cost(m, self.numel * m // sum(rows)) for m in rows)


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def sharded_step(matrices: Sequence[ShardedMatrix]) -> None:
    """`spectral_step` of matrices of which each process holds a part."""
    kinds: dict[Any, list[ShardedMatrix]] = {}
    for matrix in matrices:
        key = (matrix.sharding.group, matrix.momentum.dtype, matrix.momentum.device)
        kinds.setdefault(key, []).append(matrix)
    for (group, dtype, _), of_kind in kinds.items():
        for chosen in in_rounds(of_kind, dist.get_world_size(group)):
            _step_round(chosen, group, dtype)


def _step_round(matrices: Sequence[ShardedMatrix], group: ProcessGroup, dtype: torch.dtype) -> None:
    """The parts of each matrix go to its owner, and those of its update come back."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    shares: list[list[ShardedMatrix]] = [[] for _ in range(n)]
    for matrix, owner in zip(matrices, owners_by_cost(matrices, n), strict=True):
        shares[owner].append(matrix)
    mine, device = shares[rank], matrices[0].momentum.device
    sent = [[matrix.momentum for matrix in share] for share in shares]
    shapes = [[matrix.sharding.part(k) for matrix in mine] for k in range(n)]
    received = _exchange(sent, shapes, torch.empty(0, dtype=dtype, device=device), group)
    wholes = [torch.cat(parts, matrix.sharding.dim) for matrix, *parts in zip(mine, *received, strict=True)]
    updates = _whole_updates(mine, wholes)
    split = [
        torch.split(u, matrix.sharding.counts, matrix.sharding.dim) for matrix, u in zip(mine, updates, strict=True)
    ]
    sent = [[parts[k] for parts in split] for k in range(n)]
    shapes = [[matrix.sharding.part(rank) for matrix in share] for share in shares]
    returned = _exchange(sent, shapes, torch.empty(0, dtype=computed_in(dtype), device=device), group)
    for share, parts in zip(shares, returned, strict=True):
        for matrix, part in zip(share, parts, strict=True):
            descend(matrix.target, part, matrix.group["lr"])


def _whole_updates(matrices: Sequence[ShardedMatrix], momenta: Sequence[Tensor]) -> list[Tensor]:
    updates = [torch.empty_like(whole, dtype=computed_in(whole.dtype)) for whole in momenta]
    pieces = [
        piece
        for matrix, update, whole in zip(matrices, updates, momenta, strict=True)
        for piece in pieces_of(update, whole, matrix.group, matrix.i)
    ]
    for piece, update in updates_of(pieces):
        piece.target.copy_(update)
    return updates


def _exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]], like: Tensor, group: ProcessGroup
) -> list[list[Tensor]]:
    """What each process has for this one.

    Args:
        sent: for each process, what it gets.
        shapes: for each process, those of what it sends here.
        like: of type and device of all of these.
        group: the processes.
    """
    outgoing = torch.cat([like, *(tensor.reshape(-1) for of_one in sent for tensor in of_one)])
    counts = [[shape.numel() for shape in of_one] for of_one in shapes]
    incoming = like.new_empty(sum(map(sum, counts)))
    sent_counts = [sum(tensor.numel() for tensor in of_one) for of_one in sent]
    dist.all_to_all_single(incoming, outgoing, list(map(sum, counts)), sent_counts, group=group)
    flat = iter(torch.split(incoming, [count for of_one in counts for count in of_one]))
    return [[next(flat).view(shape) for shape in of_one] for of_one in shapes]
