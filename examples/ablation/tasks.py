"""The demo's networks with validation and test, and their data in three parts that no seed changes."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_spectral.demo.networks import CHARACTERS, CharacterGPT, DigitsResNet, PythonSource, digits


class Digits(DigitsResNet):
    """`DigitsResNet` that logs val_loss, test_loss and test_accuracy."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean loss."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean loss and the accuracy."""
        logits = self(batch[0])
        self.log("test_loss", F.cross_entropy(logits, batch[1]))
        self.log("test_accuracy", (logits.argmax(1) == batch[1]).float().mean())


class Language(CharacterGPT):
    """`CharacterGPT` of Python's source that logs val_loss and test_loss, in nats per character.

    Args:
        length: characters it sees at once.
        width: of the residual stream.
        depth: number of blocks.
    """

    def __init__(self, length: int = 64, width: int = 64, depth: int = 2) -> None:
        super().__init__(len(CHARACTERS), length, width, depth=depth)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean loss."""
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean loss."""
        self.log("test_loss", self._loss(batch))

    def _loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class ThreeParts(pl.LightningDataModule):
    """Samples for training, validation and test, drawn once and for all: a run's seed decides only their order.

    Args:
        batch_size: samples per training step.
        held_out: samples of the validation part, and of the test part.
    """

    def __init__(self, batch_size: int, held_out: int) -> None:
        super().__init__()
        self.batch_size, self.held_out = batch_size, held_out

    def samples(self) -> Dataset[Any]:
        """All samples, in an order that is cut into test, validation and training part."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Draw the parts."""
        samples = self.samples()
        order = torch.randperm(len(samples), generator=fixed()).tolist()  # type: ignore[arg-type]
        cuts = (order[: self.held_out], order[self.held_out : 2 * self.held_out], order[2 * self.held_out :])
        self.test, self.val, self.train = (Subset(samples, indices) for indices in cuts)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, with whole batches only."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return DataLoader(self.val, 256)

    def test_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return DataLoader(self.test, 256)


class DigitsData(ThreeParts):
    """scikit-learn's digits with noise, without which all optimizers get them right.

    Args:
        batch_size: images per training step.
        held_out: images of the validation part, and of the test part.
        noise: standard deviation of the noise of each pixel, whose own is 1.
        wrong_labels: share of the training part whose labels are drawn anew.
    """

    def __init__(
        self, batch_size: int = 64, held_out: int = 350, noise: float = 1.0, wrong_labels: float = 0.0
    ) -> None:
        super().__init__(batch_size, held_out)
        self.noise, self.wrong_labels = noise, wrong_labels

    def samples(self) -> TensorDataset:
        """Images (1, 8, 8) and labels."""
        images, labels = digits().tensors
        images = images + self.noise * torch.randn(images.shape, generator=fixed())
        training = torch.randperm(len(labels), generator=fixed())[2 * self.held_out :]
        wrong = training[: round(self.wrong_labels * len(training))]
        labels[wrong] = torch.randint(10, wrong.shape, generator=fixed())
        return TensorDataset(images, labels)


class LanguageData(ThreeParts):
    """Windows of Python's source.

    Args:
        batch_size: windows per training step.
        held_out: windows of the validation part, and of the test part.
        length: characters a network sees at once.
        characters: read in all.
    """

    def __init__(
        self, batch_size: int = 64, held_out: int = 512, length: int = 64, characters: int = 2_000_000
    ) -> None:
        super().__init__(batch_size, held_out)
        self.length, self.characters = length, characters

    def samples(self) -> PythonSource:
        """Windows of length + 1 characters."""
        return PythonSource(self.length, self.characters)


def fixed() -> torch.Generator:
    """Random numbers that no seed of a run changes."""
    return torch.Generator().manual_seed(0)
