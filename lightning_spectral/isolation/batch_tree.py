"""How many samples a batch holds, and its first few of them."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_spectral.errors import MeasurementError


def batch_size(batch: Any) -> int | None:
    """Return the leading dimension that all tensors of a batch share; None where there is none."""
    sizes = set(_leading_sizes(batch, "batch").values())
    return sizes.pop() if len(sizes) == 1 else None


def has_tensors(batch: Any) -> bool:
    """Return whether there is anything in a batch that could be samples."""
    return bool(_leading_sizes(batch, "batch"))


def divisible(batch: Any) -> bool:
    """Return whether `take_samples` can cut it."""
    size = batch_size(batch)
    return size is not None and not isinstance(batch, PackedSequence) and not _is_list_of_samples(batch, size)


def take_samples(batch: Any, stop: int, start: int = 0, *, option: str = "max_samples") -> Any:
    """Return samples start to stop of a batch of tensors, sequences, mappings and dataclasses, nested in any way.

    Tensors are cut along their leading dimension; so are lists and tuples with one entry per sample that hold no
    tensor, such as file names. Everything else is passed on. ``option`` is what an error names as its cause.
    """
    sizes = _leading_sizes(batch, "batch")
    if len(set(sizes.values())) != 1:
        shapes = ", ".join(f"{path}: {size}" for path, size in list(sizes.items())[:6]) or "no tensor"
        raise MeasurementError(
            f"{option}: the batch cannot be cut by samples, since its tensors do not share a leading "
            f"dimension (found {shapes}); set {option}=None, or have the loss cut the batch"
        )
    size = next(iter(sizes.values()))
    # With no more tensors than samples asked for, nothing is to be cut whichever of the two it is.
    is_full = start == 0 and size <= stop
    if isinstance(batch, PackedSequence) or (_is_list_of_samples(batch, size) and not (is_full and len(batch) <= stop)):
        raise MeasurementError(
            f"{option}: the batch, a {type(batch).__name__} of {len(batch)}, keeps its samples apart by other means "
            f"than a leading dimension; set {option}=None, or have the loss cut the batch"
        )
    return batch if is_full else _cut(batch, size, slice(start, stop))


class FirstSamples(Sequence[Any]):
    """First batches of a sequence, cut to their first samples, each when it is fetched."""

    def __init__(self, batches: Sequence[Any], n: int | None, n_batches: int | None = None) -> None:
        self.batches, self.n = batches, n
        self._length = len(batches) if n_batches is None else min(n_batches, len(batches))

    def __getitem__(self, index: Any) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        batch = self.batches[index % self._length]
        return batch if self.n is None else take_samples(batch, self.n)

    def __len__(self) -> int:
        return self._length


def _is_list_of_samples(batch: Any, size: int) -> bool:
    """Return whether this is a sequence with a tensor per sample, as detection models take, not of whole batches."""
    if not isinstance(batch, (list, tuple)) or not all(isinstance(item, Tensor) for item in batch):
        return False
    # Inputs and targets of a single sample differ from each other; samples do not.
    return len(batch) > size and len({(item.ndim, item.dtype) for item in batch}) == 1


def _children(value: Any) -> dict[Any, Any] | None:
    """Return the parts of a container by key, or None for a leaf."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _leading_sizes(value: Any, path: str) -> dict[str, int]:
    if isinstance(value, Tensor):
        # A nested tensor may have no shape.
        return {path: value.size(0)} if value.ndim else {}
    out: dict[str, int] = {}
    for key, child in (_children(value) or {}).items():
        out |= _leading_sizes(child, f"{path}[{key!r}]")
    return out


def leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of nested containers."""
    children = _children(value)
    if children is None:
        yield value
    else:
        for child in children.values():
            yield from leaves(child)


def map_leaves(value: Any, function: Callable[[Any], Any], whole: type | tuple[type, ...] = ()) -> Any:
    """Rebuild the containers of a batch around ``function`` of each of its leaves; the batch stays as it is.

    Containers of the classes ``whole`` count as leaves.
    """
    children = None if isinstance(value, whole) else _children(value)
    if children is None:
        return function(value)
    return _rebuilt(value, {key: map_leaves(child, function, whole) for key, child in children.items()})


def _cut(value: Any, size: int, part: slice) -> Any:
    if isinstance(value, Tensor):
        return _rows(value, part) if value.ndim else value
    children = _children(value)
    if children is None:
        return value
    if isinstance(value, (list, tuple)) and len(value) == size and not _leading_sizes(value, ""):
        return value[part]
    return _rebuilt(value, {key: _cut(child, size, part) for key, child in children.items()})


def _rows(value: Tensor, part: slice) -> Tensor:
    """Return a part of a tensor along its leading dimension; nested and sparse ones cannot be sliced."""
    if value.is_nested:
        return torch.nested.as_nested_tensor(list(value.unbind()[part]), layout=value.layout)
    if value.layout is torch.strided:
        return value[part]
    rows = torch.arange(value.shape[0], device=value.device)[part]
    return value.to_sparse(layout=torch.sparse_coo).index_select(0, rows).to_sparse(layout=value.layout)


def _rebuilt(value: Any, children: dict[Any, Any]) -> Any:
    """Return a container of the same class with other parts."""
    if type(value) is dict:
        return children
    if isinstance(value, (dict, UserDict)):
        # Both copy their items; Hugging Face's BatchEncoding, a UserDict, keeps attributes beside them.
        new: Any = copy.copy(value)
        # Not by `update`, which Hugging Face's ModelOutput refuses.
        for key, child in children.items():
            new[key] = child
        return new
    if isinstance(value, Mapping):
        return type(value)(children)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*children.values())
    if isinstance(value, (list, tuple)):
        return type(value)(children.values())
    new = copy.copy(value)
    for key, child in children.items():
        # Frozen dataclasses refuse plain assignment.
        object.__setattr__(new, key, child)
    return new
