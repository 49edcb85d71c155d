"""Gradients of weights in shards, of which no rank has room for all, and the rounds in which ranks exchange them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from lightning_spectral._torch_private import outside_all_modes
from lightning_spectral.distributed.process_group import Group
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
        device: from which they talk.
        room: raises if this rank has no memory to take part in an exchange. One that failed in the middle of it
            would leave the others waiting.
    """

    def __init__(self, group: Group, device: torch.device, room: Callable[[], object]) -> None:
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


class GradientReducer:
    """Reduces each gradient to its owner as soon as the backward pass produces it, and frees the local copy.

    Args:
        leaves: parameters whose gradients are reduced.
        owners: id of each leaf measured -> the rank that is given the sum.
    """

    def __init__(
        self, leaves: Iterable[Tensor], owners: Mapping[int, int], group: Group, rounds: RequestRounds
    ) -> None:
        self.owners, self._group, self._rounds = owners, group, rounds
        self._leaves = {rounds.register(partial(self._exchange, leaf)): leaf for leaf in leaves}
        self.clear()

    def clear(self) -> None:
        """Forget all sums."""
        self.sums: dict[int, Tensor] = {}
        self.reduced_ids: set[int] = set()
        self._pending: Tensor | None = None

    @contextmanager
    def reducing(self, weight: float, observe: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """Reduce what is computed inside, times a weight; the backward pass then gives zeros in its place.

        Args:
            weight: of this rank's gradient in the sum.
            observe: called with each leaf and this rank's part of the sum of its gradients.
        """
        seen: set[int] = set()
        with ExitStack() as stack:
            for number, leaf in self._leaves.items():
                hook = leaf.register_hook(self._make_hook(number, leaf, weight, seen, observe))  # type: ignore[no-untyped-call]
                stack.callback(hook.remove)
            yield

    def _make_hook(
        self, number: int, leaf: Tensor, weight: float, seen: set[int], observe: Callable[[Tensor, Tensor], None]
    ) -> Callable[[Tensor], Tensor | None]:
        def reduce(gradient: Tensor) -> Tensor | None:
            if gradient.layout is not torch.strided:
                return None
            # A backward pass that fails later on is gone through once more, leaf by leaf.
            if id(leaf) not in seen:
                seen.add(id(leaf))
                self.reduced_ids.add(id(leaf))
                self._pending = (gradient.detach() * weight).contiguous()
                observe(leaf, self._pending)
                self._rounds.request(number)
            return gradient.new_zeros(()).expand(gradient.shape)

        return reduce

    def _exchange(self, leaf: Tensor, requested: bool) -> None:
        part, self._pending = (self._pending, None) if requested else (None, self._pending)
        if part is None:
            part = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        owner = self.owners[id(leaf)]
        self._group.reduce(part, owner)
        if owner == self._group.rank:
            self.sums[id(leaf)] = part if id(leaf) not in self.sums else self.sums[id(leaf)].add_(part)
