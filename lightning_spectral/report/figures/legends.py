"""Legends: keys to kinds of layers, markers, lines and areas, below the axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_spectral.layers.kinds import KINDS
from lightning_spectral.report.figures.style import Dash, ground, ink, kind_style
from lightning_spectral.report.figures.ticks import literal

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

LEGEND_COLUMN, LEGEND_LINE = 1.5, 0.16
"""Inches that a column of the legend takes, and a line."""


def kind_handles(kinds: Iterable[str], *, line: bool = False) -> list[Artist]:
    """Return keys to the kinds given, in the order of `KINDS`."""
    from matplotlib.lines import Line2D

    unique = list(dict.fromkeys(kinds))
    order = [kind for kind in KINDS if kind in unique] + [kind for kind in unique if kind not in KINDS]
    style: Dash = "-" if line else "none"
    return [
        Line2D([], [], color=colour, marker=marker, linestyle=style, label=literal(kind.replace("_", " ")))
        for kind in order
        for colour, marker in [kind_style(kind)]
    ]


def mark_handle(marker: str, label: str, *, hollow: bool = False, opacity: float = 1.0) -> Artist:
    """Return a key to a marker that means the same in every colour."""
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"markerfacecolor": ground() if hollow else ink(), "alpha": opacity}
    return Line2D([], [], color=ink(), marker=marker, linestyle="none", label=label, **look)


def line_handle(dash: Dash, label: str, colour: str | None = None) -> Artist:
    """Return a key to a line, in the colour of text where none is given."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour or ink(), linestyle=dash, linewidth=1.0, label=label)


def patch_handle(label: str, **look: Any) -> Artist:
    """Return a key to an area."""
    from matplotlib.patches import Patch

    return Patch(label=label, linewidth=0, **look)


def legend(figure: Figure, handles: Sequence[Artist], *, abscissa: str = "") -> None:
    """Add a legend below the axes, by which the figure grows, with an abscissa for all panels.

    The abscissa is the legend's title, since matplotlib lays a legend out over a `supxlabel`.
    """
    if not handles:
        return
    columns = min(len(handles), int(figure.get_figwidth() / LEGEND_COLUMN))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, title=abscissa or None)
    rows = math.ceil(len(handles) / columns) + bool(abscissa)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * rows)
