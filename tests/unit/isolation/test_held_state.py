"""State that is no buffer: put back before each call of the loss, so that a loss that keeps it can be measured."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from identical import assert_identical
from modules import fit
from tiny import Repeated, Tiny, batch_of
from torch import nn
from torch.utils.data import TensorDataset

from lightning_spectral import MeasurementError, SpectralProbe, measure_spectra

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

STEPS = 3


class Schedule:
    """An annealed weight that is no module."""

    def __init__(self):
        self.step, self.values = 0, Counter()

    def __call__(self):
        self.step += 1
        self.values["calls"] += 1
        return 1 + self.step + self.values["calls"]


class Stateful(Tiny):
    """Scales its loss by a state of some kind, and moves the state on at each call."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.n, self.schedule, self.queue = kind, 0, Schedule(), deque(maxlen=4)
        self.settings, self.seen, self.ordered = {"weight": 1.0}, set(), OrderedDict(a=1.0, b=2.0)
        self.memory, self.array, self.hidden = torch.ones(4), np.ones(3), None
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("ranges", torch.zeros(0))
        self.generator, self.python, self.numpy = (
            torch.Generator().manual_seed(1),
            random.Random(2),
            np.random.default_rng(3),
        )
        calls = 0

        def count():
            nonlocal calls
            calls += 1
            return calls

        self.count = count

    def factor(self, features):  # noqa: C901
        if self.kind == "number":
            self.n += 1
            return 1 + self.n
        if self.kind == "schedule":
            return self.schedule()
        if self.kind == "closure":
            return 1 + self.count()
        if self.kind == "queue":
            self.queue.append(features.detach().mean())
            return 1 + len(self.queue) + sum(self.queue)
        if self.kind == "containers":
            self.settings["weight"] += 1
            self.seen.add(len(self.seen))
            self.ordered.move_to_end("a" if next(iter(self.ordered)) == "a" else "b")
            return self.settings["weight"] + len(self.seen) + next(iter(self.ordered.values()))
        if self.kind == "memory":
            self.memory[0] += 1
            return self.memory.sum()
        if self.kind == "memory_with_a_graph":
            self.memory[:2] = features.mean(0)[:2]
            loss = self.memory.sum()
            self.memory = self.memory.detach()
            return 1 + loss.detach()
        if self.kind == "array":
            self.array += 1
            return float(self.array.sum())
        if self.kind == "buffer_replaced":
            self.average = 0.9 * self.average + 0.1 * (1 + features.detach().mean(0))
            return 1 + self.average.sum()
        if self.kind == "buffer_resized":
            self.ranges.resize_(len(self.ranges) + 1).fill_(2.0)
            return self.ranges.sum()
        if self.kind == "generators":
            return 1 + torch.rand(1, generator=self.generator) + self.python.random() + self.numpy.random()
        before = 0 if self.hidden is None else self.hidden.mean()
        self.hidden = torch.tanh(features).detach() + 1
        return 1 + before

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor(self.net[0](batch[0]))


KINDS = (
    "number", "schedule", "closure", "queue", "containers", "memory", "memory_with_a_graph", "array", "buffer_replaced",
    "buffer_resized", "generators", "hidden",
)  # fmt: skip


def state_of(module):
    return {
        "weights": module.state_dict(),
        "numbers": (module.n, module.schedule.step, dict(module.schedule.values), module.count(), list(module.queue)),
        "containers": (module.settings, sorted(module.seen), list(module.ordered)),
        "tensors": (module.memory, torch.as_tensor(module.array), module.hidden, module.generator.get_state()),
        "random": (module.python.random(), module.numpy.random()),
    }


def train(kind, probe=None):
    torch.manual_seed(0)
    module = Stateful(kind)
    fit(module, [probe] if probe else [], data=Repeated(batch_of()), batch_size=None, steps=STEPS)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_keeps_state_is_measured_and_not_changed(kind):
    probe = SpectralProbe(every_n_steps=1, top_k=4, curvature="sketch")
    plain, probed = train(kind), train(kind, probe)
    assert (probe.probes, probe.failed_probes) == (STEPS, 0)
    assert_identical(state_of(plain), state_of(probed))


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


class Scheduled(Tiny):
    """Moves what it shares with its Trainer, and its loss with it."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.source = kind, TensorDataset(torch.zeros(1))
        self.source.calls = 0

    def configure_optimizers(self):
        lr = torch.tensor(1e-2) if self.kind == "rate_in_a_tensor" else 1e-2
        optimizer = torch.optim.SGD(self.parameters(), lr=lr)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        if self.kind == "rate_in_a_tensor":
            return optimizer
        chosen = torch.optim.lr_scheduler.SequentialLR(optimizer, [constant, decay], [2])
        self.own = decay if self.kind == "own_scheduler" else None
        return [optimizer], [{"scheduler": chosen if self.kind == "sequence" else decay, "interval": "epoch"}]

    def training_step(self, batch, batch_idx):
        if self.kind == "trainer":
            self.trainer.optimizers[0].param_groups[0]["lr"] *= 0.9
        elif self.kind == "rate_in_a_tensor":
            self.optimizers().param_groups[0]["lr"].mul_(0.9)
        elif self.kind == "optimizer":
            self.optimizers().param_groups[0]["weight_decay"] += 0.1
        elif self.kind == "dataset":
            self.source.calls += 1
        else:
            (self.own or self.lr_schedulers()).step()
        group = self.optimizers().param_groups[0]
        return super().training_step(batch, batch_idx) * float(
            1 + group["lr"] + group["weight_decay"] + self.source.calls
        )


@pytest.mark.parametrize("curvature", ["exact", "sketch"])
@pytest.mark.parametrize(
    "kind", ["trainer", "optimizer", "rate_in_a_tensor", "scheduler", "sequence", "own_scheduler", "dataset"]
)
def test_what_a_training_step_writes_on_optimizers_schedulers_and_datasets_is_put_back(kind, curvature):
    states = []
    for probes in ([], [probe := SpectralProbe(every_n_steps=1, top_k=4, curvature=curvature)]):
        torch.manual_seed(0)
        module = Scheduled(kind)
        trainer = fit(module, probes, data=Repeated(batch_of()), batch_size=None, steps=5)
        group = {key: value for key, value in trainer.optimizers[0].param_groups[0].items() if key != "params"}
        epochs = [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs]
        states.append((module.state_dict(), group, epochs, module.source.calls))
    assert_identical(*states)
    assert probe.history
    assert not probe.failed_probes


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
