"""Sharded weights, gathered when an operation reads them and freed again after use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lightning_spectral._torch_private import TorchDispatchMode, storage_key
from lightning_spectral.distributed.assignment import assign_owners
from lightning_spectral.distributed.dtensor import gathered_together, is_within
from lightning_spectral.distributed.process_group import Group
from lightning_spectral.isolation.interrupts import function_mode
from lightning_spectral.measurement.sharded.gradient_reduction import GradientReducer, RequestRounds
from lightning_spectral.numerics.matmul_precision import at_least

RESIDENT = 2**28
"""Bytes of whole weights that stay in memory; never less than two of the largest."""

SMALL = 2**20
"""Bytes below which a weight, once whole, stays."""

UNREAD = frozenset(
    ["alias", "detach", *(f"{kind}_like" for kind in ("empty", "full", "ones", "rand", "randn", "zeros"))]
    + [f"new_{kind}" for kind in ("empty", "empty_strided", "full", "ones", "zeros")]
)
"""Operations that ask a tensor for its shape and type alone. Those that give other views look at its memory's size."""


POINTERS = (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr)
"""Functions that look at a tensor's memory without an operation."""


@dataclass(eq=False)
class _Weight:
    """One weight: what this rank holds of it, and the tensor whose memory is filled with all of it."""

    shard: Any
    whole: Tensor
    # With a version counter of its own: filling is no change to what graphs have saved.
    memory: Tensor
    nbytes: int
    pins: int = 0
    written: bool = False

    @classmethod
    def of(cls, shard: Any, dtype: torch.dtype) -> _Weight:
        wide = at_least(shard.dtype, dtype)
        memory = torch.empty(shard.shape, dtype=wide, device=shard.device)
        learned = isinstance(shard, nn.Parameter)
        whole = nn.Parameter(memory, requires_grad=shard.requires_grad) if learned else memory
        weight = cls(shard, whole, whole.data, memory.untyped_storage().nbytes())
        weight.empty()
        return weight

    @property
    def stays(self) -> bool:
        """True if its memory is in use, or was given out as a numpy array, which holds on to it."""
        return bool(self.pins) or self.changed

    @property
    def changed(self) -> bool:
        """True if an operation wrote to it, or anything may have through a numpy array."""
        return self.written or not self.memory.untyped_storage().resizable()

    def gather(self, requested: bool) -> Callable[[], None] | None:
        """Put all shards together, and then fill the memory here if this rank requested it."""
        values = self.shard.detach().full_tensor()
        return partial(self.fill, values) if requested else None

    def fill(self, values: Tensor) -> None:
        storage = self.memory.untyped_storage()
        if storage.nbytes() != self.nbytes:
            storage.resize_(self.nbytes)
        self.memory.copy_(values)

    def empty(self) -> None:
        self.written = False
        if self.memory.untyped_storage().resizable():
            self.memory.untyped_storage().resize_(0)


class OnDemandWeights(TorchDispatchMode):
    """Stand-ins for weights in shards: plain tensors, whose memory is filled when an operation reads them.

    Double backward reads the weights again, when no hook of a module fires. So every operation of
    forward and backward passes is looked at before it runs, and so is every tensor that autograd hands to a function of
    the user's. In the forward pass the weights that FSDP2 gathers together are held together, as there.

    To gather a weight takes all ranks, which read at different times: see `RequestRounds`.

    Args:
        shards: the parameters and buffers, DTensors, in the same order on all ranks.
        together: name of a submodule -> ids of the shards that its forward pass is to find whole.
        dtype: the lowest floating type to hold them in.
    """

    def __init__(
        self, shards: Iterable[Any], together: Mapping[str, Sequence[int]], group: Group, dtype: torch.dtype
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._group = group
        self._weights = [_Weight.of(shard, dtype) for shard in shards]
        self._of_storage = {storage_key(weight.whole): i for i, weight in enumerate(self._weights)}
        # The least recently read first.
        self._resident: dict[int, None] = {}
        number = {id(weight.shard): i for i, weight in enumerate(self._weights)}
        self._together = {name: [number[key] for key in ids] for name, ids in together.items()}
        self._resident_limit = _stay(self._sizes, self._in_forward())
        self._device = self._weights[0].whole.device
        self.rounds = RequestRounds(group, self._device, self._room)
        for weight in self._weights:
            self.rounds.register(weight.gather)
        self.peak_bytes = 0

    @property
    def stand_ins(self) -> dict[int, Tensor]:
        """id of each shard -> what takes its place."""
        return {id(weight.shard): weight.whole for weight in self._weights}

    @property
    def _sizes(self) -> list[int]:
        return [weight.nbytes for weight in self._weights]

    def _in_forward(self) -> int:
        """Return the most bytes that are held together: by a submodule and those that it is in."""
        sizes = {name: sum(self._sizes[i] for i in group) for name, group in self._together.items()}
        return max((sum(sizes[outer] for outer in sizes if is_within(name, outer)) for name in sizes), default=0)

    def reserve(self) -> None:
        """Have room for the weights that stay, and to gather the largest, or MemoryError before anyone waits."""
        room = whole_at_a_time(self._sizes, self._in_forward())
        torch.empty(room, dtype=torch.uint8, device=self._device)

    def _room(self) -> object:
        """Return memory to gather the largest weight, or raise."""
        largest = max(self._sizes)
        return [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(2)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Fill what is read, and gather what other ranks read, from here on."""
        with (
            ExitStack() as stack,
            self._group.meeting(self.rounds.serve_until_done),
            # An output saved as it is would hold the graph that holds it, forever.
            saved_tensors_hooks(Tensor.detach, self._unpacked),
            function_mode(_ByPointer(self._unpacked)),
            self,
        ):
            stack.callback(self._evict_all)
            yield

    def hold_together(self, module: nn.Module) -> None:
        """Keep the weights of each submodule of this module, which has the stand-ins, in its forward pass."""
        for name, group in self._together.items():
            self._hold(module.get_submodule(name), group)

    def _hold(self, module: nn.Module, group: Sequence[int]) -> None:
        def before(*_: Any) -> None:
            for i in group:
                self._weights[i].pins += 1
                self._ensure_resident([i])

        def after(*_: Any) -> None:
            for i in group:
                self._weights[i].pins -= 1

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)

    def gradient_reducer(self, costs: Mapping[int, float]) -> GradientReducer:
        """Return the reducer of the gradients.

        Args:
            costs: id of a stand-in -> what its spectrum costs, for the parameters measured.
        """
        measured = [weight for weight in self._weights if id(weight.whole) in costs]
        # Losses of micro-batches are checked against the gradient of the smallest, here.
        stays = min(measured, key=lambda weight: weight.nbytes, default=None)
        large = [weight.whole for weight in measured if weight.nbytes >= SMALL and weight is not stays]
        return GradientReducer(large, assign_owners(costs, self._group.size), self._group, self.rounds)

    def restore(self) -> None:
        """Put back what was written to, and hold nothing together: another forward pass begins."""
        for weight in self._weights:
            weight.pins = 0
            # The loss may have set .data, too.
            weight.whole.data = weight.memory
        for i in [i for i in self._resident if self._weights[i].changed]:
            self._evict(i)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = self._used((*args, *kwargs.values()))
        if used and not _is_unread(func):
            self._ensure_resident(used)
            for i in self._used(_written(func, args, kwargs)):
                self._weights[i].written = True
        return func(*args, **kwargs)

    def _unpacked(self, tensor: Tensor) -> Tensor:
        self._ensure_resident(self._used((tensor,)))
        return tensor

    def _used(self, values: Iterable[Any]) -> list[int]:
        used = []
        for value in values:
            if isinstance(value, Tensor):
                if (i := self._of_storage.get(storage_key(value))) is not None:
                    used.append(i)
            elif isinstance(value, (list, tuple)):
                used += self._used(value)
        return used

    def _ensure_resident(self, used: Sequence[int]) -> None:
        for i in used:
            if i in self._resident:
                del self._resident[i]
                self._resident[i] = None
                continue
            self._make_room(i, keep=used)
            self.rounds.request(i)
            self._resident[i] = None

    def _make_room(self, wanted: int, keep: Sequence[int]) -> None:
        size = self._weights[wanted].nbytes + sum(self._weights[i].nbytes for i in self._resident)
        for i in [i for i in self._resident if i not in keep]:
            weight = self._weights[i]
            if size > self._resident_limit and weight.nbytes >= SMALL and not weight.stays:
                size -= weight.nbytes
                self._evict(i)
        self.peak_bytes = max(self.peak_bytes, size)

    def _evict(self, i: int) -> None:
        del self._resident[i]
        self._weights[i].empty()

    def _evict_all(self) -> None:
        for i in list(self._resident):
            self._evict(i)


class _ByPointer(TorchFunctionMode):
    """Have weights read before code looks at their memory that calls no operation for it."""

    def __init__(self, read: Callable[[Tensor], object]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in POINTERS:
            self._read(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def on_demand_weights(
    model: nn.Module, shards: Sequence[Any], group: Group, dtype: torch.dtype
) -> Iterator[OnDemandWeights]:
    """Yield stand-ins for the parameters and buffers of a model that are shards.

    Raises:
        MemoryError: on all ranks, if there is no room on one of them for the weights that are whole at a time.
    """
    with torch.inference_mode(False):
        weights = OnDemandWeights(shards, gathered_together(model), group, dtype)
        with group.step():
            weights.reserve()
    with weights.active():
        yield weights


def whole_at_a_time(sizes: Sequence[int], in_forward: int = 0) -> int:
    """Return bytes for weights of these sizes: those that stay, and two of the largest while it is gathered.

    min(all, max(256 MiB, two of the largest, what a forward pass holds together)) stay.
    """
    return 2 * max(sizes) + _stay(sizes, in_forward)


def _stay(sizes: Sequence[int], in_forward: int) -> int:
    return min(sum(sizes), max(RESIDENT, 2 * max(sizes), in_forward))


@cache
def _is_unread(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and schema.name.rpartition(":")[2] in UNREAD


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    schema = getattr(func, "_schema", None)
    arguments = [] if schema is None else list(schema.arguments)
    written = []
    for position, argument in enumerate(arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return written
