"""Look that all figures share: fonts, colours, markers; and what they are drawn of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_spectral.numerics.power_law import RankModel
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.figures.ticks import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Reports = SpectralReport | Iterable[SpectralReport]
Dash = Literal["-", "--", "-.", ":", "none"]

WIDTH = 6.0
"""Inches: the text width of a one-column paper."""

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

EDGE: dict[str, Any] = {"clip_on": False, "zorder": 3}
"""Look of marks on the edge of the axes."""


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


def backing() -> dict[str, Any]:
    """Return a patch behind text, through which what it covers can still be seen."""
    return {"facecolor": ground(), "edgecolor": "none", "alpha": 0.7, "pad": 1.0}


def say(axes: Axes, text: str) -> None:
    """Write in the middle of axes that have nothing to show why that is so."""
    axes.text(0.5, 0.5, literal(text), transform=axes.transAxes, ha="center", va="center", wrap=True, bbox=backing())
