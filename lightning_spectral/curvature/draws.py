"""Draws of a sketch: their mean, its standard error, and what that adds to alpha's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_spectral.curvature.problem import Curvatures
from lightning_spectral.numerics.power_law import PowerLawFit, fit_power_law, with_ordinate_errors
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


NOISE_OF_ALPHA = 0.25
"""Share of alpha from which on its standard error makes it noise."""


def is_precise(
    triplets: Mapping[str, SingularTriplets],
    h: Mapping[str, Tensor],
    stderr: Mapping[str, Tensor],
    target: float,
    share: float = 1.0,
) -> bool:
    """Return whether the standard error that h gives alpha is at most the target in the median layer.

    Layers without noise do not count, nor those without a fit; where no layer has noise, it is.

    Other micro-batches of the batch, of which this one has a ``share`` of the samples, average its noise with theirs.
    """
    drawn = [name for name in triplets if bool(stderr[name].any())]
    found = [_alpha_and_noise(triplets[name], h[name], stderr[name]) for name in drawn]
    precise = [noise * math.sqrt(share) <= target for fit, noise in found if not math.isnan(fit.exponent)]
    return not drawn or (bool(precise) and 2 * sum(precise) >= len(precise))


def noisy_layers(triplets: Mapping[str, SingularTriplets], curvatures: Curvatures) -> list[str]:
    """Return the layers whose alpha has a standard error above a quarter of it, from the noise of h alone."""
    noisy = []
    for name, stderr in curvatures.stderr.items():
        fit, noise = _alpha_and_noise(triplets[name], curvatures.h[name], stderr)
        if bool(stderr.any()) and not noise <= abs(fit.exponent) * NOISE_OF_ALPHA:
            noisy.append(name)
    return noisy


def _alpha_and_noise(triplets: SingularTriplets, h: Tensor, stderr: Tensor) -> tuple[PowerLawFit, float]:
    """Return the fit of alpha, and the part of its standard error that comes from h's."""
    sigma = triplets.sigma.detach().cpu().double()
    fit = fit_power_law(sigma, h)
    return fit, with_ordinate_errors(replace(fit, stderr=0.0), sigma, h, stderr, h > 0).stderr
