"""Layers fitted to numbers, without a network."""

import torch

from lightning_spectral.measurement.layer_fit import alignment_part, fit_layer, intervals_part
from lightning_spectral.numerics.power_law import noise_floor
from lightning_spectral.records.layer_spectrum import LayerMeasurement

FLOAT32 = torch.finfo(torch.float32).eps


def fit_numbers(sigma, h, *, shape, groups=1, eps=FLOAT32, bootstrap=None, factors=None, per_sample=1.0, **facts):
    """The spectrum of a layer with these singular values and curvatures."""
    floor = noise_floor(sigma, shape, groups, eps)
    measured = LayerMeasurement(sigma=sigma, h=h, shape=shape, groups=groups, noise_floor=floor, **facts)
    parts = {}
    if bootstrap:
        parts["intervals"] = intervals_part(bootstrap)
    if factors is not None:
        parts["alignment"] = alignment_part(factors, per_sample)
    return fit_layer(measured, parts)
