"""Figures over the steps of training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_spectral.analysis import ALPHA_BAND
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures.by_layer import draw_alpha_band, padded
from lightning_spectral.report.figures.legends import kind_handles, legend, patch_handle
from lightning_spectral.report.figures.style import (
    MODEL_STYLE,
    WIDTH,
    Reports,
    all_reports,
    canvas,
    ground,
    kind_style,
    positions,
    say,
    title,
)
from lightning_spectral.report.figures.ticks import whole_numbers

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_MODEL = "#BBBBBB"
"""Of layers with too few values for any rank model."""


def plot_alpha_over_training(reports: Reports, *, width: float = WIDTH, dark: bool = False) -> Figure:
    """The exponent alpha over the steps: a thin line per layer, and the median of each kind of layer thick.

    The grey band is alpha from 1.85 to 2.15. A line breaks where a layer had no fit. The axis shows all medians and
    98 % of the layers' values; at initialisation single layers may leave it.

    Args:
        reports: such as ``probe.history``; abscissae are their steps, or their numbers where one has no step.
        width: of the figure, in inches.
        dark: light on dark.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is no report, or one holds no layers.
    """
    found = all_reports(reports)
    x, label = positions(found)
    with canvas(width, 2.8, dark=dark) as figure:
        axes = figure.subplots()
        band = draw_alpha_band(axes)
        by_layer, by_kind = alpha_series(found)
        for (_, kind), values in by_layer.items():
            axes.plot(x, values, color=kind_style(kind)[0], linewidth=0.6, alpha=0.45, label=kind)
        for kind, values in by_kind.items():
            colour, marker = kind_style(kind)
            axes.plot(x, values, color=colour, marker=marker, linewidth=2.0, label=kind)
        _limits(axes, list(by_layer.values()), list(by_kind.values()))
        axes.set(xlabel=label, ylabel="exponent α")
        whole_numbers(axes, x)
        if not any(math.isfinite(value) for values in by_layer.values() for value in values):
            say(axes, "no layer has a fit of α")
        title(figure, "Curvature exponent α over training, medians by kind", found)
        shown = (kind for kind, values in by_kind.items() if not all(map(math.isnan, values)))
        legend(figure, [*kind_handles(shown, line=True), band])
    return figure


def plot_rank_models_over_training(reports: Reports, *, width: float = WIDTH, dark: bool = False) -> Figure:
    """Which rank model describes how many layers' gradient spectra, stacked over the steps.

    The model of a layer is that with the lowest BIC (`fit_rank_models`); the fractions are of all layers of the
    report. arXiv 2606.02596 calls their change in training the spectral phase transition.

    Args:
        reports: such as ``probe.history``; abscissae are their steps, or their numbers where one has no step.
        width: of the figure, in inches.
        dark: light on dark.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is no report, or one holds no layers.
    """
    found = all_reports(reports)
    x, label = positions(found)
    with canvas(width, 2.3, dark=dark) as figure:
        axes = figure.subplots()
        bands = model_bands(found)
        edges, bottoms = _cells(x), [0.0] * len(x)
        for name, colour, hatch, shares in bands:
            axes.stairs(
                [b + s for b, s in zip(bottoms, shares, strict=True)], edges, baseline=bottoms, fill=True, label=name,
                facecolor=colour, edgecolor=ground(), hatch=hatch, linewidth=0,
            )  # fmt: skip
            bottoms = [b + s for b, s in zip(bottoms, shares, strict=True)]
        axes.set(xlabel=label, ylabel="fraction of layers", xlim=(edges[0], edges[-1]), ylim=(0, 1))
        whole_numbers(axes, x)
        title(figure, "Rank models of the gradient spectra, by BIC", found)
        legend(figure, _band_handles(bands))
    return figure


Band = tuple[str, str, str, list[float]]


def model_bands(reports: Sequence[SpectralReport]) -> list[Band]:
    """(name, colour, hatch, fraction of layers at each report) per model; layers without one last, if there are any."""
    winners = [[layer.rank_models.winner for layer in report.layers.values()] for report in reports]
    bands = [
        (style.name, style.colour, style.hatch, [of.count(model) / len(of) for of in winners])
        for model, style in MODEL_STYLE.items()
    ]
    missing = [of.count(None) / len(of) for of in winners]
    return [*bands, ("too few values", NO_MODEL, "", missing)] if any(missing) else bands


Series = dict[tuple[str, str], list[float]]


def alpha_series(reports: Sequence[SpectralReport]) -> tuple[Series, dict[str, list[float]]]:
    """((name, kind) -> alpha at each report, NaN where there is none; kind -> its median at each report)."""
    keys = dict.fromkeys((layer.name, layer.kind) for report in reports for layer in report.layers.values())
    by_layer = {
        (name, kind): [r.layers[name].alpha.exponent if name in r.layers else math.nan for r in reports]
        for name, kind in keys
    }
    by_kind = {
        kind: [median([values[i] for (_, k), values in by_layer.items() if k == kind]) for i in range(len(reports))]
        for kind in dict.fromkeys(kind for _, kind in keys)
    }
    return by_layer, by_kind


def _limits(axes: Axes, layers: Sequence[list[float]], medians: Sequence[list[float]]) -> None:
    values = sorted(v for series in layers for v in series if math.isfinite(v))
    inner = [v for series in medians for v in series if math.isfinite(v)]
    if not values:
        return
    tail = int(0.01 * len(values))
    inner += [*ALPHA_BAND, values[tail], values[-1 - tail]]
    axes.set_ylim(*padded(inner))


def _cells(x: Sequence[int]) -> list[float]:
    """Edges of cells, halfway between abscissae and a little beyond the ends; at a step taken twice one is empty."""
    inner = [(a + b) / 2 for a, b in itertools.pairwise(x)]
    beyond = max(0.5, 0.02 * (x[-1] - x[0]))
    return [x[0] - beyond, *inner, x[-1] + beyond]


def _band_handles(bands: Sequence[Band]) -> list[Artist]:
    return [patch_handle(name, facecolor=c, edgecolor=ground(), hatch=hatch) for name, c, hatch, _ in bands]
