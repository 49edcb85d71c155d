"""Collectives of ranks that measure together: each holds a part of the batches, and all come to one result.

A measurement is a sequence of steps that each rank takes alone. Ranks communicate between steps, never within one. A
step that fails on one rank fails on all with the same kind of error, so that no rank waits for one that has gone
another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral._torch_private import TorchDispatchMode
from lightning_spectral.distributed.assignment import flat_by_dtype, local_device
from lightning_spectral.errors import MeasurementError, ProcessError, is_out_of_memory, text_of

T = TypeVar("T")

PACKAGE = __name__.partition(".")[0]

COMMUNICATION = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
"""Namespaces of the operations by which ranks communicate."""


class Step:
    """Step of a measurement, that each rank takes alone: what it gives to `send` is all-gathered at its end."""

    value: Any = None
    received: Sequence[Any] = ()
    """After the step: what each rank sent, by rank; None for a rank that sent nothing."""

    def send(self, value: Any) -> None:
        """Give all ranks a value, through pickle, which must not fail."""
        self.value = value


class Group:
    """Ranks that measure together: all must make the same calls in the same order. Alone, a process talks to none.

    Args:
        rank, size: of this process among them, and their number.
        group: of torch.distributed, with a backend for the device of the tensors; None: all ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.members: Sequence[int] = range(size) if group is None else dist.get_process_group_ranks(group)
        # Whether this rank is within a step, at whose end the ranks meet.
        self.in_step = size == 1
        self.serve: Callable[[], None] | None = None

    @contextmanager
    def step(self, *, watched: bool = False) -> Iterator[Step]:
        """Yield a step, in which each rank works alone; if it raises on any rank, all ranks raise at its end.

        Running out of memory anywhere comes first, else the lowest rank's error. The error is of the same class on all
        ranks: this package's own classes, ValueError and MemoryError as they are, everything else as ProcessError.

        Args:
            watched: raise, on several ranks, if a rank communicates within.
        """
        step = Step()
        if self.size == 1:
            yield step
            step.received = [step.value]
            return
        failure: tuple[type[Exception], str] | None = None
        cause: Exception | None = None
        self.in_step = True
        try:
            with _NoCommunication() if watched else nullcontext():  # type: ignore[no-untyped-call]
                yield step
        except Exception as error:
            failure = _as_told(error)
            # A StopIteration as cause is what contextlib would raise in place of the joint error.
            cause = None if failure[0] is MemoryError or isinstance(error, StopIteration) else error
        finally:
            # An interrupt is of this rank alone, and ends here.
            self.in_step = False
        if self.serve is not None:
            self.serve()
        gathered = self.all_gather_object((failure, None if failure else step.value))
        failures = {rank: failed for rank, (failed, _) in enumerate(gathered) if failed is not None}
        if failures:
            rank = min(failures, key=lambda rank: (failures[rank][0] is not MemoryError, rank))
            kind, text = failures[rank]
            joint = kind(f"rank {rank}: {text}")
            try:
                raise joint from (cause if rank == self.rank else None)
            finally:
                # The traceback of the error in the step would keep the memory that ran out.
                joint.__context__ = None
        step.received = [value for _, value in gathered]

    @contextmanager
    def meeting(self, serve: Callable[[], None]) -> Iterator[None]:
        """Call ``serve`` at the end of every step inside, on each of several ranks, whether or not the step failed.

        Ranks that are still in the step may then exchange what they need with this one, until all are done.
        """
        self.serve = serve
        try:
            yield
        finally:
            self.serve = None

    def all_gather_int(self, number: int, device: torch.device) -> list[int]:
        """Return the numbers of all ranks, sent from a device."""
        if self.size == 1:
            return [number]
        own = torch.tensor([number], device=device)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own, group=self.group)
        return [int(value) for value in gathered]

    def reduce(self, tensor: Tensor, rank: int) -> None:
        """Sum ``tensor`` over all ranks into ``rank``. Its contents on other ranks are undefined afterwards."""
        if self.size > 1:
            dist.reduce(tensor, self._global(rank), group=self.group)

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all ranks. They go through pickle, which must not fail."""
        gathered: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def gather_object(self, value: T, rank: int) -> list[T] | None:
        """Return the values of all ranks on ``rank``, None on the others."""
        gathered: list[Any] | None = [value] * self.size if rank == self.rank else None
        if self.size > 1:
            dist.gather_object(value, gathered, self._global(rank), group=self.group)
        return gathered

    def reduce_to_owners(self, owners: Mapping[str, int], tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Sum each tensor over all ranks into its owner, and return those that this rank owns.

        Args:
            owners: name -> rank, for the names of all ranks in one order.
            tensor: name -> this rank's tensor, or zeros of its shape where it has none.
        """
        if self.size == 1:
            return {name: tensor(name) for name in owners}
        owned: dict[str, Tensor] = {}
        for rank in range(self.size):
            names = [name for name, owner in owners.items() if owner == rank]
            if not names:
                continue
            # Memory may run out here as in any step.
            with self.step():
                parts = flat_by_dtype({name: tensor(name) for name in names})
            for flat, shapes in parts:
                self.reduce(flat, rank)
                if rank == self.rank:
                    tensors = torch.split(flat, [shape.numel() for shape in shapes.values()])
                    owned |= {name: t.view(shape) for (name, shape), t in zip(shapes.items(), tensors, strict=True)}
        return owned

    def broadcast_from_owners(
        self, values: Mapping[str, Sequence[Tensor]], owners: Mapping[str, int]
    ) -> dict[str, list[Tensor]]:
        """Broadcast every owner's tensors to all ranks: name -> tensors."""
        if self.size == 1:
            return {name: list(values[name]) for name in owners if name in values}
        layouts = self.all_gather_object(
            {name: [(t.shape, t.dtype, t.device) for t in tensors] for name, tensors in values.items()}
        )
        merged: dict[str, list[Tensor]] = {}
        for rank, layout in enumerate(layouts):
            if not layout:
                continue
            # Copies, since a weight in shards can be read within a step alone.
            with self.step():
                tensors = {
                    name: [t.clone(memory_format=torch.contiguous_format) for t in values[name]]
                    if rank == self.rank
                    else [torch.empty(shape, dtype=dtype, device=local_device(on)) for shape, dtype, on in specs]
                    for name, specs in layout.items()
                }
            for t in chain.from_iterable(tensors.values()):
                if t.numel():
                    # As bytes, since not every backend takes every type.
                    dist.broadcast(t.flatten().view(torch.uint8), self._global(rank), group=self.group)
            merged |= tensors
        return {name: merged[name] for name in owners if name in merged}

    def broadcast_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Broadcast the first rank's tensors to all ranks: those of names with one shape and dtype on all of them."""
        if self.size == 1:
            return dict(tensors)
        layouts = self.all_gather_object({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        alike = [name for name in layouts[0] if all(layout.get(name) == layouts[0][name] for layout in layouts)]
        own = {name: [tensors[name]] for name in alike} if self.rank == 0 else {}
        return {name: t for name, (t,) in self.broadcast_from_owners(own, dict.fromkeys(alike, 0)).items()}

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


SINGLE_PROCESS = Group()


def joint_group(group: dist.ProcessGroup | None = None) -> Group:
    """Return the ranks of a process group; None: all ranks.

    Raises:
        ValueError: if this process is not in it.
    """
    if dist.get_rank(group) < 0:
        raise ValueError("process_group: this process is not in the group, so it has no part in the measurement")
    return Group(dist.get_rank(group), dist.get_world_size(group), group)


def _as_told(error: Exception) -> tuple[type[Exception], str]:
    """Return class and text of the error that the other ranks are told of."""
    text = text_of(error)
    if is_out_of_memory(error):
        return MemoryError, f"out of memory: {text}"
    # Other classes may take more than a text, or be unknown elsewhere.
    if isinstance(error, MeasurementError):
        own = type(error).__module__.partition(".")[0] == PACKAGE
        return type(error) if own else MeasurementError, text
    return (ValueError, text) if isinstance(error, ValueError) else (ProcessError, f"{type(error).__name__}: {text}")


class _NoCommunication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise where an operation communicates: its number may differ between ranks, and all would hang."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in COMMUNICATION:
            raise MeasurementError(
                f"the loss communicates with other ranks ({func.namespace}.{func.__name__}), so that it depends on "
                "their samples; measure a loss of this rank's samples alone (loss_fn, or a method spectral_loss), and "
                "with SyncBatchNorm mode='eval'"
            )
        return func(*args, **(kwargs or {}))
