"""Figures over the directions of all layers: their spectra, and what Spectral Newton would do to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_spectral.optim.transfer import check_transfer, transfer
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures import style
from lightning_spectral.report.figures.canvas import canvas
from lightning_spectral.report.figures.style import WIDTH
from lightning_spectral.report.figures.ticks import LINE, log_ticks, name_ticks, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_spectral.report.figures.canvas import Result


NEGATIVE, MISSING = "#D55E00", "#BBBBBB"
"""Colours of h < 0, and of what was not measured or is rounding noise: neither is a colour of the scale."""

LABELS = {
    "sigma": ("Singular values of the gradient", "log₁₀ σ (loss per unit of weight)"),
    "h": ("Curvature along gradient directions", "log₁₀ h (loss per squared unit of weight)"),
}


def plot_spectrum_heatmap(
    report: SpectralReport,
    quantity: Literal["sigma", "h"] = "sigma",
    *,
    width: float = WIDTH,
    dark: bool = False,
    title: bool = True,
    ax: Result | None = None,
) -> Result:
    """Draw log10 of sigma_k or h_k, a row per layer in the order of the network, a column per direction k.

    Negative h are vermilion. What was not measured, is zero, or lies at or below the noise floor is grey; where a
    layer has fewer directions than others its row ends.

    Args:
        quantity: "sigma" or "h".

    Raises:
        ValueError: if the quantity is neither.
    """
    if quantity not in LABELS:
        raise ValueError(f"quantity must be 'sigma' or 'h', got {quantity!r}")
    layers = list(style.one_report(report).layers.values())
    heading, label = LABELS[quantity]
    rows = min(max(len(layers) * LINE * 1.15, 1.2), 6.0)
    values_lk, classes_lk = heat(report, quantity)
    with canvas(width, rows + 1.05, dark=dark, title=title, ax=ax) as drawing:
        from matplotlib.colors import ListedColormap

        (axes,) = drawing.panels()
        cells: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
        cells["extent"] = (0.5, values_lk.shape[1] + 0.5, len(layers) - 0.5, -0.5)
        colours = ListedColormap([style.ground(), MISSING, NEGATIVE])
        axes.imshow(classes_lk.numpy(), cmap=colours, vmin=0, vmax=2, **cells)
        image = axes.imshow(values_lk.numpy(), cmap="viridis", **cells)
        if bool(values_lk.isfinite().any()):
            drawing.figure.colorbar(image, ax=axes, label=label, location="bottom", fraction=0.2 / rows, aspect=40)
        axes.set_xlabel("direction k")
        whole_numbers(axes, range(1, values_lk.shape[1] + 1))
        name_ticks(axes.yaxis, [layer.name for layer in layers], rows)
        drawing.title(heading, [report])
        keys = ((1, MISSING, "not measured, or rounding noise"), (2, NEGATIVE, "h < 0"))
        drawing.legend(
            [style.patch_handle(text, color=c) for number, c, text in keys if bool((classes_lk == number).any())]
        )
    return drawing.shown(ax)


def heat(report: SpectralReport, quantity: Literal["sigma", "h"]) -> tuple[Tensor, Tensor]:
    """Return log10 of the values, NaN where there is none, and 1 where one is missing, 2 where it is negative."""
    layers = list(report.layers.values())
    columns = max(1, *(len(layer.sigma) for layer in layers))
    values_lk = torch.full((len(layers), columns), float("nan"), dtype=torch.float64)
    classes_lk = torch.zeros(len(layers), columns)
    for row, layer in enumerate(layers):
        values = layer.sigma if quantity == "sigma" else layer.h
        usable = (layer.sigma > layer.noise_floor) & (values > 0)
        values_lk[row, : len(values)] = torch.where(usable, values.log10(), torch.nan)
        classes_lk[row, : len(values)] = torch.where(values < 0, 2.0, torch.where(usable, 0.0, 1.0))
    return values_lk, classes_lk


def plot_transfer_functions(
    report: SpectralReport,
    *,
    damping: float = 0.1,
    width: float = WIDTH,
    dark: bool = False,
    title: bool = True,
    ax: Result | None = None,
) -> Result:
    """Draw T(sigma_hat) = sigma_hat / (sigma_hat^alpha + d), a curve per layer with its own alpha, and its sigma_hat.

    sigma_hat = sigma sqrt(r) / ||G||_F, as `SpectralNewton` scales it, r = groups min(m / groups, n). A report holds
    the K leading sigma alone, so ||G||_F here is the square root of the sum of their squares: every sigma_hat is
    too large by one factor, 1 / sqrt(the share of the gradient's square that they hold), and exact for r <= K. alpha
    is as measured, where `SpectralNewton` clamps it (`alpha_range`); layers without one are left out.

    Args:
        damping: d, above 0.

    Raises:
        ValueError: if the damping is not above 0.
    """
    check_transfer(0.0, damping)
    layers = [x for x in style.one_report(report).layers.values() if not math.isnan(x.alpha.exponent)]
    with canvas(width, 3.1, dark=dark, title=title, ax=ax) as drawing:
        (axes,) = drawing.panels()
        norm = r"\Vert G\Vert_F"
        axes.set(xscale="log", yscale="log", ylabel=r"$T=\hat\sigma\,/\,(\hat\sigma^\alpha+d)$")
        axes.set_xlabel(rf"$\hat\sigma = \sigma\,\sqrt{{r}}\,/\,{norm}$, with ${norm}$ of the K values measured")
        _transfer_curves(axes, layers, damping)
        n_missing = len(report.layers) - len(layers)
        note = f"layers without a fit: {n_missing}" if n_missing else ""
        drawing.title(f"Transfer functions, d = {damping:g}", [report], note)
        keys = style.kind_handles((layer.kind for layer in layers), line=True)
        drawing.legend([*keys, style.line_handle(":", "α = 1, d = 0")])
    return drawing.shown(ax)


def sigma_hat(layer: LayerSpectrum) -> Tensor:
    """Return (K,) usable sigma in units of the root mean square of all r, from the K measured alone: an upper bound."""
    usable = layer.sigma[layer.sigma > layer.noise_floor]
    (m, n), groups = layer.shape, layer.groups
    rank = groups * min(m // groups, n)
    return usable * (math.sqrt(rank) / float(torch.linalg.vector_norm(usable)))


def _transfer_curves(axes: Axes, layers: Sequence[LayerSpectrum], damping: float) -> None:
    axes.axhline(1.0, color=style.ink(), linestyle=":", linewidth=0.8, label="flat")
    if not layers:
        style.say(axes, "no layer has a fit of α")
        return
    marks = torch.cat([sigma_hat(layer) for layer in layers])
    low, high = min(float(marks.min()), 0.1) / 1.5, float(marks.max()) * 1.5
    x = torch.logspace(math.log10(low), math.log10(high), 300, dtype=torch.float64)
    for layer in layers:
        colour, marker = style.kind_style(layer.kind)
        look: dict[str, Any] = {"color": colour, "alpha": 0.9 if len(layers) <= 24 else 0.5, "label": layer.name}
        options = {"alpha": layer.alpha.exponent, "damping": damping}
        points = sigma_hat(layer)
        axes.plot(x.numpy(), transfer(x, **options).numpy(), linewidth=0.8, **look)
        axes.plot(points.numpy(), transfer(points, **options).numpy(), marker, markersize=3.0, **look)
    axes.set_xlim(low, high)
    log_ticks(axes.xaxis, low, high, gap=0.12)
    log_ticks(axes.yaxis, *axes.get_ylim(), gap=0.1)
