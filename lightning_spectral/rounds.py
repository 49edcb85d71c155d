"""Exchanges between processes in the middle of steps that they take apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lightning_spectral.processes import Alone

DONE = -1
"""In place of an exchange's number: this process asks for none any more in this step."""

Exchange = Callable[[bool], Callable[[], None] | None]
"""Told whether this process asked for it; gives what is then left to do here, which may fail without harm to others."""


class Rounds:
    """Exchanges that take all processes, at times of which each process knows its own alone.

    Each has its own samples, or none, and pieces of its own. So they meet in rounds. In each, a process that needs an
    exchange says which, and waits; one whose step is done says so, and goes on to meet the others until all are. What
    any of them asked for, all take part in.

    Args:
        processes: that measure together.
        device: from which they talk.
    """

    def __init__(self, processes: Alone, device: torch.device) -> None:
        self._processes, self._device = processes, device
        self._exchanges: list[Exchange] = []

    def add(self, exchange: Exchange) -> int:
        """The number by which to ask for this exchange: all processes add the same, in one order."""
        self._exchanges.append(exchange)
        return len(self._exchanges) - 1

    def ask(self, number: int) -> None:
        """Wait until all take part in an exchange."""
        if not self._processes.in_step:
            raise RuntimeError("an exchange was asked for outside of the steps at whose end processes meet")
        with _unseen():
            self._meet(number)

    def serve(self) -> None:
        """This process is done with a step: take part in what others ask for in theirs."""
        with _unseen():
            while any(number != DONE for number in self._meet(DONE)):
                pass

    def _meet(self, own: int) -> list[int]:
        """One round: what each process asks for."""
        told, left = self._processes.told(own, self._device), None
        for number in sorted(set(told) - {DONE}):
            found = self._exchanges[number](number == own)
            left = found if number == own else left
        if left is not None:
            left()
        return told


@contextmanager
def _unseen() -> Iterator[None]:
    """No part of the loss, for autograd and for what watches the loss."""
    with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield
