"""Keys of a legend: to kinds of layers, markers, lines and areas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_spectral.layers.kinds import KINDS
from lightning_spectral.report.figures.style import ground, ink, kind_style
from lightning_spectral.report.figures.ticks import literal
from lightning_spectral.report.palette import Dash

if TYPE_CHECKING:
    from matplotlib.artist import Artist


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
