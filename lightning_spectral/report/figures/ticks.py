"""Ticks that do not overlap: names of layers, and numbers on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_spectral.layers.display_names import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

NAME_LENGTH = 25
"""Characters of a layer's name that a figure shows."""

LINE = 0.125
"""Inches that a line of tick labels takes."""


def short_name(name: str, length: int = NAME_LENGTH) -> str:
    """Return a layer's name as figures show it."""
    return shortened(name, length)


def literal(text: str) -> str:
    r"""Escape a text for matplotlib, which would read mathematics between two dollars.

    >>> literal("mix_$a$")
    'mix_\\$a\\$'
    """
    return text.replace("$", r"\$")


def name_ticks(axis: Axis, names: Sequence[str], room: float) -> None:
    """Set ticks 0, 1, ... of an axis with the names of layers, every second, third, ... where all do not fit.

    Args:
        axis: x or y.
        names: one per position.
        room: inches that the axis is long, a low estimate.
    """
    every = max(1, math.ceil(len(names) * LINE / room))
    shown = range(0, len(names), every)
    axis.set_ticks(list(shown), [literal(short_name(names[i])) for i in shown])
    if every > 1:
        axis.set_ticks(range(len(names)), minor=True)


def log_ticks(axis: Axis, low: float, high: float, *, gap: float) -> None:
    """Set ticks of a logarithmic axis from low to high that do not overlap, however short it is.

    Powers of ten, every second, third, ... of them where there are many, or numbers between where there are few:
    whatever gives the most ticks at least `gap`, a fraction of the axis, apart.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sets = [[10.0**e for e in decades if e % every == 0] for every in range(1, len(decades) + 1)]
    sets += [[d * 10.0**e for e in decades for d in digits] for digits in ((1, 3), (1, 2, 5), range(1, 10))]
    inside = [[value for value in values if low <= value <= high] for values in sets]
    room = gap * math.log10(high / low)
    ticks = max((values for values in inside if _apart(values, room) == values), key=len, default=[])
    # Where no such numbers are far enough apart, round ones that are, however uneven.
    for digits in ((1, 2, 5), range(1, 10), [d / 10 for d in range(10, 100)]):
        if len(ticks) < 2:
            ticks = _apart([v for e in decades for d in digits if low <= (v := d * 10.0**e) <= high], room)
    axis.set_ticks(ticks, [_plain(value) for value in ticks])
    axis.set_ticks([], minor=True)


def _apart(values: Sequence[float], room: float) -> list[float]:
    """Return the first value and every next one that is this many decades above the last taken."""
    taken: list[float] = []
    for value in values:
        if not taken or math.log10(value / taken[-1]) >= room:
            taken.append(value)
    return taken


def whole_numbers(axes: Axes, x: Sequence[int]) -> None:
    """Set ticks of the abscissa at whole numbers alone, which a locator does not keep to within a range of one."""
    from matplotlib.ticker import MaxNLocator

    if min(x) == max(x):
        axes.set_xticks([x[0]])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain(value: float) -> str:
    """Write a round number as it is or, very small or large, with a power of ten.

    >>> _plain(0.02), _plain(500.0), _plain(1e6)
    ('0.02', '500', '$10^{6}$')
    """
    if 0.01 <= value < 1000:
        return f"{value:g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    factor = "" if digits == "1.0" else digits.removesuffix(".0") + r"{\times}"
    return f"${factor}10^{{{int(exponent)}}}$"
