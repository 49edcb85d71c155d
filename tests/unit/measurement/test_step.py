"""The step that was taken: closed forms, differences along it, dense Hessians, and what cannot be measured."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from identical import assert_identical
from steps import derivatives
from torch import nn

from lightning_spectral.errors import MeasurementError
from lightning_spectral.measurement import step as step_module
from lightning_spectral.measurement.step import Weights, measure_step
from lightning_spectral.options import Options
from lightning_spectral.records.log_keys import STEP_KEYS
from lightning_spectral.records.step import StepMeasurement

DOUBLE = {"precision": "float64", "top_k": 3}


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def batch_of(n=24, features=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (n,), generator=generator)


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5))


def stepped(module, batch, loss=cross_entropy, lr=0.3, optimizer=torch.optim.SGD):
    """Take a step of an optimizer, and return the weights before it and the state dict of them."""
    before, state = Weights.copied(module), copy.deepcopy(module.state_dict())
    taken = optimizer([p for p in module.parameters() if p.requires_grad], lr=lr)
    loss(module, batch).backward()
    taken.step()
    module.zero_grad()
    return before, state


def check(measured, module, state, loss, names=None, rel=1e-9):
    """Compare with second derivatives along the step; ``names`` are the parameters of the layers measured."""
    slope, matrix, before, after, parameters = derivatives(loss, module, state, module.state_dict())
    assert measured.slope == pytest.approx(slope, rel=rel)
    assert measured.curvature == pytest.approx(float(matrix.sum()), rel=rel)
    assert (measured.loss_before, measured.loss_after) == (pytest.approx(before), pytest.approx(after))
    rows = dict(zip(parameters, matrix.sum(1).tolist(), strict=True))
    for name in names or measured.layer_curvatures:
        assert measured.layer_curvatures[name] == pytest.approx(rows[name], rel=rel, abs=1e-12)
    # Rest: the parameters that are no measured layer.
    others = sum(value for name, value in rows.items() if name not in measured.layer_curvatures)
    assert measured.rest == pytest.approx(others / float(matrix.sum()), rel=1e-6, abs=1e-9)
    return rows


class Quadratic(nn.Module):
    """1/2 w^T A w - b^T w, with w in a matrix and a vector."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(2, dtype=torch.float64))
        root = torch.randn(14, 14, dtype=torch.float64)
        self.register_buffer("hessian", root @ root.T / 14)
        self.register_buffer("linear", torch.randn(14, dtype=torch.float64))

    def point(self):
        return torch.cat([self.matrix.flatten(), self.vector])

    def forward(self, batch):
        w = self.point()
        # The mean over samples of the batch is the quadratic itself.
        return (batch.mean() * (w @ self.hessian @ w / 2 - self.linear @ w)).reshape(())


def test_a_quadratic_in_closed_form():
    module = Quadratic()
    batch = torch.ones(4, 1, dtype=torch.float64)
    w = module.point().detach()
    gradient = module.hessian @ w - module.linear
    eta = 0.2
    before, _ = stepped(module, batch, lambda m, b: m(b), lr=eta)
    measured = measure_step(module, [batch], Options(**DOUBLE, layers=["matrix"]), lambda m, b: m(b), before=before)
    along = float(gradient @ module.hessian @ gradient)
    # Of a step -eta g: the best factor on it is |g|^2 / (eta g^T A g).
    assert measured.scale == pytest.approx(float(gradient @ gradient) / (eta * along), rel=1e-12)
    assert measured.predicted_change == pytest.approx(-eta * float(gradient @ gradient) + eta**2 * along / 2, rel=1e-12)
    # The model is the loss itself.
    assert measured.actual_change == pytest.approx(measured.predicted_change, rel=1e-12)
    product = module.hessian @ gradient
    share = float(gradient[:12] @ product[:12]) / along
    assert measured.shares == {"matrix": pytest.approx(share, rel=1e-12)}
    assert measured.rest == pytest.approx(1 - share, rel=1e-9)


def test_a_step_to_the_minimum_along_it_has_scale_one():
    module = Quadratic()
    batch = torch.ones(4, 1, dtype=torch.float64)
    before = Weights.copied(module)
    gradient = module.hessian @ module.point().detach() - module.linear
    best = float(gradient @ gradient) / float(gradient @ module.hessian @ gradient)
    for factor in (0.25, 1.0, 3.0):
        moved = dict(zip(("matrix", "vector"), (best * factor * gradient).split([12, 2]), strict=True))
        after = {name: value - moved[name].view_as(value) for name, value in before.parameters.items()}
        measured = measure_step(
            module, [batch], Options(**DOUBLE), lambda m, b: m(b), before=before, after=Weights(after, {})
        )
        assert measured.scale == pytest.approx(1 / factor, rel=1e-9)
        # Below 1/2 the loss rises.
        assert (measured.actual_change > 0) == (measured.scale < 0.5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_network_equals_its_dense_hessian_by_layer(optimizer):
    module, batch = network().double(), batch_of()
    before, state = stepped(module, batch, lr=0.05, optimizer=optimizer)
    measured = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    names, start = list(before.parameters), list(before.parameters.values())
    delta = [value.detach() - before.parameters[name] for name, value in module.named_parameters()]

    def at(*parameters):
        weights = dict(zip(names, parameters, strict=True))
        return F.cross_entropy(torch.func.functional_call(module, weights, batch[0]), batch[1])

    blocks = torch.autograd.functional.hessian(at, tuple(start))
    rows = [
        sum(
            float(d.flatten() @ block.reshape(d.numel(), -1) @ e.flatten()) for block, e in zip(row, delta, strict=True)
        )
        for d, row in zip(delta, blocks, strict=True)
    ]
    assert measured.curvature == pytest.approx(sum(rows), rel=1e-10)
    assert set(measured.shares) == {"0.weight", "3.weight", "5.weight"}
    for name, share in measured.shares.items():
        assert share == pytest.approx(rows[names.index(name)] / sum(rows), rel=1e-9)
    assert sum(measured.shares.values()) + measured.rest == pytest.approx(1.0)
    check(measured, module, state, lambda call: F.cross_entropy(call(batch[0]), batch[1]))


def test_differences_of_the_loss_along_the_step():
    module, batch = network().double(), batch_of()
    before, _ = stepped(module, batch, lr=1e-2)
    measured = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    after = {name: value.detach().clone() for name, value in module.named_parameters()}

    def at(t):
        moved = {name: value + t * (after[name] - value) for name, value in before.parameters.items()}
        return float(F.cross_entropy(torch.func.functional_call(module, moved, batch[0]), batch[1]))

    h = 0.1
    assert measured.slope == pytest.approx((at(h) - at(-h)) / (2 * h), rel=1e-5)
    assert measured.curvature == pytest.approx((at(h) - 2 * at(0) + at(-h)) / h**2, rel=1e-4)
    assert measured.actual_change == pytest.approx(at(1) - at(0), rel=1e-9)
    # The error of the quadratic model is of third order in the step.
    assert measured.predicted_change == pytest.approx(measured.actual_change, rel=1e-3)


def test_parts_of_fused_projections_stacks_and_convolutions_add_up():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 6, 3, groups=2)
            self.up = nn.ConvTranspose2d(6, 4, 2, bias=False)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            tokens = self.up(torch.tanh(self.conv(x))).flatten(2).transpose(1, 2)
            return self.head(torch.tanh(self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1))

    torch.manual_seed(1)
    module = Mixed().double()
    batch = torch.randn(8, 2, 5, 5, dtype=torch.float64), torch.randint(0, 3, (8,))
    before, state = stepped(module, batch)
    measured = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    slope, matrix, _, _, names = derivatives(
        lambda call: cross_entropy(call, batch), module, state, module.state_dict()
    )
    rows = dict(zip(names, matrix.sum(1).tolist(), strict=True))
    parts = [f"attention.in_proj_weight.{part}" for part in "qkv"]
    assert set(parts) < set(measured.layer_curvatures)
    assert sum(measured.layer_curvatures[part] for part in parts) == pytest.approx(rows["attention.in_proj_weight"])
    for name in ("conv.weight", "up.weight", "attention.out_proj.weight", "head.weight"):
        assert measured.layer_curvatures[name] == pytest.approx(rows[name], rel=1e-9)
    assert (measured.slope, measured.curvature) == (pytest.approx(slope), pytest.approx(float(matrix.sum())))


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 5}])
def test_several_batches_are_one_mean_over_their_samples(options):
    module, batches = network().double(), [batch_of(16), batch_of(8, seed=1)]
    joined = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    before, _ = stepped(module, joined)
    one = measure_step(module, [joined], Options(**DOUBLE), cross_entropy, before=before)
    several = measure_step(module, batches, Options(**DOUBLE, **options), cross_entropy, before=before)
    for field in ("slope", "curvature", "loss_before", "loss_after"):
        assert getattr(several, field) == pytest.approx(getattr(one, field), rel=1e-9)
    assert several.shares == pytest.approx(one.shares)


def test_samples_beyond_max_samples_do_not_count():
    module, batch = network().double(), batch_of()
    before, _ = stepped(module, batch)
    cut = measure_step(module, [batch], Options(**DOUBLE, max_samples=10), cross_entropy, before=before)
    first = measure_step(module, [tuple(part[:10] for part in batch)], Options(**DOUBLE), cross_entropy, before=before)
    assert cut == first
    assert cut.loss_before != measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before).loss_before


def test_a_large_batch_is_measured_in_two_parts(monkeypatch):
    module, batch = network().double(), batch_of()
    before, _ = stepped(module, batch)
    whole = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    sizes = []
    monkeypatch.setattr(step_module, "SMALL_BYTES", 0)
    monkeypatch.setattr("lightning_spectral.measurement.estimation.SMALL_BYTES", 0)
    real = step_module.StepProducts.__call__
    monkeypatch.setattr(
        step_module.StepProducts, "__call__", lambda self, loss, _: sizes.append(loss.samples) or real(self, loss, _)
    )
    halves = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    assert sizes == [12, 12]
    assert halves.curvature == pytest.approx(whole.curvature, rel=1e-9)
    assert halves.slope == pytest.approx(whole.slope, rel=1e-9)


def test_where_memory_runs_out_smaller_micro_batches_are_tried(monkeypatch):
    module, batch = network().double(), batch_of()
    before, _ = stepped(module, batch)
    whole = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    real = step_module.StepProducts.__call__

    def small_alone(self, loss, directions):
        if loss.samples > 12:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(self, loss, directions)

    monkeypatch.setattr(step_module.StepProducts, "__call__", small_alone)
    assert measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before).curvature == pytest.approx(
        whole.curvature, rel=1e-9
    )


def test_buffers_are_those_before_the_step_in_both_losses_and_the_model_is_not_written_to():
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()
    batch = batch_of()
    before, state = stepped(module, batch)
    assert not torch.equal(before.buffers["1.running_mean"], module[1].running_mean)
    held, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    measured = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    assert_identical(held, module.state_dict())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.parameters())
    module.eval()
    check(measured, module, state, lambda call: cross_entropy(call, batch))


def test_dropout_has_the_same_mask_before_and_after():
    module = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 5)).double()
    batch = batch_of()
    before, _ = stepped(module, batch, lr=1e-3)
    measured = measure_step(module, [batch], Options(**DOUBLE, mode="train"), cross_entropy, before=before)
    assert measured.actual_change == pytest.approx(measured.predicted_change, rel=1e-3)
    evaluated = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    assert measured.loss_before != evaluated.loss_before


def test_tied_weights_and_weights_of_one_storage():
    class Tied(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            if shared == "parameter":
                self.second.weight = self.first.weight
            elif shared == "storage":
                self.second.weight = nn.Parameter(self.first.weight.data)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    batch, results = batch_of(classes=6), {}
    for shared in ("parameter", "storage"):
        torch.manual_seed(0)
        module = Tied(shared).double()
        if shared == "storage":
            module.second.weight = nn.Parameter(module.first.weight.data)
        before = Weights.copied(module)
        with torch.no_grad():
            module.first.weight.mul_(1.1)
        results[shared] = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    # Two parameters of one storage move as one does that is used twice.
    assert results["storage"].curvature == pytest.approx(results["parameter"].curvature, rel=1e-10)
    assert results["storage"].slope == pytest.approx(results["parameter"].slope, rel=1e-10)
    assert results["storage"].loss_after == pytest.approx(results["parameter"].loss_after, rel=1e-12)
    assert results["parameter"].shares == pytest.approx({"first.weight": 1.0})
    assert sum(results["storage"].shares.values()) == pytest.approx(1.0)


def test_frozen_parameters_do_not_move_and_weights_in_half_precision_are_raised():
    module, batch = network().to(torch.bfloat16), batch_of()
    module[0].requires_grad_(False)
    half = batch[0].to(torch.bfloat16), batch[1]
    before, state = stepped(module, half)
    assert "0.weight" not in before.parameters
    measured = measure_step(module, [half], Options(top_k=3), cross_entropy, before=before)
    inputs = half[0].double()
    check(measured, module, state, lambda call: F.cross_entropy(call(inputs), half[1]), rel=1e-4)


def test_a_parameter_that_the_loss_does_not_depend_on_or_is_linear_in_has_no_curvature():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 4), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    module, batch = Loose().double(), batch_of()
    before = Weights.copied(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    measured = measure_step(module, [batch], Options(**DOUBLE), lambda m, b: m(b[0]).sum(1).mean(), before=before)
    assert (measured.curvature, measured.layer_curvatures) == (0.0, {"used.weight": 0.0, "unused.weight": 0.0})
    assert measured.slope == pytest.approx(measured.actual_change)
    assert math.isnan(measured.scale)
    assert all(math.isnan(share) for share in (*measured.shares.values(), measured.rest))


def test_negative_curvature_has_no_scale_and_shares_that_add_up():
    measured = StepMeasurement(-1.0, -2.0, {"a": -3.0, "b": 0.5}, 4.0, 3.0)
    assert math.isnan(measured.scale)
    assert measured.predicted_change == -2.0
    assert measured.shares == {"a": 1.5, "b": -0.25}
    assert measured.rest == -0.25
    scalars = measured.scalars(["b", "gone"])
    assert list(scalars) == [*STEP_KEYS, "step_curvature/b"]
    assert scalars["step_curvature/b"] == -0.25


def test_infinity_is_logged_as_nan():
    scalars = StepMeasurement(-1.0, 1.0, {}, 1.0, float("inf")).scalars()
    assert math.isnan(scalars["step/actual_change"])
    assert scalars["step/predicted_change"] == -0.5


class Once(torch.autograd.Function):
    """Its backward cuts the second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize(
    ("activation", "says"),
    [
        (lambda x: Once.apply(x), "custom autograd function Once"),
        (lambda x: torch.segment_reduce(x, "sum", lengths=torch.ones(len(x)).long()), "segment_reduce"),
    ],
)
def test_without_a_second_derivative_the_losses_are_still_known(activation, says):
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 5)

        def forward(self, x):
            return self.second(activation(self.first(x)))

    module, batch = Opaque().double(), batch_of()
    before, _ = stepped(module, batch, lr=1e-3)
    measured = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    assert all(math.isnan(value) for value in (measured.slope, measured.curvature, measured.scale))
    assert measured.actual_change < 0
    assert set(measured.layer_curvatures) == {"first.weight", "second.weight"}
    assert all(math.isnan(value) for value in measured.layer_curvatures.values())
    assert f"{says} has no second derivative" in measured.failed
    assert measured.failed.endswith("give a loss_fn without it, or set step=False")
    assert "layers=" not in measured.failed


class Unchecked(torch.autograd.Function):
    """Nothing tells whether its backward can be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


def test_a_custom_function_that_cannot_be_checked_is_noted():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.custom = nn.Linear(6, 8), nn.Linear(8, 5), True

        def forward(self, x):
            hidden = self.first(x)
            return self.second(Unchecked.apply(hidden) if self.custom else hidden.sin())

    module, batch = Custom().double(), batch_of()
    before, state = stepped(module, batch)
    measured = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    (note,) = measured.notes
    assert "Unchecked and holds only if that function's backward can itself be differentiated" in note
    module.custom = False
    check(measured, module, state, lambda call: cross_entropy(call, batch))


def test_weights_that_are_nan_after_the_step_give_nan():
    module, batch = network().double(), batch_of()
    before = Weights.copied(module)
    with torch.no_grad():
        module[0].weight.fill_(float("nan"))
    measured = measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=before)
    assert math.isnan(measured.actual_change)
    assert math.isnan(measured.predicted_change)
    assert measured.loss_before == pytest.approx(
        float(F.cross_entropy(torch.func.functional_call(module, before.parameters, batch[0]), batch[1]))
    )
    assert measured.failed.startswith("the weights after the step, or the products of the Hessian with it, are NaN")


def test_a_step_that_moves_nothing_is_refused_with_the_reasons_there_are():
    module, batch = network(), batch_of()
    with pytest.raises(MeasurementError, match="moved no parameter: its learning rate is 0, a GradScaler skipped"):
        measure_step(module, [batch], Options(**DOUBLE), cross_entropy, before=Weights.copied(module))


def test_a_parameter_that_changes_its_shape_or_goes_away_is_named():
    batch = batch_of()
    for change in (lambda m: setattr(m[5], "weight", nn.Parameter(torch.zeros(5, 9))), lambda m: m.pop(5)):
        module = network()
        before = Weights.copied(module)
        change(module)
        with pytest.raises(MeasurementError, match=r"5.weight, a trained parameter before the step, is not there"):
            measure_step(module, [batch], Options(top_k=3), cross_entropy, before=before)


def test_a_parameter_frozen_after_the_step_still_moved():
    module, batch = network().double(), batch_of()
    before, _ = stepped(module, batch)
    expected = measure_step(module, [batch], Options(**DOUBLE, layers=["3"]), cross_entropy, before=before)
    module[0].requires_grad_(False)
    frozen = measure_step(module, [batch], Options(**DOUBLE, layers=["3"]), cross_entropy, before=before)
    assert frozen == expected


def test_lazy_modules_have_no_weights_before():
    with pytest.raises(MeasurementError, match=r"0\.(weight|bias) is of a lazy module that has not seen a batch"):
        Weights.copied(nn.Sequential(nn.LazyLinear(4)))


def test_weights_kept_are_copies():
    module = network()
    kept = Weights.copied(module)
    with torch.no_grad():
        module[0].weight.zero_()
    assert kept.parameters["0.weight"].any()
    assert not Weights.of(module).parameters["0.weight"].any()


def test_parameters_in_shards_are_refused():
    class DTensor(torch.Tensor):
        """Known by its name, as PyTorch's is."""

    module, batch = network(), batch_of()
    before = Weights.copied(module)
    shards = {name: value.as_subclass(DTensor) for name, value in before.parameters.items()}
    with pytest.raises(MeasurementError, match=r"0.weight is in shards \(DTensor\), of which no rank holds the whole"):
        measure_step(module, [batch], Options(top_k=3), cross_entropy, before=Weights(shards, before.buffers))
