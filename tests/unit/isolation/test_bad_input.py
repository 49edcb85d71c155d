"""What cannot be measured: a clear error from `measure_spectra`, one warning and NaN from a probe."""

from __future__ import annotations

import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from modules import ProbeRows, fit
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_spectral import (
    MeasurementError,
    SecondDerivativeError,
    SpectralNewton,
    SpectralProbe,
    SpectralWarning,
    measure_spectra,
)
from lightning_spectral.plan import plan_spectra

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def net(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5), *extra)


def square(model, x):
    return model(x).square().mean()


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class FusedKernel(Once):
    """A backward outside autograd, as a fused kernel's is, without saying so."""

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad.detach() * ctx.saved_tensors[0].detach()


class FusedLoss(torch.autograd.Function):
    """A mean square that computes its gradient in the forward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x / x.numel())
        return x.square().mean()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class Scale(torch.autograd.Function):
    """A linear function of its own, whose second derivative is zero and right."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Residual(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        y = self.first(x)
        return self.last(y + self.function.apply(y))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(10, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.bag(x.abs().mul(5).long().clamp(max=9)))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.last(F.gelu(checkpoint(self.inner, self.first(x), use_reentrant=True)))


def ctc(model, x):
    log_p = model(x).reshape(8, 4, 5).log_softmax(-1)
    return F.ctc_loss(log_p, torch.ones(4, 2, dtype=torch.long), torch.full((4,), 8), torch.full((4,), 2))


def ctc_of_each_sample(model, x):
    ones = torch.ones(len(x), dtype=torch.long)
    return F.ctc_loss(model(x).log_softmax(-1)[None], ones[:, None], ones, ones)


def nan_gradient(model, x):
    return square(lambda y: NaNGradient.apply(model(y)), x)


# name: model, loss, options, error of measure_spectra, what its message says, what the probe's warning says besides
NOTHING_MEASURED = {
    "not_a_tensor": (net, lambda m, x: 1.0, {}, MeasurementError, "loss_fn must return a scalar tensor, got float$"),
    "not_scalar": (net, lambda m, x: m(x), {}, MeasurementError, r"loss_fn must .*, got shape \(32, 5\); reduce it"),
    "nan": (net, lambda m, x: square(m, x) * float("nan"), {}, MeasurementError, "the loss is nan"),
    "infinite": (net, lambda m, x: square(m, x) * float("inf"), {}, MeasurementError, "the loss is inf"),
    "detached": (net, lambda m, x: square(m, x).detach(), {}, MeasurementError, "a loss without a gradient"),
    "nan_gradient": (net, nan_gradient, {}, MeasurementError, "0.weight: .* 48 of 48 entries are NaN or infinite"),
    "ctc": (
        net, ctc, {}, SecondDerivativeError,
        "0.weight, 2.weight: ctc_loss has no second derivative .*layers=.* loss_fn",
    ),
    "ctc_by_columns": (
        net, ctc_of_each_sample, {"curvature": "ggn"}, SecondDerivativeError,
        "ctc_loss has no second derivative .*layers=.* loss_fn",
    ),
    "custom_loss": (
        lambda: nn.Sequential(nn.Linear(6, 5)), lambda m, x: Once.apply(m(x)).mean(), {}, SecondDerivativeError,
        "custom autograd function Once has no second derivative",
    ),
    "kernel_loss": (
        lambda: nn.Sequential(nn.Linear(6, 5)), lambda m, x: FusedKernel.apply(m(x)).mean(), {}, SecondDerivativeError,
        "custom autograd function FusedKernel has no second derivative",
    ),
    "list_of_samples": (
        net, lambda m, b: square(m, torch.stack(b)), {"max_samples": 4, "batch": list(X)}, MeasurementError,
        "max_samples: the batch, a list of 32, keeps its samples apart by other means",
    ),
    "fused_loss": (
        net, lambda m, x: FusedLoss.apply(m(x)), {}, SecondDerivativeError,
        "custom autograd function FusedLoss has no second derivative",
    ),
    "closure": (
        net, lambda m, x: square(net(), x), {}, MeasurementError,
        "0.weight, 2.weight: the loss of loss_fn does not depend on it: it must use the module it is given",
    ),
    "batch": (
        net, lambda m, b: square(m, b[0]), {"max_samples": 4, "batch": (X, torch.ones(7))}, MeasurementError,
        r"max_samples: the batch cannot be cut .*\(found batch\[0\]: 32, batch\[1\]: 7\); set max_samples=None",
    ),
    "error_in_the_loss": (net, lambda m, x: m(x[:, :3]).sum(), {}, RuntimeError, "mat1 and mat2 shapes"),
}  # fmt: skip

# name: model, loss, options, layers that fail, what is said of the first of them
SOME_MEASURED = {
    "embedding_bag": (Bag, square, {"layers": "*"}, ["bag.weight"], r"embedding_bag(_dense)? has no second derivative"),
    "reentrant": (
        Checkpointed, square, {}, ["first.weight", "inner.weight"], "reentrant checkpointing .*use_reentrant=False",
    ),
    "once_differentiable": (
        lambda: Residual(Once), square, {}, ["first.weight"], "custom autograd function Once has no second",
    ),
    "fused_kernel": (
        lambda: Residual(FusedKernel), square, {}, ["first.weight"], "custom autograd function FusedKernel has no",
    ),
    "few_directions": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), square, {"layers": "*"}, ["2.weight"],
        "too few directions above the noise floor with h > 0: a fit of alpha needs 3",
    ),
    "zero_gradient": (
        lambda: nn.ModuleDict({"used": nn.Linear(6, 5), "dead": nn.Linear(6, 5)}),
        lambda m, x: square(m["used"], x) + 0 * square(m["dead"], x), {}, ["dead.weight"],
        "no direction above the noise floor: its gradient is zero",
    ),
    "unused": (
        lambda: nn.ModuleDict({"used": nn.Linear(6, 5), "idle": nn.Linear(6, 5)}),
        lambda m, x: square(m["used"], x), {}, ["idle.weight"], "does not depend on it: .*no_grad",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING_MEASURED)
def test_error_where_nothing_can_be_measured(name):
    model, loss, options, error, message = NOTHING_MEASURED[name]
    options = dict(options)
    with pytest.raises(error, match=message):
        measure_spectra(model(), options.pop("batch", X), loss, **options)


@pytest.mark.parametrize("name", SOME_MEASURED)
def test_warning_where_some_layers_cannot_be_measured(name):
    model, loss, options, failing, message = SOME_MEASURED[name]
    with pytest.warns(SpectralWarning) as caught:
        report = measure_spectra(model(), X, loss, **options)
    assert list(report.failed) == failing
    assert [str(w.message).split(":")[0] for w in caught] == failing
    assert caught[0].message.args[0].startswith(f"{failing[0]}: ")
    with pytest.warns(SpectralWarning, match=message):
        warnings.warn(report.failed[failing[0]], SpectralWarning, stacklevel=1)
    for name, layer in report.layers.items():
        assert math.isnan(layer.alpha.exponent) == (name in failing)


class Idle(nn.Module):
    """A network with a loss of its own by any of the names, and a layer that it does not use."""

    def __init__(self, loss):
        super().__init__()
        self.used, self.idle, self.loss = nn.Linear(6, 5), nn.Linear(6, 5), loss


class WithStep(Idle):
    def training_step(self, batch, batch_idx):
        return self.loss(self.used(batch))


class WithLoss(Idle):
    def spectral_loss(self, batch):
        return self.loss(self.used(batch))


NAMED_LOSSES = {
    "loss_fn": (Idle, lambda m, x: m.loss(m.used(x))),
    "WithStep.training_step": (WithStep, None),
    "WithLoss.spectral_loss": (WithLoss, None),
}
RESULTS = {
    "none": (lambda y: None, "{name} returned None, so there is no loss of this batch"),
    "a_number": (lambda y: 1.0, "{name} must return a scalar tensor, got float"),
    "a_vector": (lambda y: y, r"{name} must return a scalar, got shape \(32, 5\); reduce it with .mean()"),
    "detached": (
        lambda y: y.sum().detach(),
        "{name} returned a loss without a gradient: it was",
    ),
}


@pytest.mark.parametrize("name", NAMED_LOSSES)
@pytest.mark.parametrize("result", RESULTS)
def test_a_loss_is_called_what_its_author_calls_it(name, result):
    make, loss_fn = NAMED_LOSSES[name]
    loss, message = RESULTS[result]
    with pytest.raises(MeasurementError, match=message.format(name=name)) as caught:
        measure_spectra(make(loss), X, loss_fn)
    # No one without a loss_fn is told what theirs must do, and no one with one to give one.
    assert ("not from the module it is given" in str(caught.value)) == (result == "detached" and name == "loss_fn")
    assert ("pass loss_fn" in str(caught.value)) == (result == "a_number" and name != "loss_fn")


@pytest.mark.parametrize("name", NAMED_LOSSES)
def test_a_layer_that_no_loss_reaches_is_told_of_the_loss_there_is(name):
    make, loss_fn = NAMED_LOSSES[name]
    with pytest.warns(SpectralWarning, match=f"^idle.weight: the loss of {name} does not depend on it") as caught:
        measure_spectra(make(lambda y: y.square().mean()), X, loss_fn, layers="*")
    assert ("must use the module it is given" in str(caught[0].message)) == (name == "loss_fn")


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_a_linear_custom_function_is_no_obstacle():
    model = net()
    plain = measure_spectra(model, X, lambda m, x: 2 * square(lambda y: 2 * m(y), x), curvature="exact")
    custom = measure_spectra(model, X, lambda m, x: Scale.apply(square(lambda y: Scale.apply(m(y)), x)))
    for name, layer in plain.layers.items():
        torch.testing.assert_close(custom.layers[name].h, layer.h, equal_nan=True)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.ReLU(), {}, "ReLU has no matrix to measure"),
        (net(), {"top_k": 2}, "that a fit needs, got 2"),
        (
            net(),
            {"top_k": 2.5},
            "top_k must be a whole number of at least 3, the points that a fit needs",
        ),
        (net(), {"max_samples": 0}, "max_samples must be None or a whole number of at least 1, got 0"),
        (net(), {"curvature": "lanczos"}, "curvature must be one of 'auto', 'exact', 'ggn', 'sketch', got 'lanczos'"),
        (net(), {"mode": "test"}, "mode must be one of 'eval', 'train', got 'test'"),
        (net(), {"precision": "16"}, "precision must be one of 'float32', 'float64', got '16'"),
        (
            net(),
            {"spectrum_top_k": 19},
            "spectrum_top_k must be None or .* at least 20, which is top_k, got 19",
        ),
        (
            net(),
            {"bootstrap": 1},
            "bootstrap must be None or a whole number of at least 2, random draws, or 0 for none, got 1",
        ),
        (
            net(),
            {"curvature_fraction": 2.5},
            "curvature_fraction must be None or a whole .* at least 2, .* got 2.5",
        ),
        (net(), {"weight_spectra": 20}, "weight_spectra must be True or False, got 20"),
        (net(), {"layers": "conv*"}, r"layers: 'conv\*' matches no layer; the layers are 0.weight, 2.weight"),
        (net(), {"layers": lambda layer: False}, "no layer is left to measure .0.weight: not selected"),
        (net(), {"loss_fn": None}, "Sequential has no training_step, so its loss is not known; pass loss_fn"),
        (net(), {"loss_fn": "mse"}, "loss_fn must be a callable .* got 'mse'"),
    ],
)
def test_options_and_models_out_of_range(model, options, message):
    options = {"loss_fn": square, **options}
    with pytest.raises(ValueError, match=message):
        measure_spectra(model, X, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1, got 0"),
        ({"every_n_steps": True}, "every_n_steps must be a whole number"),
        ({"history_size": -1}, "history_size must be a whole number"),
        ({"top_k": 0}, "top_k"),
        ({"curvature": "lanczos"}, "curvature must be one of"),
        ({"mode": "test"}, "mode"),
        ({"precision": "half"}, "precision"),
        ({"max_samples": -3}, "max_samples"),
        ({"spectrum_top_k": 5}, "spectrum_top_k"),
        ({"curvature_fraction": True}, "curvature_fraction"),
        ({"kinds": {"*": "convolution"}}, "no kind of layer"),
        ({"log_layers": 5}, "log_layers takes glob patterns, got 5"),
        ({"log_layers": None}, "log_layers takes glob patterns, got None"),
        ({"layers": 3}, "layers takes glob patterns, got 3"),
        ({"fused_qkv": [3]}, r"fused_qkv takes glob patterns, got \[3\]"),
        ({"loss_fn": "mse"}, "loss_fn must be a callable .* got 'mse'"),
        ({"prefix": "/a"}, "prefix must be a name"),
        ({"prefix": ""}, "prefix must be a name"),
        ({"prefix": "../a"}, "prefix must be a name"),
        ({"prefix": "a/./b"}, "prefix must be a name"),
        ({"prefix": "a\\..\\b"}, "prefix must be a name"),
        ({"prefix": "a//b"}, "prefix must be a name"),
    ],
)
def test_probe_options_raise_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralProbe(**options)


class Wrapped(pl.LightningModule):
    """Trains on a loss of its own, whatever the probe is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def training_step(self, batch, batch_idx):
        return sum(p.square().sum() for p in self.inner.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def probe_while_training(model, loss, options):
    options = dict(options)
    data = TensorDataset(X) if "batch" not in options else Ragged(*options.pop("batch"))
    probe = SpectralProbe(every_n_steps=1, loss_fn=lambda m, b: loss(m.inner, b), **options)
    logger, module = ProbeRows(), Wrapped(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [probe], steps=3, logger=logger, data=data, batch_size=None)
    assert trainer.global_step == 3
    assert [step for step, _ in logger.rows] == [0, 1, 2]
    told = [str(w.message) for w in caught if issubclass(w.category, SpectralWarning)]
    # Of a probe that measures something, the step is told apart where it has no second derivative.
    of_steps = [text for text in told if text.startswith("the optimizer's step")]
    assert len(logger.steps) == len(logger.rows) - probe.failed_probes
    for _, row in logger.steps:
        assert math.isnan(row["spectral/step/predicted_change"]) == bool(of_steps)
    return probe, logger.rows, [text for text in told if text not in of_steps]


class Ragged(torch.utils.data.Dataset):
    """Hands out one and the same batch."""

    def __init__(self, *batch):
        self.batch = batch

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.batch


class Whole(Ragged):
    def __getitem__(self, i):
        return self.batch[0]


@pytest.mark.parametrize("name", NOTHING_MEASURED)
def test_probe_goes_on_where_nothing_can_be_measured(name, monkeypatch):
    model, loss, options, _, message = NOTHING_MEASURED[name]
    monkeypatch.setitem(globals(), "TensorDataset", Whole)
    probe, rows, told = probe_while_training(model(), loss, options)
    assert (probe.probes, probe.failed_probes, probe.last_report) == (3, 3, None)
    assert len(told) == 1
    with pytest.warns(SpectralWarning, match=message.replace("0.weight, 2", "inner.0.weight, inner.2")):
        warnings.warn(told[0], SpectralWarning, stacklevel=1)
    for i, (_, metrics) in enumerate(rows):
        assert math.isnan(metrics["spectral/alpha_median"])
        assert metrics["spectral/failed_probes"] == i + 1


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("name", SOME_MEASURED)
def test_probe_logs_nan_and_a_count_where_some_layers_cannot_be_measured(name, monkeypatch):
    model, loss, options, failing, message = SOME_MEASURED[name]
    monkeypatch.setitem(globals(), "TensorDataset", Whole)
    probe, rows, told = probe_while_training(model(), loss, options)
    assert probe.failed_probes == 0
    assert [text.split(":")[0] for text in told] == [f"inner.{layer}" for layer in failing]
    with pytest.warns(SpectralWarning, match=message):
        warnings.warn(told[0], SpectralWarning, stacklevel=1)
    for _, metrics in rows:
        assert metrics["spectral/layers_failed"] == len(failing)
        for layer in failing:
            assert math.isnan(metrics[f"spectral/alpha/inner.{layer}"])
        assert not math.isnan(metrics["spectral/alpha_median"])


class SavedIntermediate(torch.autograd.Function):
    """x^3 whose backward uses a value saved in the forward pass: right once, wrong twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(3 * x.square())
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


def test_curvature_that_relies_on_a_custom_backward_is_told():
    with pytest.warns(SpectralWarning, match="first.weight: its curvature passes the custom autograd function Saved"):
        report = measure_spectra(Residual(SavedIntermediate), X, square)
    assert any("which was not checked" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("loss_fn", "batch"),
    [(F.cross_entropy, X), (nn.MSELoss(), (X, X)), (lambda m, x, y: m(x).sum(), X), (lambda m, b: m(b.x).sum(), [])],
)
def test_a_loss_that_fails_says_what_it_was_given(loss_fn, batch):
    with pytest.raises((TypeError, AttributeError)) as caught:
        measure_spectra(net(), batch, loss_fn)
    assert caught.value.__notes__ == [f"loss_fn(model, batch) got a Sequential and a {type(batch).__name__}"]


def test_a_probe_whose_loss_fails_says_what_it_was_given():
    probe = SpectralProbe(every_n_steps=1, loss_fn=F.cross_entropy)
    with pytest.warns(
        SpectralWarning, match=r"must be Tensor, not Wrapped; loss_fn\(model, batch\) got a Wrapped and a"
    ):
        trainer = fit(Wrapped(net()), [probe], steps=2, data=Whole(X), batch_size=None)
    assert (trainer.global_step, probe.failed_probes) == (2, 2)


@pytest.mark.parametrize("function", [measure_spectra, plan_spectra, lambda model, *_: SpectralNewton.groups(model)])
def test_what_is_no_module_is_named(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        function([X], net(), square)


def test_probe_of_a_module_without_matrices():
    probe = SpectralProbe(every_n_steps=1, loss_fn=square)
    with pytest.warns(SpectralWarning, match="no matrix to measure"):
        trainer = fit(Wrapped(nn.LayerNorm(6)), [probe], steps=2, data=Whole(X), batch_size=None)
    assert (trainer.global_step, probe.failed_probes) == (2, 2)


def test_probe_pattern_that_matches_nothing_is_told_before_the_first_step():
    probe = SpectralProbe(layers="conv*", loss_fn=square)
    module = Wrapped(net())
    before = module.inner[0].weight.clone()
    with pytest.raises(ValueError, match=r"layers: 'conv\*' matches no layer; the layers are inner.0.weight"):
        fit(module, [probe], steps=2, data=Whole(X), batch_size=None)
    assert torch.equal(before, module.inner[0].weight)
