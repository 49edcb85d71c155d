"""Plain values of records for JSON, which knows neither NaN nor infinity: None stands for NaN, "inf" for infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


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
