"""State that is no buffer: put back before each call of the loss, so that a loss that keeps it can be measured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from identical import assert_identical
from keeps_state import KINDS, Stateful
from tiny import Tiny, batch_of
from torch import nn

from lightning_spectral import MeasurementError, measure_spectra

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


@pytest.mark.parametrize("curvature", ["exact", "ggn", "sketch"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_call_begins_with_the_state_at_the_start(kind, curvature):
    """The twin's factor is a constant: that of the first call."""
    torch.manual_seed(0)
    batch, model = batch_of(), Stateful(kind)
    model.average.fill_(0.5)
    torch.manual_seed(0)
    twin = Stateful(kind)
    twin.average.fill_(0.5)
    factor = float(twin.factor(twin.net[0](batch[0])))
    measured = measure_spectra(model, batch, top_k=4, curvature=curvature)
    expected = measure_spectra(
        Tiny(twin.net), batch, lambda m, b: F.cross_entropy(m.net(b[0]), b[1]) * factor, top_k=4, curvature=curvature
    )
    assert measured.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, layer in expected.layers.items():
        torch.testing.assert_close(measured.layers[name].h, layer.h, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_an_alias_of_a_type_is_no_state():
    model = Tiny()
    model.kinds = {"list": list[int], "dict": dict[str, float]}
    report = measure_spectra(model, batch_of(8))
    assert not report.failed
    assert model.kinds == {"list": list[int], "dict": dict[str, float]}


def test_a_lazy_module_that_no_batch_has_reached_runs_at_each_call():
    model = nn.ModuleDict({"net": nn.Linear(6, 5), "lazy": nn.LazyLinear(3)})
    report = measure_spectra(model, batch_of()[0], lambda m, x: m["net"](x).square().mean() + 0 * m["lazy"](x).sum())
    assert list(report.layers) == ["net.weight"]
    assert isinstance(model["lazy"], nn.LazyLinear)


class Recurrent(Tiny):
    def __init__(self):
        super().__init__()
        self.rnn, self.head, self.state = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 5), {}

    def training_step(self, batch, batch_idx):
        out, hidden = self.rnn(batch[0][:, None], self.state.get("hidden"))
        self.state["hidden"] = tuple(part.detach() for part in hidden)
        return F.cross_entropy(self.head(out[:, -1]), batch[1])


@pytest.mark.parametrize("options", [{"max_samples": 12}, {"micro_batch_size": 12}])
def test_a_state_of_a_whole_batch_is_told_where_fewer_samples_are_measured(options):
    model, batch = Recurrent(), batch_of()
    model.training_step(batch, 0)
    measure_spectra(model, batch, layers=["rnn.*"])
    message = r"Recurrent.state.*, a tensor \(1, 32, 8\) that the model keeps between batches, does not fit \d+ samples"
    with pytest.raises(MeasurementError, match=message):
        measure_spectra(model, batch, layers=["rnn.*"], **options)


class Annealed:
    """Part of a loss function that counts its calls."""

    def __init__(self):
        self.calls, self.weights = 0, torch.ones(5)

    def __call__(self, model, batch):
        self.calls += 1
        self.weights += 1
        return F.cross_entropy(model(batch[0]), batch[1], weight=self.weights) * self.calls


class AnnealedModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.annealed, self.norm = Annealed(), nn.BatchNorm1d(5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, model, batch):
        self.calls += 1
        self.norm(model(batch[0]).detach())
        return self.annealed(lambda x: model(x), batch) * self.calls


@pytest.mark.parametrize("method", [False, True])
def test_a_loss_function_that_counts_its_calls_is_measured_and_left_as_it_was(method):
    model, loss = Tiny().net, AnnealedModule()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    measured = measure_spectra(model, batch_of(), loss.forward if method else loss, top_k=4)
    expected = measure_spectra(model, batch_of(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), top_k=4)
    for name, layer in expected.layers.items():
        torch.testing.assert_close(measured.layers[name].h, layer.h, equal_nan=True)
    assert loss.annealed.calls == 0
    assert torch.equal(loss.annealed.weights, torch.ones(5))
    assert_identical(before, dict(loss.state_dict()))


def test_a_state_outside_the_model_is_told_as_such():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return F.cross_entropy(model(batch[0]), batch[1]) * len(calls)

    with pytest.raises(
        MeasurementError,
        match=r"depends on something that changes outside of it, such as a global.*; use curvature='exact'",
    ):
        measure_spectra(nn.Linear(6, 5), batch_of(), loss)
