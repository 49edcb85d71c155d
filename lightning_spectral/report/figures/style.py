"""Style that all figures share: canvas, colours, titles."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_spectral.numerics.power_law import RankModel
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures.ticks import literal
from lightning_spectral.report.terminal.tables import method_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Reports = SpectralReport | Iterable[SpectralReport]
Dash = Literal["-", "--", "-.", ":", "none"]

WIDTH = 6.0
"""Inches: the text width of a one-column paper."""

MIN_WIDTH = 3.25
"""Inches: a column of a two-column paper."""

INK = "ink"
"""Placeholder for the colour of the text, black or nearly white."""

KIND_STYLE: dict[str, tuple[str, str]] = {
    "conv": ("#0072B2", "o"),
    "attention_qkv": ("#E69F00", "s"),
    "attention_out": ("#D55E00", "D"),
    "mlp_up": ("#009E73", "^"),
    "mlp_down": ("#56B4E9", "v"),
    "embedding": ("#888888", "*"),
    "head": ("#CC79A7", "P"),
    "dense": (INK, "X"),
}
"""Colour and marker of each kind of layer: Okabe and Ito's palette (Color Universal Design, 2008), with grey in the
place of its yellow, which is too pale for a line on white."""

QUIET = "#808080"
"""Colour of what stands behind the points, that can be read on white and on dark."""

OTHER_STYLE = ("#8C6D31", "h")
"""Style of a kind that is none of `KINDS`, in a record made by hand."""


class ModelStyle(NamedTuple):
    """Look of a rank model: its name, colours on white and on dark, line, and hatch of its areas."""

    name: str
    on_white: str
    on_dark: str
    dash: Dash
    hatch: str

    @property
    def colour(self) -> str:
        """Return the colour for the style in force."""
        return self.on_dark if ground() == DARK_GROUND else self.on_white


MODEL_STYLE: dict[RankModel, ModelStyle] = {
    "power_law": ModelStyle("power law", "#004488", "#6699CC", "-", ""),
    "exponential": ModelStyle("exponential", "#BB5566", "#EE99AA", "--", "///"),
    "lognormal": ModelStyle("log-normal", "#DDAA33", "#EECC66", "-.", "..."),
}
"""Paul Tol's high-contrast and medium-contrast palettes (SRON/EPS/TN/09-002): they differ in grey, too, and from
the colours of the kinds of layers."""

STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    # By name: the generic "sans-serif" is looked up when the figure is saved, in whatever settings hold then.
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 9,
    "figure.labelsize": 8,
    "legend.fontsize": 7,
    "legend.title_fontsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "lines.markeredgewidth": 0.9,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "hatch.linewidth": 0.5,
}

DARK_GROUND, DARK_INK = "#16181D", "#E8E8E8"
DARK: dict[str, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), DARK_GROUND),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), DARK_INK),
}

TITLE_LETTER, TITLE_LINE = 0.067, 0.16
"""Inches that a letter of the title takes in the mean, and a line of it."""

EDGE: dict[str, Any] = {"clip_on": False, "zorder": 3}
"""Look of marks on the edge of the axes."""


@contextmanager
def canvas(width: float, height: float, *, dark: bool) -> Iterator[Figure]:
    """Yield a figure to draw on, in this module's style and in no other.

    It is laid out before the style is left, since matplotlib makes ticks only then and would take the user's style.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the figure is too narrow to hold its labels.
    """
    try:
        from matplotlib import style

        from lightning_spectral.report.figures.notebook import NotebookFigure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "lightning-spectral[plot]"') from error
    if not MIN_WIDTH <= width < math.inf:
        raise ValueError(f"width must be at least {MIN_WIDTH} inches for labels to fit, got {width}")
    # Without pyplot, which would look for a display.
    with style.context(["default", {**STYLE, **(DARK if dark else {})}]):
        figure = NotebookFigure(figsize=(width, height), layout="constrained")
        yield figure
        for axes in figure.axes:
            # How many ticks there are goes by the size of their labels, in the settings in force if none is set.
            axes.tick_params(labelsize=STYLE["xtick.labelsize"])
        figure.draw_without_rendering()


def ink() -> str:
    """Return the colour of text in the style in force."""
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def ground() -> str:
    """Return the colour of the page in the style in force, what a hollow marker is filled with."""
    from matplotlib import rcParams

    return str(rcParams["axes.facecolor"])


def kind_style(kind: str) -> tuple[str, str]:
    """Return (colour, marker) of a kind of layer, in the style in force."""
    colour, marker = KIND_STYLE.get(kind, OTHER_STYLE)
    return (ink() if colour == INK else colour), marker


def one_report(report: SpectralReport) -> SpectralReport:
    """Return the report, or raise ValueError saying why it holds no layers."""
    if not isinstance(report, SpectralReport):
        raise TypeError(f"need one SpectralReport, such as probe.last_report, got {type(report).__name__}")
    if not report.layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(report.skipped.items())[:3])
        raise ValueError(f"the report holds no layers to draw{f' ({why})' if why else ''}")
    return report


def all_reports(reports: Reports) -> list[SpectralReport]:
    """Return the reports in the order of their steps; raise ValueError where there are none."""
    history = [reports] if isinstance(reports, SpectralReport) else list(reports)
    if not history:
        raise ValueError(
            "no reports to draw: probe.history is empty until the first probe; "
            "every_n_steps, or a larger max_overhead, gives more of them"
        )
    history = [one_report(report) for report in history]
    steps = [report.step for report in history if report.step is not None]
    return sorted(history, key=lambda report: report.step or 0) if len(steps) == len(history) else history


def positions(reports: Sequence[SpectralReport]) -> tuple[list[int], str]:
    """Return abscissae and their label: the steps, or numbers where a report was not taken in training."""
    steps = [report.step for report in reports if report.step is not None]
    return (steps, "optimizer step") if len(steps) == len(reports) else (list(range(len(reports))), "measurement")


def title(figure: Figure, text: str, reports: Sequence[SpectralReport], note: str = "") -> None:
    """Write what the figure shows, and below it when and how that was measured; the figure grows by it."""
    steps = [report.step for report in reports if report.step is not None]
    span = f"step {steps[0]}" if len(set(steps)) == 1 else f"steps {min(steps)} to {max(steps)}" if steps else ""
    count = f"{len(reports)} reports" if len(reports) > 1 else ""
    how = "curvature by " + ", ".join(dict.fromkeys(method_of(report) for report in reports))
    mode = ", ".join(dict.fromkeys(f"{report.mode} mode" for report in reports))
    below = literal(", ".join(part for part in (span, count, how, mode, note) if part))
    characters = int(figure.get_figwidth() / TITLE_LETTER)
    lines = [line for part in (text, below) for line in textwrap.wrap(part, characters, break_long_words=False)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left")
    figure.set_figheight(figure.get_figheight() + TITLE_LINE * len(lines))


def backing() -> dict[str, Any]:
    """Return a patch behind text, through which what it covers can still be seen."""
    return {"facecolor": ground(), "edgecolor": "none", "alpha": 0.7, "pad": 1.0}


def say(axes: Axes, text: str) -> None:
    """Write in the middle of axes that have nothing to show why that is so."""
    axes.text(0.5, 0.5, literal(text), transform=axes.transAxes, ha="center", va="center", wrap=True, bbox=backing())
