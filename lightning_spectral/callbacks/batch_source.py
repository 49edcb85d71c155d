"""Which batches a probe measures: those about to be trained on, the first ones, or a loader's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_spectral.distributed.process_group import SingleProcess
from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.batch_tree import HeldBatches, batch_size, take_samples
from lightning_spectral.measurement.loader_batches import first_batches

BatchChoice = Literal["train", "fixed"] | DataLoader[Any]
CHOICES = ("train", "fixed")


class BatchSource:
    """The batches of each probe, collected from training or kept for all of them.

    Args:
        choice: "train", the batches from the probe's step on; "fixed", the first ones of the run; or a DataLoader,
            whose first ones are fetched once.
        n_batches: how many.
        fixed_samples: "fixed": as many batches as hold so many samples, the last one cut, in place of n_batches.

    Raises:
        ValueError: for an option out of range, or options that exclude each other.
    """

    def __init__(self, choice: BatchChoice, n_batches: int = 1, fixed_samples: int | None = None) -> None:
        if not isinstance(choice, DataLoader) and choice not in CHOICES:
            raise ValueError(f"batch must be 'train', 'fixed' or a DataLoader, got {choice!r}")
        if not isinstance(n_batches, int) or isinstance(n_batches, bool) or n_batches < 1:
            raise ValueError(f"n_batches must be a whole number of at least 1, got {n_batches!r}")
        if fixed_samples is not None:
            if not isinstance(fixed_samples, int) or fixed_samples < 1:
                raise ValueError(f"fixed_samples must be None or a whole number of at least 1, got {fixed_samples!r}")
            if choice != "fixed" or n_batches > 1:
                raise ValueError(
                    "fixed_samples tells how much of batch='fixed' to keep, in place of n_batches; "
                    f"got batch={choice!r} and n_batches={n_batches}"
                )
        self.choice = choice
        self.n_batches = n_batches
        self.fixed_samples = fixed_samples
        self.forget()

    def forget(self) -> None:
        """Drop what was collected: another run begins."""
        self._held = HeldBatches()
        self._samples = 0
        self._loaded = False

    @property
    def told(self) -> str:
        """The options that say how much is collected."""
        return f"n_batches={self.n_batches}" if self.fixed_samples is None else f"fixed_samples={self.fixed_samples}"

    @property
    def takes_per_probe(self) -> int:
        """Batches of training that each probe needs for itself."""
        return self.n_batches if self.choice == "train" else 1

    @property
    def collects(self) -> bool:
        """Whether it wants to see a training batch although none is to be measured now."""
        return self.choice == "fixed" and not self._full

    @property
    def _full(self) -> bool:
        if self.fixed_samples is not None:
            return self._samples >= self.fixed_samples
        if isinstance(self.choice, DataLoader):
            return self._loaded
        return len(self._held) >= self.n_batches

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
            left = self.fixed_samples - self._samples
            batch = batch if size <= left else take_samples(batch, left, option="fixed_samples")
            self._samples += min(size, left)
        self._held.append(batch)

    def batches(
        self, batch: Any, module: nn.Module, to_device: Callable[[Any], Any], processes: SingleProcess
    ) -> Sequence[Any] | None:
        """What to measure, None until there are enough.

        Of a loader that gives all processes the same batches each takes its share of them.

        Args:
            batch: about to be trained on.
            module: whose random states a loader leaves alone.
            to_device: moves a batch of the loader to where the module is.
            processes: that measure together.
        """
        if self.choice == "train":
            if self.n_batches == 1:
                return [batch]
            self.collect(batch)
        elif isinstance(self.choice, DataLoader) and not self._loaded:
            inner = getattr(self.choice.batch_sampler, "sampler", None)
            apart = isinstance(self.choice.sampler, DistributedSampler) or isinstance(inner, DistributedSampler)
            rank, size = (0, 1) if apart else (processes.rank, processes.size)
            share = slice(rank, None, size)
            self._held = first_batches(self.choice, self.n_batches, module, prepare=to_device, share=share)
            self._loaded = True
        if not self._full:
            return None
        found = self._held
        if self.choice == "train":
            self.forget()
        return found

    def check_loader(self) -> None:
        """Raise ValueError for a loader that is known to be too short."""
        if not isinstance(self.choice, DataLoader):
            return
        try:
            n = len(self.choice)
        except (TypeError, NotImplementedError):
            return
        if n < self.n_batches:
            raise ValueError(f"n_batches: {self.n_batches} batches were asked for, and the DataLoader has {n}")
