"""Convert records to JSON and back. JSON knows neither NaN nor infinity: None stands for NaN, "inf" for infinity."""

from __future__ import annotations

import functools
import math
import struct
import types
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Record = TypeVar("Record")

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""Exceptions that reading a record from untrusted data may raise."""


def to_jsonable(value: Any, *, pack: bool = False) -> Any:
    """Return records, mappings, sequences and tensors as values that JSON holds.

    Args:
        pack: write tensors as base64 of their little-endian float64, 11 characters a number and exact, not as lists.
    """
    if is_dataclass(value):
        return {f.name: to_jsonable(getattr(value, f.name), pack=pack) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item, pack=pack) for key, item in value.items()}
    if isinstance(value, Tensor):
        return _pack(value) if pack else to_jsonable(value.tolist())
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item, pack=pack) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def decode(kind: type[Record], data: Any) -> Record:
    """Return the record that `to_jsonable` made `data` from.

    Args:
        kind: a dataclass whose fields hold text, numbers, tensors (n,) in float64, records, and tuples and mappings of
            these. A field with a default may be missing.
        data: untrusted: a file may hold anything.

    Raises:
        KeyError: if a field is missing.
        ValueError: if a field does not hold what it is annotated as.
    """
    return cast(Record, _decode(kind, data, kind.__name__))


def _decode(kind: Any, data: Any, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (some,) = (argument for argument in arguments if argument is not type(None))
        return None if data is None else _decode(some, data, name)
    if is_dataclass(kind) and isinstance(data, Mapping):
        present = [(f.name, hint) for f, hint in _field_types(cast(type, kind)) if f.name in data or _is_required(f)]
        return cast(type, kind)(**{key: _decode(hint, data[key], key) for key, hint in present})
    if kind is Tensor and isinstance(data, str):
        return _unpack(data)
    if kind is Tensor and isinstance(data, list):
        return torch.tensor([_decode(float, item, name) for item in data], dtype=torch.float64)
    if origin is tuple and isinstance(data, (list, tuple)):
        kinds = arguments[:1] * len(data) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(data):
            return tuple(_decode(item, value, name) for item, value in zip(kinds, data, strict=True))
    if origin in (dict, Mapping) and isinstance(data, Mapping):
        return {_decode(arguments[0], key, name): _decode(arguments[1], value, name) for key, value in data.items()}
    return _decode_scalar(kind, data, name)


def _decode_scalar(kind: Any, data: Any, name: str) -> Any:
    if kind is str and isinstance(data, str):
        return data
    if get_origin(kind) is Literal and data in get_args(kind):
        return data
    if kind is float and (data is None or data in ("inf", "-inf")):
        return math.nan if data is None else float(data)
    # An int may be a bool, or too large for a float.
    if kind in (int, float) and type(data) is int and abs(data) < 1 << 63:
        return kind(data)
    if kind is float and isinstance(data, float):
        return data
    raise ValueError(f"{name} must be {kind if get_args(kind) else kind.__name__}, got {data!r:.50}")


def _pack(values: Tensor) -> str:
    numbers = values.double().tolist()
    return b64encode(struct.pack(f"<{len(numbers)}d", *numbers)).decode()


def _unpack(text: str) -> Tensor:
    data = b64decode(text, validate=True)
    if len(data) % 8:
        raise ValueError(f"a tensor's base64 must hold whole float64 numbers, got {len(data)} bytes")
    return torch.tensor(struct.unpack(f"<{len(data) // 8}d", data), dtype=torch.float64)


@functools.cache
def _field_types(kind: type) -> list[tuple[Any, Any]]:
    """Return the fields of a record with their types."""
    hints = get_type_hints(kind)
    return [(field, hints[field.name]) for field in fields(kind)]


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
