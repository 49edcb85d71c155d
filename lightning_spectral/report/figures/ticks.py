"""Ticks that do not overlap: names of layers, and numbers on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_spectral.layers.names import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

NAME_LENGTH = 25
"""Most characters of a layer's name in a figure."""

LINE = 0.125
"""Height of a line of tick labels, in inches."""


def literal(text: str) -> str:
    r"""Escape a text for matplotlib, which would read mathematics between two dollars.

    >>> literal("mix_$a$")
    'mix_\\$a\\$'
    """
    return text.replace("$", r"\$")


def name_ticks(axis: Axis, names: Sequence[str], room: float) -> None:
    """Set ticks 0, 1, ... of an axis with the names of layers, every second, third, ... where all do not fit.

    Args:
        room: inches that the axis is long, a low estimate.
    """
    every = max(1, math.ceil(len(names) * LINE / room))
    shown = range(0, len(names), every)
    axis.set_ticks(list(shown), [literal(shortened(names[i], NAME_LENGTH)) for i in shown])
    if every > 1:
        axis.set_ticks(range(len(names)), minor=True)


def log_ticks(axis: Axis, low: float, high: float, *, gap: float) -> None:
    """Set ticks of a logarithmic axis from low to high, at least `gap`, a fraction of the axis, apart.

    They are powers of ten over two decades and more, with threefold ones over one and more, else evenly spaced.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    count, decades = int(1 / gap), math.log10(high / low)
    powers = LogLocator(subs=(1.0,) if decades >= 2 else (1.0, 3.0), numticks=count)
    locator = powers if decades >= 1 else MaxNLocator(count, steps=[1, 2, 5, 10])
    ticks: list[float] = []
    for value in locator.tick_values(low, high):
        if low <= value <= high and (not ticks or math.log10(value / ticks[-1]) >= gap * decades):
            ticks.append(float(value))
    axis.set_ticks(ticks, [_plain(value) for value in ticks])
    axis.set_ticks([], minor=True)


def whole_numbers(axes: Axes, x: Sequence[int], *, most: int = 10) -> None:
    """Set ticks of the abscissa at whole numbers alone, which a locator does not keep to within a range of one.

    There are at most so many intervals between them.
    """
    from matplotlib.ticker import MaxNLocator

    if min(x) == max(x):
        axes.set_xticks([x[0]])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))


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
