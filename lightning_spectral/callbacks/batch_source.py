"""`BatchSource`: the batches that a probe measures, of training, kept from its start, or of a loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_spectral._validation import optional_positive_int, positive_int
from lightning_spectral.distributed.process_group import SingleProcess
from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.batch_tree import batch_size, take_samples
from lightning_spectral.measurement.cpu_batches import CpuBatches
from lightning_spectral.measurement.loader_batches import first_batches

BatchChoice = Literal["train", "fixed"] | DataLoader[Any]
CHOICES = ("train", "fixed")


class BatchSource:
    """Batches of each probe, collected from training or kept for all probes.

    Args:
        choice: "train", the batches from the probe's step on; "fixed", the first batches of the run; or a DataLoader,
            whose first batches are fetched once.
        n_batches: number of batches.
        fixed_samples: with "fixed", keep as many batches as hold so many samples, the last one cut, instead.

    Raises:
        ValueError: for an option out of range, or options that exclude each other.
    """

    def __init__(self, choice: BatchChoice, n_batches: int = 1, fixed_samples: int | None = None) -> None:
        if not isinstance(choice, DataLoader) and choice not in CHOICES:
            raise ValueError(f"batch must be 'train', 'fixed' or a DataLoader, got {choice!r}")
        self.choice = choice
        self.n_batches = positive_int("n_batches", n_batches)
        self.fixed_samples = optional_positive_int("fixed_samples", fixed_samples)
        if fixed_samples is not None and (choice != "fixed" or n_batches > 1):
            raise ValueError(
                "fixed_samples tells how much of batch='fixed' to keep, in place of n_batches; "
                f"got batch={choice!r} and n_batches={n_batches}"
            )
        self.reset()

    def reset(self) -> None:
        """Drop the collected batches, for the next probe or run."""
        self._batches = CpuBatches()
        self._samples = 0
        self._is_loaded = False

    def describe_size(self) -> str:
        """Return the option that sets how much is collected, as text."""
        return f"n_batches={self.n_batches}" if self.fixed_samples is None else f"fixed_samples={self.fixed_samples}"

    @property
    def takes_per_probe(self) -> int:
        """Number of training batches that each probe takes."""
        return self.n_batches if self.choice == "train" else 1

    @property
    def collects(self) -> bool:
        """True while batches of training are to be collected even where no probe is due."""
        return self.choice == "fixed" and not self._is_full

    @property
    def _is_full(self) -> bool:
        if self.fixed_samples is not None:
            return self._samples >= self.fixed_samples
        if isinstance(self.choice, DataLoader):
            return self._is_loaded
        return len(self._batches) >= self.n_batches

    def collect(self, batch: Any) -> None:
        """Keep a copy of a training batch.

        Raises:
            MeasurementError: if fixed_samples cannot count its samples.
        """
        if self.fixed_samples is not None:
            size = batch_size(batch)
            if size is None:
                raise MeasurementError(
                    "fixed_samples: the tensors of the batch share no leading dimension, so its samples cannot be "
                    "counted; set n_batches instead"
                )
            missing = self.fixed_samples - self._samples
            batch = batch if size <= missing else take_samples(batch, missing, option="fixed_samples")
            self._samples += min(size, missing)
        self._batches.append(batch)

    def batches(
        self, batch: Any, module: nn.Module, to_device: Callable[[Any], Any], group: SingleProcess
    ) -> Sequence[Any] | None:
        """Return the batches to measure; None until there are enough.

        Where a loader gives all ranks the same batches, each rank takes its share of them.

        Args:
            batch: batch about to be trained on.
            module: module whose random states stay as they are while a loader is read.
            to_device: moves a batch of the loader to the module's device.
            group: ranks that measure together.
        """
        if self.choice == "train":
            if self.n_batches == 1:
                return [batch]
            self.collect(batch)
        elif isinstance(self.choice, DataLoader) and not self._is_loaded:
            inner = getattr(self.choice.batch_sampler, "sampler", None)
            is_split = isinstance(self.choice.sampler, DistributedSampler) or isinstance(inner, DistributedSampler)
            rank, size = (0, 1) if is_split else (group.rank, group.size)
            share = slice(rank, None, size)
            self._batches = first_batches(self.choice, self.n_batches, module, prepare=to_device, share=share)
            self._is_loaded = True
        if not self._is_full:
            return None
        batches = self._batches
        if self.choice == "train":
            self.reset()
        return batches

    def check_loader(self) -> None:
        """Raise ValueError for a loader whose length is known and too short."""
        if not isinstance(self.choice, DataLoader):
            return
        try:
            n = len(self.choice)
        except (TypeError, NotImplementedError):
            return
        if n < self.n_batches:
            raise ValueError(f"n_batches: {self.n_batches} batches were asked for, and the DataLoader has {n}")
