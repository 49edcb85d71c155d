"""Look that all figures share: fonts, colours, markers; what they are drawn of, and the keys of their legends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_spectral.layers.kinds import KINDS
from lightning_spectral.records.report import SpectralReport, check_report
from lightning_spectral.report.figures.ticks import literal
from lightning_spectral.report.palette import INK, KIND_STYLE, OTHER_STYLE, RUN_DASHES, RUN_STYLE, Dash, ModelStyle

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


Reports = SpectralReport | Iterable[SpectralReport]

WIDTH = 6.0
"""Inches: the text width of a one-column paper."""

QUIET = "#808080"
"""Colour of what stands behind the points, that can be read on white and on dark."""

STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    # By name: the generic "sans-serif" is looked up when the figure is saved, in whatever settings hold then.
    "font.family": "DejaVu Sans",
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "figure.labelsize", "legend.title_fontsize"), 8),
    "figure.titlesize": 9,
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 7),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("xtick.minor.width", "ytick.minor.width"), 0.4),
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "lines.markeredgewidth": 0.9,
    "hatch.linewidth": 0.5,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
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


def model_colour(style: ModelStyle) -> str:
    """Return the colour of a rank model, in the style in force."""
    return style.on_dark if _is_dark() else style.on_white


def run_style(i: int) -> tuple[str, str, Dash]:
    """Return (colour, marker, line) of the i-th run of several, from 0, in the style in force."""
    style = RUN_STYLE[i % len(RUN_STYLE)]
    dash = RUN_DASHES[i // len(RUN_STYLE) % len(RUN_DASHES)]
    return (style.on_dark if _is_dark() else style.on_white), style.marker, dash


def _is_dark() -> bool:
    return ground() == DARK_GROUND


def one_report(report: SpectralReport) -> SpectralReport:
    """Return the report, or raise ValueError saying why it holds no layers."""
    check_report(report)
    if not report.layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(report.skipped.items())[:3])
        raise ValueError(f"the report holds no layers to draw{f' ({why})' if why else ''}")
    return report


def all_reports(reports: Reports) -> list[SpectralReport]:
    """Return the reports in the order of their steps; raise ValueError where there are none, TypeError for others."""
    if isinstance(reports, (str, Mapping)) or not isinstance(reports, (SpectralReport, Iterable)):
        raise TypeError(
            "need one SpectralReport, or several as in probe.history, got "
            f"{type(reports).__name__}; of several runs by name there is plot_alpha_over_training"
        )
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


def say(axes: Axes, text: str) -> None:
    """Write in the middle of axes that have nothing to show why that is so."""
    # What the text covers can still be seen.
    behind = {"facecolor": ground(), "edgecolor": "none", "alpha": 0.7, "pad": 1.0}
    axes.text(0.5, 0.5, literal(text), transform=axes.transAxes, ha="center", va="center", wrap=True, bbox=behind)


def in_order(kinds: Iterable[str]) -> list[str]:
    """Return the kinds, each once, in the order of `KINDS`, others last."""
    unique = list(dict.fromkeys(kinds))
    return [kind for kind in KINDS if kind in unique] + [kind for kind in unique if kind not in KINDS]


def kind_handles(kinds: Iterable[str], *, line: bool = False) -> list[Artist]:
    """Return keys to the kinds given, in the order of `KINDS`."""
    looks = {literal(kind.replace("_", " ")): kind_style(kind) for kind in in_order(kinds)}
    options: dict[str, Any] = {"dash": "-" if line else "none", "linewidth": 1.2}
    return [line_handle(label=label, colour=c, marker=marker, **options) for label, (c, marker) in looks.items()]


def mark_handle(marker: str, label: str, *, hollow: bool = False, opacity: float = 1.0) -> Artist:
    """Return a key to a marker that means the same in every colour."""
    return line_handle("none", label, marker=marker, markerfacecolor=ground() if hollow else ink(), alpha=opacity)


def line_handle(dash: Dash, label: str, colour: str | None = None, **look: Any) -> Artist:
    """Return a key to a line, in the colour of text where none is given."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour or ink(), linestyle=dash, label=label, **{"linewidth": 1.0, **look})


def patch_handle(label: str, **look: Any) -> Artist:
    """Return a key to an area."""
    from matplotlib.patches import Patch

    return Patch(label=label, linewidth=0, **look)
