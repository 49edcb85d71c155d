"""Plain values of records for JSON, which knows neither NaN nor infinity: None stands for NaN, "inf" for infinity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

Record = TypeVar("Record")

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a record from data that anyone wrote may raise."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 1 << 63


def _all(values: Any, kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


HOLDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda x: isinstance(x, str),
    "int": _whole,
    "int | None": lambda x: x is None or _whole(x),
    "float": lambda x: isinstance(x, float) or _whole(x),
    "tuple[int, int]": lambda x: isinstance(x, tuple) and len(x) == 2 and all(map(_whole, x)),
    "tuple[str, ...]": lambda x: isinstance(x, tuple) and _all(x, str),
    "dict[str, str]": lambda x: isinstance(x, dict) and _all(x.values(), str),
}
"""How a record annotates its plain fields -> whether a value may stand in one."""


def plain(value: Any) -> Any:
    """Records, mappings, sequences and tensors as JSON-able values."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def number(value: float | str | None) -> float:
    """A float from what `plain` made of it."""
    return float("nan") if value is None else float(value)


def numbers(values: Mapping[str, Any], skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The same for the values of a record, but for those named in ``skip``."""
    return {
        key: number(value) if key not in skip and (value is None or isinstance(value, str)) else value
        for key, value in values.items()
    }


def checked(record: Record) -> Record:
    """The record, if its plain fields hold what they are annotated as: a file may hold anything.

    Raises:
        ValueError: if one does not.
    """
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if field.type in HOLDS and not HOLDS[str(field.type)](value):
            raise ValueError(f"{field.name} must be {field.type}, got {value!r:.50}")
    return record
