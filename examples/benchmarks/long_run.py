"""What 2,000 probes of one run leave in memory.

    python examples/benchmarks/long_run.py [--output long_run.json] [--figure long_run.png] [--probes 2000]

A small CNN is trained with a probe before each step, and a CSVLogger or W&B offline; with curvature="exact", too. For
each logger there is a run without a probe that logs as many scalars: what it keeps is Lightning's or W&B's. Every 100
probes, after a `gc.collect()` and without a `malloc_trim`: resident memory, live tensors with a graph (counted before
the collection, so that none waits for it), open files, and blocks of Python's allocator. Each run has a process of its
own; W&B's service, which is another, is not counted. Ends with an error if anything has grown since probe 100.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import SpectralProbe
from lightning_spectral.records.log_keys import PROBE_KEYS
from lightning_spectral.report.trackers import offline_wandb_run

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks.machine import environment

EVERY = 100
"""Probes between two looks; CSVLogger, too, writes its rows every 100 steps, so that each look finds as many."""

SETTLED = 100
"""Probes after which nothing is to grow: the history of 100 reports is full."""

MOST_GROWTH = {"memory_mb": 5.0, "graphs": 0, "files": 0, "blocks": 2000}
"""After that. One report holds 170 blocks."""

COLOURS = {"csv": "#0072B2", "exact": "#009E73", "wandb": "#D55E00"}
"""Okabe and Ito's, which the colour-blind can tell apart."""

Row = dict[str, float]


class SmallCNN(pl.LightningModule):
    """A convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

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
        self.rows: list[Row] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Look without a note: the list of all objects, which the first look makes room for, takes a megabyte."""
        held()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, once the step is done."""
        if trainer.global_step % self.every == 0:
            self.rows.append({"step": trainer.global_step} | held())


class Scalars(pl.Callback):
    """In place of a probe: log so many scalars before each step."""

    def __init__(self, n: int) -> None:
        self.names = [f"control/{i}" for i in range(n)]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Log others each time."""
        values = torch.rand(len(self.names)).tolist()
        trainer.logger.log_metrics(dict(zip(self.names, values, strict=True)), step=trainer.global_step)


def held() -> Row:
    """Resident memory in MB, live tensors with a graph, open files, and blocks of Python's allocator."""
    # Their class is asked of type(): dead weak proxies, which are among them, raise when asked.
    graphs = sum(issubclass(type(x), torch.Tensor) and x.grad_fn is not None for x in gc.get_objects())
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return {
        "memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "graphs": graphs,
        "files": len(os.listdir("/proc/self/fd")),
        "blocks": sys.getallocatedblocks(),
    }


def train(steps: int, callbacks: Sequence[pl.Callback], logger: Any) -> None:
    """Train for so many steps on random images of 10 classes."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[*callbacks], logger=logger, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
    trainer.fit(SmallCNN(), DataLoader(data, 16, shuffle=True))


@dataclass(frozen=True)
class Run:
    """A logger, and a probe's curvature; "": no probe."""

    wandb: bool
    curvature: str


RUNS = {
    "csv": Run(False, "ggn"),
    "csv, no probe": Run(False, ""),
    "csv, exact": Run(False, "exact"),
    "wandb": Run(True, "ggn"),
    "wandb, no probe": Run(True, ""),
}


def run(name: str, steps: int, scalars: int) -> dict[str, Any]:
    """What one of the runs held, and what its probe did."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen, watch = RUNS[name], Watch()
    options = {"every_n_steps": 1, "min_probes": 0, "top_k": 4, "gradient_samples": None}
    probe = SpectralProbe(**options, curvature=chosen.curvature or "ggn")
    logging: pl.Callback = probe if chosen.curvature else Scalars(scalars)
    with tempfile.TemporaryDirectory() as folder:
        offline = offline_wandb_run("long_run", name, Path(folder)) if chosen.wandb else None
        train(steps, [logging, watch], WandbLogger(experiment=offline) if offline else CSVLogger(folder))
        if offline:
            offline.finish()
    result: dict[str, Any] = {"scalars": scalars, "growth": growth(watch.rows), "rows": watch.rows}
    if report := probe.last_report:
        counts = {"probes": probe.probes, "failed_probes": probe.failed_probes, "history": len(probe.history)}
        logged = len(probe.logged.scalars(report)) + len(PROBE_KEYS) + len(probe.step_probe.keys(report))
        result |= counts | {"chosen": report.chosen or report.curvature, "scalars": logged}
    return result


def growth(rows: Sequence[Row]) -> Row:
    """What is held at the end and was not when everything had settled."""
    settled = next(row for row in rows if row["step"] >= SETTLED)
    return {key: round(value - settled[key], 2) for key, value in rows[-1].items() if key != "step"}


def figure(runs: Mapping[str, Mapping[str, Any]], path: str) -> None:
    """Memory of each run since it had settled."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = drawing.add_subplot()
    for name, result in runs.items():
        rows = [row for row in result["rows"] if row["step"] >= SETTLED]
        grown = [row["memory_mb"] - rows[0]["memory_mb"] for row in rows]
        style = "--" if name.endswith("no probe") else "-"
        colour = COLOURS["exact" if name.endswith("exact") else name.partition(",")[0]]
        axes.plot([row["step"] for row in rows], grown, style, color=colour, label=name)
    axes.set(xlabel="steps", ylabel=f"MB more than after {SETTLED}", ylim=(-0.5, 1.5))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=120)


def main() -> None:
    """Run all, write the figures, and check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="long_run.json")
    parser.add_argument("--figure", help="a PNG; needs matplotlib")
    parser.add_argument("--probes", type=int, default=2000)
    options = parser.parse_args()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    told = environment(pytorch_lightning=pl.__version__, threads=1)
    results: dict[str, dict[str, Any]] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in RUNS:
            scalars = next(iter(results.values()))["scalars"] if results else 0
            results[name] = pool.apply(run, (name, options.probes, scalars))
            print(name, {key: value for key, value in results[name].items() if key != "rows"}, flush=True)
            text = json.dumps({"environment": told, "figures": results}, indent=2)
            Path(options.output).write_text(text, encoding="utf-8")
    if options.figure:
        figure(results, options.figure)
    grown = {name: result["growth"] for name, result in results.items()}
    if any(of[key] > most for of in grown.values() for key, most in MOST_GROWTH.items()):
        raise SystemExit(f"something grows: {grown}")


if __name__ == "__main__":
    main()
