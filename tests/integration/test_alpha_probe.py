"""alpha="probe": what a probe measures becomes the exponent of each matrix, and nothing else changes."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import Attention, TiedLM, grouped, mlp
from modules import GPT, ConvNet, fit
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from trust import every_fit_trusted

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralWarning
from lightning_spectral.callbacks.alpha_transfer import probe_alpha_optimizers, warn_of_unmeasured, write_alphas
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.numerics.gradient_noise import GradientNoise
from lightning_spectral.optim.measured_alpha import MeasuredAlpha
from lightning_spectral.options import Options

LR = 1e-2


class Given(SpectralProbe):
    """Measures, and reports these exponents in place of its own, in turn for each probe."""

    def __init__(self, *alphas, r2=1.0, **options):
        super().__init__(**{"every_n_steps": 1, "top_k": 8, "log_layers": "all", **options})
        self.alphas, self.r2 = alphas, r2

    def _measure(self, *args):
        report = super()._measure(*args)
        alpha = self.alphas[min(self.probes, len(self.alphas) - 1)]
        layers = {
            name: replace(
                layer,
                alpha=replace(layer.alpha, exponent=alpha, r2=self.r2, stderr=0.0, n_used=8),
                alpha_theil_sen=alpha,
                gradient_noise=GradientNoise(signal=1.0),
            )
            for name, layer in report.layers.items()
        }
        return replace(report, layers=layers)


def trained(base, *callbacks, params=SpectralNewton.groups, steps=4, options=None, **trainer):
    """(module, its SpectralNewton) after training."""

    class Module(base):
        def configure_optimizers(self):
            return SpectralNewton(params(self), lr=LR, **({"alpha": "probe"} if options is None else options))

    torch.manual_seed(3)
    module = Module()
    trainer.setdefault("logger", DummyLogger())
    return module, fit(module, callbacks, steps=steps, **trainer).optimizers[0]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def averages(optimizer):
    return [a for group in optimizer.param_groups for of in group.get("alphas", ()) for a in of]


pytestmark = pytest.mark.filterwarnings("ignore:.*not measured, so their alpha.*")


@pytest.mark.filterwarnings("ignore:.*look like embeddings or heads:lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("base", [GPT, ConvNet])
@pytest.mark.parametrize("params", [SpectralNewton.groups, lambda m: m.named_parameters(), lambda m: m.parameters()])
def test_exponents_all_equal_give_the_optimizer_with_that_exponent(base, params):
    probe = Given(1.5, layers=lambda layer: True)
    module, optimizer = trained(base, probe, params=params)
    assert set(averages(optimizer)) == {1.5}
    expected, _ = trained(base, params=params, options={"alpha": 1.5})
    assert same(module, expected)


def test_before_the_first_measurement_it_is_the_default():
    module, optimizer = trained(GPT, Given(1.5, r2=0.5))
    assert set(averages(optimizer)) == {None}
    expected, _ = trained(GPT, options={})
    assert same(module, expected)


def test_real_measurements_reach_the_optimizer():
    probe = SpectralProbe(every_n_steps=2, layers=["block.*"])
    with every_fit_trusted():
        module, optimizer = trained(GPT, probe, options={"alpha": "probe"})
    (group,) = [group for group in optimizer.param_groups if group["name"] == "mlp_up"]
    (name,) = group["param_names"]
    first, second = (min(max(report.layers[name].alpha.exponent, 0.5), 2.0) for report in probe.history)
    assert first != second
    assert group["alphas"] == [[pytest.approx((first + second) / 2)]]
    assert optimizer.alpha_of(module.block.up.weight) == round((first + second) / 2, 1)


def test_average_and_clamp():
    weight = nn.Parameter(torch.ones(4, 4))
    options = {"alpha_range": (1.0, 2.2), "alpha_momentum": 0.75}
    optimizer = SpectralNewton([weight], alpha="probe", **options)
    seen = []
    for alpha in [math.nan, 1.4, 1.8, 7.0, 0.1, math.nan]:
        optimizer.set_alpha({weight: [MeasuredAlpha(alpha)]})
        seen += averages(optimizer)
    a = 0.75 * 1.4 + 0.25 * 1.8
    b = 0.75 * a + 0.25 * 2.2
    c = 0.75 * b + 0.25 * 1.0
    assert seen == [None, *[pytest.approx(x) for x in (1.4, a, b, c, c)]]


def test_matrices_of_one_shape_step_with_an_exponent_each():
    weights = [nn.Parameter(torch.randn(8, 12)) for _ in range(4)]
    alphas = [1.0, 1.46, 2.0, 1.46]
    together = SpectralNewton(weights, lr=LR, alpha="probe")
    together.set_alpha(dict(zip(weights, alphas, strict=True)))
    apart = [nn.Parameter(w.detach().clone()) for w in weights]
    optimizers = [SpectralNewton([w], lr=LR, alpha=round(a, 1)) for w, a in zip(apart, alphas, strict=True)]
    for weight, other in zip(weights, apart, strict=True):
        weight.grad = torch.randn(8, 12)
        other.grad = weight.grad.clone()
    for optimizer in (together, *optimizers):
        optimizer.step()
    for weight, other in zip(weights, apart, strict=True):
        torch.testing.assert_close(weight, other)


def written(model, params, fits, **options):
    """The optimizer of a model after these exponents of layers were measured."""
    optimizer = SpectralNewton(params(model), alpha="probe", alpha_range=(0.0, 9.0))
    layers = find_layers(model, **options).layers
    write_alphas([optimizer], model, layers, fits)
    return optimizer


def test_a_fused_projection_has_an_exponent_per_part():
    parts = {"block.qkv.weight.q": 1.0, "block.qkv.weight.k": 1.2, "block.qkv.weight.v": 1.7}
    model = TiedLM()
    optimizer = written(model, SpectralNewton.groups, parts, fused_qkv=["*.qkv"])
    assert optimizer.param_groups[0]["alphas"] == [[1.0, 1.2, 1.7]]
    assert optimizer.alpha_of(model.block.qkv.weight, (8, 16)) == 1.2
    assert optimizer.alpha_of(model.block.qkv.weight) == pytest.approx(1.3)
    optimizer = written(model, SpectralNewton.groups, {"block.qkv.weight": 1.5})
    assert optimizer.param_groups[0]["alphas"] == [[1.5, 1.5, 1.5]]
    optimizer = written(model, lambda m: m.named_parameters(), parts, fused_qkv=["*.qkv"])
    assert optimizer.param_groups[0]["alphas"][0] == [pytest.approx(1.3)]
    model = Attention()
    optimizer = written(model, SpectralNewton.groups, {"attn.in_proj_weight.v": 1.5})
    assert optimizer.param_groups[0]["alphas"] == [[None, None, 1.5]]


@pytest.mark.filterwarnings("ignore:.*look like embeddings or heads:lightning_spectral.errors.SpectralWarning")
def test_groups_of_a_convolution_share_one():
    model = grouped()
    fits = {"0.weight": 1.5, "2.weight": 1.1, "4.weight": 0.7, "7.weight": 1.0}
    optimizer = written(model, SpectralNewton.groups, fits)
    assert optimizer.param_groups[0]["alphas"] == [[1.5, 1.5], [0.7, 0.7]]
    optimizer = written(model, lambda m: m.parameters(), {"2.weight": 1.1, "4.weight": 0.7})
    assert averages(optimizer) == [None, 1.1, 0.7, None]


def test_a_tied_parameter_is_known_by_identity():
    model = TiedLM()
    optimizer = written(model, lambda m: m.parameters(), {"head.weight": 1.5})
    assert averages(optimizer)[0] == 1.5
    assert optimizer.alpha_of(model.tokens.weight) == 1.5


def test_exponents_of_others():
    model = mlp()
    optimizer = SpectralNewton(SpectralNewton.groups(model), alpha=1.37)
    assert optimizer.alpha_of(model[0].weight) == 1.37
    assert optimizer.alpha_of(model[0].bias) is None
    assert optimizer.alpha_of(nn.Parameter(torch.ones(3, 3))) is None


def test_optimizers_are_found_in_their_wrappers():
    own, plain = SpectralNewton(mlp().parameters(), alpha="probe"), SpectralNewton(mlp().parameters())
    wrapped = SimpleNamespace(optimizer=LightningOptimizer(own))
    others = [torch.optim.SGD(mlp().parameters(), lr=0.1), plain]
    assert probe_alpha_optimizers(SimpleNamespace(optimizers=[*others, wrapped])) == [own]


def test_matrices_that_the_probe_does_not_measure_are_named():
    model = TiedLM()
    optimizer = SpectralNewton(model.parameters(), alpha="probe")
    model.block.down.requires_grad_(False)
    told = []
    warn_of_unmeasured([optimizer], model, Options(layers=["block.*"]), told.append)
    assert [text.partition(" are not measured")[0] for text in told] == ["alpha='probe': tokens.weight"]
    with pytest.warns(SpectralWarning, match=r"alpha='probe': tokens.weight are not measured.*choose them with layers"):
        trained(GPT, Given(1.5), params=lambda m: m.parameters(), steps=1)


def test_without_a_probe_the_first_step_warns_once():
    with pytest.warns(SpectralWarning, match=r"nothing measures alpha.*alpha=2.*[Aa]dd SpectralProbe\(\)") as found:
        module, _ = trained(GPT, steps=3)
    assert len([w for w in found if issubclass(w.category, SpectralWarning)]) == 1
    assert same(module, trained(GPT, options={}, steps=3)[0])


def test_a_probe_that_is_off_leaves_the_warning():
    class NoLoss(GPT):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    with pytest.warns(SpectralWarning) as found:
        trained(NoLoss, SpectralProbe())
    texts = [str(w.message) for w in found]
    assert any("SpectralProbe is off" in text for text in texts)
    assert any("nothing measures alpha" in text for text in texts)


def test_a_later_first_probe_and_exponents_by_hand_do_not_warn():
    class Later(Given):
        def should_measure(self, step):
            return step == 2

    _, optimizer = trained(GPT, Later(1.5))
    assert set(averages(optimizer)) == {1.5}
    model = mlp()
    optimizer = SpectralNewton(model.parameters(), alpha="probe")
    optimizer.expect_alpha()
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_a_probe_that_fails_changes_nothing():
    def broken(module, batch):
        raise RuntimeError("no")

    probe = SpectralProbe(every_n_steps=1, loss_fn=broken)
    module, optimizer = trained(GPT, probe)
    assert probe.failed_probes == 4
    assert set(averages(optimizer)) == {None}
    assert same(module, trained(GPT, options={})[0])


@pytest.mark.parametrize("n_batches", [1, 3])
def test_accumulation(n_batches):
    probe = Given(1.1, 1.3, 1.9, n_batches=n_batches)
    batches = {"accumulate_grad_batches": 3, "batch_size": 22}
    module, optimizer = trained(GPT, probe, steps=3, **batches)
    assert probe.probes == 3
    assert averages(optimizer) == [pytest.approx((1.1 / 2 + 1.3 / 2) / 2 + 1.9 / 2)] * 6
    other = trained(GPT, Given(1.1, 1.3, 1.1, n_batches=n_batches), steps=3, **batches)[0]
    assert not same(module, other)  # the last measurement came before the last step


class Kept(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


@pytest.mark.parametrize("log_layers", ["all", "none", ["block.up"]])
def test_exponents_in_use_are_logged_with_the_layers_chosen(log_layers):
    logger = Kept()
    trained(GPT, Given(1.0, 1.5, log_layers=log_layers), logger=logger, steps=2)
    rows = [{k: v for k, v in row.items() if k.startswith("spectral_newton/")} for row in logger.rows]
    rows = [row for row in rows if row] or [{}, {}]
    layers = {"all": ["qkv", "proj", "up", "down"], "none": []}.get(str(log_layers), ["up"])
    names = [f"spectral_newton/alpha/block.{layer}.weight" for layer in layers]
    assert rows == [dict.fromkeys(names, 1.0), dict.fromkeys(names, pytest.approx(1.2))]
    logger = Kept()
    trained(GPT, Given(1.0), logger=logger, steps=1, options={"alpha": 1.0})
    assert not any(key.startswith("spectral_newton/") for row in logger.rows for key in row)


def test_saved_averages_go_on():
    model = mlp()
    optimizer = SpectralNewton(SpectralNewton.groups(model), alpha="probe", alpha_range=(0.5, 3.0))
    optimizer.set_alpha({model[0].weight: 1.23})
    before = optimizer.state_dict()
    kept = copy.deepcopy(before)
    saved = io.BytesIO()
    torch.save(before, saved)
    optimizer.set_alpha({model[0].weight: 1.9, model[2].weight: 0.7})
    assert before == kept
    saved.seek(0)
    other = SpectralNewton(SpectralNewton.groups(mlp()), alpha="probe")
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert averages(other) == [1.23, None]
    assert other.param_groups[0]["alpha_range"] == (0.5, 3.0)
    json.dumps(optimizer.state_dict()["param_groups"])
    assert averages(copy.deepcopy(optimizer)) == averages(optimizer)


class Resumable(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        data = torch.randn(32, 6, generator=generator), torch.randint(0, 5, (32,), generator=generator)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 32)

    def configure_optimizers(self):
        return SpectralNewton(SpectralNewton.groups(self), lr=0.05, alpha="probe")


@pytest.mark.parametrize("half_way", [3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, half_way):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def trainer(steps):
        probe = SpectralProbe(every_n_steps=2, top_k=4, gradient_samples=None)
        return pl.Trainer(max_steps=steps, max_epochs=-1, callbacks=[probe], enable_checkpointing=False, **quiet)

    whole, half, resumed = Resumable(), Resumable(), Resumable()
    half.load_state_dict(whole.state_dict())
    first, second, third = trainer(6), trainer(half_way), trainer(6)
    with every_fit_trusted():
        first.fit(whole)
        second.fit(half)
        second.save_checkpoint(tmp_path / "half.ckpt")
        third.fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert third.global_step == 6
    found = averages(first.optimizers[0])
    assert len({a for a in found if a is not None}) > 1
    assert averages(third.optimizers[0]) == found != averages(second.optimizers[0])
    assert same(whole, resumed)


def test_compiled_steps_take_new_exponents():
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = mlp()
        optimizer = SpectralNewton(model.parameters(), lr=LR, alpha="probe")
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for alpha in (1.0, 1.5, 2.0):
            optimizer.set_alpha(dict.fromkeys(model.parameters(), alpha))
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            step()
        results.append(model)
    for a, b in zip(*(model.parameters() for model in results), strict=True):
        torch.testing.assert_close(a, b)


MATRIX = nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_range": (2.0, 1.0)}, r"alpha_range must be two exponents, 0 <= low <= high, got \(2.0, 1.0\)"),
        ({"alpha_range": (1.0,)}, "alpha_range must be two exponents"),
        ({"alpha_momentum": 1.0}, r"alpha_momentum must lie in \[0, 1\), got 1.0"),
        ({"damping": -1.0}, "damping must be a finite number above 0"),
        ({"damping": "probe"}, "damping must be a number, 'noise' or 'auto', got 'probe'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralNewton([MATRIX], alpha="probe", **options)


def test_bad_calls():
    with pytest.raises(ValueError, match="set_alpha needs alpha='probe', and no group has it"):
        SpectralNewton([MATRIX]).set_alpha({MATRIX: 1.5})
    optimizer = SpectralNewton([MATRIX], alpha="probe")
    with pytest.raises(TypeError, match=r"takes parameters \(model.get_parameter\(name\)\) as keys, got '0.weight'"):
        optimizer.set_alpha({"0.weight": 1.5})
    optimizer.set_alpha({MATRIX: torch.tensor(1.5)})
    assert optimizer.alpha_of(MATRIX) == 1.5
    weight = nn.Parameter(torch.ones(6, 3))
    layouts = [{"input_first": 0, "rows": [3, 3]}]
    optimizer = SpectralNewton([{"params": [weight], "update": "spectral", "layouts": layouts}], alpha="probe")
    with pytest.raises(ValueError, match=r"rows \(6, 8\) hold none of the parameter's matrices, of 3, 3 rows"):
        optimizer.alpha_of(weight, (6, 8))


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_two_processes_step_with_the_same_exponents_or_with_none(world_of_two, tmp_path, failing):
    first, second = world_of_two.run("probe_trainers:train_with_measured_alpha", tmp_path, failing)
    assert first["weights"] == second["weights"]
    assert first["alphas"] == second["alphas"]
    assert any(a is not None for a in first["alphas"]) == (failing is None)
    assert first["measured"] == second["measured"]


def test_no_warning_is_left_over():
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpectralWarning)
        trained(GPT, Given(1.5, layers=["block.*"]))
