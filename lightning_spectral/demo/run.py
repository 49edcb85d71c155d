"""Train both networks with a probe, an offline W&B run and a CSV log each, and print what the probes saw."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_spectral.callbacks import SpectralProbe
from lightning_spectral.demo.data import CHARACTERS, PythonSource, digits
from lightning_spectral.demo.networks import CharacterGPT, DigitsResNet
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report import print_report, run_of, write_page
from lightning_spectral.report.page.build import plotly_js
from lightning_spectral.report.trackers import offline_wandb_run


@dataclass(frozen=True)
class Experiment:
    """One training run of the demo.

    Attributes:
        name: of its folder and W&B run.
        title: of its tables.
        module: what is trained.
        data: what it is trained on.
        batch_size: samples per step.
        steps: optimizer steps.
        every_n_steps: spacing of the probes.
        max_samples: samples a probe measures on.
    """

    name: str
    title: str
    module: pl.LightningModule
    data: Dataset[Tensor] | Dataset[tuple[Tensor, ...]]
    batch_size: int
    steps: int
    every_n_steps: int
    max_samples: int


def experiments(steps_factor: float = 1.0) -> list[Experiment]:
    """The two runs; a factor below 1 shortens them."""

    def scaled(steps: int) -> int:
        return max(1, round(steps * steps_factor))

    length = 64
    pl.seed_everything(0, verbose=False)
    resnet = DigitsResNet()
    gpt = CharacterGPT(len(CHARACTERS), length)
    return [
        Experiment("resnet-digits", "ReLU ResNet on digits", resnet, digits(), 512, scaled(60), scaled(12), 512),
        Experiment("gpt-python", "GPT on Python source", gpt, PythonSource(length), 64, scaled(400), scaled(80), 64),
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: more of them sum in another order, and training goes elsewhere. Small nets gain none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run(folder: str | Path = "demo-runs", *, steps_factor: float = 1.0) -> dict[str, list[SpectralReport]]:
    """Train, probe and print; return the reports of each run by its name.

    Args:
        folder: where the logs go.
        steps_factor: shortens the runs, for a test.
    """
    # What is missing is better said before training than after it.
    plotly_js()
    folder = Path(folder)
    console = Console()
    _hush_lightning()
    planned = experiments(steps_factor)
    histories, runs, pages = {}, {}, []
    for experiment in planned:
        console.print(f"\n[bold]{experiment.title}[/bold], {experiment.steps} steps")
        history, runs[experiment.name] = _train(experiment, folder)
        histories[experiment.name] = history
        for report in history:
            report.to_json(folder / experiment.name / f"step-{report.step}.json")
        run_shown = run_of(history, experiment.name)
        pages.append(write_page(run_shown, folder / experiment.name / "report.html", title=experiment.title))
    for experiment in planned:
        print_report(histories[experiment.name][-1], experiment.title)
    _say_where(console, runs, pages)
    return histories


def _say_where(console: Console, runs: Mapping[str, Path], pages: Sequence[Path]) -> None:
    beside_python = Path(sys.executable).with_name("wandb")
    wandb = "wandb" if shutil.which("wandb") or not beside_python.exists() else _from_here(beside_python)
    lines = []
    for name, path in runs.items():
        where = _from_here(path)
        lines += [f"\n{name}: W&B run in {where}", f"  see it in this terminal:  {wandb} leet run {where}"]
    lines += ["\nPages for a browser, each one file:", *(f"  {_from_here(page)}" for page in pages)]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _from_here(path: Path) -> str:
    """A path below the current folder as seen from it, another whole."""
    # Without following links: a virtual environment's programs may be some.
    whole = Path(os.path.abspath(path))
    return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole)


def _hush_lightning() -> None:
    """Leave the progress bar, and of Lightning's notes on hardware and workers nothing."""
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(f"{package}.utilities.rank_zero").setLevel(logging.ERROR)
    for message in ("does not have many workers", "smaller than the logging interval", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def _train(experiment: Experiment, folder: Path) -> tuple[list[SpectralReport], Path]:
    probe = SpectralProbe(every_n_steps=experiment.every_n_steps, max_samples=experiment.max_samples)
    home = folder / experiment.name
    home.mkdir(parents=True, exist_ok=True)
    wandb_run = offline_wandb_run("lightning-spectral-demo", experiment.name, home)
    loader = DataLoader(experiment.data, experiment.batch_size, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        max_steps=experiment.steps + 1,
        # Which the steps end; without it the bar counts to epoch -2.
        max_epochs=math.ceil((experiment.steps + 1) / len(loader)),
        logger=[CSVLogger(home, name="csv"), WandbLogger(save_dir=home, experiment=wandb_run)],
        callbacks=[probe],
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(experiment.module, loader)
    run_folder = Path(wandb_run.dir).parent
    wandb_run.finish()
    if not probe.history:
        raise RuntimeError(f"{experiment.name}: the probe measured nothing; its warnings say why")
    return probe.history, run_folder
