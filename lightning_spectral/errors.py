"""What this package raises and warns with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

NAMES_SHOWN = 6
"""How many layers a message names."""


class MeasurementError(RuntimeError):
    """A loss, a gradient or a curvature that cannot be measured; the message says why and what to do."""


class SecondDerivativeError(MeasurementError):
    """An operation on the way from a layer to the loss has no second derivative."""


class ProcessError(RuntimeError):
    """One of several processes that measure together failed in a way that has no other name; all of them raise it."""


class SpectralWarning(UserWarning):
    """Something was left out of a measurement; the message names it and the reason."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # Only CUDA has a class of its own for it.
    text = text_of(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def text_of(error: BaseException) -> str:
    """The text of an error; nothing where a class of the user's fails to give it."""
    try:
        return str(error)
    except Exception:
        return ""


def refused(error: BaseException) -> str:
    """What torch.load with weights_only=True would not read, without its advice to execute it; else nothing.

    >>> refused(ValueError("Do that. WeightsUnpickler error: Unsupported global: GLOBAL os.system was not an allowed"))
    'it holds os.system, which is code'
    >>> refused(ValueError("no such file"))
    ''
    """
    if "WeightsUnpickler error" not in str(error) and type(error).__name__ != "UnpicklingError":
        return ""
    code = re.search(r"\bGLOBAL (\S+)", str(error))
    return f"it holds {code[1]}, which is code" if code else "its bytes are not those of a checkpoint"


def by_cause(failed: Mapping[str, str]) -> list[str]:
    """A line per cause that names the layers it struck.

    >>> by_cause({"a": "frozen", "b": "dead", "c": "frozen"})
    ['a, c: frozen', 'b: dead']
    """
    layers: dict[str, list[str]] = {}
    for name, why in failed.items():
        layers.setdefault(why, []).append(name)
    return [f"{some_of(names)}: {why}" for why, names in layers.items()]


def some_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are.

    >>> some_of(list("abcdefgh"))
    'a, b, c, d, e, f and 2 more'
    """
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of it that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
