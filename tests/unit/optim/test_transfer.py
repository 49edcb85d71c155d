"""The matrix function against a float64 SVD, over shapes, spectra, exponents and dampings."""

import math

import pytest
import torch

from lightning_spectral import spectral_transfer
from lightning_spectral.optim import transfer as module
from lightning_spectral.optim.rational_fit import MAX_POLES, fit_poles
from lightning_spectral.optim.transfer import transfer, transfer_batch

# One worker fits each sum of inverses once, for all tests.
pytestmark = pytest.mark.xdist_group("transfer")

SPECTRA = {
    "flat": lambda k: torch.ones_like(k),
    "power_law": lambda k: k**-1.0,
    "steep": lambda k: k**-2.0,
    "exponential": lambda k: torch.exp(-k / 8),
    "rank_one": lambda k: (k == 1).double(),
    "rank_deficient": lambda k: (k <= (len(k) + 1) // 2).double(),
    "one_over_a_floor": lambda k: torch.where(k == 1, 1.0, 1e-4).double(),
}
SHAPES = [(1, 7), (2, 3), (64, 64), (192, 40), (96, 300)]
OPTIONS = [(alpha, d) for alpha in (0.5, 1.0, 1.5, 1.9, 2.0, 2.5, 3.0) for d in (0.01, 0.1, 1.0)]


def matrix(shape, spectrum, dtype=torch.float64):
    """With these singular values and random singular vectors."""
    m, n = shape
    r = min(m, n)
    u = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64))[0]
    return ((u * SPECTRA[spectrum](torch.arange(1, r + 1, dtype=torch.float64))) @ v.T).to(dtype)


def by_svd(x, alpha, d, *, normalize=True):
    u, sigma, vh = torch.linalg.svd(x.double(), full_matrices=False)
    if normalize:
        sigma = sigma * sigma.shape[-1] ** 0.5 / torch.linalg.vector_norm(sigma, dim=-1, keepdim=True)
    return (u * (sigma / (sigma**alpha + d)).unsqueeze(-2)) @ vh


def no_factorisation(a):
    return torch.zeros_like(a), torch.ones(len(a), dtype=torch.int32)


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_update_is_that_of_an_svd(shape, spectrum):
    x = matrix(shape, spectrum, torch.float32)
    for alpha, d in OPTIONS:
        found = spectral_transfer(x, alpha=alpha, damping=d)
        assert found.dtype is torch.float32
        assert error(found, by_svd(x, alpha, d)) <= (1e-6 if alpha == 2 else 1e-2), (alpha, d)


@pytest.mark.parametrize("shape", [(4, 65536), (8, 4096), (8, 16384), (16, 5000)])
def test_long_rows_of_nearly_one_direction(shape):
    noise = torch.randn(shape)
    for share in (1e-3, 3e-3, 1e-2):
        for x in (1 + share * noise, torch.randn(1, shape[1]) + share * noise):
            for alpha in (0.5, 1.0, 2.0):
                found = spectral_transfer(x, alpha=alpha, damping=0.01, tolerance=1e-2)
                assert error(found, by_svd(x, alpha, 0.01)) <= 1e-2, (share, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e30, 1e-35, 1e200, 1e-200, 1e305, 1e-300])
def test_scale_of_the_gradient_does_not_matter(alpha, scale):
    x = matrix((20, 30), "power_law", torch.float32 if 1e-38 < scale < 1e38 else torch.float64)
    found = spectral_transfer(scale * x, alpha=alpha, damping=0.1)
    assert error(found, spectral_transfer(x, alpha=alpha, damping=0.1).double()) < 1e-4


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0, 3.0])
def test_zero_stays_zero(alpha):
    x = torch.zeros(3, 6, 4)
    x[1] = torch.randn(6, 4)
    found = spectral_transfer(x, alpha=alpha, damping=0.1)
    assert not found[0].any()
    assert not found[2].any()
    torch.testing.assert_close(found[1], spectral_transfer(x[1], alpha=alpha, damping=0.1))
    assert spectral_transfer(torch.zeros(0, 4), alpha=alpha, damping=0.1).shape == (0, 4)


@pytest.mark.parametrize(("alpha", "d"), [(2.0, 0.03), (1.0, 0.1), (2.5, 0.1), (0.0, 1.0)])
def test_batched_over_leading_dimensions(alpha, d):
    x = torch.randn(2, 3, 9, 5)
    found = spectral_transfer(x, alpha=alpha, damping=d)
    assert found.shape == x.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], spectral_transfer(x[i, j], alpha=alpha, damping=d))


@pytest.mark.parametrize("shape", [(2, 128, 150), (1, 131, 131), (3, 261, 300), (2, 127, 200)])
@pytest.mark.parametrize("to_invert", [True, False])
def test_the_upper_half_of_a_gram_matrix_in_strips_is_the_products(shape, to_invert):
    x, r = torch.randn(shape, dtype=torch.float64), shape[1]
    found, expected = module._gram(x, to_invert=to_invert), x @ x.mT
    torch.testing.assert_close(found[:, :r, :r].triu(), expected.triu())
    torch.testing.assert_close(module._norm(found), torch.linalg.matrix_norm(expected))
    assert not found[:, :, r:].any()


@pytest.mark.parametrize("shape", [(3, 256, 256), (2, 129, 140)])
@pytest.mark.parametrize("factorised", [True, False])
def test_nearly_square_matrices_take_no_inverse(shape, factorised, monkeypatch):
    monkeypatch.setattr(torch, "cholesky_inverse", None)
    if not factorised:
        monkeypatch.setattr(torch.linalg, "cholesky_ex", no_factorisation)
    x = torch.randn(shape, dtype=torch.float64)
    x[0] = 0
    found = transfer_batch(x, alpha=2.0, damping=0.03, tolerance=1e-2)
    assert not found[0].any()
    torch.testing.assert_close(found[1:], by_svd(x[1:], 2.0, 0.03))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_damping_for_each_matrix_of_a_batch(dtype, alpha, monkeypatch):
    names = ("flat", "power_law", "steep", "rank_one", "rank_one")
    x = torch.stack([matrix((96, 120), name, dtype) for name in names])
    d_b = torch.tensor([0.01, 0.07, 1.0, 0.01, 0.3])
    expected = [by_svd(one, alpha, float(d)) for one, d in zip(x, d_b, strict=True)]
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(torch.linalg, "cholesky_ex", no_factorisation)
        found = transfer_batch(x, alpha=alpha, damping=d_b, tolerance=1e-2)
        assert found.dtype is dtype
        allowed = 1e-7 if dtype is torch.float64 and alpha in (0.0, 2.0, 3.0) else 1e-2
        assert [b for b in range(len(x)) if error(found[b], expected[b]) > allowed] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = matrix((40, 60), "power_law", dtype)
    for alpha, d in OPTIONS:
        found = spectral_transfer(x, alpha=alpha, damping=d)
        assert found.dtype is dtype
        assert error(found, by_svd(x, alpha, d)) < 1e-2


def test_float64_keeps_its_precision():
    x = matrix((40, 60), "steep")
    assert error(spectral_transfer(x, alpha=2.0, damping=1e-6), by_svd(x, 2.0, 1e-6)) < 1e-6
    assert error(spectral_transfer(x, alpha=1.0, damping=0.01, exact=True), by_svd(x, 1.0, 0.01)) < 1e-10


def test_alpha_one_without_damping_is_the_polar_factor():
    x = matrix((30, 50), "power_law")
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    for d, expected in ((1e-3, 3e-2), (1e-6, 1e-4), (1e-9, 1e-7)):
        assert error(spectral_transfer(x, alpha=1.0, damping=d), u @ vh) < expected


def test_alpha_zero_is_the_scaled_gradient():
    x = torch.randn(7, 12, dtype=torch.float64)
    found = spectral_transfer(x, alpha=0.0, damping=0.5)
    torch.testing.assert_close(found, x * 7**0.5 / x.norm() / 1.5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_update_follows_a_change_of_basis(alpha):
    x = matrix((12, 20), "power_law")
    p, q = (torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0] for k in (12, 20))
    turned = spectral_transfer(p @ x @ q.T, alpha=alpha, damping=0.1)
    torch.testing.assert_close(turned, p @ spectral_transfer(x, alpha=alpha, damping=0.1) @ q.T)
    torch.testing.assert_close(
        spectral_transfer(x.T, alpha=alpha, damping=0.1), spectral_transfer(x, alpha=alpha, damping=0.1).T
    )


@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0])
def test_without_normalisation_it_is_the_papers_formula(alpha):
    x = 3 * torch.randn(5, 8, dtype=torch.float64)
    found = spectral_transfer(x, alpha=alpha, damping=0.1, normalize="none")
    torch.testing.assert_close(found, by_svd(x, alpha, 0.1, normalize=False))
    torch.testing.assert_close(transfer(torch.tensor(2.0), alpha=2.0, damping=1.0), torch.tensor(0.4))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
def test_estimate_of_rounding_lies_above_it(alpha, spectrum):
    x = module.scaled_by_power_of_two(matrix((128, 160), spectrum, torch.float32)[None])
    for d in (0.01, 0.1):
        poles = fit_poles(alpha, d, 128.0, 7e-3)
        reference, _ = module._sum_of_inverses(x.double(), poles, math.inf)
        found, failed = module._sum_of_inverses(x, poles, math.inf)
        if not failed:
            _, too_much = module._sum_of_inverses(x, poles, error(found, reference))
            assert too_much


def test_what_float32_cannot_do_is_done_in_float64():
    x = torch.stack([matrix((256, 256), name, torch.float32) for name in ("flat", "rank_one", "power_law")])
    poles = fit_poles(0.5, 0.01, 256.0, 7e-3)
    _, failed = module._sum_of_inverses(module.scaled_by_power_of_two(x), poles, math.inf)
    assert failed.tolist() == [False, True, False]
    found = transfer_batch(x, alpha=0.5, damping=0.01, tolerance=1e-2)
    assert found.dtype is torch.float32
    for i in range(3):
        assert error(found[i], by_svd(x[i], 0.5, 0.01)) < 1e-2


def test_what_has_no_factorisation_goes_by_eigenvalues(monkeypatch):
    x = matrix((10, 20), "power_law", torch.float32)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", no_factorisation)
    for alpha in (1.0, 2.0):
        assert error(spectral_transfer(x, alpha=alpha, damping=0.1), by_svd(x, alpha, 0.1)) < 1e-6


@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_a_solver_that_fails_is_tried_on_the_cpu(alpha, monkeypatch):
    x, tries, real = matrix((10, 20), "rank_deficient"), [], torch.linalg.eigh

    def eigh(gram):
        tries.append(gram)
        if len(tries) == 1:
            raise torch.linalg.LinAlgError("repeated eigenvalues")
        return real(gram)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", no_factorisation)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    torch.testing.assert_close(spectral_transfer(x, alpha=alpha, damping=0.1), by_svd(x, alpha, 0.1))
    assert len(tries) == 2


def reduced_products():
    """Whether CUDA may use TF32 in float32 products, in the words of the installed torch."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def test_autocast_and_reduced_precision_do_not_reach_it(monkeypatch):
    x = matrix((64, 80), "power_law", torch.float32)
    expected = spectral_transfer(x, alpha=2.0, damping=0.03, tolerance=1e-2)
    seen = []
    real = module.transfer_batch

    def watched(*args, **options):
        seen.append((torch.is_autocast_enabled("cpu"), reduced_products()))
        return real(*args, **options)

    monkeypatch.setattr(module, "transfer_batch", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = spectral_transfer(x, alpha=2.0, damping=0.03, tolerance=1e-2)
        assert reduced_products()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected)
    assert seen == [(False, False)]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(8, 12), (128, 128)])
def test_a_weight_is_taken_as_a_number(shape, alpha):
    weight = torch.nn.Parameter(torch.randn(shape))
    found = spectral_transfer(weight, alpha=alpha, damping=0.1)
    assert not found.requires_grad
    assert torch.equal(found, spectral_transfer(weight.detach(), alpha=alpha, damping=0.1))


def test_no_random_number_of_the_user_is_drawn():
    before = torch.get_rng_state()
    spectral_transfer(torch.ones(4, 4321), alpha=1.0, damping=0.1)  # a width that no other call has cached
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("tolerance", [1e-2, 3e-2])
@pytest.mark.parametrize("largest", [16.0, 1024.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 1.9])
def test_sums_of_inverses_are_positive_and_as_good_as_asked(alpha, largest, tolerance):
    x = torch.cat([torch.zeros(1), torch.logspace(-14, math.log10(largest), 5000)]).double()
    for d in (0.03, 0.1, 1.0):
        poles = fit_poles(alpha, d, largest, tolerance)
        assert len(poles.shifts) <= MAX_POLES
        assert min(poles.constant, *poles.weights, *poles.shifts) > 0
        exact = x.sqrt() / (x ** (alpha / 2) + d)
        allowed = exact.clamp_min(0.5 / (largest ** (alpha / 2) + d))
        wrong = ((x.sqrt() * poles(x) - exact).abs() / allowed).max()
        assert wrong <= 1.02 * tolerance
        assert poles.error <= tolerance
        assert poles.at_zero == pytest.approx(float(poles(x)[0]))


@pytest.mark.parametrize(("alpha", "d"), [(0.005, 10.0), (1.0, 1e300), (1.0, 1e-300), (0.5, 1e-90)])
def test_dampings_beyond_any_sum_go_by_eigenvalues(alpha, d):
    assert fit_poles(alpha, d, 16.0, 7e-3) is None
    x = matrix((8, 12), "power_law")
    torch.testing.assert_close(spectral_transfer(x, alpha=alpha, damping=d), by_svd(x, alpha, d))


def test_more_poles_than_pay_are_not_used():
    assert fit_poles(1.0, 1e-3, 1024.0, 1e-6) is None
    x = matrix((8, 8), "power_law")
    assert error(spectral_transfer(x, alpha=1.0, damping=1e-3, tolerance=1e-6), by_svd(x, 1.0, 1e-3)) < 1e-6


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(3), {}, r"need real matrices \(\.\.\., m, n\), got torch.float32 of shape \(3,\)"),
        (torch.ones(3, 3, dtype=torch.complex64), {}, "got torch.complex64"),
        (torch.tensor([[1.0, math.nan]]), {}, "1 of 2 entries are NaN or infinite"),
        (torch.ones(2, 2), {"alpha": -1.0}, "alpha must be a finite number of at least 0, got -1.0"),
        (torch.ones(2, 2), {"alpha": math.inf}, "alpha must be a finite number"),
        (torch.ones(2, 2), {"damping": 0.0}, r"damping must be a finite number above 0, got 0.0; alpha=1 with 1e-6"),
        (torch.ones(2, 2), {"normalize": "spectral"}, "normalize must be 'rms' or 'none', got 'spectral'"),
        (torch.ones(2, 2), {"tolerance": 0.5}, r"tolerance must lie in \[1e-7, 0.1\], got 0.5"),
    ],
)
def test_bad_input(x, options, message):
    with pytest.raises(ValueError, match=message):
        spectral_transfer(x, **{"alpha": 2.0, "damping": 0.1, **options})


@pytest.mark.parametrize(("alpha", "d", "tolerance"), [(0.6, 0.03, 7e-3), (1.9, 0.03, 7e-3), (1.9, 1.0, 7e-4)])
def test_giving_up_early_takes_no_more_inverses(alpha, d, tolerance, monkeypatch):
    found = fit_poles.__wrapped__(alpha, d, 64.0, tolerance)
    monkeypatch.setattr("lightning_spectral.optim.rational_fit.HOPELESS", {})
    assert len(found.shifts) == len(fit_poles.__wrapped__(alpha, d, 64.0, tolerance).shifts)
