"""Matrices shared out over processes: each computes its share of the updates, and all of them get every update."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.distributed.dtensor import is_dtensor
from lightning_spectral.distributed.process_group import assign_owners
from lightning_spectral.optim.matrix_layout import row_counts
from lightning_spectral.optim.matrix_update import (
    MAX_BATCH_NUMEL,
    MatrixBlock,
    computed_in,
    descend,
    spectral_step,
    updates_of,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

SMALLEST = 64
"""Rows, or columns if there are fewer, from which on a matrix is shared. With fewer its update takes as long to receive
as to compute, in about 4 r flops per entry (examples/benchmarks/shared_step.py)."""

ALIKE = 1e-5
"""Relative difference of gradient norms up to which processes hold the same gradient: that of float32 sums in another
order. Gradients of different batches differ by far more."""

NONE, BAD, GOOD = range(3)
"""What a process has of a parameter's gradient: nothing, one with entries that are not finite, or a finite one."""


class _Item(Protocol):
    @property
    def cost(self) -> int: ...

    @property
    def numel(self) -> int: ...


Item = TypeVar("Item", bound=_Item)


@dataclass(frozen=True)
class Scope:
    """The processes that take the steps of some parameters together.

    Attributes:
        groups: over each of them a step agrees on what it skips. Two for a mesh of two dimensions.
        whole: the one that shares out matrices of which every process has the whole gradient, if any.
    """

    groups: tuple[ProcessGroup, ...] = ()
    whole: ProcessGroup | None = None


ALONE = Scope()


@dataclass(frozen=True)
class Agreement:
    """What the processes of a scope have of the gradients of its parameters.

    Attributes:
        lowest, highest: of `NONE`, `BAD` and `GOOD`, per parameter.
        unlike: the parameters whose gradients are finite in all processes, with different norms.
    """

    lowest: list[int]
    highest: list[int]
    unlike: list[int]


def agree(norms: Sequence[float | None], scope: Scope, device: torch.device) -> Agreement:
    """One reduction per group, which every process of the scope takes part in whatever its gradients are.

    Args:
        norms: of the gradients; NaN of one with entries that are not finite, None without one.
        scope: the processes.
        device: where they exchange numbers.
    """
    statuses = [NONE if norm is None else BAD if math.isnan(norm) else GOOD for norm in norms]
    if not scope.groups:
        return Agreement(statuses, statuses, [])
    known = [0.0 if norm is None or math.isnan(norm) else norm for norm in norms]
    both = torch.tensor([statuses, known], dtype=torch.float64, device=device)
    extremes = torch.stack([both, -both])
    for group in scope.groups:
        dist.all_reduce(extremes, dist.ReduceOp.MIN, group)
    (lowest, least), (highest, most) = extremes[0].tolist(), (-extremes[1]).tolist()
    unlike = [
        i
        for i, (status, low, high) in enumerate(zip(lowest, least, most, strict=True))
        if status == GOOD and low != high and not high - low <= ALIKE * high
    ]
    return Agreement([int(x) for x in lowest], [int(x) for x in highest], unlike)


def owners_by_cost(items: Sequence[_Item], n: int) -> list[int]:
    """Which of n processes gets which item."""
    return list(assign_owners({i: item.cost for i, item in enumerate(items)}, n).values())


def in_rounds(items: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Items of like cost, as many for each of n processes as a batch may hold: what is in memory at once."""
    chosen: list[Item] = []
    entries = 0
    for item in sorted(items, key=lambda item: -item.cost):
        chosen.append(item)
        entries += item.numel
        if len(chosen) % n == 0 and entries >= n * MAX_BATCH_NUMEL:
            yield chosen
            chosen, entries = [], 0
    if chosen:
        yield chosen


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def shared_step(pieces: Sequence[MatrixBlock], group: ProcessGroup) -> None:
    """`spectral_step` of matrices that every process of the group has, with the same momentum."""
    kinds: dict[Any, list[MatrixBlock]] = {}
    alone = []
    for piece in pieces:
        if is_shared(piece.target.shape[0], piece.numel):
            kinds.setdefault((computed_in(piece.momentum.dtype), piece.target.device), []).append(piece)
        else:
            alone.append(piece)
    spectral_step(alone)
    for (dtype, device), of_kind in kinds.items():
        for chosen in in_rounds(of_kind, dist.get_world_size(group)):
            _step_round(chosen, group, dtype, device)


def is_shared(m: int, numel: int) -> bool:
    """Whether a matrix with m rows is large enough to be computed by one process for all."""
    return min(m, numel // m) >= SMALLEST


def _step_round(pieces: Sequence[MatrixBlock], group: ProcessGroup, dtype: torch.dtype, device: torch.device) -> None:
    """Every process computes its own and gathers all, each share padded to the largest."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    shares: list[list[MatrixBlock]] = [[] for _ in range(n)]
    for piece, owner in zip(pieces, owners_by_cost(pieces, n), strict=True):
        shares[owner].append(piece)
    longest = max(sum(piece.numel for piece in share) for share in shares)
    own = torch.zeros(longest, dtype=dtype, device=device)
    places = dict(zip(map(id, shares[rank]), _parts(own, shares[rank]), strict=True))
    for piece, update in updates_of(shares[rank]):
        places[id(piece)].copy_(update)
    gathered = own.new_empty(n * longest)
    # Its name from torch 2.13 on, and the one before, which warns there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, own, group=group)
    for share, flat in zip(shares, gathered.view(n, longest).unbind(), strict=True):
        for piece, update in zip(share, _parts(flat, share), strict=True):
            descend(piece.target, update, piece.group["lr"])


def _parts(flat: Tensor, pieces: Sequence[MatrixBlock]) -> list[Tensor]:
    """A view of each piece's shape, one after the other."""
    used = flat[: sum(piece.numel for piece in pieces)]
    parts = torch.split(used, [piece.numel for piece in pieces])
    return [part.view(piece.target.shape) for part, piece in zip(parts, pieces, strict=True)]


class Sharing:
    """The processes that share an optimizer's matrices, found when they are first asked for.

    Args:
        process_group: "auto", "world", a group, or None; see `SpectralNewton`.
    """

    def __init__(self, process_group: Any) -> None:
        self.process_group = process_group
        self.warned = False
        self._group: ProcessGroup | None = None
        self._ddp: Callable[[], Any] = _nothing
        self._found = False

    @property
    def processes(self) -> int:
        """How many they are; 1 where nothing is shared."""
        return 1 if self._group is None else dist.get_world_size(self._group)

    def forget(self) -> None:
        """Look again before the next step: the parameters, or what they are wrapped in, may be others."""
        self._found = False

    def scope(self, groups: Sequence[Mapping[str, Any]]) -> Scope:
        """Of the parameters that every process has as a whole."""
        if not self._found:
            self._found = True
            self._group = self._find(groups)
        ddp = self._ddp()
        if self._group is None or _may_step_alone(ddp) or (self.process_group == "auto" and ddp is None):
            return ALONE
        return Scope((self._group,), self._group)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _find(self, groups: Sequence[Mapping[str, Any]]) -> ProcessGroup | None:
        """A group of several processes, or None."""
        if self.process_group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        if dist.get_world_size() == 1 or count_shared(groups) < 2:
            return None
        found = dist.group.WORLD if self.process_group == "world" else self.process_group
        if self.process_group == "auto":
            ddp = ddp_of([p for group in groups for p in group["params"] if not is_dtensor(p)])
            if ddp is None:
                return None
            found, self._ddp = ddp.process_group, weakref.ref(ddp)
        if dist.get_world_size(found) == 1:
            return None
        logger.info("the matrices of SpectralNewton are shared by %d processes", dist.get_world_size(found))
        return found


def count_shared(groups: Sequence[Mapping[str, Any]]) -> int:
    """How many matrices are worth sharing; from their shapes, so that all processes find the same."""
    return sum(
        is_shared(m, parameter.numel() * m // sum(rows))
        for group in groups
        if group["update"] == "spectral" and not group["capturable"]
        for parameter, layout in zip(group["params"], group["layouts"], strict=True)
        if not is_dtensor(parameter)
        for rows in [row_counts(parameter.shape, layout)]
        for m in rows
    )


def _nothing() -> None:
    return None


def _may_step_alone(ddp: Any) -> bool:
    """Within `DistributedDataParallel.join`, a process that has run out of batches takes no more steps."""
    return bool(getattr(getattr(ddp, "_join_config", None), "enable", False))


def ddp_of(parameters: Sequence[Tensor]) -> Any | None:
    """The DistributedDataParallel module that holds all of these parameters, if there is one.

    Nothing leads from a parameter to it, so all objects are looked through, once per optimizer.
    """
    from torch.nn.parallel import DistributedDataParallel

    wanted = {id(parameter) for parameter in parameters}
    gc.collect()  # one that is left over from an earlier training may be a cycle
    for found in gc.get_objects():
        # Objects may lie about their __class__, or load something when asked for it.
        if issubclass(type(found), DistributedDataParallel):
            named = found.module.named_parameters()
            if wanted <= {id(parameter) for name, parameter in named if name not in found.parameters_to_ignore}:
                return found
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
