"""Train through a Trainer of Lightning, whoever builds it, and keep the module and a batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from torch import Tensor, nn

Trained = tuple[nn.Module, Any]
STEPS = 50
CALLBACKS: list[Any] = []
"""Callbacks that every Trainer gets beside those of its program."""


def training_loss(module: nn.Module, batch: Any) -> Tensor:
    """Return the loss of the module's own training_step."""
    output = module.training_step(batch, 0)  # type: ignore[operator]
    return output["loss"] if isinstance(output, Mapping) else output  # type: ignore[no-any-return]


def through(train: Callable[[dict[str, Any]], Any], **trainer: Any) -> Trained:
    """Call a program with the arguments of its Trainer; return the module it trained, without Trainer, and a batch."""
    kept: list[Trained] = []

    # Of both packages' classes, as each Trainer takes its own. Some programs train a copy of what they are given.
    class Keep(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            kept[:] = [(module, batch)]

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": [Keep(), *CALLBACKS],
        }
        train({name: value for name, value in (options | trainer).items() if value is not None})
    module, batch = kept[0]
    module.trainer = None
    return module, batch


def answering(trained: Trained, **answers: Any) -> Trained:
    """Give a module the answers to what it would ask its Trainer."""
    module, batch = trained
    module.__class__ = type(type(module).__name__, (type(module),), answers)
    return module, batch


class Plain(lightning.pytorch.LightningModule):
    """A network with a loss of its own, trained by AdamW.

    Args:
        network: any module.
        loss: (network, batch) -> scalar.
    """

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def plain(network: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]) -> Trained:
    """Train a network and a loss that bring no Trainer of their own."""
    module = Plain(network, loss)
    return through(lambda options: lightning.pytorch.Trainer(**options).fit(module, batches), max_epochs=-1)
