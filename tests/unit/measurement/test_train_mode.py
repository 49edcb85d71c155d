"""A loss that is another in eval mode than in train mode is told; dropout and normalisation are no such difference."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from micro_batches import batch_of
from modules import fit
from tiny import Tiny
from torch import nn
from torch.utils.data import TensorDataset

from lightning_spectral import SpectralProbe, measure_spectra

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


class Unscaled(nn.Module):
    def forward(self, z):
        return z if self.training else 25 * z + 100


class Probabilities(nn.Module):
    def forward(self, z):
        return z if self.training else 9 * z.softmax(1)


class FunctionalDropout(nn.Module):
    def forward(self, z):
        return F.dropout(z, 0.5, self.training)


class Attention(nn.Module):
    def forward(self, z):
        q = z[:, None, :, None]
        p = 0.5 if self.training else 0.0
        return F.scaled_dot_product_attention(q, q, q, dropout_p=p)[:, 0, :, 0]


class DropPath(nn.Module):
    """Stochastic depth, by its usual name."""

    def forward(self, z):
        return z * (torch.rand(len(z), 1) > 0.5) if self.training else z


class Depth(nn.Module):
    """Stochastic depth by another name."""

    def forward(self, z):
        if not self.training:
            return z
        kept = 0.5
        kept += torch.rand([len(z), 1], dtype=z.dtype)
        return z / 0.5 * torch.floor(kept)


class Noisy(nn.Module):
    """Draws in both modes, and is another in evaluation."""

    def forward(self, z):
        z = z + 1e-3 * torch.randn_like(z)
        return z if self.training else 25 * z + 100


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 8, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, z):
        return self.rnn(z[:, None])[0][:, 0]


def network(part):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), part, nn.Linear(8, 5))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def texts(report):
    return [text for text in report.warnings if "in train mode" in text]


def measured(model, batch=None, **options):
    batch = batch or tuple(x.float() if x.is_floating_point() else x for x in batch_of(64))
    return measure_spectra(model, batch, loss, top_k=3, **options)


def test_a_network_that_draws_in_both_modes_is_told_of():
    (text,) = texts(measured(network(Noisy())))
    assert "in eval mode" in text


@pytest.mark.parametrize("part", [Unscaled, Probabilities])
def test_another_loss_in_training_is_told_with_both_numbers(part):
    model = network(part())
    x, y = batch_of(64)
    batch = x.float(), y
    report = measured(model, batch)
    trained, evaluated = (float(loss(model.train(mode), batch).detach()) for mode in (True, False))
    (text,) = texts(report)
    assert f"{evaluated:.4g} in eval mode and {trained:.4g} in train mode" in text
    assert "mode='train', or give a loss_fn" in text
    assert not texts(measured(model, batch, mode="train"))


@pytest.mark.parametrize(
    "part",
    [
        lambda: nn.Dropout(0.5), lambda: nn.AlphaDropout(0.5), FunctionalDropout, Attention, DropPath, Depth, Recurrent,
        lambda: nn.BatchNorm1d(8), lambda: nn.RReLU(),
    ],
    ids=["dropout", "alpha", "functional", "attention", "droppath", "depth", "recurrent", "batchnorm", "rrelu"],
)  # fmt: skip
def test_dropout_and_statistics_are_no_other_loss(part):
    model = network(part())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    assert not texts(measured(model))
    assert [module.training for module in model.modules()] == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_probe_says_it_once_and_computes_it_once():
    class Counted(Tiny):
        calls = 0

        def training_step(self, batch, batch_idx):
            if "log" in self.__dict__ and self.net[2].training:
                # A probe's copy, whose logging is muted.
                Counted.calls += 1
            return super().training_step(batch, batch_idx)

    module = Counted(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Unscaled(), nn.Linear(8, 5)))
    x, y = batch_of(64)
    probe = SpectralProbe(every_n_steps=1, top_k=3, step=False)
    with pytest.warns(Warning, match="in eval mode and .* in train mode") as caught:
        fit(module, [probe], steps=3, data=TensorDataset(x.float(), y))
    assert sum("in train mode" in str(warning.message) for warning in caught) == 1
    assert Counted.calls == 1
    assert probe.probes == 3


def test_a_warning_that_was_shown_is_not_shown_again_at_each_measurement():
    class Warns(nn.Linear):
        def forward(self, x):
            warnings.warn(f"in train mode: {self.training}", UserWarning, stacklevel=1)
            return super().forward(x)

    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Warns(8, 5)), torch.randn(24, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        before = list(warnings.filters)
        for _ in range(3):
            # A loss without a Hessian.
            measure_spectra(net, x, lambda m, x: m(x).abs().mean())
        assert warnings.filters == before
    shown = [str(warning.message).partition(": ")[2] for warning in caught]
    assert sorted(text[:22] for text in shown) == ["False", "its Hessian is zero: t"]
