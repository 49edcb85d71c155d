"""Exact curvature against dense Hessians in float64, and against a closed form."""

import pytest
import torch
from cases import CASES, Case, cross_entropy, mlp, vectors
from torch import nn
from twins import block_triplets, dense_hessian, gradient, matrix_entries

from lightning_spectral import MeasurementError, SingularTriplets, directional_curvature, measure_spectra
from lightning_spectral.layers.matrices import find_layers


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_spectrum_equals_dense_hessian(case: Case):
    model, batch = case.build()
    train = case.options.get("mode") == "train"
    report = measure_spectra(
        model, batch, case.loss, top_k=6, curvature="exact", layers=lambda layer: True, **case.options
    )
    found = find_layers(model, layers=lambda layer: True, fused_qkv=case.options.get("fused_qkv", ()))
    assert list(report.layers) == list(found.layers)
    hessians = {}
    for name, layer in found.layers.items():
        parameter = model.get_parameter(layer.parameter)
        if layer.parameter not in hessians:
            hessians[layer.parameter] = dense_hessian(model, batch, case.loss, layer.parameter, train=train)
        entries = matrix_entries(layer, parameter.shape)
        block = hessians[layer.parameter][entries.flatten()][:, entries.flatten()]
        matrix = gradient(model, batch, case.loss, layer.parameter, train=train).flatten()[entries]
        expected = block_triplets(matrix, layer.groups, 6)
        spectrum = report.layers[name]
        assert len(spectrum.sigma) == len(expected)
        for k, (sigma, direction) in enumerate(expected):
            assert spectrum.sigma[k].item() == pytest.approx(sigma, rel=1e-10, abs=1e-15)
            if sigma > spectrum.noise_floor:
                h = (direction.flatten() @ block @ direction.flatten()).item()
                assert spectrum.h[k].item() == pytest.approx(h, rel=1e-8), (name, k)


def test_closed_form_of_a_quadratic():
    # L = 1/2 tr(W^T A W B) has h = (u^T A u)(v^T B v) along u v^T.
    a, b = (torch.randn(n, n, dtype=torch.float64) for n in (7, 5))
    a, b = a @ a.T, b @ b.T
    model = nn.Linear(5, 7, bias=False).double()
    report = measure_spectra(model, None, lambda m, _: 0.5 * torch.trace(m.weight.T @ a @ m.weight @ b), top_k=5)
    u, _, vh = torch.linalg.svd(a @ model.weight.detach() @ b, full_matrices=False)
    expected = torch.einsum("ik,ij,jk->k", u, a, u) * torch.einsum("ki,ij,kj->k", vh, b, vh)
    torch.testing.assert_close(report.layers["weight"].h, expected, rtol=1e-10, atol=0)


def test_directional_curvature_along_given_directions():
    model, batch = Case("mlp", mlp, vectors, cross_entropy).build()
    u, v = torch.randn(8, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    h = directional_curvature(model, batch, {"0.weight": SingularTriplets(u, torch.ones(3), v)}, cross_entropy)
    hessian = dense_hessian(model, batch, cross_entropy, "0.weight")
    directions = torch.einsum("mk,nk->kmn", u, v).flatten(1)
    torch.testing.assert_close(h["0.weight"], torch.einsum("ki,ij,kj->k", directions, hessian, directions))


@pytest.mark.parametrize("method", ["ggn", "sketch"])
def test_directions_that_reach_several_groups_are_for_exact_products_alone(method):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(32, 5)).double()
    batch = torch.randn(6, 4, 4, 4).double(), torch.randint(0, 5, (6,))
    directions = {"0.weight": SingularTriplets(torch.randn(8, 2).double(), torch.ones(2), torch.randn(18, 2).double())}
    assert directional_curvature(model, batch, directions, cross_entropy)["0.weight"].isfinite().all()
    with pytest.raises(MeasurementError, match=r"0\.weight: a direction reaches several groups.*use curvature='exact'"):
        directional_curvature(model, batch, directions, cross_entropy, method=method)


def test_directional_curvature_of_a_whole_fused_projection_and_of_a_part():
    case = next(c for c in CASES if c.name == "multihead_attention")
    model, batch = case.build()
    u, v = torch.zeros(24, 1, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    u[8:16] = torch.randn(8, 1, dtype=torch.float64)
    whole = {"attn.in_proj_weight": SingularTriplets(u, torch.ones(1), v)}
    part = {"attn.in_proj_weight.k": SingularTriplets(u[8:16], torch.ones(1), v)}
    h_whole = directional_curvature(model, batch, whole, case.loss)["attn.in_proj_weight"]
    h_part = directional_curvature(model, batch, part, case.loss)["attn.in_proj_weight.k"]
    torch.testing.assert_close(h_whole, h_part, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({"nowhere": SingularTriplets(torch.ones(8, 1), torch.ones(1), torch.ones(6, 1))}, "nowhere is no trained"),
        ({"0.weight": SingularTriplets(torch.ones(6, 1), torch.ones(1), torch.ones(8, 1))}, r"u must be \(8, K\)"),
    ],
)
def test_directions_that_do_not_fit(directions, message):
    model, batch = Case("mlp", mlp, vectors, cross_entropy).build()
    with pytest.raises(ValueError, match=message):
        directional_curvature(model, batch, directions, cross_entropy)


def test_loss_linear_in_a_matrix_has_zero_curvature():
    model = nn.Linear(4, 4, bias=False).double()
    with pytest.warns(UserWarning, match="its Hessian is zero: the loss is piecewise linear .give a smooth loss_fn."):
        report = measure_spectra(
            model, torch.randn(9, 4).double(), lambda m, x: m(x).sum(0) @ torch.arange(4.0).double()
        )
    assert report.layers["weight"].h[0].item() == 0.0


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_half_precision_weights_are_measured_in_float32():
    case = CASES[0]
    model, batch = case.build(torch.bfloat16)
    raised, raised_batch = model.float(), tuple(t.float() if t.is_floating_point() else t for t in batch)
    expected = measure_spectra(raised, raised_batch, case.loss, top_k=4)
    report = measure_spectra(model.bfloat16(), batch, case.loss, top_k=4)
    for name, layer in report.layers.items():
        torch.testing.assert_close(layer.h, expected.layers[name].h, rtol=1e-6, atol=0)
    assert next(model.parameters()).dtype is torch.bfloat16


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_float64_on_request():
    case = CASES[0]
    model, batch = case.build(torch.float32)
    report = measure_spectra(model, batch, case.loss, top_k=4, precision="float64")
    batch = tuple(t.double() if t.is_floating_point() else t for t in batch)
    expected = measure_spectra(model.double(), batch, case.loss, top_k=4)
    for name, layer in report.layers.items():
        assert torch.equal(layer.h, expected.layers[name].h)
