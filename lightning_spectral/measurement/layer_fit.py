"""Every fit of one layer: from singular values and curvatures to a `LayerSpectrum`."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from lightning_spectral.numerics.gradient_noise import noise_bias
from lightning_spectral.numerics.power_law import (
    MIN_POINTS,
    PowerLawFit,
    fit_rank_decay,
    fit_rank_models,
    log_points,
    theil_sen_slope,
)
from lightning_spectral.numerics.statistics import directions_holding, entropy_rank, participation_ratio, zeta_bound
from lightning_spectral.records.layer_spectrum import EQUAL, NOISE, LayerMeasurement, LayerSpectrum, fit_alpha


def points_of_alpha(layer: LayerMeasurement | LayerSpectrum, alpha: PowerLawFit) -> Tensor:
    """Return (K,) which directions of a layer its alpha is fitted to."""
    return (layer.sigma > layer.noise_floor) & (layer.h > 0) & (EQUAL not in alpha.dropped)


def fit_layer(measured: LayerMeasurement) -> LayerSpectrum:
    """Fit all that is fitted to a layer's singular values and curvatures."""
    sigma, floor = measured.sigma, measured.noise_floor
    h_stderr, spectrum = cast(Tensor, measured.h_stderr), cast(Tensor, measured.spectrum)
    usable = sigma > floor
    noise = {NOISE: ~usable}
    positive = measured.h[usable & (measured.h > 0)]
    energy = sigma[usable].square()
    bias = noise_bias(measured.gradient_noise.signal)
    alpha = fit_alpha(sigma, measured.h, h_stderr, floor)
    if not math.isnan(bias):
        alpha = replace(alpha, stderr=math.hypot(alpha.stderr, bias))
    used = points_of_alpha(measured, alpha)
    gamma = fit_rank_decay(sigma, exclude=noise)
    h = torch.where(usable, measured.h, torch.full_like(measured.h, float("nan")))
    s = fit_rank_decay(h, exclude=noise)
    product = alpha.exponent * gamma.exponent
    note = measured.note or _explain(alpha, sigma, measured.h[usable])
    return LayerSpectrum(
        **(vars(measured) | {"h": h, "note": note}),
        alpha=alpha,
        alpha_theil_sen=theil_sen_slope(log_points(sigma[used], measured.h[used])),
        alpha_bias=bias,
        gamma=gamma,
        s=s,
        transfer_error=abs(s.exponent - product) / abs(s.exponent) if s.exponent else float("nan"),
        pr_curvature=participation_ratio(positive),
        pr_gradient=participation_ratio(energy),
        entropy_rank_curvature=entropy_rank(positive),
        entropy_rank_gradient=entropy_rank(energy),
        directions_95_curvature=directions_holding(positive, 0.95),
        directions_99_curvature=directions_holding(positive, 0.99),
        directions_95_gradient=directions_holding(energy, 0.95),
        directions_99_gradient=directions_holding(energy, 0.99),
        zeta_bound=zeta_bound(product),
        zeta_bound_window=zeta_bound(product, len(positive)),
        n_usable=int(usable.sum()),
        n_negative=int((h[usable] < 0).sum()),
        n_repeated=_count_repeated(sigma[usable].tolist(), floor),
        rank_models=fit_rank_models(spectrum[spectrum > floor]),
    )


def _explain(alpha: PowerLawFit, sigma: Tensor, h: Tensor) -> str:
    """Return why there is no alpha; empty where there is one. h: along the directions above the noise floor.

    Without numbers, which differ from layer to layer and from probe to probe: a cause has one text.
    """
    if alpha.n_used >= MIN_POINTS:
        return ""
    if bool(h.isnan().any()):
        return (
            "h is NaN: the loss has no finite second derivative, as of a norm or a square root at zero; add a small "
            "number under the root"
        )
    if len(h) and not bool(h.any()):
        return (
            "its Hessian is zero: the loss is piecewise linear (give a smooth loss_fn), or saturated, as where "
            "training diverged"
        )
    if EQUAL in alpha.dropped:
        return "all sigma are equal to rounding, so h has no slope against them"
    if not len(h):
        return f"no direction above the noise floor{'' if bool(sigma.any()) else ': its gradient is zero'}"
    return f"too few directions above the noise floor with h > 0: a fit of alpha needs {MIN_POINTS}"


def _count_repeated(sigma: list[float], floor: float) -> int:
    equal = [a - b <= floor for a, b in pairwise(sigma)]
    return sum(before or after for before, after in zip([False, *equal], [*equal, False], strict=True))
