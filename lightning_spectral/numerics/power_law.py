"""Power laws and rank models of spectra, as pure functions in float64.

Points are lists of numbers: of a layer's dozen fits, each of some twenty points, an operation on a tensor costs more
than all of a sum.

Source: A. Calvo, Spectral Asymptotics of Neural Network Loss Landscapes, arXiv 2606.02596 (2026).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

RankModel = Literal["power_law", "exponential", "lognormal"]

MIN_POINTS = 3
"""Fewest points a line is fitted to: with two the residual, and so r2 and the standard error, mean nothing."""

Values = Tensor | Sequence[float]


@dataclass(frozen=True)
class PowerLawFit:
    """A power law y ~ exp(intercept) * x^exponent, fitted by ordinary least squares on log y against log x.

    Attributes:
        exponent: the slope; NaN where fewer than 3 points were usable or all x are equal.
        intercept: log y at x = 1.
        stderr: standard error of the slope, sqrt(RSS / (n - 2) / sum (log x - mean)^2).
        r2: 1 - RSS / TSS in logarithms; NaN where all y are equal.
        n_used: points in the fit.
        n_dropped: points left out of it.
        dropped: how many were left out for which reason; the counts add up to ``n_dropped``.
    """

    exponent: float
    intercept: float
    stderr: float
    r2: float
    n_used: int
    n_dropped: int
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RankModelFit:
    """One model of log sigma against the rank k: its coefficients (a, b or a, b, c), RSS and BIC."""

    coefficients: tuple[float, ...]
    rss: float
    bic: float


@dataclass(frozen=True)
class RankModels:
    """The rank models of one spectrum, compared by BIC.

    Attributes:
        winner: the model with the lowest BIC; None where there were too few points for any.
        bic: BIC of each model; NaN where it had too few points.
        fits: coefficients and residuals of each model.
        n_used: points in the fits.
        n_dropped: points left out because they are not positive and finite.
    """

    winner: RankModel | None
    bic: Mapping[RankModel, float]
    fits: Mapping[RankModel, RankModelFit]
    n_used: int
    n_dropped: int

    @property
    def margin(self) -> float:
        """Return the BIC of the runner-up minus that of the winner; NaN where fewer than two models could be fitted."""
        ranking = sorted(bic for bic in self.bic.values() if not math.isnan(bic))
        return ranking[1] - ranking[0] if len(ranking) > 1 else float("nan")


class LogPoints(NamedTuple):
    """Points of a fit in logarithms, n abscissae and ordinates, and how many were left out for which reason."""

    x: list[float]
    y: list[float]
    dropped: Mapping[str, int]


def log_points(x: Values, y: Values, exclude: Mapping[str, Tensor] | None = None) -> LogPoints:
    """Return what `fit_power_law` fits: log x and log y of the usable points."""
    xs, ys = as_list(x, "x"), as_list(y, "y")
    if len(xs) != len(ys):
        raise ValueError(f"x and y must have one length, got {len(xs)} and {len(ys)}")
    kept, dropped = _usable(xs, ys, exclude or {})
    return LogPoints([math.log(xs[i]) for i in kept], [math.log(ys[i]) for i in kept], dropped)


def rank_points(values: Values, exclude: Mapping[str, Tensor] | None = None) -> LogPoints:
    """Return what `fit_rank_decay` fits: -log rank, and the log of the usable values in decreasing order."""
    numbers = as_list(values, "values")
    kept, dropped = _usable(numbers, numbers, exclude or {})
    logs = [math.log(value) for value in sorted((numbers[i] for i in kept), reverse=True)]
    return LogPoints([-math.log(rank) for rank in range(1, len(logs) + 1)], logs, dropped)


def centred_sums(points: LogPoints) -> tuple[float, float, float]:
    """Return the sums of dx^2, dx dy and dy^2, the deviations of the points from their means.

    The first is 0 where no line can be fitted: fewer than 3 points, or abscissae that differ by rounding alone. The
    last is 0 where the ordinates do.
    """
    return _sums(_centred(points.x), _centred(points.y))


def fit_power_law(x: Values, y: Values, *, exclude: Mapping[str, Tensor] | None = None) -> PowerLawFit:
    """Fit y ~ exp(intercept) * x^exponent over the points with x, y > 0 and finite.

    Args:
        x: (n,) abscissae.
        y: (n,) ordinates.
        exclude: reason -> (n,) boolean mask of points to leave out for that reason. A point is
            counted once, under the first reason that holds; the fit's own come after these.

    Returns:
        The fit with its diagnostics. Exponent and the rest are NaN where fewer than 3 points remain.

    Raises:
        ValueError: if x and y are not one-dimensional and of one length.

    Source: arXiv 2606.02596; alpha is the exponent of curvature h on singular value sigma.

    >>> fit = fit_power_law([1.0, 2.0, 4.0, -1.0], [3.0, 12.0, 48.0, 5.0])
    >>> round(fit.exponent, 6), fit.n_used, fit.dropped
    (2.0, 3, {'not positive': 1})
    """
    return _least_squares(log_points(x, y, exclude))


def with_ordinate_errors(fit: PowerLawFit, x: Tensor, y: Tensor, y_stderr: Tensor, used: Tensor) -> PowerLawFit:
    """Add the errors of a fit's ordinates to the standard error of its exponent.

    The slope is sum w_i log y_i with w_i = (log x_i - mean) / sum (log x - mean)^2, so independent errors of y add
    sum w_i^2 log(1 + (stderr_i / y_i)^2) to its variance: that of the logarithm of a log-normal value, which is
    (stderr_i / y_i)^2 where it is small. Where y_i is positive by chance, that would be without bound.

    Args:
        fit: of y on x.
        x, y, y_stderr: (n,).
        used: (n,) which points the fit used.
    """
    if math.isnan(fit.exponent) or not bool(y_stderr.any()):
        return fit
    dx = _centred([math.log(value) for value in x[used].tolist()]).deviations
    xx = math.fsum(d * d for d in dx)
    variances = log_variance(y[used], y_stderr[used]).tolist()
    # A point at the mean does not move the slope, whatever its error.
    measured = math.fsum((d / xx) ** 2 * variance for d, variance in zip(dx, variances, strict=True) if d)
    return replace(fit, stderr=math.sqrt(fit.stderr**2 + measured))


def log_variance(y: Tensor, y_stderr: Tensor) -> Tensor:
    """Return the variance of log y, log(1 + (stderr / y)^2), as of a log-normal y."""
    return (y_stderr / y).square().log1p()


def theil_sen_slope(points: LogPoints) -> float:
    """Return the median of the slopes between all pairs of points with different abscissae; NaN of fewer than three.

    No single point can move it far, as the one that lies away from a cloud moves the least-squares slope.
    """
    if len(points.x) < MIN_POINTS:
        return float("nan")
    # Of all pairs there are too many for a loop.
    x, y = torch.tensor(points[:2], dtype=torch.float64)
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    run, rise = x[j] - x[i], y[j] - y[i]
    slopes = (rise / run)[run != 0]
    # `quantile` gives the mean of the middle two, as `median` does not.
    return float(slopes.quantile(0.5)) if len(slopes) else float("nan")


def fit_rank_decay(values: Values, *, exclude: Mapping[str, Tensor] | None = None) -> PowerLawFit:
    """Fit values ~ k^-exponent, k the rank of a value among the usable ones in decreasing order.

    The abscissa of the fit is 1 / k, so the exponent is positive for a decaying spectrum. Of gradient
    singular values it is gamma; of positive directional curvatures it is s: sorted by curvature,
    not in the order of sigma.

    Args:
        values: (n,) in any order.
        exclude: as in `fit_power_law`.

    Source: arXiv 2606.02596.

    >>> round(fit_rank_decay([1.0, 1 / 9, 1 / 4]).exponent, 6)
    2.0
    """
    return _least_squares(rank_points(values, exclude))


def fit_rank_models(sigma: Values) -> RankModels:
    """Compare three models of a spectrum's decay by BIC = n log(RSS / n) + p log n.

    Power law, log sigma = a + b log k (p = 2); exponential, a + b k (p = 2); log-normal in rank,
    a + b log k + c (log k)^2 (p = 3). Values that are not positive and finite are left out.

    Args:
        sigma: (n,) singular values; they are sorted in decreasing order.

    Source: arXiv 2606.02596.

    >>> fit_rank_models([2.0**-k for k in range(8)]).winner
    'exponential'
    """
    points = rank_points(sigma)
    log_sigma, n = torch.tensor(points.y, dtype=torch.float64), len(points.y)
    k = torch.arange(1, n + 1, dtype=torch.float64)
    designs = rank_designs(k)
    fits = {name: _rank_model(columns, log_sigma) for name, columns in designs.items()}
    bic = {name: fit.bic for name, fit in fits.items()}
    ranking: list[RankModel] = sorted((name for name in designs if not math.isnan(bic[name])), key=bic.__getitem__)
    winner = ranking[0] if ranking else None
    return RankModels(winner, bic, fits, n, sum(points.dropped.values()))


def rank_designs(k: Tensor) -> dict[RankModel, list[Tensor]]:
    """Return what the coefficients of each rank model multiply, at ranks k."""
    one = torch.ones_like(k)
    return {"power_law": [one, k.log()], "exponential": [one, k], "lognormal": [one, k.log(), k.log().square()]}


def noise_floor(sigma: Tensor, shape: tuple[int, int], groups: int, eps: float) -> float:
    """Return sigma_1 * max(m, n) * eps: a singular value at or below it is rounding noise of the gradient.

    Args:
        sigma: (K,) singular values, the largest first.
        shape: (m, n) of the matrix.
        groups: how many blocks of rows are matrices of their own.
        eps: machine epsilon of the gradient's floating-point type.
    """
    largest = float(sigma[0]) if sigma.numel() else 0.0
    return largest * max(shape[0] // groups, shape[1]) * eps


def as_list(values: Values, name: str) -> list[float]:
    """Return values as numbers in float64; raise ValueError unless they have one dimension."""
    # Lists are read in float64 at once: torch's default would round them to float32 first.
    vector = values.detach() if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(vector.shape)}")
    return cast(list[float], vector.to("cpu", torch.float64).tolist())


def _usable(x: list[float], y: list[float], exclude: Mapping[str, Tensor]) -> tuple[list[int], dict[str, int]]:
    """Return the places of the points that can be fitted, and how many cannot for which reason."""
    if wrong := [(len(mask), reason) for reason, mask in exclude.items() if len(mask) != len(x)]:
        raise ValueError(f"exclude must have a flag for each of {len(x)} points, got {wrong[0][0]} for {wrong[0][1]!r}")
    masks = {reason: mask.tolist() for reason, mask in exclude.items() if mask.any()}
    counts = dict.fromkeys([*masks, "not finite", "not positive"], 0)
    kept = []
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if masks and (excluded := [reason for reason, mask in masks.items() if mask[i]]):
            counts[excluded[0]] += 1
        elif 0 < a < math.inf and 0 < b < math.inf:
            kept.append(i)
        else:
            counts["not positive" if math.isfinite(a) and math.isfinite(b) else "not finite"] += 1
    return kept, {reason: count for reason, count in counts.items() if count}


def _least_squares(points: LogPoints) -> PowerLawFit:
    dropped, nan = points.dropped, float("nan")
    x, y = _centred(points.x), _centred(points.y)
    n, n_dropped = len(x.deviations), sum(dropped.values())
    xx, xy, yy = _sums(x, y)
    if not xx:
        return PowerLawFit(nan, nan, nan, nan, n, n_dropped, dict(dropped))
    slope = xy / xx
    rss = math.fsum((dy - slope * dx) ** 2 for dx, dy in zip(x.deviations, y.deviations, strict=True))
    return PowerLawFit(
        exponent=slope,
        intercept=y.mean - slope * x.mean,
        stderr=math.sqrt(rss / (n - 2) / xx),
        r2=1 - rss / yy if yy else nan,
        n_used=n,
        n_dropped=n_dropped,
        dropped=dict(dropped),
    )


class _Centred(NamedTuple):
    """Mean, deviations from it, and whether they are more than rounding."""

    mean: float
    deviations: list[float]
    differ: bool


def _centred(values: list[float]) -> _Centred:
    mean = math.fsum(values) / len(values) if values else 0.0
    deviations = [value - mean for value in values]
    rounding = len(values) * sys.float_info.epsilon * max(1.0, *map(abs, values), 0.0)
    return _Centred(mean, deviations, any(abs(deviation) > rounding for deviation in deviations))


def _sums(x: _Centred, y: _Centred) -> tuple[float, float, float]:
    fits = len(x.deviations) >= MIN_POINTS and x.differ
    xx = math.fsum(dx * dx for dx in x.deviations) if fits else 0.0
    yy = math.fsum(dy * dy for dy in y.deviations) if fits and y.differ else 0.0
    return xx, math.fsum(dx * dy for dx, dy in zip(x.deviations, y.deviations, strict=True)), yy


def _rank_model(columns: list[Tensor], log_sigma: Tensor) -> RankModelFit:
    n, p, nan = len(log_sigma), len(columns), float("nan")
    if n <= p:
        return RankModelFit((nan,) * p, nan, nan)
    design_np = torch.stack(columns, 1)
    # The columns differ, so R is regular. torch.linalg.lstsq differs in its last bits from process to process.
    q_np, r_pp = torch.linalg.qr(design_np)
    coefficients = torch.linalg.solve_triangular(r_pp, (q_np.T @ log_sigma)[:, None], upper=True)[:, 0]
    rss = float((log_sigma - design_np @ coefficients).square().sum())
    # An exact fit leaves rounding noise, which would decide between nested models; below it all fits are equal.
    rounding = n * (n * sys.float_info.epsilon * float(log_sigma.abs().max().clamp(min=1))) ** 2
    bic = n * math.log(max(rss, rounding) / n) + p * math.log(n)
    return RankModelFit(tuple(coefficients.tolist()), rss, bic)
