"""Guards of options: each returns the value that it checked, or raises with the option, the rule and the value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, TypeVar

T = TypeVar("T")


def positive_int(option: str, value: int, at_least: int = 1, *, reason: str = "") -> int:
    """Return a whole number of at least `at_least`; the reason for the bound follows it in the message.

    >>> positive_int("n_batches", 2)
    2
    >>> positive_int("top_k", 2, 3, reason="the points that a fit needs")
    Traceback (most recent call last):
    ValueError: top_k must be a whole number of at least 3, the points that a fit needs, got 2
    """
    return _whole_number(f"{option} must be", value, at_least, reason)


def optional_positive_int(option: str, value: int | None, at_least: int = 1, *, reason: str = "") -> int | None:
    """Return None, or a whole number of at least `at_least`."""
    return None if value is None else _whole_number(f"{option} must be None or", value, at_least, reason)


def _whole_number(rule: str, value: int, at_least: int, reason: str) -> int:
    # True is an int, too.
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{rule} a whole number of at least {at_least}{reason and f', {reason}'}, got {value!r}")
    return value


def number(option: str, value: Any, holds: Callable[[Any], bool], rule: str, *, remedy: str = "") -> Any:
    """Return a real number that a rule holds for.

    >>> number("lr", "1e-3", lambda x: x >= 0, "be at least 0")
    Traceback (most recent call last):
    ValueError: lr must be at least 0, got '1e-3'
    """
    if not isinstance(value, Real) or not holds(value):
        raise ValueError(f"{option} must {rule}, got {value!r}{remedy}")
    return value


def one_of(option: str, value: T, choices: Iterable[T]) -> T:
    """Return a value that is among the choices.

    >>> one_of("mode", "test", ("eval", "train"))
    Traceback (most recent call last):
    ValueError: mode must be one of 'eval', 'train', got 'test'
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def flag(option: str, value: bool | None, *, none: bool = False) -> bool | None:
    """Return True or False; or None where `none` allows it."""
    if not isinstance(value, bool) and not (none and value is None):
        raise ValueError(f"{option} must be {'None, ' if none else ''}True or False, got {value!r}")
    return value
