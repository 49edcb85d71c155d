"""The one rule of trust, and who follows it."""

import math
from dataclasses import replace

import pytest
import torch
from reports import dead, layer, report

from lightning_spectral.analysis import compare_kinds, deviating, transfer_identity, trusted
from lightning_spectral.measurement.layer_fit import fit_layer
from lightning_spectral.numerics.gradient_noise import GradientNoise
from lightning_spectral.numerics.power_law import log_points, theil_sen_slope
from lightning_spectral.records.fit_quality import FitQuality
from lightning_spectral.records.layer_spectrum import LayerMeasurement
from lightning_spectral.summary import summary, summary_over_training

GOOD = FitQuality(2.0, stderr=0.1, r2=0.97, points=20, theil_sen=2.1, signal=0.95)


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        ({}, ""),
        ({"r2": 0.89}, "r2 0.89"),
        ({"r2": math.nan}, "no fit"),
        ({"points": 4}, "4 points"),
        ({"signal": 0.79}, "noise"),
        ({"theil_sen": 1.4}, "one point"),
        ({"stderr": 0.51}, "alpha 2.00 ± 0.51"),
        ({"stderr": math.nan, "points": math.nan, "theil_sen": math.nan, "signal": math.nan}, ""),
    ],
)
def test_each_rule_alone_is_enough_to_doubt(change, doubt):
    quality = replace(GOOD, **change)
    assert quality.doubt == doubt
    assert quality.trusted == (not doubt)


def cloud_and_far_point():
    """A cloud without a slope, and one point far from it that gives the line an r2 above 0.9."""
    generator = torch.Generator().manual_seed(3)
    x = 0.1 * torch.randn(19, generator=generator, dtype=torch.float64)
    y = 0.3 * torch.randn(19, generator=generator, dtype=torch.float64)
    x, y = torch.cat([x, torch.tensor([4.0])]), torch.cat([y, torch.tensor([8.0])])
    order = x.argsort(descending=True)
    return x[order].exp(), y[order].exp()


def test_one_far_point_does_not_make_a_fit_to_trust():
    sigma, h = cloud_and_far_point()
    spectrum = fit_layer(LayerMeasurement("a", (64, 64), sigma, h, noise_floor=0.0))
    assert spectrum.alpha.r2 > 0.9
    assert spectrum.alpha.stderr < abs(spectrum.alpha.exponent) / 4
    assert spectrum.fit_quality.doubt == "one point"


def test_the_theil_sen_slope_is_the_median_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 9, generator=generator, dtype=torch.float64) + 0.1
    x[3] = x[5]
    slopes = [
        float((y[j].log() - y[i].log()) / (x[j].log() - x[i].log()))
        for i in range(9)
        for j in range(i + 1, 9)
        if x[i] != x[j]
    ]
    assert theil_sen_slope(log_points(x, y)) == pytest.approx(sorted(slopes)[len(slopes) // 2], rel=1e-12)
    assert math.isnan(theil_sen_slope(log_points(x[:2], y[:2])))


def noisy(name, **options):
    return layer(name, gradient_noise=GradientNoise(signal=0.5, noise_scale=64.0), **options)


def test_noise_is_a_doubt_and_a_part_of_the_standard_error():
    clean, doubtful = layer("a", noise=0.1), noisy("b", noise=0.1)
    assert doubtful.fit_quality.doubt == "noise"
    assert doubtful.alpha.exponent == clean.alpha.exponent
    assert doubtful.alpha.stderr == pytest.approx(math.hypot(clean.alpha.stderr, doubtful.alpha_bias))
    assert math.isnan(clean.alpha_bias)


def test_every_summary_follows_the_rule():
    layers = [
        layer("a.weight", alpha=2.0),
        layer("b.weight", alpha=1.8),
        noisy("c.weight", alpha=1.0),
        noisy("d.weight", alpha=1.1),
        dead("e.weight"),
    ]
    measured = report(*layers)
    assert measured.trusted == ["a.weight", "b.weight"]
    medians = measured.medians()
    assert medians["alpha_median"] == pytest.approx(1.9)
    assert medians["alpha_median_all"] == pytest.approx(1.45)
    assert medians["signal_median"] == 0.5
    assert "signal_median_all" not in medians
    assert measured.scalars()["layers_trusted"] == 2
    (kind,) = compare_kinds(measured)
    assert (kind.layers, kind.trusted, kind.alpha) == (5, 2, pytest.approx(1.9))
    assert {x.name for x in transfer_identity(measured).trusted} == {"a.weight", "b.weight"}
    assert [trusted(x) for x in layers] == [True, True, False, False, False]
    assert measured.trusted == [x.name for x in layers[:2]]
    text = " ".join(summary(measured))
    assert text.startswith("2 of 5 layers have an alpha to trust")
    assert "c (noise)" in text
    assert "d (noise)" in text
    assert "Sampling noise is more than 20% of the squared gradient in 2 of 5 layers (signal 0.50 in c)" in text


def test_layers_that_deviate_are_those_of_fits_to_trust():
    layers = [layer(f"{i}.weight", alpha=2.0) for i in range(3)]
    far = layer("far.weight", alpha=3.0)
    assert [x.name for x, _ in deviating(report(*layers, far))] == ["far.weight"]
    assert not deviating(report(*layers, noisy("far.weight", alpha=3.0)))


def test_a_trend_begins_at_the_first_probe_to_trust():
    probes = [report(noisy("a", alpha=3.0), step=0), report(layer("a", alpha=2.0), step=50)]
    probes.append(report(layer("a", alpha=1.5), step=100))
    (sentence,) = summary_over_training([(x.step, list(x.layers.values())) for x in probes])
    assert sentence.startswith("From step 50 to 100 the median alpha of the fits to trust went from 2.00 to 1.50")
