"""Median and evenly spaced indices."""

import math

from lightning_spectral.numerics.statistics import evenly, median


def test_evenly_keeps_the_ends():
    for n in range(1, 30):
        for m in range(n + 3):
            kept = evenly(n, m)
            assert len(kept) == len(set(kept)) == min(n, m)
            assert kept == sorted(kept)
            assert not kept or kept[-1] == n - 1


def test_median_leaves_nan_out_but_not_infinity():
    assert median([4.0, math.nan, 1.0, 3.0]) == 3.0
    assert median(iter([1.0, 2.0])) == 1.5
    assert median([1.0, math.inf, math.inf]) == math.inf
    assert math.isnan(median([math.nan]))
