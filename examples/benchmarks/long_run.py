"""What 2,000 probes of one run leave in memory.

    python examples/benchmarks/long_run.py [--output long_run.json] [--figure long_run.png] [--probes 2000] [--wandb]

A small network is trained with a probe before each step and a CSVLogger, or W&B offline. Every 50 probes: the process's
memory, the tensors with a graph that are alive, its open files, and what Python holds by `tracemalloc`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_spectral
from lightning_spectral import SpectralProbe

EVERY = 50
"""Probes between two looks."""

SETTLED = 100
"""Probes after which nothing is to grow: caches and the history of 100 reports are full."""

MOST_GROWTH = 5.0
"""MB that the process may grow by after that."""


class Small(pl.LightningModule):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(128, 10)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy, logged."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Watch(pl.Callback):
    """Note, every so many steps, what the process holds."""

    def __init__(self, every: int = EVERY) -> None:
        self.every = every
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, once the step is done."""
        if trainer.global_step % self.every == 0:
            gc.collect()
            self.rows.append({"probes": trainer.global_step} | held())


def held() -> dict[str, float]:
    """Resident memory in MB, tensors with a graph, open files, and MB of Python's objects where they are traced."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    graphs = sum(type(x) is torch.Tensor and x.grad_fn is not None for x in gc.get_objects())
    return {
        "memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "graphs": graphs,
        "files": len(os.listdir("/proc/self/fd")),
        "python_mb": tracemalloc.get_traced_memory()[0] / 2**20,
    }


def long_run(probes: int, folder: str, *, wandb: bool = False, every: int = EVERY) -> tuple[Watch, SpectralProbe]:
    """Train for so many steps with a probe before each."""
    torch.manual_seed(0)
    logger: Any = WandbLogger(save_dir=folder, offline=True) if wandb else CSVLogger(folder)
    probe, watch = SpectralProbe(every_n_steps=1, top_k=8), Watch(every)
    trainer = pl.Trainer(
        max_steps=probes, max_epochs=-1, callbacks=[probe, watch], logger=logger, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
    trainer.fit(Small(), DataLoader(data, 16, shuffle=True))
    return watch, probe


def figure(runs: dict[str, list[dict[str, float]]], path: str) -> None:
    """Memory over the probes."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5, 3), layout="constrained")
    axes = drawing.add_subplot()
    for name, rows in runs.items():
        axes.plot([row["probes"] for row in rows], [row["memory_mb"] for row in rows], label=name)
    axes.axvline(SETTLED, color="#777777", linewidth=0.8)
    axes.set(xlabel="probes", ylabel="resident memory (MB)", ylim=(0, None))
    axes.legend()
    drawing.savefig(path, dpi=120)


def main() -> None:
    """Run, check and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="long_run.json")
    parser.add_argument("--figure")
    parser.add_argument("--probes", type=int, default=2000)
    parser.add_argument("--wandb", action="store_true", help="log to W&B offline in place of CSV")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as folder:
        watch, probe = long_run(options.probes, folder, wandb=options.wandb)
    path = Path(options.output)
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}}
    result["environment"] = {
        "lightning_spectral": lightning_spectral.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    result["runs"]["wandb offline" if options.wandb else "csv"] = watch.rows
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if options.figure:
        figure(result["runs"], options.figure)
    settled = [row for row in watch.rows if row["probes"] >= SETTLED]
    growth = {key: round(settled[-1][key] - settled[0][key], 2) for key in settled[0]}
    print(growth, f"history {len(probe.history)}, failed {probe.failed_probes}")
    if growth["memory_mb"] >= MOST_GROWTH or growth["graphs"] > 0 or growth["files"] > 0:
        raise SystemExit(f"something grows: {growth}")


if __name__ == "__main__":
    main()
