"""alpha="probe": the exponent of every matrix by itself, an average of what is measured while it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_spectral._validation import number
from lightning_spectral.optim.placement import Layout, row_counts

INITIAL_ALPHA = 2.0
"""The exponent of a matrix before its first measurement: the default of ``alpha``, and the cheapest."""

PER_UNIT = 10
"""Exponents in use are multiples of 1 / 10, about the standard error of a measured one, so that matrices share the
batches of a step and the cached sums of inverses, whose fit takes as long as many steps of a small network."""

OPTIONS = ("alpha_range", "alpha_momentum")

Averages = list[float | None]
"""Of the matrices of one parameter; None before the first measurement."""


@dataclass(frozen=True)
class MeasuredAlpha:
    """An exponent that was measured.

    Attributes:
        alpha: the slope of log h on log sigma; NaN where there is none.
        rows: first and last-plus-one row of the parameter's matrix it holds for; None: all of them.
    """

    alpha: float
    rows: tuple[int, int] | None = None


def unmeasured(parameters: Iterable[Tensor], layouts: Iterable[Layout]) -> list[Averages]:
    """Return no average for any matrix of any parameter."""
    return [[None] * len(row_counts(p.shape, layout)) for p, layout in zip(parameters, layouts, strict=True)]


def alpha_used(average: float | None) -> float:
    """Return the exponent of a step: the average on the grid.

    >>> alpha_used(None), alpha_used(1.5), alpha_used(1.7312)
    (2.0, 1.5, 1.7)
    """
    return INITIAL_ALPHA if average is None else round(average * PER_UNIT) / PER_UNIT


def update_averages(measured: Mapping[Tensor, Sequence[MeasuredAlpha]], group: dict[str, Any]) -> None:
    """Put the averages after a measurement of these parameters into their group."""
    # Into lists of their own: a state_dict that was taken before holds the old ones.
    group["alphas"] = [
        averaged(averages, measured.get(parameter, ()), row_counts(parameter.shape, layout), group)
        for parameter, layout, averages in zip(group["params"], group["layouts"], group["alphas"], strict=True)
    ]


def mean_alpha_used(group: Mapping[str, Any], i: int, rows: tuple[int, int] | None) -> float:
    """Return the mean exponent of the matrices that these rows of a group's i-th parameter lie in."""
    counts = row_counts(group["params"][i].shape, group["layouts"][i])
    fits_by_matrix = by_rows([MeasuredAlpha(INITIAL_ALPHA, rows=rows)], counts)
    used = [alpha_used(average) for average, fits in zip(group["alphas"][i], fits_by_matrix, strict=True) if fits]
    if not used:
        numbers = ", ".join(map(str, counts))
        raise ValueError(f"rows {rows} hold none of the parameter's matrices, of {numbers} rows")
    return sum(used) / len(used)


def averaged(
    averages: Averages, measured: Sequence[MeasuredAlpha], counts: Sequence[int], group: Mapping[str, Any]
) -> Averages:
    """Return the averages of a parameter's matrices after a measurement.

    a <- mu a + (1 - mu) x, a = x the first time, where x is the mean of the exponents that hold for rows of the matrix,
    clamped to ``alpha_range``. A matrix without one keeps its average.
    """
    (low, high), mu = group["alpha_range"], group["alpha_momentum"]
    good = [fit for fit in measured if math.isfinite(fit.alpha)]
    out = []
    for average, fits in zip(averages, by_rows(good, counts), strict=True):
        values = [min(max(fit.alpha, low), high) for fit in fits]
        if values:
            value = sum(values) / len(values)
            average = value if average is None else average + (1 - mu) * (value - average)
        out.append(average)
    return out


def by_rows(measured: Sequence[MeasuredAlpha], counts: Sequence[int]) -> list[list[MeasuredAlpha]]:
    """Return for each matrix of a parameter, of these numbers of rows, what was measured on some of its rows."""
    if len(counts) == 1:
        return [list(measured)]
    ends = accumulate(counts, initial=0)
    return [
        [fit for fit in measured if fit.rows is None or (fit.rows[0] < end and start < fit.rows[1])]
        for start, end in pairwise(ends)
    ]


def check_probe_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of alpha="probe" that is out of range."""
    bounds = group["alpha_range"]
    if len(bounds) != 2 or not all(isinstance(x, Real) for x in bounds) or not 0 <= bounds[0] <= bounds[1] < math.inf:
        raise ValueError(f"alpha_range must be two exponents, 0 <= low <= high, got {bounds}")
    number("alpha_momentum", group["alpha_momentum"], lambda x: 0 <= x < 1, "lie in [0, 1)")
