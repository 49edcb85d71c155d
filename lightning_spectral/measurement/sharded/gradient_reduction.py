"""Gradients of weights in shards, of which no rank has room for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from lightning_spectral.distributed.process_group import SingleProcess
from lightning_spectral.measurement.sharded.request_rounds import RequestRounds


class GradientReducer:
    """Reduces each gradient to its owner as soon as the backward pass produces it, and frees the local copy.

    Args:
        leaves: parameters whose gradients are reduced.
        owners: id of each leaf measured -> the rank that is given the sum.
        group: ranks that measure together.
        rounds: in which the ranks meet.
    """

    def __init__(
        self, leaves: Iterable[Tensor], owners: Mapping[int, int], group: SingleProcess, rounds: RequestRounds
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
