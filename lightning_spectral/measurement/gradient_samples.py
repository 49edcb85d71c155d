"""Batches whose gradient leaves little sampling noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_spectral._validation import positive_int
from lightning_spectral.distributed.process_group import SINGLE_PROCESS, Group
from lightning_spectral.isolation.batch_tree import batch_size, take_samples
from lightning_spectral.measurement.loader_batches import first_batches
from lightning_spectral.measurement.loss import LossFunction
from lightning_spectral.measurement.pipeline import measure_noise_scale
from lightning_spectral.options import Options

AIM = 0.95
"""Signal of the median layer that gradient_samples="auto" aims at."""


def samples_for_aim(noise_scale: float, most: int) -> int | None:
    """Return the samples B whose gradient has the signal `AIM`: B = B_noise S / (1 - S), at most ``most``.

    Args:
        noise_scale: B_noise, infinite where the gradient is noise alone; NaN gives None.
        most: samples at most.

    >>> samples_for_aim(40.0, 4096), samples_for_aim(math.inf, 4096), samples_for_aim(math.nan, 4096)
    (760, 4096, None)
    """
    if math.isnan(noise_scale):
        return None
    return math.ceil(min(most, round(noise_scale * AIM / (1 - AIM), 6)))


def batches_to_measure(
    batch: Any,
    n_batches: int,
    model: nn.Module,
    options: Options,
    loss_fn: LossFunction | None = None,
    group: Group = SINGLE_PROCESS,
) -> Sequence[Any]:
    """Return the batches of this rank: the one, or those of a loader that hold ``gradient_samples``, on the CPU.

    Args:
        batch: of this rank, or its DataLoader.
        n_batches: to take at least.
        model, options, loss_fn, group: as in `measure_spectra`.
    """

    def read(samples: int | None) -> Sequence[Any]:
        positive_int("n_batches", n_batches)
        of_rank = None if samples is None else math.ceil(samples / group.size)
        if isinstance(batch, DataLoader):
            device = next((parameter.device for parameter in model.parameters()), None)
            return first_batches(batch, n_batches, model, device=device, samples=of_rank)
        if isinstance(batch, Dataset):
            raise ValueError(
                f"batch is the data set {type(batch).__name__}: give a batch of it, or DataLoader(dataset, batch_size)"
            )
        if n_batches > 1:
            raise ValueError(f"n_batches={n_batches} needs a DataLoader as batch, got {type(batch).__name__}")
        if of_rank is None or (batch_size(batch) or 0) <= of_rank:
            return [batch]
        return [take_samples(batch, of_rank, option="gradient_samples")]

    return enough_batches(read, model, options, loss_fn, group)


def enough_batches(
    read: Callable[[int | None], Sequence[Any]],
    model: nn.Module,
    options: Options,
    loss_fn: LossFunction | None = None,
    group: Group = SINGLE_PROCESS,
) -> Sequence[Any]:
    """Return the batches that hold ``gradient_samples``, or with "auto" as many as the noise of the first asks for.

    Args:
        read: samples of all ranks -> this rank's batches; None: the first ones.
        model, options, loss_fn, group: as in `measure_spectra`.
    """
    asked = options.gradient_samples
    with group.step():
        batches = read(asked if isinstance(asked, int) else None)
    if asked != "auto":
        return batches
    noise_scale = measure_noise_scale(model, batches, options, loss_fn, group=group)
    with group.step():
        samples = samples_for_aim(noise_scale, options.gradient_samples_max)
        return batches if samples is None else read(samples)
