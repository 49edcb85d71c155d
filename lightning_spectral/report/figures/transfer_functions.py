"""Figure of what Spectral Newton would do to each layer's singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from lightning_spectral.optim.transfer import check_transfer, transfer
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures.canvas import canvas
from lightning_spectral.report.figures.legends import kind_handles, line_handle
from lightning_spectral.report.figures.style import (
    WIDTH,
    ink,
    kind_style,
    one_report,
    say,
)
from lightning_spectral.report.figures.ticks import log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@overload
def plot_transfer_functions(
    report: SpectralReport, *, damping: float = ..., width: float = ..., dark: bool = ..., title: bool = ...
) -> Figure: ...
@overload
def plot_transfer_functions(
    report: SpectralReport, *, damping: float = ..., ax: Axes, dark: bool = ..., title: bool = ...
) -> Axes: ...
def plot_transfer_functions(
    report: SpectralReport,
    *,
    damping: float = 0.1,
    width: float = WIDTH,
    dark: bool = False,
    title: bool = True,
    ax: Axes | None = None,
) -> Figure | Axes:
    """Draw T(sigma_hat) = sigma_hat / (sigma_hat^alpha + d), a curve per layer with its own alpha, and its sigma_hat.

    sigma_hat = sigma sqrt(r) / ||G||_F, as `SpectralNewton` scales it, r = groups min(m / groups, n). A report holds
    the K leading sigma alone, so ||G||_F here is the square root of the sum of their squares: every sigma_hat is
    too large by one factor, 1 / sqrt(the share of the gradient's square that they hold), and exact for r <= K. alpha
    is as measured, where `SpectralNewton` clamps it (`alpha_range`); layers without one are left out.

    Args:
        report: what was measured.
        damping: d, above 0.

    Raises:
        ValueError: if the damping is not above 0.
    """
    check_transfer(0.0, damping)
    layers = [x for x in one_report(report).layers.values() if not math.isnan(x.alpha.exponent)]
    with canvas(width, 3.1, dark=dark, title=title, ax=ax) as drawing:
        (axes,) = drawing.panels()
        norm = r"\Vert G\Vert_F"
        axes.set(xscale="log", yscale="log", ylabel=r"$T=\hat\sigma\,/\,(\hat\sigma^\alpha+d)$")
        axes.set_xlabel(rf"$\hat\sigma = \sigma\,\sqrt{{r}}\,/\,{norm}$, with ${norm}$ of the K values measured")
        _transfer_curves(axes, layers, damping)
        n_missing = len(report.layers) - len(layers)
        note = f"layers without a fit: {n_missing}" if n_missing else ""
        drawing.title(f"Transfer functions, d = {damping:g}", [report], note)
        keys = kind_handles((layer.kind for layer in layers), line=True)
        drawing.legend([*keys, line_handle(":", "α = 1, d = 0")])
    return drawing.figure if ax is None else ax


def sigma_hat(layer: LayerSpectrum) -> Tensor:
    """Return (K,) usable sigma in units of the root mean square of all r, from the K measured alone: an upper bound."""
    usable = layer.sigma[layer.sigma > layer.noise_floor]
    (m, n), groups = layer.shape, layer.groups
    rank = groups * min(m // groups, n)
    return usable * (math.sqrt(rank) / float(torch.linalg.vector_norm(usable)))


def _transfer_curves(axes: Axes, layers: Sequence[LayerSpectrum], damping: float) -> None:
    axes.axhline(1.0, color=ink(), linestyle=":", linewidth=0.8, label="flat")
    if not layers:
        say(axes, "no layer has a fit of α")
        return
    marks = torch.cat([sigma_hat(layer) for layer in layers])
    low, high = min(float(marks.min()), 0.1) / 1.5, float(marks.max()) * 1.5
    x = torch.logspace(math.log10(low), math.log10(high), 300, dtype=torch.float64)
    for layer in layers:
        colour, marker = kind_style(layer.kind)
        look: dict[str, Any] = {"color": colour, "alpha": 0.9 if len(layers) <= 24 else 0.5, "label": layer.name}
        options = {"alpha": layer.alpha.exponent, "damping": damping}
        points = sigma_hat(layer)
        axes.plot(x.numpy(), transfer(x, **options).numpy(), linewidth=0.8, **look)
        axes.plot(points.numpy(), transfer(points, **options).numpy(), marker, markersize=3.0, **look)
    axes.set_xlim(low, high)
    log_ticks(axes.xaxis, low, high, gap=0.12)
    log_ticks(axes.yaxis, *axes.get_ylim(), gap=0.1)
