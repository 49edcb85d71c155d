"""Bootstrap intervals against a loop of fits, and how often they hold the true slope."""

import math

import pytest
import torch
from fits import fit_numbers

from lightning_spectral import fit_power_law, fit_rank_decay
from lightning_spectral._serialization import decode
from lightning_spectral.numerics.bootstrap import Interval, exponent_intervals, slope_interval

K = 20
RANKS = torch.arange(1, K + 1, dtype=torch.float64)


def noisy_power_law(seed, alpha=2.0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    sigma = RANKS**-1.2
    return sigma, sigma**alpha * (noise * torch.randn(K, generator=generator, dtype=torch.float64)).exp()


def loop_of_fits(x, y, draws, level, seed):
    """Percentiles of `fit_power_law` on each draw, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(len(x), (draws, len(x)), generator=generator)
    slopes = [fit_power_law(x[p].exp(), y[p].exp()).exponent for p in points]
    known = sorted(slope for slope in slopes if not math.isnan(slope))

    def quantile(q):
        place = q * (len(known) - 1)
        low = math.floor(place)
        high = min(low + 1, len(known) - 1)
        return known[low] + (place - low) * (known[high] - known[low])

    return quantile((1 - level) / 2), quantile((1 + level) / 2), len(slopes) - len(known)


@pytest.mark.parametrize(("n", "draws", "level"), [(20, 300, 0.95), (5, 200, 0.5), (3, 400, 0.9)])
def test_intervals_are_those_of_a_loop_of_fits(n, draws, level):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    found = slope_interval(x, y, draws=draws, level=level, seed=3)
    low, high, degenerate = loop_of_fits(x, y, draws, level, seed=3)
    assert found.low == pytest.approx(low, rel=1e-10)
    assert found.high == pytest.approx(high, rel=1e-10)
    assert (found.n_draws, found.n_degenerate, found.level) == (draws, degenerate, level)
    if n == 3:
        assert found.n_degenerate > 0


def test_intervals_hold_the_true_slope_about_as_often_as_they_say():
    held, widths, spread = 0, [], []
    for seed in range(300):
        sigma, h = noisy_power_law(seed)
        interval = slope_interval(sigma.log(), h.log(), draws=300)
        held += interval.low < 2.0 < interval.high
        widths.append(interval.high - interval.low)
        spread.append(fit_power_law(sigma, h).exponent)
    assert 0.86 < held / 300 < 0.98
    width = 2 * 1.96 * float(torch.tensor(spread).std())
    assert 0.7 * width < sum(widths) / len(widths) < 1.2 * width


@pytest.mark.parametrize(("n", "low", "high"), [(3, 0.58, 0.75), (5, 0.85, 0.96), (10, 0.86, 0.97)])
def test_intervals_of_few_points_hold_the_true_slope_as_often_as_documented(n, low, high):
    held = 0
    for seed in range(300):
        sigma, h = (values[:n] for values in noisy_power_law(seed))
        interval = slope_interval(sigma.log(), h.log(), draws=300, seed=seed)
        held += interval.low < 2.0 < interval.high
    assert low < held / 300 < high


def test_intervals_of_a_spectrum_lie_around_its_exponents():
    sigma, h = noisy_power_law(1, noise=0.2)
    h[4] = -h[4]
    spectrum = fit_numbers(sigma, h, name="w", shape=(64, 64), bootstrap=500)
    for name in ("alpha", "gamma", "s"):
        interval, exponent = getattr(spectrum.intervals, name), getattr(spectrum, name).exponent
        assert interval.low <= exponent + 1e-9
        assert exponent <= interval.high + 1e-9
        assert interval.n_degenerate == 0
    assert spectrum.intervals.gamma.high == pytest.approx(1.2)
    assert spectrum.intervals == exponent_intervals(sigma, h, draws=500)
    assert fit_rank_decay(h[h > 0]).exponent == spectrum.s.exponent
    assert fit_numbers(sigma, h, name="w", shape=(64, 64)).intervals is None


def test_intervals_leave_the_global_random_state():
    state = torch.get_rng_state()
    sigma, h = noisy_power_law(2)
    first = exponent_intervals(sigma, h, draws=50)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == exponent_intervals(sigma, h, draws=50)
    assert first != exponent_intervals(sigma, h, draws=50, seed=1)


@pytest.mark.parametrize("x", [[1.0, 2.0], [3.0, 3.0, 3.0, 3.0], []])
def test_points_without_a_slope_have_no_interval(x):
    x = torch.tensor(x, dtype=torch.float64)
    interval = slope_interval(x, x, draws=10)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.n_degenerate == interval.n_draws == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"draws": 9, "level": 95}, "level must lie between 0 and 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        slope_interval(RANKS, RANKS, **options)


def test_an_interval_without_ends_survives_json():
    interval = Interval(math.nan, math.nan, 0.95, 10, 10)
    back = decode(Interval, {"low": None, "high": None, "level": 0.95, "n_draws": 10, "n_degenerate": 10})
    assert repr(back) == repr(interval)


def test_points_that_alpha_leaves_out_are_in_no_interval_of_it():
    """Sigma equal to rounding: h has no slope against them, whatever the rounding makes of it."""
    sigma = 1 + torch.finfo(torch.float32).eps * torch.arange(8, 0, -1, dtype=torch.float64) / 8
    spectrum = fit_numbers(sigma, RANKS[:8] ** -1, name="w", shape=(64, 64), bootstrap=50)
    assert math.isnan(spectrum.alpha.exponent)
    assert math.isnan(spectrum.intervals.alpha.low)
    assert math.isnan(spectrum.intervals.alpha.high)
    assert spectrum.intervals.s.low <= spectrum.s.exponent <= spectrum.intervals.s.high


@pytest.mark.parametrize("n", range(6))
def test_where_an_exponent_is_nan_its_interval_is_too(n):
    sigma, h = noisy_power_law(3)
    h[n:] = -1.0
    spectrum = fit_numbers(sigma, h, name="w", shape=(64, 64), bootstrap=50)
    for name in ("alpha", "gamma", "s"):
        missing = math.isnan(getattr(spectrum, name).exponent)
        assert math.isnan(getattr(spectrum.intervals, name).low) == missing
