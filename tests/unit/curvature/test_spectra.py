"""Singular values beyond the window, those of weights, and alpha by quarter of the window."""

import math

import pytest
import torch
from cases import CASES, Case
from fits import fit_numbers
from torch import nn
from twins import block_triplets, gradient, matrix_entries

from lightning_spectral import fit_power_law, fit_rank_decay, fit_rank_models, measure_spectra
from lightning_spectral.errors import MeasurementError
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.numerics.svd import singular_values, top_singular_triplets
from lightning_spectral.records.log_keys import RANK_MODELS
from lightning_spectral.records.on_request import WeightSpectrum
from lightning_spectral.records.report import SpectralReport

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

NOT_FINITE = torch.full((2, 2), torch.nan)

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), [((12, 7), 1), ((7, 12), 1), ((12, 5), 3), ((8, 9), 8), ((700, 520), 1)])
def test_singular_values_are_those_of_all_blocks(shape, groups, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = singular_values(matrix, groups=groups)
    expected = [sigma for sigma, _ in block_triplets(matrix.double(), groups, math.prod(shape))] if groups > 1 else None
    expected = torch.linalg.svdvals(matrix.double()) if expected is None else torch.tensor(expected).double()
    assert found.dtype is (dtype if dtype is not torch.bfloat16 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(found[:5], top_singular_triplets(matrix, 5, groups=groups).sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_small_singular_values_are_right_down_to_the_noise_floor(scale):
    q, _ = torch.linalg.qr(torch.randn(300, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    sigma = torch.logspace(0, -4, 200, dtype=torch.float64)
    matrix = (q * sigma * scale).float()
    torch.testing.assert_close(singular_values(matrix).double(), sigma * scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("matrix", "groups", "error"),
    [
        (torch.ones(4), 1, ValueError),
        (torch.ones(4, 3), 3, ValueError),
        (NOT_FINITE, 1, MeasurementError),
    ],
)
def test_what_has_no_singular_values(matrix, groups, error):
    with pytest.raises(error, match=r"need a matrix|NaN or infinite"):
        singular_values(matrix, groups=groups)


def layers_of(model, options):
    return find_layers(model, layers=options["layers"], fused_qkv=options.get("fused_qkv", ())).layers.items()


@by_name
def test_more_singular_values_serve_the_rank_models_alone(case: Case, monkeypatch):
    model, batch = case.build()
    options = {"top_k": 3, "curvature": "exact", "layers": lambda layer: True, **case.options}
    window = measure_spectra(model, batch, case.loss, **options)
    products, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (products.append(1), grad(*args, **kwargs))[1])
    more = measure_spectra(model, batch, case.loss, spectrum_top_k=60, **options)
    counted = len(products)
    products.clear()
    measure_spectra(model, batch, case.loss, **options)
    assert counted == len(products)
    assert (more.spectrum_top_k, window.spectrum_top_k) == (60, 3)
    train = options.get("mode") == "train"
    for name, layer in layers_of(model, options):
        spectrum, before = more.layers[name], window.layers[name]
        entries = matrix_entries(layer, model.get_parameter(layer.parameter).shape)
        matrix = gradient(model, batch, case.loss, layer.parameter, train=train).flatten()[entries]
        sigma = torch.tensor([sigma for sigma, _ in block_triplets(matrix, layer.groups, 60)], dtype=torch.float64)
        torch.testing.assert_close(spectrum.spectrum, sigma, rtol=1e-8, atol=1e-15)
        usable = spectrum.spectrum[spectrum.spectrum > spectrum.noise_floor]
        models = fit_rank_models(usable)
        assert spectrum.rank_models.winner == models.winner
        assert spectrum.rank_models.bic == pytest.approx(models.bic, nan_ok=True)
        assert torch.equal(before.spectrum, before.sigma)
        assert torch.equal(spectrum.sigma, before.sigma)
        assert torch.equal(spectrum.h.nan_to_num(), before.h.nan_to_num())
        for fitted in ("alpha", "gamma", "s"):
            assert repr(getattr(spectrum, fitted)) == repr(getattr(before, fitted))


@by_name
def test_weight_spectra_are_those_of_the_matrices(case: Case):
    model, batch = case.build()
    before = {name: value.clone() for name, value in model.named_parameters(remove_duplicate=False)}
    options = {"top_k": 4, "curvature": "exact", "layers": lambda layer: True, **case.options}
    report = measure_spectra(model, batch, case.loss, weight_spectra=True, **options)
    for name, layer in layers_of(model, options):
        weights, parameter = report.layers[name].weights, before[layer.parameter]
        matrix = parameter.detach().flatten()[matrix_entries(layer, parameter.shape)]
        sigma = torch.tensor([sigma for sigma, _ in block_triplets(matrix, layer.groups, 10_000)], dtype=torch.float64)
        assert weights.n_ranks == len(sigma)
        torch.testing.assert_close(weights.sigma, sigma[:4], rtol=1e-10, atol=0)
        assert weights.gamma.exponent == pytest.approx(fit_rank_decay(sigma[:4]).exponent, nan_ok=True)
        assert weights.s.exponent == pytest.approx(fit_rank_decay(sigma**2).exponent, nan_ok=True)
    assert all(layer.weights is None for layer in measure_spectra(model, batch, case.loss, **options).layers.values())


def test_weights_are_those_from_before_a_step_that_writes_on_them():
    model = nn.Linear(8, 6).double()
    before = model.weight.detach().clone()

    def loss(m, x):
        value = m(x).square().mean()
        m.weight.data.mul_(torch.arange(8.0).double())
        return value

    weights = measure_spectra(model, torch.randn(9, 8).double(), loss, curvature="exact", weight_spectra=True)
    torch.testing.assert_close(weights.layers["weight"].weights.sigma, torch.linalg.svdvals(before))


def test_weights_with_rounding_noise_and_without_finite_entries():
    u, v = torch.randn(30, 3), torch.randn(20, 3)
    spectrum = WeightSpectrum.of(u @ v.T, top_k=20)
    assert (spectrum.n_ranks, spectrum.s.n_used, spectrum.s.dropped) == (20, 3, {"below the noise floor": 17})
    broken = WeightSpectrum.of(torch.full((4, 4), torch.inf), top_k=2)
    assert broken.n_ranks == 0
    assert math.isnan(broken.s.exponent)
    assert "16 of 16 entries are NaN or infinite" in broken.note


def test_weights_that_are_not_finite_are_told():
    class Selected(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(6, 4), nn.Linear(4, 4)

        def forward(self, index):
            return self.out(self.table(index))

    model = Selected()
    model.table.weight.data[5] = torch.inf
    report = measure_spectra(
        model, torch.arange(5), lambda m, i: m(i).square().mean(), layers="*", curvature="exact", weight_spectra=True
    )
    assert any(text.startswith("weight_spectra: table.weight: 4 of 24 entries") for text in report.warnings)
    assert math.isfinite(report.layers["out.weight"].weights.s.exponent)


def test_alpha_of_each_quarter_is_the_fit_of_its_points():
    k = torch.arange(1, 23, dtype=torch.float64)
    sigma = k**-1.0
    h = sigma ** (1 + k / 10)
    h[3], sigma[-1] = -1.0, 1e-12
    spectrum = fit_numbers(sigma, h, name="w", shape=(64, 64))
    parts = [slice(0, 6), slice(6, 12), slice(12, 17), slice(17, 22)]
    assert len(spectrum.alpha_quartiles) == 4
    for part, fit in zip(parts, spectrum.alpha_quartiles, strict=True):
        usable = sigma[part] > spectrum.noise_floor
        expected = fit_power_law(sigma[part][usable], h[part][usable])
        assert fit.exponent == expected.exponent
        assert fit.n_used == expected.n_used
    assert [fit.n_used for fit in spectrum.alpha_quartiles] == [5, 6, 5, 4]
    assert spectrum.alpha_quartiles[3].dropped == {"below the noise floor": 1}


@pytest.mark.parametrize("n", [0, 1, 3, 11])
def test_quarters_with_fewer_than_3_points_are_nan(n):
    sigma = torch.arange(1, n + 1, dtype=torch.float64) ** -1.0
    spectrum = fit_numbers(sigma, sigma**2, name="w", shape=(64, 64))
    assert [fit.n_used for fit in spectrum.alpha_quartiles] == [len(part) for part in sigma.tensor_split(4)]
    for fit in spectrum.alpha_quartiles:
        assert math.isnan(fit.exponent) == (fit.n_used < 3)


def layer_of(law, name):
    k = torch.arange(1, 21, dtype=torch.float64)
    return fit_numbers(law(k), k**-2, name=name, shape=(64, 64))


def test_shares_and_margins_of_rank_models():
    laws = [lambda k: k**-1.3, lambda k: (-0.4 * k).exp(), lambda k: (-0.3 * k).exp(), lambda k: k**-0.7]
    layers = {str(i): layer_of(law, str(i)) for i, law in enumerate(laws)}
    layers["dead"] = fit_numbers(torch.zeros(0), torch.zeros(0), name="dead", shape=(9, 9), note="dead")
    report = SpectralReport(layers, {}, 1.0, 8, "exact", "eval", "float32", 20, 0.1)
    assert report.rank_model_shares() == {"power_law": 0.5, "exponential": 0.5, "lognormal": 0.0}
    scalars = report.scalars()
    assert [scalars[f"rank_model/{model}"] for model in RANK_MODELS] == [0.5, 0.5, 0.0]
    for layer in report.layers.values():
        models, bics = layer.rank_models, sorted(layer.rank_models.bic.values())
        if layer.name != "dead":
            assert models.margin == bics[1] - models.bic[models.winner] > 0
            assert scalars[f"rank_margin/{layer.name}"] == models.margin
    assert math.isnan(layers["dead"].rank_models.margin)
    empty = SpectralReport({"dead": layers["dead"]}, {}, 1.0, 8, "exact", "eval", "float32", 20, 0.1)
    assert all(math.isnan(share) for share in empty.rank_model_shares().values())


def test_a_window_that_holds_all_directions_asks_for_no_more(monkeypatch):
    monkeypatch.setattr("lightning_spectral.measurement.directions.singular_values", None)
    model, batch = CASES[0].build()
    report = measure_spectra(model, batch, CASES[0].loss, top_k=20, spectrum_top_k=100)
    assert len(report.layers["0.weight"].spectrum) == 6


def fails(*args, **options):
    raise torch.linalg.LinAlgError("did not converge")


def no_memory(*args, **options):
    raise torch.OutOfMemoryError("out of memory")


def test_a_solver_that_fails_on_equal_values_is_asked_again_on_the_cpu(monkeypatch):
    orthogonal, _ = torch.linalg.qr(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)))
    real, calls = torch.linalg.eigvalsh, []

    def fails_once(gram):
        calls.append(1)
        return fails() if len(calls) == 1 else real(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails_once)
    torch.testing.assert_close(singular_values(orthogonal), torch.ones(6))
    assert len(calls) == 2


@pytest.mark.parametrize("broken", [fails, no_memory])
def test_weights_whose_singular_values_fail_are_noted_and_the_rest_is_measured(monkeypatch, broken):
    case = CASES[0]
    model, batch = case.build()
    monkeypatch.setattr("lightning_spectral.records.on_request.singular_values", broken)
    report = measure_spectra(model, batch, case.loss, top_k=4, weight_spectra=True)
    for layer in report.layers.values():
        assert "no singular values" in layer.weights.note
        assert math.isnan(layer.weights.s.exponent)
        assert not math.isnan(layer.gamma.exponent)
    assert any(text.startswith("weight_spectra: ") for text in report.warnings)


@pytest.mark.parametrize("broken", [fails, no_memory])
def test_a_longer_spectrum_that_fails_leaves_that_of_the_window(monkeypatch, broken):
    case = CASES[0]
    model, batch = case.build()
    expected = measure_spectra(model, batch, case.loss, top_k=4)
    monkeypatch.setattr("lightning_spectral.measurement.directions.singular_values", broken)
    report = measure_spectra(model, batch, case.loss, top_k=4, spectrum_top_k=6)
    assert report.failed == expected.failed
    for name, layer in report.layers.items():
        assert torch.equal(layer.spectrum, layer.sigma)
        assert repr(layer.alpha) == repr(expected.layers[name].alpha)
    (text,) = (text for text in report.warnings if text.startswith("spectrum_top_k: "))
    assert "only the 4 singular values of the window" in text
