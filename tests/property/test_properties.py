"""What must hold for every input: symmetries of a measurement and of the fits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fits import fit_numbers
from torch import nn

from lightning_spectral import (
    fit_power_law,
    fit_rank_decay,
    fit_rank_models,
    measure_spectra,
    participation_ratio,
    top_singular_triplets,
    zeta_bound,
)
from lightning_spectral.numerics.statistics import directions_holding, entropy_rank

pytest.importorskip("hypothesis")

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

SEEDS = st.integers(0, 2**32 - 1)
PIECEWISE, SMOOTH = ("exact", "ggn", "sketch"), ("exact", "sketch")

few_networks = settings(max_examples=8)


def decades(largest):
    return st.floats(-largest, largest).map(lambda x: 10.0**x)


def network(seed, activation=nn.ReLU, *, conv=False):
    """Five layers in float64, the middle three linear in each other, and a batch for them."""
    torch.manual_seed(seed)
    if conv:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 1), activation(), nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(3, 4, 2, bias=False),
            nn.Conv2d(4, 4, 1), activation(), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip
        x = torch.randn(32, 2, 3, 3)
    else:
        model = nn.Sequential(
            nn.Linear(5, 7), activation(), nn.Linear(7, 6, bias=False), nn.Linear(6, 5, bias=False),
            nn.Linear(5, 6), activation(), nn.Linear(6, 4),
        )  # fmt: skip
        x = torch.randn(32, 5)
    return model.double(), (x.double(), torch.randint(0, 4, (32,)))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def measured(model, batch, method, scale=1.0):
    loss = lambda m, b: scale * cross_entropy(m, b)  # noqa: E731
    return measure_spectra(model, batch, loss, curvature=method, top_k=4).layers.values()


def assert_close(found, expected, rel, *, sigma=1.0, h=1.0):
    """Equal up to factors of sigma and h, and a relative error in units of the layer's largest."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.sigma, sigma * b.sigma, rtol=rel, atol=rel * float(sigma * b.sigma[0]))
        atol = rel * h * float(b.h.abs().nan_to_num().max())
        torch.testing.assert_close(a.h, h * b.h, rtol=rel, atol=atol, equal_nan=True)


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


@pytest.mark.parametrize(
    ("method", "activation"), [*((m, nn.ReLU) for m in PIECEWISE), *((m, nn.GELU) for m in SMOOTH)]
)
@few_networks
@given(seed=SEEDS, scale=decades(12))
def test_a_loss_scaled_by_c_has_sigma_and_h_scaled_by_c_and_the_same_alpha(method, activation, seed, scale):
    model, batch = network(seed, activation)
    expected, found = list(measured(model, batch, method)), list(measured(model, batch, method, scale))
    assert_close(found, expected, 1e-8, sigma=scale, h=scale)
    for a, b in zip(found, expected, strict=True):
        assert a.alpha.n_used == b.alpha.n_used
        assert a.alpha.exponent == pytest.approx(b.alpha.exponent, rel=1e-6, abs=1e-6, nan_ok=True)
        assert a.gamma.exponent == pytest.approx(b.gamma.exponent, rel=1e-6, abs=1e-6, nan_ok=True)
        torch.testing.assert_close(a.h_stderr, scale * b.h_stderr, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("method", "activation"), [("exact", nn.GELU), ("exact", nn.ReLU), ("ggn", nn.ReLU)])
@few_networks
@given(seed=SEEDS, order=st.permutations(range(32)))
def test_the_order_of_samples_is_of_no_account(method, activation, seed, order):
    model, (x, y) = network(seed, activation)
    expected = measured(model, (x, y), method)
    assert_close(measured(model, (x[order], y[order]), method), expected, 1e-8)


def test_the_order_of_samples_changes_a_sketch_within_its_errors():
    scores = []
    for seed in range(30):
        model, (x, y) = network(seed, nn.GELU)
        x, y = torch.cat([x, x.flip(1)]), torch.cat([y, y.flip(0)])
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        first, second = measured(model, (x, y), "sketch"), measured(model, (x[order], y[order]), "sketch")
        for a, b in zip(first, second, strict=True):
            error = torch.hypot(a.h_stderr, b.h_stderr)
            drawn = error > 0
            scores.append(((a.h - b.h) / error)[a.h.isfinite() & drawn])
            torch.testing.assert_close(a.h[~drawn], b.h[~drawn], rtol=1e-6, atol=1e-9, equal_nan=True)
    within = (torch.cat(scores).abs() < 1.96).double().mean()
    assert 0.85 <= within <= 0.99


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize(
    ("method", "activation"), [*((m, nn.ReLU) for m in PIECEWISE), *((m, nn.GELU) for m in SMOOTH)]
)
@few_networks
@given(seed=SEEDS)
def test_an_orthogonal_change_of_basis_changes_no_spectrum(method, activation, conv, seed):
    model, batch = network(seed, activation, conv=conv)
    expected = measured(model, batch, method)
    first, middle, last = model[2].weight, model[3].weight, model[4].weight
    q, p = orthogonal(middle.shape[0]), orthogonal(middle.shape[1])
    with torch.no_grad():
        # y = (last Q^T) (Q W P) (P^T first) x
        first.copy_(torch.einsum("ji,j...->i...", p, first))
        middle.copy_(torch.einsum("ij,jk...,kl->il...", q, middle, p))
        last.copy_(torch.einsum("ij...,kj->ik...", last, q))
    found = list(measured(model, batch, method))
    # Two singular values that are close have vectors, and so curvatures, that rounding can turn.
    close = min(float(((a.sigma[:-1] - a.sigma[1:]) / a.sigma[0]).min()) for a in found)
    assume(close > 1e-4)
    assert_close(found, expected, 1e-6)


@given(seed=SEEDS, shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), k=st.integers(1, 12), scale=decades(30))
def test_singular_triplets_are_orthonormal_and_turn_with_the_matrix(seed, shape, k, scale):
    torch.manual_seed(seed)
    matrix = scale * torch.randn(shape, dtype=torch.float64)
    found = top_singular_triplets(matrix, k)
    r = min(k, *shape)
    eye = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(found.u.T @ found.u, eye)
    torch.testing.assert_close(found.v.T @ found.v, eye)
    torch.testing.assert_close(torch.diag(found.sigma), found.u.T @ matrix @ found.v, rtol=1e-9, atol=1e-12 * scale)
    turned = top_singular_triplets(orthogonal(shape[0]) @ matrix @ orthogonal(shape[1]), k)
    torch.testing.assert_close(turned.sigma, found.sigma, rtol=1e-9, atol=1e-12 * scale)


@st.composite
def points(draw, least=3):
    """Positive abscissae over up to 40 decades, two of them at least apart, in any order."""
    logs = draw(st.lists(st.floats(-45, 45), min_size=least, max_size=25, unique=True))
    assume(max(logs) - min(logs) > 0.1)
    return torch.tensor(logs, dtype=torch.float64).exp()


@st.composite
def clouds(draw):
    x = draw(points())
    logs = draw(st.lists(st.floats(-45, 45), min_size=len(x), max_size=len(x)))
    return x, torch.tensor(logs, dtype=torch.float64).exp()


@given(x=points(), exponent=st.floats(-6, 6), scale=decades(30))
def test_the_exponent_of_an_exact_law_is_recovered(x, exponent, scale):
    fit = fit_power_law(x, scale * x**exponent)
    assert fit.exponent == pytest.approx(exponent, abs=1e-9)
    assert fit.intercept == pytest.approx(math.log(scale), abs=1e-8)
    assert fit.stderr == pytest.approx(0.0, abs=1e-9)


@given(cloud=clouds(), a=decades(30), b=decades(30))
@example(cloud=(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, 1 + 2e-16], dtype=torch.float64)), a=1.0, b=10.0)
def test_a_power_law_is_equivariant_under_scaling(cloud, a, b):
    x, y = cloud
    fit, scaled = fit_power_law(x, y), fit_power_law(a * x, b * y)
    # The slope of noise over a tenth of a decade is in the hundreds, and so is what rounding does to it.
    tolerance = {"rel": 1e-8, "abs": 1e-8 * (1 + fit.stderr)}
    assert scaled.exponent == pytest.approx(fit.exponent, **tolerance)
    assert scaled.stderr == pytest.approx(fit.stderr, **tolerance)
    shifted = fit.intercept + math.log(b) - fit.exponent * math.log(a)
    assert scaled.intercept == pytest.approx(shifted, rel=1e-8, abs=1e-6 * (1 + fit.stderr))
    assert scaled.r2 == pytest.approx(fit.r2, rel=1e-6, abs=1e-6, nan_ok=True)
    assert (scaled.n_used, scaled.n_dropped) == (len(x), 0)


@given(cloud=clouds())
def test_an_inverted_power_law_has_the_same_r2_and_the_product_of_both_slopes(cloud):
    x, y = cloud
    assume(float(y.log().max() - y.log().min()) > 0.1)
    forward, backward = fit_power_law(x, y), fit_power_law(y, x)
    assert backward.r2 == pytest.approx(forward.r2, abs=1e-9)
    assert forward.exponent * backward.exponent == pytest.approx(forward.r2, abs=1e-9)


@given(values=points(), scale=decades(30), order=st.randoms(use_true_random=False))
def test_rank_fits_do_not_see_order_and_scale(values, scale, order):
    shuffled = (scale * values).tolist()
    order.shuffle(shuffled)
    assert fit_rank_decay(shuffled).exponent == pytest.approx(fit_rank_decay(values).exponent, rel=1e-8, abs=1e-8)
    a, b = fit_rank_models(shuffled), fit_rank_models(values)
    for name in a.fits:
        assert a.fits[name].coefficients[1:] == pytest.approx(
            b.fits[name].coefficients[1:], rel=1e-6, abs=1e-6, nan_ok=True
        )


VALUES = st.lists(st.floats(1e-100, 1e100), min_size=1, max_size=30)


@given(values=VALUES, others=st.lists(st.floats(-1e100, 0.0), max_size=5), scale=decades(150))
@example(values=[1.0] * 30, others=[], scale=1e150)
@example(values=[1e308] * 5, others=[], scale=1.0)
@example(values=[1e-308] * 5, others=[], scale=1.0)
def test_participation_ratio_is_a_number_of_directions(values, others, scale):
    ratio, n = participation_ratio(values), len(values)
    assert ratio * (1 + 1e-12) >= 1
    assert ratio <= n * (1 + 1e-12)
    assert participation_ratio([scale * v for v in values]) == pytest.approx(ratio, rel=1e-9)
    assert participation_ratio(sorted(values)) == pytest.approx(ratio, rel=1e-12)
    assert participation_ratio([*others, *values]) == pytest.approx(ratio, rel=1e-12)
    # The exponential of Renyi's entropy falls with its order.
    assert ratio <= entropy_rank(values) * (1 + 1e-9)
    assert entropy_rank(values) <= n * (1 + 1e-9)


@given(values=VALUES, shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_a_larger_share_takes_more_directions(values, shares):
    few, many = (directions_holding(values, share) for share in sorted(shares))
    assert 1 <= few <= many <= len(values)


@given(s=st.floats(-3, 30), more=st.floats(0, 30), n=st.integers(1, 200))
@example(s=1.0000001, more=1e-9, n=200)
def test_zeta_bounds_fall_with_the_exponent(s, more, n):
    rounding = 1 + 1e-9
    assert zeta_bound(s + more) <= zeta_bound(s) * rounding
    assert zeta_bound(s + more, n) <= zeta_bound(s, n) * rounding if s >= 0 else True
    assert zeta_bound(s, n) * rounding >= 1
    assert zeta_bound(s, n) <= min(n, zeta_bound(s)) * rounding
    if s >= 0:
        assert zeta_bound(s, n) <= zeta_bound(s, n + 1) * rounding


@given(cloud=clouds(), a=st.integers(-60, 60), b=st.integers(-60, 60))
def test_a_spectrum_in_other_units_has_the_same_exponents(cloud, a, b):
    sigma, h = cloud
    sigma = sigma.sort(descending=True).values
    # Powers of two, so that no point crosses the noise floor by rounding.
    plain, scaled = (fit_numbers(2.0**i * sigma, 2.0**j * h, name="w", shape=(9, 9)) for i, j in ((0, 0), (a, b)))
    counts = ("n_usable", "n_negative", "n_repeated", "directions_95_curvature", "directions_99_gradient", "note")
    assert [getattr(plain, name) for name in counts] == [getattr(scaled, name) for name in counts]
    assert plain.alpha.dropped == scaled.alpha.dropped
    for name in ("alpha", "gamma", "s"):
        x, y = getattr(plain, name), getattr(scaled, name)
        assert y.exponent == pytest.approx(x.exponent, rel=1e-6, abs=1e-6, nan_ok=True)
    for name in ("pr_curvature", "pr_gradient", "entropy_rank_curvature"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name), rel=1e-9)
