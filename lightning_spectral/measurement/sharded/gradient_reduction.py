"""Gradients of weights in shards, of which no process has room for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from lightning_spectral.distributed.process_group import SingleProcess
from lightning_spectral.measurement.sharded.request_rounds import Rounds


class GradientReducer:
    """Gradients that go as they come: each to one process, where they are summed over all.

    Args:
        leaves: whose gradients go.
        owners: id of each leaf measured -> the rank that is given the sum.
        processes: that measure together.
        rounds: in which they meet.
    """

    def __init__(
        self, leaves: Iterable[Tensor], owners: Mapping[int, int], processes: SingleProcess, rounds: Rounds
    ) -> None:
        self.owners, self._processes, self._rounds = owners, processes, rounds
        self._leaves = {rounds.add(partial(self._exchange, leaf)): leaf for leaf in leaves}
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.sums: dict[int, Tensor] = {}
        self.taken: set[int] = set()
        self._part: Tensor | None = None

    @contextmanager
    def taking(self, weight: float) -> Iterator[None]:
        """Add what is computed inside, times a weight; what the backward pass then gives for it is empty."""
        seen: set[int] = set()
        with ExitStack() as stack:
            for number, leaf in self._leaves.items():
                hook = leaf.register_hook(self._taker(number, leaf, weight, seen))  # type: ignore[no-untyped-call]
                stack.callback(hook.remove)
            yield

    def _taker(self, number: int, leaf: Tensor, weight: float, seen: set[int]) -> Callable[[Tensor], Tensor | None]:
        def take(gradient: Tensor) -> Tensor | None:
            if gradient.layout is not torch.strided:
                return None
            # A backward pass that fails later on is gone through once more, leaf by leaf.
            if id(leaf) not in seen:
                seen.add(id(leaf))
                self.taken.add(id(leaf))
                self._part = (gradient.detach() * weight).contiguous()
                self._rounds.ask(number)
            return gradient.new_zeros(()).expand(gradient.shape)

        return take

    def _exchange(self, leaf: Tensor, mine: bool) -> None:
        part, self._part = (self._part, None) if mine else (None, self._part)
        if part is None:
            part = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        owner = self.owners[id(leaf)]
        self._processes.reduce(part, owner)
        if owner == self._processes.rank:
            self.sums[id(leaf)] = part if id(leaf) not in self.sums else self.sums[id(leaf)].add_(part)
