"""Reports made of numbers, without a network: what tables, summaries and pages show."""

import torch
from fits import fit_numbers

from lightning_spectral import SpectralReport


def layer(name, *, alpha=2.0, gamma=1.0, noise=0.0, negative=0, kind="dense", k=20, seed=0, shape=(64, 32), **kwargs):
    """h = sigma^alpha and sigma = k^-gamma, with noise of this size in log h, and so many of the last h negative."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -gamma
    h = sigma**alpha * (noise * torch.randn(k, generator=generator, dtype=torch.float64)).exp()
    h[k - negative :] *= -1
    return fit_numbers(sigma, h, name=name, kind=kind, shape=shape, **kwargs)


def dead(name, note="nothing flows through it", kind="dense"):
    """A layer without a direction."""
    return fit_numbers(torch.zeros(0), torch.zeros(0), name=name, kind=kind, shape=(5, 5), note=note)


def report(*layers, step=None, skipped=None, **kwargs):
    """A report of these layers."""
    values = SpectralReport(
        {x.name: x for x in layers}, skipped or {}, 1.25, 8, "exact", "eval", "float32", 20, 0.1, **kwargs
    )
    return values if step is None else values.at(step=step, epoch=0)
