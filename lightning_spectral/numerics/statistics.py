"""Median and evenly spaced indices, the same wherever layers or probes are summed up or thinned out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable


def median(values: Iterable[float]) -> float:
    """Return the median of the values that are not NaN, the mean of the middle two; NaN where there is none.

    >>> median([3.0, math.nan, 1.0]), median([])
    (2.0, nan)
    """
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan


def evenly(n: int, m: int) -> list[int]:
    """Return at most m of n indices, evenly spaced, with the last and, from two on, the first.

    >>> evenly(7, 3), evenly(3, 5), evenly(3, 1), evenly(3, 0)
    ([0, 3, 6], [0, 1, 2], [2], [])
    """
    if m <= 1:
        return [n - 1] if m == 1 else []
    return list(range(n)) if m >= n else [round(i * (n - 1) / (m - 1)) for i in range(m)]
