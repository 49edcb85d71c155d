"""The training benchmark's figure: test losses beside what they cost in tuning, a row per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "spectral_newton": "#0072B2",
    "muon": "#D55E00",
    "adamw": "#000000",
    "layer_rates": "#999999",
    "probe": "#CC79A7",
    "paper": "#009E73",
    "alpha_1": "#E69F00",
    "alpha_2": "#56B4E9",
}
"""Okabe and Ito's, which the colour-blind can tell apart; other arms are grey."""

CURVES = ("spectral_newton", "muon", "adamw", "alpha_1", "probe")
"""Arms with a curve of validation loss against learning rate."""

MARKERS = dict(zip(CURVES, "osD^v", strict=True))

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
    made.savefig(path, dpi=120)


def _tests(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A dot per seed, with their mean and standard deviation."""
    for y, row in enumerate(rows):
        colour = COLOURS.get(row["arm"], "#777777")
        axes.plot(row["tests"], [y - 0.22] * len(row["tests"]), ".", color=colour, markersize=5, alpha=0.8)
        axes.errorbar(row["test"], y + 0.1, xerr=row["std"], fmt="o", color=colour, capsize=3, markersize=5)
    axes.set_yticks(range(len(rows)), [f"{row['arm'].replace('_', ' ')}, lr {row['lr']:g}" for row in rows])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)


def _rates(axes: Any, curves: Mapping[str, Curve]) -> None:
    shown = {arm: dict(sorted(curves[arm].items())) for arm in CURVES if curves.get(arm)}
    for arm, curve in shown.items():
        label = arm.replace("_", " ")
        axes.plot(list(curve), list(curve.values()), marker=MARKERS[arm], color=COLOURS[arm], label=label, markersize=4)
    _limit(axes, [min(curve.values()) for curve in shown.values()], above=0.35)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="learning rate", ylabel="validation loss, 2 seeds")
    _plain_ticks(axes, sorted({lr for curve in shown.values() for lr in curve}))
    axes.legend(fontsize=7)


def _dampings(axes: Any, grid: Mapping[float, Curve]) -> None:
    styles = zip(("#56B4E9", "#0072B2", "#000000"), "^os", strict=True)
    for (alpha, curve), (colour, marker) in zip(sorted(grid.items()), styles, strict=False):
        ordered = dict(sorted(curve.items()))
        axes.plot(list(ordered), list(ordered.values()), marker=marker, color=colour, label=f"alpha {alpha:g}")
    _limit(axes, [loss for curve in grid.values() for loss in curve.values()], above=0.6)
    axes.set_xscale("log")
    axes.set(xlabel="damping, SpectralNewton at its best rate", ylabel="validation loss, 2 seeds")
    _plain_ticks(axes, sorted({d for curve in grid.values() for d in curve}))
    if grid:
        axes.legend(fontsize=7)


def _limit(axes: Any, losses: Sequence[float], *, above: float) -> None:
    """Show what lies near the best: losses that went far off would flatten the rest."""
    if losses:
        low, high = min(losses), max(losses)
        axes.set_ylim(low - 0.03 * abs(low), min(high, low * (1 + above)) + above * 0.3 * abs(low))
    axes.grid(alpha=0.3)


def _plain_ticks(axes: Any, values: Sequence[float]) -> None:
    axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=7, rotation=45)
    axes.minorticks_off()
