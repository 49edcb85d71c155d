"""What share of wall time the probe takes with nothing configured, in a run of one minute.

    python examples/benchmarks/overhead.py [--output overhead.json] [--seconds 60]

A GPT on Python's source and a ResNet on digits, each trained for so many seconds with `SpectralProbe()`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_spectral import SpectralProbe
from lightning_spectral.demo.networks import CHARACTERS, CharacterGPT, DigitsResNet, PythonSource, digits

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks.machine import environment


def figures(
    name: str,
    network: pl.LightningModule,
    data: Dataset[Any],
    batch_size: int,
    seconds: float,
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """Train for so many seconds; what the probes took of them."""
    probe = SpectralProbe()
    trainer = pl.Trainer(
        max_time=timedelta(seconds=seconds), max_epochs=-1, callbacks=[probe], accelerator=accelerator, devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(network, DataLoader(data, batch_size, shuffle=True))
    wall = time.perf_counter() - started
    row = {
        "max_overhead": probe.budget.max_overhead,
        "wall_seconds": wall,
        "steps": trainer.global_step,
        "probes": probe.probes,
        "probe_seconds": probe.budget.probe_seconds,
        "share": probe.budget.probe_seconds / wall,
    }
    print(name, row, flush=True)
    return row


def main() -> None:
    """Run both and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="overhead.json")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    gpt = CharacterGPT(len(CHARACTERS), 64, width=64, heads=4, depth=2)
    result = {
        "environment": environment(threads=options.threads),
        "figures": {
            "gpt": figures("gpt", gpt, PythonSource(64), 32, options.seconds),
            "resnet": figures("resnet", DigitsResNet(), digits(), 128, options.seconds),
        },
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
