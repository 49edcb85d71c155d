"""The noise benchmark's figure: error of alpha, and signal, against the number of gradient samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"plain": "#D55E00", "few": "#0072B2", "auto": "#009E73", "signal": "#999999"}
"""Okabe and Ito's, which the colour-blind can tell apart."""

BATCH = 64
"""Samples of a training step."""

LABELS = {"plain": "gradient and curvature of as many", "few": "curvature of 64 of them"}


def figure(networks: Mapping[str, Any], path: Path) -> None:
    """Draw a panel per network.

    Args:
        networks: name -> its rows.
        path: of the PNG.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "lightning-spectral[plot]"') from error
    # Without pyplot, which would look for a display.
    made = Figure(figsize=(5.2 * len(networks), 3.8), layout="constrained")
    for axes, (name, network) in zip(made.subplots(1, len(networks), squeeze=False)[0], networks.items(), strict=True):
        keys = _panel(axes, name, network)
    made.legend(handles=keys, fontsize=8, loc="outside lower center", ncols=5)
    made.savefig(path, dpi=85)


def _panel(axes: Any, name: str, network: Mapping[str, Any]) -> list[Any]:
    """Draw one network; return the keys."""
    varied = network["varied"]
    axes.axhline(0.0, color="black", linewidth=1, linestyle="--", label="all samples")
    for arm, label in LABELS.items():
        rows = [row for row in varied if row["arm"] == arm]
        samples, alphas = _medians(rows, "bias")
        axes.plot(samples, alphas, "o-", color=COLOURS[arm], markersize=4, label=label)
    auto = [row for row in network["probes"] if row["arm"] == "auto" and row["samples"] > BATCH]
    axes.plot(
        [row["samples"] for row in auto], [row["bias"] for row in auto], "*", color=COLOURS["auto"], markersize=9,
        label='default probes, "auto"', zorder=3,
    )  # fmt: skip
    axes.set(
        xscale="log",
        title=f"{name}, batches of 64",
        xlabel="samples of the gradient",
        ylabel="alpha less that of all samples",
    )
    ticks = sorted({row["samples"] for row in varied})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    right = axes.twinx()
    samples, signals = _medians([row for row in varied if row["arm"] == "plain"], "signal")
    right.plot(samples, signals, ":", color=COLOURS["signal"], label="signal S (right)")
    right.set(ylim=(0, 1.02), ylabel="signal S, median layer")
    return [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]


def _medians(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    samples = sorted({row["samples"] for row in rows})
    return samples, [statistics.median(row[key] for row in rows if row["samples"] == n) for n in samples]
