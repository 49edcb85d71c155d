"""What the terminal's tables share: their look, how figures are written, and what fits into a terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

WHOLE_WIDTH = 112
"""Width that the table of layers needs with names of 16 characters."""


def literal(text: str, style: str = "") -> Text:
    r"""A text as it is, for the terminal: no markup, no emoji, and what is not to be printed by its code.

    >>> print(literal("[red]:x:[/]"), literal("a" + chr(27) + "[2J"))
    [red]:x:[/] a\x1b[2J
    """
    return Text(printable(text), style)


def printable(text: str) -> str:
    r"""A text with the codes of what is not to be printed.

    >>> print(printable("a" + chr(27) + "b"))
    a\x1bb
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def new_table(title: str = "") -> Table:
    """A table without columns, its title on the left."""
    heading = literal(title, "table.title") if title else None
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def width_for(console: Console) -> int:
    """Characters to a line: the terminal's, or as COLUMNS says; of a file or a pipe enough for all columns."""
    if console.is_terminal or os.environ.get("COLUMNS", "").isdigit():
        return console.width
    return max(console.width, WHOLE_WIDTH)


def fit_columns(
    columns: Mapping[str, Sequence[str]], width: int, *, flexible: str, least: int, expendable: Sequence[str]
) -> tuple[list[str], int]:
    """(headings of the columns that a table of this width has room for, characters left for the flexible one).

    Args:
        columns: heading -> cells.
        width: of the terminal.
        flexible: heading of the column that may be narrower than its cells.
        least: characters that it is left, if it needs so many, before another column is taken.
        expendable: headings, the least needed first; each is taken that leaves room, from the last on.
    """
    sizes = {heading: max(map(cell_len, (heading, *cells))) for heading, cells in columns.items()}
    wanted = sizes.pop(flexible)
    kept = [heading for heading in sizes if heading not in expendable]
    # Two characters between columns, and one at each side.
    room = width - 2 - sum(sizes[heading] + 2 for heading in kept)
    for heading in reversed(expendable):
        if room - sizes[heading] - 2 >= min(wanted, least):
            kept.append(heading)
            room -= sizes[heading] + 2
    return [heading for heading in columns if heading in (*kept, flexible)], max(1, min(wanted, room))


def left_out(columns: Mapping[str, Sequence[str]], kept: Sequence[str]) -> str:
    """What a caption says of the columns that do not fit; empty where all do."""
    gone = [heading for heading in columns if heading not in kept]
    return f"; no room for {', '.join(gone)}" if gone else ""


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
