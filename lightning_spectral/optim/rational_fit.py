"""f(x) = 1 / (x^(alpha/2) + d) as a sum of shifted inverses, fitted once per (alpha, d, range, tolerance)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_POLES = 8
"""More of them cost more than an eigendecomposition."""

POINTS = 240
"""Of the grid, logarithmic in x; f is smooth in log x, and a third of it changes the error by under 5 %."""

ITERATIONS = 200
HOPELESS = {25: 50.0, 50: 8.0}
"""Iteration -> error, in units of the tolerance, from which on so few terms are given up, which halves the time of a
fit: of 156 (alpha from 0.5 to 1.95, d from 0.01 to 1, ranges from 16 to 4096, tolerances of 7e-3 and 7e-4) none that
succeeded later was as bad then."""

REWEIGH_EVERY = 5
REWEIGH_POWER = 0.7
"""Lawson's reweighting turns the least-squares fit into a nearly uniform one; below 1 it does not oscillate."""


@dataclass(frozen=True)
class ShiftedInverses:
    """f(x) ~ constant + sum_j weights_j / (x + shifts_j), all terms positive.

    Attributes:
        error: largest error of sigma f(sigma^2), in units of the larger of it and f(largest) / 2 (see `fit_poles`).
    """

    constant: float
    weights: tuple[float, ...]
    shifts: tuple[float, ...]
    error: float

    def __call__(self, x: Any) -> Any:
        """Return the sum at a number or at each entry of a tensor."""
        return self.constant + sum(c / (x + p) for c, p in zip(self.weights, self.shifts, strict=True))

    @property
    def at_zero(self) -> float:
        """Value at x = 0, close to 1 / d."""
        return self.constant + sum(c / p for c, p in zip(self.weights, self.shifts, strict=True))


@functools.lru_cache(maxsize=256)
def fit_poles(alpha: float, damping: float, largest: float, tolerance: float) -> ShiftedInverses | None:
    """Return the fewest shifted inverses that give 1 / (x^(alpha/2) + d) on [0, largest] within a tolerance.

    For 0 < alpha < 2 the function is a Stieltjes function, so its best rational approximations have this form with
    positive c_j and p_j (Stieltjes; used for matrix functions by Hale, Higham and Trefethen, SIAM J. Numer. Anal.
    46, 2008). alpha = 2 is one inverse, exactly. Fitted is T(sigma) = sigma f(sigma^2), to
    |error| <= tolerance * max(T(sigma), f(largest) / 2). Among spectra of r singular values with root mean square 1 and
    r <= largest, a single nonzero one has the smallest ||T||_F >= sqrt(r) f(largest); so the error of a whole matrix
    is at most sqrt(1 + 1/4) tolerance in the Frobenius norm, relative, whatever its spectrum.

    Returns:
        The sum, or None if `MAX_POLES` terms do not reach the tolerance.
    """
    if alpha == 2:
        return ShiftedInverses(0.0, (1.0,), (damping,), 0.0)
    if abs(2 / alpha * math.log(damping)) > 200:
        return None  # float64 does not hold the squares
    problem = _Problem.of(alpha, damping, largest)
    for count in range(1, MAX_POLES + 1):
        parameters, error = problem.fit(count, tolerance)
        if error <= tolerance:
            values = parameters.exp().tolist()
            return ShiftedInverses(values[-1], tuple(values[count:-1]), tuple(values[:count]), error)
    return None


@dataclass(frozen=True)
class _Problem:
    """Weighted least squares for log p_1..log p_J, log c_1..log c_J, log c_0: positive by construction."""

    x: Tensor
    scale: Tensor
    target: Tensor
    knee: float

    @classmethod
    def of(cls, alpha: float, damping: float, largest: float) -> _Problem:
        floor = 0.5 / (largest ** (alpha / 2) + damping)
        smallest = min(floor * damping, 0.1) ** 2 / 100
        x = torch.logspace(math.log10(smallest), math.log10(largest), POINTS, dtype=torch.float64, device="cpu")
        f = 1 / (x ** (alpha / 2) + damping)
        scale = x.sqrt() / (x.sqrt() * f).clamp_min(floor)
        return cls(x, scale, scale * f, damping ** (2 / alpha))

    def fit(self, count: int, tolerance: float) -> tuple[Tensor, float]:
        """Fit by Levenberg-Marquardt with Lawson's weights; return the best parameters and their largest error."""
        parameters = self._start(count)
        residual, jacobian = self._residual(parameters, count)
        best, best_error = parameters, float(residual.abs().max())
        weights, step_damping = torch.ones_like(residual), 1e-2
        for iteration in range(ITERATIONS):
            gram = jacobian.T @ (weights[:, None] * jacobian)
            slope = jacobian.T @ (weights * residual)
            for _ in range(MAX_POLES):
                lhs = gram + step_damping * torch.diag(gram.diagonal() + 1e-12)
                trial = parameters - torch.linalg.solve(lhs, slope).clamp(-1, 1)
                new_residual, new_jacobian = self._residual(trial, count)
                if (weights * new_residual**2).sum() < (weights * residual**2).sum():
                    parameters, residual, jacobian = trial, new_residual, new_jacobian
                    step_damping = max(step_damping / 5, 1e-12)
                    break
                step_damping *= 4
            error = float(residual.abs().max())
            if error < best_error:
                best, best_error = parameters, error
            if best_error <= tolerance or best_error > HOPELESS.get(iteration, math.inf) * tolerance:
                break
            if iteration >= 4 * REWEIGH_EVERY and iteration % REWEIGH_EVERY == 0:
                weights = weights * (residual.abs() / error).clamp_min(1e-3) ** REWEIGH_POWER
                weights, step_damping = weights / weights.mean(), max(step_damping, 1e-6)
        return best, best_error

    def _start(self, count: int) -> Tensor:
        """Return shifts even in log x from below the knee of f on, and weights by linear least squares."""
        low = math.log(max(30 * float(self.x[0]), self.knee / 100))
        high = max(math.log(float(self.x[-1]) / 2), low + 1)
        shifts = low + (high - low) / count * torch.arange(count, dtype=torch.float64, device="cpu")
        basis = torch.cat([1 / (self.x[:, None] + shifts.exp()), torch.ones_like(self.x[:, None])], 1)
        weights = torch.linalg.lstsq(self.scale[:, None] * basis, self.target[:, None]).solution[:, 0]
        return torch.cat([shifts, weights.clamp_min(1e-6).log()])

    def _residual(self, parameters: Tensor, count: int) -> tuple[Tensor, Tensor]:
        shifts, weights, constant = torch.split(parameters.exp(), [count, count, 1])
        inverse = 1 / (self.x[:, None] + shifts)
        residual = self.scale * (constant + inverse @ weights) - self.target
        columns = [-weights * shifts * inverse**2, weights * inverse, constant.expand(len(self.x), 1)]
        return residual, self.scale[:, None] * torch.cat(columns, 1)
