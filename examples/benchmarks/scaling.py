"""How the cost of a measurement grows with the network, and what that makes of GPT-2 XL and of a model of 7B weights.

    python examples/benchmarks/scaling.py [--output scaling_cpu.json] [--repeats 3] [--only width ...]

One size at a time is varied: width, depth, sequences, directions K and vocabulary of a GPT measured by `sketch`, its
depth by `exact`, and the classes of a ResNet measured by `ggn`. A cost is the time of `measure_spectra` over that of
training steps just before and after it, the median of the repeats, and its peak memory, in bytes. Beside each stands
what `plan_spectra` says. Exponents are `fit_power_law`'s. `ranks` trains a GPT under DDP with 1 and 2 processes of one
thread, on one batch shared by them, with a `SpectralProbe` before every second step. `predictions` are the plans of two
large networks, made without their weights: nothing of them is measured.

Arms that are not run keep their figures in the output file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import SpectralProbe, fit_power_law, measure_spectra
from lightning_spectral.demo.networks import CharacterGPT, ResidualBlock
from lightning_spectral.plan import plan_spectra

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks.machine import environment
from examples.benchmarks.probe import loss, peak_bytes, seconds
from examples.benchmarks.scaling_networks import predictions

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """A network, its batch and its measurement.

    Attributes:
        width, depth, length, words: of a GPT; width and depth of a ResNet, whose classes are ``words``.
        samples: in the batch.
        k: directions per layer.
        method: of the curvature.
    """

    width: int = 96
    depth: int = 2
    length: int = 32
    words: int = 96
    samples: int = 96
    k: int = 20
    method: str = "sketch"

    def build(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """The network in eval mode, and a random batch."""
        torch.manual_seed(0)
        if self.method == "ggn":
            model = resnet(self.width, self.depth, self.words)
            return model.eval(), (torch.randn(self.samples, 3, 16, 16), torch.randint(0, self.words, (self.samples,)))
        gpt = CharacterGPT(self.words, self.length, width=self.width, heads=self.width // 24, depth=self.depth)
        tokens = torch.randint(0, self.words, (self.samples, self.length + 1))
        return gpt.eval(), (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def resnet(width: int, depth: int, classes: int) -> nn.Module:
    """A stem, so many blocks of two convolutions, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *(ResidualBlock(width, width) for _ in range(depth)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


BASE = Size()
SHARED = replace(BASE, samples=192)
IMAGES = Size(width=32, depth=3, samples=64, words=10, method="ggn")
ARMS: dict[str, tuple[str, list[Size]]] = {
    "width": ("width", [replace(BASE, width=w) for w in (48, 96, 192, 384)]),
    "depth": ("depth", [replace(BASE, depth=d) for d in (1, 2, 4, 8)]),
    "batch": ("samples", [replace(BASE, samples=n) for n in (96, 192, 384)]),
    "directions": ("k", [replace(BASE, k=k) for k in (5, 10, 20, 40)]),
    "vocabulary": ("words", [replace(BASE, words=v) for v in (64, 256, 1024, 4096)]),
    "layers, exact": ("depth", [replace(BASE, depth=d, k=4, method="exact") for d in (1, 2, 4)]),
    "classes, ggn": ("words", [replace(IMAGES, words=c) for c in (3, 9, 17, 33, 65)]),
}
"""Arm -> the attribute that is varied, and the sizes."""


def point(size: Size, repeats: int) -> dict[str, Any]:
    """Every figure of one size."""
    model, batch = size.build()

    def step() -> None:
        model.zero_grad()
        loss(model, batch).backward()

    options: dict[str, Any] = {"top_k": size.k, "curvature": size.method}
    ratios, reports = [], []
    step()
    for _ in range(repeats):
        before, started = seconds(step, 3), time.perf_counter()
        reports.append(measure_spectra(model, batch, loss, **options))
        took = time.perf_counter() - started
        ratios.append(2 * took / (before + seconds(step, 3)))
    model.zero_grad()
    return {
        "steps": statistics.median(ratios),
        "bytes": peak_bytes(lambda: measure_spectra(model, batch, loss, **options)),
        "step_bytes": peak_bytes(step),
        "seconds": took,
        "micro_batch_size": reports[-1].micro_batch_size,
        "layers": len(reports[-1].layers),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def planned(size: Size) -> dict[str, Any]:
    """What is told of the same size without measuring it."""
    model, batch = size.build()
    plan = plan_spectra(model, batch, loss, top_k=size.k, curvature=size.method)
    cost = plan.costs[size.method]
    return {
        "planned_steps": cost.steps,
        "planned_products": cost.products,
        "planned_bytes": cost.memory.peak,
        "bytes_per_flop": (plan.activations or 0) / (plan.step_flops or 1),
    }


def arm(name: str, repeats: int) -> dict[str, Any]:
    """The sizes of one arm, and how its cost grows: exponents of steps, seconds and bytes."""
    varied, sizes = ARMS[name]
    points = []
    for size in sizes:
        points.append({varied: getattr(size, varied), **point(size, repeats)})
        print(name, points[-1], flush=True)
    return {"varied": varied, "base": vars(sizes[0]), "points": points, "exponents": exponents(varied, points)}


def exponents(varied: str, points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """y ~ varied^exponent for time in training steps, in seconds, and memory."""
    x = torch.tensor([float(row[varied]) for row in points])
    found = {}
    for y in ("steps", "seconds", "bytes"):
        fit = fit_power_law(x, torch.tensor([float(row[y]) for row in points]))
        found[y] = {"exponent": fit.exponent, "stderr": fit.stderr, "r2": fit.r2}
    return found


class Timed(pl.Callback):
    """The time of every training step. Listed behind the probe, it starts when that is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Start."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop."""
        self.times.append(time.perf_counter() - self.started)


class Report(pl.Callback):
    """Write what the first process saw to a file."""

    def __init__(self, probe: SpectralProbe, timed: Timed, path: Path) -> None:
        self.probe, self.timed, self.path = probe, timed, path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it."""
        if trainer.is_global_zero:
            found = {
                "probe_seconds": statistics.median([report.seconds for report in list(self.probe.history)[1:]]),
                # In a step with a probe, processes wait for the slowest of them.
                "step_seconds": statistics.median(self.timed.times[1::2]),
                "samples": self.probe.history[-1].n_samples,
            }
            self.path.write_text(json.dumps(found), encoding="utf-8")


class OneThread(pl.Callback):
    """Processes share the cores and not each other's threads."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """In every process."""
        torch.set_num_threads(1)


def ranks(repeats: int, size: Size = SHARED, processes: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """A probe and a training step on one batch that so many processes share, medians without the first."""
    points, steps = [], 2 * (repeats + 1)
    for n in processes:
        model, _ = size.build()
        tokens = torch.randint(0, size.words, (size.samples * steps, size.length + 1))
        probe, timed = (
            SpectralProbe(every_n_steps=2, curvature=size.method, top_k=size.k, gradient_samples=None),
            Timed(),
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "seen.json"
            trainer = pl.Trainer(
                accelerator="cpu", strategy="ddp_spawn" if n > 1 else "auto", devices=n, max_steps=steps,
                callbacks=[OneThread(), probe, timed, Report(probe, timed, path)], logger=False,
                default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(model.train(), DataLoader(Tokens(tokens), batch_size=size.samples // n))
            seen = json.loads(path.read_text(encoding="utf-8"))
            points.append({"ranks": n, **seen, "steps": seen["probe_seconds"] / seen["step_seconds"]})
        print("ranks", points[-1], flush=True)
    return {"points": points, "of_one": points[-1]["probe_seconds"] / points[0]["probe_seconds"]}


class Tokens(TensorDataset):
    """Rows of tokens by themselves, where a TensorDataset gives tuples."""

    def __getitem__(self, index: Any) -> Tensor:
        row: Tensor = self.tensors[0][index]
        return row


def off(figures: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    """Time and memory of every point over those that were planned, the time over the middle of its range."""
    for name in ARMS:
        for row in figures.get(name, {"points": []})["points"]:
            yield row["steps"] / statistics.mean(row["planned_steps"]), row["bytes"] / row["planned_bytes"]


PARTS: dict[str, Callable[[int], Any]] = {
    **{name: lambda repeats, name=name: arm(name, repeats) for name in ARMS},
    "ranks": ranks,
    "predictions": lambda repeats: predictions(),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the arms, write their figures, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="scaling.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS), help="which arms to run")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    figures, machine = before.get("figures", {}), environment(threads=options.threads, repeats=options.repeats)
    if before and options.only == ["predictions"]:
        # Nothing is timed: the figures stay those of the machine before.
        machine = before["environment"]
    for name in options.only:
        figures[name] = PARTS[name](options.repeats)
        for of in ARMS.keys() & figures.keys():
            for size, row in zip(ARMS[of][1], figures[of]["points"], strict=True):
                row |= planned(size)
        ratios = list(off(figures))
        told = {"environment": machine, "figures": figures}
        if ratios:
            times, sizes = zip(*ratios, strict=True)
            told["measured_over_planned"] = {"steps": [min(times), max(times)], "bytes": [min(sizes), max(sizes)]}
        path.write_text(json.dumps(told, indent=2), encoding="utf-8")
    from examples.benchmarks.scaling_figure import figure

    figure(figures, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
