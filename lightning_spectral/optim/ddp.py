"""Matrices shared out over ranks: each computes its share of the updates, and all of them get every update."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral._torch_private import may_step_alone, not_compiled
from lightning_spectral.distributed.assignment import assign_owners
from lightning_spectral.distributed.dtensor import is_dtensor
from lightning_spectral.numerics.matmul_precision import at_least
from lightning_spectral.optim.matrix_update import MAX_BATCH_NUMEL, MatrixBlock, compute_updates, descend, spectral_step
from lightning_spectral.optim.placement import row_counts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

SMALLEST = 64
"""Rows, or columns if there are fewer, from which on a matrix is shared. With fewer its update takes as long to receive
as to compute, in about 4 r flops per entry (examples/benchmarks/shared_step.py)."""


class _Item(Protocol):
    @property
    def cost(self) -> int: ...

    @property
    def numel(self) -> int: ...


Item = TypeVar("Item", bound=_Item)


class GradientState(IntEnum):
    """State of a parameter's gradient on one rank."""

    NONE = 0
    NOT_FINITE = 1
    FINITE = 2


@dataclass(frozen=True)
class Scope:
    """Ranks that take the steps of some parameters together.

    Attributes:
        groups: over each of them a step agrees on what it skips. Two for a mesh of two dimensions.
        whole: group that shares out matrices of which every rank has the full gradient, if any.
    """

    groups: tuple[ProcessGroup, ...] = ()
    whole: ProcessGroup | None = None


SINGLE_RANK = Scope()


def agree(states: Sequence[GradientState], scope: Scope, device: torch.device) -> list[tuple[int, int]]:
    """Return the lowest and the highest state of each gradient over the ranks of a scope; all of them take part."""
    if not scope.groups:
        return [(state, state) for state in states]
    own = torch.tensor(states, dtype=torch.int32, device=device)
    extremes = torch.stack([own, -own])
    for group in scope.groups:
        dist.all_reduce(extremes, dist.ReduceOp.MIN, group)
    return list(zip(extremes[0].tolist(), (-extremes[1]).tolist(), strict=True))


def shares_by_cost(items: Sequence[Item], n: int) -> list[list[Item]]:
    """Return the items of each of n ranks."""
    owners = assign_owners({i: item.cost for i, item in enumerate(items)}, n)
    return [[items[i] for i, owner in owners.items() if owner == rank] for rank in range(n)]


def balanced_rounds(items: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Yield items of like cost, as many for each of n ranks as a batch may hold: what is in memory at once."""
    part: list[Item] = []
    entries = 0
    for item in sorted(items, key=lambda item: -item.cost):
        part.append(item)
        entries += item.numel
        if len(part) % n == 0 and entries >= n * MAX_BATCH_NUMEL:
            yield part
            part, entries = [], 0
    if part:
        yield part


@not_compiled
def shared_step(matrices: Sequence[MatrixBlock], group: ProcessGroup) -> None:
    """Step matrices that every rank of the group has, with the same momentum, as `spectral_step` does."""
    kinds: dict[Any, list[MatrixBlock]] = {}
    small = []
    for matrix in matrices:
        if is_shared(matrix.target.shape[0], matrix.numel):
            dtype = at_least(matrix.momentum.dtype, torch.float32)
            kinds.setdefault((dtype, matrix.target.device), []).append(matrix)
        else:
            small.append(matrix)
    spectral_step(small)
    for (dtype, device), of_kind in kinds.items():
        for part in balanced_rounds(of_kind, dist.get_world_size(group)):
            _step_round(part, group, dtype, device)


def is_shared(m: int, numel: int) -> bool:
    """Return whether a matrix with m rows is large enough to be computed by one rank for all."""
    return min(m, numel // m) >= SMALLEST


def _step_round(matrices: Sequence[MatrixBlock], group: ProcessGroup, dtype: torch.dtype, device: torch.device) -> None:
    """Compute this rank's share and all-gather, each share padded to the largest."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    shares = shares_by_cost(matrices, n)
    longest = max(sum(matrix.numel for matrix in share) for share in shares)
    own = torch.zeros(longest, dtype=dtype, device=device)
    places = dict(zip(map(id, shares[rank]), _parts(own, shares[rank]), strict=True))
    for matrix, update in compute_updates(shares[rank]):
        places[id(matrix)].copy_(update)
    gathered = own.new_empty(n * longest)
    # Its name from torch 2.13 on, and the one before, which warns there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, own, group=group)
    for share, flat in zip(shares, gathered.view(n, longest).unbind(), strict=True):
        for matrix, update in zip(share, _parts(flat, share), strict=True):
            descend(matrix.target, update, matrix.group["lr"])


def _parts(flat: Tensor, matrices: Sequence[MatrixBlock]) -> list[Tensor]:
    """Return a view of each matrix's shape, one after the other."""
    used = flat[: sum(matrix.numel for matrix in matrices)]
    parts = torch.split(used, [matrix.numel for matrix in matrices])
    return [part.view(matrix.target.shape) for part, matrix in zip(parts, matrices, strict=True)]


class Sharing:
    """Ranks that share an optimizer's matrices, looked for when they are first asked for.

    Args:
        process_group: "auto", "world", a group, or None; see `SpectralNewton`.
    """

    def __init__(self, process_group: Any) -> None:
        self.process_group = process_group
        self._group: ProcessGroup | None = None
        self._ddp: Callable[[], Any] = _nothing
        self._is_resolved = False

    @property
    def processes(self) -> int:
        """Number of ranks; 1 where nothing is shared."""
        return 1 if self._group is None else dist.get_world_size(self._group)

    def forget(self) -> None:
        """Look again before the next step: the parameters, or what they are wrapped in, may be others."""
        self._is_resolved = False

    def scope(self, groups: Sequence[Mapping[str, Any]]) -> Scope:
        """Return the scope of the parameters that every rank has in full."""
        if not self._is_resolved:
            self._is_resolved = True
            self._group = self._find(groups)
        ddp = self._ddp()
        if self._group is None or may_step_alone(ddp) or (self.process_group == "auto" and ddp is None):
            return SINGLE_RANK
        return Scope((self._group,), self._group)

    @not_compiled
    def _find(self, groups: Sequence[Mapping[str, Any]]) -> ProcessGroup | None:
        """Return a group of several ranks, or None."""
        if self.process_group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        if dist.get_world_size() == 1 or count_shared(groups) < 2:
            return None
        group = dist.group.WORLD if self.process_group == "world" else self.process_group
        if self.process_group == "auto":
            ddp = ddp_of([p for group in groups for p in group["params"] if not is_dtensor(p)])
            if ddp is None:
                return None
            group, self._ddp = ddp.process_group, weakref.ref(ddp)
        if dist.get_world_size(group) == 1:
            return None
        logger.info("the matrices of SpectralNewton are shared by %d ranks", dist.get_world_size(group))
        return group


def count_shared(groups: Sequence[Mapping[str, Any]]) -> int:
    """Count the matrices worth sharing; from their shapes, so that all ranks find the same."""
    return sum(
        is_shared(m, parameter.numel() * m // sum(rows))
        for group in groups
        if group["update"] == "spectral"
        for parameter, layout in zip(group["params"], group["layouts"], strict=True)
        if not is_dtensor(parameter)
        for rows in [row_counts(parameter.shape, layout)]
        for m in rows
    )


def _nothing() -> None:
    return None


def ddp_of(parameters: Sequence[Tensor]) -> Any | None:
    """Return the DistributedDataParallel module that holds all of these parameters, if there is one.

    A parameter has no reference to its DDP wrapper, so live objects are scanned once per optimizer: without it no
    optimizer in a Trainer would share its steps unless told to.
    """
    from torch.nn.parallel import DistributedDataParallel

    wanted = {id(parameter) for parameter in parameters}
    gc.collect()  # one that is left over from an earlier training may be a cycle
    for candidate in gc.get_objects():
        # Objects may lie about their __class__, or load something when asked for it.
        if issubclass(type(candidate), DistributedDataParallel):
            named = candidate.module.named_parameters()
            if wanted <= {id(parameter) for name, parameter in named if name not in candidate.parameters_to_ignore}:
                return candidate
    return None


def check_process_group(process_group: Any) -> None:
    """Raise ValueError unless it is "auto", None, or a group that this process is in."""
    if process_group is None or process_group == "auto":
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"process_group={process_group!r} needs torch.distributed: call init_process_group first, or leave it "
            "at 'auto'"
        )
    if process_group != "world" and not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(f"process_group must be 'auto', 'world', a group of this process or None, got {process_group}")
