"""Layers fitted to numbers, without a network."""

from dataclasses import replace

import torch

from lightning_spectral.measurement.layer_fit import fit_layer, points_of_alpha
from lightning_spectral.numerics.bootstrap import exponent_intervals
from lightning_spectral.numerics.power_law import noise_floor
from lightning_spectral.records.alignment import LayerAlignment
from lightning_spectral.records.layer_spectrum import LayerMeasurement

FLOAT32 = torch.finfo(torch.float32).eps


def fit_numbers(sigma, h, *, shape, groups=1, eps=FLOAT32, bootstrap=None, factors=None, per_sample=1.0, **facts):
    """The spectrum of a layer with these singular values and curvatures."""
    floor = noise_floor(sigma, shape, groups, eps)
    measured = LayerMeasurement(sigma=sigma, h=h, shape=shape, groups=groups, noise_floor=floor, **facts)
    spectrum = fit_layer(measured)
    usable, used = spectrum.sigma > spectrum.noise_floor, points_of_alpha(spectrum, spectrum.alpha)
    sigma, h, parts = spectrum.sigma, spectrum.h, {}
    if bootstrap:
        parts["intervals"] = exponent_intervals(sigma[usable], h[usable], used=used[usable], draws=bootstrap)
    if factors is not None:
        options = {"h_stderr": spectrum.h_stderr, "per_sample": per_sample}
        parts["alignment"] = LayerAlignment.from_factors(factors, sigma, h, used=used, **options)
    return replace(spectrum, **parts)
