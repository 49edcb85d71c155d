"""Figures with a panel per layer: curvature against singular value, and the singular values by rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_spectral.layers.names import brief, check_matches, layer_names, select, shortened
from lightning_spectral.numerics.power_law import RankModel, rank_designs
from lightning_spectral.numerics.statistics import evenly
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures import style
from lightning_spectral.report.figures.canvas import Canvas, canvas
from lightning_spectral.report.figures.confidence_band import fitted_points, line_and_band
from lightning_spectral.report.figures.style import WIDTH
from lightning_spectral.report.figures.ticks import literal, log_ticks
from lightning_spectral.report.palette import MODEL_STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_spectral.report.figures.canvas import Result

MAX_PANELS = 12
"""Most panels of a figure; three in a row fill a page."""

FEW_NAMED = 3
"""Number of layers without a panel up to which they are named."""

PANEL, PANEL_NAME = 1.75, 20
"""Least width of a panel in inches, and characters of a layer's name that fit above it."""

MARKS = {
    "negative": ("v", "h < 0, on the bottom edge"),
    "left out": ("o", "left out of the fit"),
    "off": ("<", "σ is rounding noise"),
}
"""Marker of points that are not in the fit, and what they are; hollow but for the first."""

NOTE: dict[str, Any] = {"fontsize": 6.5, "zorder": 1.5}
"""Look of the text within a panel, which lies below its points."""

PANEL_HEIGHT, HEADED_HEIGHT = 1.5, 1.75
"""Inches of a panel below its layer's name, and below a heading of some lines."""

BAND_MOST = 0.6
"""Fraction of a panel's height that the band may take in the mean: one that fills the panel tells as much in a word."""

Layers = str | Sequence[str] | None


def plot_power_law(
    report: SpectralReport,
    layers: Layers = None,
    *,
    width: float = WIDTH,
    dark: bool = False,
    title: bool = True,
    ax: Result | None = None,
) -> Result:
    """Draw curvature h_k against singular value sigma_k, a panel per layer, with the fitted line h ~ sigma^alpha.

    The shaded band is the 95 % confidence band of the line (`line_and_band`), left out, as the heading says, where it
    would fill most of the panel; bars are standard errors of sampled h.
    Directions with h < 0 are triangles on the bottom edge. Those left out of the fit are hollow: at their h where it
    is positive, else on the bottom edge, and as a triangle to the left where sigma, rounding noise, is off the scale.

    Args:
        layers: names or glob patterns, as of `measure_spectra`; None: all. Of more than 12, 12 evenly over depth.

    Raises:
        ValueError: if a pattern matches none of them.
    """
    selected, note = choose_layers(report, layers, one=ax is not None)
    rows, columns, height = _grid(len(selected), width, HEADED_HEIGHT)
    with canvas(width, height, dark=dark, title=title, ax=ax) as drawing:
        marks: set[str] = set()
        panels = _panels(drawing, rows, columns, len(selected))
        for axes, layer in zip(panels, selected, strict=True):
            marks |= _power_law(axes, layer, headed=drawing.headed)
        drawing.ordinate("curvature h (loss per squared unit of weight)")
        drawing.title(r"Power law $h\propto\sigma^\alpha$ of curvature", [report], note)
        keys = style.kind_handles(layer.kind for layer in selected)
        keys += [
            style.mark_handle(m, text, hollow=key != "negative") for key, (m, text) in MARKS.items() if key in marks
        ]
        drawn = {artist.get_label() for axes in panels for artist in (*axes.lines, *axes.collections)}
        keys += [style.line_handle("-", "fit")] if "fit" in drawn else []
        keys += [style.patch_handle("95 % band", color=style.ink(), alpha=0.15)] if "band" in drawn else []
        drawing.legend(keys, abscissa="singular value σ (loss per unit of weight)")
    return drawing.shown(ax)


def plot_rank_profiles(
    report: SpectralReport,
    layers: Layers = None,
    *,
    width: float = WIDTH,
    dark: bool = False,
    title: bool = True,
    ax: Result | None = None,
) -> Result:
    """Draw singular values sigma_k against their rank k, a panel per layer, with the three rank models.

    The model with the lowest BIC is drawn thick and named, with the difference of the next one's BIC to its own.
    Values at or below the noise floor, which no model is fitted to, are hollow.

    Args:
        layers: as of `plot_power_law`.

    Raises:
        ValueError: if a pattern matches none of them.
    """
    selected, note = choose_layers(report, layers, one=ax is not None)
    rows, columns, height = _grid(len(selected), width, PANEL_HEIGHT)
    with canvas(width, height, dark=dark, title=title, ax=ax) as drawing:
        for axes, layer in zip(_panels(drawing, rows, columns, len(selected)), selected, strict=True):
            _rank_profile(axes, layer, headed=drawing.headed)
        drawing.ordinate("singular value σ (loss per unit of weight)")
        drawing.title("Gradient spectra and rank models, by BIC", [report], note)
        models = [style.line_handle(look.dash, look.name, style.model_colour(look)) for look in MODEL_STYLE.values()]
        drawing.legend([*style.kind_handles(layer.kind for layer in selected), *models], abscissa="rank k")
    return drawing.shown(ax)


def choose_layers(report: SpectralReport, layers: Layers, *, one: bool = False) -> tuple[list[LayerSpectrum], str]:
    """Return the layers that a grid of panels, or one, shows, and a note if those are not all that were asked for."""
    selected = list(style.one_report(report).layers.values())
    if layers is not None:
        names = {name: name for name in report.layers}
        if not layers:
            raise ValueError(f"layers: {layers!r} selects no layer; give names or patterns, or None for all")
        check_matches("layers", layers, names, layer_names)
        selected = [report.layers[name] for name in select(names, layers, layer_names)]
    if one and len(selected) != 1:
        raise ValueError(f"ax has room for one layer, got {len(selected)}: name it in layers")
    if len(selected) <= MAX_PANELS:
        return selected, ""
    shown = evenly(len(selected), MAX_PANELS)
    missing = [brief(layer.name) for i, layer in enumerate(selected) if i not in shown]
    which = f"without {', '.join(missing)}" if len(missing) <= FEW_NAMED else "evenly over depth"
    return [selected[i] for i in shown], f"{MAX_PANELS} of {len(selected)} layers, {which}"


def rank_values(layer: LayerSpectrum) -> Tensor:
    """Return (n,) the singular values that the rank models of a layer are fitted to."""
    return layer.spectrum[layer.spectrum > layer.noise_floor]


def _grid(panels: int, width: float, each: float) -> tuple[int, int, float]:
    """Return rows, columns and inches of the height; of one row enough for the label of its ordinate."""
    columns = max(1, min(panels, int(width / PANEL)))
    rows = math.ceil(panels / columns)
    return rows, columns, max(0.1 + each * rows, 2.8)


def _panels(drawing: Canvas, rows: int, columns: int, count: int) -> list[Axes]:
    panels = drawing.panels(rows, columns)
    for empty in panels[count:]:
        empty.remove()
    return panels[:count]


def _power_law(axes: Axes, layer: LayerSpectrum, *, headed: bool) -> set[str]:
    """Draw one layer; returns which of `MARKS` it has."""
    colour, marker = style.kind_style(layer.kind)
    used, sigma, h = fitted_points(layer), layer.sigma, layer.h
    positive = (h > 0) & (sigma > 0)
    axes.set(xscale="log", yscale="log")
    heading = _heading(layer)
    _frame(axes, sigma[positive | (sigma > layer.noise_floor)], h[positive])
    if bool(used.any()) and not _fit_line(axes, layer, sigma[used]):
        heading.append("band not drawn: too wide")
    if bool((layer.h_stderr[positive] > 0).any()):
        bars = layer.h_stderr[positive].numpy()
        axes.errorbar(sigma[positive].numpy(), h[positive].numpy(), bars, fmt="none", ecolor=colour, elinewidth=0.6)
    points: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 3.5}
    axes.plot(sigma[used].numpy(), h[used].numpy(), label="fitted", **points)
    unused = positive & ~used
    if bool(unused.any()):
        axes.plot(sigma[unused].numpy(), h[unused].numpy(), label="left out", **points | {"mfc": style.ground()})
    marks = _edge_marks(axes, layer)
    if headed:
        axes.set_title("\n".join(heading), fontsize=6.5)
    return marks | ({"left out"} if bool(unused.any()) else set())


def _fit_line(axes: Axes, layer: LayerSpectrum, fitted: Tensor) -> bool:
    """Draw the line, and its band if it leaves some of the panel free; returns whether it does."""
    low, high = (float(end.log10()) for end in fitted.aminmax())
    x = torch.logspace(low, high, 100, dtype=torch.float64)
    line, lower, upper = line_and_band(layer, x)
    axes.plot(x.numpy(), line.numpy(), color=style.ink(), linewidth=0.9, label="fit")
    bottom, top = axes.get_ylim()
    heights = (upper.clamp(bottom, top) / lower.clamp(bottom, top)).log() / math.log(top / bottom)
    drawn = bool(heights.mean() <= BAND_MOST)
    if drawn:
        axes.fill_between(
            x.numpy(), lower.numpy(), upper.numpy(), color=style.ink(), alpha=0.15, linewidth=0, label="band"
        )
    return drawn


def _edge_marks(axes: Axes, layer: LayerSpectrum) -> set[str]:
    """Mark on the bottom edge the directions that a logarithmic ordinate cannot hold; returns which of `MARKS`."""
    colour, _ = style.kind_style(layer.kind)
    left = axes.get_xlim()[0]
    off = ~(layer.sigma > left)
    masks = {"negative": layer.h < 0, "left out": ~(layer.h < 0) & ~(layer.h > 0) & ~off, "off": ~(layer.h < 0) & off}
    for key, mask in masks.items():
        x = layer.sigma[mask].clamp_min(left).numpy()
        face = colour if key == "negative" else style.ground()
        edge = axes.get_xaxis_transform()
        # An empty line that is not clipped would upset the layout.
        if len(x):
            axes.plot(x, 0 * x, MARKS[key][0], color=colour, mfc=face, transform=edge, label=key, **style.EDGE)
    return {key for key, mask in masks.items() if bool(mask.any())}


def _frame(axes: Axes, x: Tensor, y: Tensor) -> None:
    """Set limits and ticks of logarithmic axes around points, with room at the bottom for marks on the edge."""
    sides = ((x, axes.xaxis, axes.set_xlim, 0.06, 0.06, 0.3), (y, axes.yaxis, axes.set_ylim, 0.12, 0.08, 0.18))
    for values, axis, set_limits, below, above, gap in sides:
        if not len(values):
            axis.set_ticks([])
            axis.set_ticks([], minor=True)
            continue
        low, high = (float(end.log10()) for end in values.aminmax())
        # Where all values are equal, or nearly so, a tenth of a decade is shown around them.
        middle, span = (low + high) / 2, max(high - low, 0.1)
        ends = 10 ** (middle - span * (0.5 + below)), 10 ** (middle + span * (0.5 + above))
        set_limits(*ends)
        log_ticks(axis, *ends, gap=gap)


def _heading(layer: LayerSpectrum) -> list[str]:
    """Return the lines above a panel: the layer, its fit and its negative curvatures."""
    fit, lines = layer.alpha, [literal(shortened(layer.name, PANEL_NAME))]
    lines.append(
        "no fit" if math.isnan(fit.exponent) else f"α = {fit.exponent:.2f} ± {fit.stderr:.2f}, r² = {fit.r2:.2f}"
    )
    return [*lines, f"{layer.n_negative} of {layer.n_usable} h < 0"] if layer.n_negative else lines


def _rank_profile(axes: Axes, layer: LayerSpectrum, *, headed: bool) -> None:
    colour, marker = style.kind_style(layer.kind)
    values = rank_values(layer)
    noise = layer.spectrum[(layer.spectrum <= layer.noise_floor) & (layer.spectrum > 0)]
    axes.set(xscale="log", yscale="log")
    if headed:
        axes.set_title(literal(shortened(layer.name, PANEL_NAME)), fontsize=7)
    points: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 3.5}
    axes.plot(range(1, len(values) + 1), values.numpy(), label="sigma", **points)
    ranks = range(len(values) + 1, len(values) + len(noise) + 1)
    axes.plot(ranks, noise.numpy(), label="noise", **points | {"mfc": style.ground()})
    _frame(axes, torch.arange(1, max(2, len(values) + len(noise)) + 1), values)
    k = torch.linspace(1, max(1, len(values)), 100, dtype=torch.float64)
    for model, fit in layer.rank_models.fits.items():
        if math.isnan(fit.bic):
            continue
        look, line = MODEL_STYLE[model], model_curve(model, fit.coefficients, k)
        width = 1.8 if model == layer.rank_models.winner else 0.9
        stroke: dict[str, Any] = {"color": style.model_colour(look), "linestyle": look.dash, "linewidth": width}
        axes.plot(k.numpy(), line.numpy(), zorder=1, label=model, **stroke)
    axes.text(0.04, 0.04, _winner_text(layer), transform=axes.transAxes, ha="left", va="bottom", **NOTE)


def model_curve(model: RankModel, coefficients: Sequence[float], k: Tensor) -> Tensor:
    """Return sigma at ranks k by a rank model: exp(a + b log k), exp(a + b k) or exp(a + b log k + c (log k)^2)."""
    return (
        torch.stack([c * column for c, column in zip(coefficients, rank_designs(k)[model], strict=True)]).sum(0).exp()
    )


def _winner_text(layer: LayerSpectrum) -> str:
    models = layer.rank_models
    if models.winner is None:
        return f"no model: {models.n_used} values"
    losers = [bic for name, bic in models.bic.items() if name != models.winner and not math.isnan(bic)]
    margin = f"\nΔBIC {min(losers) - models.bic[models.winner]:.1f}" if losers else ""
    return MODEL_STYLE[models.winner].name + margin
