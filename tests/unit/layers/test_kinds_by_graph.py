"""Kinds of layers that neither modules, shapes nor names tell, by the graph of a loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_spectral import measure_spectra
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.plan.planner import plan_spectra

pytestmark = pytest.mark.filterwarnings("ignore:.*too few directions", "ignore:.*no sum of those of its parts")

D, HEADS, TOKENS = 12, 3, 5
QKV, OUT, UP, DOWN = "attention_qkv", "attention_out", "mlp_up", "mlp_down"
BLEND = {"a": QKV, "b": QKV, "c": QKV, "d": OUT}


def split(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge(x):
    return x.transpose(-3, -2).flatten(-2)


def rotated(x):
    angles = torch.arange(x.shape[-2])[:, None] * torch.ones(x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class Mixer(nn.Module):
    """Four matrices and a function that mixes tokens by them."""

    def __init__(self, mix, **shapes):
        super().__init__()
        self.mix = mix
        for name, (outs, ins) in ({"a": (D, D), "b": (D, D), "c": (D, D), "d": (D, D)} | shapes).items():
            if outs:
                setattr(self, name, nn.Linear(ins, outs))
        self.u, self.n = nn.Parameter(torch.randn(HEADS, 1, 1)), nn.LayerNorm(D // HEADS)

    def forward(self, x):
        return self.mix(self, x)


def fused_call(m, x, **options):
    y = F.scaled_dot_product_attention(split(m.a(x)), split(m.b(x)), split(m.c(x)), **options)
    return m.d(merge(y))


def residual(m, x):
    return x + fused_call(m, F.layer_norm(x, (D,)))


def written_out(m, x):
    scores = split(m.a(x)) @ split(m.b(x)).mT / math.sqrt(D)
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1) > 0, -torch.inf)
    return x + m.d(merge(F.dropout(scores.softmax(-1), 0.1, m.training) @ split(m.c(x))))


def exponentials(m, x):
    scores = (split(m.a(x)) * 0.3) @ split(m.b(x)).mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return m.d(merge(weights / weights.sum(-1, keepdim=True) @ split(m.c(x))))


def einsums(m, x):
    q, k, v = (layer(x).unflatten(-1, (HEADS, -1)) for layer in (m.a, m.b, m.c))
    weights = (torch.einsum("bqhe,bkhe->bhqk", q, k) + m.u).softmax(-1)
    return m.d(torch.einsum("bhqk,bkhe->bqhe", weights, v).flatten(-2))


def crossed(m, x):
    memory = F.layer_norm(x[:, :2], (D,))
    return x + m.d(merge(F.scaled_dot_product_attention(*(split(y) for y in (m.a(x), m.b(memory), m.c(memory))))))


def one_matrix(m, x):
    a, b, c = m.a(x).chunk(3, dim=-1)
    return x + m.d(merge(F.scaled_dot_product_attention(split(a), split(b), split(c))))


def stacked(m, x):
    a, b, c = m.a(x).reshape(-1, TOKENS, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    return m.d(merge(F.scaled_dot_product_attention(a, b, c)))


def grouped(m, x):
    b, c = (split(layer(x), 1).expand(-1, HEADS, -1, -1) for layer in (m.b, m.c))
    return x + m.d(merge(F.scaled_dot_product_attention(split(m.a(x)), b, c)))


def rotary_and_norms(m, x):
    a, b = rotated(m.n(split(m.a(x)))), rotated(F.normalize(split(m.b(x)), dim=-1))
    return m.d(merge(F.scaled_dot_product_attention(a, b, split(m.c(x)), dropout_p=0.1 * m.training)))


def head_by_head(m, x):
    heads = zip(*(layer(x).chunk(HEADS, dim=-1) for layer in (m.a, m.b, m.c)), strict=True)
    return x + m.d(torch.cat([(10 * torch.tanh(a @ b.mT / 10)).softmax(-1) @ c for a, b, c in heads], dim=-1))


def gated(m, x):
    y = merge(F.scaled_dot_product_attention(split(m.a(x)), split(m.b(x)), split(m.c(x))))
    return x + m.d(y * torch.sigmoid(m.e(x)))


def learned_queries(m, x):
    q = m.a((torch.arange(4.0 * D).sin().view(4, D) * m.u.mean()).expand(len(x), -1, -1))
    return m.d(merge(F.scaled_dot_product_attention(split(q), split(m.b(x)), split(m.c(x)))))


ATTENTIONS = {
    "fused": (fused_call, {}, BLEND),
    "residual": (residual, {}, BLEND),
    "causal": (lambda m, x: fused_call(m, x, is_causal=True), {}, BLEND),
    "written_out": (written_out, {}, BLEND),
    "exponentials": (exponentials, {}, BLEND),
    "einsums": (einsums, {}, BLEND),
    "crossed": (crossed, {}, BLEND),
    "one_matrix": (one_matrix, {"a": (36, D), "b": (0, 0), "c": (0, 0)}, {"a": QKV, "d": OUT}),
    "stacked": (stacked, {"a": (36, D), "b": (0, 0), "c": (0, 0)}, {"a": QKV, "d": OUT}),
    "grouped": (grouped, {"b": (D // HEADS, D), "c": (D // HEADS, D)}, BLEND),
    "rotary_and_norms": (rotary_and_norms, {}, BLEND),
    "head_by_head": (head_by_head, {}, BLEND),
    "gated": (gated, {"e": (D, D)}, BLEND | {"e": "dense"}),
    "learned_queries": (learned_queries, {}, BLEND),
}


class Feed(nn.Module):
    """Matrices around activations."""

    def __init__(self, run, *shapes):
        super().__init__()
        self.run = run
        for name, (outs, ins) in zip("pqr", shapes, strict=False):
            setattr(self, name, nn.Linear(ins, outs))
        self.s = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.run(self, x)


WIDE, BACK = (30, D), (D, 30)
FEEDS = {
    "gelu": (lambda m, x: x + m.q(F.gelu(m.p(F.layer_norm(x, (D,))))), (WIDE, BACK), [UP, DOWN]),
    "after_norm": (lambda m, x: F.layer_norm(x + m.s * m.q(F.relu(m.p(x))), (D,)), (WIDE, BACK), [UP, DOWN]),
    "swiglu": (lambda m, x: m.q(m.p(x) * F.silu(m.r(x))) + x, (WIDE, BACK, WIDE), [UP, DOWN, UP]),
    "one_width": (lambda m, x: x + m.q(m.p(x).relu().square()), ((D, D), (D, D)), [UP, DOWN]),
    "no_residual": (lambda m, x: m.q(F.gelu(m.p(x))), (WIDE, BACK), [UP, DOWN]),
    "fused_gate": (lambda m, x: m.q(F.glu(m.p(x))), ((60, D), BACK), [UP, DOWN]),
    "by_hand": (lambda m, x: x + m.q((h := m.p(x)) * (1 + torch.erf(h / 2**0.5)) / 2), (WIDE, BACK), [UP, DOWN]),
    "over_tokens": (lambda m, x: x + m.q(m.p(x.mT).tanh()).mT, ((9, TOKENS), (TOKENS, 9)), [UP, DOWN]),
    "no_activation": (lambda m, x: x + m.q(m.p(x)), (WIDE, BACK), ["dense", "dense"]),
    "two_activations": (
        lambda m, x: x + m.q(F.relu(m.r(F.relu(m.p(x))))), (WIDE, BACK, (30, 30)), ["dense", "dense", "dense"],
    ),
    "back_and_one_width": (lambda m, x: m.q(F.gelu(m.p(x))), ((D, D), (D, D)), ["dense", "dense"]),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, *blocks, classes=4):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(7, D), nn.ModuleList(blocks), nn.Linear(D, classes)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(1))


def kinds_of(model, x=None, **options):
    torch.manual_seed(0)
    x = torch.randn(6, TOKENS, 7) if x is None else x
    report = measure_spectra(
        model, (x, torch.randint(4, (len(x),))), lambda m, b: F.cross_entropy(m(b[0]), b[1]), top_k=3, **options
    )
    return {name.removesuffix(".weight"): layer.kind for name, layer in report.layers.items()}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_projections_that_meet_in_an_attention_call(name):
    mix, shapes, expected = ATTENTIONS[name]
    kinds = kinds_of(Net(Mixer(mix, **shapes), Mixer(mix, **shapes)))
    blocks = {f"blocks.{i}.{layer}": kind for i in range(2) for layer, kind in expected.items()}
    assert kinds == {"first": "dense", **blocks, "last": "head"}


@pytest.mark.parametrize("name", FEEDS)
def test_layers_around_an_activation_behind_attention(name):
    run, shapes, expected = FEEDS[name]
    kinds = kinds_of(Net(Mixer(residual), Feed(run, *shapes), Mixer(fused_call), Feed(run, *shapes)))
    assert [kinds[f"blocks.{i}.{layer}"] for i in (1, 3) for layer in "pqr"[: len(shapes)]] == 2 * expected
    assert {kinds[f"blocks.{i}.{layer}"] for i in (0, 2) for layer in "abc"} == {QKV}
    assert (kinds["first"], kinds["last"]) == ("dense", "head")


def test_layers_in_residual_branches_without_attention():
    feeds = [Feed(FEEDS[name][0], *FEEDS[name][1]) for name in ("gelu", "swiglu", "over_tokens")]
    expected = [UP, DOWN, UP, DOWN, UP, UP, DOWN]
    assert list(kinds_of(Net(*feeds)).values()) == ["dense", *expected, "head"]


class Experts(nn.Module):
    """Each token by one of two experts, and both weighted by a router."""

    def __init__(self):
        super().__init__()
        self.z = nn.Linear(D, 2)
        self.w = nn.ModuleList(nn.ModuleList([nn.Linear(*WIDE[::-1]), nn.Linear(*BACK[::-1])]) for _ in range(2))

    def forward(self, x):
        weights, rows = self.z(x).softmax(-1), x.flatten(0, -2)
        y = torch.zeros_like(rows)
        for i, (up, down) in enumerate(self.w):
            chosen = (torch.arange(len(rows)) % 2 == i).nonzero().squeeze(1)
            share = weights.flatten(0, -2)[chosen, i, None]
            y = y.index_add(0, chosen, share * down(F.silu(up(rows[chosen]))))
        return x + y.view_as(x)


class Whole(nn.Module):
    """A network without modules, in which no layer takes the widths of `w` and `p`, as none takes a head's."""

    def __init__(self):
        super().__init__()
        shapes = {"e": (7, D), "w": (D, 3 * D), "d": (D, D), "p": (D, 40), "q": (20, D), "z": (D, 4)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Linear(*shape))

    def forward(self, x):
        x = self.e(x)
        x = x + self.d(F.scaled_dot_product_attention(*self.w(x).chunk(3, dim=-1)))
        return self.z((x + self.q(F.glu(self.p(x)))).mean(1))


def test_a_layer_that_attention_or_an_mlp_goes_on_from_is_no_head():
    assert [layer.kind for layer in find_layers(Whole()).layers.values()].count("head") == 3
    assert kinds_of(Whole()) == {"e": "dense", "w": QKV, "d": OUT, "p": UP, "q": DOWN, "z": "head"}


def test_experts_are_mlps_and_their_router_is_none():
    kinds = kinds_of(Net(Experts()), layers="*")
    assert list(kinds.values()) == ["dense", "dense", UP, DOWN, UP, DOWN, "head"]


class Recurrent(nn.Module):
    def __init__(self, layer, attends):
        super().__init__()
        self.layer, self.attends = layer(D, D, num_layers=2, batch_first=True), attends

    def forward(self, x):
        h = self.layer(x)[0]
        return (h @ h.mT).softmax(-1) @ h if self.attends else h


class Squeeze(nn.Module):
    """A residual branch of convolutions, gated by two linear layers."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Conv1d(D, D, 3, padding=1), nn.Conv1d(D, D, 3, padding=1)
        self.h, self.i = nn.Linear(D, 4), nn.Linear(4, D)
        nn.init.ones_(self.h.bias)  # of four units with random biases all may be dead

    def forward(self, x):
        y = self.g(F.relu(self.f(x.mT)))
        return F.relu(x + (y * self.i(F.relu(self.h(y.mean(-1)))).sigmoid()[..., None]).mT)


NEGATIVES = {
    "classifier": nn.Sequential(nn.Linear(D, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, D), nn.ReLU()),
    "autoencoder": nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D)),
    "bilinear": Feed(lambda m, x: m.p(x) * m.q(x), (D, D), (D, D)),
    "bilinear_matrix": Feed(lambda m, x: (m.p(x) @ m.q(x).mT) @ x, (D, D), (D, D)),
    "deep_sets": Feed(lambda m, x: m.r(F.relu(m.q(F.relu(m.p(x))).sum(1, keepdim=True))), (D, D), (D, D), (D, D)),
    "equivariant": Feed(lambda m, x: F.relu(m.p(x) + m.q(x.mean(1, keepdim=True))), (D, D), (D, D)),
    "pooling": Feed(lambda m, x: m.p(x).softmax(1).mT @ m.q(x), (D, D), (D, D)),
    "additive": Feed(lambda m, x: m.r(torch.tanh(m.p(x) + m.q(x[:, :1]))).softmax(1) * x, (D, D), (D, D), (D, D)),
    "memory": Feed(lambda m, x: (m.p(x) @ m.s[:, None]).softmax(1) * m.q(x), (D, D), (D, D)),
    "highway": Feed(lambda m, x: (t := m.p(x).sigmoid()) * m.q(x).relu() + (1 - t) * x, (D, D), (D, D)),
    "squeeze": Squeeze(),
    "lstm": Recurrent(nn.LSTM, attends=False),
    "attending_gru": Recurrent(nn.GRU, attends=True),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_other_layers_keep_their_kind(name):
    model = Net(NEGATIVES[name])
    before = {key.removesuffix(".weight"): layer.kind for key, layer in find_layers(model).layers.items()}
    assert kinds_of(model) == before
    assert before["last"] == "head"


def test_a_head_whose_outputs_the_loss_compares_stays_one():
    """By a difference, a softmax of products, or attention."""
    model, x = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D)), torch.randn(8, D)
    losses = [
        lambda m, x: (m(x) - x).square().sum(),
        lambda m, x: (m(x) @ m(x).mT).softmax(-1).square().sum(),
        lambda m, x: ((y := m(x)) @ y.mT).softmax(-1).matmul(y).square().sum(),
    ]
    for loss in losses:
        report = measure_spectra(model, x, loss, top_k=3)
        assert [layer.kind for layer in report.layers.values()] == ["dense", "head"]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return Net(Mixer(written_out), Feed(*FEEDS["gelu"][:1], *FEEDS["gelu"][1]))


EXPECTED = {"first": "dense", **{f"blocks.0.{name}": kind for name, kind in BLEND.items()}} | {
    "blocks.1.p": UP, "blocks.1.q": DOWN, "last": "head",
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": "exact"},
        {"curvature": "ggn"},
        {"curvature": "sketch"},
        {"micro_batch_size": 2},
        {"mode": "train"},
        {"gradient_samples": 6, "max_samples": 3},
    ],
    ids=str,
)
def test_kinds_are_the_same_by_every_method(network, options):
    assert kinds_of(network, **options) == EXPECTED


def test_a_plan_has_the_kinds_that_are_measured(network):
    batch = torch.randn(6, TOKENS, 7), torch.randint(4, (6,))
    plan = plan_spectra(network, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]), kinds={"first": "conv"})
    assert [layer.kind for layer in plan.layers.values()] == ["conv", *list(EXPECTED.values())[1:]]


def test_kinds_that_the_user_gives_stay(network):
    assert kinds_of(network, kinds={"blocks.0.a": "dense"}) == EXPECTED | {"blocks.0.a": "dense"}


def test_kinds_of_a_network_whose_blocks_are_checkpointed(network):
    model = Net(*(Checkpointed(block) for block in network.blocks))
    assert {name.replace("inner.", ""): kind for name, kind in kinds_of(model).items()} == EXPECTED


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)
