"""The first batches of a loader, which may be in use and is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_spectral._torch_private import without_worker_iterator
from lightning_spectral._validation import positive_int
from lightning_spectral.isolation.rng import RandomStates
from lightning_spectral.measurement.cpu_batches import CpuBatches


def first_batches(
    loader: DataLoader[Any],
    n: int,
    model: nn.Module,
    *,
    prepare: Callable[[Any], Any] = lambda batch: batch,
    share: slice = slice(None),
    device: torch.device | None = None,
) -> CpuBatches:
    """Return the first n batches of a loader, or a share of them, in the CPU's memory.

    The loader may be in use: a copy of it is iterated, and all generators that it or ``prepare`` draws from are put
    back.

    Args:
        loader: to take from.
        n: how many, of all shares.
        model: whose generators are put back too.
        prepare: what becomes of each batch before it is kept.
        share: which of the n to keep.
        device: where to give them back; None: where they were.

    Raises:
        ValueError: if the loader has fewer than n.
    """
    states = RandomStates(model)
    own = [(generator, generator.get_state()) for generator in _generators(loader)]
    loader = without_worker_iterator(copy.copy(loader))
    shared_indices, batches, n_read = range(n)[share], CpuBatches(device=device), 0
    try:
        for index, batch in enumerate(islice(loader, n)):
            if index in shared_indices:
                batches.append(prepare(batch))
            n_read += 1
    finally:
        states.restore()
        for generator, state in own:
            generator.set_state(state)
    if n_read < n:
        raise ValueError(f"n_batches: {n} batches were asked for, and the DataLoader has {n_read}")
    return batches


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators of a loader and of its samplers."""
    samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    generators = [getattr(part, "generator", None) for part in (loader, *samplers)]
    return [generator for generator in generators if isinstance(generator, torch.Generator)]


def batches_of(batch: Any, n_batches: int, model: nn.Module) -> Sequence[Any]:
    """Return the batches to measure: the one, or the first n of a loader, held in the CPU's memory.

    Raises:
        ValueError: if n_batches is none, or there are not as many.
    """
    positive_int("n_batches", n_batches)
    if isinstance(batch, DataLoader):
        device = next((parameter.device for parameter in model.parameters()), None)
        return first_batches(batch, n_batches, model, device=device)
    if n_batches > 1:
        raise ValueError(f"n_batches={n_batches} needs a DataLoader as batch, got {type(batch).__name__}")
    return [batch]
