"""Figures over the steps of training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures import style
from lightning_spectral.report.figures.by_layer import draw_alpha_band, hollow_handle
from lightning_spectral.report.figures.canvas import canvas
from lightning_spectral.report.figures.side_by_side import (
    Series,
    alpha_limits,
    alpha_of,
    alpha_to_trust,
    finite,
    kind_medians,
    layer_series,
    plot_runs_side_by_side,
)
from lightning_spectral.report.figures.style import WIDTH, Reports
from lightning_spectral.report.figures.ticks import log_ticks, whole_numbers
from lightning_spectral.report.palette import MODEL_STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_spectral.report.figures.canvas import Result

NO_MODEL = "#BBBBBB"
"""Colour of layers with too few values for any rank model."""

MOST_MARKERS = 25
"""Most markers on the thick line of a median, about: more would hide each other."""


def plot_alpha_over_training(
    reports: Reports | Mapping[str, Reports],
    *,
    width: float = WIDTH,
    dark: bool = False,
    title: bool = True,
    ax: Result | None = None,
) -> Result:
    """Draw the exponent alpha over the steps: a thin line per layer, and the median of each kind of layer thick.

    Points of fits to trust are filled, those of the others hollow, and medians are over fits to trust alone: a thick
    line breaks at a step where its kind has none, a thin one where a layer has no fit. The grey band is alpha from 1.85
    to 2.15. The axis shows all medians, 98 % of the fits to trust and 90 % of all; at initialisation single layers
    may leave it.

    Several runs are laid over each other, a panel per kind of layer and a colour, marker and line per run.

    Args:
        reports: such as ``probe.history``; of several runs by name, ``{"adamw": history, "muon": other_history}``.

    Raises:
        ValueError: if there are more runs than can be told apart, 24, or they are given together with ``ax``.
    """
    if isinstance(reports, Mapping):
        if ax is not None:
            raise ValueError("several runs take a panel per kind of layer, and ax is one; leave it out")
        return cast("Result", plot_runs_side_by_side(reports, width=width, dark=dark, title=title))
    history = style.all_reports(reports)
    x, label = style.positions(history)
    with canvas(width, 2.8, dark=dark, title=title, ax=ax) as drawing:
        (axes,) = drawing.panels()
        band = draw_alpha_band(axes)
        by_layer, of_trust = layer_series(history, alpha_of), layer_series(history, alpha_to_trust)
        size = _point_size(len(x) * len(by_layer))
        for (name, kind), values in by_layer.items():
            _thin(axes, x, values, kind)
            _points(axes, x, values, of_trust[name, kind], label=name, color=style.kind_style(kind)[0], markersize=size)
        by_kind = kind_medians(of_trust)
        for kind, values in by_kind.items():
            _thick(axes, x, values, kind)
        alpha_limits(axes, *(finite(of.values()) for of in (by_layer, of_trust, by_kind)))
        axes.set(xlabel=label, ylabel="exponent α")
        whole_numbers(axes, x)
        if not finite(by_layer.values()):
            style.say(axes, "no layer has a fit of α")
        drawing.title("Curvature exponent α over training, medians by kind of the fits to trust", history)
        fitted = [layer for r in history for layer in r.layers.values() if not math.isnan(layer.alpha.exponent)]
        kinds = [layer.kind for layer in fitted]
        drawing.legend([*style.kind_handles(kinds, line=True), *hollow_handle(fitted), band])
    return drawing.shown(ax)


def plot_scale_over_training(
    reports: Reports, *, width: float = WIDTH, dark: bool = False, title: bool = True, ax: Result | None = None
) -> Result:
    """Draw the largest curvature h and the largest singular value sigma of each layer over the steps, on log axes.

    An exponent does not tell how sharp the loss is: this does. A thin line per layer, and the median of each kind
    thick. A line breaks where a value is missing or not above 0.
    """
    history = style.all_reports(reports)
    x, label = style.positions(history)
    with canvas(width, 3.9, dark=dark, title=title, ax=ax, panels=2) as drawing:
        kinds: list[str] = []
        quantities = {"largest h": attrgetter("h_max"), "largest σ": attrgetter("sigma_max")}
        for axes, (name, read) in zip(drawing.panels(2, sharex=True), quantities.items(), strict=True):
            kinds += _scale_panel(axes, x, layer_series(history, read))
            axes.set_ylabel(name)
            whole_numbers(axes, x)
        axes.set_xlabel(label)
        drawing.title("Largest curvature and singular value over training, medians by kind", history)
        drawing.legend(style.kind_handles(kinds, line=True))
    return drawing.shown(ax)


def plot_rank_models_over_training(
    reports: Reports, *, width: float = WIDTH, dark: bool = False, title: bool = True, ax: Result | None = None
) -> Result:
    """Draw which rank model describes how many layers' gradient spectra, stacked over the steps.

    The model of a layer is that with the lowest BIC (`fit_rank_models`); the fractions are of all layers of the
    report. arXiv 2606.02596 calls their change in training the spectral phase transition.
    """
    history = style.all_reports(reports)
    x, label = style.positions(history)
    with canvas(width, 2.3, dark=dark, title=title, ax=ax) as drawing:
        (axes,) = drawing.panels()
        bands = model_bands(history)
        edges, bottoms = _cells(x), [0.0] * len(x)
        for name, colour, hatch, shares in bands:
            axes.stairs(
                [b + s for b, s in zip(bottoms, shares, strict=True)], edges, baseline=bottoms, fill=True, label=name,
                facecolor=colour, edgecolor=style.ground(), hatch=hatch, linewidth=0,
            )  # fmt: skip
            bottoms = [b + s for b, s in zip(bottoms, shares, strict=True)]
        axes.set(xlabel=label, ylabel="fraction of layers", xlim=(edges[0], edges[-1]), ylim=(0, 1))
        whole_numbers(axes, x)
        drawing.title("Rank models of the gradient spectra, by BIC", history)
        look = {"edgecolor": style.ground()}
        drawing.legend([style.patch_handle(name, facecolor=c, hatch=hatch, **look) for name, c, hatch, _ in bands])
    return drawing.shown(ax)


Band = tuple[str, str, str, list[float]]


def model_bands(reports: Sequence[SpectralReport]) -> list[Band]:
    """Return (name, colour, hatch, fraction of layers at each report) per model; layers without a model last."""
    winners = [[layer.rank_models.winner for layer in report.layers.values()] for report in reports]
    bands = [
        (look.name, style.model_colour(look), look.hatch, [of.count(model) / len(of) for of in winners])
        for model, look in MODEL_STYLE.items()
    ]
    missing = [of.count(None) / len(of) for of in winners]
    return [*bands, ("too few values", NO_MODEL, "", missing)] if any(missing) else bands


def _thin(axes: Axes, x: Sequence[int], values: Sequence[float], kind: str) -> None:
    axes.plot(x, values, color=style.kind_style(kind)[0], linewidth=0.6, alpha=0.45, label=kind)


def _thick(axes: Axes, x: Sequence[int], values: Sequence[float], kind: str) -> None:
    """Draw the medians of a kind; of many, markers stand at some, and at those without a neighbour for a line."""
    colour, marker = style.kind_style(kind)
    every = math.ceil(len(x) / MOST_MARKERS)
    gaps = list(map(math.isnan, [math.nan, *values, math.nan]))
    alone = [i for i in range(len(x)) if gaps[i] and not gaps[i + 1] and gaps[i + 2]]
    marked = sorted({*range(0, len(x), every), *alone})
    axes.plot(x, values, color=colour, marker=marker, markevery=marked, linewidth=2.0, label=kind, zorder=4)


def _points(axes: Axes, x: Sequence[int], values: Sequence[float], of_trust: Sequence[float], **look: Any) -> None:
    """Draw the points of a layer, filled where its fit is to be trusted and hollow where it is not."""
    doubtful = [value if math.isnan(good) else math.nan for value, good in zip(values, of_trust, strict=True)]
    for series, face in ((of_trust, look["color"]), (doubtful, style.ground())):
        if finite([series]):
            edge = look["markersize"] / 5
            axes.plot(x, series, "o", markerfacecolor=face, markeredgewidth=edge, alpha=0.7, **look)


def _point_size(count: int) -> float:
    """Return the size of so many points, smaller where there are many.

    >>> _point_size(40), _point_size(6000)
    (3.0, 1.5)
    """
    return min(3.0, max(1.5, 60 / math.sqrt(count)))


def _scale_panel(axes: Axes, x: Sequence[int], by_layer: Series) -> list[str]:
    """Draw a quantity of all layers on a log axis; returns the kinds that it shows."""
    # A log axis would draw what is not above 0 as a line to the bottom.
    layers = [(kind, _above_zero(values)) for (_, kind), values in by_layer.items()]
    for kind, values in layers:
        _thin(axes, x, values, kind)
    for kind, values in kind_medians(by_layer).items():
        _thick(axes, x, _above_zero(values), kind)
    shown = finite(values for _, values in layers)
    if not shown:
        axes.set_yticks([])
        style.say(axes, "no layer has a value above 0")
        return []
    axes.set_yscale("log")
    low, high = math.log10(min(shown)), math.log10(max(shown))
    room = 0.07 * max(high - low, 0.3)
    bottom, top = 10 ** (low - room), 10 ** (high + room)
    axes.set_ylim(bottom, top)
    log_ticks(axes.yaxis, bottom, top, gap=0.12)
    return [kind for kind, values in layers if finite([values])]


def _above_zero(values: Sequence[float]) -> list[float]:
    return [value if value > 0 else math.nan for value in values]


def _cells(x: Sequence[int]) -> list[float]:
    """Return edges of cells, halfway between abscissae and a little beyond the ends; empty at a step taken twice."""
    inner = [(a + b) / 2 for a, b in itertools.pairwise(x)]
    beyond = max(0.5, 0.02 * (x[-1] - x[0]))
    return [x[0] - beyond, *inner, x[-1] + beyond]
