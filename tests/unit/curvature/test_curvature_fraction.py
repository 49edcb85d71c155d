"""Traces of Hessian blocks by Hutchinson's estimator against dense Hessians, and the part of gradient directions."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, cross_entropy, mlp, vectors
from modules import ConvNet, ProbeRows, fit
from torch import nn
from traces import measured
from twins import dense_hessian, matrix_entries, second_derivative

from lightning_spectral import SpectralProbe, measure_spectra
from lightning_spectral.curvature.hessian_trace import HutchinsonTrace
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.measurement import estimation
from lightning_spectral.records.on_request import CurvatureFraction

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


class Products(nn.Module):
    """A stack of experts, a matrix of two views, a look-up, and a product with the parameter on the left."""

    def __init__(self):
        super().__init__()
        self.experts, self.left = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(5, 12))
        self.both, self.table = nn.Linear(4, 5), nn.Embedding(4, 5, padding_idx=1)

    def forward(self, x):
        y = torch.einsum("eio,bi->beo", self.experts, x).tanh()
        z = torch.cat([self.both(y[:, 0]), self.both(y[:, 1:].mean(1)), y[:, 2, :2] * 0.1], 1).tanh()
        return (self.left @ z.T).T + self.table((x[:, :3] * 10).long() % 4).sum(1).tanh()


OTHERS = [Case("products", Products, vectors, cross_entropy)]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def signs(shape, generator):
    return torch.empty(shape).bernoulli_(0.5, generator=generator).mul(2).sub(1).double()


def in_shape(layer, z, parameter):
    """Signs of the layer's matrix in the parameter's shape, entry by entry."""
    whole = torch.zeros(parameter.numel(), dtype=torch.float64)
    whole[matrix_entries(layer, parameter.shape).flatten()] = z.flatten()
    return whole.view(parameter.shape)


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=lambda case: case.name)
def test_draws_are_second_derivatives_along_signs_of_each_sample(case: Case):
    model, batch = case.build()
    train, samples = case.options.get("mode") == "train", len(batch[0])
    found = find_layers(model, layers=lambda layer: True, fused_qkv=case.options.get("fused_qkv", ())).layers
    if train:
        # Behind its BatchNorm samples do not interact, but its statistics are those of all of them.
        found = {"0.weight": found["0.weight"]}
    for name, layer in found.items():
        options = {"layers": lambda other, name=name: other.name == name, "micro_batch_size": samples}
        alone = measured(case, model, batch, 2, **options)
        parameter = model.get_parameter(layer.parameter)
        generator = torch.Generator().manual_seed(0)

        def along(part, z, layer=layer, parameter=parameter):
            direction = in_shape(layer, z, parameter)
            return second_derivative(model, part, case.loss, layer.parameter, direction, train=train)

        draws = []
        if train or layer.aliases:
            # Samples that interact, and a weight that is used twice, have one z for all samples.
            draws = [along(batch, signs(layer.shape, generator)) for _ in range(2)]
        else:
            pairs = [[signs((samples, size), generator) for size in layer.shape] for _ in range(3)][1:]
            for u, v in pairs:
                each = [along([t[b : b + 1] for t in batch], torch.outer(u[b], v[b])) for b in range(samples)]
                draws.append(sum(each) / samples)
        draws = torch.tensor(draws, dtype=torch.float64)
        fraction = alone.layers[name].fraction
        assert fraction.trace == pytest.approx(float(draws.mean()), rel=1e-8, abs=1e-12), name
        assert fraction.trace_stderr == pytest.approx(float(draws.std()) / math.sqrt(2), rel=1e-6, abs=1e-12)


def test_random_rank_one_directions_have_the_mean_curvature_of_the_trace():
    torch.manual_seed(0)
    hessian = torch.randn(12, 12, dtype=torch.float64)
    hessian = hessian @ hessian.T
    u, v = F.normalize(torch.randn(40_000, 3).double()), F.normalize(torch.randn(40_000, 4).double())
    directions = torch.einsum("bm,bn->bmn", u, v).flatten(1)
    curvature = torch.einsum("bi,ij,bj->b", directions, hessian, directions)
    error = curvature.std() / len(curvature) ** 0.5
    assert (curvature.mean() - hessian.trace() / 12).abs() < 4 * error


def test_pieces_of_the_same_samples_differ_in_their_signs(monkeypatch):
    case = next(case for case in CASES if case.name == "gpt_block_tied")
    model, batch = case.build()
    seen, trace = [], HutchinsonTrace.__call__

    def noted(self, problem, directions):
        seen.append(trace(self, problem, directions))
        return seen[-1]

    monkeypatch.setattr(HutchinsonTrace, "__call__", noted)
    twice = tuple(torch.cat([part, part]) for part in batch)
    measured(case, model, twice, 3, micro_batch_size=len(batch[0]))
    first, second = (part.h for part in seen)
    # Each layer, whether samples have signs of their own or, as in the tied head, one z for all.
    assert first.keys() == second.keys()
    assert len(first) > 3
    for name, draws in first.items():
        assert ((draws - second[name]).abs() > 1e-6 * draws.abs()).all(), name


@by_name
def test_signs_of_their_own_are_left_to_samples_that_do_not_interact(case: Case, monkeypatch):
    model, batch = case.build()
    names, whole = [], HutchinsonTrace._whole_batch_draws
    monkeypatch.setattr(
        HutchinsonTrace,
        "_whole_batch_draws",
        lambda self, problem, rest: (names.extend(rest), whole(self, problem, rest))[1],
    )
    report = measured(case, model, batch, 2)
    if case.options.get("mode") == "train":
        # Behind the BatchNorm samples do not interact.
        assert list(dict.fromkeys(names)) == ["0.weight"]
    else:
        assert list(dict.fromkeys(names)) == [
            name for name in report.layers if name in ("head.weight",) and "gpt" in case.name
        ]


def test_it_repeats_leaves_no_trace_and_does_not_change_the_rest():
    case = CASES[0]
    model, batch = case.build(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (measured(case, model, batch, 4) for _ in range(2))
    without = measured(case, model, batch, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, layer in first.layers.items():
        assert layer.fraction == second.layers[name].fraction
        assert torch.equal(layer.h, without.layers[name].h)
        assert without.layers[name].fraction is None


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Squares(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class Segments(nn.Module):
    """Sums of neighbours, by an operation whose backward has no derivative."""

    def forward(self, x):
        return torch.segment_reduce(x.tanh(), "sum", lengths=torch.full((len(x), 4), 2), axis=1)


@pytest.mark.parametrize(
    ("part", "inner", "why"),
    [(Squares, 8, "function Once has no second"), (Segments, 4, "segment_reduce has no second")],
)
def test_layers_without_second_derivatives_are_noted_and_do_not_stop_the_others(part, inner, why):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), part(), nn.Linear(inner, 8), nn.GELU(), nn.Linear(8, 5)).double()
    batch = torch.randn(24, 6).double(), torch.randint(0, 5, (24,))
    report = measure_spectra(model, batch, cross_entropy, curvature="ggn", top_k=3, curvature_fraction=100)
    first = report.layers["0.weight"]
    assert math.isfinite(first.alpha.exponent)
    assert math.isnan(first.fraction.trace)
    assert why in first.fraction.note
    assert any(text.startswith("curvature_fraction: 0.weight: ") and why in text for text in report.warnings)
    for name in ("2.weight", "4.weight"):
        fraction = report.layers[name].fraction
        trace = float(dense_hessian(model, batch, cross_entropy, name).trace())
        assert abs(fraction.trace - trace) < 4 * fraction.trace_stderr
        assert fraction.note == ""


@pytest.mark.parametrize("part", ["_per_sample_draws", "_draw"])
def test_out_of_memory_is_not_taken_for_a_missing_derivative(part, monkeypatch):
    case = next(case for case in CASES if case.name == "gpt_block_tied")
    model, batch = case.build()
    sizes, measure = [], getattr(HutchinsonTrace, part)

    def short(self, problem, *args):
        sizes.append(problem.samples)
        if problem.samples > 1:
            raise torch.OutOfMemoryError("out of memory")
        return measure(self, problem, *args)

    monkeypatch.setattr(HutchinsonTrace, part, short)
    # Batches as small as this one are not cut by themselves.
    monkeypatch.setattr(estimation, "SMALL_BYTES", 0)
    assert measured(case, model, batch, 2).micro_batch_size == 1
    assert sizes[0] > 1


def test_a_loss_that_cannot_be_called_again_keeps_its_curvatures():
    model, calls = mlp().double(), []
    batch = torch.randn(24, 6).double(), torch.randint(0, 5, (24,))

    def changes(m, b):
        calls.append(1)
        return cross_entropy(m, b) * len(calls)

    report = measure_spectra(model, batch, changes, curvature="exact", micro_batch_size=24, curvature_fraction=2)
    for layer in report.layers.values():
        assert math.isfinite(layer.alpha.exponent)
        assert math.isnan(layer.fraction.trace)
        assert "at a second call" in layer.fraction.note


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (2, 3), (0, 3)])
def test_a_pair_that_the_loss_ties_has_one_z_for_both(pair):
    """With signs of their own the trace of what ties them would be missing."""
    model, (i, j) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), pair
    case = Case("", lambda: model, None, lambda m, b: 3 * (m(b)[i] * m(b)[j]).sum() + m(b).pow(2).mean())
    batch = torch.randn(4, 4).double()
    for layer in measured(case, model, batch, 300).layers.values():
        block = dense_hessian(model, batch, case.loss, layer.name)
        assert abs(layer.fraction.trace - float(block.trace())) < 5 * layer.fraction.trace_stderr + 1e-9


def test_a_loss_linear_in_a_layer_has_no_trace():
    model = nn.Linear(4, 4, bias=False).double()
    report = measure_spectra(
        model, torch.randn(9, 4).double(), lambda m, x: m(x).sum(0) @ torch.arange(4.0).double(), curvature_fraction=2
    )
    fraction = report.layers["weight"].fraction
    assert (fraction.trace, fraction.trace_stderr) == (0.0, 0.0)
    assert math.isnan(fraction.value)
    assert "linear" in fraction.note


def test_a_layer_without_directions_is_missing():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.dead = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) + 0 * self.dead(x)

    report = measure_spectra(
        Dead(), torch.randn(9, 4), lambda m, x: m(x).square().mean(), curvature="exact", curvature_fraction=2
    )
    assert report.layers["used.weight"].fraction.trace > 0
    missing = report.layers["dead.weight"].fraction
    assert (missing.n_draws, missing.n_directions) == (0, 0)
    assert math.isnan(missing.value)
    assert "no direction above the noise floor: its gradient is zero" in missing.note


def test_errors_of_h_are_in_the_error_of_the_fraction():
    draws, h = torch.tensor([9.0, 11.0]), torch.tensor([4.0, 1.0, float("nan")])
    fraction = CurvatureFraction.of(draws, h, shape=(4, 5), h_stderr=torch.tensor([0.3, 0.4, 7.0]))
    assert fraction.n_directions == 2
    assert fraction.trace_stderr == pytest.approx(1.0)
    assert fraction.stderr == pytest.approx(math.hypot(0.5, 0.5 * 1.0) / 10)


def test_a_probe_logs_it_on_request():
    torch.manual_seed(0)
    logger = ProbeRows()
    probe = SpectralProbe(every_n_steps=2, top_k=4, curvature_fraction=2, weight_spectra=True, bootstrap=20)
    fit(ConvNet(), [probe], steps=1, logger=[logger])
    metrics = logger.rows[0][1]
    for key in ("curvature_fraction", "curvature_over_random", "s_weight", "gamma_weight"):
        assert math.isfinite(metrics[f"spectral/{key}_median"])
        assert math.isfinite(metrics[f"spectral/{key}/net.0.weight"])
    assert metrics["spectral/alpha_low/net.0.weight"] <= metrics["spectral/alpha_high/net.0.weight"]


def test_a_probe_that_fails_logs_what_was_asked_for_as_nan():
    logger, extras = ProbeRows(), {"curvature_fraction": 2, "weight_spectra": True}
    fit(ConvNet(), [SpectralProbe(every_n_steps=2, loss_fn=lambda m, b: None, **extras)], steps=1, logger=[logger])
    metrics = logger.rows[0][1]
    for key in ("curvature_fraction_median", "s_weight_median", "rank_margin_median", "rank_model/lognormal"):
        assert math.isnan(metrics[f"spectral/{key}"])
