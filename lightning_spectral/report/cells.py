"""What the terminal's tables share: their look, and how figures are written."""

from __future__ import annotations

import math

from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_spectral.spectrum import LayerSpectrum


def new_table(title: str = "") -> Table:
    """A table without columns, its title on the left."""
    return Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def name_of(layer: LayerSpectrum) -> str:
    """The layer's name as tables show it, with nothing in it that rich would read as markup."""
    return escape(layer.name.removesuffix(".weight"))


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
