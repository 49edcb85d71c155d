"""Gauss-Newton, the sketch, and the choice among methods, against double backward and dense Hessians."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, Frames, cross_entropy, frames, images, mse, sequences, token_loss, vectors
from loss_heads import LOSSES, Z, head_of
from micro_batches import gelu_mlp
from modules import ConvNet, fit
from pytorch_lightning.loggers.logger import DummyLogger
from sketches import SKETCHED, many, sketched, with_method, without_limit
from torch import nn
from twins import z_scores

from lightning_spectral import MeasurementError, SecondDerivativeError, SpectralProbe, SpectralWarning, measure_spectra
from lightning_spectral.curvature import gauss_newton as ggn_module
from lightning_spectral.curvature import selection as select
from lightning_spectral.curvature import sketch as sketch_module
from lightning_spectral.curvature.activations import cheap_twin
from lightning_spectral.curvature.autograd_graph import Dependence, find_cut
from lightning_spectral.curvature.draws import noisy_layers
from lightning_spectral.curvature.forward_recorder import Recorder
from lightning_spectral.curvature.gauss_newton import GGNCurvature
from lightning_spectral.curvature.head import Head
from lightning_spectral.curvature.problem import Curvatures
from lightning_spectral.curvature.sketch import SketchCurvature, _hadamard
from lightning_spectral.measurement import estimation
from lightning_spectral.measurement.gradients import PARTS
from lightning_spectral.numerics.power_law import fit_power_law, with_ordinate_errors
from lightning_spectral.numerics.svd import SingularTriplets

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


@pytest.mark.parametrize("name", LOSSES)
def test_columns_add_up_to_the_hessian_of_the_head(name):
    head, at_input, dense = head_of(name)
    assert head.keeps_samples_apart()
    total, samples = torch.zeros_like(dense), head.samples
    columns = head.exact_columns()
    assert len(columns) <= head.outputs
    for column in columns:
        x = at_input(column.x).reshape(samples, -1)
        partner = x if column.partner is None else at_input(column.partner).reshape(samples, -1)
        sign = torch.ones(samples) if column.sign is None else column.sign
        total += torch.block_diag(*(s * torch.outer(a, b) for s, a, b in zip(sign, x, partner, strict=True)))
    torch.testing.assert_close(total, dense, rtol=1e-9, atol=1e-11 * float(dense.abs().max()))
    assert head.is_indefinite() <= bool((torch.linalg.eigvalsh(dense) < 0).any())


def test_a_softmax_takes_one_column_less_than_it_has_classes():
    assert [len(head_of(name)[0].exact_columns()) for name in ("hard", "nll", "many_classes")] == [4, 4, 29]
    assert len(head_of("negative")[0].exact_columns()) == 5
    assert head_of("negative")[0].is_indefinite()
    assert not head_of("hard")[0].is_indefinite()


@pytest.mark.parametrize("pair", [(0, 1), (2, 3), (0, 3), (4, 5)])
def test_a_head_that_couples_two_samples_alone_shows_it(pair):
    leaf = Z.clone().requires_grad_()
    output = 1.0 * leaf
    z_hat = F.normalize(output, dim=1)
    linked = torch.zeros(6, 6, dtype=torch.float64)
    linked[pair] = 1
    value = output.square().sum() + (linked * (z_hat @ z_hat.T)).sum()
    head = Head(value, find_cut(Dependence(value.grad_fn, {id(leaf)}), {"": [output.grad_fn]}), 6)
    assert not head.keeps_samples_apart()


def test_a_head_that_couples_samples_shows_it():
    head, _, _ = head_of("hard")
    assert head.keeps_samples_apart()
    leaf = Z.clone().requires_grad_()
    output = 1.0 * leaf
    value = (output - output.mean(0)).square().sum()
    head = Head(value, find_cut(Dependence(value.grad_fn, {id(leaf)}), {"": [output.grad_fn]}), 6)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (at_edge,) = head.product([x])
    torch.testing.assert_close(at_edge, 2 * x)
    # The mean is below the cut: it is for the network's layers to show that.
    moved = torch.autograd.grad(head.edges, leaf, [at_edge * torch.tensor([1, 0, 0, 0, 0, 0])[:, None]])[0]
    assert moved[1:].all()
    (z_hat,) = [F.normalize(output, dim=1)]
    value = (z_hat @ z_hat.T).square().mean()
    head = Head(value, find_cut(Dependence(value.grad_fn, {id(leaf)}), {"": [output.grad_fn]}), 6)
    assert not head.keeps_samples_apart()


def relu_cnn():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 2, groups=8, padding="same"), nn.LeakyReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
        nn.ReLU6(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


class Skips(nn.Module):
    """Residual, concatenation, a fused projection, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.qkv, self.twice, self.head = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(18, 5)

    def forward(self, x):
        y = F.relu(self.qkv(x))
        return self.head(torch.cat([y, x + F.relu(self.twice(F.relu(-x))) + F.relu(self.twice(x))], 1))


class Nested(Skips):
    """The layer is applied to what it gave, which is no longer piecewise linear in it."""

    def forward(self, x):
        y = F.relu(self.qkv(x))
        return self.head(torch.cat([y, x + F.relu(self.twice(F.relu(self.twice(x))))], 1))


def bce(model, batch):
    return F.binary_cross_entropy_with_logits(model(batch[0]), F.one_hot(batch[1], 5).double())


def relu_mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Hardtanh(), nn.Linear(7, 5))


def tokens_in_place():
    """Torch views the output of a layer with a bias on tokens, and what writes on a view moves it in the graph."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 7), nn.LeakyReLU(0.2, inplace=True), nn.Linear(7, 5)
    )


PIECEWISE_LINEAR = [
    Case("mlp", relu_mlp, vectors, cross_entropy),
    Case("mlp_mse", relu_mlp, lambda: (torch.randn(24, 6), torch.randn(24, 5)), mse),
    Case("mlp_bce", relu_mlp, vectors, bce),
    Case("mlp_in_place", lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)), vectors,
         cross_entropy),
    Case("tokens_in_place", tokens_in_place, lambda: (torch.randn(8, 3, 6), torch.randint(0, 5, (8, 3))), token_loss),
    Case("cnn", relu_cnn, images(4, 6), cross_entropy),
    Case("conv1d", lambda: nn.Sequential(nn.Conv1d(2, 5, 3, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(20, 5)),
         lambda: (torch.randn(12, 2, 8), torch.randint(0, 5, (12,))), cross_entropy),
    Case("frames", lambda: Frames(nn.ReLU()), frames(), cross_entropy),
    Case("skips", Skips, vectors, cross_entropy, {"fused_qkv": {"qkv": [4, 4, 4]}}),
]  # fmt: skip


def close(found, expected, rel):
    for name, layer in expected.layers.items():
        scale = layer.h.abs().nan_to_num().max()
        torch.testing.assert_close(found.layers[name].h, layer.h, rtol=rel, atol=float(rel * scale), equal_nan=True)


@pytest.mark.parametrize("method", ["ggn", "auto"])
@pytest.mark.parametrize("case", PIECEWISE_LINEAR, ids=lambda case: case.name)
def test_gauss_newton_is_the_hessian_of_piecewise_linear_networks(case, method):
    model, batch = case.build()
    options = {"top_k": 6, **case.options}
    expected = measure_spectra(model, batch, case.loss, curvature="exact", **options)
    found = measure_spectra(model, batch, case.loss, curvature=method, **options)
    close(found, expected, 1e-9)
    assert {layer.method for layer in found.layers.values()} == {"ggn"}
    assert found.warnings == ()
    if method == "auto":
        assert found.chosen.startswith("ggn: ")
        assert found.check_error < 1e-9


def test_a_layer_applied_to_what_it_gave_is_left_to_other_methods():
    model, batch = Case("", Nested, many(), cross_entropy).build()
    options = {"top_k": 6, "fused_qkv": {"qkv": [4, 4, 4]}}
    expected = measure_spectra(model, batch, cross_entropy, curvature="exact", **options)
    found = measure_spectra(model, batch, cross_entropy, **options)
    assert found.chosen.startswith("sketch: Addmm is not piecewise linear; ")
    drawn = measure_spectra(model, batch, cross_entropy, curvature="sketch", **options)
    assert z_scores(drawn.layers, expected.layers).abs().max() < 6
    columns = measure_spectra(model, batch, cross_entropy, curvature="ggn", **options)
    rest = {name: layer for name, layer in expected.layers.items() if name != "twice.weight"}
    close(columns, replace(expected, layers=rest), 1e-9)
    assert (columns.layers["twice.weight"].h >= 0).all()


def test_an_output_that_is_written_on_in_place_can_be_aligned_and_sketched():
    model, batch = Case(
        "", tokens_in_place, lambda: (torch.randn(32, 3, 6), torch.randint(0, 5, (32, 3))), None
    ).build()
    report = measure_spectra(model, batch, token_loss, curvature="sketch", top_k=4, alignment=True)
    expected = measure_spectra(model, batch, token_loss, curvature="exact", top_k=4)
    assert not any(layer.alignment_note for layer in report.layers.values())
    assert z_scores(report.layers, expected.layers).abs().max() < 6
    # As torch gives it, the output has left the graph.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "_is_view", lambda self: False)
        found = measure_spectra(model, batch, token_loss, curvature="ggn", top_k=4)
    close(found, expected, 1e-9)
    assert [layer.method for layer in found.layers.values()] == ["exact", "exact", "ggn"]
    assert found.warnings == (
        "0.weight, 2.weight: measured by double backward, since no product of it with activations was seen",
    )


def test_a_sum_of_known_losses_each_with_its_weight():
    model, batch = Case("two", lambda: nn.ModuleList([relu_mlp(), relu_mlp()]), vectors, cross_entropy).build()

    def loss(m, b):
        per_sample = F.cross_entropy(m[0](b[0]), b[1], reduction="none", label_smoothing=0.1)
        return 3 * (per_sample * (b[1] != 0)).mean() + bce(m[1], b) / 2 - 4.0

    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=5)
    close(measure_spectra(model, batch, loss, curvature="ggn", top_k=5), expected, 1e-9)


def test_gauss_newton_of_a_network_that_is_not_piecewise_linear_is_j_h_j():
    model, batch = CASES[0].build()
    found = measure_spectra(model, batch, cross_entropy, curvature="ggn", top_k=4)
    weight = model[0].weight.detach()

    def logits(w):
        return model[4](torch.tanh(model[2](F.gelu(F.linear(batch[0], w, model[0].bias)))))

    jacobian = torch.autograd.functional.jacobian(logits, weight).reshape(24, 5, -1)
    p = logits(weight).softmax(1).detach()
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("bci,bcd,bdj->ij", jacobian, blocks, jacobian) / 24
    (gradient,) = torch.autograd.grad(cross_entropy(model, batch), model[0].weight)
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    expected = torch.stack([torch.outer(u[:, k], vh[k]).flatten() for k in range(4)])
    torch.testing.assert_close(
        found.layers["0.weight"].h, torch.einsum("ki,ij,kj->k", expected, matrix, expected), rtol=1e-9, atol=1e-12
    )


def tokens_relu():
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 11))


def test_random_columns_agree_within_their_standard_errors(monkeypatch):
    model, batch = Case("tokens", tokens_relu, sequences, token_loss).build()
    expected = measure_spectra(model, batch, token_loss, curvature="exact", top_k=6)
    with_method(monkeypatch, GGNCurvature(exact_columns=0, random_columns=400))
    found = measure_spectra(model, batch, token_loss, curvature="test", top_k=6)
    scores = z_scores(found.layers, expected.layers)
    assert len(scores) == 12
    assert scores.abs().max() < 4
    layer = found.layers["1.weight"]
    assert (layer.h_stderr < 0.2 * layer.h).all()
    assert layer.alpha.stderr > fit_power_law(layer.sigma, layer.h).stderr


def test_few_columns_per_token_are_taken_exactly():
    model, batch = Case("tokens", lambda: nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 5)),
                        lambda: (torch.randint(0, 11, (6, 3)), torch.randint(0, 5, (6, 3))),
                        token_loss).build()  # fmt: skip
    assert ggn_module.EXACT_COLUMNS >= 3 * 4
    expected = measure_spectra(model, batch, token_loss, curvature="exact", top_k=4)
    found = measure_spectra(model, batch, token_loss, curvature="ggn", top_k=4)
    close(found, expected, 1e-9)
    assert not found.layers["1.weight"].h_stderr.any()


def test_few_directions_are_measured_one_by_one():
    """Where three draws take as many products: three of one layer, a product each, but not of two."""
    model, (x, y) = Case("", gelu_mlp, many(16), cross_entropy).build()
    batch = torch.cat([x, x[:, :2]], 1), y
    stderr = sketched(model[4:], batch, 3, [0])[1][0]
    assert stderr[:3].all()
    assert not stderr[3:].any()  # of the last layer columns take all
    h, stderr, expected = sketched(model[6:], batch, 3, [0])
    torch.testing.assert_close(h[0], expected, rtol=1e-9, atol=1e-14)
    assert not stderr.any()


@pytest.mark.parametrize("ranks", [1, 2, None])
def test_layers_of_few_directions_beside_layers_of_many(ranks, monkeypatch):
    """Most products are without the head, which has two."""

    def deep():
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1] % 2)

    model, batch = Case("", deep, many(), loss).build()
    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=6)
    with_method(monkeypatch, SketchCurvature(ranks=ranks))
    found = measure_spectra(model, batch, loss, curvature="test", top_k=6)
    if ranks == 1:
        close(found, expected, 1e-9)
    else:
        assert z_scores(found.layers, expected.layers).abs().max() < 6


def test_columns_do_not_depend_on_what_else_is_measured():
    model, batch = CASES[0].build()
    of_all = measure_spectra(model, batch, cross_entropy, curvature="ggn", top_k=4)
    alone = measure_spectra(model, batch, cross_entropy, curvature="ggn", top_k=4, layers="0.weight")
    torch.testing.assert_close(alone.layers["0.weight"].h, of_all.layers["0.weight"].h, rtol=1e-9, atol=1e-12)


def test_draws_end_at_the_target_error(monkeypatch):
    model, batch = SKETCHED[0].build()

    def h(**options):
        with_method(monkeypatch, SketchCurvature(**options))
        found = measure_spectra(model, batch, token_loss, curvature="test", top_k=4)
        return torch.cat([layer.h for layer in found.layers.values()])

    two, three = h(draws=2), h(draws=3, target_error=0)
    assert torch.equal(h(draws=3, target_error=100), two)
    assert not torch.equal(three, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 1}, "draws must be at least 2, whose difference gives the standard errors, got 1"),
        ({"target_error": -0.1}, "target_error must not be negative, got -0.1"),
        ({"target_error": math.nan}, "target_error must not be negative, got nan"),
        ({"ranks": 0}, "ranks must be None or at least 1, got 0"),
    ],
)
def test_options_of_the_sketch_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SketchCurvature(**options)


@pytest.mark.parametrize("loss", [lambda m, b: (m(b[0]) - 1).abs().mean(), lambda m, b: m(b[0]).pow(4).mean()])
def test_sketch_scales_by_the_samples_gradients_whatever_the_loss(loss, monkeypatch):
    model, batch = Case("", gelu_mlp, many(), loss).build()
    without_limit(monkeypatch)
    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=4)
    with_method(monkeypatch, SketchCurvature(draws=40, target_error=0))
    assert (
        z_scores(measure_spectra(model, batch, loss, curvature="test", top_k=4).layers, expected.layers).abs().max() < 4
    )


X = 3 * torch.randn(40, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (F.gelu, {}),
        (F.gelu, {"approximate": "none"}),
        (F.gelu, {"approximate": "tanh"}),
        (F.silu, {}),
        (F.silu, {"inplace": False}),
    ],
)
def test_cheap_twins_have_the_same_two_derivatives(function, options):
    def derivatives(call):
        x, g, v = X.clone().requires_grad_(), X.flip(0).clone().requires_grad_(), X.roll(7)
        y = call(x)
        (back,) = torch.autograd.grad(y, x, g, create_graph=True)
        return [y, back, torch.autograd.grad(y, x, v, retain_graph=True)[0], *torch.autograd.grad(back, (x, g), v)]

    twins = derivatives(lambda x: cheap_twin(function, (x,), options))
    for twin, expected in zip(twins, derivatives(lambda x: function(x, **options)), strict=True):
        torch.testing.assert_close(twin, expected, rtol=1e-10, atol=1e-12)


def test_calls_without_a_cheap_twin_are_left_to_torch():
    x = X.clone().requires_grad_()
    assert cheap_twin(F.gelu, (X,), {}) is None
    assert cheap_twin(F.silu, (x,), {"inplace": True}) is None
    assert cheap_twin(F.gelu, (x,), {"approximate": "other"}) is None
    assert cheap_twin(F.gelu, (), {"input": x}) is None
    assert cheap_twin(F.pad, (x,), {"pad": [1, 1]}) is None
    with Recorder(set(), cheap=True):
        mapped = torch.func.vmap(F.gelu)(x[:, None])
        slopes = torch.func.vmap(torch.func.grad(F.gelu))(x)
    assert torch.equal(mapped, F.gelu(x)[:, None])
    torch.testing.assert_close(slopes, torch.autograd.grad(F.gelu(x).sum(), x)[0])


def smooth_net():
    return nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 4))


def squares(model, batch):
    return F.mse_loss(model(batch[0]), batch[0][:, :4])


def gaussian(model, batch):
    """Its Hessian is indefinite in the mean and the log variance."""
    mean, log_variance = model(batch[0]).chunk(2, 1)
    return (log_variance + (batch[0][:, :2] - mean).square() * (-log_variance).exp()).mean()


def heads_of_four(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1] % 4)


def flat(model, batch):
    return (model(batch[0]) - 1).abs().mean()


def with_hidden(model, batch):
    hidden = model[1](model[0](batch[0]))
    return F.cross_entropy(model[2](hidden), batch[1] % 4) + 0.1 * hidden.pow(3).mean()


@pytest.mark.parametrize(
    ("loss", "columns"), [(heads_of_four, 3), (squares, 4), (gaussian, 4), (flat, 0), (with_hidden, None)]
)
def test_columns_and_products_of_the_rest_add_up_to_the_hessian(loss, columns, monkeypatch):
    """With one direction of one layer in a product there is no noise; ``columns`` is the rank of the head's Hessian."""
    taken, exact_columns = [], Head.exact_columns

    def noted(head):
        found = exact_columns(head)
        taken.append(len(found))
        return found

    monkeypatch.setattr(Head, "exact_columns", noted)
    model, batch = Case("", smooth_net, many(), loss).build()
    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=3)
    with_method(monkeypatch, SketchCurvature(ranks=1))
    close(measure_spectra(model, batch, loss, curvature="test", top_k=3), expected, 1e-9)
    assert taken == ([] if columns is None else [columns])


class ComplexOutput(nn.Module):
    """The last product is with a complex matrix."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh())
        self.last = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

    def forward(self, x):
        return self.net(x).to(torch.complex128) @ self.last


def magnitude(model, batch):
    return (model(batch[0]).abs().square() + model(batch[0]).real.exp()).mean()


def test_of_complex_outputs_columns_take_no_part(monkeypatch):
    model, batch = ComplexOutput().double(), many()()
    batch = batch[0].double(), batch[1]
    layers = ["net.0.weight", "net.2.weight"]
    expected = measure_spectra(model, batch, magnitude, curvature="exact", top_k=3, layers=layers)
    with_method(monkeypatch, SketchCurvature(ranks=1))
    close(measure_spectra(model, batch, magnitude, curvature="test", top_k=3, layers=layers), expected, 1e-9)
    with pytest.raises(MeasurementError, match="the network's output is complex"):
        measure_spectra(model, batch, magnitude, curvature="ggn", top_k=3, layers=layers)


class HalfHead(nn.Module):
    """A network whose last layer computes in half precision, of itself."""

    def __init__(self):
        super().__init__()
        self.net, self.last = nn.Sequential(nn.Linear(6, 16), nn.Tanh()), nn.Linear(16, 5)

    def forward(self, x):
        return F.linear(self.net(x).half(), self.last.weight.half(), self.last.bias.half())


def test_a_loss_in_half_precision_keeps_its_samples_apart():
    """Second derivatives of the mean of many samples are subnormal there."""
    torch.manual_seed(0)
    model, batch = HalfHead(), (torch.randn(256, 6), torch.randint(0, 5, (256,)))
    expected = measure_spectra(model, batch, cross_entropy, curvature="exact", top_k=4)
    found = measure_spectra(model, batch, cross_entropy, curvature="sketch", top_k=4)
    assert found.layers["net.0.weight"].method == "sketch"
    assert (z_scores(found.layers, expected.layers, rtol=1e-2).abs() < 6).all()


def test_a_sample_without_curvature_makes_h_nan_and_no_error():
    model, (x, y) = Case("", smooth_net, many(), lambda m, b: m(b[0]).norm(dim=1).mean()).build()
    with torch.no_grad():
        model[2].bias.zero_()
        model[0].bias.zero_()
        x[3] = 0
    report = measure_spectra(model, (x, y), lambda m, b: m(b[0]).norm(dim=1).mean(), curvature="sketch", top_k=3)
    assert all(bool(layer.h.isnan().all()) for layer in report.layers.values())


def test_what_auto_expects_of_a_sketch_is_no_less_than_it_does():
    windows = (20,) * 13
    for samples in (16, 32, 64, 1024):
        for columns in (0, 5):
            properties = select.LossProperties("", False, False, 5, 1, windows, 0, samples, columns)
            least, most = sketch_module.sketch_products(windows, samples, columns)
            assert least <= properties.sketch_products <= most


def test_a_layer_without_noise_is_no_noise_whatever_its_fit():
    triplets = {"a": SingularTriplets(torch.eye(3), torch.tensor([3.0, 2.0, 1.0]), torch.eye(3))}
    h, none = {"a": -torch.ones(3).double()}, {"a": torch.zeros(3).double()}
    assert noisy_layers(triplets, Curvatures(h, "sketch", stderr=none)) == []
    assert noisy_layers(triplets, Curvatures(h, "sketch", stderr={"a": none["a"] + 0.1})) == ["a"]


def test_what_columns_leave_is_less_noisy(monkeypatch):
    """Of a network that was trained, as of any other layer than the last; the last one has no noise."""
    model, batch = Case("", gelu_mlp, many(), cross_entropy).build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    without_limit(monkeypatch)
    with_method(monkeypatch, SketchCurvature(draws=20, ranks=4, target_error=0))
    errors = []
    for most in (sketch_module.COLUMNS, 0):
        monkeypatch.setattr(sketch_module, "COLUMNS", most)
        layers = measure_spectra(model, batch, cross_entropy, curvature="test", top_k=4).layers.values()
        errors.append(torch.stack([(layer.h_stderr / layer.h.abs()).median() for layer in layers]))
    assert bool((errors[0] < 0.7 * errors[1]).all())
    assert float(errors[0][-1]) == 0


def test_hadamard_rows_are_orthogonal():
    h = _hadamard(16)
    assert torch.equal(h @ h.T, 16 * torch.eye(16, dtype=torch.long))
    assert set(h.unique().tolist()) == {-1, 1}


def test_signs_of_more_channels_than_samples_are_orthogonal_in_groups(monkeypatch):
    """Two independent rows of signs over 32 samples have a product of 32 in the mean square."""
    seen, make = [], sketch_module._Products.__init__

    def noted(self, *args):
        make(self, *args)
        seen.append(self._signs(40).double())

    monkeypatch.setattr(sketch_module._Products, "__init__", noted)
    model, batch = Case("", gelu_mlp, many(35), cross_entropy).build()
    measure_spectra(model, batch, cross_entropy, curvature="sketch", top_k=3)
    (signs,) = seen
    assert signs.shape == (40, 35)
    assert set(signs.unique().tolist()) == {-1, 1}
    squares = (signs @ signs.T).square()
    # The last 3 of 35 samples fill no block.
    assert squares[:32, :32].fill_diagonal_(0).max() <= 9
    assert squares[32:, 32:].fill_diagonal_(0).max() <= 9
    assert 16 < squares[:32, 32:].mean() < 64


def unknown_loss(model, batch):
    return (model(batch[0]) - 1).abs().mean()


def regularised(model, batch):
    return cross_entropy(model, batch) + 0.1 * model[0].weight.square().sum()


def squared(model, batch):
    return cross_entropy(model, batch) ** 2


def bn_train():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


class Neighbours(nn.Module):
    """Every sample but the first sees the others, as the nodes of a graph with one that has no edge."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(6, 6), gelu_mlp()

    def forward(self, x):
        h = self.first(x)
        return self.rest(torch.cat([h[:1], h[1:] + h[1:].mean(0)]))


INTERACT = r"samples depend on each other in the network \(BatchNorm in train mode, a graph\).*use curvature='exact'"


class AllNeighbours(Neighbours):
    """Samples are seen through means of several alone, by all layers."""

    def forward(self, x):
        means = x.reshape(4, -1, 6).mean(1)
        return self.rest(means + self.first(means)).repeat_interleave(len(x) // 4, 0)


class Averaged(Neighbours):
    """Samples meet above the last products, in sums that are linear."""

    def forward(self, x):
        return self.rest(x + x.mean(0)) + self.rest(self.first(x)).mean(0)


def all_bn_train():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())


def quartic(model, batch):
    return model(batch[0]).pow(4).mean()


@pytest.mark.parametrize("method", ["ggn", "sketch"])
@pytest.mark.parametrize("loss", [cross_entropy, quartic])
def test_methods_refuse_samples_that_see_each_other_in_all_layers(method, loss):
    model, batch = Case("", AllNeighbours, many(), loss).build()
    with pytest.raises(MeasurementError, match=INTERACT):
        measure_spectra(model, batch, loss, curvature=method)


@pytest.mark.parametrize("method", ["ggn", "sketch"])
@pytest.mark.parametrize("loss", [cross_entropy, quartic])
def test_samples_that_meet_in_the_head_alone_are_no_obstacle(method, loss):
    model, batch = Case("", all_bn_train, many(), loss).build()
    expected = measure_spectra(model, batch, loss, curvature="exact", mode="train", top_k=4)
    close(measure_spectra(model, batch, loss, curvature=method, mode="train", top_k=4), expected, 1e-9)


def wide_net():
    return nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 150))


def squared_with_hidden(model, batch):
    return with_hidden(model, batch) ** 2


@pytest.mark.parametrize(
    ("net", "loss", "reason"),
    [
        (smooth_net, squared_with_hidden, ", and is no function of the outputs alone"),
        (wide_net, squared, " over 150 outputs of each, more than 128"),
    ],
)
def test_a_sketch_refuses_a_loss_that_couples_samples_if_it_depends_on_hidden_units_or_many_outputs(net, loss, reason):
    model, batch = Case("", net, many(), loss).build()
    with pytest.raises(MeasurementError, match=f"the loss couples samples{reason}; use curvature='exact'"):
        measure_spectra(model, batch, loss, curvature="sketch")


def test_auto_takes_exact_where_passes_of_what_a_loss_couples_are_more_than_products():
    net = nn.Sequential(nn.Linear(40, 60), nn.GELU(), nn.Linear(60, 60), nn.GELU(), nn.Linear(60, 30))
    batch = (torch.randn(64, 40), torch.randint(0, 5, (64,)))
    found = measure_spectra(net, batch, squared, top_k=8)
    assert "no sketch: the loss couples samples, which takes 30 backward passes" in found.chosen
    assert all(layer.method == "exact" for layer in found.layers.values())
    found = measure_spectra(net, batch, squared, top_k=12)
    assert found.chosen.startswith("sketch")
    net[1] = net[3] = nn.ReLU()
    found = measure_spectra(net, batch, squared, top_k=8)
    assert "no ggn: the loss couples samples, which takes 30 backward passes" in found.chosen
    assert measure_spectra(net, batch, squared, top_k=12).chosen.startswith("ggn")


def test_a_loss_in_float16_that_couples_samples_is_seen_to():
    """Products with its Hessian overflow where samples are scaled by much."""

    def loss(model, batch):
        a, b = (F.normalize(model(x).half(), dim=1) for x in batch)
        return F.cross_entropy(a @ b.T / 0.07, torch.arange(len(a))).float()

    model, batch = relu_mlp(), tuple(torch.randn(32, 6) for _ in range(2))
    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=3)
    found = measure_spectra(model, batch, loss, curvature="ggn", top_k=3)
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].h, layer.h, rtol=0.02, atol=0.02 * float(layer.h.abs().max()))


@pytest.mark.parametrize("method", ["ggn", "sketch"])
def test_a_batch_that_does_not_tell_its_samples_is_refused(method):
    model, batch = Case("", relu_mlp, lambda: (torch.randn(24, 6), torch.randn(5)), None).build()
    with pytest.raises(MeasurementError, match=r"share no leading dimension, so samples cannot .*; use curvature='exa"):
        measure_spectra(model, batch, lambda m, b: (m(b[0]) - b[1]).square().mean(), curvature=method, top_k=3)


NO_ROWS = "measured by double backward, since the rows of its output cannot be told apart by sample"


@pytest.mark.parametrize(
    ("model", "options", "mixed"), [(bn_train, {"mode": "train"}, "0.weight"), (Neighbours, {}, "first.weight")]
)
@pytest.mark.parametrize("method", ["ggn", "sketch", "auto"])
def test_layers_before_samples_meet_are_measured_by_double_backward(model, options, mixed, method):
    model, batch = Case("", model, many(), cross_entropy).build()
    expected = measure_spectra(model, batch, cross_entropy, curvature="exact", top_k=3, **options)
    found = measure_spectra(model, batch, cross_entropy, curvature=method, top_k=3, **options)
    rest = {layer.method for name, layer in found.layers.items() if name != mixed}
    assert found.layers[mixed].method == "exact"
    torch.testing.assert_close(found.layers[mixed].h, expected.layers[mixed].h, rtol=1e-9, atol=1e-12)
    if method != "auto":
        assert [text for text in found.warnings if not text.startswith("signal: ")] == [f"{mixed}: {NO_ROWS}"]
        assert rest == {method}
    if method == "ggn" and mixed == "0.weight":
        close(found, expected, 1e-9)


def per_sample_signs(model, batch):
    each = F.mse_loss(model(batch[0]), torch.ones(48, 5).double(), reduction="none").sum(1)
    return each @ torch.linspace(-1, 1, 48).double()


# Losses that were once refused: unknown, with negative weights, broadcast targets, ...
ANY_LOSS = {
    "abs": unknown_loss,
    "regularised": regularised,
    "squared": squared,
    "of_itself": lambda m, b: F.mse_loss(m(b[0]), m(0.5 * b[0])),
    "signs": per_sample_signs,
    "old": lambda m, b: F.mse_loss(m(b[0]), torch.ones(48, 5).double(), reduce=True),
    "broadcast": lambda m, b: F.mse_loss(m(b[0]), torch.ones(1, 5).double()),
    "by_hand": lambda m, b: (m(b[0]).square().sum(1) * (1 + b[1])).mean(),
    "twice": lambda m, b: F.cross_entropy(m(b[0]) + m(-b[0]), b[1]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ANY_LOSS)
def test_gauss_newton_measures_any_loss_of_a_piecewise_linear_network(name):
    model, batch = Case("", relu_mlp, many(), None).build()
    loss = ANY_LOSS[name]
    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=4)
    found = measure_spectra(model, batch, loss, curvature="ggn", top_k=4)
    close(found, expected, 1e-8)
    apart = {name for name, layer in found.layers.items() if layer.method == "exact"}
    assert apart == ({"0.weight"} if name == "regularised" else set())
    if apart:
        assert found.warnings == (
            "0.weight: measured by double backward, since it is also used in another way than multiplied with "
            "activations",
        )
    close(measure_spectra(model, batch, loss, top_k=4), expected, 1e-8)


@pytest.mark.parametrize("method", ["ggn", "sketch"])
def test_rows_of_the_output_that_are_no_multiple_of_the_samples(method):
    model, batch = Case("", relu_mlp, many(), None).build()

    def loss(model, batch):
        return F.cross_entropy(model(batch[0])[:31], batch[1][:31])

    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=3)
    close(measure_spectra(model, batch, loss, curvature=method, top_k=3), expected, 1e-9)
    found = measure_spectra(model, batch, loss, top_k=3)
    close(found, expected, 1e-9)
    assert found.chosen.startswith("ggn")


def ranked(model, batch):
    """Differences of all pairs of samples."""
    score = model(batch[0])[:, 0]
    return F.softplus(score[:, None] - score[None]).mean()


def centred(model, batch):
    z = model(batch[0])
    return (z - z.mean(0)).pow(4).mean()


@pytest.mark.parametrize("loss", [ranked, centred, lambda m, b: m(b[0]).amax(0).exp().sum()])
def test_linear_sums_over_samples_are_of_the_head(loss, monkeypatch):
    """As differences of pairs, which put other rows than samples at the cut that is nearest to the loss."""
    model, batch = Case("", relu_mlp, many(24), loss).build()
    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=3)
    close(measure_spectra(model, batch, loss, curvature="ggn", top_k=3), expected, 1e-9)
    model, batch = Case("", smooth_net, many(24), loss).build()
    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=3)
    with_method(monkeypatch, SketchCurvature(ranks=1))
    close(measure_spectra(model, batch, loss, curvature="test", top_k=3), expected, 1e-9)


@pytest.mark.parametrize("loss", [cross_entropy, quartic])
def test_samples_that_are_averaged_above_the_last_products(loss):
    model, batch = Case("", Averaged, many(), loss).build()
    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=4)
    found = measure_spectra(model, batch, loss, curvature="sketch", top_k=4)
    assert z_scores(found.layers, expected.layers).abs().max() < 6


def test_a_call_that_the_loss_does_not_depend_on_changes_nothing():
    model, batch = Case("", relu_mlp, many(), None).build()

    def loss(model, batch):
        with torch.no_grad():
            target = model(2 * batch[0]).softmax(1)
        return F.cross_entropy(model(batch[0]), target) + 0 * model(batch[0]).detach().sum()

    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=3)
    close(measure_spectra(model, batch, loss, curvature="ggn", top_k=3), expected, 1e-9)
    found = measure_spectra(model, batch, loss, top_k=3)
    close(found, expected, 1e-9)
    assert found.chosen.startswith("ggn: ")


GGN = "ggn: every operation after the layers is piecewise linear up to the head, "


@pytest.mark.parametrize(
    ("model", "loss", "samples", "options", "chosen"),
    [
        (relu_mlp, cross_entropy, 48, {}, f"{GGN}5 backward passes for all layers; exact would take 9 products"),
        (gelu_mlp, cross_entropy, 48, {},
         "sketch: Gelu is not piecewise linear; 5 backward passes and about 2 joint products; exact would take 12 "),
        (lambda: nn.Sequential(gelu_mlp(), nn.GELU(), nn.Linear(5, 1)), lambda m, b: F.softplus(m(b[0])).mean(), 48, {},
         "sketch: Gelu is not piecewise linear; 1 backward pass and about 2 joint products; exact would take 12 "),
        (gelu_mlp, cross_entropy, 5, {},
         "exact: 12 products, since sketch would take as long for so few layers or samples"),
        (gelu_mlp, cross_entropy, 3, {},
         "exact: 12 products, since Gelu is not piecewise linear, and 3 samples are too few for a sketch"),
        (lambda: gelu_mlp()[4:], lambda m, b: cross_entropy(m, (b[0].repeat(1, 2)[:, :8], b[1])), 48, {},
         "exact: 6 products, since sketch would take as long for so few layers or samples"),
        (relu_mlp, unknown_loss, 48, {},
         f"{GGN}no pass, the loss is piecewise linear and its Hessian zero; exact would take 6 products"),
        (gelu_mlp, unknown_loss, 48, {},
         "exact: 10 products, since sketch would take as long for so few layers or samples"),
        (relu_mlp, regularised, 48, {},
         f"{GGN}5 backward passes for all layers, and 3 products for layers that have to be measured one by one"),
        (gelu_mlp, regularised, 48, {}, "exact: 12 products, since sketch would take as long"),
        (relu_mlp, squared, 48, {}, f"{GGN}5 backward passes for all layers; exact would take 9 products"),
        (bn_train, cross_entropy, 48, {"mode": "train"},
         "exact: 6 products, since sketch would take as long for so few layers or samples"),
        (AllNeighbours, cross_entropy, 48, {}, "exact: 15 products; no sketch: samples depend on each other"),
        (Neighbours, cross_entropy, 48, {},
         "sketch: Gelu is not piecewise linear; 5 backward passes and about 2 joint products"),
        (lambda: nn.Sequential(gelu_mlp(), nn.Tanh(), nn.Linear(5, 5)), cross_entropy, 48, {},
         "sketch: Gelu, Tanh are not piecewise linear; 5 backward passes and about 2 "),
    ],
)  # fmt: skip
def test_auto_chooses_and_says_why(model, loss, samples, options, chosen):
    model, batch = Case("", model, many(samples), loss).build()
    options = {"top_k": 3, **options}
    found = measure_spectra(model, batch, loss, **options)
    assert found.chosen.startswith(chosen)
    expected = measure_spectra(model, batch, loss, curvature="exact", **options)
    if not chosen.startswith("sketch"):
        close(found, expected, 1e-9)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)


class FlashAttention(nn.Module):
    """Calls a kernel that has a first derivative only, with one layer before it and four behind."""

    def __init__(self):
        super().__init__()
        self.qkv, self.net = nn.Linear(8, 24), gelu_mlp()

    def forward(self, x):
        q, k, v = self.qkv(x).view(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        return self.net(y.transpose(1, 2).reshape(-1, 4, 8).mean(1)[:, :6])


def test_an_operation_without_second_derivative_stops_the_layers_before_it_alone():
    model, batch = FlashAttention(), (torch.randn(48, 4, 8), torch.randint(0, 5, (48,)))
    report = measure_spectra(model, batch, cross_entropy, top_k=4)
    assert [name for name, layer in report.layers.items() if not layer.h.isfinite().any()] == ["qkv.weight"]
    assert "flash_attention_for_cpu has no second derivative" in report.failed["qkv.weight"]
    assert report.chosen.startswith("exact: 20 products; no sketch: scaled_dot_product_flash_attention_for_cpu has ")
    with pytest.raises(SecondDerivativeError, match=r"flash_attention_for_cpu has no second .*layers=.* loss_fn"):
        measure_spectra(model, batch, cross_entropy, curvature="sketch", top_k=4)


class FusedCrossEntropy(torch.autograd.Function):
    """A loss whose backward pass scales a gradient that it brings along, as fused kernels do."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward((z.softmax(1) - F.one_hot(y, z.shape[1])) / len(y))
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


@pytest.mark.parametrize("method", ["auto", "ggn"])
def test_a_head_that_cuts_the_second_derivative_is_not_taken_for_flat(method):
    def loss(model, batch):
        z = model(batch[0])
        return FusedCrossEntropy.apply(z, batch[1]) + 0.1 * z.square().mean()

    model, batch = PIECEWISE_LINEAR[0].build()
    with pytest.raises((MeasurementError, SecondDerivativeError), match=r"custom autograd function.*FusedCrossEntropy"):
        measure_spectra(model, batch, loss, curvature=method, top_k=3)


def test_auto_does_not_believe_columns_that_fail_their_check(monkeypatch):
    model, batch = PIECEWISE_LINEAR[0].build()
    expected = measure_spectra(model, batch, cross_entropy, curvature="exact", top_k=3)
    monkeypatch.setattr(select, "_obstacle", lambda seen, samples: "")
    monkeypatch.setitem(estimation.CHOICES, "ggn", lambda: select.CheckedGGN(as_hessian=False))
    gelu, gelu_batch = Case("", gelu_mlp, many(), cross_entropy).build()
    found = measure_spectra(gelu, gelu_batch, cross_entropy, top_k=3)
    assert found.chosen.startswith("exact: 12 products; no ggn: the columns failed their check against an exact ")
    close(found, measure_spectra(gelu, gelu_batch, cross_entropy, curvature="exact", top_k=3), 1e-9)
    assert measure_spectra(model, batch, cross_entropy, top_k=3).chosen.startswith("ggn")
    assert expected.chosen == ""


def test_ordinate_errors_enter_the_standard_error_of_a_slope():
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(1, 11, dtype=torch.float64)
    y, error = x**2, 0.02 * x**2
    used = torch.ones(10, dtype=torch.bool)
    fit = with_ordinate_errors(fit_power_law(x, y), x, y, error, used)
    slopes = [
        fit_power_law(x, y + error * torch.randn(10, generator=generator, dtype=torch.float64)).exponent
        for _ in range(2000)
    ]
    assert fit.stderr == pytest.approx(torch.tensor(slopes).std().item(), rel=0.1)


@pytest.mark.parametrize("point", [0, 1, 2])
def test_an_ordinate_error_beyond_all_measure_is_an_infinite_one_but_at_the_mean(point):
    x, y = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.tensor([1.0, 4.0, 15.0], dtype=torch.float64)
    y[point], error, used = 1e-180, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    error[point] = 1e20
    fit = fit_power_law(x, y)
    assert with_ordinate_errors(fit, x, y, error, used).stderr == (fit.stderr if point == 1 else math.inf)


def test_the_standard_error_holds_where_a_point_lies_in_its_noise():
    """The smallest of ten has an error as large as itself: what is left of it by chance may be a thousandth."""
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(1, 11, dtype=torch.float64)
    error, z, stated = torch.ones(10, dtype=torch.float64), [], []
    for _ in range(2000):
        y = x**2 + error * torch.randn(10, generator=generator, dtype=torch.float64)
        fit = fit_power_law(x, y)
        stated.append(with_ordinate_errors(replace(fit, stderr=0.0), x, y, error, y > 0).stderr)
        z.append(abs(fit.exponent - 2) / stated[-1])
    z = torch.tensor(z)
    assert 0.6 < (z < 1).double().mean() < 0.76
    assert (z < 2).double().mean() > 0.87
    assert max(stated) < 1.5


def dropout_mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))


@pytest.mark.parametrize("method", ["ggn", "sketch", "auto"])
def test_every_pass_draws_the_same_dropout(method):
    model, batch = Case("", dropout_mlp, many(), cross_entropy).build()
    torch.manual_seed(3)
    expected = measure_spectra(model, batch, cross_entropy, curvature="exact", mode="train", top_k=4)
    torch.manual_seed(3)
    found = measure_spectra(model, batch, cross_entropy, curvature=method, mode="train", top_k=4)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    close(found, expected, 0.5 if method == "sketch" else 1e-9)


def test_a_loss_that_is_another_at_each_call_is_refused():
    calls = []

    def counting(model, batch):
        calls.append(1)
        return len(calls) * cross_entropy(model, batch)

    model, batch = Case("", gelu_mlp, many(), cross_entropy).build()
    with pytest.raises(MeasurementError, match=r"at a second call on the same batch, .*; use curvature='exact'"):
        measure_spectra(model, batch, counting)
    with pytest.raises(MeasurementError, match=r"with micro_batch_size of the whole batch"):
        measure_spectra(model, batch, counting, curvature="exact")
    calls.clear()
    assert measure_spectra(model, batch, counting, curvature="exact", micro_batch_size=1000).loss > 0
    # Of the whole batch, of its parts for the noise, and in train mode.
    assert len(calls) == 1 + PARTS + 1


@pytest.mark.parametrize("method", ["exact", "ggn", "sketch", "auto"])
def test_dead_layers_stop_no_method(method):
    model, batch = Case("", relu_mlp, many(), cross_entropy).build()
    for part in (model[0], model[2]):
        part.bias.data.fill_(-100.0)
    report = measure_spectra(model, batch, cross_entropy, curvature=method, top_k=4)
    assert list(report.failed) == ["0.weight", "2.weight", "4.weight"][: len(report.failed)]
    assert {"0.weight", "2.weight"} <= report.failed.keys()
    assert "no direction above the noise floor: its gradient is zero" in report.failed["0.weight"]
    nothing = measure_spectra(model, batch, lambda m, b: 0 * cross_entropy(m, b), curvature=method, top_k=4)
    assert len(nothing.failed) == 3


def test_a_probe_says_once_which_method_was_chosen(caplog):
    probe = SpectralProbe(every_n_steps=1)
    with caplog.at_level("INFO", logger="lightning_spectral"):
        fit(ConvNet(), [probe], steps=3, logger=[DummyLogger()])
    told = [record.message for record in caplog.records if "curvature by" in record.message]
    assert told == ["step 0, curvature by " + probe.last_report.chosen]
    assert probe.last_report.chosen.startswith("ggn")


def test_the_recorder_changes_nothing_and_leaves_nothing_behind():
    attention, linear = nn.MultiheadAttention(8, 2), F.linear
    x = torch.randn(3, 2, 8)
    expected = attention(x, x, x)[0]
    with Recorder({id(attention.in_proj_weight)}) as recorder:
        assert torch.equal(attention(x, x, x)[0], expected)
    assert F.linear is linear
    (use,) = recorder.trace.calls[id(attention.in_proj_weight)]
    assert use.time_first == 2


def test_a_probe_warns_of_layers_measured_another_way():
    class Penalised(Skips):
        def forward(self, x):
            return super().forward(x) + self.twice.weight.square().sum()

    with pytest.warns(SpectralWarning, match=r"twice.weight: measured by double backward, since it is also used in an"):
        measure_spectra(Penalised(), (torch.randn(24, 6), torch.randint(0, 5, (24,))), cross_entropy, curvature="ggn")
