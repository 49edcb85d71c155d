"""Medians and evenly spaced picks, and over how many directions a spectrum spreads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from itertools import accumulate
from typing import cast

import torch

from lightning_spectral.numerics.power_law import Values, as_list


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


def participation_ratio(values: Values) -> float:
    """Return (sum v)^2 / sum v^2 over the positive values: how many directions hold the total.

    1 for one direction, n for n equal ones; NaN where no value is positive. For a gradient, pass sigma^2.
    Source: arXiv 2606.02596.

    >>> participation_ratio([2.0, 2.0, 2.0, -1.0])
    3.0
    """
    p = _shares(values)
    return 1.0 / math.fsum(share * share for share in p) if p else math.nan


def entropy_rank(values: Values) -> float:
    """Return exp(-sum p log p), p the shares of the positive values in their sum; NaN where there is none.

    >>> round(entropy_rank([1.0, 1.0, 0.0]), 6)
    2.0
    """
    p = _shares(values)
    return math.exp(-math.fsum(share * math.log(share) for share in p if share)) if p else math.nan


def directions_holding(values: Values, share: float) -> int:
    """Return the smallest number of positive values that hold at least this share of their sum; 0 where there is none.

    >>> directions_holding([90.0, 6.0, 4.0], 0.95)
    2
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    p = _shares(values)
    # A sum of shares that is short of `share` by rounding alone counts as reaching it.
    held = accumulate(sorted(p, reverse=True))
    return min(sum(total < share * (1 - 1e-12) for total in held) + 1, len(p))


def zeta_bound(s: float, n: int | None = None) -> float:
    """Return the participation ratio of a spectrum k^-s: zeta(s)^2 / zeta(2 s), which bounds that of the curvature.

    Args:
        s: decay exponent, alpha * gamma. At s <= 1 the infinite sum diverges and the bound is infinite.
        n: sum over the first n ranks instead, what a window of n directions obeys; finite for every s.

    Returns:
        The bound; NaN for s = NaN and for n < 1.

    Source: arXiv 2606.02596.

    >>> round(zeta_bound(2.0), 12), zeta_bound(1.0), round(zeta_bound(0.0, n=7), 12)
    (2.5, inf, 7.0)
    """
    if math.isnan(s) or (n is not None and n < 1):
        return float("nan")
    if n is not None:
        logs = [-s * math.log(rank) for rank in range(1, n + 1)]
        return participation_ratio([math.exp(log - max(logs[0], logs[-1])) for log in logs])
    if s <= 1:
        return float("inf")
    exponents = torch.tensor([s, 2 * s], dtype=torch.float64)
    zeta_s, zeta_2s = torch.special.zeta(exponents, torch.ones_like(exponents)).tolist()
    return cast(float, zeta_s**2 / zeta_2s)


def _shares(values: Values) -> list[float]:
    """Return the positive finite values over their sum, scaled first so that 1e-200 and 1e200 keep their digits."""
    positive = [value for value in as_list(values, "values") if 0 < value < math.inf]
    largest = max(positive, default=1.0)
    scaled = [value / largest for value in positive]
    total = math.fsum(scaled)
    return [value / total for value in scaled]
