"""A training that keeps state beside its parameters is measured, and is as without a probe."""

from __future__ import annotations

import pytest
import torch
from identical import assert_identical
from keeps_state import KINDS, Stateful
from modules import fit
from tiny import Repeated, Tiny, batch_of
from torch.utils.data import TensorDataset

from lightning_spectral import SpectralProbe

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

STEPS = 3


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
