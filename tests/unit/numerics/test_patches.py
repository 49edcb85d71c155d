"""The unfolded inputs of convolutions and their second moments, against loops; eigenvalues of rows in parts."""

from __future__ import annotations

import pytest
import torch
from factors_twin import TRANSPOSED, naive_patches
from torch import nn

from lightning_spectral.numerics import conv_patches as patches_module
from lightning_spectral.numerics import second_moment as moments
from lightning_spectral.numerics.conv_patches import Patches
from lightning_spectral.numerics.second_moment import SecondMoment, gram

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, 1),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 4, 3, padding=1, groups=4),
    nn.Conv2d(4, 6, (3, 5), padding=(2, 2), dilation=(2, 1)),
    nn.Conv2d(4, 6, (1, 5), padding=(0, 3)),
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, 2, stride=(3, 1), dilation=2),
    nn.Conv1d(4, 6, 4, padding=5),
    nn.Conv3d(4, 6, 2, padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=(1, 2), dilation=(2, 1), padding=(5, 3), groups=2),
    nn.ConvTranspose1d(4, 6, 3, padding=2),
    nn.ConvTranspose3d(4, 2, 2),
]


def patches_of(module, x):
    options = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
    transposed = isinstance(module, TRANSPOSED)
    if transposed:
        options["output_padding"] = module.output_padding
    return Patches.of(x, module.kernel_size, options, groups=module.groups, transposed=transposed)


def input_of(module, samples=3):
    return torch.randn(samples, 4, *(7, 8, 5)[: len(module.kernel_size)], dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 2**21])
@pytest.mark.parametrize("module", CONVOLUTIONS, ids=repr)
def test_patches_and_their_correlation_are_those_of_loops(monkeypatch, module, chunk):
    monkeypatch.setattr(patches_module, "UNFOLDED_ENTRIES", chunk)
    module, x = module.double(), input_of(module)
    expected = naive_patches(module, x)
    found = patches_of(module, x)
    rows = torch.cat(list(found.unfolded()), 1)
    assert torch.equal(rows, expected)
    assert (found.rows, found.length) == expected.shape[1:]
    if set(found.stride) == {1}:
        torch.testing.assert_close(found.correlation(), expected.mT @ expected, rtol=1e-11, atol=1e-11)
    else:
        assert not found.correlates()


@pytest.mark.parametrize("padding", ["same", "valid", 1, (1,), [1, 1]])
@pytest.mark.parametrize("kernel", [2, 3])
def test_paddings_as_functional_calls_give_them(padding, kernel):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    weight = torch.randn(5, 3, kernel, kernel, dtype=torch.float64)
    found = Patches.of(x, (kernel, kernel), {"padding": padding}, groups=1, transposed=False)
    rows = torch.cat(list(found.unfolded()), 1)[0]
    z = torch.nn.functional.conv2d(x, weight, padding=padding)
    torch.testing.assert_close(rows @ weight.flatten(1).T, z.flatten(2).mT.flatten(0, 1))


def test_correlation_is_chosen_where_it_takes_fewer_products():
    x = torch.zeros(2, 3, 16, 16)
    assert Patches.of(x, (3, 3), {"padding": 1}, groups=1, transposed=False).correlates()
    assert not Patches.of(x, (1, 1), {}, groups=1, transposed=False).correlates()
    assert not Patches.of(x, (3, 3), {"padding": 1, "stride": 2}, groups=1, transposed=False).correlates()
    assert not Patches.of(x[..., :3, :3], (3, 3), {}, groups=1, transposed=False).correlates()


def eigenvalues(rows):
    return torch.linalg.eigvalsh(rows.mT @ rows / rows.shape[1]).flip(1)


@pytest.mark.parametrize("parts", [[40], [5, 5, 30], [1] * 40, [3, 37]])
@pytest.mark.parametrize("groups", [1, 3])
def test_eigenvalues_of_rows_in_parts(parts, groups):
    rows = torch.randn(groups, 40, 8, dtype=torch.float64)
    moment = SecondMoment(k=2)
    for part in rows.split(parts, 1):
        moment.add(part)
    assert moment.count == 40
    found, complete = moment.eigenvalues()
    assert complete
    torch.testing.assert_close(found, eigenvalues(rows))


def test_few_rows_are_kept_and_give_all_eigenvalues_that_are_not_zero():
    rows = torch.randn(1, 5, 8, dtype=torch.float64)
    moment = SecondMoment(k=2)
    for part in rows.split(2, 1):
        moment.add(part)
    assert moment._gram is None
    torch.testing.assert_close(moment.eigenvalues()[0], eigenvalues(rows)[:, :5])


def test_rows_and_sums_of_their_products_go_together():
    rows = torch.randn(1, 12, 8, dtype=torch.float64)
    for order in ((0, 1), (1, 0)):
        moment = SecondMoment(k=2)
        for i in order:
            part = rows.split(6, 1)[i]
            moment.add(part) if i else moment.add_gram(gram(part), 6)
        torch.testing.assert_close(moment.eigenvalues()[0], eigenvalues(rows))


def test_of_large_dimensions_only_the_leading_eigenvalues(monkeypatch):
    monkeypatch.setattr(moments, "MAX_DENSE", 8)
    monkeypatch.setattr(moments, "FEW_ROWS", 10)
    decay = torch.arange(1, 13, dtype=torch.float64) ** -1.5
    rows = torch.randn(2, 60, 12, dtype=torch.float64) * decay
    whole = SecondMoment(k=3)
    whole.add(rows)
    assert not whole.eigenvalues()[1]
    torch.testing.assert_close(whole.eigenvalues()[0], eigenvalues(rows)[:, :3])
    parts = SecondMoment(k=3)
    for part in rows.split(20, 1):
        parts.add(part)
    found, complete = parts.eigenvalues()
    assert not complete
    assert (found <= eigenvalues(rows)[:, : found.shape[1]] * (1 + 1e-12)).all()
    torch.testing.assert_close(found[:, :3], eigenvalues(rows)[:, :3], rtol=0.02, atol=0)
    few = SecondMoment(k=3)
    few.add(rows[:, :7])
    assert few.eigenvalues()[1]
    torch.testing.assert_close(few.eigenvalues()[0], eigenvalues(rows[:, :7])[:, :7])


@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_of_parts_is_enough_for_the_leading_eigenvalues(monkeypatch, seed):
    monkeypatch.setattr(moments, "MAX_DENSE", 8)
    monkeypatch.setattr(moments, "FEW_ROWS", 10)
    torch.manual_seed(seed)
    decay = torch.arange(1, 31, dtype=torch.float64) ** -1.0
    rows = torch.randn(2, 400, 30, dtype=torch.float64) * decay
    moment = SecondMoment(k=4)
    for part in rows.split(40, 1):
        moment.add(part)
    found, dense = moment.eigenvalues()[0][:, :4], eigenvalues(rows)[:, :4]
    error = (found / dense - 1).abs()
    # Of k directions alone the mean error is 3e-3 to 6e-3.
    assert error.max() < 4e-3
    assert error.mean() < 1e-3


def test_large_float32_factors_take_lanczos(monkeypatch):
    called = []
    real = moments.top_singular_triplets
    monkeypatch.setattr(moments, "MAX_DENSE", 600)
    monkeypatch.setattr(moments, "top_singular_triplets", lambda *args: called.append(args[1]) or real(*args))
    rows = torch.randn(1, 1200, 700) * torch.arange(1, 701) ** -1.0
    moment = SecondMoment(k=5)
    moment.add(rows)
    torch.testing.assert_close(moment.eigenvalues()[0], eigenvalues(rows.double())[:, :5], rtol=1e-5, atol=0)
    assert called == [5]


def test_products_are_summed_in_float64():
    rows = torch.randn(1, 5000, 4)
    assert gram(rows).dtype is torch.float64
    torch.testing.assert_close(gram(rows), rows.double().mT @ rows.double(), rtol=1e-12, atol=1e-9)
    wide = torch.randn(1, 5000, 200)
    torch.testing.assert_close(gram(wide), wide.double().mT @ wide.double(), rtol=1e-4, atol=1e-2)


def test_a_solver_that_fails_is_asked_again_on_the_cpu(monkeypatch):
    real, calls = torch.linalg.eigvalsh, []

    def fails_once(matrix):
        calls.append(1)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails_once)
    moment = SecondMoment(k=1)
    moment.add(torch.eye(3)[None])
    assert moment.eigenvalues()[0].tolist() == [pytest.approx([1 / 3] * 3)]
