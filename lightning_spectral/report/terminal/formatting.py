"""Look of the terminal's tables: how figures are written, and which columns fit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_spectral.layers.names import brief, shortened

WHOLE_WIDTH = 122
"""Width that the table of layers needs with names of 16 characters."""


def literal(text: str, style: str = "") -> Text:
    r"""Return a text as it is, for the terminal: no markup, no emoji, unprintable characters by their codes.

    >>> print(literal("[red]:x:[/]"), literal("a" + chr(27) + "[2J"))
    [red]:x:[/] a\x1b[2J
    """
    return Text(printable(text), style)


def printable(text: str) -> str:
    r"""Return a text with unprintable characters by their codes.

    >>> print(printable("a" + chr(27) + "b"))
    a\x1bb
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def new_table(title: str = "") -> Table:
    """Return a table without columns, its title on the left."""
    heading = literal(title, "table.title") if title else None
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def width_for(console: Console) -> int:
    """Return the characters to a line: the terminal's, or as COLUMNS says; enough for all columns in a file or pipe."""
    if console.is_terminal or os.environ.get("COLUMNS", "").isdigit():
        return console.width
    return max(console.width, WHOLE_WIDTH)


def fit_table(
    columns: Mapping[str, Sequence[str]],
    width: int | None,
    *,
    flexible: str,
    least: int,
    expendable: Sequence[str],
    title: str = "",
    left: Sequence[str] = (),
    wrap: bool = False,
    dim: Sequence[bool] = (),
) -> tuple[Table, str]:
    """Return a table of the columns that fit into a width, and what its caption says of the others.

    Rich itself would narrow columns of figures to an ellipsis; here a column is shown whole or not at all.

    Args:
        columns: heading -> cells.
        width: characters that the table may take; None: as many as it needs.
        flexible: heading of the column that may be narrower than its cells: names of layers, which are shortened.
        least: characters that it is left, if it needs so many, before another column is taken.
        expendable: headings, the least needed first; each is taken that leaves room, from the last on.
        left: headings of columns aligned to the left.
        wrap: break the flexible column's cells into lines instead of shortening them as names.
        dim: whether a row is dim, a flag per row; empty: none is.
    """
    cells = columns if wrap else {**columns, flexible: [brief(name) for name in columns[flexible]]}
    sizes = {heading: max(map(cell_len, (heading, *column))) for heading, column in cells.items()}
    wanted = sizes.pop(flexible)
    taken = [heading for heading in sizes if heading not in expendable]
    # Two characters between columns, and one at each side.
    room = (10**6 if width is None else width) - 2 - sum(sizes[heading] + 2 for heading in taken)
    for heading in reversed(expendable):
        if room - sizes[heading] - 2 >= min(wanted, least):
            taken.append(heading)
            room -= sizes[heading] + 2
    if not wrap:
        length = max(1, min(wanted, room))
        cells = {**cells, flexible: [shortened(name, length) for name in columns[flexible]]}
    table = new_table(title)
    shown = [heading for heading in columns if heading in (*taken, flexible)]
    for heading in shown:
        justify: Literal["left", "right"] = "left" if heading in left else "right"
        table.add_column(heading, justify=justify, no_wrap=not (wrap and heading == flexible))
    for i, row in enumerate(zip(*(cells[heading] for heading in shown), strict=True)):
        table.add_row(*map(literal, row), style="dim" if dim and dim[i] else "")
    omitted = [heading for heading in columns if heading not in shown]
    return table, f"; no room for {', '.join(omitted)}" if omitted else ""


def fixed(value: float) -> str:
    """Write two decimals, or a power of ten from 1000 on; "-" for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.1e}"


def short(value: float) -> str:
    """Write three significant digits, for values of any size; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def percent(value: float) -> str:
    """Write a share in percent; "-" for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def dimensions(shape: tuple[int, int], groups: int) -> str:
    """Write the shape of a matrix, and its groups where there are several."""
    return f"{shape[0]}x{shape[1]}" + (f" /{groups}" if groups > 1 else "")


def duration(seconds: float) -> str:
    """Write a time as people do.

    >>> duration(0.0312), duration(8.2), duration(61.8), duration(500), duration(7e3), duration(4e5)
    ('0.031 s', '8.2 s', '62 s', '8 minutes', '117 minutes', '4.63 days')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.3g} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.3g} days"
