"""What random methods find over many draws: without bias, and as far from the truth as their errors say."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from cases import Case, cross_entropy, token_loss
from loss_heads import head_of
from micro_batches import batch_of, gelu_mlp
from sketches import SKETCHED, many, sketched, with_method, without_limit
from torch import nn
from twins import z_scores

from lightning_spectral import measure_spectra
from lightning_spectral.curvature import head as head_module
from lightning_spectral.curvature.draws import Draw, mean_and_error
from lightning_spectral.curvature.sketch import SketchCurvature
from lightning_spectral.distributed.process_group import SINGLE_PROCESS
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.measure import directional_curvature
from lightning_spectral.measurement.directions import leading_directions
from lightning_spectral.measurement.gradients import sum_gradients
from lightning_spectral.measurement.setup import isolated_copy, set_up_objective
from lightning_spectral.numerics.svd import SingularTriplets
from lightning_spectral.options import Options

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

SOFTMAXES = ("weighted", "pixels", "many_classes", "nll", "kl", "soft")
RANDOM = (*SOFTMAXES, "bce_weighted", "huber", "negative", "poisson_nll", "gaussian_nll", "focal", "dice", "two")


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("name", RANDOM)
def test_random_columns_have_the_hessian_of_the_head_as_mean(name, is_dense, monkeypatch):
    """By the roots of small Hessians, and as those of large ones: of a softmax, elementwise, and of any other."""
    if not is_dense:
        monkeypatch.setattr(head_module, "DENSE", 0)
    head, at_input, dense = head_of(name)
    assert (head._softmax_blocks() is not None) == (name in SOFTMAXES)
    columns = head.random_columns(torch.Generator().manual_seed(0))
    draws = [next(columns) for _ in range(600)]
    assert all(column.sign is None for column in draws)
    x = torch.stack([at_input(column.x) for column in draws])
    partner = torch.stack([at_input(column.x if column.partner is None else column.partner) for column in draws])
    products = x[:, :, None] * partner[:, None, :]
    error = products.std(0) / math.sqrt(len(draws))
    assert ((products.mean(0) - dense).abs() <= 4.8 * error + 1e-9 * dense.abs().max()).all()
    assert any(column.partner is not None for column in draws) or bool((torch.linalg.eigvalsh(dense) > -1e-9).all())


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        (SKETCHED[0], {}),
        (SKETCHED[0], {"ranks": 1}),
        (SKETCHED[0], {"ranks": 4}),
        (SKETCHED[1], {}),
        (SKETCHED[2], {}),
        (SKETCHED[3], {}),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_sketch_is_unbiased_and_its_errors_are_calibrated(case, settings):
    model, batch = case.build()
    measured = {"top_k": 4, **case.options}
    expected = measure_spectra(model, batch, case.loss, curvature="exact", **measured)
    layers = find_layers(model, fused_qkv=measured.get("fused_qkv", ())).layers
    mode = measured.get("mode", "eval")
    estimates, errors = [], []
    with isolated_copy(model, mode, "float32", SINGLE_PROCESS) as copy:
        objective = set_up_objective(copy, case.loss, [batch], layers, Options(mode=mode), SINGLE_PROCESS)
        gradients = sum_gradients(objective, objective.full_batches())
        directions = leading_directions(gradients, [], objective, Options(top_k=4)).triplets
        for seed in range(50):
            found = SketchCurvature(seed=seed, **settings)(gradients.first, directions)
            assert not found.methods
            estimates.append(torch.cat([found.h[name] for name in layers]))
            errors.append(torch.cat([found.stderr[name] for name in layers]))
    truth = torch.cat([expected.layers[name].h for name in layers])
    draws, errors = torch.stack(estimates), torch.stack(errors)
    drawn = truth.isfinite() & (errors.amax(0) > 0)
    certain = truth.isfinite() & ~drawn
    torch.testing.assert_close(draws[:, certain], truth[certain].expand(len(draws), -1), rtol=1e-9, atol=1e-12)
    bias = (draws.mean(0) - truth) / (draws.std(0) / math.sqrt(len(draws)))
    assert bias[drawn].abs().max() < 4
    coverage = ((draws - truth).abs() < 1.96 * errors)[:, drawn].double().mean()
    assert 0.85 <= coverage <= 0.99


def test_draws_that_agree_by_chance_state_an_error_all_the_same():
    """With a sample and four channels draws often have the same signs: then each channel has a product of its own."""
    model, batch = Case("", gelu_mlp, many(1), cross_entropy).build()
    h, stderr, expected = sketched(model, batch, 1, range(20))
    torch.testing.assert_close(h, expected.expand_as(h), rtol=1e-9, atol=1e-14)
    assert not stderr.any()
    model, batch = Case("", gelu_mlp, many(4), cross_entropy).build()
    h, stderr, expected = sketched(model, batch, 1, range(100))
    # In 5 of these seeds all draws agree, and without the ratio of independent signs the error is nothing.
    assert ((h - expected).abs() < 100 * stderr)[:, :3].all()
    torch.testing.assert_close(h[:, 3], expected[3].expand(100), rtol=1e-9, atol=1e-14)  # the last layer, by columns
    same = Draw({"a": torch.ones(2).double()}, {"a": torch.full((2,), 0.5).double()})
    assert (mean_and_error([same, same])[1]["a"] > 0.1).all()


def test_more_draws_have_smaller_errors(monkeypatch):
    without_limit(monkeypatch)
    model, batch = SKETCHED[0].build()
    errors = []
    for draws in (8, 128):
        with_method(monkeypatch, SketchCurvature(draws=draws, target_error=0))
        found = measure_spectra(model, batch, token_loss, curvature="test", top_k=4)
        stderr = torch.cat([layer.h_stderr for layer in found.layers.values()])
        errors.append(stderr.square().mean().sqrt().item())
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.3)


def test_sketch_along_directions_without_singular_values(monkeypatch):
    model, batch = Case("", gelu_mlp, many(), cross_entropy).build()
    axes = {
        name: SingularTriplets(torch.eye(p.shape[0])[:, :3], torch.zeros(3), torch.eye(p.shape[1])[:, :3])
        for name, p in model.named_parameters()
        if p.ndim == 2
    }
    exact = directional_curvature(model, batch, axes, cross_entropy)
    without_limit(monkeypatch)
    with_method(monkeypatch, SketchCurvature(draws=400))
    found = directional_curvature(model, batch, axes, cross_entropy, method="test")
    exact_h, found_h = torch.cat(list(exact.values())), torch.cat(list(found.values()))
    torch.testing.assert_close(found_h, exact_h, rtol=0, atol=0.1 * float(exact_h.max()))


def wide_mlp():
    """More outputs than Gauss-Newton takes exactly."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 100))


@cache
def measured_exactly(model, seed):
    torch.manual_seed(seed)
    return measure_spectra(model().double(), batch_of(seed=seed), cross_entropy, curvature="exact", top_k=4)


@pytest.mark.parametrize("size", [48, 24, 13])
@pytest.mark.parametrize(("method", "model"), [("sketch", gelu_mlp), ("ggn", wide_mlp)])
def test_random_methods_on_pieces_are_unbiased_and_their_errors_calibrated(method, model, size):
    z = []
    for seed in range(6):
        torch.manual_seed(seed)
        network, batch = model().double(), batch_of(seed=seed)
        expected = measured_exactly(model, seed)
        found = measure_spectra(network, batch, cross_entropy, curvature=method, top_k=4, micro_batch_size=size)
        z.append(z_scores(found.layers, expected.layers))
    z = torch.cat(z)
    assert 0.5 < z.square().mean() < 2.5
    assert z.mean().abs() < 4 / len(z) ** 0.5
