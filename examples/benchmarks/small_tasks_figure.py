"""The small tasks' figure: test losses of SpectralNewton beside AdamW's, a row per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

STYLES = {
    "adamw": ("#000000", "AdamW at its best rate"),
    "swapped": ("#D55E00", "SpectralNewton at that rate"),
    "swapped_fixed": ("#009E73", "the same, damping=0.1"),
    "spectral_newton": ("#0072B2", "SpectralNewton at its best rate"),
}
"""Colour, of Okabe and Ito's, and label."""


def figure(summary: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a dot per seed and a bar at the mean, as the loss's difference from AdamW's mean in percent of that.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "lightning-spectral[plot]"') from error
    rows = {(row["task"], row["arm"]): row["tests"] for row in summary}
    tasks = list(dict.fromkeys(task for task, _ in rows))
    # Without pyplot, which would look for a display.
    drawing = Figure(figsize=(8, 1.3 + 0.5 * len(tasks)), layout="constrained")
    axes = drawing.add_subplot()
    axes.axvline(0, color="#999999", linewidth=0.8)
    for y, task in enumerate(tasks):
        reference = fmean(rows[task, "adamw"])
        for k, (arm, (colour, label)) in enumerate(STYLES.items()):
            changes = [100 * (loss - reference) / abs(reference) for loss in rows[task, arm]]
            place = y + 0.2 * (k - 1.5)
            axes.plot(changes, [place] * len(changes), ".", color=colour, markersize=5, alpha=0.7)
            axes.plot(fmean(changes), place, "|", color=colour, markersize=10, markeredgewidth=2.2, label=label)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda change, _: f"{change:+.0f} %" if change else "0")
    axes.set_xlabel("test loss beside AdamW's mean; left of 0 is better")
    axes.grid(axis="x", alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles[:4], labels[:4], loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    drawing.savefig(path, dpi=120)
