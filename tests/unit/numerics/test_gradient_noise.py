"""Signal and noise scale of a mean gradient, against per-sample gradients and the sum over all pairs of parts."""

import itertools
import math

import pytest
import torch

from lightning_spectral.numerics.gradient_noise import gradient_noise, noise_bias


def parts_of(gradients, sizes):
    """The mean of the gradients of all samples, and the terms that parts of these sizes have in it."""
    total = len(gradients)
    chunks = gradients.split(sizes)
    terms = [chunk.sum(0) / total for chunk in chunks]
    return gradients.mean(0), [(n / total, float(c.square().sum())) for n, c in zip(sizes, terms, strict=True)]


def samples(n, seed=0, dimension=40, signal=0.3):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 2.0, dimension, dtype=torch.float64)
    return signal + scale * torch.randn(n, dimension, generator=generator, dtype=torch.float64)


def test_equal_parts_are_the_share_of_their_pairs():
    gradients = samples(48)
    mean, parts = parts_of(gradients, [8] * 6)
    of_parts = [chunk.mean(0) for chunk in gradients.split(8)]
    pairs = sum(float(a @ b) for a, b in itertools.permutations(of_parts, 2)) / (6 * 5)
    noise = gradient_noise(float(mean @ mean), parts, 48)
    assert noise.signal == pytest.approx(pairs / float(mean @ mean), rel=1e-12)
    assert noise.noise_scale == pytest.approx(48 * (1 - noise.signal) / noise.signal, rel=1e-12)
    assert noise.parts == 6


@pytest.mark.parametrize("sizes", [[1] * 48, [5, 20, 13, 10], [24, 24]])
def test_parts_of_any_size_agree_with_single_samples_in_the_mean(sizes):
    """tr(Sigma) over many draws, from parts and from the variance of the samples."""
    estimates, traces = [], []
    for seed in range(400):
        gradients = samples(48, seed)
        mean, parts = parts_of(gradients, sizes)
        squared = float(mean @ mean)
        estimates.append((1 - gradient_noise(squared, parts, 48).signal) * squared * 48)
        traces.append(float(gradients.var(0).sum()))
    spread = torch.tensor(estimates).std() / 20
    assert abs(sum(estimates) / 400 - sum(traces) / 400) < 4 * spread
    if sizes == [1] * 48:
        assert estimates == pytest.approx(traces, rel=1e-12)


def test_the_noise_scale_does_not_depend_on_the_number_of_samples():
    few, many = samples(256, 1), samples(2048, 2)
    scales = [
        gradient_noise(float(g.mean(0) @ g.mean(0)), parts_of(g, [len(g) // 8] * 8)[1], len(g)) for g in (few, many)
    ]
    expected = float(torch.linspace(0.1, 2.0, 40, dtype=torch.float64).square().sum()) / (40 * 0.3**2)
    for noise in scales:
        assert abs(noise.noise_scale - expected) < 4 * noise.noise_scale_stderr
    assert scales[1].signal > scales[0].signal


def test_the_standard_error_is_not_too_small():
    signals, errors = [], []
    for seed in range(300):
        gradients = samples(64, seed)
        mean, parts = parts_of(gradients, [8] * 8)
        noise = gradient_noise(float(mean @ mean), parts, 64)
        signals.append((1 - noise.signal) * float(mean @ mean))
        errors.append(noise.signal_stderr * float(mean @ mean))
    # Of the estimate of the noise itself: that of |G|^2 is no error of S, which is of this gradient.
    assert torch.tensor(signals).std() <= 1.2 * torch.tensor(errors).mean()


def test_noise_alone_has_no_signal():
    gradients = samples(64, signal=0.0)
    mean, parts = parts_of(gradients, [8] * 8)
    noise = gradient_noise(float(mean @ mean), parts, 64)
    assert abs(noise.signal) < 3 * noise.signal_stderr
    opposite = gradient_noise(1e-6, [(0.5, 1.0), (0.5, 1.0)], 64)
    assert opposite.signal < 0
    assert opposite.noise_scale == math.inf


@pytest.mark.parametrize(
    ("squared", "parts"),
    [
        (1.0, []),
        (1.0, [(1.0, 1.0)]),
        (0.0, [(0.5, 0.0)] * 2),
        (math.nan, [(0.5, math.nan)] * 2),
    ],
)
def test_what_cannot_be_told_is_nan(squared, parts):
    noise = gradient_noise(squared, parts, 8)
    assert math.isnan(noise.signal)
    assert math.isnan(noise.noise_scale)
    assert math.isnan(noise_bias(noise.signal))


def test_without_a_number_of_samples_there_is_a_signal_and_no_scale():
    noise = gradient_noise(1.0, [(0.5, 0.3), (0.5, 0.3)], None)
    assert noise.signal == pytest.approx(0.8)
    assert math.isnan(noise.noise_scale)


def test_the_bias_grows_with_the_noise():
    biases = [noise_bias(signal) for signal in (1.0, 0.95, 0.5, 0.0)]
    assert biases[0] == 0
    assert biases == sorted(biases)
    assert noise_bias(-3.0) == noise_bias(0.0)
