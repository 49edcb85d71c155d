"""Runs that are killed and resumed, in processes of their own: `python tests/killed.py FOLDER` writes FOLDER/*.json.

A run is trained whole, killed in a probe, killed in a step, and told to end (SIGTERM) in a probe. Each of the last
three is resumed from its last checkpoint. In one more W&B is killed. Every run is a fork of this process, which has
imported all that takes time to import.
"""

from __future__ import annotations

import csv
import inspect
import json
import os
import random
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

# Of a process that has W&B running, whose service would be taken, and not be a child to kill.
os.environ.pop("WANDB_SERVICE", None)

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralWarning
from lightning_spectral.report.runs.spectra_file import read_reports

STEPS, KILLED_AT = 14, 8
SIGTERM_CODE = 3
FAULTS = {"probe": signal.SIGKILL, "step": signal.SIGKILL, "term": signal.SIGTERM}


class Module(pl.LightningModule):
    """Dropout and statistics, and an optimizer that steps with what the probe measures."""

    def __init__(self, fault=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 5))
        self.fault = fault

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        measured = "log" in self.__dict__  # a probe's copy, whose logging is muted
        if measured and self.fault in ("probe", "term") and self.trainer.global_step == KILLED_AT:
            os.kill(os.getpid(), FAULTS[self.fault])
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):
        if self.fault == "step" and self.trainer.global_step == KILLED_AT:
            os.kill(os.getpid(), FAULTS[self.fault])

    def configure_optimizers(self):
        return SpectralNewton(SpectralNewton.groups(self), lr=0.02, alpha="probe")

    def on_save_checkpoint(self, checkpoint):
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint):
        torch.set_rng_state(checkpoint["random"])


class Batches:
    """Six batches in an order that goes on where a checkpoint left it, as Lightning asks of a loader."""

    def __init__(self):
        self.done = 0

    def __len__(self):
        return 6

    def __iter__(self):
        self.done %= 6
        while self.done < 6:
            self.done += 1
            generator = torch.Generator().manual_seed(self.done)
            yield torch.randn(12, 6, generator=generator), torch.randint(0, 5, (12,), generator=generator)

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def saved_on_exception(folder, **options):
    """Callbacks that write last.ckpt as configured and at an exception; an old Lightning has one just for that."""
    if "save_on_exception" in inspect.signature(ModelCheckpoint).parameters:
        return [ModelCheckpoint(folder, save_last=True, save_on_exception=True, **options)]
    return [ModelCheckpoint(folder, save_last=True, **options), OnExceptionCheckpoint(folder, "last")]


def train(folder, name, fault=None, ckpt_path=None):
    pl.seed_everything(3, verbose=False)
    module = Module(fault)
    probe = SpectralProbe(every_n_steps=2, top_k=4, log_tables=True, gradient_samples=None)
    # An old Lightning saves at the end of an epoch too, unless told not to.
    saved = saved_on_exception(folder / name, save_top_k=0, every_n_train_steps=5, save_on_train_epoch_end=False)
    trainer = pl.Trainer(
        max_steps=STEPS, max_epochs=-1, callbacks=[probe, *saved], log_every_n_steps=1, accelerator="cpu",
        logger=CSVLogger(folder, name="csv", version=name, flush_logs_every_n_steps=1), enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, Batches(), ckpt_path=ckpt_path)
    result = {
        "weights": {key: value.double().tolist() for key, value in module.state_dict().items()},
        "reports": [{**report.to_dict(), "seconds": 0, "gradient_seconds": 0} for report in probe.history],
        "probes": probe.probes,
        "alphas": [trainer.optimizers[0].alpha_of(module.net[i].weight) for i in (0, 4)],
        "random": [torch.get_rng_state().tolist(), random.getstate()[1], np.random.get_state()[1].tolist()],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(result))


class KillWandb(pl.Callback):
    """Kill W&B's service, a child of this process, before a step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step != KILLED_AT:
            return
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                name, _, rest = stat.read_text().rpartition(")")
                if int(rest.split()[1]) == os.getpid() and "wandb" in name:
                    os.kill(int(stat.parent.name), signal.SIGKILL)


def without_wandb(folder):
    """Train while W&B is killed; the module itself logs nothing."""
    module = Module()
    module.log = lambda *args: None
    probe = SpectralProbe(every_n_steps=1, top_k=4, gradient_samples=None)
    trainer = pl.Trainer(
        max_steps=STEPS, max_epochs=-1, callbacks=[KillWandb(), probe], accelerator="cpu", enable_progress_bar=False,
        logger=WandbLogger(save_dir=folder, offline=True), enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Batches())
    told = [str(w.message) for w in caught if issubclass(w.category, SpectralWarning)]
    (folder / "wandb.json").write_text(json.dumps([trainer.global_step, probe.probes, told]))


def rows(folder, name):
    """What a run logged, without the time it took."""
    with open(folder / "csv" / name / "metrics.csv") as file:
        found = list(csv.DictReader(file))
    times = ("spectral/probe_seconds", "spectral/probe_overhead")
    return [{key: value for key, value in row.items() if value and key not in times} for row in found]


def table(folder, name):
    return (folder / "csv" / name / "spectral_layers.csv").read_text().splitlines()


def reports(folder, name):
    """What a run kept in spectra.jsonl, without the time it took."""
    return [
        {**report.to_dict(), "seconds": 0, "gradient_seconds": 0}
        for report in read_reports(folder / "csv" / name / "spectra.jsonl")
    ]


def forked(call, *args):
    """Run a function in a fork of this process; how that ended, as `waitstatus_to_exitcode` tells it."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        call(*args)
        code = 0
    except SystemExit as end:
        code = SIGTERM_CODE if type(end).__name__ == "SIGTERMException" else 4
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(folder):
    torch.set_num_threads(1)
    ended = {"whole": forked(train, folder, "whole")}
    for fault in FAULTS:
        ended[fault] = forked(train, folder, fault, fault)
        ended[f"{fault}-resumed"] = forked(train, folder, f"{fault}-resumed", None, folder / fault / "last.ckpt")
    ended["wandb"] = forked(without_wandb, folder)
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
