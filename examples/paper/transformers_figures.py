"""The two figures of TRANSFORMERS.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.paper.transformers_results import KINDS, PUBLISHED, field_of, mean_and_deviation, over_seeds
from examples.paper.transformers_tables import COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#000000")
"""Of the kinds of layer: Okabe and Ito's, told apart with any colour vision."""
MARKERS = ("o", "s", "^", "v", "D")

PAPER_LAYERS = ("attn_qkv", "attn_proj", "mlp_up", "mlp_down")
"""Of the paper's GPT2_LM data, which hold no head."""

STATES = (
    ("+ batch 16", "text, held out"),
    ("+ 1000 of them", "uniform tokens, at their entropy"),
    ("+ learned by heart: paper-like", "uniform tokens, learned by heart"),
)
"""Label of the path -> title of a panel."""


def plot_spectra(record: Mapping[str, Any], layer: str = "blocks.1.down.weight") -> Figure:
    """h_k against sigma_k of one layer in three states of the same network, with the fit, its k = 1 marked."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(1, len(STATES), figsize=(10.5, 3.6), layout="constrained")
    for axis, (label, title) in zip(axes, STATES, strict=True):
        _scatter(axis, record["spectra"][f"{label}/{layer}"])
        axis.set(xscale="log", yscale="log", xlabel="singular value of the gradient, sigma_k")
        axis.set_title(title, fontsize=10)
        # Less than a decade would be labelled at every tick.
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("curvature h_k")
    figure.suptitle(f"{layer.removesuffix('.weight')}: what the line of alpha goes through", fontsize=11)
    return figure


def _scatter(axis: Axes, spectrum: Mapping[str, Any]) -> None:
    points = [(s, h) for s, h in zip(spectrum["sigma"], spectrum["h"], strict=True) if h > 0]
    x, y = zip(*points, strict=True)
    alpha = spectrum["alpha"]
    # A least-squares line goes through the means of the logarithms.
    centre = [math.exp(sum(map(math.log, values)) / len(values)) for values in (x, y)]
    ends = [min(x), max(x)]
    axis.plot(ends, [centre[1] * (end / centre[0]) ** alpha for end in ends], color="#888888", zorder=1)
    axis.scatter(x[1:], y[1:], s=22, color=COLOURS[0], label="k = 2 to 20")
    axis.scatter(x[:1], y[:1], s=60, color=COLOURS[3], marker="D", label="k = 1")
    axis.text(0.05, 0.93, f"alpha = {alpha:.2f}", transform=axis.transAxes, va="top")
    axis.legend(loc="lower right", frameon=False, fontsize=8)
    axis.grid(alpha=0.25, which="both")


def plot_path(record: Mapping[str, Any], labels: Mapping[str, str]) -> Figure:
    """Alpha and PR_h by kind of layer along the path, means and deviations over seeds, and alpha against steps.

    Args:
        record: of transformers_results.
        labels: label of the path -> tick.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.6), layout="constrained", width_ratios=(5, 4, 4))
    for axis, key, name in ((axes[0], "alpha", "alpha"), (axes[1], "pr", "PR_h")):
        values = over_seeds(record["runs"], "path", key)
        for i, kind in enumerate(KINDS):
            shifted = [j + 0.11 * (i - 2) for j in range(len(labels))]
            means, deviations = zip(*(values[label][kind] for label in labels), strict=True)
            axis.errorbar(
                shifted, means, deviations, fmt=MARKERS[i], color=COLOURS[i], ms=6, capsize=2, label=COLUMNS[i]
            )
        axis.set(ylabel=name, title=f"{name}, one change at a time")
        axis.grid(alpha=0.25, axis="y")
    measured = {row["layer"]: row["pr"] for row in record["paper"] if row["experiment"] == "GPT2_LM"}
    for axis, values in ((axes[0], PUBLISHED), (axes[1], [measured.get(layer, math.nan) for layer in PAPER_LAYERS])):
        for i, value in enumerate(values):
            place = len(labels) + 0.11 * (i - 2)
            axis.plot([place], [value], MARKERS[i], color=COLOURS[i], mfc="none", ms=8)
        axis.set_xticks(range(len(labels) + 1), [*labels.values(), "paper"], fontsize=8)
    axes[0].axhline(2, color="#888888", lw=0.8)
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    _steps(axes[2], record)
    return figure


def _steps(axis: Axes, record: Mapping[str, Any]) -> None:
    styles = {"text": COLOURS[0], "uniform": COLOURS[3]}
    for data, colour in styles.items():
        for how, line in (("endless", "--"), ("by heart", "-")):
            runs = [run for run in record["runs"] if run["group"] == "steps" and run["label"] == f"{data}, {how}"]
            steps = sorted({field_of(run, "steps") for run in runs})
            values = [
                mean_and_deviation([r["kinds"]["block"]["alpha"] for r in runs if field_of(r, "steps") == step])
                for step in steps
            ]
            means, deviations = ([value[part] for value in values] for part in (0, 1))
            axis.errorbar(steps, means, deviations, fmt=line, marker="o", ms=4, capsize=2, color=colour,
                          label=f"{data}, {how}")  # fmt: skip
    axis.axhline(2, color="#888888", lw=0.8)
    axis.set(title="alpha of the blocks' layers, median", xlabel="training steps", ylabel="alpha")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """As PNG, small."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
