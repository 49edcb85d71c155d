"""The noise benchmark's figure: alpha and signal against the number of gradient samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"plain": "#D55E00", "few": "#0072B2", "auto": "#009E73", "signal": "#999999"}
"""Okabe and Ito's, which the colour-blind can tell apart."""

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
        _panel(axes, name, network)
    made.savefig(path, dpi=130)


def _panel(axes: Any, name: str, network: Mapping[str, Any]) -> None:
    varied = network["varied"]
    reference = statistics.median(row["reference"] for row in varied)
    axes.axhline(reference, color="black", linewidth=1, linestyle="--", label="all samples")
    for arm, label in LABELS.items():
        rows = [row for row in varied if row["arm"] == arm]
        samples, alphas = _medians(rows, "alpha")
        axes.plot(samples, alphas, "o-", color=COLOURS[arm], markersize=4, label=label)
    last = max(row["step"] for row in network["probes"] if row["arm"] == "auto")
    auto = [row for row in network["probes"] if row["arm"] == "auto" and row["step"] == last]
    axes.plot(
        [row["samples"] for row in auto], [row["alpha"] for row in auto], "*", color=COLOURS["auto"], markersize=11,
        label='the default probe, "auto"', zorder=3,
    )  # fmt: skip
    axes.set(
        xscale="log", title=f"{name}, batches of 64", xlabel="samples of the gradient", ylabel="alpha, median layer"
    )
    ticks = sorted({row["samples"] for row in varied})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    right = axes.twinx()
    samples, signals = _medians([row for row in varied if row["arm"] == "plain"], "signal")
    right.plot(samples, signals, ":", color=COLOURS["signal"], label="signal S (right)")
    right.set(ylim=(0, 1.02), ylabel="signal S, median layer")
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8, loc="center right")


def _medians(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    samples = sorted({row["samples"] for row in rows})
    return samples, [statistics.median(row[key] for row in rows if row["samples"] == n) for n in samples]
