"""How many samples a batch holds, and its first few of them."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_spectral.errors import MeasurementError


def batch_size(batch: Any) -> int | None:
    """The leading dimension that all tensors of a batch share; None where there is none."""
    sizes = set(_leading_sizes(batch, "batch").values())
    return sizes.pop() if len(sizes) == 1 else None


def take_samples(batch: Any, n: int) -> Any:
    """The first n samples of a batch of tensors, sequences, mappings and dataclasses, nested in any way.

    Tensors are cut along their leading dimension; so are lists and tuples with one entry per sample that hold no
    tensor, such as file names. Everything else is passed on.

    Raises:
        MeasurementError: if the tensors do not share their leading dimension.
    """
    sizes = _leading_sizes(batch, "batch")
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{path}: {size}" for path, size in list(sizes.items())[:6]) or "no tensor"
        raise MeasurementError(
            "max_samples: the batch cannot be cut to its first samples, since its tensors do not share a leading "
            f"dimension (found {found}); set max_samples=None, or have the loss cut the batch"
        )
    size = next(iter(sizes.values()))
    if isinstance(batch, PackedSequence) or _is_list_of_samples(batch, size):
        raise MeasurementError(
            f"max_samples: the batch, a {type(batch).__name__} of {len(batch)}, keeps its samples apart by other means "
            "than a leading dimension; set max_samples=None, or have the loss cut the batch"
        )
    return batch if size <= n else _cut(batch, size, n)


def _is_list_of_samples(batch: Any, size: int) -> bool:
    """Whether this is a sequence with a tensor per sample, as detection models take, and no tuple of whole batches."""
    tensors = isinstance(batch, (list, tuple)) and all(isinstance(item, Tensor) for item in batch)
    return tensors and len(batch) > size


def _children(value: Any) -> dict[Any, Any] | None:
    """The parts of a container by key, or None for a leaf."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _leading_sizes(value: Any, path: str) -> dict[str, int]:
    if isinstance(value, Tensor):
        return {path: value.shape[0]} if value.ndim else {}
    out: dict[str, int] = {}
    for key, child in (_children(value) or {}).items():
        out |= _leading_sizes(child, f"{path}[{key!r}]")
    return out


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Rebuild the containers of a batch around ``function`` of each of its leaves; the batch stays as it is."""
    children = _children(value)
    if children is None:
        return function(value)
    return _rebuilt(value, {key: map_leaves(child, function) for key, child in children.items()})


def _cut(value: Any, size: int, n: int) -> Any:
    if isinstance(value, Tensor):
        return value[:n] if value.ndim else value
    children = _children(value)
    if children is None:
        return value
    if isinstance(value, (list, tuple)) and len(value) == size and not _leading_sizes(value, ""):
        return value[:n]
    return _rebuilt(value, {key: _cut(child, size, n) for key, child in children.items()})


def _rebuilt(value: Any, children: dict[Any, Any]) -> Any:
    """A container of the same class with other parts."""
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
