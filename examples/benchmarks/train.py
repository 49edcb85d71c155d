"""Training quality of SpectralNewton beside AdamW and Muon: equal steps, rates chosen on validation, losses on test.

    python examples/benchmarks/train.py [--output train.json] [--jobs 2] [--task language] [--arm muon] [--quick]

Three tasks on real data, one thread each. Every arm takes the same steps on the same batches with the same schedule:
warmup over 5 % of the steps, then a straight line to zero. Its learning rate is the best of at least five, a factor of
2 apart, by the mean validation loss of one or two seeds, with a worse one tried on each side. Five other seeds then
train at that rate, and their test loss is what is reported. With --study, a grid of exponents and dampings is trained
too, for validation alone. The file keeps every run, and runs found in it are not trained again; a figure is drawn
beside it.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import lightning_spectral  # noqa: E402
from examples.ablation.peers import LayerRateAdamW, MuonWithAdamW, scale_rates  # noqa: E402
from examples.ablation.tasks import Digits, DigitsData, Language, LanguageData, ThreeParts  # noqa: E402
from examples.benchmarks.train_figure import figure  # noqa: E402
from examples.benchmarks.train_results import (  # noqa: E402
    DIVERGED,
    Result,
    Run,
    Store,
    best_rate,
    claims,
    summarise,
    table,
    wanted_rates,
)
from lightning_spectral import SpectralNewton, measure_spectra  # noqa: E402
from lightning_spectral.optim.alphas import MeasuredAlpha  # noqa: E402

TUNING_SEEDS, SEEDS = {"language": (100,), "noisy_pixels": (100, 101), "wrong_labels": (100, 101)}, (0, 1, 2, 3, 4)
"""Of the runs that choose a rate, where a loss on 350 images takes two to tell, and of the runs that are reported."""
WARMUP = 0.05
"""Share of the steps."""
PROBE_EVERY, PROBE_SAMPLES = 100, 32
"""Steps between two measurements, and samples of each, for the arms that use them."""
STUDIED = {"alpha": (1.5, 2.0), "damping": (0.01, 0.03, 0.1, 0.3, 1.0)}
"""Options of SpectralNewton on the grid that its defaults were chosen from."""


@dataclass(frozen=True)
class Task:
    """A network, its data, and how long it trains.

    Attributes:
        module: makes the network.
        data: makes the data, in three parts.
        loss: of a network on a batch.
        steps: of training.
    """

    module: Callable[[], nn.Module]
    data: Callable[[], ThreeParts]
    loss: Callable[[nn.Module, Any], Tensor]
    steps: int


def classification(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of images."""
    return F.cross_entropy(module(batch[0]), batch[1])


def next_character(module: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy per character, in nats."""
    return F.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def mlp(width: int = 256) -> nn.Module:
    """64 pixels, two hidden layers, 10 classes."""
    hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


TASKS = {
    "language": Task(Language, lambda: LanguageData(batch_size=16), next_character, steps=600),
    "noisy_pixels": Task(Digits, DigitsData, classification, steps=255),
    "wrong_labels": Task(mlp, lambda: DigitsData(noise=0.3, wrong_labels=0.3), classification, steps=510),
}
"""A GPT of 2 blocks on Python's source, a ResNet on digits with pixel noise (15 epochs), and an MLP on digits of which
30 % of the training labels are drawn anew (30 epochs, in which it can learn them by heart)."""

QUICK = {
    "language": Task(lambda: Language(width=16, depth=1), lambda: LanguageData(4, 8, 64, 20_000), next_character, 3),
    "noisy_pixels": Task(lambda: Digits(width=4), lambda: DigitsData(8, 50), classification, 3),
    "wrong_labels": Task(lambda: mlp(16), lambda: DigitsData(8, 50, 0.3, 0.3), classification, 3),
}


@dataclass(frozen=True)
class Arm:
    """An optimizer with its options.

    Attributes:
        optimizer: AdamW, MuonWithAdamW, LayerRateAdamW or SpectralNewton.
        start: learning rate in the middle of the first five, per task.
        options: of the optimizer.
    """

    optimizer: type[Optimizer]
    start: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, module: nn.Module, lr: float) -> Optimizer:
        """The optimizer of a network."""
        groups = getattr(self.optimizer, "groups", None)
        return self.optimizer(groups(module) if groups else module.parameters(), lr=lr, **self.options)  # type: ignore[call-arg]


def rates(*of: float) -> dict[str, float]:
    """One for each task."""
    return dict(zip(TASKS, of, strict=True))


ADAM_LIKE, MUON_LIKE = rates(8e-3, 4e-3, 1e-3), rates(3.2e-2, 8e-3, 2e-3)

ARMS: dict[str, Arm] = {
    "adamw": Arm(AdamW, ADAM_LIKE, {"weight_decay": 0.01}),
    "layer_rates": Arm(LayerRateAdamW, ADAM_LIKE, {"weight_decay": 0.01}),
    "muon": Arm(MuonWithAdamW, MUON_LIKE, {"weight_decay": 0.01}),
    "muon_momentum_0.85": Arm(MuonWithAdamW, MUON_LIKE, {"weight_decay": 0.01, "momentum": 0.85}),
    "spectral_newton": Arm(SpectralNewton, MUON_LIKE),
    "spectral_newton_momentum_0.85": Arm(SpectralNewton, MUON_LIKE, {"momentum": 0.85}),
    "alpha_2": Arm(SpectralNewton, MUON_LIKE, {"alpha": 2.0}),
    "alpha_1.5_d_0.01": Arm(SpectralNewton, MUON_LIKE, {"alpha": 1.5, "damping": 0.01}),
    "alpha_1": Arm(SpectralNewton, MUON_LIKE, {"alpha": 1.0}),
    "auto": Arm(SpectralNewton, MUON_LIKE, {"alpha": "auto"}),
    "paper": Arm(SpectralNewton, MUON_LIKE, {"alpha": "auto", "damping": 0.1}),
    "probe": Arm(SpectralNewton, MUON_LIKE, {"alpha": "probe"}),
}
"""What the table has a line of: `spectral_newton` is SpectralNewton with nothing but a learning rate; `paper` has the
paper's exponents by kind of layer at its damping; `layer_rates` is its negative control, AdamW with a rate per layer in
proportion to the s of its spectrum."""


def recipe(task: Task, arm: Arm) -> str:
    """The optimizer with the exponents and dampings that the arm's options resolve to on the task's network.

    Arms that come to the same share their runs, and runs of defaults that have changed are not taken for new ones.
    """
    torch.manual_seed(0)
    optimizer = arm.make(task.module(), 1.0)
    name, told = type(optimizer).__name__, {k: v for k, v in arm.options.items() if k not in ("alpha", "damping")}
    words = [f"{key}={value}" for key, value in sorted(told.items())]
    if isinstance(optimizer, SpectralNewton):
        spectral = [group for group in optimizer.param_groups if group["update"] == "spectral"]
        by_kind = {group["kind"]: f"alpha={group['alpha']} damping={group['damping']}" for group in spectral}
        same = len(set(by_kind.values())) == 1
        words += [*set(by_kind.values())] if same else [f"{kind}({of})" for kind, of in sorted(by_kind.items())]
    return " ".join([name, *words])


@functools.cache
def parts(task: str, quick: bool) -> ThreeParts:
    """The task's data, read once in each process."""
    data = (QUICK if quick else TASKS)[task].data()
    data.setup("fit")
    return data


def train(run: Run, arm: Arm, *, quick: bool = False) -> Result:
    """Train, and take the losses on validation and test part."""
    torch.set_num_threads(1)
    task, data = (QUICK if quick else TASKS)[run.task], parts(run.task, quick)
    torch.manual_seed(run.seed)
    module = task.module()
    optimizer = arm.make(module, run.lr)
    bases = [group["lr"] for group in optimizer.param_groups]
    started = time.perf_counter()
    for step, batch in enumerate(batches(data, task.steps)):
        if step % PROBE_EVERY == 0:
            measure(optimizer, module, batch, task.loss)
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * schedule(step, task.steps)
        optimizer.zero_grad()
        loss = task.loss(module, batch)
        if not bool(loss.isfinite()):
            break
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    val, test = (evaluate(module, loader, task.loss) for loader in (data.val_dataloader(), data.test_dataloader()))
    return Result(run, val, test, round(seconds, 1))


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: up over the warmup, then down to zero after the last step.

    >>> [schedule(step, 100) for step in (0, 4, 5, 52, 99)]
    [0.2, 1.0, 1.0, 0.5052631578947369, 0.010526315789473684]
    """
    warmup = round(WARMUP * steps)
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)


def batches(data: ThreeParts, steps: int) -> Iterable[Any]:
    """As many training batches, epoch after epoch."""
    left = steps
    while left > 0:
        for batch in data.train_dataloader():
            yield batch
            left -= 1
            if not left:
                return


def measure(optimizer: Optimizer, module: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> None:
    """Give an optimizer that wants it what the spectra of its gradients are."""
    by_probe = isinstance(optimizer, SpectralNewton) and optimizer.takes_alpha
    if not by_probe and not isinstance(optimizer, LayerRateAdamW):
        return
    report = measure_spectra(module, batch, loss, max_samples=PROBE_SAMPLES)
    if isinstance(optimizer, LayerRateAdamW):
        scale_rates(optimizer, {name: layer.s.exponent for name, layer in report.layers.items()})
        return
    parameters = dict(module.named_parameters())
    fits = {name: layer.alpha for name, layer in report.layers.items()}
    optimizer.set_alpha({parameters[n]: [MeasuredAlpha(fit.exponent, fit.r2)] for n, fit in fits.items()})


def evaluate(module: nn.Module, loader: DataLoader[Any], loss: Callable[[nn.Module, Any], Tensor]) -> float:
    """Mean loss over all samples, in eval mode; `DIVERGED` where it is not finite or larger."""
    module.eval()
    with torch.no_grad():
        sizes = [(len(batch[0]) if isinstance(batch, list) else len(batch), loss(module, batch)) for batch in loader]
    mean = float(sum(size * value for size, value in sizes) / sum(size for size, _ in sizes))
    return min(mean, DIVERGED) if math.isfinite(mean) else DIVERGED


def studied() -> dict[str, Arm]:
    """The arms of the grid of exponents and dampings."""
    grid = [dict(zip(STUDIED, values, strict=True)) for values in product(*STUDIED.values())]
    return {" ".join(f"{k}={v:g}" for k, v in of.items()): Arm(SpectralNewton, MUON_LIKE, of) for of in grid}


class Benchmark:
    """All runs of some tasks and arms.

    Args:
        store: of results, which may hold some already.
        tasks: name -> task.
        arms: name -> arm.
        seeds: of the runs that are reported.
        jobs: runs at a time, a process each; 1: in this process.
        quick: train the tasks of QUICK.
    """

    def __init__(
        self,
        store: Store,
        tasks: Sequence[str],
        arms: Mapping[str, Arm],
        seeds: Sequence[int],
        *,
        jobs: int = 1,
        quick: bool = False,
    ) -> None:
        self.store, self.jobs, self.quick = store, jobs, quick
        self.seeds = seeds
        self.tasks = {name: (QUICK if quick else TASKS)[name] for name in tasks}
        self.reported = [(task, arm) for task in tasks for arm in arms]
        self.arms = {**arms, **studied()}
        self.recipes = {(t, a): recipe(self.tasks[t], self.arms[a]) for t in tasks for a in self.arms}

    def tune(self) -> None:
        """Train at more rates until none is wanted."""
        while wanted := [
            (task, arm, lr, seed)
            for task, arm in self.reported
            for lr in wanted_rates(self.found(task, arm), self.arms[arm].start[task])
            for seed in TUNING_SEEDS[task]
        ]:
            self.train(wanted)

    def study(self) -> None:
        """Train the grid of exponents and dampings at the best rate of the defaults, at half of it and at twice it."""
        self.train(
            (task, arm, lr, seed)
            for task in self.tasks
            for arm, lr, seed in product(studied(), self._around(task), TUNING_SEEDS[task])
        )

    def _around(self, task: str) -> list[float]:
        best = self.rate(task, "spectral_newton")
        return [best / 2, best, best * 2]

    def grid(self) -> dict[str, dict[float, dict[float, float]]]:
        """Task -> alpha -> damping -> validation loss at the best of the three rates, where all were trained."""
        grid: dict[str, dict[float, dict[float, float]]] = {}
        tasks = [task for task, arm in self.reported if arm == "spectral_newton"]
        for task, (arm, made) in product(tasks, studied().items()):
            found = self.found(task, arm)
            if all(lr in found for lr in self._around(task)):
                of_alpha = grid.setdefault(task, {}).setdefault(made.options["alpha"], {})
                of_alpha[made.options["damping"]] = min(found[lr] for lr in self._around(task))
        return grid

    def finish(self) -> None:
        """Train the seeds that are reported, each arm at its rate."""
        self.train((t, a, self.rate(t, a), seed) for t, a in self.reported for seed in self.seeds)

    def summarise(self) -> list[dict[str, Any]]:
        """The table's lines."""
        return [self._line(task, arm) for task, arm in self.reported]

    def found(self, task: str, arm: str) -> dict[float, float]:
        """Learning rate -> mean validation loss of the tuning seeds."""
        return {lr: fmean(r.val for r in of_lr) for lr, of_lr in self._by_rate(task, arm, TUNING_SEEDS[task]).items()}

    def _by_rate(self, task: str, arm: str, seeds: Sequence[int]) -> dict[float, list[Result]]:
        return self.store.by_rate(task, self.recipes[task, arm], self.tasks[task].steps, seeds)

    def rate(self, task: str, arm: str) -> float:
        """The arm's best rate on the task."""
        return best_rate(self.found(task, arm))

    def _line(self, task: str, arm: str) -> dict[str, Any]:
        lr = self.rate(task, arm)
        tuning, final = (self._by_rate(task, arm, seeds)[lr] for seeds in (TUNING_SEEDS[task], self.seeds))
        return summarise(arm, tuning, final)

    def train(self, wanted: Iterable[tuple[str, str, float, int]]) -> None:
        """Train what the store does not hold; arms that come to the same recipe are trained once."""
        chosen = {Run(t, self.recipes[t, a], lr, seed, self.tasks[t].steps): self.arms[a] for t, a, lr, seed in wanted}
        runs = [run for run in chosen if run not in self.store.results]
        made = train_all({run: chosen[run] for run in runs}, jobs=self.jobs, quick=self.quick)
        for i, result in enumerate(made, 1):
            self.store.add(result)
            run = result.run
            told = f"{run.task} {run.recipe} lr {run.lr:g} seed {run.seed}"
            print(f"{i}/{len(runs)} {told}: validation {result.val:.4f}", flush=True)


def train_all(runs: Mapping[Run, Arm], *, jobs: int, quick: bool) -> Iterator[Result]:
    """Results as they come, so many runs at a time, a thread each."""
    if jobs == 1:
        yield from (train(run, arm, quick=quick) for run, arm in runs.items())
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, run, arm, quick=quick) for run, arm in runs.items()]):
            yield future.result()


def environment() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "lightning_spectral": lightning_spectral.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "warmup": WARMUP,
        "tuning_seeds": TUNING_SEEDS,
        "seeds": SEEDS,
        "probe_every": PROBE_EVERY,
        "probe_samples": PROBE_SAMPLES,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, print the table and the claims, draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("train.json"), help="file of results (%(default)s)")
    parser.add_argument("--task", action="append", choices=TASKS, help="may be given several times (all)")
    parser.add_argument("--arm", action="append", choices=ARMS, help="likewise (all)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (%(default)s)")
    parser.add_argument("--study", action="store_true", help="the grid of exponents and dampings too")
    parser.add_argument("--quick", action="store_true", help="three steps of small networks, to see that it works")
    options = parser.parse_args(argv)
    if options.study and options.arm and "spectral_newton" not in options.arm:
        parser.error("--study goes by the best rate of the arm spectral_newton; add --arm spectral_newton")
    names = options.arm or (("adamw", "muon", "spectral_newton") if options.quick else ARMS)
    seeds = SEEDS[:2] if options.quick else SEEDS
    arms, tasks = {name: ARMS[name] for name in names}, options.task or list(TASKS)
    store = Store(options.output, environment())
    benchmark = Benchmark(store, tasks, arms, seeds, jobs=options.jobs, quick=options.quick)
    benchmark.tune()
    if options.study:
        benchmark.study()
    benchmark.finish()
    report(benchmark, options.output)
    return 0


def report(benchmark: Benchmark, output: Path) -> None:
    """Write the table's lines to the file, print them and the claims, and draw the figure beside it."""
    store = benchmark.store
    store.summary, store.grid = benchmark.summarise(), benchmark.grid()
    store.write()
    print(table(store.summary))
    for claim, holds in claims(store.summary):
        print("holds:" if holds else "DOES NOT HOLD:", claim)
    curves = {key: benchmark.found(*key) for key in benchmark.reported}
    try:
        figure(store.summary, curves, store.grid, output.with_suffix(".png"))
    except ImportError as error:
        print(error)


if __name__ == "__main__":
    sys.exit(main())
