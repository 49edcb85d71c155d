"""Training quality of SpectralNewton beside AdamW and Muon: equal steps, rates chosen on validation, losses on test.

    python examples/benchmarks/train.py [--output train.json] [--jobs 2] [--task language] [--arm muon] [--quick]

Three tasks on real data, one thread each. Every arm takes the same steps on the same batches with the same schedule:
warmup over 5 % of the steps, then a straight line to zero. Its learning rate is the best of at least five, a factor of
2 apart, by the mean validation loss of one seed or five, with a worse one tried on each side. Five other seeds then
train at that rate, and their test loss is what is reported. With --study, a grid of exponents and dampings is trained
too, for validation alone; with --long, some arms take four times the steps, at the same rates. The file keeps every
run, and runs found in it are not trained again; a figure is drawn beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.benchmarks.machine import environment  # noqa: E402
from examples.benchmarks.train_figure import figure  # noqa: E402
from examples.benchmarks.train_results import (  # noqa: E402
    Result,
    Run,
    Store,
    best_rate,
    claims,
    summarise,
    table,
    wanted_rates,
)
from examples.benchmarks.train_runs import (  # noqa: E402
    ARMS,
    PROBE_EVERY,
    PROBE_SAMPLES,
    QUICK,
    TASKS,
    WARMUP,
    Arm,
    recipe,
    studied,
    train,
)

FIVE = (100, 101, 102, 103, 104)
TUNING_SEEDS, SEEDS = {"language": (100,), "noisy_pixels": FIVE, "wrong_labels": FIVE}, (0, 1, 2, 3, 4)
"""Of the runs that choose a rate, and of those that are reported. A loss on 350 images takes five: with two of them
rounding alone moved a rate by a factor of 2."""

LONG, LONG_ARMS, LONG_SEEDS = 4, ("adamw", "muon_momentum_0.85", "spectral_newton"), (0, 1)
"""How many times the steps the long runs take, of which arms, and with which seeds."""

STUDIED_ARM = "fixed_size"
"""Whose best rate the grid of exponents and dampings is around."""


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
        """Train the grid of exponents and dampings at the best rate of `STUDIED_ARM`, at half of it and at twice it."""
        self.train(
            (task, arm, lr, seed)
            for task in self.tasks
            for arm, lr, seed in product(studied(), self._around(task), TUNING_SEEDS[task])
        )

    def _around(self, task: str) -> list[float]:
        best = self.rate(task, STUDIED_ARM)
        return [best / 2, best, best * 2]

    def grid(self) -> dict[str, dict[float, dict[float, float]]]:
        """Task -> alpha -> damping -> validation loss at the best of the three rates, where all were trained."""
        grid: dict[str, dict[float, dict[float, float]]] = {}
        tasks = [task for task, arm in self.reported if arm == STUDIED_ARM]
        for task, (arm, made) in product(tasks, studied().items()):
            found = self.found(task, arm)
            if all(lr in found for lr in self._around(task)):
                of_alpha = grid.setdefault(task, {}).setdefault(made.options["alpha"], {})
                of_alpha[made.options["damping"]] = min(found[lr] for lr in self._around(task))
        return grid

    def finish(self) -> None:
        """Train the seeds that are reported, each arm at its rate."""
        self.train((t, a, self.rate(t, a), seed) for t, a in self.reported for seed in self.seeds)

    def train_long(self) -> list[dict[str, Any]]:
        """Train for `LONG` times the steps, each arm at its rate of the short runs, and return lines of a table."""
        pairs = [(task, arm) for task, arm in self.reported if arm in LONG_ARMS]
        lines = []
        for task, arm in pairs:
            lr, steps = self.rate(task, arm), LONG * self.tasks[task].steps
            self._train_runs({Run(task, self.recipes[task, arm], lr, s, steps): self.arms[arm] for s in LONG_SEEDS})
            final = self.store.by_rate(task, self.recipes[task, arm], steps, LONG_SEEDS)[lr]
            lines.append(summarise(arm, final, final) | {"steps": steps})
        return lines

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
        self._train_runs(
            {Run(t, self.recipes[t, a], lr, seed, self.tasks[t].steps): self.arms[a] for t, a, lr, seed in wanted}
        )

    def _train_runs(self, chosen: Mapping[Run, Arm]) -> None:
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


def settings() -> dict[str, Any]:
    """What was run, beside the machine."""
    return {
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
    parser.add_argument("--long", action="store_true", help="runs of four times the steps too")
    parser.add_argument("--quick", action="store_true", help="three steps of small networks, to see that it works")
    options = parser.parse_args(argv)
    if options.study and options.arm and STUDIED_ARM not in options.arm:
        parser.error(f"--study goes by the best rate of the arm {STUDIED_ARM}; add --arm {STUDIED_ARM}")
    names = options.arm or (("adamw", "muon", "spectral_newton") if options.quick else ARMS)
    seeds = SEEDS[:2] if options.quick else SEEDS
    arms, tasks = {name: ARMS[name] for name in names}, options.task or list(TASKS)
    store = Store(options.output, environment(**settings()))
    benchmark = Benchmark(store, tasks, arms, seeds, jobs=options.jobs, quick=options.quick)
    benchmark.tune()
    if options.study:
        benchmark.study()
    benchmark.finish()
    if options.long:
        store.long = benchmark.train_long()
        print(table(store.long))
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
