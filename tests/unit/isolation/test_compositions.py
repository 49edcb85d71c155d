"""Operations that torch differentiates wrongly, by finite differences, and measurements of losses that need them."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_spectral import SpectralWarning, measure_spectra
from lightning_spectral._torch_private import WEIGHT_NORM
from lightning_spectral.isolation import compositions
from lightning_spectral.isolation.compositions import RIGHT_SECOND, RIGHT_THIRD

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
LINEAR_CROSS_ENTROPY = compositions.LINEAR_CROSS_ENTROPY
STEP = 1e-3


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chunked(x, weight, bias):
    if LINEAR_CROSS_ENTROPY is None:
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return LINEAR_CROSS_ENTROPY(x, weight, torch.tensor([0, 2, 1]), linear_bias=bias, options=options)


STATISTICS = randn(4, seed=8), randn(4, seed=9).square() + 0.5
AFFINE = randn(4, seed=1), randn(4, seed=2)
OPERATIONS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), (randn(3, 4), *AFFINE), 3),
    "layer_norm_of_two": (lambda x: F.layer_norm(x, (3, 4), eps=0.1), (randn(2, 3, 4),), 3),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (randn(3, 4), *AFFINE), 3),
    "batch_norm_2d": (lambda x: F.batch_norm(x, None, None, training=True), (randn(2, 4, 2, 2),), 3),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (randn(2, 4, 3), *AFFINE), 3),
    "weight_norm": (lambda v, g: WEIGHT_NORM(v, g, 0), (randn(3, 4), randn(3, 1, seed=1)), 2),
    "weight_norm_dim_1": (lambda v, g: WEIGHT_NORM(v, g, 1), (randn(3, 4), randn(1, 4, seed=1)), 2),
    "linear_cross_entropy": (chunked, (randn(3, 4), randn(3, 4, seed=1), randn(3, seed=2)), 2),
}
"""Name -> the function, its arguments, and the first derivative that torch has wrong."""

RIGHT = {
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), (randn(3, 4), AFFINE[0])),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (randn(2, 4, 3), *AFFINE)),
    "batch_norm_in_eval_mode": (lambda x, w, b: F.batch_norm(x, *STATISTICS, w, b), (randn(3, 4), *AFFINE)),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), (randn(2, 4, 3),)),
    "normalize": (F.normalize, (randn(3, 4),)),
    "softmax": (lambda x: F.softmax(x, -1), (randn(3, 4),)),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.tensor([0, 2, 1])), (randn(3, 4),)),
    "binary_cross_entropy": (lambda x: F.binary_cross_entropy_with_logits(x, randn(3, 4, seed=1)), (randn(3, 4),)),
    "convolution": (lambda x, w: F.conv1d(x, w).square(), (randn(2, 3, 5), randn(2, 3, 2, seed=1))),
    **{name: (getattr(F, name), (randn(3, 4),)) for name in ("gelu", "silu", "softplus", "mish", "logsigmoid")},
}


def derivatives(function, arguments, orders, at=None):
    """Derivatives of a function along a direction each, from the first to that of the highest of these orders."""
    flat = torch.cat([a.flatten() for a in arguments]) if at is None else at
    flat = flat.detach().requires_grad_()
    parts = [part.view(a.shape) for part, a in zip(flat.split([a.numel() for a in arguments]), arguments, strict=True)]
    output = function(*parts)
    # Batch norm in eval mode is linear.
    value = (output.square() * randn(output.numel(), seed=3).view(output.shape)).sum()
    found = [float(value.detach())]
    for order in range(orders):
        (gradient,) = torch.autograd.grad(value, flat, create_graph=True)
        value = (gradient * randn(*flat.shape, seed=4 + order)).sum()
        found.append(float(value.detach()))
    return found


def is_right(function, arguments, order):
    """Whether a derivative is that of the one before, by finite differences."""
    flat = torch.cat([a.flatten() for a in arguments])
    direction = randn(*flat.shape, seed=3 + order)

    def before(t):
        return derivatives(function, arguments, order - 1, flat + t * direction)[-1]

    one, two = before(STEP) - before(-STEP), before(2 * STEP) - before(-2 * STEP)
    expected = (8 * one - two) / (12 * STEP)
    try:
        found = derivatives(function, arguments, order)[-1]
    except RuntimeError as error:
        # torch 2.14 refuses what was wrong before.
        if "does not support 3rd+ order derivatives" not in str(error):
            raise
        return False
    return found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def composed(function):
    """The function with compositions in the place of torch's."""
    mode = compositions_mode()

    def run(*arguments):
        with mode:
            return function(*arguments)

    return run


def compositions_mode():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return (RIGHT_SECOND | RIGHT_THIRD).get(func, func)(*args, **(kwargs or {}))

    return Mode()


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_torch_differentiates_wrongly_is_composed(name):
    function, arguments, wrong = OPERATIONS[name]
    assert not is_right(function, arguments, wrong), "torch has mended this: no composition is needed any more"
    assert is_right(function, arguments, wrong - 1)
    ours = composed(function)
    torch.testing.assert_close(ours(*arguments), function(*arguments))
    for order in range(1, 4):
        assert is_right(ours, arguments, order)


@pytest.mark.parametrize("name", RIGHT)
def test_what_torch_differentiates_rightly_is_left_alone(name):
    for order in range(1, 4):
        assert is_right(*RIGHT[name], order)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True, affine=True)])
@pytest.mark.parametrize("train", [True, False])
def test_compositions_keep_running_statistics(norm, train):
    norm, x = norm.double().train(train), randn(3, 4, 5)
    twin = copy.deepcopy(norm)
    expected = twin(x)
    with compositions_mode():
        found = norm(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(norm.state_dict(), twin.state_dict())


class ByHand(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        c = x - x.mean(self.dims, keepdim=True)
        return c / (c.square().mean(self.dims, keepdim=True) + 1e-5).sqrt()


class Normalized(nn.Module):
    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.norm, self.mid = nn.Linear(3, 8), norm, nn.Linear(8, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.mid(self.norm(torch.tanh(self.enter(x))))))


class Instances(nn.Module):
    def forward(self, x):
        return F.instance_norm(x.unsqueeze(-2)).squeeze(-2)


NORMS = {
    "layer": (lambda: nn.LayerNorm(8, elementwise_affine=False), -1),
    "batch": (lambda: nn.BatchNorm1d(8, affine=False, track_running_stats=False), 0),
    "instance": (Instances, -1),
}


def plain(model, batch):
    return (model(batch[0]) - batch[1][:, :1]).square().mean()


def by_grad(model, batch):
    x = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope - batch[1]).square().mean()


def by_backward(model, batch):
    x = batch[0].clone().requires_grad_()
    model(x).sum().backward(create_graph=True, inputs=[x])
    return (x.grad - batch[1]).square().mean()


def by_func(model, batch):
    return (torch.func.grad(lambda x: model(x).sum())(batch[0]) - batch[1]).square().mean()


def by_vmap(model, batch):
    return (torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(batch[0]) - batch[1]).square().mean()


def by_jvp(model, batch):
    _, slope = torch.func.jvp(model, (batch[0],), (torch.ones_like(batch[0]),))
    return (slope - batch[1]).square().mean()


def laplacian(model, batch):
    x = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    second = sum(torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(3))
    return (second - batch[1][:, 0]).square().mean()


def points(n=32):
    return randn(n, 3, seed=1), randn(n, 3, seed=2)


def curvature_of(report):
    return torch.cat([torch.cat([layer.sigma, layer.h]) for layer in report.layers.values()])


WRONG_IN_TRAINING = (
    "torch differentiates wrongly: what is measured is right, and the gradient that training uses is not"
)


@pytest.mark.parametrize(
    ("norm", "loss", "in_training"),
    [
        ("layer", by_grad, False),
        ("batch", by_grad, False),
        ("instance", by_grad, False),
        ("layer", by_backward, False),
        ("layer", by_func, False),
        ("layer", by_vmap, False),
        ("layer", by_jvp, True),
        ("batch", by_jvp, True),
        ("layer", laplacian, True),
        ("batch", laplacian, True),
    ],
)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_losses_that_hold_gradients_are_measured_as_their_twins(norm, loss, in_training):
    make, dims = NORMS[norm]
    options = {"curvature": "exact", "precision": "float64", "top_k": 4}
    found = measure_spectra(Normalized(make()), points(), loss, **options)
    expected = measure_spectra(Normalized(ByHand(dims)), points(), loss, **options)
    torch.testing.assert_close(curvature_of(found), curvature_of(expected), rtol=1e-8, atol=1e-10, equal_nan=True)
    assert any(WRONG_IN_TRAINING in note for note in found.warnings) == in_training


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_is_measured_as_its_twin(norm):
    class Scaled(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.v, self.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias
            self.g = nn.Parameter(self.v.detach().norm(dim=1, keepdim=True))

        def forward(self, x):
            return F.linear(x, self.v * self.g / self.v.square().sum(1, keepdim=True).sqrt(), self.bias)

    def net(first):
        torch.manual_seed(1)
        return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 3)).double()

    torch.manual_seed(0)
    layer = nn.Linear(5, 8)
    batch = randn(32, 5), torch.arange(32) % 3

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    for method in ("exact", "auto"):
        expected = measure_spectra(net(Scaled(layer)), batch, loss, curvature="exact", top_k=4)
        found = measure_spectra(net(norm(copy.deepcopy(layer))), batch, loss, curvature=method, top_k=4)
        close = {"rtol": 1e-8, "atol": 1e-10, "equal_nan": True}
        if method == "exact":
            torch.testing.assert_close(curvature_of(found), curvature_of(expected), **close)
        h = [report.layers[name].h for report, name in ((found, next(iter(found.layers))), (expected, "0.v"))]
        torch.testing.assert_close(*h, **close)


def test_a_linear_cross_entropy_in_chunks_is_measured_as_the_two_it_stands_for():
    if LINEAR_CROSS_ENTROPY is None:
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    batch = randn(32, 5), torch.arange(32) % 4
    options = nn.LinearCrossEntropyOptions()

    def in_chunks(model, batch):
        hidden, head = model[:2](batch[0]), model[2]
        return LINEAR_CROSS_ENTROPY(hidden, head.weight, batch[1], linear_bias=head.bias, options=options)

    def whole(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    for method in ("exact", "auto"):
        found = measure_spectra(model, batch, in_chunks, curvature=method, top_k=3)
        expected = measure_spectra(model, batch, whole, curvature=method, top_k=3)
        torch.testing.assert_close(curvature_of(found), curvature_of(expected), equal_nan=True)
        assert found.chosen == expected.chosen


@pytest.mark.parametrize("options", [{"gradient_samples": 256}, {"micro_batch_size": 32}])
def test_a_loss_that_holds_gradients_is_cut(options):
    found = measure_spectra(Normalized(nn.LayerNorm(8)), points(96), by_grad, top_k=4, curvature="exact", **options)
    assert all(bool(layer.sigma.isfinite().any()) for layer in found.layers.values())
    assert found.curvature_samples == (64 if "gradient_samples" in options else 96)


def test_other_losses_keep_torchs_operations():
    with mock.patch.dict(RIGHT_THIRD, {F.layer_norm: None}):
        measure_spectra(Normalized(nn.LayerNorm(8)), points(), plain, top_k=3)
        with pytest.raises(TypeError, match="not callable"):
            measure_spectra(Normalized(nn.LayerNorm(8)), points(), by_grad, top_k=3)


class Again(nn.Module):
    """Computes its activations again in the backward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("make", "loss"),
    [(lambda: nn.LayerNorm(8), by_grad), (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), plain)],
)
def test_what_is_computed_again_is_composed_again(make, loss):
    def net(wrap):
        torch.manual_seed(0)
        return Normalized(wrap(make()))

    options = {"curvature": "exact", "top_k": 4, "precision": "float64"}
    found = measure_spectra(net(Again), points(), loss, **options)
    expected = measure_spectra(net(lambda inner: inner), points(), loss, **options)
    assert all(layer.h[0].isfinite() for layer in expected.layers.values())
    torch.testing.assert_close(curvature_of(found), curvature_of(expected), equal_nan=True)


def test_what_cannot_be_replaced_is_told():
    class Native(nn.Module):
        def forward(self, x):
            return torch.native_layer_norm(x, (8,), None, None, 1e-5)[0]

    with pytest.warns(SpectralWarning, match="passes a derivative of layer_norm that torch computes wrongly, where it"):
        measure_spectra(Normalized(Native()), points(), by_grad, top_k=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("composed", "fused", "options"),
    [
        (compositions.layer_norm, F.layer_norm, {"normalized_shape": (64,)}),
        (compositions.batch_norm, F.batch_norm, {"running_mean": None, "running_var": None, "training": True}),
        (compositions.instance_norm, F.instance_norm, {}),
    ],
)
def test_compositions_take_half_precision_as_the_fused_norms_do(composed, fused, options, dtype):
    x = (400 * torch.randn(8, 4, 64, generator=torch.Generator().manual_seed(0)) + 300).to(dtype)
    ours, theirs = composed(x, **options), fused(x, **options)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(
        ours.float(), theirs.float(), atol=4 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps
    )
