"""The first batches of a loader, which may be in use and is left as it was, waiting in the CPU's memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

from lightning_spectral._torch_private import without_worker_iterator
from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.batch_tree import batch_size, map_leaves
from lightning_spectral.isolation.devices import RandomStates
from lightning_spectral.isolation.module_copy import Copier


class CpuBatches(Sequence[Any]):
    """Copies of batches in the CPU's memory, each given back on the devices it came from.

    Objects of classes that are no containers are copied where they are.

    Args:
        device: where to give them back; None: where each tensor was.
    """

    def __init__(self, batches: Iterable[Any] = (), device: torch.device | None = None) -> None:
        self._copies: list[tuple[Any, list[torch.device]]] = []
        self.device = device
        for batch in batches:
            self.append(batch)

    def append(self, batch: Any) -> None:
        """Keep a copy of one more batch."""
        devices: list[torch.device] = []
        copier = Copier()

        def hold(leaf: Any) -> Any:
            if isinstance(leaf, PackedSequence):
                # Its batch_sizes stay on the CPU, which only its own `to` knows.
                devices.append(leaf.data.device)
                packed = leaf.to("cpu")  # type: ignore[arg-type]
                return PackedSequence(packed.data.clone(), *packed[1:])
            if not isinstance(leaf, Tensor):
                return copier.copy(leaf, "batch")
            devices.append(leaf.device)
            return leaf.detach().to("cpu", copy=True)

        self._copies.append((map_leaves(batch, hold, whole=PackedSequence), devices))

    def __getitem__(self, index: Any) -> Any:
        batch, devices = self._copies[index]
        left = iter(devices)

        def give(leaf: Any) -> Any:
            if not isinstance(leaf, (Tensor, PackedSequence)):
                return leaf
            device: Any = self.device or next(left)
            return leaf.to(device)

        return map_leaves(batch, give, whole=PackedSequence)

    def __len__(self) -> int:
        return len(self._copies)


def count_samples(batch: Any, option: str) -> int:
    """Return the samples of a batch."""
    size = batch_size(batch)
    if size is None:
        raise MeasurementError(
            f"{option}: the tensors of the batch share no leading dimension, so its samples cannot be counted; set "
            "n_batches instead"
        )
    return size


def length_of(loader: Any) -> int | None:
    """Return how many batches a loader says that it has; None for one that does not, such as a stream."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def unused_copy(loader: Any) -> Any:
    """Return a copy of a loader that may be in use: with its own samplers, and without the original's workers."""
    if isinstance(loader, Iterator):
        raise MeasurementError(f"{type(loader).__name__} gives its batches once, to training alone")
    loader = copy.copy(loader)
    if isinstance(loader, DataLoader):
        sampler, batch_sampler = copy.copy(loader.sampler), copy.copy(loader.batch_sampler)
        if getattr(batch_sampler, "sampler", None) is loader.sampler:
            batch_sampler.sampler = sampler  # type: ignore[union-attr]
        # A DataLoader refuses to set them.
        vars(loader).update(sampler=sampler, batch_sampler=batch_sampler)
        without_worker_iterator(loader)
    return loader


def first_batches(
    loader: Iterable[Any],
    n: int,
    model: nn.Module,
    *,
    prepare: Callable[[Any], Any] = lambda batch: batch,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | None = None,
    samples: int | None = None,
) -> CpuBatches:
    """Return the first batches of a loader, or a rank's share of them, in the CPU's memory.

    The loader may be in use: a copy of it is iterated, and all generators that it or ``prepare`` draws from are put
    back.

    Args:
        loader: a DataLoader, or several as ``loaders`` with a ``__copy__`` that applies `unused_copy` to each.
        n: how many at least, of all ranks.
        model: whose generators are put back too.
        prepare: what becomes of each batch before it is kept.
        rank, ranks: of so many that share them, each keeps every so-many-th.
        device: where to give them back; None: where they were.
        samples: read on until there are so many, of all ranks, or the loader ends; None: n batches.
    """
    states = RandomStates(model)
    parts = getattr(loader, "loaders", [loader])
    own = [(generator, generator.get_state()) for part in parts for generator in _generators(part)]
    batches, n_read, samples_read = CpuBatches(device=device), 0, 0
    try:
        for batch in unused_copy(loader):
            if n_read % ranks == rank:
                batches.append(prepare(batch))
            n_read += 1
            if samples is not None:
                samples_read += count_samples(batch, "gradient_samples")
            if n_read >= n and (samples is None or samples_read >= samples):
                break
    finally:
        states.restore()
        for generator, state in own:
            generator.set_state(state)
    if n_read < n:
        raise ValueError(f"n_batches: {n} batches were asked for, and the DataLoader has {n_read}")
    return batches


def _generators(loader: Any) -> list[torch.Generator]:
    samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    generators = [getattr(part, "generator", None) for part in (loader, *samplers)]
    return [generator for generator in generators if isinstance(generator, torch.Generator)]
