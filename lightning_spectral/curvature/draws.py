"""Draws of a sketch: their mean, its standard error, and what that adds to alpha's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_spectral.numerics.power_law import fit_power_law, with_ordinate_errors
from lightning_spectral.numerics.svd import SingularTriplets

PRIOR_COUNT = 4
"""How many values a guess of the noise is worth: the mean over layers, beside a layer; that, beside a direction."""


@dataclass(frozen=True, eq=False)
class Draw:
    """One estimate of all curvatures: layer name -> (K,) h, and (K,) sums of squares of the samples' parts of it."""

    h: dict[str, Tensor]
    energy: dict[str, Tensor]


def mean_and_error(draws: Sequence[Draw]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the draws' mean, and its standard error.

    Few draws say little of a variance. One guess of it is an estimate's energy times a ratio that the directions of a
    layer share; it is worth as many degrees of freedom as PRIOR_COUNT, beside the draws' own.
    """
    n = len(draws)
    h, energy, variance, ratio = {}, {}, {}, {}
    for name in draws[0].h:
        estimates = torch.stack([draw.h[name] for draw in draws])
        h[name], variance[name] = estimates.mean(0), estimates.var(0)
        energy[name] = torch.stack([draw.energy[name] for draw in draws]).mean(0)
        ratio[name] = (variance[name] / energy[name]).nan_to_num(0.0)
    ratios = torch.cat(list(ratio.values()))
    # Draws of few directions may agree by chance. One more ratio, of 1, is that of signs independent over samples.
    everywhere = (ratios.sum() + 1) / (len(ratios) + 1)
    stderr = {}
    for name, ratio_k in ratio.items():
        shared = (ratio_k.sum() + PRIOR_COUNT * everywhere) / (len(ratio_k) + PRIOR_COUNT)
        guess = energy[name] * shared
        stderr[name] = ((PRIOR_COUNT * guess + (n - 1) * variance[name]) / (PRIOR_COUNT + n - 1) / n).sqrt()
    return h, stderr


NOISE_SHARE = 0.1
"""Share of alpha's own standard error that the noise of h may add to it."""


def is_precise(
    triplets: Mapping[str, SingularTriplets], h: Mapping[str, Tensor], stderr: Mapping[str, Tensor], target: float
) -> bool:
    """Return whether more draws are not worth their time, in the median layer.

    The standard error that h gives alpha is below the target, or adds less than `NOISE_SHARE` to the one that the
    scatter of the points gives it, of which the noise itself is a part.
    """
    precise = []
    for name, of_layer in triplets.items():
        sigma, h_k = of_layer.sigma.detach().cpu().double(), h[name]
        fit = fit_power_law(sigma, h_k)
        if not math.isnan(fit.exponent):
            noise = with_ordinate_errors(replace(fit, stderr=0.0), sigma, h_k, stderr[name], h_k > 0).stderr
            own = math.sqrt(max(fit.stderr**2 - noise**2, 0.0))
            precise.append(noise <= max(target, own * math.sqrt((1 + NOISE_SHARE) ** 2 - 1)))
    return 2 * sum(precise) >= len(precise)


def alpha_error(
    triplets: Mapping[str, SingularTriplets], h: Mapping[str, Tensor], stderr: Mapping[str, Tensor]
) -> float:
    """Return the part of alpha's standard error that comes from h's, in the median layer; NaN without an alpha."""
    errors = [math.nan]
    for name, of_layer in triplets.items():
        sigma, h_k = of_layer.sigma.detach().cpu().double(), h[name]
        fit = fit_power_law(sigma, h_k)
        if not math.isnan(fit.exponent):
            fit = with_ordinate_errors(replace(fit, stderr=0.0), sigma, h_k, stderr[name], h_k > 0)
            errors.append(fit.stderr)
    return float(torch.tensor(errors).nanmedian())
