"""Colours and markers, one table for figures and pages: of kinds of layers, of rank models, and of runs side by side.

Markers are matplotlib's; `SYMBOLS` has plotly's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from lightning_spectral.numerics.power_law import RankModel

Dash = Literal["-", "--", "-.", ":", "none"]

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

OTHER_STYLE = ("#8C6D31", "h")
"""Style of a kind that is none of `KINDS`, in a record made by hand."""


class ModelStyle(NamedTuple):
    """Look of a rank model: its name, colours on white and on dark, line, and hatch of its areas."""

    name: str
    on_white: str
    on_dark: str
    dash: Dash
    hatch: str


MODEL_STYLE: dict[RankModel, ModelStyle] = {
    "power_law": ModelStyle("power law", "#004488", "#6699CC", "-", ""),
    "exponential": ModelStyle("exponential", "#BB5566", "#EE99AA", "--", "///"),
    "lognormal": ModelStyle("log-normal", "#DDAA33", "#EECC66", "-.", "..."),
}
"""Paul Tol's high-contrast and medium-contrast palettes (SRON/EPS/TN/09-002): they differ in grey, too, and from
the colours of the kinds of layers."""


class RunStyle(NamedTuple):
    """Look of a run beside others: its colours on white and on dark, and marker."""

    on_white: str
    on_dark: str
    marker: str


RUN_STYLE: tuple[RunStyle, ...] = (
    RunStyle("#332288", "#9A8CFF", "o"),
    RunStyle("#D9622B", "#FF9A62", "s"),
    RunStyle("#0F8B8D", "#4FD1C5", "D"),
    RunStyle("#AA3377", "#F28CC3", "^"),
    RunStyle("#8A7A00", "#E2D04A", "v"),
    RunStyle("#4D5B6B", "#A9B7C6", "P"),
)
"""Runs in their order: hues of Paul Tol's muted and vibrant palettes, dark enough for a line on white."""

RUN_DASHES: tuple[Dash, ...] = ("-", "--", ":", "-.")
"""Lines of the first six runs, of the next six, and so on."""

MOST_RUNS = len(RUN_STYLE) * len(RUN_DASHES)
"""Largest number of runs that can be told apart."""

SYMBOLS = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "^": "triangle-up",
    "v": "triangle-down",
    "*": "star",
    "P": "cross",
    "X": "x",
    "h": "hexagon",
}
"""plotly's name of each marker."""

PLOTLY_DASH: dict[str, str] = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
"""plotly's name of each line."""
