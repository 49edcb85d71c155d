"""LightningModules that train a network on the batches of `examples.paper.data`, and the loaders of a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from examples.paper.data import Parts, loader


class Trained(pl.LightningModule):
    """A network, its loss over the last dimension of its output, and its optimizer, by default with a cosine schedule.

    Logs train_loss, val_loss and test_loss.

    Args:
        network: any.
        lr: learning rate of AdamW at the start.
        weight_decay: of AdamW.
        optimizer: makes another optimizer of this module, in place of AdamW.
        cosine: let the rate fall to 0 at the end of the run; else it stays as it is.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        optimizer: Callable[[nn.Module], Optimizer] | None = None,
        *,
        cosine: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.lr, self.weight_decay, self.make_optimizer, self.cosine = lr, weight_decay, optimizer, cosine

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.network(x)  # type: ignore[no-any-return]

    def measured(self, batch: Any) -> dict[str, Tensor]:
        """The loss, and what else is to be logged of a batch."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._logged("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log a batch."""
        self._logged("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log a batch."""
        self._logged("test", batch)

    def _logged(self, part: str, batch: Any) -> Tensor:
        found = self.measured(batch)
        size = len(batch) if isinstance(batch, Tensor) else len(batch[0])
        self.log_dict({f"{part}_{name}": value for name, value in found.items()}, batch_size=size, prog_bar=True)
        return found["loss"]

    def configure_optimizers(self) -> Any:
        """AdamW or the optimizer given, its rate falling over the steps of the run."""
        if self.make_optimizer is None:
            optimizer: Optimizer = AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = self.make_optimizer(self)
        if not self.cosine:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Classifier(Trained):
    """Trains on batches (images, labels); logs accuracies too."""

    def measured(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy in nats, and the share of images that are right."""
        images, labels = batch
        logits = self(images)
        right = (logits.detach().argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": right}


class LanguageModel(Trained):
    """Trains on batches of tokens (N, length + 1), each of which is predicted from those before it."""

    def measured(self, batch: Tensor) -> dict[str, Tensor]:
        """Cross-entropy in nats per token."""
        logits = self(batch[:, :-1])
        return {"loss": F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())}


class Loaders(pl.LightningDataModule):
    """The loaders of a data set.

    Args:
        parts: the data set.
        batch_size: samples per training step.
        eval_batch_size: samples per batch of validation and test; None: as many.
        workers: processes that make the batches; 0: none beside the one that trains.

    Raises:
        ValueError: if there are fewer samples to train on than batch_size.
    """

    def __init__(self, parts: Parts, batch_size: int, *, eval_batch_size: int | None = None, workers: int = 0) -> None:
        super().__init__()
        self.parts = parts
        self.train = loader(parts.train, batch_size, shuffle=True, workers=workers)
        self.val, self.test = (
            loader(part, eval_batch_size or batch_size, workers=workers) for part in (parts.val, parts.test)
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, whole batches only."""
        return self.train

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return self.val

    def test_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return self.test
