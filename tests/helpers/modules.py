"""LightningModules to train in tests, with everything in them that a probe could disturb."""

from __future__ import annotations

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from cases import Block
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9 and later")


class Stateful(pl.LightningModule):
    """A metric, a counter, a moving average, a list of losses, and draws from three random generators."""

    classes = 5

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(self.classes)
        self.steps_seen = 0
        self.average = torch.zeros(())
        self.losses = []
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        inputs = self.augmented(inputs)
        logits = self(inputs).flatten(0, -2)
        labels = labels.flatten()
        loss = F.cross_entropy(logits, labels)
        self.steps_seen += 1
        self.average = 0.9 * self.average + 0.1 * loss.detach()
        self.losses.append(loss)
        self.losses = self.losses[-2:]
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.logger.log_metrics({"by_hand": loss.item()}, step=self.trainer.global_step)
        self.log("noise", random.random() + np.random.rand() + torch.rand((), generator=self.generator))
        return loss

    def augmented(self, inputs):
        return inputs

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ConvNet(Stateful):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2),
            nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def augmented(self, inputs):
        return inputs.add_(0.01 * torch.randn_like(inputs))

    @staticmethod
    def data():
        generator = torch.Generator().manual_seed(0)
        return TensorDataset(
            torch.randn(96, 1, 8, 8, generator=generator), torch.randint(0, 5, (96,), generator=generator)
        )


class GPT(Stateful):
    classes = 11

    def __init__(self):
        super().__init__()
        self.tokens, self.block, self.dropout = nn.Embedding(11, 8), Block(8), nn.Dropout(0.1)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        return self.head(self.dropout(self.block(self.dropout(self.tokens(tokens)))))

    @staticmethod
    def data():
        text = torch.randint(0, 11, (64, 8), generator=torch.Generator().manual_seed(0))
        return TensorDataset(text[:, :-1].contiguous(), text[:, 1:].contiguous())


class ProbeRows(DummyLogger):
    """A logger that keeps what a probe logs, and apart from it what is logged of the step after it and at the end."""

    def __init__(self):
        super().__init__()
        self.rows, self.steps, self.closing = [], [], []

    def log_metrics(self, metrics, step=None):
        if any(key.endswith("/step/scale") for key in metrics):
            self.steps.append((step, metrics))
        elif [key.rpartition("/")[2] for key in metrics] == ["probe_overhead"]:
            self.closing.append((step, metrics))
        elif any(key.startswith("spectral") for key in metrics):
            self.rows.append((step, metrics))


def fit(
    module, callbacks=(), *, steps=6, logger=False, trainer_class=pl.Trainer, data=None, batch_size=16, ckpt_path=None,
    **options,
):  # fmt: skip
    """Train on the CPU without output; returns the Trainer."""
    trainer = trainer_class(
        max_steps=steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        logger=logger,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "log_every_n_steps": 1, **options},
    )
    loader = DataLoader(data or module.data(), batch_size, shuffle=True)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer
