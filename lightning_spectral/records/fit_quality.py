"""Rule by which an alpha is to be trusted: one for every table, figure, page, median and optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_spectral.numerics.gradient_noise import NAN

GOOD_FIT, FEWEST_POINTS, LARGEST_ERROR, LEAST_SIGNAL = 0.9, 5, 0.25, 0.8
"""Limits of a fit to trust.

r2 of at least 0.9: below it log h is no straight line in log sigma. At least 5 points. A standard error of at most a
quarter of alpha: that of n points without errors of their own is abs(alpha) sqrt((1 / r2 - 1) / (n - 2)), at most 0.19
abs(alpha) for 5 points with an r2 of 0.9, so that this rule rejects fits whose h or sigma carry sampling noise. The
Theil-Sen slope within a quarter of alpha: it is not where a single point, away from a cloud, carries the slope. A
signal of at least 0.8: below it alpha of a batch was 0.2 and more above the network's.
"""

_SHARE = f"alpha / {1 / LARGEST_ERROR:g}"
TRUSTED = (
    f"r2 of at least {GOOD_FIT}, at least {FEWEST_POINTS} points, standard error up to {_SHARE}, no single point that "
    f"carries the slope, signal of at least {LEAST_SIGNAL}"
)
DOUBTFUL = (
    f"r2 below {GOOD_FIT}, fewer than {FEWEST_POINTS} points, a standard error above {_SHARE}, a single point that "
    f"carries the slope, or a signal below {LEAST_SIGNAL}"
)
"""The rule in words, and its opposite."""


@dataclass(frozen=True)
class FitQuality:
    """What tells whether an alpha is the exponent of the network, and not the slope of a cloud or of noise.

    What is not known is NaN and not held against the fit; an r2 must be known.

    Attributes:
        alpha, stderr, r2, points: of the least-squares fit.
        theil_sen: slope that no single point carries.
        signal: share of the squared gradient that is no sampling noise.
    """

    alpha: float
    stderr: float = NAN
    r2: float = NAN
    points: float = NAN
    theil_sen: float = NAN
    signal: float = NAN

    @property
    def doubt(self) -> str:
        """Return the first rule that the fit breaks, in a word or two; empty where it is to be trusted.

        >>> FitQuality(2.0, stderr=0.1, r2=0.99, points=20, theil_sen=1.95, signal=0.97).doubt
        ''
        >>> FitQuality(2.0, stderr=0.1, r2=0.99, points=20, theil_sen=0.3, signal=0.97).doubt
        'one point'
        """
        tolerance = LARGEST_ERROR * abs(self.alpha)
        if not self.r2 >= GOOD_FIT:
            return "no fit" if math.isnan(self.r2) else f"r2 {self.r2:.2f}"
        if self.points < FEWEST_POINTS:
            return f"{self.points:.0f} points"
        if self.signal < LEAST_SIGNAL:
            return "noise"
        if abs(self.theil_sen - self.alpha) > tolerance:
            return "one point"
        return f"alpha {self.alpha:.2f} ± {self.stderr:.2f}" if self.stderr > tolerance else ""

    @property
    def trusted(self) -> bool:
        """Return whether alpha is to be trusted."""
        return not self.doubt
