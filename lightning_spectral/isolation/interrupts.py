"""Ctrl-C at any moment of a measurement: what was set for it is put back, whole."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

from lightning_spectral._torch_private import restored_function_modes


def interruption(error: BaseException) -> BaseException | None:
    """Return the KeyboardInterrupt, SystemExit or the like that an error is or arose from; None without one.

    >>> interruption(ValueError("on its own"))
    """
    link: BaseException | None = error
    while isinstance(link, Exception):
        link = link.__context__
    return link


class HeldInterrupts:
    """Hold Ctrl-C back from `take` to `release`, which then delivers it. Outside the main thread there is none."""

    def __init__(self) -> None:
        self._handler: Any = None
        self._came = False

    def take(self) -> None:
        """Hold interrupts from here on."""
        handler = signal.getsignal(signal.SIGINT)
        # None: a handler that is not Python's, and could not be put back.
        if threading.current_thread() is threading.main_thread() and handler is not None:
            self._handler = handler
            signal.signal(signal.SIGINT, self._note)

    def _note(self, signum: int, frame: Any) -> None:
        self._came = True

    def release(self) -> None:
        """Deliver an interrupt that came, and hold no more."""
        handler, self._handler = self._handler, None
        if handler is None:
            return
        signal.signal(signal.SIGINT, handler)
        came, self._came = self._came, False
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def function_mode(mode: TorchFunctionMode) -> Iterator[None]:
    """Enter a mode, and leave torch's stack of modes as it was, also where an interrupt ends it."""
    with restored_function_modes(mode, _release_frames):
        yield


def _release_frames(error: BaseException) -> None:
    if not interruption(error):
        return
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__context__
