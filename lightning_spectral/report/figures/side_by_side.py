"""Values of layers over several reports, and the figure of several runs laid over each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from lightning_spectral.analysis import ALPHA_BAND, trusted
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures import style
from lightning_spectral.report.figures.by_layer import draw_alpha_band, padded
from lightning_spectral.report.figures.canvas import canvas
from lightning_spectral.report.figures.style import WIDTH, Reports
from lightning_spectral.report.figures.ticks import literal, whole_numbers
from lightning_spectral.report.palette import MOST_RUNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


alpha_of: Callable[[LayerSpectrum], float] = attrgetter("alpha.exponent")


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


COLUMN, ROW = 1.7, 1.55
"""Inches that a panel takes at least, and is high."""


def plot_runs_side_by_side(
    runs: Mapping[str, Reports], *, width: float = WIDTH, dark: bool = False, title: bool = True
) -> Figure:
    """Draw alpha over the steps of several runs: a panel per kind of layer, a colour, marker and line per run.

    Thick lines are medians over the fits to trust, thin ones layers; limits are those of `plot_alpha_over_training`.
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"need 1 to {MOST_RUNS} runs, each a name and its reports, got {len(runs)}")
    histories = {str(name): style.all_reports(reports) for name, reports in runs.items()}
    everything = [report for history in histories.values() for report in history]
    label = style.positions(everything)[1]
    xs = [_abscissae(history, label) for history in histories.values()]
    fits = [layer_series(history, alpha_of) for history in histories.values()]
    of_trust = [layer_series(history, alpha_to_trust) for history in histories.values()]
    kinds = style.in_order(kind for series in fits for (_, kind), values in series.items() if finite([values]))
    columns = max(1, min(len(kinds), int(width / COLUMN)))
    rows = max(1, math.ceil(len(kinds) / columns))
    with canvas(width, 0.4 + ROW * rows, dark=dark, title=title) as drawing:
        panels = drawing.panels(rows, columns, sharex=True, sharey=True)
        band = [draw_alpha_band(axes) for axes in panels][:1]
        for axes, kind in zip(panels, kinds, strict=False):
            axes.set_title(kind.replace("_", " "))
            for i, x in enumerate(xs):
                _draw_run(axes, x, _of_kind(fits[i], kind), _of_kind(of_trust[i], kind), i)
        for empty in panels[max(1, len(kinds)) :]:
            empty.set_visible(False)
        _set_limits(panels[0], fits, of_trust)
        whole_numbers(panels[0], [at for x in xs for at in x], most=4)
        for i, axes in enumerate(panels):
            axes.tick_params(labelbottom=i + columns >= len(kinds))
        if not kinds:
            style.say(panels[0], "no layer of any run has a fit of α")
        drawing.ordinate("exponent α")
        note = f"{len(runs)} run{'s' * (len(runs) > 1)}"
        drawing.title("Curvature exponent α over training, medians by kind of the fits to trust", everything, note)
        drawing.legend([*(_run_handle(i, name) for i, name in enumerate(histories)), *band], abscissa=label)
    return drawing.figure


def _of_kind(series: Series, kind: str) -> Series:
    return {key: values for key, values in series.items() if key[1] == kind}


def _abscissae(history: Sequence[SpectralReport], label: str) -> list[int]:
    """Return the steps, or the numbers where some report of any run has no step."""
    x, own = style.positions(history)
    return x if own == label else list(range(len(history)))


def _draw_run(axes: Axes, x: Sequence[int], fits: Series, of_trust: Series, i: int) -> None:
    colour, marker, dash = style.run_style(i)
    for values in fits.values():
        axes.plot(x, values, color=colour, linewidth=0.6, alpha=0.35, label=str(i))
    for values in kind_medians(of_trust).values():
        look: dict[str, Any] = {"linestyle": dash, "marker": marker, "markersize": 3.5, "linewidth": 1.6}
        every = max(1, len(x) // 12)
        axes.plot(x, values, color=colour, label=str(i), zorder=4, markevery=every, **look)


def _set_limits(axes: Axes, fits: Sequence[Series], of_trust: Sequence[Series]) -> None:
    medians = [values for series in of_trust for values in kind_medians(series).values()]
    of_all, of_those = (finite(values for series in both for values in series.values()) for both in (fits, of_trust))
    alpha_limits(axes, of_all, of_those, finite(medians))


def _run_handle(i: int, name: str) -> Any:
    colour, marker, dash = style.run_style(i)
    return style.line_handle(dash, literal(name), colour, marker=marker, linewidth=1.6)
