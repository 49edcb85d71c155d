"""What a figure is drawn on: a figure of its own, or axes that the caller has."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures.style import DARK, STYLE
from lightning_spectral.report.figures.ticks import literal
from lightning_spectral.report.terminal.tables import method_of

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from typing_extensions import TypeVar

    # What a figure's function returns: the axes it is given, or without any a figure.
    Result = TypeVar("Result", bound="Figure | Axes | Sequence[Axes]", default="Figure")

MIN_WIDTH = 3.25
"""Inches: a column of a two-column paper."""

TITLE_LETTER, TITLE_LINE = 0.067, 0.16
"""Inches that a letter of the title takes in the mean, and a line of it."""

LEGEND_COLUMN, LEGEND_LINE = 1.5, 0.16
"""Inches that a column of the legend takes, and a line."""


@dataclass(frozen=True)
class Canvas:
    """A figure of its own, or the caller's axes, ``given``, within another."""

    figure: Figure
    given: tuple[Axes, ...]
    titled: bool

    @property
    def headed(self) -> bool:
        """Whether a panel has a heading; on the caller's axes that is the title."""
        return self.titled or not self.given

    def panels(self, rows: int = 1, columns: int = 1, **options: Any) -> list[Axes]:
        """Return the axes to draw on, the caller's or a grid of new ones."""
        return list(self.given) or list(self.figure.subplots(rows, columns, squeeze=False, **options).flat)

    def shown(self, ax: Result | None) -> Result:
        """Return the caller's axes, or the figure where there are none."""
        return cast("Result", self.figure if ax is None else ax)

    def title(self, text: str, reports: Sequence[SpectralReport], note: str = "") -> None:
        """Write what is shown, and below it when and how that was measured; the figure grows by it.

        Above the caller's axes it is the first of both alone.
        """
        if not self.titled or (self.given and self.given[0].get_title()):
            return
        if self.given:
            self.given[0].set_title("\n".join(_wrapped(text, _inches(self.given[0]))), loc="left")
            return
        below = literal(", ".join(part for part in (*_origin(reports), note) if part))
        lines = [line for part in (text, below) for line in _wrapped(part, self.figure.get_figwidth())]
        self.figure.suptitle("\n".join(lines), x=0.01, ha="left")
        self.figure.set_figheight(self.figure.get_figheight() + TITLE_LINE * len(lines))

    def ordinate(self, text: str) -> None:
        """Label the ordinate that all panels have in common."""
        if self.given:
            self.given[0].set_ylabel(text)
        else:
            self.figure.supylabel(text)

    def legend(self, handles: Sequence[Artist], *, abscissa: str = "") -> None:
        """Add a legend below the axes, by which the figure grows, or within the caller's; with an abscissa for all.

        The abscissa is the legend's title, since matplotlib lays a legend out over a `supxlabel`.
        """
        if self.given and abscissa:
            self.given[0].set_xlabel(abscissa)
        if not handles:
            return
        if self.given:
            # The data are below it, wherever there is least of them.
            self.given[0].legend(handles=list(handles), frameon=True, framealpha=0.8, edgecolor="none")
            return
        columns = min(len(handles), int(self.figure.get_figwidth() / LEGEND_COLUMN))
        self.figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, title=abscissa or None)
        rows = math.ceil(len(handles) / columns) + bool(abscissa)
        self.figure.set_figheight(self.figure.get_figheight() + LEGEND_LINE * rows)


@contextmanager
def canvas(
    width: float,
    height: float,
    *,
    dark: bool = False,
    title: bool = True,
    ax: Any = None,
    panels: int = 1,
) -> Iterator[Canvas]:
    """Yield what to draw on, in the style of `style.py` and in no other.

    A figure of its own is laid out before the style is left, since matplotlib makes ticks only then and would take the
    user's style.

    Args:
        width, height: in inches, of a figure of its own.
        panels: how many of them there have to be.
    """
    try:
        from matplotlib import style

        from lightning_spectral.report.figures.figure import PaperFigure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "lightning-spectral[plot]"') from error
    if not MIN_WIDTH <= width < math.inf:
        raise ValueError(f"width must be at least {MIN_WIDTH} inches for labels to fit, got {width}")
    given = _given(ax, panels)
    with style.context(["default", {**STYLE, **(DARK if dark else {})}]):
        # Without pyplot, which would look for a display.
        figure = given[0].figure.figure if given else PaperFigure(figsize=(width, height), layout="constrained")
        yield Canvas(figure, given, title)
        for axes in given:
            for label in (axes.xaxis.label, axes.yaxis.label):
                label.set_fontsize(STYLE["axes.labelsize"])
        for axes in given or figure.axes:
            # How many ticks there are goes by the size of their labels, in the settings in force if none is set.
            axes.tick_params(labelsize=STYLE["xtick.labelsize"])
        if not given:
            figure.draw_without_rendering()


def room(ax: Any, width: float) -> float:
    """Return the inches that a figure's width leaves for an abscissa, or that the caller's axes are wide."""
    return width - 0.7 if ax is None else _inches(ax)


def _given(ax: Any, count: int) -> tuple[Axes, ...]:
    """Return the caller's axes, or raise TypeError."""
    from matplotlib.axes import Axes

    if ax is None:
        return ()
    several = () if isinstance(ax, Axes) else tuple(ax) if hasattr(ax, "__len__") else ()
    axes = (ax,) if isinstance(ax, Axes) else several
    if len(axes) != count or (count == 1 and several) or not all(isinstance(one, Axes) for one in axes):
        expected = "one Axes of matplotlib" if count == 1 else f"a sequence of {count} Axes of matplotlib"
        size = f" of {len(several)}" if several else ""
        raise TypeError(f"ax must be {expected}, such as plt.subplots() makes, got {type(ax).__name__}{size}")
    return axes


def _inches(axes: Axes) -> float:
    return float(axes.get_position().width * axes.figure.figure.get_figwidth())


def _wrapped(text: str, inches: float) -> list[str]:
    return textwrap.wrap(text, max(1, int(inches / TITLE_LETTER)), break_long_words=False)


def _origin(reports: Sequence[SpectralReport]) -> tuple[str, ...]:
    """Return when and how reports were measured, in words."""
    steps = [report.step for report in reports if report.step is not None]
    span = f"step {steps[0]}" if len(set(steps)) == 1 else f"steps {min(steps)} to {max(steps)}" if steps else ""
    count = f"{len(reports)} reports" if len(reports) > 1 else ""
    how = "curvature by " + ", ".join(dict.fromkeys(method_of(report) for report in reports))
    return span, count, how, ", ".join(dict.fromkeys(f"{report.mode} mode" for report in reports))
