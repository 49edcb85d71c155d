"""Columns and sketch of networks as people write them, against double backward in float64.

The columns are held against it where networks are piecewise linear, with any loss. A sketch makes a product for each
direction if it is given one layer and one rank at a time, and then has no cross terms: whatever network it sees, it has
to find what double backward finds.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Case, cross_entropy, mse
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_spectral import MeasurementError, measure_spectra
from lightning_spectral.curvature.direction_graph import DirectionGraph
from lightning_spectral.curvature.exact import ExactCurvature
from lightning_spectral.curvature.gauss_newton import GGNCurvature
from lightning_spectral.curvature.problem import DifferentiableLoss
from lightning_spectral.curvature.seen_layers import see_layers
from lightning_spectral.curvature.sketch import SketchCurvature
from lightning_spectral.isolation.operations import MeasuredOperations
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.numerics.svd import top_singular_triplets

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-8


class LookUp(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed, self.head = embed, nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


@pytest.mark.parametrize("curvature", ["exact", "sketch"])
def test_an_embedding_with_sparse_gradients_is_measured_as_one_with_dense_ones(curvature):
    batch = torch.arange(24).reshape(6, 4) % 9, torch.arange(6) % 5
    sparse = LookUp(nn.Embedding(9, 6, padding_idx=0, sparse=True)).double()
    dense = LookUp(nn.Embedding.from_pretrained(sparse.embed.weight, freeze=False, padding_idx=0))
    dense.head = sparse.head

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).mean(1), batch[1])

    reports = []
    for model in (sparse, dense):
        torch.manual_seed(0)
        reports.append(measure_spectra(model, batch, loss, layers="*", top_k=4, curvature=curvature))
    assert list(reports[0].layers) == ["embed.weight", "head.weight"]
    for name, layer in reports[0].layers.items():
        torch.testing.assert_close(layer.sigma, reports[1].layers[name].sigma)
        torch.testing.assert_close(layer.h, reports[1].layers[name].h)


def ragged(layout):
    samples = [torch.randn(length, 6) for length in (4, 6, 5, 4, 6, 5)]
    return torch.nested.as_nested_tensor(samples, layout=layout), torch.arange(6) % 5


@pytest.mark.parametrize("curvature", ["auto", "exact"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_layers_on_nested_tensors_have_no_second_derivative_and_on_padded_ones_they_have(layout, curvature):
    net, batch = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), ragged(layout)

    def of_nested(net, batch):
        rows = [sample.mean(0) for sample in net[0](batch[0]).unbind()]
        return F.cross_entropy(net[1:](torch.stack(rows)), batch[1])

    def of_padded(net, batch):
        return F.cross_entropy(net(torch.nested.to_padded_tensor(batch[0], 0.0)).mean(1), batch[1])

    report = measure_spectra(net, batch, of_nested, top_k=3, curvature=curvature)
    assert list(report.failed) == ["0.weight"]
    assert report.layers["2.weight"].h.isfinite().all()
    assert not measure_spectra(net, batch, of_padded, top_k=3, curvature=curvature).failed


@pytest.fixture(autouse=True)
def attention_with_two_derivatives():
    with sdpa_kernel([SDPBackend.MATH]):
        yield


class Twin:
    """A case beside what double backward finds along its singular directions."""

    def __init__(self, case, k=4):
        self.case, (self.net, self.batch) = case, case.build()
        self.net.eval()
        self.layers = find_layers(self.net, **case.options).layers
        parameters = dict(self.net.named_parameters(remove_duplicate=False))
        self.parameters = {name: parameters[layer.parameter] for name, layer in self.layers.items()}
        problem = self.problem()
        gradients = problem.gradients(keep_graph=True).values
        self.directions = {
            name: top_singular_triplets(layer.to_matrix(gradients[name].detach()), k, groups=layer.groups)
            for name, layer in self.layers.items()
        }
        self.expected = ExactCurvature()(problem, self.directions).h

    def problem(self, names=None):
        names = list(self.layers) if names is None else names
        layers = {name: self.layers[name] for name in names}
        parameters = {name: self.parameters[name] for name in names}
        evaluate = lambda: self.case.loss(self.net, self.batch)  # noqa: E731
        return DifferentiableLoss(evaluate, layers, parameters, len(self.batch[0]))

    def check(self, found, names=None):
        """Hold curvatures against the expected."""
        assert not found.failed
        for name in self.layers if names is None else names:
            expected = self.expected[name]
            scale = float(expected.abs().max())
            torch.testing.assert_close(found.h[name], expected, rtol=TOLERANCE, atol=TOLERANCE * scale, msg=name)

    def check_columns(self, apart=()):
        """Of all layers together; those in ``apart`` cannot be moved at their outputs."""
        found = GGNCurvature()(self.problem(), self.directions)
        self.check(found)
        assert not found.stderr
        assert set(found.methods) == set(apart)

    def check_products(self, apart=()):
        """Of one layer at a time."""
        for name in self.layers:
            found = SketchCurvature(ranks=1)(self.problem([name]), {name: self.directions[name]})
            self.check(found, [name])
            assert not found.stderr
            assert bool(found.methods) == (name in apart), name


def relu_net(n_in=8, n_out=5, width=12):
    return nn.Sequential(nn.Linear(n_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_out))


def gelu_net(n_in=8, n_out=5, width=12):
    return nn.Sequential(nn.Linear(n_in, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_out))


def labelled(samples=24, n_in=8, classes=5):
    return lambda: (torch.randn(samples, n_in), torch.randint(0, classes, (samples,)))


def pairs(samples=16, n_in=8, n_out=5):
    return lambda: (torch.randn(samples, n_in), torch.randn(samples, n_out))


def signals(*shape):
    return lambda: (torch.randn(*shape), torch.randint(0, 3, shape[:1]))


def two_views(samples=16):
    return lambda: (torch.randn(samples, 8), torch.randn(samples, 8))


# --- losses of the output


def focal(model, batch):
    log_p = model(batch[0]).log_softmax(1).gather(1, batch[1][:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def dice(model, batch):
    p, mask = model(batch[0]).sigmoid(), (batch[1] > 0).to(batch[0])
    return F.binary_cross_entropy(p, mask) + (1 - 2 * (p * mask).sum(1) / (p + mask).sum(1)).mean()


def nested(model, batch):
    output = model(batch[0])
    return ((output - batch[1]) ** 2).mean() + output.pow(4).mean()


def gaussian(model, batch):
    mean, log_var = model(batch[0]).chunk(2, 1)
    return F.gaussian_nll_loss(mean, batch[1], log_var.exp())


def softened(model, batch):
    return F.kl_div(model(batch[0]).log_softmax(1), batch[1].softmax(1), reduction="batchmean")


OUTPUT_LOSSES = [
    Case("nll", relu_net, labelled(), lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1])),
    Case("focal", relu_net, labelled(), focal),
    Case("dice", relu_net, pairs(), dice),
    Case("nested", relu_net, pairs(), nested),
    Case("huber", relu_net, pairs(), lambda m, b: F.huber_loss(m(b[0]), b[1], delta=0.5)),
    Case("kl", relu_net, pairs(), softened),
    Case("gaussian", lambda: relu_net(n_out=10), pairs(), gaussian),
    Case("poisson", relu_net, pairs(), lambda m, b: F.poisson_nll_loss(m(b[0]), b[1].abs())),
    Case("squares", relu_net, pairs(), lambda m, b: ((m(b[0]) - b[1]) ** 2).sum(1).mean()),
    Case("two", relu_net, labelled(), lambda m, b: cross_entropy(m, b) + 0.1 * m(b[0]).square().mean()),
    Case("log_cosh", relu_net, pairs(), lambda m, b: (m(b[0]) - b[1]).cosh().log().mean()),
    Case("norm", relu_net, pairs(), lambda m, b: (m(b[0]) - b[1]).norm(dim=1).mean()),
]


@pytest.mark.parametrize("case", OUTPUT_LOSSES, ids=lambda case: case.name)
def test_losses_of_the_output(case):
    twin = Twin(case)
    twin.check_columns()
    twin.check_products()


# --- losses across samples


def info_nce(model, batch):
    z = F.normalize(model(torch.cat([batch[0], batch[0] + 0.1 * batch[1]])), dim=1)
    n = len(batch[0])
    scores = (z @ z.T / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e9)
    return F.cross_entropy(scores, torch.cat([torch.arange(n) + n, torch.arange(n)]))


def barlow_twins(model, batch):
    a, b = model(batch[0]), model(batch[0] + 0.1 * batch[1])
    a, b = ((z - z.mean(0)) / z.std(0) for z in (a, b))
    c = a.T @ b / len(a)
    return (c.diagonal() - 1).square().sum() + 0.01 * (c - torch.diag(c.diagonal())).square().sum()


def clip(model, batch):
    z = F.normalize(model(batch[0]), dim=1)
    scores = z @ F.normalize(batch[1], dim=1).T / 0.3
    return F.cross_entropy(scores, torch.arange(len(z))) + F.cross_entropy(scores.T, torch.arange(len(z)))


ACROSS = {
    "info_nce": (lambda net: net(n_out=6), two_views(), info_nce),
    "barlow_twins": (lambda net: net(n_out=6), two_views(), barlow_twins),
    "clip": (lambda net: net(n_out=8), two_views(), clip),
    "squared_mean": (lambda net: net(), labelled(), lambda m, b: cross_entropy(m, b) ** 2),
}


@pytest.mark.parametrize("name", ACROSS)
def test_losses_across_samples(name):
    net, batch, loss = ACROSS[name]
    twin = Twin(Case(name, lambda: net(relu_net), batch, loss))
    twin.check_columns()
    twin.check(SketchCurvature()(twin.problem(), twin.directions))
    Twin(Case(name, lambda: net(gelu_net), batch, loss)).check_products()


@pytest.mark.parametrize("name", ACROSS)
def test_draws_of_what_a_loss_across_samples_leaves_are_as_far_off_as_they_say(name):
    net, batch, loss = ACROSS[name]
    twin = Twin(Case(name, lambda: net(gelu_net), batch, loss))
    scores = []
    for seed in range(30):
        found = SketchCurvature(seed=seed, ranks=4)(twin.problem(), twin.directions)
        scores += [(found.h[n] - twin.expected[n]) / found.stderr[n] for n in ("0.weight", "2.weight")]
        torch.testing.assert_close(found.h["4.weight"], twin.expected["4.weight"])
    scores = torch.cat(scores)
    assert 0.8 < scores.square().mean().sqrt() < 1.2
    # Unbiased: each of 8 values over the seeds.
    assert scores.reshape(30, 8).mean(0).abs().max() < 4 / 30**0.5


@pytest.mark.parametrize("method", [GGNCurvature(), SketchCurvature()])
def test_a_layer_without_directions_is_measured_along_none(method):
    twin = Twin(Case("", relu_net, labelled(), cross_entropy))
    name = next(iter(twin.layers))
    directions = twin.directions | {name: twin.directions[name].first(0)}
    found = method(twin.problem(), directions)
    assert found.h[name].shape == (0,)
    twin.check(found, [other for other in twin.layers if other != name])


# --- views of a sample, of which one backward pass serves all


def contrast(a, b):
    """InfoNCE of two views."""
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.3
    return F.cross_entropy(scores, torch.arange(len(scores)))


def in_turn(model, batch):
    """Rows of a sample's views next to each other."""
    z = model(torch.stack(batch, 1).flatten(0, 1))
    return contrast(z[::2], z[1::2])


def joined(model, batch):
    """Views of calls of their own, joined above them."""
    z = torch.cat([model(x) for x in batch])
    return contrast(*z.chunk(2))


class Towers(nn.Module):
    """An encoder for each side of a pair, one of them with a layer more."""

    def __init__(self, net):
        super().__init__()
        self.one, self.other = net(n_out=6), nn.Sequential(net(n_out=7), nn.ReLU(), nn.Linear(7, 6))


class Trunk(nn.Module):
    """A layer whose rows are part of both outputs."""

    def __init__(self):
        super().__init__()
        self.trunk, self.one, self.other = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(12, 6)


def of_trunk(model, batch):
    x = F.relu(model.trunk(batch[0]))
    return contrast(model.one(x), model.other(x))


# loss, network of an encoder, outputs of each view, views, whether the views share no row
VIEWS = {
    "rows": (info_nce, lambda net: net(n_out=9), 9, 2, True),
    "in_turn": (in_turn, lambda net: net(n_out=9), 9, 2, True),
    "calls": (barlow_twins, lambda net: net(n_out=9), 9, 2, True),
    "joined": (joined, lambda net: net(n_out=9), 9, 2, True),
    "three": (lambda m, b: triplet(m, b) ** 2, lambda net: net(n_out=9), 9, 3, True),
    "wide": (joined, lambda net: net(n_out=70), 70, 2, True),
    "towers": (lambda m, b: contrast(m.one(b[0]), m.other(b[1])), Towers, 6, 2, True),
    "trunk": (of_trunk, lambda net: Trunk(), 6, 2, False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_pass_of_one_output_serves_all_views_that_share_no_row(name, monkeypatch):
    loss, net, outputs, views, apart = VIEWS[name]
    twin, passes = Twin(Case(name, lambda: net(relu_net), two_views(), loss)), []
    columns = DirectionGraph.columns
    monkeypatch.setattr(DirectionGraph, "columns", lambda graph, *args: passes.append(1) or columns(graph, *args))
    twin.check_columns()
    # Those that find, and check, which row is of which sample come beside.
    assert 0 <= len(passes) - (outputs if apart else outputs * views) <= 4


@pytest.mark.parametrize("name", VIEWS)
def test_what_a_loss_couples_above_a_smooth_network_takes_passes_and_the_rest_products(name):
    loss, net, *_ = VIEWS[name]
    Twin(Case(name, lambda: net(gelu_net), two_views(), loss)).check_products()


def test_views_below_a_long_loss_take_columns_alone():
    torch.manual_seed(0)
    net = nn.Sequential(relu_net(width=40, n_out=40), nn.ReLU(), relu_net(40, width=40, n_out=24)).double()
    batch = tuple(torch.randn(32, 8, dtype=torch.float64) for _ in range(2))

    def long(model, batch):
        a, b = (model(x) for x in batch)
        for _ in range(20):
            a, b = torch.tanh(a), torch.tanh(b)
        return contrast(a, b)

    found, expected = (measure_spectra(net, batch, long, curvature=c) for c in ("auto", "exact"))
    assert found.chosen.startswith("sketch: most of the network lies behind the layers")
    assert "24 backward passes if the loss couples samples" in found.chosen
    for name, layer in expected.layers.items():
        assert found.layers[name].method == "sketch"
        assert not found.layers[name].h_stderr.isfinite().any() or not found.layers[name].h_stderr.any()
        torch.testing.assert_close(found.layers[name].h, layer.h, rtol=1e-8, atol=1e-12)


class StepByStep(nn.Module):
    """Logits (B, classes, steps), each of which depends on the steps before it; within, steps come first."""

    def __init__(self, act):
        super().__init__()
        self.enter, self.act, self.leave = nn.Linear(4, 5), act, nn.Linear(5, 3)

    def forward(self, x):
        return self.leave(self.act(self.enter(x.transpose(0, 1)).cumsum(0))).permute(1, 2, 0)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_as_many_steps_as_samples_are_not_taken_for_samples(n):
    def steps():
        return torch.randn(n, n, 4), torch.randint(0, 3, (n, n))

    Twin(Case("relu", lambda: StepByStep(nn.ReLU()), steps, cross_entropy)).check_columns()
    Twin(Case("tanh", lambda: StepByStep(nn.Tanh()), steps, cross_entropy)).check_products()


class ReadAtOneStep(nn.Module):
    """Of its last layers only the rows of one step reach the loss, all samples' in it."""

    def __init__(self, act, step):
        super().__init__()
        self.enter, self.act, self.middle, self.leave = nn.Linear(4, 6), act, nn.Linear(6, 5), nn.Linear(5, 3)
        self.step = step

    def forward(self, x):
        return self.leave(self.act(self.middle(self.act(self.enter(x.transpose(0, 1)))))[self.step])


@pytest.mark.parametrize("step", [0, -1])
@pytest.mark.parametrize(("samples", "steps"), [(3, 3), (8, 8), (4, 8), (16, 16)])
def test_steps_of_which_one_is_read_are_not_taken_for_samples(samples, steps, step):
    def sequences():
        return torch.randn(samples, steps, 4), torch.randint(0, 3, (samples,))

    Twin(Case("relu", lambda: ReadAtOneStep(nn.ReLU(), step), sequences, cross_entropy)).check_columns()
    Twin(Case("tanh", lambda: ReadAtOneStep(nn.Tanh(), step), sequences, cross_entropy)).check_products()


class OneEdge(nn.Module):
    """Two samples of a batch that depend on each other, and no others."""

    def __init__(self, pair):
        super().__init__()
        self.one, self.two, self.pair = nn.Linear(8, 6), nn.Linear(6, 5), pair

    def forward(self, x):
        h, (i, j) = torch.tanh(self.one(x)), self.pair
        swapped = torch.arange(len(x)).index_fill(0, torch.tensor([i]), j).index_fill(0, torch.tensor([j]), i)
        return self.two(h + 0.5 * h[swapped] * (swapped != torch.arange(len(x)))[:, None])


@pytest.mark.parametrize("pair", [(0, 1), (3, 11), (5, 14)])
def test_one_pair_of_samples_that_depend_on_each_other_shows(pair):
    twin = Twin(Case("", lambda: OneEdge(pair), labelled(16), cross_entropy))
    found = SketchCurvature()(twin.problem(), twin.directions)
    # The pair meets behind the first layer.
    assert list(found.methods) == ["one.weight"]
    twin.check(found, ["one.weight"])


# --- layers that are used several times


def sim_siam(model, batch):
    a, b = (F.normalize(model(x), dim=1) for x in (batch[0], batch[0] + 0.1 * batch[1]))
    return -(a * b.detach()).sum(1).mean() - (b * a.detach()).sum(1).mean()


def siamese(model, batch):
    distance = (model(batch[0]) - model(batch[1])).square().sum(1)
    return F.softplus(distance - 1).mean()


def triplet(model, batch):
    anchor, near, far = model(batch[0]), model(batch[0] + 0.1 * batch[1]), model(batch[1])
    return F.softplus((anchor - near).norm(dim=1) - (anchor - far).norm(dim=1)).mean()


class Recurrent(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.enter, self.again, self.leave, self.act = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), act

    def forward(self, x):
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = self.act(self.enter(x[:, t]) + self.again(h))
        return self.leave(h)


class Fused(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.enter, self.rnn = nn.Linear(4, 5), kind(5, 6, batch_first=True, **options)
        self.leave = nn.LazyLinear(3)
        self(torch.zeros(1, 2, 4))

    def forward(self, x):
        return self.leave(self.rnn(self.enter(x))[0][:, -1])


def written_out(model, batch):
    return MeasuredOperations().run(lambda batch: cross_entropy(model, batch), batch)


class Packed(Fused):
    """Sequences of several lengths."""

    def forward(self, x):
        lengths = 1 + torch.arange(len(x)) % x.shape[1]
        packed = pack_padded_sequence(self.enter(x), lengths, batch_first=True, enforce_sorted=False)
        return self.leave(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(1))


class Albert(nn.Module):
    """One block, three times."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def block(self, x):
        q, k, v = (y.unflatten(2, (2, 4)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return self.head(x.mean(1))


REUSED = [
    Case("sim_siam", lambda: relu_net(n_out=6), two_views(), sim_siam),
    Case("siamese", lambda: relu_net(n_out=6), two_views(), siamese),
    Case("triplet", lambda: relu_net(n_out=6), two_views(), triplet),
]


@pytest.mark.parametrize("case", REUSED, ids=lambda case: case.name)
def test_networks_that_are_called_several_times(case):
    twin = Twin(case)
    assert all(len(calls) > 1 for calls in see_layers_of(twin).calls.values())
    twin.check_columns()
    twin.check_products()


def see_layers_of(twin):
    problem = twin.problem()
    problem.run()
    return see_layers(problem, twin.layers)


NESTED = [
    Case("rnn_tanh", lambda: Recurrent(torch.tanh), signals(16, 4, 4), cross_entropy),
    Case("rnn_relu", lambda: Recurrent(torch.relu), signals(16, 4, 4), cross_entropy),
    Case("albert", Albert, signals(16, 3, 8), cross_entropy),
    Case("lstm", lambda: Fused(nn.LSTM, num_layers=2), signals(16, 4, 4), written_out),
    Case("projected", lambda: Fused(nn.LSTM, proj_size=4), signals(16, 4, 4), written_out),
    Case("gru", lambda: Fused(nn.GRU, bidirectional=True), signals(16, 3, 4), written_out),
    Case("packed", lambda: Packed(nn.LSTM, bidirectional=True), signals(15, 4, 4), written_out),
]


@pytest.mark.parametrize("case", NESTED, ids=lambda case: case.name)
def test_layers_that_are_applied_to_what_they_gave(case):
    twin = Twin(case)
    seen = see_layers_of(twin)
    assert seen.nested
    assert not seen.unseen
    twin.check_products()


def test_a_piecewise_linear_recurrence_is_no_gauss_newton():
    """The weight multiplies itself, so that its Hessian has more than J^T H J, and auto has to see that."""
    twin = Twin(NESTED[1])
    assert "again.weight" not in see_layers_of(twin).cut.inside
    found = measure_spectra(twin.net, twin.batch, cross_entropy, top_k=4)
    expected = measure_spectra(twin.net, twin.batch, cross_entropy, top_k=4, curvature="exact")
    assert not found.chosen.startswith("ggn")
    agrees(found, expected)


def agrees(found, expected, errors=6.0):
    """Whether a report is right within its stated errors."""
    for name, layer in expected.layers.items():
        h, stderr = found.layers[name].h, found.layers[name].h_stderr
        allowed = errors * stderr + TOLERANCE * layer.h.abs().nan_to_num().max()
        known = layer.h.isfinite()
        assert ((h - layer.h).abs() <= allowed)[known].all(), name


# --- products that are no linear layer


class Products(nn.Module):
    """The same matrix in one way of writing its product with x (B, T, 8)."""

    def __init__(self, product, *shape, act=F.relu):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(*shape))
        self.bias = nn.Parameter(0.1 * torch.randn(8))
        self.enter, self.head, self.product, self.act = nn.Linear(8, 8), nn.Linear(8, 3), product, act

    def forward(self, x):
        h = self.act(self.enter(x))
        return self.head(self.act(self.product(self, h)).mean(1))


def conv1d_of_transformers(m, h):
    """A layer with its weight as (in, out)."""
    return torch.addmm(m.bias, h.view(-1, h.shape[-1]), m.weight).view(h.shape)


PRODUCTS = {
    "x @ W.T": (lambda m, h: h @ m.weight.T + m.bias, (8, 8)),
    "x @ W": (lambda m, h: torch.matmul(h, m.weight), (8, 8)),
    "W @ x": (lambda m, h: (m.weight @ h.mT).mT, (8, 8)),
    "W.T @ x": (lambda m, h: (m.weight.T @ h.transpose(1, 2)).transpose(1, 2), (8, 8)),
    "mm": (lambda m, h: torch.mm(h.flatten(0, 1), m.weight.t()).view(h.shape), (8, 8)),
    "W mm": (lambda m, h: torch.mm(m.weight, h.flatten(0, 1).t()).t().reshape(h.shape), (8, 8)),
    "addmm": (conv1d_of_transformers, (8, 8)),
    "addmm_alpha": (lambda m, h: torch.addmm(m.bias, h.flatten(0, 1), m.weight, alpha=0.7).view(h.shape), (8, 8)),
    "bmm": (lambda m, h: torch.bmm(h, m.weight.expand(len(h), 8, 8)), (8, 8)),
    "einsum btd,df->btf": (lambda m, h: torch.einsum("btd,df->btf", h, m.weight), (8, 8)),
    "einsum fd,btd->btf": (lambda m, h: torch.einsum("fd,btd->btf", m.weight, h), (8, 8)),
    "einsum btd,fd->ftb": (lambda m, h: torch.einsum("btd,fd->ftb", h, m.weight).permute(2, 1, 0), (8, 8)),
    "einsum bdt,df->bft": (lambda m, h: torch.einsum("bdt,df->bft", h.mT, m.weight).mT, (8, 8)),
    "linear of a transposed": (lambda m, h: F.linear(h, m.weight.T, m.bias), (8, 8)),
    "blocks of rows": (
        lambda m, h: F.linear(h, m.weight[:8]) + torch.tanh(F.linear(h.flip(1), m.weight[8:])), (16, 8),
    ),
    "blocks of columns": (
        lambda m, h: F.linear(h, m.weight[:, :8]) + h.flip(1) @ m.weight[:, 8:].T, (8, 16),
    ),
    "chunks": (lambda m, h: sum(h.roll(i, 1) @ w for i, w in enumerate(m.weight.chunk(2, 1))), (8, 16)),
}  # fmt: skip


@pytest.mark.parametrize("act", [F.relu, F.gelu])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_as_people_write_them(name, act):
    product, shape = PRODUCTS[name]
    twin = Twin(Case(name, lambda: Products(product, *shape, act=act), signals(16, 3, 8), cross_entropy))
    assert "weight" in twin.layers
    twin.check_products()
    if act is F.relu and name != "blocks of rows":
        twin.check_columns()


class Uses(nn.Module):
    """Layers of one matrix each, used in one way and then another; ``rows`` wide."""

    def __init__(self, use, *shape, act=torch.tanh):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(0.3 * torch.randn(*shape)) for _ in range(3))
        self.head, self.use, self.act = nn.Linear(8, 5), use, act

    def forward(self, x):
        for weight in self.weights:
            x = self.act(self.use(x, weight))
        return self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)


def without_gradient(x, weight):
    with torch.no_grad():
        constant = weight.view(8, 8)
    return F.linear(x, weight) + F.linear(x.roll(1, 1), constant)


USES = {
    "weight and bias": (lambda x, w: F.linear(x, w[:, :-1], w[:, -1]), (8, 9), (16, 8)),
    "addmm": (lambda x, w: torch.addmm(w[:, 0], x, w[:, 1:].T), (8, 9), (16, 8)),
    "a view without a gradient": (without_gradient, (8, 8), (16, 8)),
    "conv1d of a parameter": (lambda x, w: F.conv1d(x, w, padding=1), (8, 8, 3), (16, 8, 6)),
}


@pytest.mark.parametrize("method", ["auto", "ggn", "sketch"])
@pytest.mark.parametrize("name", USES)
def test_a_matrix_that_meets_itself_or_is_no_layers(name, method):
    use, weight, x = USES[name]
    act = torch.relu if method == "ggn" else torch.tanh
    batch = torch.randn(*x), torch.randint(0, 5, (16,))
    model = Uses(use, *weight, act=act).double()
    found = measure_spectra(model, (batch[0].double(), batch[1]), cross_entropy, top_k=4, curvature=method)
    expected = measure_spectra(model, (batch[0].double(), batch[1]), cross_entropy, top_k=4, curvature="exact")
    agrees(found, expected)


def orthogonal(model, batch):
    gram = model[2].weight @ model[2].weight.T
    return cross_entropy(model, batch) + (gram - torch.eye(16, dtype=gram.dtype)).square().sum()


@pytest.mark.parametrize("method", ["auto", "ggn", "sketch"])
def test_a_penalty_of_a_product_of_a_matrix_with_itself(method):
    act = nn.ReLU if method == "ggn" else nn.Tanh
    model = nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 5))
    batch = torch.randn(16, 8).double(), torch.randint(0, 5, (16,))
    found = measure_spectra(model.double(), batch, orthogonal, top_k=8, curvature=method)
    agrees(found, measure_spectra(model, batch, orthogonal, top_k=8, curvature="exact"))


class TiedConvolutions(nn.Module):
    """An autoencoder that goes back by the filters it came by."""

    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        h = F.conv_transpose2d(torch.tanh(self.first(x)), self.first.weight, padding=1)
        return self.last(torch.tanh(h))


class OneByOne(nn.Module):
    """Images that are convolved without a batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.stack([torch.tanh(self.conv(image.flatten(1))) for image in x]).mean(2))


@pytest.mark.parametrize("method", ["auto", "sketch"])
@pytest.mark.parametrize("make", [lambda: TiedConvolutions(3), lambda: TiedConvolutions(6), OneByOne])
def test_filters_in_another_layout(make, method):
    model, x = make().double(), torch.randn(8, 3, 4, 4).double()
    batch = x, (torch.randn(8, 3).double() if isinstance(model, OneByOne) else x)
    found = measure_spectra(model, batch, mse, top_k=3, curvature=method)
    agrees(found, measure_spectra(model, batch, mse, top_k=3, curvature="exact"))


MAGNITUDES = {
    "abs": torch.abs,
    "angle": torch.angle,
    "conj": lambda z: (z * z.conj()).real,
    "view": lambda z: torch.view_as_real(z).square().sum(-1),
}


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("method", ["auto", "ggn"])
def test_complex_numbers_are_above_the_cut(name, method):
    def loss(model, batch):
        z = model(batch[0]) * torch.exp(1j * torch.arange(5, dtype=batch[0].dtype))
        return MAGNITUDES[name](z.cumsum(1)).mean()

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).double()
    batch = torch.randn(16, 8).double(), torch.randint(0, 5, (16,))
    found = measure_spectra(model, batch, loss, top_k=4, curvature=method)
    agrees(found, measure_spectra(model, batch, loss, top_k=4, curvature="exact"))


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in transformers, with its weight as (in, out)."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.nf, self.nx = n_out, n_in
        self.weight = nn.Parameter(0.3 * torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class FusedConv1D(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.enter, self.qkv, self.head, self.act = Conv1D(8, 8), Conv1D(24, 8), nn.Linear(8, 3), act

    def forward(self, x):
        q, k, v = self.qkv(self.act(self.enter(x))).split(8, 2)
        if self.act is F.relu:
            return self.head((q + k - v).relu().mean(1))
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


@pytest.mark.parametrize("fused", [(), ("qkv",)])
@pytest.mark.parametrize("act", [F.relu, F.gelu])
def test_layers_of_gpt_2(act, fused):
    case = Case("", lambda: FusedConv1D(act), signals(16, 3, 8), cross_entropy, {"fused_qkv": fused})
    twin = Twin(case)
    assert twin.layers["enter.weight"].transposed
    assert len(twin.layers) == 3 + 2 * len(fused)
    twin.check_products()
    if act is F.relu:
        twin.check_columns()


class CrossAttention(nn.Module):
    def __init__(self, batch_first, width=8, **options):
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(width, 2, batch_first=batch_first, **options)
        self.memory, self.head = nn.Linear(8, options.get("kdim") or width), nn.Linear(width, 3)

    def forward(self, x):
        memory = torch.tanh(self.memory(x))
        q = x[:, :2]
        if not self.batch_first:
            q, memory = q.transpose(0, 1), memory.transpose(0, 1)
        y = self.attention(q, memory, memory, need_weights=False)[0]
        return self.head(y.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 6}], ids=["fused", "apart"])
def test_cross_attention_takes_blocks_of_its_weight(batch_first, options):
    case = Case("", lambda: CrossAttention(batch_first, **options), signals(16, 4, 8), cross_entropy)
    Twin(case).check_products()


class Transformer(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first, self.enter, self.leave = batch_first, nn.Linear(4, 8), nn.Linear(8, 1)
        self.net = nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=batch_first)

    def forward(self, x):
        z = self.enter(x)
        if self.batch_first:
            return self.leave(self.net(z, z[:, -2:])[:, -1])
        z = z.transpose(0, 1)
        return self.leave(self.net(z, z[-2:])[-1])


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer(batch_first):
    case = Case("", lambda: Transformer(batch_first), pairs_of(16, 4, 4), mse)
    Twin(case, k=3).check_products()


def pairs_of(*shape):
    return lambda: (torch.randn(*shape), torch.randn(shape[0], 1))


# --- embeddings


class Tokens(nn.Module):
    def __init__(self, tied, act=F.relu):
        super().__init__()
        self.tokens, self.hidden, self.act = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 8), act
        self.head = nn.Linear(8, 9, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(self.act(self.hidden(self.tokens(tokens))))


def next_token(model, batch):
    return F.cross_entropy(model(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


class WithTable(nn.Module):
    """A table that is looked up and multiplied with, both by hand."""

    def __init__(self, act):
        super().__init__()
        self.table, self.hidden, self.act = nn.Parameter(0.3 * torch.randn(9, 8)), nn.Linear(8, 8), act

    def forward(self, tokens):
        return self.act(self.hidden(F.embedding(tokens, self.table))) @ self.table.T


def sentences():
    return (torch.randint(0, 9, (16, 3)),)


@pytest.mark.parametrize("act", [F.relu, F.gelu])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads(tied, act):
    twin = Twin(Case("", lambda: Tokens(tied, act), sentences, next_token))
    assert ("head.weight" in twin.layers) or tied
    twin.check_products()
    if act is F.relu and not tied:
        # 18 outputs of a sentence.
        twin.check_columns()


def test_a_table_that_is_looked_up_and_multiplied_with():
    for act in (F.relu, F.gelu):
        twin = Twin(Case("", lambda act=act: WithTable(act), sentences, next_token))
        assert len(see_layers_of(twin).calls["table"]) == 2
        twin.check_products()


# --- samples in other places than first


class Routed(nn.Module):
    """Tokens go to one of two experts by a mask: rows of any number, of any sample."""

    def __init__(self, act):
        super().__init__()
        self.enter, self.one, self.other, self.head = (nn.Linear(a, b) for a, b in ((8, 8), (8, 8), (8, 8), (8, 3)))
        self.act = act

    def forward(self, x):
        h = self.act(self.enter(x))
        picked = x[..., 0] > 0.2
        y = torch.zeros_like(h)
        y[picked] = self.act(self.one(h[picked]))
        y[~picked] = self.act(self.other(h[~picked]))
        return self.head(y.mean(1))


class Folded(nn.Module):
    """Time first, and samples folded with heads in the middle."""

    def __init__(self, act):
        super().__init__()
        self.enter, self.middle, self.head, self.act = nn.Linear(8, 8), nn.Linear(4, 4), nn.Linear(8, 3), act

    def forward(self, x):
        h = self.act(self.enter(x.transpose(0, 1)))
        h = self.act(self.middle(h.unflatten(2, (2, 4)).permute(2, 0, 1, 3)))
        return self.head(h.permute(1, 2, 0, 3).flatten(2).mean(0))


@pytest.mark.parametrize("act", [F.relu, F.gelu])
@pytest.mark.parametrize("net", [Routed, Folded])
def test_rows_of_samples_are_found(net, act):
    twin = Twin(Case("", lambda: net(act), signals(16, 5, 8), cross_entropy))
    twin.check_products()
    if act is F.relu:
        twin.check_columns()


# --- losses that see more than the output


class Auxiliary(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 5), act

    def forward(self, x):
        self.hidden = self.act(self.a(x))
        return self.c(self.act(self.b(self.hidden)) + self.hidden)


def auxiliary(model, batch):
    return mse(model, batch) + 0.1 * model.hidden.square().mean()


def quartic_auxiliary(model, batch):
    return mse(model, batch) + 0.1 * model.hidden.pow(4).mean()


@pytest.mark.parametrize("loss", [auxiliary, quartic_auxiliary])
@pytest.mark.parametrize("act", [F.relu, F.gelu])
def test_a_loss_on_a_hidden_layer_is_not_measured_wrongly(act, loss):
    twin = Twin(Case("", lambda: Auxiliary(act), pairs(32), loss))
    twin.check_products()
    try:
        found = GGNCurvature()(twin.problem(), twin.directions)
    except MeasurementError as error:
        assert "use curvature='exact'" in str(error)  # noqa: PT017
    else:
        twin.check(found)
    found = measure_spectra(twin.net, twin.batch, loss, top_k=4)
    agrees(found, measure_spectra(twin.net, twin.batch, loss, top_k=4, curvature="exact"))


def pinball(model, batch):
    error = batch[1] - model(batch[0])
    return torch.max(0.9 * error, -0.1 * error).mean()


@pytest.mark.parametrize("act", [nn.Tanh, nn.GELU])
@pytest.mark.parametrize("loss", [pinball, lambda m, b: F.l1_loss(m(b[0]), b[1])], ids=["pinball", "mae"])
def test_a_piecewise_linear_loss_behind_a_bent_network(loss, act):
    def net():
        return nn.Sequential(nn.Linear(8, 12), act(), nn.Linear(12, 12), act(), nn.Linear(12, 5))

    twin = Twin(Case("", net, pairs(32), loss), k=3)
    assert all(bool(h.any()) for name, h in twin.expected.items() if name != "4.weight")
    twin.check_products()
    expected = measure_spectra(twin.net, twin.batch, loss, top_k=4, curvature="exact")
    agrees(measure_spectra(twin.net, twin.batch, loss, top_k=4, curvature="sketch"), expected)
    agrees(measure_spectra(twin.net, twin.batch, loss, top_k=4), expected)


@pytest.mark.parametrize("method", ["ggn", "auto"])
@pytest.mark.parametrize("loss", [pinball, lambda m, b: F.l1_loss(m(b[0]), b[1])], ids=["pinball", "mae"])
def test_a_piecewise_linear_loss_of_a_piecewise_linear_network_has_no_curvature(loss, method):
    net, batch = Case("", relu_net, pairs(), loss).build()
    found = measure_spectra(net, batch, loss, top_k=4, curvature=method)
    assert all(torch.equal(layer.h, torch.zeros(4).double()) for layer in found.layers.values())
    assert not any(layer.h_stderr.any() for layer in found.layers.values())


@pytest.mark.parametrize("net", [gelu_net, lambda: Recurrent(torch.tanh), Albert])
def test_sketches_of_all_layers_are_right_within_their_errors(net):
    data = labelled(32) if net is gelu_net else signals(32, 3, 8 if net is Albert else 4)
    model, batch = Case("", net, data, cross_entropy).build()
    expected = measure_spectra(model, batch, cross_entropy, top_k=4, curvature="exact")
    agrees(measure_spectra(model, batch, cross_entropy, top_k=4, curvature="sketch"), expected)
    agrees(measure_spectra(model, batch, cross_entropy, top_k=4), expected)
