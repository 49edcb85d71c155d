"""What a copy holds beside weights and buffers, put back: hidden states, queues, counters, schedules in attributes."""

from __future__ import annotations

import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_spectral._torch_private import schedulers_in

UNINITIALIZED = (nn.UninitializedParameter, nn.UninitializedBuffer)
CONTAINERS = (dict, OrderedDict, list, deque, set)
NOT_WRITTEN = (type, types.FunctionType, types.ModuleType, types.MethodType)


@dataclass(frozen=True, eq=False)
class Held:
    """An object of a copy that a step may write to.

    Attributes:
        path: how it is reached.
        original: what it is a copy of.
    """

    path: str
    value: Any
    original: Any


class HeldState:
    """Snapshot of objects, restored in place."""

    def __init__(self, held: Sequence[Held], left: Iterable[int] = ()) -> None:
        self._seen = set(left)
        self.tensors: list[Held] = []
        self._restore: list[Callable[[], Any]] = []
        self._empty: list[Any] = []
        self.add(held)

    def add(self, held: Sequence[Held]) -> None:
        """Take more objects into the snapshot."""
        seen = self._seen
        for item in held:
            # With its first batch a lazy module becomes one of another class, without the hook that makes it so.
            module = item.value if isinstance(item.value, nn.Module) else None
            if module is not None and any(isinstance(p, UNINITIALIZED) for p in module.parameters(recurse=False)):
                seen |= {id(item.value), *map(id, vars(item.value).values())}
        for item in held:
            for part in _parts(item, seen):
                if isinstance(part.value, Tensor):
                    self.tensors.append(part)
                self._restore += _restorers(part.value, part.original, self._empty)

    def restore(self) -> None:
        """Restore everything."""
        if any(self._empty):
            for container in self._empty:
                container.clear()
        for restore in self._restore:
            restore()


def shared_state(value: Any, path: str) -> list[Held]:
    """Return what of an object that a copy shares is put back: attributes, groups of an optimizer, rates in tensors."""
    parts = [value, *getattr(value, "param_groups", ()), *schedulers_in(value)]
    rates = [rate for part in parts if isinstance(part, dict) for rate in part.values() if isinstance(rate, Tensor)]
    return [*(Held(path, part, part) for part in parts), *(Held(path, rate, None) for rate in rates)]


def _parts(held: Held, seen: set[int]) -> Iterator[Held]:
    """Yield an object and, of one whose copying is its own, all that it holds, each object once."""
    waiting = [held]
    while waiting:
        item = waiting.pop()
        if id(item.value) in seen:
            continue
        seen.add(id(item.value))
        yield item
        if item.original is None:
            waiting += [Held(item.path, child, None) for child in _children(item.value)]


def _children(value: Any) -> list[Any]:
    if isinstance(value, NOT_WRITTEN):
        return []
    children = list(vars(value).values()) if _has_attributes(value) else []
    if isinstance(value, dict):
        children += dict.values(value)
    if isinstance(value, (list, tuple, deque)):
        children += value
    return children


def _has_attributes(value: Any) -> bool:
    """Return whether an object has attributes of its own; those of an alias such as ``list[int]`` are its class's."""
    return isinstance(getattr(value, "__dict__", None), dict)


def _restorers(value: Any, original: Any, empty: list[Any]) -> list[Callable[[], Any]]:
    """Return functions that put the state of one object back; an empty container is added to ``empty`` instead."""
    if type(value) in CONTAINERS and not value:
        # Most are: a module has a dozen for its hooks.
        empty.append(value)
        return []
    if isinstance(value, NOT_WRITTEN):
        return []
    if isinstance(value, Tensor):
        is_plain = not isinstance(value, UNINITIALIZED) and value.layout is torch.strided
        return [_tensor(value, original)] if is_plain else []
    restorers = [_dict(vars(value))] if _has_attributes(value) else []
    return [*restorers, *_of_contents(value), *_of_numpy(value)]


def _of_contents(value: Any) -> list[Callable[[], Any]]:
    if isinstance(value, dict):
        return [_dict(value)]
    if isinstance(value, (list, deque)):
        return [value.clear, partial(value.extend, list(value))]
    if isinstance(value, set):
        return [value.clear, partial(value.update, set(value))]
    if isinstance(value, types.CellType):
        return [partial(setattr, value, "cell_contents", value.cell_contents)]
    if isinstance(value, Generator):
        return [partial(value.set_state, value.get_state())]
    return [partial(value.setstate, value.getstate())] if isinstance(value, random.Random) else []


def _of_numpy(value: Any) -> list[Callable[[], Any]]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return []
    if isinstance(value, numpy.ndarray) and value.flags.writeable:
        return [partial(numpy.copyto, value, value.copy())]
    if isinstance(value, numpy.random.RandomState):
        return [partial(value.set_state, value.get_state())]
    if isinstance(value, numpy.random.Generator):
        return [partial(setattr, value.bit_generator, "state", value.bit_generator.state)]
    return []


def _tensor(tensor: Tensor, original: Tensor | None) -> Callable[[], None]:
    # Through .data, so that graphs of earlier calls stay valid.
    memory, values = tensor.data, tensor.detach().clone() if original is None else original.detach()
    is_leaf = tensor.is_leaf

    def restore() -> None:
        if is_leaf and not tensor.is_leaf:
            tensor.detach_()
        tensor.data = memory
        memory.copy_(values)

    return restore


def put_back(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor its values, and its shape, through .data, so that graphs of earlier calls stay valid."""
    if tensor.shape == values.shape:
        tensor.data.copy_(values)
    else:
        tensor.data = values.clone()


def _dict(value: dict[Any, Any]) -> Callable[[], None]:
    kind = OrderedDict if isinstance(value, OrderedDict) else dict
    items = list(kind.items(value))
    # Ids of what the snapshot holds are of nothing else; in one list, since there are hundreds of these at each call.
    same = [*map(id, kind.keys(value)), *map(id, kind.values(value))]

    def restore() -> None:
        if [*map(id, kind.keys(value)), *map(id, kind.values(value))] != same:
            kind.clear(value)
            kind.update(value, items)

    return restore
