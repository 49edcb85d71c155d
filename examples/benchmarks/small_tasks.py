"""SpectralNewton in AdamW's place, on sixteen small tasks of as many kinds.

    python examples/benchmarks/small_tasks.py [--output small_tasks.json] [--task graph]

Each task trains for a second or two on one thread, with the batches, the warmup and the straight line to zero of
`train.py`, whose way of choosing a rate it has too: the best of at least five, a factor of 2 apart, by the validation
loss of one seed, with a worse one tried on each side. Three other seeds then give the test loss of

- AdamW at its best rate,
- SpectralNewton at that rate, with nothing but the optimizer changed,
- the same with a fixed damping of 0.1,
- SpectralNewton at its own best rate.

A loss counts as not worse than AdamW's if its mean is at most one standard deviation of the seeds above AdamW's mean
(the root mean square of both standard deviations). Runs found in the file are not trained again; a figure is drawn
beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch.optim import AdamW

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.benchmarks import small_task_images, small_task_sequences  # noqa: E402
from examples.benchmarks.machine import environment  # noqa: E402
from examples.benchmarks.small_tasks_figure import figure  # noqa: E402
from examples.benchmarks.train_results import Result, Run, Store, best_rate, summarise, wanted_rates  # noqa: E402
from examples.benchmarks.train_runs import WARMUP, Arm, Task, recipe, train_task  # noqa: E402
from lightning_spectral import SpectralNewton  # noqa: E402

TASKS: dict[str, Task] = {**small_task_sequences.TASKS, **small_task_images.TASKS}

TUNING_SEEDS, SEEDS = (100,), (0, 1, 2)
"""Of the runs that choose a rate, and of the runs that are reported."""

START = 8e-3
"""Learning rate in the middle of the first five, of each optimizer on each task."""

ADAMW, DEFAULT = Arm(AdamW, {}, {"weight_decay": 0.01}), Arm(SpectralNewton, {})
FIXED = Arm(SpectralNewton, {}, {"damping": 0.1})


class SmallTask:
    """The runs of one task.

    Args:
        name: of the task.
        store: of all results, which may hold some already.
    """

    def __init__(self, name: str, store: Store) -> None:
        self.name, self.store, self.task = name, store, TASKS[name]
        self.data = self.task.data()
        self.data.setup("fit")

    def train(self, arm: Arm, rates: Iterable[float], seeds: Sequence[int]) -> None:
        """Train what the store does not hold."""
        for lr in rates:
            for seed in seeds:
                run = Run(self.name, recipe(self.task, arm), lr, seed, self.task.steps)
                if run not in self.store.results:
                    self.store.add(train_task(run, self.task, self.data, arm))

    def results(self, arm: Arm, seeds: Sequence[int]) -> dict[float, list[Result]]:
        """Return learning rate -> results of these seeds, where all of them are there."""
        return self.store.by_rate(self.name, recipe(self.task, arm), self.task.steps, seeds)

    def validation(self, arm: Arm) -> dict[float, float]:
        """Return learning rate -> mean validation loss of the tuning seeds."""
        return {lr: fmean(r.val for r in of_lr) for lr, of_lr in self.results(arm, TUNING_SEEDS).items()}

    def tune(self, arm: Arm) -> float:
        """Train at more rates until none is wanted, and return the best."""
        while wanted := wanted_rates(self.validation(arm), START):
            self.train(arm, wanted, TUNING_SEEDS)
        return best_rate(self.validation(arm))

    def lines(self) -> list[dict[str, Any]]:
        """Train all that is reported, and return its lines of the table."""
        rate = self.tune(ADAMW)
        lines = []
        for name, arm, lr in (
            ("adamw", ADAMW, rate),
            ("swapped", DEFAULT, rate),
            ("swapped_fixed", FIXED, rate),
            ("spectral_newton", DEFAULT, self.tune(DEFAULT)),
        ):
            self.train(arm, [lr], SEEDS)
            final = self.results(arm, SEEDS)[lr]
            lines.append(summarise(name, final, final))
        return lines


def excess(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Return by how many standard deviations of the seeds our mean test loss is above theirs."""
    gap, width = ours["test"] - theirs["test"], math.hypot(ours["std"], theirs["std"]) / math.sqrt(2)
    return gap / width if width else math.copysign(math.inf, gap) if gap else 0.0


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Return a line per task in Markdown, and the counts below it."""
    rows = {(row["task"], row["arm"]): row for row in summary}
    lines = ["| | AdamW | SpectralNewton, same rate | damping of 0.1 | its best rate |", "|---|---|---|---|---|"]
    beside: dict[str, list[tuple[float, float]]] = {"swapped": [], "swapped_fixed": [], "spectral_newton": []}
    for task in dict.fromkeys(row["task"] for row in summary):
        adamw = rows[task, "adamw"]
        cells = [cell(adamw)]
        for arm, found in beside.items():
            row = rows[task, arm]
            found.append((row["test"] - adamw["test"], excess(row, adamw)))
            cells.append(f"{cell(row)}, {found[-1][1]:+.1f} sd")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    for arm, found in beside.items():
        fair, plain = sum(width <= 1 for _, width in found), sum(gap <= 0 for gap, _ in found)
        lines.append(f"{arm}: not worse than AdamW on {fair} of {len(found)}, with the lower mean on {plain}")
    return "\n".join(lines)


def cell(row: Mapping[str, Any]) -> str:
    """Return mean, standard deviation and rate."""
    return f"{row['test']:.4f} ± {row['std']:.4f} ({row['lr']:g})"


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("small_tasks.json"), help="file of results (%(default)s)")
    parser.add_argument("--task", action="append", choices=TASKS, help="may be given several times (all)")
    options = parser.parse_args(argv)
    told = {"threads": 1, "warmup": WARMUP, "tuning_seeds": TUNING_SEEDS, "seeds": SEEDS}
    store = Store(options.output, environment(**told))
    for name in options.task or TASKS:
        store.summary += SmallTask(name, store).lines()
        store.write()
        print(*(f"{row['task']}, {row['arm']}: {cell(row)}" for row in store.summary[-4:]), sep="\n", flush=True)
    print(table(store.summary))
    try:
        figure(store.summary, options.output.with_suffix(".png"))
    except ImportError as error:
        print(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
