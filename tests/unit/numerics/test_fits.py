"""Fits on spectra whose exponents are known, and on the paper's."""

import math

import pytest
import torch
from fits import fit_numbers
from paper import needs_paper, paper_layers

from lightning_spectral import fit_power_law, fit_rank_decay, fit_rank_models, participation_ratio, zeta_bound
from lightning_spectral.numerics.statistics import directions_holding, entropy_rank


@needs_paper
def test_fits_reproduce_the_paper():
    layers = paper_layers()
    assert len(layers) == 24
    for _, layer, _ in layers:
        sigma, h = (torch.tensor(layer[key], dtype=torch.float64) for key in ("sigma", "h_exact"))
        fitted = fit_numbers(sigma, h, name=layer["name"], shape=tuple(layer["shape"]), eps=0.0)
        close = {"rel": 1e-6}
        assert fitted.alpha.exponent == pytest.approx(layer["alpha"], **close)
        assert fitted.alpha.r2 == pytest.approx(layer["r2_alpha"], **close)
        assert fitted.gamma.exponent == pytest.approx(layer["gamma"], **close)
        assert fitted.gamma.r2 == pytest.approx(layer["r2_gamma"], **close)
        assert fitted.s.exponent == pytest.approx(layer["s_hessian"], **close)
        assert fitted.s.r2 == pytest.approx(layer["r2_s_hessian"], **close)
        assert fitted.alpha_gamma == pytest.approx(layer["predicted_s"], **close)


@needs_paper
def test_rank_models_reproduce_the_paper():
    for _, layer, reference in paper_layers():
        models = fit_rank_models(layer["sigma"])
        assert models.winner == reference["best_model_bic"]
        for name, fit in reference["fits"].items():
            assert models.bic[name] == pytest.approx(fit["bic"], rel=1e-6)
            assert models.fits[name].rss == pytest.approx(fit["rss"], rel=1e-6)


@pytest.mark.parametrize("exponent", [-2.0, 0.5, 1.0, 3.7])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_exact_power_law(exponent, scale):
    x = torch.linspace(0.1, 5, 12, dtype=torch.float64)
    fit = fit_power_law(x, scale * x**exponent)
    assert fit.exponent == pytest.approx(exponent, abs=1e-10)
    assert fit.intercept == pytest.approx(math.log(scale), abs=1e-10)
    assert fit.r2 == pytest.approx(1.0)
    assert fit.stderr == pytest.approx(0.0, abs=1e-10)
    assert (fit.n_used, fit.n_dropped) == (12, 0)


def test_standard_error_is_that_of_the_textbook():
    # Slope, intercept and standard errors of Anscombe's first data set, log-transformed.
    x = torch.tensor([10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5], dtype=torch.float64)
    y = torch.tensor([8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68], dtype=torch.float64)
    fit = fit_power_law(x.exp(), y.exp())
    assert fit.exponent == pytest.approx(0.5001, abs=1e-4)
    assert fit.intercept == pytest.approx(3.0001, abs=1e-4)
    assert fit.stderr == pytest.approx(0.1179, abs=1e-4)
    assert fit.r2 == pytest.approx(0.6665, abs=1e-4)


def test_dropped_points_are_counted_once_under_their_first_reason():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, float("inf")])
    y = torch.tensor([1.0, 2.0, 3.0, -4.0, 0.0, float("nan"), 1.0])
    noise = torch.tensor([False, False, False, True, False, False, False])
    fit = fit_power_law(x, y, exclude={"noise": noise})
    assert fit.dropped == {"noise": 1, "not finite": 2, "not positive": 1}
    assert (fit.n_used, fit.n_dropped) == (3, 4)
    assert fit.exponent == pytest.approx(1.0)


@pytest.mark.parametrize(("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([], []), ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])])
def test_too_few_points_are_nan_and_never_zero(x, y):
    fit = fit_power_law(x, y)
    assert all(math.isnan(v) for v in (fit.exponent, fit.intercept, fit.stderr, fit.r2))
    assert fit.n_used == len(x)


@pytest.mark.parametrize("y", [[5.0] * 3, [7.0] * 5, [10.0] * 6, [3e200] * 7, [1.0, 1.0, 1.0 + 2e-16]])
def test_constant_ordinates_have_slope_zero_and_no_r2(y):
    fit = fit_power_law(range(1, len(y) + 1), y)
    assert fit.exponent == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(fit.r2)


@pytest.mark.parametrize(("x", "y"), [([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_points_of_the_wrong_shape(x, y):
    with pytest.raises(ValueError, match=r"one length|one-dimensional"):
        fit_power_law(x, y)


def test_rank_decay_sorts():
    values = torch.arange(1, 11, dtype=torch.float64) ** -1.5
    fit = fit_rank_decay(values[torch.randperm(10)])
    assert fit.exponent == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("winner", "law"),
    [
        ("power_law", lambda k: k**-1.3),
        ("exponential", lambda k: (-0.4 * k).exp()),
        ("lognormal", lambda k: (-0.3 * k.log() - 0.4 * k.log() ** 2).exp()),
    ],
)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rank_model_of_a_pure_law_wins(winner, law, scale):
    k = torch.arange(1, 21, dtype=torch.float64)
    models = fit_rank_models(scale * law(k))
    assert models.winner == winner
    assert (models.n_used, models.n_dropped) == (20, 0)


def test_rank_models_of_too_few_values():
    models = fit_rank_models([1.0, 0.5])
    assert models.winner is None
    assert all(math.isnan(bic) for bic in models.bic.values())
    three = fit_rank_models([4.0, 2.0, 1.0, 0.0])
    assert math.isnan(three.bic["lognormal"])
    assert (three.winner, three.n_used, three.n_dropped) == ("exponential", 3, 1)


def test_participation_ratio_and_entropy_rank():
    assert participation_ratio([1.0] * 7) == pytest.approx(7)
    assert participation_ratio([1e-300] * 7) == pytest.approx(7)
    assert participation_ratio([1e300] * 7) == pytest.approx(7)
    assert participation_ratio([5.0, 0.0, -3.0]) == pytest.approx(1)
    assert entropy_rank([1.0] * 7) == pytest.approx(7)
    h = torch.tensor([4.0, 2.0, 1.0])
    assert participation_ratio(h) == pytest.approx((h.sum() ** 2 / (h**2).sum()).item())
    assert math.isnan(participation_ratio([]))
    assert math.isnan(entropy_rank([-1.0]))


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (0.9, 2), (0.95, 2), (0.96, 3), (1.0, 4)])
def test_directions_holding(share, count):
    assert directions_holding([0.5, 0.45, 0.03, 0.02], share) == count


def test_directions_holding_of_nothing_and_out_of_range():
    assert directions_holding([0.0, -1.0], 0.95) == 0
    with pytest.raises(ValueError, match="share"):
        directions_holding([1.0], 95)


def test_zeta_bound():
    assert zeta_bound(2.0) == pytest.approx((math.pi**2 / 6) ** 2 / (math.pi**4 / 90))
    assert zeta_bound(1.0) == zeta_bound(0.3) == math.inf
    assert math.isnan(zeta_bound(float("nan")))
    k = torch.arange(1, 21, dtype=torch.float64)
    for s in (-1.0, 0.0, 0.7, 1.5, 400.0):
        assert zeta_bound(s, n=20) == pytest.approx(participation_ratio(k**-s))
    assert zeta_bound(1.5, n=2_000_000) == pytest.approx(zeta_bound(1.5), rel=1e-2)
    assert math.isnan(zeta_bound(2.0, n=0))


def test_spectrum_of_an_exact_power_law():
    k = torch.arange(1, 21, dtype=torch.float64)
    sigma = 3 * k**-1.2
    spectrum = fit_numbers(sigma, 7 * sigma**2, name="w", shape=(64, 64))
    assert spectrum.alpha.exponent == pytest.approx(2.0)
    assert spectrum.gamma.exponent == pytest.approx(1.2)
    assert spectrum.s.exponent == pytest.approx(2.4)
    assert spectrum.transfer_error == pytest.approx(0.0, abs=1e-12)
    assert spectrum.pr_curvature == pytest.approx(spectrum.zeta_bound_window)
    assert spectrum.zeta_bound > spectrum.zeta_bound_window
    assert spectrum.pr_gradient == pytest.approx(spectrum.pr_curvature)
    assert spectrum.rank_models.winner == "power_law"
    assert (spectrum.n_usable, spectrum.n_negative, spectrum.n_repeated, spectrum.note) == (20, 0, 0, "")


def test_points_below_the_noise_floor_and_negative_curvature():
    sigma = torch.tensor([1.0, 0.5, 0.25, 0.25, 0.125, 1e-7])
    h = torch.tensor([1.0, 0.25, 0.0625, -0.1, 0.015625, 1e3])
    spectrum = fit_numbers(sigma, h, name="w", shape=(10, 64))
    assert spectrum.noise_floor == pytest.approx(64 * torch.finfo(torch.float32).eps)
    assert spectrum.alpha.exponent == pytest.approx(2.0)
    assert spectrum.alpha.dropped == {"below the noise floor": 1, "not positive": 1}
    assert (spectrum.n_usable, spectrum.n_negative, spectrum.n_repeated) == (5, 1, 2)
    assert math.isnan(spectrum.h[5])


def test_spectrum_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"must be \(K,\)"):
        fit_numbers(torch.ones(3), torch.ones(4), name="w", shape=(5, 5))


def test_abscissae_that_differ_by_rounding_have_no_slope():
    assert math.isnan(fit_power_law([0.1 + 0.2, 0.3, 0.3], [1.0, 2.0, 3.0]).exponent)
    k = torch.arange(8, dtype=torch.float64)
    equal = fit_numbers(1 + 1e-8 * k.flip(0), 1 + k, name="w", shape=(8, 8))
    assert math.isnan(equal.alpha.exponent)
    assert equal.n_repeated == 8
    assert "equal to rounding" in equal.note


@pytest.mark.parametrize("flags", [[False] * 3, [False, False, False, False, True]])
def test_a_mask_has_a_flag_for_each_point(flags):
    with pytest.raises(ValueError, match=r"exclude must have a flag for each of 4 points, got \d for 'late'"):
        fit_power_law([1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0], exclude={"late": torch.tensor(flags)})
