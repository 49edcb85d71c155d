"""A copy's LightningModules are attached, or not, as the originals are, through Lightning's public properties."""

import copy
import functools
import gc
import math
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from modules import fit
from pytorch_lightning import LightningModule, Trainer
from tiny import Repeated, Tiny, batch_of
from torch import nn

from lightning_spectral import SpectralProbe
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


SILENT = {
    "membership": (lambda s: 3 in s, False),
    "iteration": (lambda s: [item for item in s], []),  # noqa: C416
    "items": (lambda s: [key for key, _ in s.items()], []),
    "keywords": (lambda s: dict(**s), {}),
    "unpacking": (lambda s: [*s, *s.config], []),
    "length": (len, 0),
    "next": (lambda s: next(s, None), None),
    "truth": (lambda s: bool(s.a.b()["c"]), False),
    "numbers": (lambda s: (int(s), float(s), range(s)), (0, 0.0, range(0))),
    "comparison": (lambda s: (s < 1, s > 1, s >= s, s == 1), (False,) * 4),
    "set": (lambda s: [setattr(s, "a", 3), delattr(s, "a"), s.__setitem__("b", 4), bool(s.a), bool(s["b"])], None),
    "sum": (lambda s: sum(s), 0),
    "sorted": (lambda s: sorted(s, key=lambda item: item[0]), []),
    "format": (lambda s: f"{s:>10.3f}" == str(s), True),
    "is_hashed": (lambda s: len({s: 1, s.a: 2}), 1),
}


@pytest.mark.parametrize("name", SILENT)
def test_a_silent_logger_answers_as_something_empty(name):
    ask, answer = SILENT[name]
    value = ask(NullLogger())
    if answer is not None:
        assert value == answer


def test_a_silent_logger_calculates_with_anything_and_stays_silent():
    silent = NullLogger()
    values = [
        silent + 1,
        2 * silent,
        silent / 3 - silent,
        silent**2,
        -silent,
        abs(silent),
        silent | {},
        round(silent, 2),
        np.ones(2) * silent,
    ]
    values += [torch.ones(2) * silent, copy.deepcopy(silent)]
    silent += 1
    assert all(value is silent for value in values)
    with silent.timer("step") as inside:
        assert inside is silent


def test_paths_of_a_silent_logger_lie_in_a_folder_that_goes_with_it():
    silent = NullLogger()
    folder = Path(silent.save_dir)
    with open(os.path.join(silent.dir, "a.txt"), "w") as file:
        file.write(f"{silent}/b")
    assert (folder / "a.txt").read_text() == f"{folder}/b"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del silent
        gc.collect()
    assert not folder.exists()


class Settings(dict):
    """As W&B's config: a mapping that a loss depends on."""

    __module__ = "wandb.sdk.config"


class Run:
    """As W&B's run."""

    __module__ = "wandb.sdk.run"

    def __init__(self):
        self.logged = []

    def log(self, values):
        self.logged.append(values)


class Observer:
    def __init__(self, calls):
        self.calls = calls

    def look(self, module, inputs, output):
        self.calls.append(type(module).__name__)

    look.__module__ = "wandb.integration.torch"


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_a_trackers_hooks_and_runs_see_the_training_alone():
    class Tracked(Tiny):
        def __init__(self):
            super().__init__()
            self.run, self.settings = Run(), Settings(weight=3.0)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx) * self.settings["weight"]
            self.run.log({"loss": loss.item()})
            if 7 in self.run.seen or self.run.step % 2 == 1:
                raise AssertionError("a silent run has seen nothing")
            return loss

    seen = []
    for probed in (False, True):
        calls = []
        module, probe = Tracked(), SpectralProbe(every_n_steps=1)
        Run.seen, Run.step = [], 0
        observer = Observer(calls)
        module.net[0].register_forward_hook(observer.look)
        module.net[2].register_forward_hook(functools.partial(observer.look))
        module.net.register_forward_hook(lambda module, inputs, output: output * 2)
        fit(module, [probe] if probed else [], data=Repeated(batch_of()), batch_size=None, steps=3)
        assert probe.failed_probes == 0
        seen.append((calls, len(module.run.logged)))
    assert seen[0] == seen[1] == (["Linear"] * 6, 3)
    assert math.isclose(probe.history[0].loss, module.run.logged[0]["loss"], rel_tol=1e-5)
