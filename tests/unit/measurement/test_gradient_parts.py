"""Norms of the gradients of parts of a batch, out of its one pass, against the gradient of each sample alone."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy
import pytest
import torch
import torch.nn.functional as F
from micro_batches import batch_of, gelu_mlp
from torch import nn

from lightning_spectral import measure_spectra
from lightning_spectral.isolation.devices import RandomStates, are_equal
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.measurement import gradients
from lightning_spectral.numerics.gradient_noise import gradient_noise

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

SAMPLES, TOKENS, WIDTH, CLASSES = 26, 3, 6, 5
BOUNDS = list(pairwise(round(i * SAMPLES / 8) for i in range(9)))


class OnTokens(nn.Module):
    """Embedded words, whose mean is classified after a module on (B, T, D)."""

    def __init__(self, *modules, first="samples"):
        super().__init__()
        self.table, self.head = nn.Embedding(11, WIDTH, padding_idx=0), nn.Linear(WIDTH, CLASSES)
        self.inner, self.first = nn.Sequential(*modules), first

    def forward(self, words):
        x = self.table(words)
        return self.head(
            torch.tanh(self.inner(x.transpose(0, 1)).transpose(0, 1) if self.first == "time" else self.inner(x))
        )


class Images(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Unflatten(1, (6, 6)), *modules), nn.LazyLinear(CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)).flatten(1))


class TransposedLinear(nn.Module):
    """Weights (in, out) as GPT-2 has them, a block of one, a scaled product, and a factor on the left."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH)), nn.Parameter(torch.randn(2 * WIDTH))
        self.left = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        z = torch.addmm(self.bias, x.reshape(-1, WIDTH), self.weight, alpha=0.5).view(*x.shape[:-1], -1)
        z = torch.tanh(z)[..., :WIDTH] + torch.tanh(x @ self.weight[:, WIDTH:])
        return (self.left @ z.mT).mT


class Experts(nn.Module):
    """A stack of matrices, each applied to all tokens, and one of another stack at a time."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, WIDTH, 7)), nn.Parameter(torch.randn(4, 7, WIDTH))

    def forward(self, x):
        z = torch.tanh(torch.einsum("btd,edh->ebth", x, self.up))
        return sum(z[e] @ self.down[e] for e in range(4))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class Twice(nn.Module):
    """A matrix that is applied to what it gave before, and to its transposed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return F.linear(torch.tanh(self.linear(torch.tanh(self.linear(x)))), self.linear.weight.T)


ON_TOKENS = {
    "linear on tokens": lambda: OnTokens(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH)),
    "time first": lambda: OnTokens(nn.Linear(WIDTH, WIDTH), first="time"),
    "transposed": lambda: OnTokens(TransposedLinear()),
    "experts": lambda: OnTokens(Experts()),
    "attention": lambda: OnTokens(Attention(batch_first=True)),
    "attention, time first": lambda: OnTokens(Attention(batch_first=False), first="time"),
    "twice": lambda: OnTokens(Twice()),
}
ON_VECTORS = {
    "linear": lambda: nn.Sequential(nn.Linear(36, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, CLASSES)),
    "Conv1d in groups": lambda: Images(nn.Conv1d(6, 8, 3, groups=2, padding=1, stride=2)),
    "Conv1d, same": lambda: Images(nn.Conv1d(6, 8, 4, padding="same", dilation=2)),
    "Conv2d": lambda: Images(nn.Unflatten(1, (2, 3)), nn.Conv2d(2, 4, (2, 3), padding=(1, 0), padding_mode="circular")),
    "ConvTranspose1d": lambda: Images(
        nn.ConvTranspose1d(6, 8, 3, 2, 1, output_padding=1, groups=2), nn.Tanh(), nn.ConvTranspose1d(8, 4, 2)
    ),
    "frames": lambda: Images(nn.Flatten(0, 1), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Unflatten(0, (-1, 6))),
}  # fmt: skip


def words(generator):
    tokens = torch.randint(0, 11, (SAMPLES, TOKENS), generator=generator)
    return tokens, torch.randint(0, CLASSES, (SAMPLES, TOKENS), generator=generator)


def vectors(generator):
    x = torch.randn(SAMPLES, 36, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


NETWORKS = {name: (make, vectors) for name, make in ON_VECTORS.items()}
NETWORKS |= {name: (make, words) for name, make in ON_TOKENS.items()}


def mean(z, y):
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def summed(z, y):
    return F.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="sum")


def plain_mean(z, y):
    """A mean over samples that no known function takes."""
    return (z.logsumexp(-1) - z.gather(-1, y[..., None]).squeeze(-1)).mean()


def counted(loss, calls):
    def of_batch(model, batch):
        calls.append(len(batch[1]))
        return loss(model(batch[0]), batch[1])

    return of_batch


def twins(model, batch, loss, share):
    """Return layer -> noise of its gradient, from the gradients of single samples, of which each counts ``share``."""
    layers = find_layers(model, layers="*").layers
    parameters, terms = dict(model.named_parameters()), []
    for i in range(SAMPLES):
        value = share * loss(model(batch[0][i : i + 1]), batch[1][i : i + 1])
        gradients = torch.autograd.grad(value, [parameters[layer.parameter] for layer in layers.values()])
        terms.append([layer.to_matrix(g) for layer, g in zip(layers.values(), gradients, strict=True)])
    found = {}
    for name, of_layer in zip(layers, zip(*terms, strict=True), strict=True):
        of_parts = [(stop - start, sum(of_layer[start:stop])) for start, stop in BOUNDS]
        parts = [(n / SAMPLES, float(g.square().sum())) for n, g in of_parts]
        found[name] = gradient_noise(float(sum(of_layer).square().sum()), parts, SAMPLES)
    return found


def same(report, expected):
    assert report.layers.keys() == expected.keys()
    for name, noise in expected.items():
        for attribute in ("signal", "signal_stderr", "noise_scale", "noise_scale_stderr", "parts"):
            found = getattr(report.layers[name].gradient_noise, attribute)
            assert found == pytest.approx(getattr(noise, attribute), rel=1e-10, abs=1e-10, nan_ok=True)


def measured(model, batch, loss, **options):
    """Return the report, and how many times the loss of a part alone was computed."""
    calls = []
    report = measure_spectra(model, batch, counted(loss, calls), layers="*", top_k=3, **options)
    return report, sum(n in {stop - start for start, stop in BOUNDS} for n in calls)


@pytest.mark.parametrize("loss", [mean, summed, plain_mean])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_gives_the_gradients_of_all_parts(name, loss, monkeypatch):
    torch.manual_seed(0)
    make, make_batch = NETWORKS[name]
    model, batch = make(), make_batch(torch.Generator().manual_seed(0))
    model(batch[0].float() if batch[0].is_floating_point() else batch[0])
    model, options = model.double(), {"curvature": "exact", "alignment": loss is mean}
    report, passes = measured(model, batch, loss, **options)
    assert passes == 1
    same(report, twins(model, batch, loss, 1 if loss is summed else 1 / SAMPLES))
    monkeypatch.setattr(gradients, "_norms_by_rows", lambda *args: [])
    by_passes, passes = measured(model, batch, loss, **options)
    assert passes == 8
    same(report, {name: layer.gradient_noise for name, layer in by_passes.layers.items()})


def test_targets_that_do_not_count_leave_the_parts_their_weights():
    model, (x, y) = gelu_mlp().double(), batch_of(SAMPLES)
    y[:SAMPLES:3] = -100
    report, passes = measured(model, (x, y), mean)
    assert passes == 1
    same(report, twins(model, (x, y), summed, 1 / int((y != -100).sum())))


def test_random_numbers_of_samples_are_those_of_the_whole_batch():
    """The first part alone draws the first of them, the others not theirs."""

    def shaken(model, batch):
        return F.cross_entropy(model(batch[0]) + torch.randn(len(batch[1]), 5, dtype=torch.float64), batch[1])

    model, batch = gelu_mlp().double(), batch_of(256)
    torch.manual_seed(0)
    report = measure_spectra(model, batch, shaken, curvature="exact", top_k=3)
    assert all(layer.gradient_noise.parts == 8 for layer in report.layers.values())
    assert not any(text.startswith("signal") for text in report.warnings)


def test_a_part_that_draws_other_numbers_is_not_followed_by_more():
    """Samples do not begin with the first draws."""

    def shaken(z, y):
        return F.cross_entropy(z * torch.randn(len(y) + 1)[-len(y) :, None], y)

    report, passes = measured(gelu_mlp().double(), batch_of(SAMPLES), shaken, curvature="exact")
    assert passes == 1
    (text,) = report.warnings
    assert text.startswith("signal: the loss draws other random numbers for a part than for the batch; ")


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), random.random, numpy.random.random])
def test_numbers_that_are_drawn_once_for_all_samples_leave_the_parts_their_passes(draw):
    """As a coin that leaves a layer out, beside a matrix that one pass does not tell."""

    def shaken(z, y):
        return mean(z * (1 + draw()), y)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), AlsoAdded(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    report, passes = measured(model, batch_of(SAMPLES), shaken, curvature="exact")
    assert passes == 8
    assert all(layer.gradient_noise.parts == 8 for layer in report.layers.values())


@pytest.mark.skipif(not hasattr(numpy.random, "set_bit_generator"), reason="numpy 1.24 brought other generators")
@pytest.mark.parametrize("generator", ["MT19937", "PCG64", "Philox", "SFC64"])
def test_states_of_each_of_numpys_generators_are_compared(generator):
    before = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(getattr(numpy.random, generator)(0))
    try:
        states = RandomStates(nn.Linear(2, 2))
        first = states.now()
        assert are_equal(first, states.now())
        numpy.random.random()
        assert not are_equal(first, states.now())
        states.restore()
        assert are_equal(first, states.now())
    finally:
        numpy.random.set_bit_generator(before)


class CentredByBatch(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class AlsoAdded(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.1 * self.weight.square().sum()


@pytest.mark.parametrize(("part", "parts"), [(nn.BatchNorm1d(8), 0), (CentredByBatch(), 0), (AlsoAdded(8, 8), 8)])
def test_what_one_pass_cannot_tell_takes_a_pass_of_each_part(part, parts):
    """Samples that depend on each other, and a matrix that is used in another way as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), part, nn.Tanh(), nn.Linear(8, 5)).double()
    report, passes = measured(model, batch_of(SAMPLES), mean, mode="train", curvature="exact")
    assert passes == 8
    assert all(layer.gradient_noise.parts == parts for layer in report.layers.values())
