"""A layer whose gradient or curvature is no usable number leaves the others as they are, and says why."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_spectral import measure_spectra

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

NAN = "h is NaN: the loss has no finite second derivative, as of a norm or a square root at zero"
ZERO = (
    "its Hessian is zero: the loss is piecewise linear (give a smooth loss_fn), or saturated, as where training "
    "diverged"
)


class Beside(nn.Module):
    """A network with a layer beside it, whose output z is read by a function."""

    def __init__(self, read):
        super().__init__()
        self.read, self.beside = read, nn.Linear(12, 12)
        self.a, self.b, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 6)

    def forward(self, x):
        y = self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return y + self.read(self.beside(x), x).sum(1, keepdim=True) * torch.linspace(-1, 1, 6)


def at_zero(z):
    return z - z.detach()


def measure(read, method="sketch", **options):
    torch.manual_seed(0)
    model, batch = Beside(read), (torch.randn(48, 12), torch.randint(0, 6, (48,)))
    return measure_spectra(
        model, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]), curvature=method, top_k=5, **options
    )


@pytest.mark.parametrize("method", ["exact", "sketch", "auto"])
@pytest.mark.parametrize(
    ("read", "note"),
    [
        (lambda z, x: 0 * torch.tanh(z), "no direction above the noise floor: its gradient is zero"),
        (lambda z, x: 1e-40 * torch.tanh(z), "its gradient is rounding"),
        (
            lambda z, x: at_zero(z).square().sum(1, keepdim=True).sqrt(),
            "finite ones, as of a root or a logarithm",
        ),
        (lambda z, x: 1e-3 * torch.log1p((1e22 * at_zero(z)).square()) + 0 * x.sum() * z, NAN),
    ],
    ids=["zero", "denormal", "nan_gradient", "infinite_curvature"],
)
def test_a_layer_without_numbers_leaves_the_others_as_they_are(method, read, note):
    if note is NAN:
        good = measure(lambda z, x: 0.1 * torch.tanh(z), method)
        report = measure(lambda z, x: read(z, x) + 0.1 * torch.tanh(z), method)
    else:
        good, report = measure(lambda z, x: 0 * z, method), measure(read, method)
    assert note in report.failed["beside.weight"]
    for name in ("a.weight", "b.weight", "head.weight"):
        assert report.layers[name].h.isfinite().all()
        if method == "exact":
            torch.testing.assert_close(report.layers[name].h, good.layers[name].h, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("precision", "told"), [("float32", True), ("float64", False)])
def test_a_higher_precision_is_no_advice_to_who_has_the_highest(precision, told):
    note = measure(lambda z, x: 1e-40 * torch.tanh(z), precision=precision).failed["beside.weight"]
    assert note.startswith("its gradient is rounding")
    assert note.endswith("; precision='float64' tells") == told


@pytest.mark.parametrize("scale", [1e-15, 1e-22, 1e-30])
def test_a_sketch_of_a_small_gradient_scales_and_spoils_nothing(scale):
    class Shared(nn.Module):
        """A layer whose gradient is small, and so alike in all samples that it is no rounding."""

        def __init__(self, scale):
            super().__init__()
            self.scale, self.small, self.a, self.head = scale, nn.Linear(8, 8), nn.Linear(12, 16), nn.Linear(16, 8)

        def forward(self, x):
            rows = torch.linspace(0.5, 1, len(x))[:, None] + torch.eye(8)[torch.arange(len(x)) % 8]
            return self.head(torch.tanh(self.a(x))) + self.scale * torch.tanh(self.small(rows))

    def measured(scale):
        torch.manual_seed(0)
        model, x = Shared(scale), torch.randn(48, 12)
        return measure_spectra(model, x, lambda m, x: (m(x) - 3).square().mean(), curvature="sketch", top_k=5).layers

    large, small = measured(1e-7), measured(scale)
    torch.testing.assert_close(small["small.weight"].h / scale, large["small.weight"].h / 1e-7, rtol=1e-3, atol=1e-12)
    for name in ("a.weight", "head.weight"):
        torch.testing.assert_close(small[name].h, large[name].h, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "auto"])
def test_a_norm_at_zero_is_the_cause_of_nan(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    x, target = torch.randn(64, 12), torch.rand(64)
    pairs = torch.cat([x[:1], torch.randn(63, 12)])
    report = measure_spectra(
        net, (x, pairs, target), lambda m, b: ((m(b[0]) - m(b[1])).norm(dim=1) - b[2]).square().mean(),
        top_k=6, curvature=method,
    )  # fmt: skip
    assert all(why.startswith(NAN) for why in report.failed.values())
    assert len(report.failed) == 2


def test_a_piecewise_linear_loss_of_a_piecewise_linear_network_has_no_hessian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6))
    batch = torch.randn(48, 12), torch.randn(48, 6)
    report = measure_spectra(net, batch, lambda m, b: F.l1_loss(m(b[0]), b[1]))
    assert set(report.failed.values()) == {ZERO}
    assert report.problems() == [f"0.weight, 2.weight, 4.weight: {ZERO}"]
    assert "no pass" in report.chosen


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_a_smooth_loss_that_is_saturated_is_not_said_to_be_none(activation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), activation(), nn.Linear(16, 6))
    with torch.no_grad():
        net[2].weight.mul_(1e6)
    batch = torch.randn(48, 12), torch.randint(0, 6, (48,))
    report = measure_spectra(net, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert report.failed["2.weight"] == ZERO


@pytest.mark.parametrize(("weight", "method"), [(0, "sketch"), (0.1, "exact")])
def test_what_is_chosen_is_what_measured(weight, method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))

    def contrast(m, b):
        first, second = (F.normalize(m(x), dim=1) for x in b)
        beside = weight * m[0](b[0]).tanh().mean() if weight else 0
        return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(first))) + beside

    report = measure_spectra(net, (torch.randn(40, 16), torch.randn(40, 16)), contrast)
    assert {layer.method for layer in report.layers.values()} == {method}
    assert report.chosen.startswith(method)
    assert "use curvature='exact'" not in report.chosen
    assert report.check_error != report.check_error


class Made(nn.Module):
    """A matrix that is scaled, masked or added before it is multiplied, and a table that is only added."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.make, self.matrix, self.table = (
            make,
            nn.Parameter(torch.randn(10, 12) / 3),
            nn.Parameter(torch.randn(4, 12)),
        )
        self.gain, self.head = nn.Parameter(torch.full((10, 1), 0.5)), nn.Linear(10, 6)

    def forward(self, x):
        return self.head(torch.tanh((x[:, None] + 2 * self.table) @ self.make(self).T)).mean(1)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.matrix * 0.5,
        lambda m: 0.5 * (m.matrix * (m.matrix.detach() < 9)),
        lambda m: m.matrix * m.gain,
        lambda m: m.matrix / 2 + torch.zeros(()),
    ],
    ids=["scale", "mask", "gain", "sum"],
)
def test_what_a_scale_or_a_mask_makes_of_a_matrix_is_the_matrix(make):
    """With W = c V, sigma of V is c times that of W, and h c^2 times."""
    batch = torch.randn(48, 12), torch.randint(0, 6, (48,))
    options = {"top_k": 5, "precision": "float64", "curvature": "exact"}
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    report = measure_spectra(Made(make), batch, loss, **options)
    assert report.skipped["table"] == "it is never multiplied with activations as a matrix (Add)"
    plain = Made(lambda m: m.matrix)
    plain.matrix.data /= 2
    expected = measure_spectra(plain, batch, loss, **options).layers["matrix"]
    torch.testing.assert_close(report.layers["matrix"].sigma, expected.sigma / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(report.layers["matrix"].h, expected.h / 4, rtol=1e-6, atol=1e-12)
