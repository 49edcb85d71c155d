"""A copy's LightningModules are attached, or not, as the originals are, through Lightning's public properties."""

from contextlib import contextmanager

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn

from lightning_spectral.isolation.muting import NullLogger, silence_logging, silent_trainers
from lightning_spectral.isolation.sandbox import isolated


class Part(LightningModule):
    def training_step(self, batch, batch_idx):
        return batch.sum()


class Whole(Part):
    def __init__(self):
        super().__init__()
        self.attached, self.late, self.listed = Part(), Part(), nn.ModuleList([Part()])


@contextmanager
def copied(model):
    trainers = silent_trainers(model)
    with isolated(model, stand_ins=trainers) as copy:
        silence_logging(copy.module, model, trainers)
        yield copy.module


def test_parts_hold_one_trainer_whose_loggers_are_silent_and_parts_without_one_hold_none(tmp_path):
    model, trainer = Whole(), Trainer(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    model.trainer = trainer
    model.late.trainer = None
    with copied(model) as copy:
        assert copy.trainer is copy.attached.trainer is not trainer
        assert copy.trainer.max_epochs == trainer.max_epochs
        assert [type(logger) for logger in copy.trainer.loggers] == [NullLogger] * len(trainer.loggers)
        for part in (copy.late, copy.listed[0]):
            with pytest.raises(RuntimeError, match="not attached"):
                part.trainer  # noqa: B018
        assert copy.log("loss", torch.ones(())) is None
    assert model.trainer is model.attached.trainer is trainer


@pytest.mark.parametrize("trainer", [object(), property(lambda self: object())], ids=["attribute", "property"])
def test_a_trainer_of_another_kind_is_the_modules_own_affair(trainer):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

    Plain.trainer = trainer
    model = Plain()
    assert silent_trainers(model) == {}
    with copied(model) as copy:
        assert copy.training_step(torch.ones(1, 2), 0).ndim == 0
