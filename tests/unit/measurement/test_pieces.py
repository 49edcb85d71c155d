"""Measuring in pieces, over several batches, and again where memory runs out, against one go in float64."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from cases import cross_entropy, vectors
from micro_batches import SAMPLES, batch_of, gelu_mlp, ignoring, relu_mlp, summed
from stand_ins import OutOfMemory
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import MeasurementError, measure_spectra
from lightning_spectral.curvature import Curvatures
from lightning_spectral.curvature import sketch as sketch_module
from lightning_spectral.curvature.sketch import SketchCurvature
from lightning_spectral.isolation.replay import InitialState
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.measurement import estimation
from lightning_spectral.measurement.directions import leading_directions
from lightning_spectral.measurement.estimation import Evaluation, weighted_sum
from lightning_spectral.measurement.gradients import sum_gradients
from lightning_spectral.measurement.loader_batches import CpuBatches
from lightning_spectral.measurement.micro_batches import TRIES
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.options import Options

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

METHODS = ("exact", "ggn", "sketch")


def by_hand(model, batch):
    return (model(batch[0]).square().sum(1) * (1 + batch[1])).mean()


def close(found, expected, rtol=1e-9):
    assert found.layers.keys() == expected.layers.keys()
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].sigma, layer.sigma, rtol=rtol, atol=1e-12)
        torch.testing.assert_close(found.layers[name].h, layer.h, rtol=rtol, atol=1e-12, equal_nan=True)


def ignored_labels():
    """Two of three targets in the first half are ignored, none in the second."""
    x, y = batch_of()
    labels = y.clone()
    labels[: SAMPLES // 2][torch.arange(SAMPLES // 2) % 3 > 0] = -100
    return x, y, labels


@pytest.mark.parametrize("size", [1, 7, 24, 48, 1000])
@pytest.mark.parametrize("method", ["exact", "ggn", "auto"])
def test_pieces_of_any_size_give_the_same(method, size):
    model, batch = relu_mlp().double(), batch_of()
    expected = measure_spectra(model, batch, cross_entropy, curvature="exact", top_k=4, micro_batch_size=SAMPLES)
    found = measure_spectra(model, batch, cross_entropy, curvature=method, top_k=4, micro_batch_size=size)
    close(found, expected)
    assert (found.micro_batch_size, found.n_samples, found.n_batches) == (min(size, SAMPLES), SAMPLES, 1)


@pytest.mark.parametrize("loss", [summed, ignoring, by_hand])
def test_weights_of_pieces_are_those_of_the_loss(loss):
    model, batch = gelu_mlp().double(), ignored_labels()
    expected = measure_spectra(model, batch, loss, curvature="exact", top_k=4, micro_batch_size=SAMPLES)
    close(measure_spectra(model, batch, loss, curvature="exact", top_k=4, micro_batch_size=10), expected)


def test_pieces_without_a_target_are_left_out():
    model, (x, _, labels) = gelu_mlp().double(), ignored_labels()
    labels[:16] = -100
    batch = (x, labels)
    expected = measure_spectra(model, batch, cross_entropy, curvature="exact", top_k=4, micro_batch_size=SAMPLES)
    close(measure_spectra(model, batch, cross_entropy, curvature="exact", top_k=4, micro_batch_size=8), expected)


def batch_norm():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 5))


def fixed_view(model, batch):
    return F.cross_entropy(model(batch[0]).view(4, SAMPLES // 4, 5).flatten(0, 1), batch[1])


@pytest.mark.parametrize(
    ("model", "loss", "mode", "message"),
    [
        (batch_norm, cross_entropy, "train", r"micro_batch_size: the loss of the batch, .* is neither a mean nor the"),
        (relu_mlp, fixed_view, "eval", r"micro_batch_size: the loss fails on samples 0 to 24 .*RuntimeError: shape"),
        (relu_mlp, lambda m, b: m(b[0]), "eval", "loss_fn must return a scalar, got shape"),
    ],
)
def test_losses_that_have_no_pieces_are_measured_whole_unless_pieces_were_asked_for(model, loss, mode, message):
    model, batch = model().double(), batch_of()
    with pytest.raises(MeasurementError, match=message):
        measure_spectra(model, batch, loss, curvature="exact", mode=mode, top_k=4, micro_batch_size=24)
    if loss(model, batch).numel() == 1:
        found = measure_spectra(model, batch, loss, curvature="exact", mode=mode, top_k=4)
        assert found.micro_batch_size == SAMPLES


def summed_with_decay(model, batch):
    """A sum and a term that each piece counts: 8e-7 of the loss, and 1 % of a curvature, in pieces of one sample."""
    return summed(model, batch) + 1e-6 * model[-1].weight.square().sum()


def across(model, batch):
    """A mean but for a term across the samples that their outputs, which differ little, keep small."""
    z = model(batch[0])
    return ((z - 1).square().sum(1) * (1 + batch[1])).mean() + (z - z.mean(0)).square().mean()


@pytest.mark.parametrize("loss", [summed_with_decay, across])
def test_a_small_term_that_is_no_sum_over_samples_is_not_taken_for_rounding_in_float64(loss):
    model, (x, y) = gelu_mlp().double(), batch_of()
    batch = (x if loss is summed_with_decay else 0.1 * x, y)
    with torch.no_grad():
        whole = loss(model, batch)
        each = torch.stack([loss(model, (batch[0][i : i + 24], y[i : i + 24])) for i in (0, 24)])
    total = each.sum() if loss is summed_with_decay else each.mean()
    assert 1e-10 < abs(total / whole - 1) < 1e-5
    with pytest.raises(
        MeasurementError, match=r"micro_batch_size: the loss of the batch, .* is neither a mean nor the"
    ):
        measure_spectra(model, batch, loss, curvature="exact", top_k=4, micro_batch_size=24)
    found = measure_spectra(model, batch, loss, curvature="exact", top_k=4)
    assert found.micro_batch_size == SAMPLES
    close(found, measure_spectra(model, batch, loss, curvature="exact", top_k=4, micro_batch_size=SAMPLES))


def masked_mean(model, batch):
    """The mean over the targets of class 3 and above, by hand."""
    each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    mask = (batch[1] >= 3).double()
    return (each * mask).sum() / mask.sum()


@pytest.mark.parametrize("method", ["exact", "ggn", "sketch"])
def test_a_head_of_zeros_does_not_hide_the_weights_of_pieces(method):
    """All losses of pieces are log C, whatever their weights; the gradients are not equal."""
    model, batch = gelu_mlp().double(), batch_of()
    model[-1].weight.data.mul_(1e-6)
    model[-1].bias.data.zero_()
    expected = measure_spectra(model, batch, masked_mean, curvature="exact", top_k=4, micro_batch_size=SAMPLES)
    found = measure_spectra(model, batch, masked_mean, curvature=method, top_k=4)
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].sigma, layer.sigma, rtol=1e-9, atol=1e-14)
    assert found.micro_batch_size == SAMPLES
    with pytest.raises(MeasurementError, match=r"micro_batch_size: the losses of the micro-batches are equal \(1\.609"):
        measure_spectra(model, batch, masked_mean, curvature=method, micro_batch_size=24)
    known = measure_spectra(model, batch, cross_entropy, curvature=method, micro_batch_size=24)
    assert known.micro_batch_size == 24


def test_losses_that_are_all_zero_are_a_sum_as_well_as_a_mean():
    """As those of samples that a margin satisfies."""
    model = relu_mlp().double()

    def satisfied(model, batch):
        return F.relu(model(batch[0]) - 100).mean()

    report = measure_spectra(model, batch_of(), satisfied, curvature="exact", top_k=4, micro_batch_size=12)
    assert report.micro_batch_size == 12


def test_losses_that_add_up_to_zero_do_not_tell_a_mean_from_a_sum():
    """As those of a policy gradient, whose advantages have a mean of zero; the gradient is not zero."""

    def policy(model, batch):
        x, advantage = batch
        log_p = model(x).log_softmax(1)[:, 0]
        return -((log_p - log_p.detach()).exp() * advantage).mean()

    x, _ = batch_of()
    model, advantage = relu_mlp().double(), torch.arange(SAMPLES).double() - (SAMPLES - 1) / 2
    with pytest.raises(
        MeasurementError, match="micro_batch_size: the losses of the micro-batches add up to zero, so th"
    ):
        measure_spectra(model, (x, advantage), policy, curvature="exact", top_k=4, micro_batch_size=12)
    expected = measure_spectra(model, (x, advantage), policy, curvature="exact", top_k=4)
    found = measure_spectra(
        model, (x, advantage), policy, curvature="exact", top_k=4, gradient_samples=SAMPLES, max_samples=12
    )
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].sigma, layer.sigma, rtol=1e-9, atol=1e-12)


def test_pieces_whose_gradients_do_not_add_up_are_given_up(monkeypatch):
    model, batch = gelu_mlp().double(), batch_of()
    expected = measure_spectra(model, batch, cross_entropy, curvature="exact", top_k=4, micro_batch_size=SAMPLES)
    monkeypatch.setattr(Objective, "_weights", lambda self, parts: [0.9 / len(parts)] * len(parts))
    found = measure_spectra(model, batch, cross_entropy, curvature="exact", top_k=4)
    close(found, expected)
    assert found.micro_batch_size == SAMPLES


def test_pieces_that_leave_a_layer_out_are_given_up():
    """A gradient without a value, which only the whole batch has."""
    model, batch = gelu_mlp().double(), batch_of()
    model.append(nn.Identity())
    model[-1].extra = nn.Linear(3, 3, bias=False).double()

    def loss(network, part):
        value = cross_entropy(network, part)
        total = network[-1].extra.weight.square().sum()
        return value + (total - total.detach() if len(part[0]) == SAMPLES else 0.0)

    found = measure_spectra(model, batch, loss, curvature="exact", top_k=3)
    assert found.micro_batch_size == SAMPLES


def test_a_loss_that_is_not_finite_is_told_as_such():
    model, batch = relu_mlp().double(), batch_of()
    model[0].weight.data.fill_(float("nan"))
    with pytest.raises(MeasurementError, match="the loss is nan"):
        measure_spectra(model, batch, cross_entropy, micro_batch_size=24)


def test_small_pieces_do_not_decide_the_method():
    model, batch = gelu_mlp().double(), batch_of(64)
    found = measure_spectra(model, batch, cross_entropy, top_k=4, micro_batch_size=16)
    assert found.chosen.startswith("sketch: Gelu")


def test_a_piece_without_curvature_passes_the_check():
    model, (x, y) = relu_mlp().double(), batch_of(64)
    x[:16] = 0
    for layer in (model[0], model[2]):
        layer.bias.data.zero_()
    assert measure_spectra(model, (x, y), cross_entropy, top_k=3, micro_batch_size=16).chosen.startswith("ggn")


def test_first_samples_are_cut_when_they_are_fetched():
    loader = DataLoader(TensorDataset(*batch_of(40)), batch_size=10)
    found = measure_spectra(gelu_mlp().double(), loader, cross_entropy, n_batches=3, max_samples=4, top_k=3)
    assert (found.n_samples, found.n_batches) == (12, 3)


def test_a_batch_that_cannot_be_cut():
    model, (x, y) = relu_mlp().double(), batch_of()
    uneven = (x, y, torch.zeros(3))
    assert measure_spectra(model, uneven, cross_entropy, curvature="exact", top_k=3).micro_batch_size is None
    with pytest.raises(MeasurementError, match=r"micro_batch_size: the batch cannot be cut by samples"):
        measure_spectra(model, uneven, cross_entropy, micro_batch_size=4)


def cut_small_batches(monkeypatch):
    """As the large ones that take more memory than is used without asking."""
    monkeypatch.setattr(estimation, "SMALL_BYTES", 0)


def test_default_pieces_keep_to_the_memory_aimed_at(monkeypatch):
    model, batch = gelu_mlp().double(), batch_of()
    for method in METHODS:
        small = measure_spectra(model, batch, cross_entropy, curvature=method, top_k=3)
        assert small.micro_batch_size == SAMPLES
    cut_small_batches(monkeypatch)
    sizes = {m: measure_spectra(model, batch, cross_entropy, curvature=m, top_k=3).micro_batch_size for m in METHODS}
    assert sizes["ggn"] == SAMPLES
    assert sizes["sketch"] < sizes["exact"] < SAMPLES


@pytest.mark.parametrize("method", METHODS)
def test_the_size_told_is_the_largest_of_all_phases(method):
    model, batch = gelu_mlp().double(), batch_of(64)
    options = {"curvature": method, "top_k": 3}
    alone = measure_spectra(model, batch, cross_entropy, **options).micro_batch_size
    both = measure_spectra(model, batch, cross_entropy, curvature_fraction=2, **options).micro_batch_size
    # The trace goes through pieces of 22.
    assert both == max(alone, 22)
    whole = measure_spectra(model, batch, cross_entropy, curvature_fraction=2, micro_batch_size=64, **options)
    assert whole.micro_batch_size == 64


def test_pieces_take_the_signs_of_their_own_samples(monkeypatch):
    """Orthogonal over the whole batch, which they would not be if every piece had those of the first samples."""
    model, batch = gelu_mlp().double(), batch_of(64)
    seen, make = [], sketch_module._Products.__init__

    def noted(self, *args):
        make(self, *args)
        seen.append(self._signs(8))

    monkeypatch.setattr(sketch_module._Products, "__init__", noted)
    beginning = InitialState(model)
    layers = find_layers(model).layers
    parameters = {name: dict(model.named_parameters())[name] for name in layers}
    objective = Objective(lambda b: cross_entropy(model, b), [batch], layers, parameters, beginning)
    micro_batches = objective.micro_batches(16)
    gradients = sum_gradients(objective, micro_batches)
    directions = leading_directions(gradients, [], objective, Options(top_k=3)).triplets
    Evaluation(objective, micro_batches, gradients.first).measure(SketchCurvature(), directions)
    signs = torch.cat(seen, 1).double()
    torch.testing.assert_close(signs @ signs.T, 64 * torch.eye(8, dtype=torch.float64))
    assert not torch.equal(seen[0], seen[1])


def test_several_batches_are_averaged_by_their_samples():
    model, loss = gelu_mlp().double(), cross_entropy
    x, y = batch_of(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    expected = measure_spectra(model, (x, y), loss, curvature="exact", top_k=4)
    state = torch.get_rng_state()
    found = measure_spectra(model, loader, loss, curvature="exact", top_k=4, n_batches=3)
    assert torch.equal(torch.get_rng_state(), state)
    close(found, expected)
    assert (found.n_batches, found.n_samples) == (3, 40)
    first = measure_spectra(model, loader, loss, curvature="exact", top_k=4)
    close(first, measure_spectra(model, (x[:16], y[:16]), loss, curvature="exact", top_k=4))
    pieces = measure_spectra(model, loader, loss, curvature="ggn", top_k=4, n_batches=3, micro_batch_size=5)
    close(pieces, measure_spectra(model, (x, y), loss, curvature="ggn", top_k=4))


@pytest.mark.parametrize(
    ("batch", "n_batches", "message"),
    [
        (DataLoader(TensorDataset(*batch_of(8)), batch_size=4), 3, "3 batches were asked for, and the .* has 2"),
        (batch_of(8), 2, "n_batches=2 needs a DataLoader as batch, got tuple"),
        (batch_of(8), 0, "n_batches must be a whole number of at least 1, got 0"),
        (TensorDataset(*batch_of(8)), 1, "batch is the data set TensorDataset: give a batch of it, or DataLoader"),
    ],
)  # fmt: skip
def test_bad_batches(batch, n_batches, message):
    with pytest.raises(ValueError, match=message):
        measure_spectra(relu_mlp().double(), batch, cross_entropy, n_batches=n_batches)


def test_micro_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="micro_batch_size must be None or a whole number of at least 1, got 0"):
        measure_spectra(relu_mlp(), vectors(), cross_entropy, micro_batch_size=0)


@pytest.mark.parametrize("method", ["exact", "ggn", "sketch", "auto"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_is_met_with_smaller_pieces(monkeypatch, method, error):
    model, batch = relu_mlp().double(), batch_of()
    expected = measure_spectra(model, batch, cross_entropy, curvature="ggn", top_k=4)
    short = OutOfMemory(monkeypatch, 12, error)
    found = measure_spectra(model, batch, short.loss, curvature=method, top_k=4)
    assert found.micro_batch_size == 12
    if method != "sketch":
        close(found, expected)
    gc.collect()
    assert all(graph() is None for graph in short.graphs)


@pytest.mark.parametrize(("method", "sizes"), [("exact", [48, 24, 12]), ("sketch", [32, 16])])
def test_each_try_halves_what_failed(monkeypatch, method, sizes):
    model, batch = gelu_mlp().double(), batch_of(96)
    cut_small_batches(monkeypatch)
    short = OutOfMemory(monkeypatch, 20, second_order_only=True)
    assert measure_spectra(model, batch, short.loss, curvature=method, top_k=3).micro_batch_size == sizes[-1]
    assert short.failed == sizes[:-1]


def test_out_of_memory_ends_after_three_tries(monkeypatch):
    short = OutOfMemory(monkeypatch, 0)
    with pytest.raises(MeasurementError, match=r"out of memory with 48 samples at once, with 24 .*, with 12 .*max_sam"):
        measure_spectra(relu_mlp().double(), batch_of(), short.loss, micro_batch_size=SAMPLES)
    assert TRIES == 3


def test_out_of_memory_where_there_are_no_pieces(monkeypatch):
    short = OutOfMemory(monkeypatch, 24)
    model, batch = batch_norm().double(), batch_of()
    with pytest.raises(
        MeasurementError, match=r"out of memory with 48 samples at once, and no smaller micro-batches: micro"
    ):
        measure_spectra(model, batch, short.loss, mode="train", curvature="ggn")
    alone = tuple(t[:1] for t in batch)
    with pytest.raises(MeasurementError, match=r"out of memory with 1 samples at once; measure fewer"):
        measure_spectra(relu_mlp().double(), alone, OutOfMemory(monkeypatch, 0).loss)


def test_other_errors_are_no_lack_of_memory():
    calls = []

    def fails(model, batch):
        calls.append(1)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        measure_spectra(relu_mlp(), batch_of(), fails, micro_batch_size=SAMPLES)
    assert len(calls) == 1


def test_joined_curvatures():
    a = Curvatures({"w": torch.tensor([1.0, 2.0])}, "ggn", {}, {"w": torch.tensor([0.3, 0.4])}, notes=("n",))
    b = Curvatures({"w": torch.tensor([3.0, 6.0])}, "exact", {}, {}, notes=("n", "m"), check_error=0.1, chosen="b")
    both = weighted_sum([a, b], [0.25, 0.75])
    torch.testing.assert_close(both.h["w"], torch.tensor([2.5, 5.0]))
    torch.testing.assert_close(both.stderr["w"], torch.tensor([0.075, 0.1]))
    assert (both.methods["w"], both.notes, both.check_error, both.chosen) == ("ggn+exact", ("n", "m"), 0.1, "b")
    failed = weighted_sum([a, Curvatures({"w": torch.zeros(2)}, "exact", {"w": "no"})], [0.5, 0.5])
    assert failed.h["w"].isnan().all()
    assert failed.failed == {"w": "no"}


def test_held_batches_are_copies_that_come_back_as_they_were():
    x = torch.ones(3)
    held = CpuBatches([{"x": x, "name": "n"}])
    x.zero_()
    assert (len(held), held[0]["name"]) == (1, "n")
    assert torch.equal(held[0]["x"], torch.ones(3))
    held[0]["x"].zero_()
    moved = CpuBatches([(torch.ones(2),)], torch.device("meta"))
    assert moved[0][0].device.type == "meta"


class Graphs:
    """A batch of a class of its own."""

    def __init__(self, x):
        self.x = x


def test_held_objects_and_packed_sequences_are_copies():
    graphs, packed = Graphs(torch.ones(3)), pack_padded_sequence(torch.ones(3, 2, 1), torch.tensor([3, 2]))
    held = CpuBatches([(graphs, packed)])
    graphs.x.zero_()
    packed.data.zero_()
    assert torch.equal(held[0][0].x, torch.ones(3))
    assert torch.equal(held[0][1].data, torch.ones(5, 1))
    moved = CpuBatches([packed], torch.device("meta"))[0]
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")
