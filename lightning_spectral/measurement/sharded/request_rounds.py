"""Exchanges between ranks in the middle of steps that each takes alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_spectral._torch_private import outside_all_modes
from lightning_spectral.distributed.process_group import SingleProcess
from lightning_spectral.errors import is_out_of_memory

DONE, FULL = -1, -2
"""Requests in place of an exchange's number: this rank is done with its step; it has no memory for others'."""

Exchange = Callable[[bool], Callable[[], None] | None]
"""Function of whether this rank asked for it; returns what is then left to do here, which may fail without harm."""


class RequestRounds:
    """Exchanges that take all ranks, at times that each rank knows for itself alone.

    Ranks run different numbers of micro-batches, so they cannot issue collectives in lockstep. They meet in rounds: in
    each, a rank that needs an exchange requests it and waits, one whose step is done says so and goes on to the next
    round until all are. What any rank requests, all take part in.

    Args:
        group: ranks that measure together.
        device: from which they talk.
        room: raises if this rank has no memory to take part in an exchange. One that failed in the middle of it
            would leave the others waiting.
    """

    def __init__(self, group: SingleProcess, device: torch.device, room: Callable[[], object]) -> None:
        self._group, self._device, self._room = group, device, room
        self._exchanges: list[Exchange] = []

    def register(self, exchange: Exchange) -> int:
        """Register an exchange and return its number: all ranks register the same, in one order."""
        self._exchanges.append(exchange)
        return len(self._exchanges) - 1

    def request(self, number: int) -> None:
        """Wait until all take part in an exchange.

        Raises:
            MemoryError: in all that asked, if there is no room for it in one that is done.
        """
        if not self._group.in_step:
            raise RuntimeError("an exchange was asked for outside of the steps at whose end ranks meet")
        with outside_all_modes():
            self._room()
            self._exchange(number)

    def serve_until_done(self) -> None:
        """Take part in what other ranks request in their step, when this rank is done with its own."""
        with outside_all_modes():
            while any(number >= 0 for number in self._exchange(self._done())):
                pass

    def _done(self) -> int:
        try:
            self._room()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return FULL
        return DONE

    def _exchange(self, own: int) -> list[int]:
        """Run one round, and return what each rank requests."""
        requests, failure = self._group.all_gather_int(own, self._device), None
        if FULL in requests:
            if own >= 0:
                raise MemoryError(f"rank {requests.index(FULL)} has no room for weights and gradients of others")
            return requests
        for number in sorted(set(requests) - {DONE}):
            finish = self._exchanges[number](number == own)
            try:
                if finish is not None:
                    finish()
            except Exception as error:
                # The others go on to the next exchange.
                failure = error
        if failure is not None:
            raise failure
        return requests
