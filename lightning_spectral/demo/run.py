"""Train both networks with a probe, an offline W&B run and a CSV log each, and print what the probes saw."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_spectral.callbacks import SpectralProbe
from lightning_spectral.demo.data import CHARACTERS, PythonSource, digits
from lightning_spectral.demo.networks import CharacterGPT, DigitsResNet
from lightning_spectral.record import SpectralReport
from lightning_spectral.report import print_report, run_of, write_page
from lightning_spectral.report.page import plotly_js


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


def run(folder: str | Path = "demo-runs", *, steps_factor: float = 1.0) -> dict[str, SpectralReport]:
    """Train, probe and print; return the last report of each run by its name.

    Args:
        folder: where the logs go.
        steps_factor: shortens the runs, for a test.
    """
    # What is missing is better said before training than after it.
    plotly_js()
    folder = Path(folder)
    console = Console()
    _hush_lightning()
    # W&B's own summary of every key would bury the tables.
    os.environ.setdefault("WANDB_SILENT", "true")
    planned = experiments(steps_factor)
    reports, runs, pages = {}, {}, []
    for experiment in planned:
        console.print(f"\n[bold]{experiment.title}[/bold], {experiment.steps} steps")
        history, runs[experiment.name] = _train(experiment, folder)
        reports[experiment.name] = history[-1]
        for report in history:
            report.to_json(folder / experiment.name / f"step-{report.step}.json")
        run_shown = run_of(history, experiment.name)
        pages.append(write_page(run_shown, folder / experiment.name / "report.html", title=experiment.title))
    for experiment in planned:
        print_report(reports[experiment.name], experiment.title)
    beside_python = Path(sys.executable).with_name("wandb")
    wandb = "wandb" if shutil.which("wandb") or not beside_python.exists() else os.path.relpath(beside_python)
    for name, path in runs.items():
        console.print(f"\n{name}: W&B run in {path}", soft_wrap=True)
        console.print(f"  see it in this terminal:  {wandb} leet run {path}", soft_wrap=True)
    console.print("\nPages for a browser, each one file:")
    for page in pages:
        console.print(f"  {page}", soft_wrap=True, markup=False, highlight=False)
    return reports


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
    wandb_logger = WandbLogger(name=experiment.name, project="lightning-spectral-demo", save_dir=home, offline=True)
    trainer = pl.Trainer(
        max_steps=experiment.steps + 1,
        logger=[CSVLogger(home, name="csv"), wandb_logger],
        callbacks=[probe],
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    loader = DataLoader(experiment.data, experiment.batch_size, shuffle=True, drop_last=True)
    trainer.fit(experiment.module, loader)
    run_folder = Path(wandb_logger.experiment.dir).parent
    wandb_logger.experiment.finish()
    if not probe.history:
        raise RuntimeError(f"{experiment.name}: the probe measured nothing; its warnings say why")
    return probe.history, run_folder
