"""The confidence band of a fitted power law."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_spectral.numerics.power_law import log_variance
from lightning_spectral.records.layer_spectrum import LayerSpectrum


def fitted_points(layer: LayerSpectrum) -> Tensor:
    """Return (K,) which directions the fit of alpha used; none where there is no fit."""
    if math.isnan(layer.alpha.exponent):
        return torch.zeros_like(layer.sigma, dtype=torch.bool)
    return (layer.sigma > layer.noise_floor) & (layer.h > 0) & layer.h.isfinite()


def line_and_band(layer: LayerSpectrum, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fitted exp(intercept) sigma^alpha and the limits of its pointwise 95 % confidence band.

    With x = log sigma, the line at x_0 is sum c_k log h_k over the fitted points, c_k = 1 / n + (x_0 - mean) (x_k -
    mean) / S_xx. Its variance is sum c_k^2 (RSS / (n - 2) + log(1 + (h_stderr_k / h_k)^2)), so that the slope's is
    `PowerLawFit.stderr` squared, the errors of sampled h included, what the gradient's sampling noise may add to alpha
    left out. The band is t standard deviations to both sides, t the quantile of Student's distribution with n - 2
    degrees of freedom.

    Args:
        sigma: (p,) where.

    Returns:
        (p,) the line, the lower and the upper limit.
    """
    used = fitted_points(layer)
    x, y = layer.sigma[used].log(), layer.h[used].log()
    dx, n = x - x.mean(), len(x)
    residual = y - layer.alpha.intercept - layer.alpha.exponent * x
    variance = residual.square().sum() / (n - 2) + log_variance(layer.h[used], layer.h_stderr[used])
    x_0 = sigma.to(x).log()
    weights = 1 / n + torch.outer(x_0 - x.mean(), dx) / dx.square().sum()
    half = student_quantile(0.95, n - 2) * (weights.square() @ variance).sqrt()
    line = layer.alpha.intercept + layer.alpha.exponent * x_0
    return line.exp(), (line - half).exp(), (line + half).exp()


def student_quantile(level: float, dof: int) -> float:
    """Return t with P(abs(T) < t) = level, by Student's distribution with a whole number of degrees of freedom.

    By bisection on theta = atan(t / sqrt(dof)), in which the probability is a finite sum.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    >>> round(student_quantile(0.95, 1), 3), round(student_quantile(0.95, 18), 3)
    (12.706, 2.101)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        low, high = (theta, high) if _student_probability(theta, dof) < level else (low, theta)
    return math.sqrt(dof) * math.tan(low)


def _student_probability(theta: float, dof: int) -> float:
    odd = dof % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for power in range(2 + odd, dof + 1, 2):
        total += term
        term *= (power - 1) / power * math.cos(theta) ** 2
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
