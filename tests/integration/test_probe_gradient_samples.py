"""A probe whose gradient is of more batches than its curvature: how many, which, and what training notices of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from identical import assert_identical
from modules import fit
from sklearn.datasets import load_digits
from tiny import Small, Tiny
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_spectral import SpectralProbe, measure_spectra
from lightning_spectral.callbacks.batch_source import FIRST_BATCHES
from lightning_spectral.callbacks.probe_trigger import ProbeTrigger
from lightning_spectral.measurement.gradient_samples import samples_for_aim
from lightning_spectral.numerics.statistics import median

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

SIZE = 8


class Numbered(Dataset):
    """Batches that tell their number."""

    def __init__(self, n=400):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        x = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(i))
        return x, x[:, :5].argmax(1)


def joined(numbers):
    return tuple(torch.cat(part) for part in zip(*(Numbered()[i] for i in numbers), strict=True))


class Still(Tiny):
    """Weights that training leaves as they are, so that every batch is measured at the same ones."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train(probe, module, *, steps, batches=400, **options):
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[probe], logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    loader = batches if isinstance(batches, DataLoader) else DataLoader(Numbered(batches), batch_size=None)
    trainer.fit(module, loader)
    return trainer


def close(found, expected):
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].sigma, layer.sigma, rtol=1e-4, atol=1e-6)


def test_a_number_of_samples_is_collected_from_the_probes_step_on():
    module, probe = Still(), SpectralProbe(every_n_steps=10, top_k=4, gradient_samples=5 * SIZE)
    train(probe, module, steps=20)
    assert [report.step for report in probe.history] == [4, 14]
    assert {(report.n_samples, report.n_batches, report.curvature_samples) for report in probe.history} == {(40, 5, 8)}
    for report, first in zip(probe.history, (0, 10), strict=True):
        close(report, measure_spectra(module, joined(range(first, first + 5)), top_k=4))
    one = measure_spectra(module, joined([0, 1, 2, 3, 4]), top_k=4, gradient_samples=40, max_samples=SIZE)
    for name, layer in one.layers.items():
        torch.testing.assert_close(probe.history[0].layers[name].h, layer.h, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("batches", "steps"), [(3, [2, 6, 10]), (2, [1, 3, 5, 7, 9, 11])])
def test_more_samples_than_there_are_between_two_probes_are_told_once(batches, steps, recwarn):
    probe = SpectralProbe(every_n_steps=2, top_k=4, gradient_samples=batches * SIZE)
    train(probe, Still(), steps=12)
    assert [report.step for report in probe.history] == steps
    assert [text for w in recwarn if "less often" in (text := str(w.message))] == [
        "a probe takes gradient_samples=24 of training, more than there are in every_n_steps=2 steps, so probes come "
        "less often"
    ] * (batches == 3)


def test_auto_takes_what_the_noise_of_the_first_batch_asks_for():
    module, probe = Still(), SpectralProbe(every_n_steps=50, top_k=4, gradient_samples="auto")
    train(probe, module, steps=30)
    first = measure_spectra(module, joined([0]), top_k=4)
    noise_scale = median(layer.gradient_noise.noise_scale for layer in first.layers.values())
    samples = min(samples_for_aim(noise_scale, 4096), FIRST_BATCHES * SIZE)
    (report,) = probe.history
    assert report.n_batches == math.ceil(samples / SIZE) > 1
    assert report.step == report.n_batches - 1


def test_the_next_gradient_costs_at_most_what_the_rest_did():
    module, probe = Still(), SpectralProbe(every_n_steps=40, top_k=4, gradient_samples="auto")
    train(probe, module, steps=100, batches=2000)
    first, second, *_ = probe.history
    per_sample = first.gradient_seconds / first.n_samples
    affordable = (first.seconds - first.gradient_seconds) / per_sample + first.curvature_samples
    assert second.n_samples <= max(affordable, SIZE) + SIZE
    assert second.n_batches <= 40


def test_a_loaders_batches_come_at_the_step_that_is_due():
    data = TensorDataset(*joined(range(100)))
    loader = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(0))
    probe = SpectralProbe(every_n_steps=4, top_k=4, batch=loader, gradient_samples="auto")
    train(probe, Still(), steps=10)
    assert [report.step for report in probe.history] == [0, 4, 8]
    assert all(report.n_samples >= 16 for report in probe.history)
    assert probe.history[1].n_samples > 16


def test_no_more_than_an_epoch_has():
    module, probe = Still(), SpectralProbe(every_n_steps=20, top_k=4, gradient_samples=1000)
    train(probe, module, steps=15, batches=6)
    (report,) = probe.history
    assert (report.n_batches, report.n_samples) == (6, 48)
    assert "gradient_samples: 1000 were asked for, and there are 48" in report.warnings


def test_no_more_than_the_run_or_the_schedule_has_room_for():
    module, probe = Still(), SpectralProbe(every_n_steps=1000, top_k=4, gradient_samples="auto")
    train(probe, module, steps=3)
    assert [report.n_batches for report in probe.history] == [3]
    probe = SpectralProbe(every_n_steps=2, top_k=4, gradient_samples="auto")
    train(probe, Still(), steps=8)
    assert all(report.n_batches <= 2 for report in probe.history)
    assert len(probe.history) == 4


def test_batches_of_one_step_are_at_most_those_of_an_epoch():
    probe = SpectralProbe(every_n_steps=1, top_k=4, n_batches=8, gradient_samples=None)
    with pytest.warns(Warning, match="n_batches=8 batches of one optimizer step are more than an epoch has"):
        train(probe, Still(), steps=4, batches=3, accumulate_grad_batches=8)
    assert probe.history
    assert {report.n_batches for report in probe.history} == {3}


@pytest.mark.parametrize("gradient_samples", ["auto", 64])
def test_training_goes_on_as_without(gradient_samples):
    states = []
    for probes in ([], [SpectralProbe(every_n_steps=3, top_k=4, gradient_samples=gradient_samples)]):
        pl.seed_everything(0, verbose=False)
        module = Small()
        x, y = joined(range(20))
        fit(module, probes, steps=14, data=TensorDataset(x, y), batch_size=12)
        states.append([*module.state_dict().values(), torch.get_rng_state()])
    assert_identical(*states)


def test_a_resumed_run_knows_the_noise(tmp_path):
    first = SpectralProbe(every_n_steps=5, top_k=4, gradient_samples="auto")
    trainer = train(first, Tiny(), steps=8)
    trainer.save_checkpoint(tmp_path / "eight.ckpt")
    resumed = SpectralProbe(every_n_steps=5, top_k=4, gradient_samples="auto")
    resumed.load_state_dict(first.state_dict())
    scales = [layer.gradient_noise.noise_scale for layer in first.last_report.layers.values()]
    assert resumed.trigger._noise_scale == median(scales)


def test_a_loss_whose_samples_cannot_be_counted_is_measured_on_the_batch():
    class Uncounted(Still):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    class Weighted(Numbered):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return {"x": x, "y": y, "weight": torch.ones(3)}

    probe = SpectralProbe(every_n_steps=5, top_k=4, gradient_samples="auto")
    trainer = pl.Trainer(
        max_steps=8, max_epochs=-1, callbacks=[probe], logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Uncounted(), DataLoader(Weighted(), batch_size=None))
    assert [(report.step, report.n_batches, report.n_samples) for report in probe.history] == [
        (0, 1, None),
        (5, 1, None),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_default_is_nearer_to_all_samples_than_a_batch_is(seed, monkeypatch):
    # Noise alone decides how many samples are taken, not how busy the machine is.
    follow = ProbeTrigger.follow
    monkeypatch.setattr(
        ProbeTrigger,
        "follow",
        lambda self, report: follow(self, report and replace(report, seconds=1.0, gradient_seconds=0.01)),
    )
    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(100):
        of_batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[of_batch]), y[of_batch]).backward()
        optimizer.step()
    module = Still(net)
    everything = measure_spectra(module, (x, y), max_samples=len(x))
    errors, signals = {}, {}
    for gradient_samples in (None, "auto"):
        probe = SpectralProbe(every_n_steps=30, gradient_samples=gradient_samples)
        train(probe, module, steps=145, batches=DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
        found = [
            abs(layer.alpha.exponent - everything.layers[name].alpha.exponent)
            for report in probe.history
            for name, layer in report.layers.items()
        ]
        errors[gradient_samples] = median(found)
        signals[gradient_samples] = median(r.medians()["signal_median"] for r in probe.history)
    assert errors["auto"] < 0.6 * errors[None]
    assert errors["auto"] < 0.1
    assert signals["auto"] > signals[None]
