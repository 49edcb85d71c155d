"""Figures of the experiments, in the style of the library's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lightning_spectral.report.figures.canvas import canvas
from lightning_spectral.report.figures.style import ink, kind_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
"""Okabe and Ito's colours, for what is not a kind of layer."""

DASHES = ("-", "--", "-.", ":")

BAND = "#BBBBBB"
"""Of the paper's figures."""

SORTS = {"depthwise": ("#E69F00", "v"), "pointwise": ("#009E73", "^")}
"""(colour, marker) of convolutions that are told apart."""

Ranges = Mapping[str, tuple[float, float]]


def strips(
    groups: Mapping[str, Sequence[float]],
    title: str,
    label: str,
    *,
    kinds: Mapping[str, str] | None = None,
    paper: Ranges | None = None,
) -> Figure:
    """A row per group with every seed's value, their mean and standard deviation, and the paper's range in grey.

    Args:
        groups: name of a row -> values.
        title, label: of the figure and its abscissa.
        kinds: name of a row -> kind of layer, whose colour it has.
        paper: name of a row -> (lowest, highest) figure of the paper.
    """
    with canvas(6.0, 1.0 + 0.24 * len(groups)) as drawing:
        figure = drawing.figure
        axes = figure.subplots()
        for y, (name, values) in enumerate(groups.items()):
            colour, marker = kind_style(kinds[name]) if kinds else (PALETTE[0], "o")
            if paper and name in paper:
                low, high = paper[name]
                axes.barh(y, max(high - low, 0.02), left=low, height=0.8, color=BAND, zorder=0)
            known = [value for value in values if math.isfinite(value)]
            if not known:
                axes.text(0.5, y, "no fit", transform=axes.get_yaxis_transform(), ha="center", va="center")
                continue
            axes.plot(known, [y] * len(known), "|", color=colour, markersize=7)
            width = stdev(known) if len(known) > 1 else 0.0
            axes.errorbar(fmean(known), y, xerr=width, fmt=marker, color=colour, capsize=2)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel(label + (" (grey: the paper)" if paper else ""))
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def parts(rows: Mapping[str, Mapping[str, Sequence[float]]], title: str, label: str) -> Figure:
    """A row per group with several quantities in it, each with its mean and standard deviation in its own colour.

    Args:
        rows: name of a row -> quantity -> values.
        title, label: of the figure and its abscissa.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    with canvas(6.0, 1.3 + 0.24 * len(rows)) as drawing:
        figure = drawing.figure
        axes = figure.subplots()
        axes.axvline(0, color=BAND, linewidth=0.8, zorder=0)
        for i, name in enumerate(names):
            found = {y: row[name] for y, row in enumerate(rows.values()) if row.get(name)}
            means = [fmean(values) for values in found.values()]
            widths = [stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
            marker, colour = "osD^vPX"[i % 7], PALETTE[i % len(PALETTE)]
            axes.errorbar(means, list(found), xerr=widths, fmt=marker, color=colour, capsize=2, label=name)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(label)
        figure.legend(loc="outside lower center", ncols=len(names))
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def curves(
    series: Mapping[str, Mapping[float, Sequence[float]]],
    title: str,
    labels: tuple[str, str],
    *,
    kinds: Mapping[str, str] | None = None,
    paper: Mapping[float, float] | None = None,
    log_x: bool = False,
) -> Figure:
    """A line per series through the means over seeds, with their standard deviations.

    Args:
        series: name -> abscissa -> values, one per seed. With kinds, names are "network: kind", a dash per network.
        title: of the figure.
        labels: of abscissa and ordinate.
        kinds: name -> kind of layer, whose colour it has.
        paper: the paper's figures, abscissa -> value.
        log_x: whether the abscissa is logarithmic, with ticks where the values are.
    """
    networks = list(dict.fromkeys(name.partition(":")[0] for name in series))
    with canvas(6.0, 3.2) as drawing:
        figure = drawing.figure
        axes = figure.subplots()
        for i, (name, points) in enumerate(series.items()):
            dash = DASHES[networks.index(name.partition(":")[0]) % len(DASHES)] if kinds else "-"
            colour, marker = kind_style(kinds[name]) if kinds else (PALETTE[i % len(PALETTE)], "osD^vPX"[i % 7])
            known = {x: [v for v in values if math.isfinite(v)] for x, values in points.items()}
            known = {x: values for x, values in known.items() if values}
            widths = [stdev(values) if len(values) > 1 else 0.0 for values in known.values()]
            means = [fmean(values) for values in known.values()]
            axes.errorbar(
                list(known), means, widths, color=colour, marker=marker, linestyle=dash, capsize=2, label=name
            )
        if paper:
            axes.plot(list(paper), list(paper.values()), "--", marker="*", color=ink(), label="the paper")
        if log_x:
            _at_values(axes, sorted({x for points in series.values() for x in points} | set(paper or {})))
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if kinds and len(networks) > 1:
            # Long enough to tell one network's dash from another's.
            figure.legend(loc="outside lower center", ncols=3, handlelength=4.0)
        elif len(series) + bool(paper) > 1:
            axes.legend()
        figure.suptitle(title, x=0.01, ha="left")
    return figure


@dataclass(frozen=True)
class Panel:
    """What one panel of `panels` shows.

    Attributes:
        title: of the panel.
        lines: kind of layer -> abscissa -> values, one per seed.
        share: abscissa -> share, up to 1.
    """

    title: str
    lines: Mapping[str, Mapping[float, Sequence[float]]]
    share: Mapping[float, float]


def panels(columns: Sequence[Sequence[Panel]], title: str, labels: tuple[str, str, str], *, paper: Ranges) -> Figure:
    """Panels with a line per kind of layer through the means over seeds, and a share as a dotted one.

    Args:
        columns: the panels of each column from top to bottom; shorter ones are at the bottom.
        title: of the figure.
        labels: of abscissa, ordinate and share.
        paper: kind of layer -> (lowest, highest) figure of the paper, a bar of the kind's colour at the left.
    """
    rows = max(map(len, columns))
    handles: dict[str, Any] = {}
    with canvas(max(1.6 * len(columns), 4.0), 1.0 + 2.3 * rows) as drawing:
        figure = drawing.figure
        grid = figure.subplots(rows, len(columns), squeeze=False, sharey=True)
        for j, column in enumerate(columns):
            empty = rows - len(column)
            for i, axes in enumerate(grid[:, j]):
                if i < empty:
                    axes.set_axis_off()
                    continue
                handles |= _draw_panel(axes, column[i - empty], labels[2], paper)
                axes.set_xlabel(labels[0] if i == rows - 1 and j == (len(columns) - 1) // 2 else "")
                axes.set_ylabel(labels[1] if j == 0 else "")
        grid[0][0].set_ylim(-0.05, None)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
        figure.suptitle(f"{title} (bars: the paper; shares below 0 are not drawn)", x=0.01, ha="left")
    return figure


def _draw_panel(axes: Axes, panel: Panel, share: str, paper: Ranges) -> dict[str, Any]:
    """Draw a panel, and return its lines by their labels."""
    handles: dict[str, Any] = {}
    for kind, points in panel.lines.items():
        colour, marker = SORTS.get(kind) or kind_style(kind)
        known = {x: [v for v in values if math.isfinite(v)] for x, values in points.items()}
        known = {x: values for x, values in known.items() if values}
        means = [fmean(values) for values in known.values()]
        widths = [stdev(values) if len(values) > 1 else 0.0 for values in known.values()]
        label = kind.replace("_", " ")
        handles[label] = axes.errorbar(list(known), means, widths, color=colour, marker=marker, capsize=2)
        if kind in paper:
            low, high = paper[kind]
            edge = axes.get_yaxis_transform()
            axes.plot([0.02, 0.02], [low - 0.02, high + 0.02], color=colour, linewidth=4, transform=edge)
    (handles[share],) = axes.plot(list(panel.share), list(panel.share.values()), ":", color=ink())
    ticks = sorted(panel.share)
    axes.set_xscale("log")
    axes.set_xlim(ticks[0] / 2, ticks[-1] * 1.4)
    shown = [ticks[0], ticks[-1]]
    axes.set_xticks(shown, [f"{x:,.0f}" for x in shown])
    axes.set_xticks([], minor=True)
    axes.set_title(panel.title)
    return handles


def _at_values(axes: Axes, values: Sequence[float]) -> None:
    # Steps begin at 0, which a logarithm has no place for.
    axes.set_xscale("symlog", linthresh=max(min((v for v in values if v > 0), default=1.0), 1.0))
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def clouds(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    labels: tuple[str, str],
    *,
    line: tuple[float, float] | None = None,
    log: bool = False,
) -> Figure:
    """Points of several groups, a colour and marker each.

    Args:
        groups: name -> (abscissae, ordinates).
        title: of the figure.
        labels: of abscissa and ordinate.
        line: (slope, intercept) of a line through all.
        log: whether the ordinate is logarithmic.
    """
    with canvas(6.0, 3.4) as drawing:
        figure = drawing.figure
        axes = figure.subplots()
        for i, (name, (x, y)) in enumerate(groups.items()):
            axes.plot(x, y, "osD^vPX"[i % 7], color=PALETTE[i % len(PALETTE)], alpha=0.7, label=name, linestyle="none")
        if line is not None:
            axes.axline((0, line[1]), slope=line[0], color=ink(), linewidth=0.8)
        if log:
            axes.set_yscale("log")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.legend()
        figure.suptitle(title, x=0.01, ha="left")
    return figure
