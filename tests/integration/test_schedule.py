"""When a probe measures, and which batches."""

from __future__ import annotations

import itertools
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from modules import ConvNet, ProbeRows, fit
from stand_ins import Clock
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_spectral import SpectralProbe, SpectralWarning, measure_spectra
from lightning_spectral.callbacks.time_budget import TimeBudget

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


def simulated(steps, step_seconds, probe_seconds, max_overhead=0.05, budget=None, clock=None, first=0):
    """The steps at which a budget probes, the share of wall time after each, and the budget."""
    clock = clock or Clock()
    if budget is None:
        budget = TimeBudget(max_overhead, 0, clock)
        budget.start(0)
    probed, shares = [], []
    for step in range(first, steps):
        budget.record_step(step)
        if budget.is_due(step):
            seconds = probe_seconds(step) if callable(probe_seconds) else probe_seconds
            clock.now += seconds
            budget.record_probe(step, seconds)
            probed.append(step)
            shares.append(budget.overhead)
        clock.now += step_seconds(step) if callable(step_seconds) else step_seconds
    return probed, shares, budget


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("probe_seconds", [0.02, 0.1, 0.7])
def test_probes_keep_to_their_share_of_wall_time(share, probe_seconds):
    probed, shares, budget = simulated(40_000, 0.01, probe_seconds, share)
    assert probed[0] == 0
    assert len(probed) > 2
    assert math.isnan(shares[0])
    assert max(shares[1:]) <= share
    assert budget.overhead > 0.75 * share
    assert all(b - a >= probe_seconds * (1 / share - 1) / 0.01 - 1 for a, b in itertools.pairwise(probed))


def test_the_share_holds_when_steps_and_probes_change_their_pace():
    for step_seconds in (lambda step: 0.1 if step < 300 else 0.01, lambda step: 0.01 if step < 3000 else 0.1):
        _, shares, _ = simulated(10_000, step_seconds, lambda step: 0.5 if step < 2000 else 0.1)
        assert max(shares[1:]) <= 0.05 + 1e-9


def test_time_is_looked_at_rarely():
    clock = Clock()
    looks = []

    class Watched(TimeBudget):
        def missing(self, share):
            looks.append(1)
            return super().missing(share)

    budget = Watched(0.05, 0, clock)
    budget.start(0)
    probed, _, _ = simulated(10_000, 0.01, 1.0, budget=budget, clock=clock)
    assert len(looks) <= 16 * len(probed)


def test_a_long_pause_is_not_spent_on_a_burst_of_probes():
    probed, _, _ = simulated(20_000, lambda step: 600.0 if step == 5000 else 0.01, 0.1)
    assert all(b - a >= 180 for a, b in itertools.pairwise(probed) if a > 5000)


def test_a_budget_goes_on_where_its_state_left_it():
    clock = Clock()
    # Powers of two, so that no time is rounded.
    whole, _, _ = simulated(4000, 2**-7, 2**-2, 2**-4)
    head, _, budget = simulated(1777, 2**-7, 2**-2, 2**-4, clock=clock)
    state = budget.state_dict()
    clock.now += 1e6
    resumed = TimeBudget(2**-4, 0, clock)
    resumed.load_state_dict(state)
    clock.now += 1e6
    resumed.start(1777)
    tail, _, _ = simulated(4000, 2**-7, 2**-2, budget=resumed, clock=clock, first=1777)
    assert head + tail == whole
    assert len(head) > 1
    assert len(tail) > 1
    assert resumed.state_dict().keys() == state.keys()


def test_time_between_two_fits_does_not_count_and_a_new_training_begins_anew():
    clock = Clock()
    _, _, budget = simulated(100, 0.01, 0.1, clock=clock)
    budget.stop()
    wall = budget.wall_seconds
    clock.now += 1e6
    assert budget.wall_seconds == wall
    budget.start(100)
    assert budget.wall_seconds == wall
    budget.start(0)
    assert budget.is_due(0)
    assert (budget.probe_seconds, budget.wall_seconds) == (0.0, 0.0)


def test_every_process_waits_as_long_as_the_first():
    clock = Clock()
    budget = TimeBudget(0.05, 0, clock)
    budget.start(0)
    assert budget.is_due(0, lambda wait: wait)
    budget.record_probe(0, 1.0)
    clock.now += 1000.0
    assert not budget.is_due(1, lambda wait: 5)
    assert not budget.is_due(5)
    assert budget.is_due(6)


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, "5 %", None])
def test_a_share_lies_between_0_and_1(share):
    with pytest.raises(ValueError, match="max_overhead must be a share of wall time, between 0 and 1, got"):
        SpectralProbe(max_overhead=share)


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Stepped(Tiny):
    """Each step takes a tenth of a second by a clock of its own."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_batch_end(self, *args):
        self.clock.now += 0.1


class Numbered(Dataset):
    """Batches that tell their number."""

    def __init__(self, n=400, size=8):
        self.n, self.size = n, size

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return torch.randn(self.size, 6, generator=generator), torch.full((self.size,), i % 5)


def batches(*numbers, size=8):
    parts = [Numbered(size=size)[i] for i in numbers]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def fit_numbered(probe, module=None, steps=4, logger=False, **options):
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[probe], logger=logger, accelerator="cpu", log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(module or Tiny(), DataLoader(Numbered(), batch_size=None))
    return trainer


def test_the_default_keeps_to_its_budget_in_training():
    clock = Clock()

    class Timed(SpectralProbe):
        def _measure(self, *args):
            clock.now += 0.5
            return super()._measure(*args)

    logger, probe = ProbeRows(), Timed(max_overhead=0.2, top_k=3)
    probe.budget.clock = clock
    fit_numbered(probe, Stepped(clock), steps=120, logger=[logger])
    assert probe.every_n_steps is None
    expected, shares, _ = simulated(120, 0.1, 0.5, 0.2)
    assert [step for step, _ in logger.rows] == expected
    assert [row["spectral/probe_overhead"] for _, row in logger.rows] == pytest.approx(shares, nan_ok=True)
    share = 0.5 * len(shares) / (0.5 * len(shares) + 12.0)
    assert logger.closing == [(120, {"spectral/probe_overhead": pytest.approx(share)})]
    assert all(row["spectral/probe_seconds"] == pytest.approx(0.5) for _, row in logger.rows)


def test_fixed_steps_cost_what_they_cost():
    logger, probe = ProbeRows(), SpectralProbe(every_n_steps=1, max_overhead=0.01, top_k=3)
    with pytest.warns(SpectralWarning, match=r"max_overhead=0.01 has no effect beside every_n_steps=1, which") as told:
        fit_numbered(probe, steps=5, logger=[logger])
    assert len([w for w in told if "no effect beside" in str(w.message)]) == 1
    assert [step for step, _ in logger.rows] == [0, 1, 2, 3, 4]
    assert logger.rows[-1][1]["spectral/probe_overhead"] > 0.01
    assert [step for step, _ in logger.closing] == [5]


def test_the_schedule_survives_a_checkpoint(tmp_path):
    probe = SpectralProbe(max_overhead=0.05, top_k=3)
    trainer = fit_numbered(probe, steps=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = probe.budget.state_dict()
    again = SpectralProbe(max_overhead=0.05, top_k=3)
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(again.budget.state_dict())

    trainer = pl.Trainer(
        max_steps=4, max_epochs=-1, callbacks=[again, Look()], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(Numbered(), batch_size=None), ckpt_path=tmp_path / "a.ckpt")
    assert saved["last_step"] == 0
    # A look that was due before the resume is due at its first step.
    saved["next_look"] = max(saved["next_look"], 3)
    for key in ("last_step", "last_seconds", "probe_seconds", "next_look", "latest"):
        assert seen[0][key] == saved[key], key
    assert seen[0]["wall_seconds"] >= saved["wall_seconds"] > 0


def costly(monkeypatch, seconds):
    """Make the clock of the probe say that each takes so long."""
    real = TimeBudget.record_probe
    monkeypatch.setattr(TimeBudget, "record_probe", lambda self, step, _: real(self, step, seconds))
    monkeypatch.setattr(TimeBudget, "extend_probe", lambda self, _: None)


@pytest.mark.parametrize("steps", [3, 20])
def test_a_probe_that_exceeds_the_whole_budget_is_told_once(monkeypatch, steps):
    costly(monkeypatch, 50.0)
    probe = SpectralProbe(top_k=3)
    with pytest.warns(SpectralWarning, match="a run of .* has room for one probe alone: one takes 50 s") as w:
        fit_numbered(probe, steps=steps)
    (text,) = [str(x.message) for x in w if "one probe" in str(x.message)]
    assert "together they may take 5 % of the time (max_overhead=0.05). For a curve set max_samples (but not " in text
    assert text.endswith("or train longer: from 33 minutes on there are two")
    assert probe.probes == 1


@pytest.mark.parametrize("batches", [True, 3])
def test_a_trial_of_a_few_batches_is_no_run_that_is_too_short(monkeypatch, recwarn, batches):
    costly(monkeypatch, 50.0)
    fit_numbered(SpectralProbe(top_k=3), steps=3, fast_dev_run=batches)
    assert [text for w in recwarn if "one probe" in (text := str(w.message))] == []


def test_no_such_warning_at_fixed_steps(monkeypatch, recwarn):
    costly(monkeypatch, 50.0)
    fit_numbered(SpectralProbe(top_k=3, every_n_steps=3), steps=6)
    assert not [w for w in recwarn if "one probe" in str(w.message)]


def spectra_of(batch, module=None, **options):
    return measure_spectra(module or Tiny(), batch, lambda m, b: F.cross_entropy(m.net(b[0]), b[1]), top_k=3, **options)


def same(a, b, rtol=1e-4):
    for name, layer in a.layers.items():
        torch.testing.assert_close(layer.sigma, b.layers[name].sigma, rtol=rtol, atol=1e-9)
        torch.testing.assert_close(layer.h, b.layers[name].h, rtol=rtol, atol=1e-7, equal_nan=True)


class Frozen(Tiny):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_batches_from_the_probes_step_on_are_averaged():
    module = Frozen()
    probe = SpectralProbe(every_n_steps=4, n_batches=3, top_k=3)
    fit_numbered(probe, module, steps=9)
    assert [report.step for report in probe.history] == [2, 6]
    assert [report.n_batches for report in probe.history] == [3, 3]
    same(probe.history[0], spectra_of(batches(0, 1, 2), module))
    same(probe.history[1], spectra_of(batches(4, 5, 6), module))


def test_as_many_batches_as_are_accumulated_are_the_steps_whole_batch():
    module, probe = Tiny(), SpectralProbe(every_n_steps=1, n_batches=4, top_k=3)
    start = spectra_of(batches(0, 1, 2, 3), module)
    fit_numbered(probe, module, steps=2, accumulate_grad_batches=4)
    assert [report.step for report in probe.history] == [0, 1]
    same(probe.history[0], start)


@pytest.mark.parametrize(
    ("options", "numbers", "first", "samples"),
    [
        ({}, (0,), 0, 8),
        ({"n_batches": 2}, (0, 1), 1, 16),
        ({"fixed_samples": 20}, (0, 1, 2), 2, 20),
        ({"fixed_samples": 5}, (0,), 0, 5),
        ({"n_batches": 2, "max_samples": 4}, (0, 1), 1, 8),
    ],
)
def test_fixed_batches_are_the_first_ones(options, numbers, first, samples):
    module = Frozen()
    probe = SpectralProbe(every_n_steps=3, batch="fixed", top_k=3, **options)
    fit_numbered(probe, module, steps=7)
    assert [report.step for report in probe.history] == [first, 3, 6]
    for report in probe.history:
        assert report.n_samples == samples
        same(report, probe.history[0], rtol=0.0)
    if "max_samples" not in options:
        same(probe.history[0], spectra_of(tuple(t[:samples] for t in batches(*numbers)), module))


def loader(n=4, size=6):
    x, y = batches(*range(30, 30 + n), size=size)
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)


class DrawsInTransfer(Frozen):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1e-3 * torch.randn_like(batch[0]), batch[1]


@pytest.mark.parametrize("network", [Frozen, DrawsInTransfer])
def test_a_loaders_batches_are_fetched_once_and_draw_nothing_from_training(network):
    trails = []
    for callbacks in ([], [SpectralProbe(every_n_steps=2, batch=loader(), n_batches=2, top_k=3)]):
        torch.manual_seed(5)
        module = network()
        trainer = pl.Trainer(
            max_steps=5, max_epochs=-1, callbacks=callbacks, logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(Numbered(), batch_size=None, shuffle=True))
        trails.append(torch.get_rng_state())
    assert torch.equal(*trails)
    history = callbacks[0].history
    assert [report.n_samples for report in history] == [12, 12, 12]
    same(history[0], history[-1], rtol=0.0)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([Numbered()[3]])


def test_a_loader_that_is_too_short():
    with pytest.raises(ValueError, match="n_batches: 9 batches were asked for, and the DataLoader has 4"):
        fit_numbered(SpectralProbe(batch=loader(4), n_batches=9))
    probe = SpectralProbe(batch=DataLoader(Stream(), batch_size=None), n_batches=2)
    with pytest.warns(SpectralWarning, match=r"SpectralProbe is off: its batches cannot be had: n_batches: 2 batches"):
        trainer = fit_numbered(probe)
    assert trainer.global_step == 4
    assert probe.probes == 0


class Uneven(Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, i):
        x, y = Numbered()[i]
        return x, y, torch.zeros(3)


def test_fixed_samples_need_samples_that_can_be_counted():
    probe = SpectralProbe(batch="fixed", fixed_samples=10)
    trainer = pl.Trainer(
        max_steps=3, max_epochs=-1, callbacks=[probe], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.warns(SpectralWarning, match=r"fixed_samples: the tensors of the batch share no leading dimension"):
        trainer.fit(Tiny(), DataLoader(Uneven(), batch_size=None))
    assert trainer.global_step == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "validation"}, "batch must be 'train', 'fixed' or a DataLoader, got 'validation'"),
        ({"n_batches": 0}, "n_batches must be a whole number of at least 1, got 0"),
        ({"batch": "fixed", "fixed_samples": 0}, "fixed_samples must be None or a whole number of at least 1, got 0"),
        (
            {"fixed_samples": 8},
            "fixed_samples tells how much of batch='fixed' to keep, in place of n_batches; got batch='train'",
        ),
        (
            {"batch": "fixed", "fixed_samples": 8, "max_samples": 4},
            "max_samples cuts each batch, fixed_samples what is",
        ),
        ({"batch": "fixed", "fixed_samples": 8, "n_batches": 2}, "fixed_samples tells how much"),
        ({"micro_batch_size": -1}, "micro_batch_size must be None or a whole number of at least 1, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralProbe(**options)


def test_a_resume_says_that_the_fixed_batches_are_others():
    probe, resumed = SpectralProbe(batch="fixed"), SpectralProbe(batch="fixed")
    probe.probes = 1
    resumed.load_state_dict(probe.state_dict())
    with pytest.warns(SpectralWarning, match="keeps the first batches after the resume"):
        resumed.on_fit_start(pl.Trainer(logger=False, accelerator="cpu"), Tiny())


def test_a_probe_that_runs_out_of_memory_is_skipped_and_training_goes_on(monkeypatch):
    def none_left(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def fit_once(callbacks):
        torch.manual_seed(3)
        module = ConvNet()
        trainer = fit(module, callbacks, steps=4, logger=[logger])
        return [p.detach().clone() for p in module.parameters()], trainer.global_step

    logger, probe = ProbeRows(), SpectralProbe(every_n_steps=2)
    plain, _ = fit_once([])
    monkeypatch.setattr(torch.autograd, "grad", none_left)
    with pytest.warns(SpectralWarning, match=r"nothing was measured at step 0: .*out of memory with 16 samples") as w:
        weights, steps = fit_once([probe])
    assert len([x for x in w if "out of memory" in str(x.message)]) == 1
    assert (steps, probe.probes, probe.failed_probes) == (4, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True))
    assert [step for step, _ in logger.rows] == [0, 2]
    assert all(math.isnan(row["spectral/alpha_median"]) for _, row in logger.rows)


def test_logging_and_collecting_count_as_probing():
    clock = Clock()

    class SlowLogger(ProbeRows):
        def log_metrics(self, metrics, step=None):
            clock.now += 0.5 if "spectral/probe_seconds" in metrics else 0.0
            super().log_metrics(metrics, step)

    probe = SpectralProbe(max_overhead=0.2, top_k=3)
    probe.budget.clock = clock
    fit_numbered(probe, Stepped(clock), steps=100, logger=[SlowLogger()])
    assert probe.budget.probe_seconds == pytest.approx(0.5 * probe.probes)
    assert probe.budget.overhead < 0.25


def test_a_run_of_unknown_length_has_no_end_to_exceed(monkeypatch, recwarn):
    costly(monkeypatch, 50.0)
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[SpectralProbe(top_k=3)], logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip

    class Endless(IterableDataset):
        def __iter__(self):
            return iter([Numbered()[i] for i in range(6)])

    seen = []
    monkeypatch.setattr(SpectralProbe, "on_train_end", lambda *args: seen.append(1))
    trainer.fit(Tiny(), DataLoader(Endless(), batch_size=None))
    assert seen
    assert not [w for w in recwarn if "one probe" in str(w.message)]


def test_a_training_that_failed_still_counts_its_time():
    clock = Clock()
    _, _, budget = simulated(100, 0.01, 0.1, clock=clock)
    wall = budget.wall_seconds
    budget.start(100)
    assert budget.wall_seconds == wall


def test_fixed_steps_begin_anew_too():
    probe = SpectralProbe(every_n_steps=2, top_k=3)
    fit_numbered(probe, steps=6)
    spent = probe.budget.probe_seconds
    fit_numbered(probe, steps=2)
    assert probe.budget.probe_seconds < spent


def test_a_checkpoint_without_a_budget_is_told():
    probe = SpectralProbe()
    state = probe.state_dict() | {"budget": {}}
    with pytest.warns(SpectralWarning, match="the checkpoint says nothing of the time probes took"):
        probe.load_state_dict(state)


def test_more_batches_than_steps_between_probes_are_told():
    with pytest.warns(SpectralWarning, match="a probe takes n_batches=3 batches of training, more than there are in"):
        fit_numbered(SpectralProbe(every_n_steps=2, n_batches=3, top_k=3), steps=1)


class Unmeasured(Stream):
    def __len__(self):
        raise NotImplementedError


def test_a_loader_that_refuses_its_length():
    fit_numbered(SpectralProbe(batch=DataLoader(Unmeasured(), batch_size=None), top_k=3), steps=1)


class Listening(Tiny):
    """Notes the batches it is trained on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(batch[0][:, 0].tolist())


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_of_training_may_be_the_probes(workers):
    trails = []
    for probed in (False, True):
        torch.manual_seed(0)
        x, y = batches(*range(12), size=2)
        generator = torch.Generator().manual_seed(7)
        shared = DataLoader(
            TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        module = Listening()
        callbacks = [SpectralProbe(every_n_steps=100, batch=shared, n_batches=3, top_k=3)] if probed else []
        trainer = pl.Trainer(
            max_epochs=2, callbacks=callbacks, logger=False, accelerator="cpu", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, shared)
        trails.append(module.seen)
    assert callbacks[0].probes == 1
    assert trails[0] == trails[1]


class Normalising(Tiny):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] / 10, batch[1]


def test_a_loaders_batches_pass_the_modules_hooks_and_the_precision():
    module = Normalising().double()
    probe = SpectralProbe(every_n_steps=10, batch=DataLoader(Numbered(), batch_size=None), top_k=3)
    start = Normalising().double()
    start.load_state_dict(module.state_dict())
    fit_numbered(probe, module, steps=1, precision="64-true")
    x, y = Numbered()[0]
    same(probe.last_report, spectra_of((x.double() / 10, y), start))


def test_a_run_with_a_probe_at_its_beginning_alone_is_told():
    clock = Clock()

    class Timed(SpectralProbe):
        def _measure(self, *args):
            clock.now += 0.3
            return super()._measure(*args)

    probe = Timed(max_overhead=0.05, top_k=3)
    probe.budget.clock = clock
    with pytest.warns(SpectralWarning, match=r"a run of 10 s has room for one probe alone: one takes 0.3 s"):
        fit_numbered(probe, Stepped(clock), steps=100)


def test_a_run_that_ends_before_its_batches_are_collected_is_told():
    for options, told in (
        ({"batch": "fixed", "fixed_samples": 500}, "fixed_samples=500"),
        ({"n_batches": 9}, "n_batches=9"),
    ):
        with pytest.warns(SpectralWarning, match=f"training ended before there were the batches .*{told}"):
            fit_numbered(SpectralProbe(top_k=3, **options), steps=3)


def test_a_window_that_an_epochs_end_cuts_short_is_left_out():
    probe = SpectralProbe(every_n_steps=1, n_batches=4, top_k=3)
    fit_numbered(probe, Tiny(), steps=4, accumulate_grad_batches=4, limit_train_batches=6)
    assert [report.step for report in probe.history] == [0, 2]
    assert [report.n_samples for report in probe.history] == [32, 32]
