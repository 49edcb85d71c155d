"""Leading triplets against a plain SVD of each block."""

import pytest
import torch
from twins import block_triplets

from lightning_spectral import MeasurementError, top_singular_triplets


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


@pytest.mark.parametrize(
    ("matrix", "k", "groups", "error", "message"),
    [
        (torch.ones(3, 3), 0, 1, ValueError, "k must be at least 1, got 0"),
        (torch.ones(3), 1, 1, ValueError, r"got shape \(3,\)"),
        (torch.ones(3, 3), 1, 2, ValueError, "m rows 2 groups divide"),
        (torch.tensor([[1.0, float("nan")]]), 1, 1, MeasurementError, "1 of 2 entries are NaN or infinite"),
    ],
)
def test_bad_input(matrix, k, groups, error, message):
    with pytest.raises(error, match=message):
        top_singular_triplets(matrix, k, groups=groups)
