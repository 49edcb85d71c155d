"""More samples for the gradient than for the curvature, and the noise of the gradient, against obvious twins."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import cross_entropy
from micro_batches import batch_of, gelu_mlp, ignoring, relu_mlp, summed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import MeasurementError, directional_curvature, measure_spectra
from lightning_spectral.measurement.gradient_samples import AIM, samples_for_aim
from lightning_spectral.measurement.objective import CURVATURE_SAMPLES
from lightning_spectral.numerics.svd import top_singular_triplets

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


def gradients_of(model, batch, loss=cross_entropy):
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    parameters = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss(model, batch), [parameters[n] for n in names]), strict=True))


def first(batch, n):
    return tuple(x[:n] for x in batch)


@pytest.mark.parametrize(("samples", "curvature"), [(200, None), (200, 16), (120, 40), (64, 64)])
@pytest.mark.parametrize("make", [relu_mlp, gelu_mlp])
def test_directions_are_of_many_samples_and_curvature_of_the_first(make, samples, curvature):
    model, batch = make().double(), batch_of(200)
    report = measure_spectra(
        model, batch, cross_entropy, curvature="exact", top_k=4, gradient_samples=samples, max_samples=curvature
    )
    expected = gradients_of(model, first(batch, samples))
    directions = {name: top_singular_triplets(g, 4) for name, g in expected.items()}
    few = min(samples, curvature or CURVATURE_SAMPLES)
    h = directional_curvature(model, first(batch, few), directions, cross_entropy)
    for name, layer in report.layers.items():
        torch.testing.assert_close(layer.sigma, directions[name].sigma)
        torch.testing.assert_close(layer.h, h[name], rtol=1e-8, atol=1e-12)
    assert (report.n_samples, report.curvature_samples) == (samples, few)
    assert report.loss == pytest.approx(float(cross_entropy(model, first(batch, samples))))


@pytest.mark.parametrize(
    ("samples", "curvature", "largest"), [(400, 16, 16), (400, None, 50), (1600, None, 64), (96, 64, 12)]
)
def test_a_large_batch_takes_no_more_memory_than_its_curvature(samples, curvature, largest):
    """With a graph, the loss is computed of so many samples at most, and each part once."""
    graphs = []

    def seen(model, batch):
        loss = cross_entropy(model, batch)
        if loss.requires_grad:
            graphs.append(len(batch[0]))
        return loss

    model, batch = gelu_mlp().double(), batch_of(samples)
    options = {"gradient_samples": samples, "max_samples": curvature, "top_k": 3}
    report = measure_spectra(model, batch, seen, curvature="exact", **options)
    assert report.curvature_samples == (curvature or CURVATURE_SAMPLES)
    # Once to tell the parts' weights and once for the gradient; then the curvature.
    parts = math.ceil(samples / largest)
    assert [sum(graphs[:parts]), sum(graphs[parts : 2 * parts])] == [samples, samples]
    assert max(graphs[: 2 * parts]) == largest
    assert set(graphs[2 * parts :]) == {report.curvature_samples}
    assert all(math.isfinite(layer.gradient_noise.signal) for layer in report.layers.values())


def test_batches_of_a_loader_are_read_until_there_are_enough():
    model, (x, y) = relu_mlp().double(), batch_of(240)
    loader = DataLoader(TensorDataset(x, y), 48)
    report = measure_spectra(model, loader, cross_entropy, top_k=4, gradient_samples=100, max_samples=20)
    assert (report.n_samples, report.n_batches, report.curvature_samples) == (144, 3, 20)
    expected = gradients_of(model, (x[:144], y[:144]))
    for name, layer in report.layers.items():
        torch.testing.assert_close(layer.sigma, top_singular_triplets(expected[name], 4).sigma)


def test_n_batches_are_those_of_the_curvature():
    model, (x, y) = relu_mlp().double(), batch_of(240)
    loader = DataLoader(TensorDataset(x, y), 48)
    report = measure_spectra(model, loader, cross_entropy, top_k=4, n_batches=2, gradient_samples=200, max_samples=10)
    assert (report.n_samples, report.curvature_samples) == (240, 20)
    directions = {name: top_singular_triplets(g, 4) for name, g in gradients_of(model, (x, y)).items()}
    both = torch.cat([x[:10], x[48:58]]), torch.cat([y[:10], y[48:58]])
    h = directional_curvature(model, both, directions, cross_entropy)
    for name, layer in report.layers.items():
        torch.testing.assert_close(layer.h, h[name], rtol=1e-8, atol=1e-12)


def test_too_few_samples_are_all_taken_and_said():
    model, (x, y) = relu_mlp(), batch_of(96)
    loader = DataLoader(TensorDataset(x.float(), y), 48)
    report = measure_spectra(model, loader, cross_entropy, top_k=4, gradient_samples=1000)
    assert report.n_samples == 96
    assert "gradient_samples: 1000 were asked for, and there are 96" in report.warnings


def test_samples_that_cannot_be_counted_are_an_error_where_they_are_asked_for():
    model = relu_mlp()
    batches = [{"x": torch.randn(8, 6), "y": torch.randint(0, 5, (8,)), "weight": torch.ones(5)}] * 3
    loader = DataLoader(batches, batch_size=None)

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], batch["weight"])

    with pytest.raises(MeasurementError, match="gradient_samples: the tensors of the batch share no leading dimension"):
        measure_spectra(model, loader, loss, gradient_samples=16)
    report = measure_spectra(model, loader, loss, gradient_samples="auto", max_samples=4)
    assert (report.n_samples, report.curvature_samples) == (None, None)
    assert report.warnings[0] == "max_samples: a batch whose tensors share no leading dimension is measured whole"
    assert not any(
        "max_samples" in text for text in measure_spectra(model, loader, loss, gradient_samples="auto").warnings
    )


def test_a_loss_across_samples_keeps_its_batch_for_the_curvature():
    """Of 64 samples it would be another loss."""

    def contrastive(model, batch):
        z = F.normalize(model(batch[0]), dim=1)
        return F.cross_entropy(5 * z @ z.T, torch.arange(len(z)))

    model, batch = relu_mlp().double(), batch_of(150)
    report = measure_spectra(model, batch, contrastive, curvature="exact", top_k=3, gradient_samples=150)
    assert (report.n_samples, report.curvature_samples) == (150, 150)
    assert all(math.isnan(layer.gradient_noise.signal) for layer in report.layers.values())
    assert any(text.startswith("signal: the loss of the batch is no sum") for text in report.warnings)
    few = measure_spectra(model, batch, contrastive, curvature="exact", top_k=3, gradient_samples=150, max_samples=64)
    assert few.loss == report.loss
    assert few.curvature_samples == 64


@pytest.mark.parametrize("loss", [cross_entropy, summed])
def test_the_noise_is_that_of_single_samples(loss):
    """tr(Sigma) over 8 parts lies within their error of the variance of all samples' gradients."""
    model, batch = gelu_mlp().double(), batch_of(512)
    report = measure_spectra(model, batch, loss, top_k=4)
    singles = [gradients_of(model, tuple(x[i : i + 1] for x in batch)) for i in range(512)]
    for name, layer in report.layers.items():
        each = torch.stack([g[name] for g in singles]).flatten(1)
        mean = each.mean(0)
        trace = float(each.var(0).sum())
        noise = layer.gradient_noise
        assert noise.parts == 8
        expected = 1 - trace / 512 / float(mean @ mean)
        assert abs(noise.signal - expected) < 4 * noise.signal_stderr
        assert noise.noise_scale == pytest.approx(512 * (1 - noise.signal) / noise.signal)


def test_parts_of_one_sample_are_the_samples_themselves():
    model, batch = gelu_mlp().double(), batch_of(12)
    report = measure_spectra(model, batch, cross_entropy, top_k=4, micro_batch_size=1)
    singles = [gradients_of(model, tuple(x[i : i + 1] for x in batch)) for i in range(12)]
    for name, layer in report.layers.items():
        each = torch.stack([g[name] for g in singles]).flatten(1)
        mean = each.mean(0)
        expected = 1 - float(each.var(0).sum()) / 12 / float(mean @ mean)
        assert layer.gradient_noise.signal == pytest.approx(expected, abs=1e-9)


def test_two_sizes_agree_on_the_noise_scale():
    torch.manual_seed(0)
    model = relu_mlp().double()
    inputs = [batch_of(n, seed=n)[0] for n in (256, 1024)]
    reports = [measure_spectra(model, (x, x[:, :5].argmax(1)), cross_entropy, top_k=4) for x in inputs]
    for name in reports[0].layers:
        few, many = (report.layers[name].gradient_noise for report in reports)
        error = math.hypot(few.noise_scale_stderr, many.noise_scale_stderr)
        assert abs(few.noise_scale - many.noise_scale) < 4 * error
        assert few.signal < many.signal


def test_micro_batches_and_batches_are_parts_without_another_pass():
    model, calls = relu_mlp().double(), []

    def counted(model, batch):
        calls.append(len(batch[0]))
        return cross_entropy(model, batch)

    x, y = batch_of(96)
    measure_spectra(model, DataLoader(TensorDataset(x, y), 24), counted, curvature="ggn", top_k=3, n_batches=4)
    assert set(calls) == {24}
    calls.clear()
    measure_spectra(model, (x, y), counted, curvature="ggn", top_k=3)
    # The first part alone is held against its rows in the one pass.
    assert calls.count(12) == 1


def test_targets_that_do_not_count_leave_the_parts_their_weights():
    model, (x, y) = relu_mlp().double(), batch_of(64)
    labels = y.clone()
    labels[:32][torch.arange(32) % 2 > 0] = -100
    report = measure_spectra(model, (x, y, labels), ignoring, top_k=3)
    assert all(0 < layer.gradient_noise.parts <= 8 for layer in report.layers.values())
    assert not report.warnings


def test_batch_norm_in_train_mode_has_no_parts_and_several_batches_have():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    x, y = batch_of(96)
    alone = measure_spectra(model, (x.float(), y), cross_entropy, mode="train", top_k=3)
    assert all(math.isnan(layer.gradient_noise.signal) for layer in alone.layers.values())
    loader = DataLoader(TensorDataset(x.float(), y), 24)
    several = measure_spectra(model, loader, cross_entropy, mode="train", top_k=3, n_batches=4)
    assert all(layer.gradient_noise.parts == 4 for layer in several.layers.values())


def test_a_gradient_of_rounding_is_said_to_be_one():
    """Equal values leave softmax's gradient zero but for rounding, which is 1e-10 of the other layers'."""

    class EqualValues(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.place = nn.Parameter(torch.randn(6, 16), requires_grad=False)
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.cross, self.head = nn.Linear(6, 16), nn.Linear(16, 5)

        def forward(self, x):
            content = torch.zeros(len(x), 6, 16, dtype=x.dtype)
            weights = F.softmax(self.q(self.place + content) @ self.k(self.place + content).mT / 4, -1)
            z = weights @ self.v(content) + self.place
            return self.head(torch.tanh(z + self.cross(x)[:, None]).mean(1))

    x, y = batch_of(32)
    report = measure_spectra(EqualValues(), (x.float(), y), cross_entropy)
    for name in ("q.weight", "k.weight"):
        assert report.layers[name].note.startswith("its gradient is rounding: its largest singular value is ")
        assert math.isnan(report.layers[name].alpha.exponent)
        assert report.layers[name].h.isnan().all()
    assert not report.layers["head.weight"].note


def test_a_small_gradient_that_all_samples_share_is_measured():
    class Vanishing(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x):
            # Forward as it is, and its gradient 1e-9 times as large.
            z = self.first(x)
            return self.head(torch.tanh(1e-9 * z + ((1 - 1e-9) * z).detach()))

    batch = batch_of(256)[0].float() + 2, torch.zeros(256, dtype=torch.long)
    report = measure_spectra(Vanishing(), batch, cross_entropy, top_k=4)
    first = report.layers["first.weight"]
    assert float(first.sigma[0]) < 1e-7 * float(report.layers["head.weight"].sigma[0])
    assert first.gradient_noise.signal > 0.5
    assert "rounding" not in first.note


@pytest.mark.parametrize("options", [{"max_samples": 16}, {"max_samples": 16, "gradient_samples": 128}])
def test_a_loss_of_first_samples_without_targets_is_told_with_the_option_that_cuts_them(options):
    model, (x, y) = relu_mlp().double(), batch_of(128)
    batch = x, y, torch.where(torch.arange(128) < 20, -100, y)
    with pytest.raises(MeasurementError, match=r"the loss of a batch's first 16 samples is nan.*raise max_samples if"):
        measure_spectra(model, batch, ignoring, **options)
    assert measure_spectra(model, batch, ignoring, max_samples=64).curvature_samples == 64
    model[0].weight.data.fill_(math.nan)
    with pytest.raises(MeasurementError, match=r"^the loss is nan, so its gradient and curvature mean nothing$"):
        measure_spectra(model, batch, ignoring)


def test_the_number_of_samples_that_noise_asks_for():
    for scale in (1.0, 37.5, 200.0):
        samples = samples_for_aim(scale, 10**9)
        assert samples / (samples + scale) >= AIM > (samples - 1) / (samples - 1 + scale)
    assert samples_for_aim(1e6, 4096) == samples_for_aim(math.inf, 4096) == 4096
    assert samples_for_aim(math.nan, 4096) is None


def test_auto_reads_as_many_samples_as_the_noise_of_the_first_asks_for():
    torch.manual_seed(0)
    model, (x, y) = relu_mlp().double(), batch_of(4096)
    loader = DataLoader(TensorDataset(x, y), 64)
    first = measure_spectra(model, loader, cross_entropy, top_k=3)
    scales = sorted(layer.gradient_noise.noise_scale for layer in first.layers.values())
    report = measure_spectra(model, loader, cross_entropy, top_k=3, gradient_samples="auto", gradient_samples_max=2000)
    assert report.n_samples == 64 * math.ceil(samples_for_aim(scales[1], 2000) / 64)
    assert report.curvature_samples == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_samples": 0}, "gradient_samples must be None or a whole number of at least 1, or 'auto', got 0"),
        ({"gradient_samples": "many"}, "gradient_samples must be None or a whole number of at least 1"),
        ({"gradient_samples_max": 0}, "gradient_samples_max must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        measure_spectra(relu_mlp(), batch_of(8), cross_entropy, **options)
