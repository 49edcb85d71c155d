"""Values of layers over several reports, and the limits of an axis for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from lightning_spectral.analysis import ALPHA_BAND, trusted
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures.by_layer import padded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = dict[tuple[str, str], list[float]]


def layer_series(reports: Sequence[SpectralReport], read: Callable[[LayerSpectrum], float]) -> Series:
    """Return (name, kind) of each layer -> its value at each report, NaN where the layer is not in it."""
    keys = dict.fromkeys((layer.name, layer.kind) for report in reports for layer in report.layers.values())
    return {
        (name, kind): [read(r.layers[name]) if name in r.layers else math.nan for r in reports] for name, kind in keys
    }


def kind_medians(series: Series) -> dict[str, list[float]]:
    """Return kind -> median of its layers at each report, NaN left out."""
    kinds: dict[str, list[list[float]]] = {}
    for (_, kind), values in series.items():
        kinds.setdefault(kind, []).append(values)
    return {kind: [median(at) for at in zip(*of_kind, strict=True)] for kind, of_kind in kinds.items()}


def alpha_of(layer: LayerSpectrum) -> float:
    """Return alpha, NaN without a fit."""
    return layer.alpha.exponent


def alpha_to_trust(layer: LayerSpectrum) -> float:
    """Return alpha, NaN without a fit to trust."""
    return layer.alpha.exponent if trusted(layer) else math.nan


def finite(series: Iterable[Sequence[float]]) -> list[float]:
    """Return all finite values of several series."""
    return [value for values in series for value in values if math.isfinite(value)]


def _inner(values: Sequence[float], share: float) -> list[float]:
    """Return the ends of the inner values, less this share of them on each side."""
    tail = int(share * len(values))
    ordered = sorted(values)
    return [ordered[tail], ordered[-1 - tail]] if ordered else []


def alpha_limits(axes: Axes, layers: Sequence[float], of_trust: Sequence[float], medians: Sequence[float]) -> None:
    """Set limits that show all medians, 98 % of the fits to trust and 90 % of all; none without a layer."""
    if layers:
        axes.set_ylim(*padded([*ALPHA_BAND, *medians, *_inner(of_trust, 0.01), *_inner(layers, 0.05)]))
