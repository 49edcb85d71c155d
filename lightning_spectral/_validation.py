"""Guards of options: each returns the value that it has checked."""

from __future__ import annotations


def positive_int(option: str, value: int) -> int:
    """Return a whole number of at least 1.

    Raises:
        ValueError: for any other value.

    >>> positive_int("n_batches", 2)
    2
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{option} must be a whole number of at least 1, got {value!r}")
    return value


def optional_positive_int(option: str, value: int | None) -> int | None:
    """Return None, or a whole number of at least 1.

    Raises:
        ValueError: for any other value.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{option} must be None or a whole number of at least 1, got {value!r}")
    return value
