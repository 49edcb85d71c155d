"""Ctrl-C at any moment of a measurement: what was set for it is put back, whole."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Where PyTorch keeps its stack of modes, by names that are not public.
STACK: Any = torch.overrides
NAMES = ("_get_current_function_mode_stack", "_pop_mode", "_push_mode")


def interruption(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt, SystemExit or the like that an error is, or came up while handling; None without one.

    >>> interruption(ValueError("on its own"))
    """
    found: BaseException | None = error
    while isinstance(found, Exception):
        found = found.__context__
    return found


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
        """Deliver one that came, and hold no more."""
        handler, self._handler = self._handler, None
        if handler is None:
            return
        signal.signal(signal.SIGINT, handler)
        came, self._came = self._came, False
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def function_mode(mode: TorchFunctionMode) -> Iterator[None]:
    """Enter a mode, and leave PyTorch's stack of modes as it was.

    PyTorch takes a mode off the stack for each call that the mode handles. An interrupt in that moment loses it, or has
    it put back when the frames it came through are let go of.
    """
    if not all(hasattr(STACK, name) for name in NAMES):
        with mode:
            yield
        return
    before = list(STACK._get_current_function_mode_stack())
    mode.__enter__()  # type: ignore[no-untyped-call]
    try:
        yield
    except BaseException as error:
        if interruption(error):
            found: BaseException | None = error
            while found is not None:
                traceback.clear_frames(found.__traceback__)
                found = found.__context__
        raise
    finally:
        while STACK._get_current_function_mode_stack():
            STACK._pop_mode()
        for other in before:
            STACK._push_mode(other)
