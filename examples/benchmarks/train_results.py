"""What the training benchmark found: its runs, which rate is next, the table, the claims."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

DIVERGED = 1e3
"""Stands for a loss that is not finite, so that means can be compared and JSON stays valid."""

RATES = 5
"""How many learning rates an arm is tried at, at least."""

MOST_RATES = 12
"""At most: one that still improves there is reported as it is."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: its name.
        recipe: the optimizer with all options as they were resolved for the task's network.
        lr: learning rate at the end of the warmup.
        seed: of the weights and of the order of the samples.
        steps: of training.
    """

    task: str
    recipe: str
    lr: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        run: the run.
        val: mean validation loss after the last step.
        test: mean test loss then.
        seconds: of training.
    """

    run: Run
    val: float
    test: float
    seconds: float


class Store:
    """The results of all runs, in a file of JSON.

    Args:
        path: of the file, which may exist.
        environment: what to write of the machine and the versions.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any]) -> None:
        self.path, self.environment = path, dict(environment)
        self.results: dict[Run, Result] = {}
        self.summary: list[dict[str, Any]] = []
        self.long: list[dict[str, Any]] = []
        self.grid: dict[str, dict[float, dict[float, float]]] = {}
        if path.exists():
            for row in json.loads(path.read_text(encoding="utf-8"))["runs"]:
                val, test, seconds = (row.pop(key) for key in ("val", "test", "seconds"))
                self.results[Run(**row)] = Result(Run(**row), val, test, seconds)

    def add(self, result: Result) -> None:
        """Keep a result, on disk too."""
        self.results[result.run] = result
        self.write()

    def write(self) -> None:
        """Write the file: a line per run, so that two versions of it can be compared."""
        runs = sorted(self.results, key=lambda run: (run.task, run.recipe, run.lr, run.seed))
        rows = [asdict(run) | {k: v for k, v in asdict(self.results[run]).items() if k != "run"} for run in runs]
        parts = {"environment": json.dumps(self.environment, indent=1), "grid": json.dumps(self.grid, indent=1)}
        parts |= {name: _lines(rows) for name, rows in (("summary", self.summary), ("long", self.long), ("runs", rows))}
        text = ",\n".join(f'"{name}": {part}' for name, part in parts.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".part")
        new.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
        new.replace(self.path)  # an interrupted run leaves the old file whole

    def by_rate(self, task: str, recipe: str, steps: int, seeds: Sequence[int]) -> dict[float, list[Result]]:
        """Learning rate -> results of these seeds, where all of them are there."""
        found: dict[float, list[Result]] = {}
        for run, result in self.results.items():
            if (run.task, run.recipe, run.steps) == (task, recipe, steps) and run.seed in seeds:
                found.setdefault(run.lr, []).append(result)
        return {lr: of_lr for lr, of_lr in sorted(found.items()) if len(of_lr) == len(seeds)}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = ",\n".join(f" {json.dumps(row)}" for row in rows)
    return f"[\n{lines}\n]" if lines else "[]"


def wanted_rates(found: Mapping[float, float], start: float) -> list[float]:
    """The rates to try next, a factor of 2 apart: five around the start, then more until the best has one on each side.

    Args:
        found: learning rate -> validation loss, so far.
        start: the middle of the first five.

    >>> wanted_rates({}, 0.4)
    [0.1, 0.2, 0.4, 0.8, 1.6]
    >>> wanted_rates({0.1: 5.0, 0.2: 4.0, 0.4: 3.0, 0.8: 2.0, 1.6: 1.0}, 0.4)
    [3.2]
    >>> wanted_rates({0.1: 5.0, 0.2: 4.0, 0.4: 3.0, 0.8: 2.0, 1.6: 3.0}, 0.4)
    []
    """
    half = RATES // 2
    first = [_round(start * 2.0**k) for k in range(-half, half + 1)]
    missing = [lr for lr in first if lr not in found]
    if missing or len(found) >= MOST_RATES:
        return missing
    best = best_rate(found)
    return [lr for lr in (_round(best / 2), _round(best * 2)) if lr not in found]


def best_rate(found: Mapping[float, float]) -> float:
    """The rate with the lowest loss."""
    return min(found, key=lambda lr: found[lr])


def _round(lr: float) -> float:
    return float(f"{lr:.6g}")


def summarise(arm: str, tuning: Sequence[Result], final: Sequence[Result]) -> dict[str, Any]:
    """A line of the table, as JSON, of an arm's runs on a task at its rate."""
    run = final[0].run
    tests = [result.test for result in sorted(final, key=lambda result: result.run.seed)]
    return {
        "task": run.task,
        "arm": arm,
        "recipe": run.recipe,
        "lr": run.lr,
        "validation": fmean(result.val for result in tuning),
        "test": fmean(tests),
        "std": stdev(tests) if len(tests) > 1 else 0.0,
        "tests": tests,
    }


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Test losses, mean and standard deviation over seeds, in Markdown: a line per arm, a column per task."""
    tasks = list(dict.fromkeys(row["task"] for row in summary))
    arms = list(dict.fromkeys(row["arm"] for row in summary))
    cells = {(row["task"], row["arm"]): f"{row['test']:.3f} ± {row['std']:.3f} (lr {row['lr']:g})" for row in summary}
    lines = [["test loss", *tasks], ["---"] * (len(tasks) + 1)]
    lines += [[arm, *(cells.get((task, arm), "") for task in tasks)] for arm in arms]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claims(summary: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """What was hoped for of SpectralNewton's defaults -> whether it holds."""
    rows = {(row["task"], row["arm"]): row for row in summary}
    out = []
    for peer, margin in (("muon", 0.04), ("muon_momentum_0.85", 0.04), ("adamw", 0.25)):
        ours, theirs = rows.get(("language", "spectral_newton")), rows.get(("language", peer))
        if ours and theirs:
            gap = theirs["test"] - ours["test"]
            out.append((f"language: {margin} nats below {peer} (it is {gap:.3f})", gap >= margin))
    for task in ("noisy_pixels", "wrong_labels"):
        ours = rows.get((task, "spectral_newton"))
        peers = [rows[task, peer] for peer in ("muon", "muon_momentum_0.85", "adamw") if (task, peer) in rows]
        if ours and peers:
            best = min(peers, key=lambda row: row["test"])
            gap, width = ours["test"] - best["test"], math.hypot(ours["std"], best["std"]) / math.sqrt(2)
            text = f"{task}: at most one standard deviation ({width:.3f}) above {best['arm']} (it is {gap:+.3f})"
            out.append((text, gap <= width))
    return out
