"""A measurement in training: what fails in it is a warning, and an interrupt is one still."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lightning_spectral.isolation.interrupts import interruption

T = TypeVar("T")


def attempt(measure: Callable[[], T], warn: Callable[[str], None], failure: str) -> T | None:
    """Return what ``measure`` returns; None after an error, of which it warns, ``failure`` first.

    Raises:
        BaseException: KeyboardInterrupt, SystemExit and the like, also where they surfaced as another error.
    """
    try:
        return measure()
    except Exception as error:
        # A failed probe must not end training; an interrupt that surfaced as another error must.
        if end := interruption(error):
            raise end from error
        warn(f"{failure}: {type(error).__name__}: {error}")
        return None
