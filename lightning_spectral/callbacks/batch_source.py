"""`BatchSource`: the batches that a probe measures, of training, kept from its start, or of a loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_spectral._validation import optional_positive_int, positive_int
from lightning_spectral.distributed.process_group import Group
from lightning_spectral.isolation.batch_tree import batch_size, take_samples
from lightning_spectral.measurement.gradient_samples import samples_for_aim
from lightning_spectral.measurement.loader_batches import CpuBatches, count_samples, first_batches, length_of

BatchChoice = Literal["train", "fixed"] | DataLoader[Any]
CHOICES = ("train", "fixed")


FIRST_BATCHES = 16
"""Batches that the first probe takes at most for gradient_samples="auto", before it is known what a probe costs."""


class BatchSource:
    """Batches of each probe, collected from training or kept for all probes."""

    def __init__(
        self,
        choice: BatchChoice,
        n_batches: int = 1,
        fixed_samples: int | None = None,
        gradient_samples: int | Literal["auto"] | None = None,
        gradient_samples_max: int = 4096,
    ) -> None:
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
        self.gradient_samples, self.gradient_samples_max = gradient_samples, gradient_samples_max
        self.samples = self._asked_samples
        self.most_batches = math.inf
        self.ranks = 1
        self.reset()

    def reset(self) -> None:
        """Drop the collected batches, for the next probe or run."""
        self._loader: Iterable[Any] | None = self.choice if isinstance(self.choice, DataLoader) else None
        self._least = self.n_batches
        self._batches = CpuBatches()
        self._samples = 0
        self._loaded_for: int | None = None
        self._is_loaded = False

    def read(self, batches: Iterable[Any], most: float) -> None:
        """Take the next probe's batches from these, of a further pass over the training data, up to `reset`."""
        self.reset()
        self.samples = self._asked_samples
        self._loader, self._least = batches, int(min(self.n_batches, most))

    @property
    def is_read(self) -> bool:
        """True where a probe's batches are read from a loader when it is due, and not collected from training."""
        return self._loader is not None

    def describe_size(self) -> str:
        """Return the option that sets how much is collected, as text."""
        if self.fixed_samples is not None:
            return f"fixed_samples={self.fixed_samples}"
        return f"n_batches={self.n_batches}" if self.samples is None else f"gradient_samples={self.samples}"

    @property
    def _asked_samples(self) -> int | None:
        return self.gradient_samples if isinstance(self.gradient_samples, int) else None

    @property
    def follows_noise(self) -> bool:
        """True where noise decides how many samples a probe takes."""
        return self.gradient_samples == "auto" and self.choice != "fixed"

    @property
    def takes_per_probe(self) -> int:
        """Number of training batches that each probe takes at least."""
        return self.n_batches if self.choice == "train" else 1

    @property
    def collects(self) -> bool:
        """True while batches of training are to be collected even where no probe is due."""
        return self.choice == "fixed" and not self._is_full

    @property
    def collects_samples(self) -> bool:
        """True where each probe collects a number of samples from training."""
        return self.choice == "train" and self._asked_samples is not None

    @property
    def _is_full(self) -> bool:
        if self.fixed_samples is not None:
            return self._samples >= self.fixed_samples
        return self._suffice(len(self._batches), self._samples)

    def _suffice(self, n_batches: int, samples: int) -> bool:
        """Return whether so many batches and samples of this rank are as many as a probe takes."""
        if n_batches >= self.most_batches:
            return True
        return n_batches >= self.n_batches and (self.samples is None or samples * self.ranks >= self.samples)

    def aim(self, noise_scale: float, most: float = math.inf) -> None:
        """Take as many samples for the next gradient as its noise asks for.

        Args:
            noise_scale: of the median layer, in samples; NaN: n_batches.
            most: samples that the next probe may take.
        """
        samples = samples_for_aim(noise_scale, self.gradient_samples_max)
        self.samples = None if samples is None else max(1, int(min(samples, most)))

    def collect(self, batch: Any) -> None:
        """Keep a copy of a training batch."""
        if self.fixed_samples is not None:
            size = count_samples(batch, "fixed_samples")
            missing = self.fixed_samples - self._samples
            batch = batch if size <= missing else take_samples(batch, missing, option="fixed_samples")
            self._samples += min(size, missing)
        elif self.gradient_samples is not None:
            self._samples += self._count(batch)
        self._batches.append(batch)

    def batches(
        self, batch: Any, module: nn.Module, to_device: Callable[[Any], Any], group: Group
    ) -> Sequence[Any] | None:
        """Return the batches to measure; None until there are enough.

        Where a loader gives all ranks the same batches, each rank takes its share of them.
        """
        self.ranks = group.size
        if self._loader is not None:
            if not self._is_loaded or self._loaded_for != self.samples:
                self._read(self._loader, module, to_device, group)
        elif self.choice == "train":
            # A batch that is all that a probe takes need not be copied.
            if not len(self._batches) and self._suffice(1, 0 if self.samples is None else self._count(batch)):
                return [batch]
            self.collect(batch)
        return self._batches if self._is_loaded or self._is_full else None

    def _read(self, loader: Iterable[Any], module: nn.Module, to_device: Callable[[Any], Any], group: Group) -> None:
        inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        samplers = (getattr(loader, "sampler", None), inner)
        # In training each rank has a loader of its own.
        is_split = self.choice == "train" or any(isinstance(sampler, DistributedSampler) for sampler in samplers)
        rank, ranks = (0, 1) if is_split else (group.rank, group.size)
        samples = None if self.samples is None else math.ceil(self.samples / (group.size if is_split else 1))
        self._batches = first_batches(
            loader, self._least, module, prepare=to_device, rank=rank, ranks=ranks, samples=samples
        )
        self._loaded_for, self._is_loaded = self.samples, True

    def _count(self, batch: Any) -> int:
        """Return the samples of a batch; of one that does not tell, 0 where none were asked for."""
        return (batch_size(batch) or 0) if self.samples is None else count_samples(batch, "gradient_samples")

    def finish(self) -> None:
        """Let go of the batches of a probe that is done, unless they are kept for all."""
        if self.choice == "train":
            self.reset()

    def check_loader(self) -> None:
        """Raise ValueError for a loader whose length is known and too short."""
        if not isinstance(self.choice, DataLoader):
            return
        n = length_of(self.choice)
        if n is not None and n < self.n_batches:
            raise ValueError(f"n_batches: {self.n_batches} batches were asked for, and the DataLoader has {n}")
