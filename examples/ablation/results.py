"""What the ablation's runs gave: records, one table, one figure, a page per task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.benchmarks.machine import environment

RESULTS = "ablation_cpu.json"
"""A line per run, as the results of the benchmarks that the manual takes its numbers from."""


@dataclass(frozen=True)
class Run:
    """What one training run is of.

    Attributes:
        task: a YAML file of this folder.
        optimizer: one of optimizers/.
        seed: of the weights and of the order of the samples.
        lr: learning rate.
        factor: how many times the rate of rates.yaml it is.
    """

    task: str
    optimizer: str
    seed: int
    lr: float
    factor: float = 1.0

    @property
    def row(self) -> str:
        """Its line of the table."""
        return self.optimizer if self.factor == 1 else f"{self.optimizer} at {self.factor:g} lr"

    def folder(self, output: Path) -> Path:
        """Where its log goes."""
        return output / self.task / f"{self.optimizer}-lr-{self.lr:g}-seed-{self.seed}"


@dataclass(frozen=True)
class Result:
    """What came of a run; losses are not finite where training diverged.

    Attributes:
        run: the run.
        val_loss: validation loss after the last epoch.
        test_loss: test loss then.
        seconds: of training, with its validation.
        curve: validation loss after each epoch.
    """

    run: Run
    val_loss: float
    test_loss: float
    seconds: float
    curve: list[float] = field(default_factory=list)


def report(results: Sequence[Result], output: Path) -> None:
    """Print the table, and write it, the figure, the pages and all results to the folder."""
    output.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f" {json.dumps(asdict(result))}" for result in results)
    text = f'{{\n"environment": {json.dumps(environment(threads=1))},\n"runs": [\n{rows}\n]\n}}\n'
    (output / RESULTS).write_text(text, encoding="utf-8")
    made = table(results)
    console = Console()
    # A log that is no terminal is as wide as it needs to be.
    (console if console.is_terminal else Console(width=100)).print(made)
    with (output / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(made)
    try:
        figure(results, output / "ablation.png")
        print(f"figure in {output / 'ablation.png'}")
    except ImportError as error:
        print(error)
    try:
        for page in pages(results, output):
            print(f"runs side by side in {page}")
    except ImportError as error:
        print(error)


def pages(results: Sequence[Result], output: Path) -> list[Path]:
    """Write a page per task of its runs that were measured, the first of each row, laid over each other.

    Raises:
        ImportError: without plotly.
    """
    from lightning_spectral.report import RunError, read_run, write_page

    written = []
    for task, of_task in groupby(grouped(results).items(), key=lambda item: item[0][0]):
        runs = []
        for (_, row), of_row in of_task:
            try:
                runs.append(replace(read_run([of_row[0].run.folder(output)]), name=row))
            except RunError as error:
                print(f"{task}, {row} is not on the page: {error}")
        if runs:
            written.append(write_page(runs, output / task / "report.html", title=f"{task}: optimizers side by side"))
    return written


def table(results: Sequence[Result]) -> Table:
    """Mean and standard deviation over seeds of each optimizer's losses, task by task."""
    made = Table(title="loss after the last epoch, mean ± standard deviation over seeds", title_justify="left")
    made.add_column("task", no_wrap=True)
    made.add_column("optimizer", no_wrap=True)
    for column in ("lr", "validation", "test"):
        made.add_column(column, justify="right", no_wrap=True)
    for task, of_task in groupby(grouped(results).items(), key=lambda item: item[0][0]):
        rows = list(of_task)
        for i, ((_, row), of_row) in enumerate(rows, start=1):
            losses = [spread([r.val_loss for r in of_row]), spread([r.test_loss for r in of_row])]
            first, lr = task if i == 1 else "", f"{of_row[0].run.lr:g}"
            made.add_row(first, row, lr, *losses, end_section=i == len(rows))
    return made


def grouped(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """(task, row) -> its results, one per seed."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.run.task, result.run.row), []).append(result)
    return groups


def spread(losses: Sequence[float]) -> str:
    """Mean and sample standard deviation, or how many runs diverged.

    >>> spread([1.0, 2.0, 3.0]), spread([0.5]), spread([1.0, float("nan")])
    ('2.0000 ± 1.0000', '0.5000', '1 of 2 diverged')
    """
    diverged = sum(not math.isfinite(loss) for loss in losses)
    if diverged:
        return f"{diverged} of {len(losses)} diverged"
    if len(losses) < 2:
        return f"{losses[0]:.4f}"
    return f"{fmean(losses):.4f} ± {stdev(losses):.4f}"


def figure(results: Sequence[Result], path: Path) -> None:
    """Per task, the test loss of every seed with its mean, beside the mean validation loss after each epoch.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "lightning-spectral[plot]"') from error
    groups = grouped(results)
    tasks = list(dict.fromkeys(result.run.task for result in results))
    rows = list(dict.fromkeys(result.run.row for result in results))
    height = max(3.2, 0.8 + 0.24 * len(rows))
    # Without pyplot, which would look for a display.
    made = Figure(figsize=(11, 0.4 + height * len(tasks)), layout="constrained")
    axes = made.subplots(len(tasks), 2, squeeze=False)
    palette = colormaps["tab10" if len(rows) <= 10 else "turbo"]
    colours = {row: palette(i if len(rows) <= 10 else i / len(rows)) for i, row in enumerate(rows)}
    for task, (left, right) in zip(tasks, axes, strict=True):
        found = {row: groups[task, row] for row in rows if (task, row) in groups}
        _seeds(left, found, colours)
        left.set(title=task, xlabel="test loss: seeds, mean ± standard deviation")
        _curves(right, found, colours)
        right.set(title=task, xlabel="epoch", ylabel="validation loss, mean over seeds")
    made.savefig(path, dpi=150)


def _seeds(axes: Any, found: dict[str, list[Result]], colours: dict[str, Any]) -> None:
    for y, (row, of_row) in enumerate(found.items()):
        losses = [result.test_loss for result in of_row if math.isfinite(result.test_loss)]
        if not losses:
            continue
        axes.plot(losses, [y] * len(losses), "|", color=colours[row], markersize=9)
        width = stdev(losses) if len(losses) > 1 else 0.0
        axes.errorbar(fmean(losses), y, xerr=width, fmt="o", color=colours[row], capsize=3)
    axes.set_yticks(range(len(found)), list(found))
    # The key to both panels.
    for row, label in zip(found, axes.get_yticklabels(), strict=True):
        label.set_color(colours[row])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def _curves(axes: Any, found: dict[str, list[Result]], colours: dict[str, Any]) -> None:
    for row, of_row in found.items():
        curves = [result.curve for result in of_row]
        means = [fmean(losses) for losses in zip(*curves, strict=False)]
        axes.plot(range(1, len(means) + 1), means, ".-", color=colours[row], linewidth=1.2)
    last = [result.curve[-1] for of_row in found.values() for result in of_row if result.curve]
    usable = [loss for loss in last if math.isfinite(loss)]
    if usable:
        # Where the curves end is what is compared; the first epochs would flatten it.
        axes.set_ylim(0.97 * min(usable), 1.3 * max(usable))
    axes.grid(alpha=0.3)
