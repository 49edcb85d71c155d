"""Train both networks with a probe, an offline W&B run and a CSV log each, and print what the probes measured."""

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
from lightning_spectral.demo.networks import CHARACTERS, CharacterGPT, DigitsResNet, PythonSource, digits
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report import print_report, run_of, write_page
from lightning_spectral.report.runs.run import Run
from lightning_spectral.report.trackers import offline_wandb_run

GRADIENT_SAMPLES = 1024
"""Samples of each gradient."""


@dataclass(frozen=True)
class Experiment:
    """One training run of the demo."""

    name: str
    title: str
    module: pl.LightningModule
    data: Dataset[Tensor] | Dataset[tuple[Tensor, ...]]
    batch_size: int
    steps: int
    every_n_steps: int
    max_samples: int


def experiments(steps_factor: float = 1.0) -> list[Experiment]:
    """Return the two runs; a factor below 1 shortens them."""

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
    """Compute with one thread: with more, sums have another order and other results, and small nets are no faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run(folder: str | Path = "demo-runs", *, steps_factor: float = 1.0) -> dict[str, list[SpectralReport]]:
    """Train, probe and print; return the reports of each run by its name."""
    folder = Path(folder)
    console = Console()
    _hush_lightning()
    runs = experiments(steps_factor)
    histories, wandb_folders, pages = {}, {}, []
    for experiment in runs:
        name, title = experiment.name, experiment.title
        console.print(f"\n[bold]{title}[/bold], {experiment.steps} steps")
        histories[name], wandb_folders[name] = _train(experiment, folder)
        pages.append(_page(run_of(histories[name], name), folder / name, title))
    for experiment in runs:
        print_report(histories[experiment.name][-1], experiment.title)
    _print_paths(console, wandb_folders, pages)
    return histories


def _page(run: Run, folder: Path, title: str) -> str:
    """Write a run's page and return its path; without plotly, what to do to get it."""
    try:
        return _relative(write_page(run, folder / "report.html", title=title))
    except ImportError as error:
        return f"none of {run.name}: {error}; then lightning-spectral report {_relative(folder)}"


def _print_paths(console: Console, wandb_folders: Mapping[str, Path], pages: Sequence[str]) -> None:
    beside_python = Path(sys.executable).with_name("wandb")
    wandb = "wandb" if shutil.which("wandb") or not beside_python.exists() else _relative(beside_python)
    lines = []
    for name, path in wandb_folders.items():
        folder = _relative(path)
        lines += [f"\n{name}: W&B run in {folder}", f"  see it in this terminal:  {wandb} leet run {folder}"]
    lines += ["\nPages for a browser, each one file:", *(f"  {page}" for page in pages)]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _relative(path: Path) -> str:
    """Return a path relative to the current folder if it lies below, else the absolute path."""
    # Without following links: a virtual environment's programs may be links.
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def _hush_lightning() -> None:
    """Silence Lightning's notes on hardware and workers, but not its progress bar."""
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(f"{package}.utilities.rank_zero").setLevel(logging.ERROR)
    for message in ("does not have many workers", "smaller than the logging interval", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def _train(experiment: Experiment, folder: Path) -> tuple[list[SpectralReport], Path]:
    home = folder / experiment.name
    home.mkdir(parents=True, exist_ok=True)
    wandb_run = offline_wandb_run("lightning-spectral-demo", experiment.name, home)
    loader = DataLoader(experiment.data, experiment.batch_size, shuffle=True, drop_last=True)
    # A loader and a number of samples of its own, for with "auto" the clock decides how many: each run gives the same.
    generator = torch.Generator().manual_seed(1)
    probed = DataLoader(experiment.data, experiment.batch_size, shuffle=True, generator=generator)
    probe = SpectralProbe(
        every_n_steps=experiment.every_n_steps,
        batch=probed,
        max_samples=experiment.max_samples,
        gradient_samples=GRADIENT_SAMPLES,
    )
    trainer = pl.Trainer(
        max_steps=experiment.steps,
        # The steps end training; without a number of epochs the bar counts to epoch -2.
        max_epochs=math.ceil(experiment.steps / len(loader)),
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
