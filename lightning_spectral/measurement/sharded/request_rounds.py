"""Exchanges between processes in the middle of steps that they take apart."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_spectral._torch_private import outside_all_modes
from lightning_spectral.distributed.process_group import SingleProcess
from lightning_spectral.errors import is_out_of_memory

DONE, FULL = -1, -2
"""In place of an exchange's number: this process asks for none any more in this step; and has no room for others'."""

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
        room: raises if this process has no memory to take part in an exchange. One that failed in the middle of it
            would leave the others waiting.
    """

    def __init__(self, processes: SingleProcess, device: torch.device, room: Callable[[], object]) -> None:
        self._processes, self._device, self._room = processes, device, room
        self._exchanges: list[Exchange] = []

    def add(self, exchange: Exchange) -> int:
        """Register an exchange and return its number: all ranks register the same, in one order."""
        self._exchanges.append(exchange)
        return len(self._exchanges) - 1

    def ask(self, number: int) -> None:
        """Wait until all take part in an exchange.

        Raises:
            MemoryError: in all that asked, if there is no room for it in one that is done.
        """
        if not self._processes.in_step:
            raise RuntimeError("an exchange was asked for outside of the steps at whose end processes meet")
        with outside_all_modes():
            self._room()
            self._meet(number)

    def serve(self) -> None:
        """Take part in what other ranks request in their step, when this rank is done with its own."""
        with outside_all_modes():
            while any(number >= 0 for number in self._meet(self._done())):
                pass

    def _done(self) -> int:
        try:
            self._room()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return FULL
        return DONE

    def _meet(self, own: int) -> list[int]:
        """Run one round, and return what each rank requests."""
        told, failure = self._processes.all_gather_int(own, self._device), None
        if FULL in told:
            if own >= 0:
                raise MemoryError(f"process {told.index(FULL)} has no room for weights and gradients of others")
            return told
        for number in sorted(set(told) - {DONE}):
            left = self._exchanges[number](number == own)
            try:
                if left is not None:
                    left()
            except Exception as error:
                # The others go on to the next exchange.
                failure = error
        if failure is not None:
            raise failure
        return told
