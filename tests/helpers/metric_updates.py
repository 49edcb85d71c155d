"""Spectra to update metrics with, in one process and in ranks."""

import torch
from torchmetrics import MetricCollection

from lightning_spectral import CurvatureDecay, CurvatureExponent, ParticipationRatio, RankDecay


def spectrum(seed, k=20):
    """Singular values and curvatures (k,) with a scale and a slope of their own, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, k, generator=generator, dtype=torch.float64)
    rank = torch.arange(1, k + 1, dtype=torch.float64)
    sigma = 10.0 ** (seed % 5 - 2) * (0.2 * noise[0]).exp() * rank ** -(0.8 + 0.1 * seed)
    h = 7.0**seed * sigma ** (1.5 + 0.2 * seed) * (0.3 * noise[1]).exp()
    h[k // 2] *= -1
    return sigma, h


def numbers(results):
    return {name: value.item() for name, value in results.items()}


def four():
    return MetricCollection([CurvatureExponent(), RankDecay(), CurvatureDecay(), ParticipationRatio()])


def compute_in_ranks(rank, n, cases):
    """Return what metrics compute after updates in ranks, for each case of seeds by rank."""
    result = []
    for seeds in cases:
        metrics = four()
        for seed in seeds[rank]:
            sigma, h = spectrum(seed)
            metrics.update(sigma=sigma, h=h)
        values = numbers(metrics.compute())
        own = [metric.updates_used for metric in metrics.values()]
        metrics.update(sigma=spectrum(9)[0], h=spectrum(9)[1])
        result.append((values, own, numbers(metrics.compute())))
    metric = CurvatureExponent(compute_with_cache=False)
    for seed in (0, 1):
        if rank:
            metric.update(*spectrum(seed))
        result.append(metric.compute().item())
    return result
