"""Processes that measure together: each holds a part of the batches, and all come to one result.

A measurement is steps that each process takes alone, and exchanges between them. Nothing is exchanged within a step,
and a step that fails in one process fails in all, with the same kind of error, so that no process waits for another
that has gone a different way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_spectral.errors import MeasurementError, ProcessError, is_out_of_memory, text_of

T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)

PACKAGE = __name__.partition(".")[0]

COMMUNICATION = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
"""Namespaces of the operations by which processes talk."""


class SingleProcess:
    """The one process that measures, and what several have in common."""

    rank = 0
    size = 1
    members: Sequence[int] = (0,)
    in_step = True
    """Whether a step is being computed, at whose end the processes meet."""

    def call_everywhere(self, compute: Callable[[], T], *, watched: bool = False) -> T:
        """What ``compute`` gives here, or in every process the error that it raises in one.

        With ``watched`` it is an error if, of several processes, it talks to others.
        """
        return compute()

    def meeting(self, serve: Callable[[], None]) -> AbstractContextManager[None]:
        """Inside, each process calls ``serve`` when its part of a step is done, whether or not it failed.

        Those still at theirs may then exchange what they need with it, until all are done.
        """
        return nullcontext()

    def all_gather_int(self, number: int, device: torch.device) -> list[int]:
        """The numbers of all processes, by rank, sent from a device."""
        return [number]

    def reduce(self, tensor: Tensor, rank: int) -> None:
        """Make a tensor the sum over all processes in the process of one rank; in the others it is spent."""

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all processes, by rank. They go through pickle, and must not fail there."""
        return [value]

    def gather_object(self, value: T, rank: int) -> list[T] | None:
        """The values of all processes, by rank, in the process of one rank; None in the others."""
        return [value]

    def reduce_to_owners(
        self, values: Mapping[str, Tensor], owners: Mapping[str, int], empty: Callable[[str], Tensor]
    ) -> dict[str, Tensor]:
        """The sums over all processes of those tensors that this one owns.

        Args:
            values: name -> tensor, in each process those that it has.
            owners: name -> the rank that is given the sum, for the names of all processes in one order.
            empty: name -> zeros in place of a tensor that this process does not have.
        """
        return {name: values[name] if name in values else empty(name) for name in owners}

    def broadcast_from_owners(
        self, mine: Mapping[str, Sequence[Tensor]], owners: Mapping[str, int]
    ) -> dict[str, list[Tensor]]:
        """What each process has of the names that it owns, in all of them: name -> tensors."""
        return {name: list(mine[name]) for name in owners if name in mine}


class DistributedGroup(SingleProcess):
    """The processes of a group. All must make the same calls in the same order.

    Args:
        group: of torch.distributed, with a backend for the device of the tensors; None: all processes.

    Raises:
        ValueError: if this process is not one of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.members = range(self.size) if group is None else dist.get_process_group_ranks(group)
        self.in_step = False
        self._serve: Callable[[], None] | None = None
        if self.rank < 0:
            raise ValueError("process_group: this process is not in the group, so it has no part in the measurement")

    def call_everywhere(self, compute: Callable[[], T], *, watched: bool = False) -> T:
        """What ``compute`` gives here, or in every process the error that it raises in one.

        Memory that ran out anywhere comes first, else the lowest rank's error. What is raised is of the same class in
        all processes: this package's own classes, ValueError and MemoryError as they are, everything else as
        ProcessError.
        """
        value, failure, cause = None, None, None
        self.in_step = True
        try:
            with _NoCommunication() if watched else nullcontext():  # type: ignore[no-untyped-call]
                value = compute()
        except Exception as error:
            failure = _Failure.of(error)
            cause = None if failure.kind is MemoryError else error
        finally:
            self.in_step = False
        if self._serve is not None:
            self._serve()
        failures = {rank: found for rank, found in enumerate(self.all_gather_object(failure)) if found is not None}
        if not failures:
            return value  # type: ignore[return-value]
        rank = min(failures, key=lambda rank: (failures[rank].kind is not MemoryError, rank))
        raise failures[rank].error(rank) from (cause if rank == self.rank else None)

    @contextmanager
    def meeting(self, serve: Callable[[], None]) -> Iterator[None]:
        """Inside, each process calls ``serve`` when its part of a step is done, whether or not it failed."""
        self._serve = serve
        try:
            yield
        finally:
            self._serve = None

    def all_gather_int(self, number: int, device: torch.device) -> list[int]:
        """The numbers of all processes, by rank, sent from a device."""
        mine = torch.tensor([number], device=device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        return [int(value) for value in found]

    def reduce(self, tensor: Tensor, rank: int) -> None:
        """Make a tensor the sum over all processes in the process of one rank; in the others it is spent."""
        dist.reduce(tensor, self._global(rank), group=self.group)

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def gather_object(self, value: T, rank: int) -> list[T] | None:
        """The values of all processes, by rank, in the process of one rank; None in the others."""
        found: list[Any] | None = [None] * self.size if rank == self.rank else None
        dist.gather_object(value, found, self._global(rank), group=self.group)
        return found

    def reduce_to_owners(
        self, values: Mapping[str, Tensor], owners: Mapping[str, int], empty: Callable[[str], Tensor]
    ) -> dict[str, Tensor]:
        """The sums over all processes of those tensors that this one owns."""
        found: dict[str, Tensor] = {}
        for rank in range(self.size):
            names = [name for name, owner in owners.items() if owner == rank]
            if not names:
                continue
            # Memory may run out here as in any step.
            parts = self.call_everywhere(partial(_by_dtype, names, values, empty))
            for flat, shapes in parts:
                self.reduce(flat, rank)
                if rank == self.rank:
                    pieces = torch.split(flat, [shape.numel() for shape in shapes.values()])
                    found |= {name: p.view(shape) for (name, shape), p in zip(shapes.items(), pieces, strict=True)}
        return found

    def broadcast_from_owners(
        self, mine: Mapping[str, Sequence[Tensor]], owners: Mapping[str, int]
    ) -> dict[str, list[Tensor]]:
        """What each process has of the names that it owns, in all of them: name -> tensors."""
        layouts = self.all_gather_object(
            {name: [(t.shape, t.dtype, t.device) for t in ts] for name, ts in mine.items()}
        )
        flats: dict[int, Tensor] = {}
        for rank, layout in enumerate(layouts):
            if not (tensors := [spec for specs in layout.values() for spec in specs]):
                continue
            sizes = [shape.numel() * dtype.itemsize for shape, dtype, _ in tensors]
            if rank == self.rank:
                flat = self.call_everywhere(
                    lambda: torch.cat([_bytes(t) for of_name in mine.values() for t in of_name])
                )
            else:
                flat = self.call_everywhere(
                    partial(torch.empty, sum(sizes), dtype=torch.uint8, device=_here(tensors[0][2]))
                )
            dist.broadcast(flat, self._global(rank), group=self.group)
            flats[rank] = flat
        parts = self.call_everywhere(lambda: [_taken_apart(flat, layouts[rank]) for rank, flat in flats.items()])
        found = {name: tensors for part in parts for name, tensors in part.items()}
        return {name: found[name] for name in owners if name in found}

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def assign_owners(costs: Mapping[Name, float], size: int) -> dict[Name, int]:
    """Name -> rank, so that no process has much more to do than another: the dearest first, to who has the least.

    >>> assign_owners({"a": 3, "b": 1, "c": 2}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    loads = [0.0] * size
    found: dict[Name, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = loads.index(min(loads))
        loads[rank] += costs[name]
        found[name] = rank
    return {name: found[name] for name in costs}


@dataclass(frozen=True)
class _Failure:
    """An error as other processes are told of it."""

    kind: type[Exception]
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        text = text_of(error)
        if is_out_of_memory(error):
            return cls(MemoryError, f"out of memory: {text}")
        # Other classes may take more than a text, or be unknown elsewhere.
        if isinstance(error, MeasurementError):
            known = type(error).__module__.partition(".")[0] == PACKAGE
            return cls(type(error) if known else MeasurementError, text)
        if isinstance(error, ValueError):
            return cls(ValueError, text)
        return cls(ProcessError, f"{type(error).__name__}: {text}")

    def error(self, rank: int) -> Exception:
        return self.kind(f"process {rank}: {self.text}")


class _NoCommunication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Have exchanges between processes raise: their number may differ between processes, and all would hang."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, unless it talks to other processes."""
        if func.namespace in COMMUNICATION:
            raise MeasurementError(
                f"the loss talks to other processes ({func.namespace}.{func.__name__}), so that it depends on their "
                "samples; measure a loss of this process's samples alone (loss_fn, or a method spectral_loss), and "
                "with SyncBatchNorm mode='eval'"
            )
        return func(*args, **(kwargs or {}))


def _by_dtype(
    names: Sequence[str], values: Mapping[str, Tensor], empty: Callable[[str], Tensor]
) -> list[tuple[Tensor, dict[str, torch.Size]]]:
    """Tensors in a row, for each of their types, and what they were."""
    tensors = {name: values[name] if name in values else empty(name) for name in names}
    found = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        some = {name: tensor for name, tensor in tensors.items() if tensor.dtype is dtype}
        flat = torch.cat([tensor.flatten() for tensor in some.values()])
        found.append((flat, {name: tensor.shape for name, tensor in some.items()}))
    return found


def _taken_apart(
    flat: Tensor, layout: Mapping[str, Sequence[tuple[torch.Size, torch.dtype, torch.device]]]
) -> dict[str, list[Tensor]]:
    """Tensors from their bytes in a row; cloned, since a view as a wider type must start at a multiple of its size."""
    sizes = [shape.numel() * dtype.itemsize for specs in layout.values() for shape, dtype, _ in specs]
    parts = iter(torch.split(flat, sizes))
    return {
        name: [next(parts).clone().view(dtype).view(shape) for shape, dtype, _ in specs]
        for name, specs in layout.items()
    }


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _here(device: torch.device) -> torch.device:
    """This process's device of the same kind."""
    return (
        device if device.type == "cpu" else torch.device(device.type, torch.get_device_module(device).current_device())
    )
