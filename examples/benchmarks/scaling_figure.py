"""The scaling benchmark's figure: cost in training steps and peak memory against each size, beside what was planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MEASURED, PLANNED = "#0072B2", "#999999"


def figure(figures: Mapping[str, Any], path: Path) -> None:
    """A column per arm: steps above, bytes below.

    Args:
        figures: arm -> its points and exponents; arms without exponents are left out.
        path: of the PNG.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "lightning-spectral[plot]"') from error
    arms = {name: arm for name, arm in figures.items() if "exponents" in arm}
    if not arms:
        return
    # Without pyplot, which would look for a display.
    made = Figure(figsize=(2.6 * len(arms), 5.2), layout="constrained")
    axes = made.subplots(2, len(arms), squeeze=False)
    for (name, arm), top, bottom in zip(arms.items(), *axes, strict=True):
        x = [row[arm["varied"]] for row in arm["points"]]
        _panel(top, x, arm, "steps", "planned_steps")
        _panel(bottom, x, arm, "bytes", "planned_bytes")
        top.set_title(name, fontsize=10)
        bottom.set_xlabel(arm["varied"], fontsize=9)
    axes[0, 0].set_ylabel("training steps", fontsize=9)
    axes[1, 0].set_ylabel("peak memory, MB", fontsize=9)
    axes[0, 0].legend(fontsize=7, loc="lower left")
    _share(axes[0], (1, 3, 10, 30, 100))
    _share(axes[1], (10, 30, 100, 300, 1000))
    made.savefig(path, dpi=120)


def _panel(axes: Any, x: list[float], arm: Mapping[str, Any], what: str, planned: str) -> None:
    scale = 1e6 if what == "bytes" else 1.0
    expected = [row[planned] for row in arm["points"]]
    ranges = [(y, y) if isinstance(y, (int, float)) else y for y in expected]
    low, high = ([limit / scale for limit in limits] for limits in zip(*ranges, strict=True))
    axes.plot(x, low, color=PLANNED, linewidth=1, label="planned")
    axes.plot(x, high, color=PLANNED, linewidth=1)
    axes.fill_between(x, low, high, color=PLANNED, alpha=0.25)
    axes.plot(x, [row[what] / scale for row in arm["points"]], "o-", color=MEASURED, markersize=4, label="measured")
    fit = arm["exponents"][what]
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(x, [f"{value:g}" for value in x], fontsize=8)
    axes.minorticks_off()
    text = f"exponent {fit['exponent']:.2f} ± {fit['stderr']:.2f}"
    axes.text(0.04, 0.93, text, transform=axes.transAxes, fontsize=8)
    axes.grid(alpha=0.3)


def _share(row: Any, ticks: Sequence[int]) -> None:
    """One scale for a row, so that arms compare."""
    low = min(axes.get_ylim()[0] for axes in row)
    high = 1.3 * max(axes.get_ylim()[1] for axes in row)
    shown = [tick for tick in ticks if low <= tick <= high]
    for axes in row:
        axes.set_yticks(shown, [str(tick) for tick in shown], fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(low, high)
