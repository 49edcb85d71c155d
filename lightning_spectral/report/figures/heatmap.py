"""The spectra of all layers as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures.canvas import canvas
from lightning_spectral.report.figures.legends import patch_handle
from lightning_spectral.report.figures.style import WIDTH, ground, one_report
from lightning_spectral.report.figures.ticks import LINE, name_ticks, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEGATIVE, MISSING = "#D55E00", "#BBBBBB"
"""Colours of h < 0, and of what was not measured or is rounding noise: neither is a colour of the scale."""

LABELS = {
    "sigma": ("Singular values of the gradient", "log₁₀ σ (loss per unit of weight)"),
    "h": ("Curvature along gradient directions", "log₁₀ h (loss per squared unit of weight)"),
}


@overload
def plot_spectrum_heatmap(
    report: SpectralReport,
    quantity: Literal["sigma", "h"] = "sigma",
    *,
    width: float = ...,
    dark: bool = ...,
    title: bool = ...,
) -> Figure: ...
@overload
def plot_spectrum_heatmap(
    report: SpectralReport, quantity: Literal["sigma", "h"] = "sigma", *, ax: Axes, dark: bool = ..., title: bool = ...
) -> Axes: ...
def plot_spectrum_heatmap(
    report: SpectralReport,
    quantity: Literal["sigma", "h"] = "sigma",
    *,
    width: float = WIDTH,
    dark: bool = False,
    title: bool = True,
    ax: Axes | None = None,
) -> Figure | Axes:
    """Draw log10 of sigma_k or h_k, a row per layer in the order of the network, a column per direction k.

    Negative h are vermilion. What was not measured, is zero, or lies at or below the noise floor is grey; where a
    layer has fewer directions than others its row ends.

    Args:
        report: what was measured.
        quantity: "sigma" or "h".

    Raises:
        ValueError: if the quantity is neither.
    """
    if quantity not in LABELS:
        raise ValueError(f"quantity must be 'sigma' or 'h', got {quantity!r}")
    layers = list(one_report(report).layers.values())
    heading, label = LABELS[quantity]
    rows = min(max(len(layers) * LINE * 1.15, 1.2), 6.0)
    values_lk, classes_lk = heat(report, quantity)
    with canvas(width, rows + 1.05, dark=dark, title=title, ax=ax) as drawing:
        from matplotlib.colors import ListedColormap

        (axes,) = drawing.panels()
        cells: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
        cells["extent"] = (0.5, values_lk.shape[1] + 0.5, len(layers) - 0.5, -0.5)
        colours = ListedColormap([ground(), MISSING, NEGATIVE])
        axes.imshow(classes_lk.numpy(), cmap=colours, vmin=0, vmax=2, **cells)
        image = axes.imshow(values_lk.numpy(), cmap="viridis", **cells)
        if bool(values_lk.isfinite().any()):
            drawing.figure.colorbar(image, ax=axes, label=label, location="bottom", fraction=0.2 / rows, aspect=40)
        axes.set_xlabel("direction k")
        whole_numbers(axes, range(1, values_lk.shape[1] + 1))
        name_ticks(axes.yaxis, [layer.name for layer in layers], rows)
        drawing.title(heading, [report])
        keys = ((1, MISSING, "not measured, or rounding noise"), (2, NEGATIVE, "h < 0"))
        drawing.legend([patch_handle(text, color=c) for number, c, text in keys if bool((classes_lk == number).any())])
    return drawing.figure if ax is None else ax


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
