"""Step of DTensors: each matrix is put together on its owner, which sends the parts of its update back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral._torch_private import not_compiled
from lightning_spectral.numerics.matmul_precision import at_least
from lightning_spectral.optim.ddp import balanced_rounds, shares_by_cost
from lightning_spectral.optim.matrix_update import compute_updates, descend, matrix_blocks, matrix_cost
from lightning_spectral.optim.placement import Sharding, row_counts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ShardedMatrix:
    """Part of the group's i-th parameter and of its momentum M that this rank holds, and what `size_units` gives."""

    target: Tensor
    momentum: Tensor
    sharding: Sharding
    group: Mapping[str, Any]
    i: int
    units: Tensor | None = None

    @property
    def numel(self) -> int:
        """Number of entries of the full matrix."""
        return self.sharding.shape.numel()

    @property
    def cost(self) -> int:
        """Cost r^2 n, summed over its matrices."""
        rows = row_counts(self.sharding.shape, self.group["layouts"][self.i])
        return sum(matrix_cost(m, self.numel * m // sum(rows)) for m in rows)


@not_compiled
def sharded_step(matrices: Sequence[ShardedMatrix]) -> None:
    """Step matrices of which each rank holds a part, as `spectral_step` does."""
    kinds: dict[Any, list[ShardedMatrix]] = {}
    for matrix in matrices:
        key = (matrix.sharding.group, matrix.momentum.dtype, matrix.momentum.device)
        kinds.setdefault(key, []).append(matrix)
    for (group, *_), of_kind in kinds.items():
        for part in balanced_rounds(of_kind, dist.get_world_size(group)):
            _step_round(part, group)


def _step_round(matrices: Sequence[ShardedMatrix], group: ProcessGroup) -> None:
    """Send the parts of each matrix to its owner, and those of its update back."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    shares = shares_by_cost(matrices, n)
    own, like = shares[rank], matrices[0].momentum.new_empty(0)
    sent = [[matrix.momentum for matrix in share] for share in shares]
    shapes = [[matrix.sharding.part(k) for matrix in own] for k in range(n)]
    received = _exchange(sent, shapes, like, group)
    full_momenta = [torch.cat(parts, matrix.sharding.dim) for matrix, *parts in zip(own, *received, strict=True)]
    updates = _full_updates(own, full_momenta)
    split = [
        torch.split(u, matrix.sharding.counts, matrix.sharding.dim) for matrix, u in zip(own, updates, strict=True)
    ]
    sent = [[parts[k] for parts in split] for k in range(n)]
    shapes = [[matrix.sharding.part(rank) for matrix in share] for share in shares]
    returned = _exchange(sent, shapes, like.to(at_least(like.dtype, torch.float32)), group)
    for share, parts in zip(shares, returned, strict=True):
        for matrix, part in zip(share, parts, strict=True):
            descend(matrix.target, part, matrix.group["lr"])


def _full_updates(matrices: Sequence[ShardedMatrix], momenta: Sequence[Tensor]) -> list[Tensor]:
    updates = [torch.empty_like(momentum, dtype=at_least(momentum.dtype, torch.float32)) for momentum in momenta]
    blocks = [
        block
        for matrix, update, momentum in zip(matrices, updates, momenta, strict=True)
        for block in matrix_blocks(update, momentum, matrix.group, matrix.i, matrix.units)
    ]
    for block, update in compute_updates(blocks):
        block.target.copy_(update)
    return updates


def _exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]], like: Tensor, group: ProcessGroup
) -> list[list[Tensor]]:
    """Exchange tensors with all ranks, and return what each has for this one.

    Args:
        sent: for each rank, what it gets.
        shapes: for each rank, those of what it sends here.
        like: of type and device of all of these.
        group: the ranks.
    """
    outgoing = torch.cat([like, *(tensor.reshape(-1) for of_one in sent for tensor in of_one)])
    counts = [[shape.numel() for shape in of_one] for of_one in shapes]
    incoming = like.new_empty(sum(map(sum, counts)))
    sent_counts = [sum(tensor.numel() for tensor in of_one) for of_one in sent]
    dist.all_to_all_single(incoming, outgoing, list(map(sum, counts)), sent_counts, group=group)
    flat = iter(torch.split(incoming, [count for of_one in counts for count in of_one]))
    return [[next(flat).view(shape) for shape in of_one] for of_one in shapes]
