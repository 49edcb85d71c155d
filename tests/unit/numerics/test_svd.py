"""Leading triplets against a plain SVD of each block."""

from functools import cache

import pytest
import torch
from twins import block_triplets

from lightning_spectral import MeasurementError, top_singular_triplets
from lightning_spectral.numerics import block_lanczos as lanczos
from lightning_spectral.numerics import svd

N, K = 512, 20
RANKS = torch.arange(1, N + 1, dtype=torch.float64)
SPECTRA = {
    "inverse root": RANKS**-0.5,
    "inverse": RANKS**-1,
    "inverse square": RANKS**-2,
    "inverse cube": RANKS**-3,
    "exponential": torch.exp(-RANKS / 5),
    "pairs": ((RANKS + 1) // 2) ** -1,
    "two levels, the first of more than K": torch.where(RANKS <= 30, 2.0, 1.0).double(),
    "two levels, the first of fewer than K": torch.where(RANKS <= 10, 2.0, 1.0).double(),
    "all equal": torch.ones_like(RANKS),
    "rank 1": (RANKS <= 1).double(),
    "rank 10": (RANKS <= 10).double(),
    "rank 60": (RANKS <= 60) / RANKS,
}


@cache
def bases(m, n, seed):
    """Orthonormal columns (m, n) and (n, n); the same for all tests, which do not write on them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (m, n), (n, n)
    return [torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0] for shape in shapes]


def with_spectrum(sigma, m=N, seed=0):
    """A float32 matrix (m, n) with these singular values, to rounding."""
    u, v = bases(m, len(sigma), seed)
    return (u * sigma @ v.T).float()


def gram_values(a):
    """Singular values of a float64 matrix, from the smaller Gram matrix: far faster than an SVD.

    Their squares are right to float64's eps times the largest: a value of 1e-6 of the largest to a relative 1e-4, one
    of 1e-4 to 1e-8.
    """
    gram = a @ a.T if a.shape[0] < a.shape[1] else a.T @ a
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


@pytest.fixture
def full_svds(monkeypatch):
    """The shapes of the full SVDs made so far."""
    calls, full = [], svd._full_svd
    monkeypatch.setattr(svd, "_full_svd", lambda blocks: calls.append(tuple(blocks.shape)) or full(blocks))
    return calls


def check(matrix, triplets, k=K):
    """As promised: orthonormal, sigma and residuals as in float64, and no direction above sigma_k is missing."""
    a = matrix.detach().double()
    u, sigma, v = triplets.u.double(), triplets.sigma.double(), triplets.v.double()
    true = gram_values(a)
    floor = true[0] * max(a.shape) * torch.finfo(torch.float32).eps
    for q in (u, v):
        torch.testing.assert_close(q.T @ q, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)
    above = true[:k] > floor
    torch.testing.assert_close(sigma[above], true[:k][above], rtol=1e-6, atol=0)
    assert (sigma - true[:k]).abs().max() <= 1e-6 * true[0]
    allowed = torch.where(above, 1e-5 * true[:k], 1.2e-6 * true[0]) + 3e-7 * true[0]  # u and v rounded to float32
    assert ((a @ v - u * sigma).norm(dim=0) <= allowed).all()
    assert ((a.T @ u - v * sigma).norm(dim=0) <= allowed).all()
    rest = a - u * sigma @ v.T
    assert gram_values(rest)[0] <= true[min(k, len(true) - 1)] * (1 + 1e-5) + 1e-6 * true[0]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(6, 9), (12, 4), (6, 1)])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_triplets_are_those_of_all_blocks_together(shape, groups, k):
    matrix = torch.randn(shape, dtype=torch.float64)
    triplets = top_singular_triplets(matrix, k, groups=groups)
    expected = block_triplets(matrix, groups, k)
    assert len(triplets) == len(expected)
    for i, (sigma, direction) in enumerate(expected):
        assert triplets.sigma[i].item() == pytest.approx(sigma, rel=1e-12)
        found = torch.outer(triplets.u[:, i], triplets.v[:, i])
        torch.testing.assert_close(found * (found * direction).sum().sign(), direction, rtol=0, atol=1e-10)


def test_all_triplets_rebuild_the_matrix():
    matrix = torch.randn(8, 5, dtype=torch.float64)
    t = top_singular_triplets(matrix, 5)
    torch.testing.assert_close(t.u @ torch.diag(t.sigma) @ t.v.T, matrix)
    assert t.first(2).u.shape == (8, 2)


def test_half_precision_is_raised():
    matrix = torch.randn(8, 5).bfloat16()
    t = top_singular_triplets(matrix, 3)
    assert t.sigma.dtype is torch.float32
    assert torch.equal(t.sigma, top_singular_triplets(matrix.float(), 3).sigma)


def test_a_solver_that_does_not_converge_is_replaced(monkeypatch):
    matrix, svd = torch.randn(8, 5), torch.linalg.svd

    def fails_in_float32(blocks, **options):
        if blocks.dtype is torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(blocks, **options)

    expected = top_singular_triplets(matrix, 3)
    monkeypatch.setattr(torch.linalg, "svd", fails_in_float32)
    found = top_singular_triplets(matrix, 3)
    assert found.sigma.dtype is torch.float32
    torch.testing.assert_close(found.sigma, expected.sigma)


@pytest.mark.parametrize("m", [N, 4 * N])
@pytest.mark.parametrize("name", SPECTRA)
def test_large_matrices_need_no_full_svd(name, m, full_svds):
    matrix = with_spectrum(SPECTRA[name], m)
    found = top_singular_triplets(matrix, K)
    check(matrix, found)
    assert not full_svds


def test_one_strong_direction_above_noise_is_right_by_whatever_way():
    matrix = with_spectrum(torch.where(RANKS == 1, 1e3, 2 - RANKS / N))
    expected = torch.linalg.svdvals(matrix.double())[:K]
    torch.testing.assert_close(top_singular_triplets(matrix, K).sigma.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(1024, 1024), (640, 2000), (2000, 640), (5003, 768)])
@pytest.mark.parametrize("k", [1, 7, K])
def test_flat_spectrum_of_noise(shape, k, full_svds):
    matrix = torch.randn(shape)
    check(matrix, top_singular_triplets(matrix, k), k)
    assert not full_svds


@pytest.mark.parametrize("name", ["inverse", "inverse root"])
def test_subspace_and_single_vectors(name):
    matrix = with_spectrum(SPECTRA[name], 3 * N)
    found = top_singular_triplets(matrix, K)
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    for q, true in ((found.u.double(), u[:, :K]), (found.v.double(), vh[:K].T)):
        assert torch.linalg.matrix_norm(q - true @ (true.T @ q), 2) < 1e-5
        torch.testing.assert_close((q * true).sum(dim=0).abs(), torch.ones(K, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 3e-5, 1e-6, 1e6, 1e25])
@pytest.mark.parametrize("flat", [False, True])
def test_scale_is_of_no_consequence(scale, flat, full_svds):
    matrix = torch.randn(N, 2 * N) if flat else with_spectrum(SPECTRA["inverse"], 2 * N).T
    check(matrix * scale, top_singular_triplets(matrix * scale, K))
    assert not full_svds


@pytest.mark.parametrize("dim", [0, 1])
def test_few_rows_or_columns_that_are_not_zero(dim, full_svds):
    matrix = torch.randn(600, 4000)
    matrix.index_fill_(dim, torch.arange(15, matrix.shape[dim]), 0)
    check(matrix, top_singular_triplets(matrix, K))
    assert not full_svds


def test_zero_matrix():
    triplets = top_singular_triplets(torch.zeros(N, N), 3)
    assert triplets.sigma.tolist() == [0, 0, 0]
    torch.testing.assert_close(triplets.u.T @ triplets.u, torch.eye(3))


def test_large_blocks_are_merged(full_svds):
    blocks = [with_spectrum(s * SPECTRA["inverse"], 600, i) for i, s in enumerate((1, 2.7, 0.01))]
    matrix = torch.cat(blocks)
    found = top_singular_triplets(matrix, K, groups=3)
    assert not full_svds
    expected = torch.cat([torch.linalg.svdvals(block.double()) for block in blocks]).sort(descending=True).values[:K]
    torch.testing.assert_close(found.sigma.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close((found.u * (matrix @ found.v)).sum(dim=0), found.sigma, rtol=1e-5, atol=0)
    assert ((found.u.reshape(3, 600, K) != 0).any(dim=1).sum(dim=0) == 1).all()


def test_half_precision_takes_the_fast_path(full_svds):
    matrix = with_spectrum(SPECTRA["inverse"]).bfloat16()
    check(matrix, top_singular_triplets(matrix, K))
    assert not full_svds


@pytest.mark.parametrize(
    "matrix", [torch.randn(N, N, dtype=torch.float64), torch.randn(N - 1, 2 * N), torch.randn(2 * N, N - 1)]
)
def test_small_and_float64_matrices_take_the_full_svd(matrix, full_svds):
    top_singular_triplets(matrix, K)
    assert len(full_svds) == 1


def test_many_triplets_take_the_full_svd(full_svds):
    assert len(top_singular_triplets(torch.randn(N, N), N // 20 + 1)) == N // 20 + 1
    assert len(full_svds) == 1


@pytest.mark.parametrize("name", ["inverse", "all equal"])
@pytest.mark.parametrize("constant", ["TOLERANCE", "SLACK"])
def test_full_svd_takes_over_where_nothing_converges(name, constant, full_svds, monkeypatch):
    monkeypatch.setattr(lanczos, constant, 1e-30)
    matrix = with_spectrum(SPECTRA[name])
    found = top_singular_triplets(matrix, K)
    assert len(full_svds) == 1
    expected = torch.linalg.svdvals(matrix)[:K]
    torch.testing.assert_close(found.sigma, expected)
    assert found.u.shape == (N, K)


def test_full_svd_takes_over_where_lapack_fails(full_svds, monkeypatch):
    def fails(*args, **options):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    matrix = with_spectrum(SPECTRA["inverse"])
    check(matrix, top_singular_triplets(matrix, 3), 3)
    assert len(full_svds) == 1


@pytest.mark.parametrize("flat", [False, True])
def test_same_bits_every_time_and_no_trace_in_the_random_state(flat):
    matrix = torch.randn(N, N) if flat else with_spectrum(SPECTRA["inverse"])
    before = torch.get_rng_state()
    first = top_singular_triplets(matrix, K)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = top_singular_triplets(matrix, K)
    for name in ("u", "sigma", "v"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_autocast_is_kept_out():
    matrix = torch.randn(N, N)
    with torch.autocast("cpu", torch.bfloat16):
        found = top_singular_triplets(matrix, K)
    assert torch.equal(found.sigma, top_singular_triplets(matrix, K).sigma)


@pytest.mark.parametrize(
    ("matrix", "k", "groups", "error", "message"),
    [
        (torch.ones(3, 3), 0, 1, ValueError, "k must be at least 1, got 0"),
        (torch.ones(3), 1, 1, ValueError, r"got shape \(3,\)"),
        (torch.ones(3, 3), 1, 2, ValueError, "m rows 2 groups divide"),
        (torch.tensor([[1.0, float("nan")]]), 1, 1, MeasurementError, "1 of 2 entries are NaN or infinite"),
        (torch.tensor([[1.0, -float("inf")]]), 1, 1, MeasurementError, "1 of 2 entries are NaN or infinite"),
    ],
)
def test_bad_input(matrix, k, groups, error, message):
    with pytest.raises(error, match=message):
        top_singular_triplets(matrix, k, groups=groups)
