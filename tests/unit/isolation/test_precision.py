"""Networks, data and losses in several precisions: measured as their twins in one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_spectral import MeasurementError, measure_spectra
from lightning_spectral.isolation.operations import grouped_product, in_one_precision
from lightning_spectral.isolation.sandbox import copy_batch, isolated

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

LOWERED = [(torch.bfloat16, "float32"), (torch.float16, "float32"), (torch.float32, "float64")]
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])


@dataclass
class Constants:
    weight: torch.Tensor


class Net(nn.Module):
    """A network that holds a constant beside its parameters and buffers."""

    def __init__(self, where):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.where, constant = where, torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
        if where == "attribute":
            self.constant = constant
        elif where == "list":
            self.constants = [constant]
        elif where == "dict":
            self.constants = {"nested": ({"deep": constant},)}
        elif where == "object":
            self.constants = Constants(constant)
        elif where == "closure":
            self.function = lambda x: x @ constants["of_a_function"]
            constants = {"of_a_function": constant}
            self.in_place = constants

    def to(self, dtype):
        super().to(dtype)
        if self.where == "attribute":
            self.constant = self.constant.to(dtype)
        elif self.where == "list":
            self.constants[0] = self.constants[0].to(dtype)
        elif self.where == "dict":
            self.constants["nested"][0]["deep"] = self.constants["nested"][0]["deep"].to(dtype)
        elif self.where == "object":
            self.constants.weight = self.constants.weight.to(dtype)
        elif self.where == "closure":
            self.in_place["of_a_function"] = self.in_place["of_a_function"].to(dtype)
        return self

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.where == "attribute":
            h = h @ self.constant
        elif self.where == "list":
            h = h @ self.constants[0]
        elif self.where == "dict":
            h = h @ self.constants["nested"][0]["deep"]
        elif self.where == "object":
            h = h @ self.constants.weight
        else:
            h = self.function(h)
        return self.last(h)


def batch_in(dtype):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(32, 6, generator=generator).to(dtype), torch.randint(0, 5, (32,), generator=generator)


def assert_alike(measured, expected):
    assert measured.loss == pytest.approx(expected.loss, rel=1e-6)
    for name, layer in expected.layers.items():
        torch.testing.assert_close(measured.layers[name].h, layer.h, equal_nan=True)


@pytest.mark.parametrize(("dtype", "precision"), LOWERED, ids=str)
@pytest.mark.parametrize("where", ["attribute", "list", "dict", "object", "closure"])
def test_tensors_that_are_no_parameters_are_raised_with_them(where, dtype, precision):
    model, batch = Net(where).to(dtype), batch_in(dtype)
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    loss(model, batch).backward()
    twin = Net(where).to(dtype).to(getattr(torch, precision))
    measured = measure_spectra(model, batch, loss, top_k=4, precision=precision)
    assert_alike(measured, measure_spectra(twin, copy_batch(batch, precision), loss, top_k=4, precision=precision))
    assert {p.dtype for p in model.parameters()} == {dtype}


LOSSES = {
    "class_weights": lambda y, t, w: F.cross_entropy(y, t, weight=w),
    "nll": lambda y, t, w: F.nll_loss(y.log_softmax(-1), t, w),
    "product": lambda y, t, w: (y @ w).square().mean(),
    "einsum": lambda y, t, w: torch.einsum("ni,i->n", y, w).square().mean(),
    "huber": lambda y, t, w: F.huber_loss(y, w.expand_as(y)),
    "binary": lambda y, t, w: F.binary_cross_entropy(y.sigmoid(), w.expand_as(y) / 4),
    "layer_norm": lambda y, t, w: F.layer_norm(y, (5,), w, w).square().mean() + y.square().mean(),
    "lerp": lambda y, t, w: torch.lerp(y, w.expand_as(y), 0.3).square().mean(),
    "prelu": lambda y, t, w: F.prelu(y, w[:1]).square().mean(),
    "index_put": lambda y, t, w: y.index_put((torch.arange(2),), w.expand(2, 5)).square().mean(),
    "in_place": lambda y, t, w: _with_first_row(y, w).square().mean(),
    "out_of_place_list": lambda y, t, w: torch.linalg.multi_dot([y, w[:, None], w[None]]).square().mean(),
    "made_inside": lambda y, t, w: (y @ torch.ones(5, 3, dtype=w.dtype)).square().mean(),
}


def _with_first_row(y, w):
    y = y * 1
    y[0] = w
    y.index_add_(0, torch.tensor([1]), w[None])
    return y


@pytest.mark.parametrize(("dtype", "precision"), LOWERED, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_constants_of_a_loss_function_that_no_copy_reaches(name, dtype, precision):
    torch.manual_seed(0)
    model, batch, of_loss = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), batch_in(dtype), LOSSES[name]
    model, weights = model.to(dtype), WEIGHTS.to(dtype)
    measured = measure_spectra(model, batch, lambda m, b: of_loss(m(b[0]), b[1], weights), top_k=4, precision=precision)
    raised = WEIGHTS.to(getattr(torch, precision))
    expected = measure_spectra(model, batch, lambda m, b: of_loss(m(b[0]), b[1], raised), top_k=4, precision=precision)
    assert_alike(measured, expected)
    assert weights.dtype is dtype


def test_arguments_are_joined_in_the_precision_of_what_is_written():
    low, high, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64), torch.ones(2).long()
    assert in_one_precision(torch.mm, (low, whole), {}) is None
    (args, kwargs) = in_one_precision(torch.where, (whole, [low, high]), {"other": torch.ones(2, dtype=torch.cfloat)})
    assert [args[0].dtype, *(t.dtype for t in args[1])] == [torch.int64, torch.float64, torch.float64]
    assert kwargs["other"].dtype is torch.complex128
    assert args[1][1] is high
    (args, _) = in_one_precision(torch.Tensor.copy_, (low, high), {})
    assert args[0] is low
    assert args[1].dtype is torch.bfloat16
    (_, kwargs) = in_one_precision(torch.mul, (high, high), {"out": low})
    assert kwargs["out"] is low


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_complex_parameters_buffers_and_data(precision):
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)
            self.mix = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))
            self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))
            self.scales = [torch.full((4,), 2.0, dtype=torch.cfloat)]

        def forward(self, z):
            h = torch.view_as_complex(self.first(torch.view_as_real(z).flatten(1)).unflatten(1, (4, 2)).contiguous())
            h = (h @ torch.diag(self.turn)) @ self.mix @ torch.diag(self.scales[0])
            return self.last(torch.tanh(torch.view_as_real(h).flatten(1)))

    model, batch = Spectral(), (torch.randn(32, 6, dtype=torch.cfloat), torch.randint(0, 5, (32,)))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    with isolated(model, precision=precision) as copied:
        wide = torch.promote_types(torch.cfloat, getattr(torch, precision))
        assert {copied.module.mix.dtype, copied.module.turn.dtype, copied.module.scales[0].dtype} == {wide}
    measured = measure_spectra(model, batch, loss, top_k=4, precision=precision)
    assert measured.loss == pytest.approx(loss(model, batch).item(), rel=1e-5)
    assert model.mix.dtype is torch.cfloat


def test_a_tensor_that_cannot_be_joined_is_told_with_what_to_write():
    model = nn.Sequential(nn.Linear(6, 5)).bfloat16()

    def loss(model, batch):
        y = model(batch[0])
        if y.dtype is not torch.bfloat16:
            raise TypeError("expected scalar type BFloat16 in my own kernel")
        return y.square().mean()

    with pytest.raises(MeasurementError, match=r"tensors in bfloat16 are raised .*write .to\(weight.dtype\)"):
        measure_spectra(model, batch_in(torch.bfloat16), loss)


GROUPS = {
    "rows": ((12, 6), (3, 6, 4), True),
    "columns": ((3, 5, 6), (6, 12), True),
    "inner": ((5, 12), (12, 4), True),
    "stacks": ((3, 5, 6), (3, 6, 4), False),
}


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_products_one_by_one_are_torchs_own(name):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("torch before 2.10 has no public grouped product")
    a_shape, b_shape, has_ends = GROUPS[name]
    scale = 8  # Torch's own takes multiples of 16 bytes.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn([n * scale if n != 3 else n for n in a_shape], generator=generator).bfloat16()
    b = torch.randn([n * scale if n != 3 else n for n in b_shape], generator=generator).bfloat16()
    ends = torch.tensor([24, 40, 96], dtype=torch.int32) if has_ends else None
    torch.testing.assert_close(
        grouped_product(a, b, offs=ends).float(), F.grouped_mm(a, b, offs=ends).float(), rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_experts_by_a_grouped_product_are_measured_as_by_products_of_their_own(precision):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("torch before 2.10 has no public grouped product")

    class Experts(nn.Module):
        def __init__(self, grouped):
            super().__init__()
            torch.manual_seed(0)
            self.grouped, self.first, self.last = grouped, nn.Linear(6, 8), nn.Linear(8, 5)
            self.up = nn.Parameter(torch.randn(2, 8, 8) / 3)

        def forward(self, x):
            h, ends = torch.tanh(self.first(x)), torch.tensor([12, 32], dtype=torch.int32)
            h = (
                F.grouped_mm(h, self.up, offs=ends)
                if self.grouped
                else torch.cat([h[:12] @ self.up[0], h[12:] @ self.up[1]])
            )
            return self.last(torch.tanh(h))

    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    reports = [
        measure_spectra(
            Experts(grouped), batch_in(torch.float32), loss, top_k=4, precision=precision, curvature="exact"
        )
        for grouped in (True, False)
    ]
    assert "up" in reports[0].layers
    assert_alike(*reports)


def labels_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _constant(h):
    return torch.tanh(h @ torch.full((8, 8), 0.25, dtype=torch.bfloat16))


@torch.jit.script
def _scripted_constant(h):
    return torch.tanh(torch.matmul(h, torch.full([8, 8], 0.25, dtype=torch.bfloat16)))


class Inner(nn.Module):
    """Two layers around what is made where a measurement does not reach."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(6, 8), nn.Linear(8, 5), function

    def forward(self, x):
        return self.last(self.function(torch.tanh(self.first(x))))


def checkpointed(h):
    return checkpoint(_constant, h, use_reentrant=False)


def test_a_constant_within_a_checkpoint_is_measured_as_without():
    batch = batch_in(torch.bfloat16)
    for method in ("exact", "auto"):
        found = measure_spectra(Inner(checkpointed).bfloat16(), batch, labels_loss, curvature=method, top_k=4)
        expected = measure_spectra(Inner(_constant).bfloat16(), batch, labels_loss, curvature=method, top_k=4)
        for name, layer in expected.layers.items():
            assert layer.h[0].isfinite()
            torch.testing.assert_close(found.layers[name].h, layer.h, equal_nan=True)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scripted_module_is_measured_as_its_source(dtype):
    def net(wrap):
        torch.manual_seed(1)
        return Inner(wrap(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))).to(dtype)

    expected = measure_spectra(net(lambda module: module), batch_in(dtype), labels_loss, curvature="exact", top_k=4)
    for wrap in (torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(2, 8))):
        model = net(wrap)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = measure_spectra(model, batch_in(dtype), labels_loss, curvature="exact", top_k=4)
        for name, layer in expected.layers.items():
            assert layer.h[0].isfinite()
            torch.testing.assert_close(found.layers[name].h, layer.h, equal_nan=True)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_scripted_function_that_is_not_reached_is_named():
    with pytest.raises(MeasurementError) as caught:
        measure_spectra(Inner(_scripted_constant).bfloat16(), batch_in(torch.bfloat16), labels_loss)
    text = str(caught.value)
    assert "same dtype" in text
    assert f"in _scripted_constant of {__file__}:" in text
    assert "which torch.jit.script has compiled" in text
    assert "write .to(weight.dtype) or .type_as(x) where it is used" in text
