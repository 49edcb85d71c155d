"""What the terminal's tables share: their look, and how figures are written."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_spectral.spectrum import LayerSpectrum


def literal(text: str, style: str = "") -> Text:
    r"""A text as it is, for the terminal: no markup, no emoji, and what is not to be printed by its code.

    >>> print(literal("[red]:x:[/]"), literal("a" + chr(27) + "[2J"))
    [red]:x:[/] a\x1b[2J
    """
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), style)


def new_table(title: str = "") -> Table:
    """A table without columns, its title on the left."""
    heading = literal(title, "table.title") if title else None
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def name_of(layer: LayerSpectrum) -> Text:
    """The layer's name as tables show it."""
    return literal(layer.name.removesuffix(".weight"))


def fixed(value: float) -> str:
    """Two decimals, or a power of ten from 1000 on; "-" for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.1e}"


def short(value: float) -> str:
    """Three significant digits, for what may be of any size; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in percent; "-" for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"
