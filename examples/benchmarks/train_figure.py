"""The training benchmark's figure: test losses beside what they cost in tuning, a row per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "adamw": "#000000",
    "muon": "#D55E00",
    "muon_momentum_0.85": "#E69F00",
    "spectral_newton": "#0072B2",
    "fixed_size": "#56B4E9",
    "alpha_1": "#009E73",
    "probe": "#CC79A7",
}
"""Okabe and Ito's, which the colour-blind can tell apart; other arms are grey."""

GREY = "#777777"

MARKERS = {
    "adamw": "D",
    "muon": "s",
    "muon_momentum_0.85": "s",
    "spectral_newton": "o",
    "fixed_size": "o",
}
"""Of the arms with a curve of validation loss against learning rate; those with another momentum are dashed."""

ALPHAS = {1.5: ("#E69F00", "^"), 2.0: ("#0072B2", "o")}
"""Colour and marker of the exponents on the grid."""

Curve = Mapping[float, float]


def figure(
    summary: Sequence[Mapping[str, Any]],
    curves: Mapping[tuple[str, str], Curve],
    grid: Mapping[str, Mapping[float, Curve]],
    path: Path,
) -> None:
    """Per task: test loss of each arm, validation loss against learning rate, and against damping.

    Args:
        summary: lines of the table.
        curves: (task, arm) -> learning rate -> mean validation loss.
        grid: task -> alpha -> damping -> mean validation loss at the best rate.
        path: of the PNG.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "lightning-spectral[plot]"') from error
    tasks = list(dict.fromkeys(row["task"] for row in summary))
    # Without pyplot, which would look for a display.
    made = Figure(figsize=(13, 3.4 * len(tasks)), layout="constrained")
    axes = made.subplots(len(tasks), 3, squeeze=False, width_ratios=[1.3, 1, 1])
    for task, (left, middle, right) in zip(tasks, axes, strict=True):
        _tests(left, [row for row in summary if row["task"] == task])
        left.set_title(f"{task.replace('_', ' ')}: test loss, 5 seeds", fontsize=10)
        _rates(middle, {arm: curve for (of, arm), curve in curves.items() if of == task})
        _dampings(right, grid.get(task, {}))
    if axes[0, 1].lines:
        axes[0, 1].legend(fontsize=7)  # one key for all rows, where the curves leave room for it
    made.savefig(path, dpi=120)


def _tests(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A dot per seed, with their mean and standard deviation."""
    for y, row in enumerate(rows):
        colour = COLOURS.get(row["arm"], GREY)
        axes.plot(row["tests"], [y - 0.22] * len(row["tests"]), ".", color=colour, markersize=5, alpha=0.8)
        axes.errorbar(row["test"], y + 0.1, xerr=row["std"], fmt="o", color=colour, capsize=3, markersize=5)
    axes.set_yticks(range(len(rows)), [f"{row['arm'].replace('_', ' ')}, lr {row['lr']:g}" for row in rows])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)


def _rates(axes: Any, curves: Mapping[str, Curve]) -> None:
    shown = {arm: dict(sorted(curves[arm].items())) for arm in MARKERS if curves.get(arm)}
    for arm, curve in shown.items():
        dashed = "--" if "momentum" in arm else "-"
        label = arm.replace("_", " ")
        axes.plot(list(curve), list(curve.values()), dashed, marker=MARKERS[arm], color=COLOURS[arm], label=label)
    _limit(axes, [min(curve.values()) for curve in shown.values()], above=0.5)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="learning rate", ylabel="validation loss")
    _plain_ticks(axes, sorted({lr for curve in shown.values() for lr in curve}))


def _dampings(axes: Any, grid: Mapping[float, Curve]) -> None:
    for alpha, curve in sorted(grid.items()):
        colour, marker = ALPHAS[alpha]
        ordered = dict(sorted(curve.items()))
        axes.plot(list(ordered), list(ordered.values()), marker=marker, color=colour, label=f"alpha = {alpha:g}")
    _limit(axes, [loss for curve in grid.values() for loss in curve.values()], above=0.15)
    axes.set_xscale("log")
    axes.set(xlabel="damping", ylabel="validation loss")
    _plain_ticks(axes, sorted({d for curve in grid.values() for d in curve}))
    if grid:
        axes.legend(fontsize=7, loc="upper right")


def _limit(axes: Any, losses: Sequence[float], *, above: float) -> None:
    """Show what lies near the best: losses that went far off would flatten the rest."""
    if losses:
        low, high = min(losses), max(losses)
        axes.set_ylim(low - 0.04 * abs(low), high + above * abs(low))
    axes.grid(alpha=0.3)


def _plain_ticks(axes: Any, values: Sequence[float]) -> None:
    axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=7, rotation=45)
    axes.minorticks_off()
