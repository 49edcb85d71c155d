"""Torchmetrics over `numerics`: exponents and participation ratios of several probes, layers and ranks.

An update takes one spectrum, (K,) values in any floating type on any device. States are sums in float64 of fixed
size, added over updates and over processes: memory does not grow, and how updates are spread over processes does not
matter. They stay in float64 whatever the module they belong to is cast to.

`compute` waits for all processes. A process without an update since its last call answers from torchmetrics' cache
instead, so where only some update between two calls and none resets, pass `compute_with_cache=False`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_spectral.errors import SpectralWarning
from lightning_spectral.numerics.power_law import MIN_POINTS, LogPoints, Values, centred_sums, log_points, rank_points
from lightning_spectral.numerics.statistics import participation_ratio

Quantity = Literal["exponent", "stderr", "r2"]
QUANTITIES: tuple[Quantity, ...] = ("exponent", "stderr", "r2")


class _SpectralMetric(Metric):
    """Sums and counts of spectra that keep their precision when the module around them is cast."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    _n_sums: ClassVar[int]
    _needs: ClassVar[str]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection updates one metric for all whose states have the same names and, after the first update,
        # the same values. Of sigma and of h proportional to it the sums are equal: names of its own keep a class apart.
        self._sums_name, self._counts_name = (f"{type(self).__name__}_{part}" for part in ("sums", "counts"))
        self.add_state(self._sums_name, torch.zeros(self._n_sums, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(self._counts_name, torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")
        self._warned = False

    @property
    def points(self) -> int:
        """Number of points that the value rests on; like the other counts, of this rank."""
        return self._count(0)

    @property
    def points_dropped(self) -> int:
        """Number of points left out: not positive, not finite, or of an update that was left out."""
        return self._count(1)

    @property
    def updates_used(self) -> int:
        """Number of updates that the value rests on."""
        return self._count(2)

    @property
    def updates_left_out(self) -> int:
        """Number of updates with too few points, which do not change the value."""
        return self._count(3)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value, several as a series, or by default that of `compute`; (figure, axes) as in torchmetrics."""
        return self._plot(val, ax)

    def _count(self, i: int) -> int:
        return int(getattr(self, self._counts_name)[i])

    def _add(self, terms: Sequence[float] | None, points: LogPoints) -> None:
        """Add the terms of one update to the sums; None if it has none."""
        used, dropped = len(points.x), sum(points.dropped.values())
        counts = [0, used + dropped, 0, 1] if terms is None else [used, dropped, 1, 0]
        state = getattr(self, self._counts_name)
        setattr(self, self._counts_name, state + torch.tensor(counts, device=state.device))
        if terms is None:
            self._warn(points)
            return
        state = getattr(self, self._sums_name)
        setattr(self, self._sums_name, state + torch.tensor(terms, dtype=torch.float64, device=state.device))

    def _warn(self, points: LogPoints) -> None:
        if self._warned:
            return
        self._warned = True
        reasons = "".join(f", {count} {reason}" for reason, count in points.dropped.items())
        warnings.warn(
            f"{type(self).__name__} leaves an update out: it needs {self._needs}, and got {len(points.x)} usable "
            f"points{reasons}. Such updates are counted in `updates_left_out`; this is said once.",
            SpectralWarning,
            stacklevel=2,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        # Metric keeps its states through .half(), but neither through .to(dtype), by which Lightning sets "bf16-true",
        # nor through set_dtype.
        def keep_dtype(state: Tensor) -> Tensor:
            try:
                moved = fn(state)
            except TypeError:
                # A device without float64, such as MPS: the sums stay where they are.
                if state.dtype != torch.float64:
                    raise
                return state
            return moved if moved.dtype == state.dtype else state.to(moved.device)

        return super()._apply(keep_dtype, *args, **kwargs)


class _PooledExponent(_SpectralMetric):
    _n_sums = 3
    _needs = f"{MIN_POINTS} points that differ"

    def __init__(self, quantity: Quantity = "exponent", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if quantity not in QUANTITIES:
            raise ValueError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
        self.quantity: Quantity = quantity

    def compute(self) -> Tensor:
        """Return the exponent over all updates, its standard error or its r2, as a float64 scalar.

        With X, C, Y the sums over all updates of dx^2, dx dy and dy^2, the deviations from the update's own means:
        exponent = C / X, RSS = Y - C^2 / X, stderr = sqrt(RSS / (points - updates - 1) / X), r2 = 1 - RSS / Y; r2 is
        NaN where the ordinates of each update are equal.
        """
        xx, xy, yy = getattr(self, self._sums_name)
        # Of points on a line the difference leaves rounding noise, which may be negative.
        rss = (yy - xy.square() / xx).clamp(min=0)
        stderr = (rss / (self.points - self.updates_used - 1) / xx).sqrt()
        values: dict[Quantity, Tensor] = {"exponent": xy / xx, "stderr": stderr, "r2": 1 - rss / yy}
        return values[self.quantity]

    def _add_points(self, points: LogPoints) -> None:
        terms = centred_sums(points)
        self._add(terms if terms[0] else None, points)


class CurvatureExponent(_PooledExponent):
    """alpha of h ~ sigma^alpha, one exponent over all updates.

    Least squares of log h on log sigma with one slope and, because each layer and each step has a scale of its own, an
    intercept for each update u. That is the mean of the exponents of the updates, weighted by what each knows of it:

        alpha = sum_u X_u alpha_u / sum_u X_u,  X_u = sum_k (log sigma_k - mean)^2,  alpha_u = fit_power_law(sigma, h)

    with k over the usable points. Of one update it equals `fit_power_law`. An update with fewer than 3 usable points is
    left out, with one warning, and counted in `updates_left_out`; without any other the value is NaN.

    Args:
        quantity: "exponent", or "stderr" or "r2" of the same regression, as in `PowerLawFit`. Metrics that differ in it
            alone share their states in a MetricCollection.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: for another quantity.

    Source: arXiv 2606.02596.

    >>> metric = CurvatureExponent()
    >>> metric.update([1.0, 2.0, 4.0], [3.0, 12.0, 48.0])
    >>> metric.update([1.0, 2.0, 4.0], [0.5, 2.0, 8.0])
    >>> round(metric.compute().item(), 6), metric.points
    (2.0, 6)
    """

    def update(self, sigma: Values, h: Values) -> None:
        """Add one spectrum: (K,) singular values and the (K,) curvatures along them.

        Points with sigma or h not positive or not finite are left out and counted in `points_dropped`.

        Raises:
            ValueError: if the two are not one-dimensional and of one length.
        """
        self._add_points(log_points(sigma, h))


class RankDecay(_PooledExponent):
    """gamma of sigma_k ~ k^-gamma, one exponent over all updates.

    Pooled as in `CurvatureExponent`, with X_u = sum_k (log k - mean)^2, k to the number of usable values: spectra of
    one length weigh the same, so of them it is the mean of `fit_rank_decay`'s exponents.

    Args:
        quantity, kwargs: as in `CurvatureExponent`.

    Source: arXiv 2606.02596.

    >>> metric = RankDecay()
    >>> metric.update([1.0, 1 / 4, 1 / 9])
    >>> metric.update([1.0, 1 / 2, 1 / 3])
    >>> round(metric.compute().item(), 6)
    1.5
    """

    plot_lower_bound = 0.0

    def update(self, sigma: Values) -> None:
        """Add one spectrum: (K,) singular values above the noise floor, in any order."""
        self._add_points(rank_points(sigma))


class CurvatureDecay(_PooledExponent):
    """s of positive h, sorted, ~ rank^-s, one exponent over all updates; as `RankDecay`, of curvatures.

    >>> metric = CurvatureDecay()
    >>> metric.update([1 / 9, 1.0, -2.0, 1 / 4])
    >>> round(metric.compute().item(), 6), metric.points_dropped
    (2.0, 1)
    """

    plot_lower_bound = 0.0

    def update(self, h: Values) -> None:
        """Add one spectrum: (K,) curvatures in any order. Those that are not positive are dropped."""
        self._add_points(rank_points(h))


class ParticipationRatio(_SpectralMetric):
    """(sum h)^2 / sum h^2 over the positive h of an update, averaged over the updates.

    Directions of different updates are not put together: three layers with one stiff direction each have a
    participation ratio of 1. For a gradient, update with sigma^2. An update without a positive value is left out, with
    one warning, and counted in `updates_left_out`; without any other the value is NaN.

    Args:
        kwargs: those of `torchmetrics.Metric`.

    Source: arXiv 2606.02596; `participation_ratio`.

    >>> metric = ParticipationRatio()
    >>> metric.update([2.0, 2.0, 2.0, -1.0])
    >>> metric.update([5.0])
    >>> metric.compute().item()
    2.0
    """

    plot_lower_bound = 1.0

    _n_sums = 1
    _needs = "a positive value"

    def update(self, h: Values) -> None:
        """Add one spectrum: (K,) curvatures, or sigma^2, in any order."""
        ratio = participation_ratio(h)
        self._add(None if math.isnan(ratio) else [ratio], rank_points(h))

    def compute(self) -> Tensor:
        """Return the mean over the updates, as a float64 scalar."""
        total: Tensor = getattr(self, self._sums_name)[0]
        return total / self.updates_used
