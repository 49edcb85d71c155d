"""Figures with a point or a curve per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_spectral.analysis import ALPHA_BAND, trusted
from lightning_spectral.layers.names import shortened
from lightning_spectral.numerics.statistics import median, zeta_bound
from lightning_spectral.records.fit_quality import LEAST_SIGNAL
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures import style
from lightning_spectral.report.figures.canvas import canvas, room
from lightning_spectral.report.figures.style import WIDTH, Reports
from lightning_spectral.report.figures.ticks import NAME_LENGTH, log_ticks, name_ticks

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from lightning_spectral.report.figures.canvas import Result

TRANSFER_BAND = 0.1
"""Largest transfer error within the band."""

EARLIER = 0.35
"""Opacity of the layers of all reports but the last."""


def plot_alpha_by_depth(
    report: SpectralReport, *, width: float = WIDTH, dark: bool = False, title: bool = True, ax: Result | None = None
) -> Result:
    """Draw the exponent alpha of each layer in the order of the network, with its standard error.

    Colour and marker are the layer's kind, hollow where its fit is not to be trusted. The grey band is alpha from 1.85
    to 2.15. A layer without a fit is a cross on the bottom edge. Where there are too many names, some are left out.
    The pale steps, on the right axis, are the signal S of each layer's gradient, the share of its square that is no
    sampling noise, held within 0 and 1; below the dotted mark at 0.8 no fit is trusted. They are left out where no
    signal is known.
    """
    layers = list(style.one_report(report).layers.values())
    names = [layer.name for layer in layers]
    height = 2.4 + 0.055 * max(len(shortened(name, NAME_LENGTH)) for name in names)
    with canvas(width, height, dark=dark, title=title, ax=ax) as drawing:
        (axes,) = drawing.panels()
        band = draw_alpha_band(axes)
        signal = _draw_signal(axes, [layer.gradient_noise.signal for layer in layers])
        missing = [i for i, layer in enumerate(layers) if math.isnan(layer.alpha.exponent)]
        for i, layer in enumerate(layers):
            if i not in missing:
                look = {"markersize": 4.5 if len(layers) <= 40 else 3.0, "elinewidth": 0.8, **_look(layer)}
                axes.errorbar(i, layer.alpha.exponent, layer.alpha.stderr, **look)
        # An empty line that is not clipped would upset the layout.
        if missing:
            edge = axes.get_xaxis_transform()
            axes.plot(
                missing, [0.0] * len(missing), "x", color=style.ink(), transform=edge, label="no fit", **style.EDGE
            )
        axes.set(xlim=(-0.6, len(layers) - 0.4), ylim=_alpha_limits(layers), ylabel="α ± standard error")
        name_ticks(axes.xaxis, names, room(ax, width))
        axes.tick_params(axis="x", which="major", labelrotation=90)
        if len(missing) == len(layers):
            style.say(axes, f"no layer has a fit of α\n({layers[0].note or 'too few usable directions'})")
        drawing.title("Curvature exponent α by depth", [report])
        marks = [style.mark_handle("x", "no fit")] if missing else []
        fitted = [layer for layer in layers if not math.isnan(layer.alpha.exponent)]
        drawing.legend(
            [*style.kind_handles(layer.kind for layer in fitted), *hollow_handle(fitted), *marks, band, *signal]
        )
    return drawing.shown(ax)


def plot_transfer_identity(
    reports: Reports, *, width: float = 4.0, dark: bool = False, title: bool = True, ax: Result | None = None
) -> Result:
    """Draw the decay s of the curvature against alpha gamma, its value by the transfer relation, a point per layer.

    On the line s = alpha gamma; the band holds transfer errors abs(s - alpha gamma) / abs(s) up to 10 %. Hollow
    where alpha's fit is not to be trusted; the median error in the title is over the others. Of several reports, the
    layers of all but the last are pale.
    """
    history = style.all_reports(reports)
    with canvas(width, 0.9 * width, dark=dark, title=title, ax=ax) as drawing:
        (axes,) = drawing.panels()
        points = _points(history, lambda layer: layer.s.exponent)
        low, high = padded([v for x, y, _, _ in points for v in (x, y)])
        ends = torch.linspace(low, high, 200)
        _identity_band(axes, ends)
        for x, y, layer, opacity in points:
            axes.plot(x, y, alpha=opacity, **_look(layer))
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal", xlabel="α γ", ylabel="decay s of the curvature")
        axes.locator_params(nbins=7)
        if not points:
            style.say(axes, "no layer has fits of α, γ and s")
        drawing.title("Transfer relation s = α γ", history, _transfer_note([layer for _, _, layer, _ in points]))
        band = style.patch_handle("error up to 10 %", color=style.ink(), alpha=0.12)
        drawing.legend([*_keys(history, points), style.line_handle("-", "s = α γ"), band])
    return drawing.shown(ax)


def plot_participation_ratio(
    reports: Reports, *, width: float = WIDTH, dark: bool = False, title: bool = True, ax: Result | None = None
) -> Result:
    """Draw the participation ratio of the curvature against alpha gamma, with the zeta bound and that of a window.

    The solid line is zeta(alpha gamma)^2 / zeta(2 alpha gamma), infinite up to alpha gamma = 1; the dashed one is what
    a pure power law of n directions has, n the number of positive h that most layers have. Both are bounds for exact
    power laws: a spectrum that bends can lie above them.
    """
    history = style.all_reports(reports)
    with canvas(width, 2.9, dark=dark, title=title, ax=ax) as drawing:
        (axes,) = drawing.panels()
        points = _points(history, lambda layer: layer.pr_curvature)
        low, high = padded([0.9, 1.6, *(x for x, _, _, _ in points)])
        curves = _bounds(axes, [layer.alpha.n_used for _, _, layer, _ in points], low, high)
        for x, y, layer, opacity in points:
            axes.plot(x, y, alpha=opacity, **_look(layer))
        top = 1.5 * max([10.0, *(y for _, y, _, _ in points)])
        axes.set(xlim=(low, high), yscale="log", ylim=(0.9, top), xlabel="α γ")
        axes.set_ylabel("PR of curvature (directions)")
        log_ticks(axes.yaxis, 0.9, top, gap=0.1)
        if not points:
            style.say(axes, "no layer has a fit of α and γ")
        drawing.title("Participation ratio of curvature, zeta bound", history)
        drawing.legend([*_keys(history, points), *curves])
    return drawing.shown(ax)


def draw_alpha_band(axes: Axes) -> Artist:
    """Draw the band around alpha = 2; returns its key."""
    axes.axhspan(*ALPHA_BAND, color=style.ink(), alpha=0.12, linewidth=0, label="band")
    return style.patch_handle(f"α from {ALPHA_BAND[0]} to {ALPHA_BAND[1]}", color=style.ink(), alpha=0.12)


def _draw_signal(axes: Axes, signals: Sequence[float]) -> list[Artist]:
    """Draw the signal of each layer behind the points, on an axis of its own from 0 to 1; returns its key."""
    if all(map(math.isnan, signals)):
        return []
    right = axes.twinx()
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    # Steps as wide as a layer, so that the signal between two layers is that of one of them.
    edges = [i - 0.5 for i in range(len(signals) + 1)]
    right.stairs(
        [min(max(s, 0.0), 1.0) for s in signals], edges, baseline=None, color=style.QUIET, linewidth=0.7, alpha=0.6
    )
    right.axhline(LEAST_SIGNAL, color=style.QUIET, linestyle=":", linewidth=0.6, alpha=0.6)
    right.set(ylim=(0, 1.02), yticks=[0, 0.5, LEAST_SIGNAL, 1], yticklabels=["0", "0.5", f"{LEAST_SIGNAL:g}", "1"])
    right.set_ylabel("signal S", color=style.QUIET)
    right.tick_params(axis="y", color=style.QUIET, labelcolor=style.QUIET)
    return [style.line_handle("-", "signal S, right", style.QUIET)]


def _alpha_limits(layers: Sequence[LayerSpectrum]) -> tuple[float, float]:
    """Return limits around the exponents and the band; the part of an error bar beyond 1 may leave the axes."""
    ends = [*ALPHA_BAND]
    for layer in layers:
        if not math.isnan(layer.alpha.exponent):
            error = min(layer.alpha.stderr, 1.0)
            ends += [layer.alpha.exponent - error, layer.alpha.exponent + error]
    return padded(ends)


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Return limits around values, with some room."""
    low, high = (min(values), max(values)) if values else (0.0, 3.0)
    room = 0.07 * max(high - low, 0.2)
    return low - room, high + room


Point = tuple[float, float, LayerSpectrum, float]


def _points(reports: Sequence[SpectralReport], ordinate: Callable[[LayerSpectrum], float]) -> list[Point]:
    """Return (alpha gamma, ordinate, layer, opacity) of every layer that has both."""
    return [
        (layer.alpha_gamma, ordinate(layer), layer, 1.0 if report is reports[-1] else EARLIER)
        for report in reports
        for layer in report.layers.values()
        if not (math.isnan(layer.alpha_gamma) or math.isnan(ordinate(layer)))
    ]


def _look(layer: LayerSpectrum) -> dict[str, Any]:
    """Return the look of a layer's point, hollow where its fit is not to be trusted."""
    colour, marker = style.kind_style(layer.kind)
    face = colour if trusted(layer) else style.ground()
    return {"marker": marker, "linestyle": "none", "color": colour, "markerfacecolor": face, "label": layer.name}


def _transfer_note(layers: Sequence[LayerSpectrum]) -> str:
    """Return the median transfer error of the fits to trust, and how many of them lie within the band."""
    errors = [layer.transfer_error for layer in layers if trusted(layer)]
    if not errors:
        return "no fit to trust" if layers else ""
    within = sum(error <= TRANSFER_BAND for error in errors)
    return (
        f"median error {100 * median(errors):.1f}\xa0% of the fits to trust, {within} of {len(errors)} within 10\xa0%"
    )


def _identity_band(axes: Axes, x: Tensor) -> None:
    axes.plot(x.numpy(), x.numpy(), color=style.ink(), linewidth=0.8, label="s = αγ")
    limits = (x / (1 + TRANSFER_BAND)).numpy(), (x / (1 - TRANSFER_BAND)).numpy()
    axes.fill_between(x.numpy(), *limits, color=style.ink(), alpha=0.12, linewidth=0, label="10 %")


def _bounds(axes: Axes, windows: Sequence[int], low: float, high: float) -> list[Artist]:
    """Draw both bounds; returns their keys."""
    x = torch.linspace(low, high, 300).tolist()
    infinite = [value for value in x if value > 1.001]
    axes.plot(infinite, [zeta_bound(value) for value in infinite], color=style.ink(), linewidth=1.0, label="zeta bound")
    keys = [style.line_handle("-", "zeta bound")]
    if windows:
        n = max(set(windows), key=lambda window: (windows.count(window), window))
        axes.plot(x, [zeta_bound(v, n) for v in x], "--", color=style.ink(), linewidth=1.0, label="window")
        keys.append(style.line_handle("--", f"bound for {n} directions"))
    return keys


def _keys(reports: Sequence[SpectralReport], points: Sequence[Point]) -> list[Artist]:
    keys = style.kind_handles(layer.kind for _, _, layer, _ in points)
    keys += hollow_handle(layer for _, _, layer, _ in points)
    return [*keys, style.mark_handle("o", "earlier, pale", opacity=EARLIER)] if len(reports) > 1 else keys


def hollow_handle(layers: Iterable[LayerSpectrum]) -> list[Artist]:
    """Return the key to hollow markers if one of the layers has a fit not to be trusted."""
    return [style.mark_handle("o", "fit not to be trusted", hollow=True)] if not all(map(trusted, layers)) else []
