"""What this package raises and warns with."""

from __future__ import annotations

import torch


class MeasurementError(RuntimeError):
    """A loss, a gradient or a curvature that cannot be measured; the message says why and what to do."""


class SecondDerivativeError(MeasurementError):
    """An operation on the way from a layer to the loss has no second derivative."""


class ProcessError(RuntimeError):
    """One of several processes that measure together failed in a way that has no other name; all of them raise it."""


class SpectralWarning(UserWarning):
    """Something was left out of a measurement; the message names it and the reason."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device, or the CPU's allocator, had no memory left.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # Only CUDA has a class of its own for it.
    text = text_of(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def text_of(error: BaseException) -> str:
    """Return the text of an error; nothing where a class of the user's fails to give it."""
    try:
        return str(error)
    except Exception:
        return ""


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of it that says something; of this package's own, all of it."""
    text = text_of(error).strip()
    if not isinstance(error, MeasurementError):
        text = text.partition("\n")[0][:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
