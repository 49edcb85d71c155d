"""The probes that a run gets at least, evenly over it, and the one of its final weights."""

from __future__ import annotations

import inspect
import itertools
import math
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
from identical import assert_identical
from modules import ProbeRows
from pytorch_lightning.callbacks import EarlyStopping, Timer
from pytorch_lightning.tuner import Tuner
from stand_ins import Clock
from tiny import Small, Tiny
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralWarning, measure_spectra
from lightning_spectral.callbacks._lightning import total_steps
from lightning_spectral.callbacks.time_budget import LARGEST_SHARE, TimeBudget

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
DEFAULT = inspect.signature(SpectralProbe).parameters["min_probes"].default
"""As it is without a fixture's defaults."""


def simulated(steps, probe_seconds, step_seconds=0.1, total=None, min_probes=DEFAULT, max_overhead=0.05):
    """The steps at which a budget probes in a run, the budget after it, and whether the final weights are measured."""
    clock = Clock()
    budget = TimeBudget(max_overhead, min_probes, clock)
    budget.start(0)
    probed = []

    def probe(step):
        clock.now += probe_seconds
        budget.record_probe(step, probe_seconds)

    for step in range(steps):
        budget.record_step(step)
        budget.total_steps = steps if total is None else total
        if budget.is_due(step):
            probe(step)
            probed.append(step)
        clock.now += step_seconds(step) if callable(step_seconds) else step_seconds
    if final := budget.has_room():
        probe(steps)
    return probed, budget, final


def gaps(probed, end):
    return [b - a for a, b in itertools.pairwise([*probed, end])]


def test_eight_probes_evenly_and_one_of_the_final_weights():
    assert DEFAULT == 8
    probed, budget, final = simulated(300, 0.4)
    assert final
    assert len(probed) == 8
    assert all(36 <= gap <= 39 for gap in gaps(probed, 300))
    assert budget.overhead == pytest.approx(9 * 0.4 / (30 + 9 * 0.4))


@pytest.mark.parametrize("probe_seconds", [0.9, 1.1, 1.6, 2.4, 3.6])
def test_as_many_as_fit_evenly_where_eight_do_not(probe_seconds):
    probed, budget, final = simulated(300, probe_seconds)
    assert final
    # n probes are a fifth of 30 s with them.
    assert len(probed) + 1 == math.floor(30 / 4 / probe_seconds) < 9
    assert budget.overhead <= LARGEST_SHARE
    assert max(gaps(probed, 300)) - min(gaps(probed, 300)) <= 2


def test_one_probe_where_no_second_fits():
    probed, _, final = simulated(300, 3.8)
    assert (probed, final) == ([0], False)


def test_a_long_run_is_that_of_its_share_of_time():
    strict, _, final = simulated(20_000, 0.5, min_probes=0)
    probed, budget, _ = simulated(20_000, 0.5)
    assert probed == strict
    assert budget.overhead <= 0.05 + 0.5 / 2000
    assert final


def test_first_steps_that_are_slow_do_not_make_the_run_a_long_one():
    probed, budget, _ = simulated(300, 1.0, step_seconds=lambda step: 20.0 if step == 0 else 0.1)
    assert budget.overhead <= LARGEST_SHARE
    assert 4 <= len(probed) <= 9


def test_a_run_of_unknown_length_has_them_early_and_then_its_share_of_time():
    probed, budget, _ = simulated(6000, 0.4, total=math.inf)
    # A probe of 0.4 s is a fifth of the time with 16 steps, two are with 32; one is a twentieth with 76.
    assert probed[:2] == [0, 33]
    assert gaps(probed[1:9], 0)[:-1] == [17] * 7
    assert min(gaps(probed[9:], math.inf)) >= 76
    assert budget.overhead < 0.06


def test_a_larger_share_than_a_fifth_holds_for_them_too():
    probed, budget, _ = simulated(300, 2.0, max_overhead=0.5)
    assert len(probed) >= 8
    assert 0.2 < budget.overhead <= 0.5


def test_a_plan_goes_on_after_a_resume():
    clock = Clock()
    budget = TimeBudget(0.05, 8, clock)
    budget.start(0)
    budget.total_steps = 80
    assert budget.is_due(0)
    budget.record_probe(0, 0.01)
    clock.now += 30.0
    resumed = TimeBudget(0.05, 8, clock)
    resumed.load_state_dict(budget.state_dict() | {"next_look": 3})
    resumed.total_steps = 80
    resumed.start(3)
    assert resumed.probes_to_come(3) == 8
    assert resumed.probes == 1


@pytest.mark.parametrize("number", [-1, 2.5, True, None])
def test_a_number_of_probes(number):
    with pytest.raises(ValueError, match="min_probes must be a whole number of at least 0, got"):
        SpectralProbe(min_probes=number)


def trainer_of(*callbacks, steps=10, **options):
    limit = {"max_steps": steps, "max_epochs": -1} if steps else {}
    return pl.Trainer(
        **limit, callbacks=list(callbacks), accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, **options},
    )  # fmt: skip


def data_of(n=96, size=8, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :5].argmax(1)), size, **options)


def steps_of(probe):
    return [report.step for report in probe.history]


class Stepped(Tiny):
    """Each step takes a tenth of a second by a clock of its own."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_batch_end(self, *args):
        self.clock.now += 0.1


def timed(seconds, **options):
    """A probe that takes so long, and a module to train, by the same clock."""
    clock = Clock()

    class Timed(SpectralProbe):
        def _measure(self, *args):
            clock.now += seconds
            return super()._measure(*args)

    probe = Timed(top_k=3, **options)
    probe.budget.clock = clock
    return probe, Stepped(clock)


def test_a_short_run_gets_a_curve_with_its_final_weights_and_the_share_of_the_whole_run():
    (probe, module), rows = timed(0.1, min_probes=DEFAULT), ProbeRows()
    trainer = trainer_of(probe, steps=80, logger=[rows])
    trainer.fit(module, data_of())
    assert steps_of(probe) == [step for step, _ in rows.rows] == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    shares = [row["spectral/probe_overhead"] for _, row in rows.rows]
    assert math.isnan(shares[0])
    assert shares[-1] == pytest.approx(0.9 / 8.9)
    assert trainer.callback_metrics["spectral/probe_overhead"] == pytest.approx(0.9 / 8.9)
    assert not rows.closing


def test_without_a_final_probe_the_last_row_has_the_share_alone():
    (probe, module), rows = timed(1.0, min_probes=DEFAULT), ProbeRows()
    with pytest.warns(SpectralWarning, match=r"a run of 8.9 s has room for one probe alone.* 20 % .*\(min_probes=8\)"):
        trainer_of(probe, steps=79, logger=[rows]).fit(module, data_of())
    assert steps_of(probe) == [0]
    assert rows.closing == [(79, {"spectral/probe_overhead": pytest.approx(1 / 8.9)})]


def test_fixed_steps_have_the_final_weights_too_at_any_cost():
    (probe, module), rows = timed(5.0, every_n_steps=4, min_probes=DEFAULT), ProbeRows()
    trainer_of(probe, steps=10, logger=[rows]).fit(module, data_of())
    assert steps_of(probe) == [0, 4, 8, 10]
    assert [step for step, _ in rows.steps] == [0, 4, 8]
    probe = SpectralProbe(every_n_steps=4, top_k=3)
    trainer_of(probe, steps=8).fit(Tiny(), data_of())
    assert steps_of(probe) == [0, 4]


def test_the_final_probe_is_of_the_final_weights_and_a_further_pass():
    module, probe, loader = Tiny(), SpectralProbe(every_n_steps=100, top_k=3, min_probes=1), data_of()
    trainer_of(probe, steps=5).fit(module, loader)
    expected = measure_spectra(module, next(iter(loader)), top_k=3)
    for name, layer in probe.last_report.layers.items():
        torch.testing.assert_close(layer.sigma, expected.layers[name].sigma, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(layer.h, expected.layers[name].h, rtol=1e-3, atol=1e-6)


def test_the_final_probe_has_as_many_samples_as_are_asked_for():
    probe = SpectralProbe(every_n_steps=8, top_k=3, gradient_samples=40, min_probes=1)
    trainer_of(probe, steps=18).fit(Tiny(), data_of())
    # That of step 16 has not collected its batches when training ends, and becomes that of the final weights.
    assert [(report.step, report.n_samples) for report in probe.history] == [(4, 40), (12, 40), (18, 40)]
    probe = SpectralProbe(every_n_steps=100, top_k=3, gradient_samples="auto", min_probes=1)
    trainer_of(probe, steps=30).fit(Tiny(), data_of(2000))
    assert probe.history[-1].step == 30
    assert probe.history[-1].n_samples > 8


def test_the_last_regular_probe_has_room_for_its_batches():
    probe, module = timed(0.01, min_probes=DEFAULT, gradient_samples="auto")
    trainer_of(probe, steps=80).fit(module, data_of(2000))
    assert probe.history[-1].step == 80
    assert len(probe.history) in (8, 9)
    assert all(report.n_samples > 8 for report in probe.history[1:])


@pytest.mark.parametrize(
    ("batch", "samples"), [({"batch": "fixed"}, 8), ({"batch": data_of(size=20)}, 20), ({"n_batches": 3}, 24)]
)
def test_the_final_probe_takes_the_batches_that_are_chosen(batch, samples):
    probe = SpectralProbe(every_n_steps=4, top_k=3, min_probes=1, **batch)
    trainer_of(probe, steps=10).fit(Tiny(), data_of())
    assert steps_of(probe)[-1] == 10
    assert [report.n_samples for report in probe.history] == [samples] * len(probe.history)


class Counting(Sampler):
    """Another order in each pass, by a counter."""

    def __init__(self, n):
        self.n, self.passes = n, 0

    def __len__(self):
        return self.n

    def __iter__(self):
        self.passes += 1
        return iter(torch.randperm(self.n, generator=torch.Generator().manual_seed(self.passes)).tolist())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data_of().dataset)


def loaders(kind):
    if kind == "shuffled":
        return data_of(shuffle=True)
    if kind == "generator":
        return data_of(shuffle=True, generator=torch.Generator().manual_seed(5))
    if kind == "workers":
        return data_of(shuffle=True, num_workers=1, persistent_workers=True)
    if kind == "sampler":
        return data_of(sampler=Counting(96))
    return DataLoader(Stream(), 8)


class Noted(Small):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(batch[0].clone())


@pytest.mark.parametrize("kind", ["shuffled", "generator", "workers", "sampler", "stream"])
def test_training_and_a_second_one_are_as_without_the_final_probe(kind):
    states = []
    for probes in ([], [probe := SpectralProbe(every_n_steps=100, top_k=3, min_probes=1, gradient_samples=20)]):
        pl.seed_everything(3, verbose=False)
        module, loader = Noted(), loaders(kind)
        for _ in range(2):
            trainer_of(*probes, steps=14).fit(module, loader)
        states.append([module.state_dict(), module.seen, torch.get_rng_state()])
    # A stream without a length may have stopped, so it is not read again.
    assert steps_of(probe) == ([2, 2] if kind == "stream" else [2, 14, 2, 14])
    assert_identical(*states)


class Feed(IterableDataset):
    """Batches of a producer that stops when training has had them."""

    opened = 0

    def __iter__(self):
        self.opened += 1
        assert self.opened == 1, "would wait for ever"
        return iter(data_of())


def test_a_feed_is_not_waited_for_when_training_has_ended():
    probe = SpectralProbe(every_n_steps=4, top_k=3, min_probes=1)
    with pytest.warns(
        SpectralWarning, match="no probe of the final weights: .* a stream without a length may have stopped"
    ):
        trainer_of(probe, steps=10).fit(Tiny(), DataLoader(Feed(), batch_size=None))
    assert steps_of(probe) == [0, 4, 8]


def test_fixed_batches_that_never_came_are_not_made_up_at_the_end():
    probe = SpectralProbe(every_n_steps=1, top_k=3, min_probes=1, batch="fixed", n_batches=4)
    with pytest.warns(SpectralWarning, match="training ended before there were the batches that a probe takes"):
        trainer_of(probe, steps=3).fit(Tiny(), data_of())
    assert (probe.probes, probe.failed_probes) == (0, 0)


class Accumulating(Tiny):
    """Steps by itself, every fourth batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()


class UsersTimer(pl.Callback):
    """A callback of the user's with the name of Lightning's."""


UsersTimer.__name__ = "Timer"


def test_steps_of_the_users_own_and_a_timer_of_theirs_do_not_stop_training():
    probe = SpectralProbe(top_k=3, loss_fn=lambda module, batch: Tiny.training_step(module, batch, 0))
    trainer = trainer_of(probe, UsersTimer(), steps=2)
    trainer.fit(Accumulating(), data_of())
    assert trainer.global_step == 2
    assert probe.probes >= 1


class Both(Tiny):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


def test_several_loaders_are_read_as_in_training():
    probe = SpectralProbe(every_n_steps=100, top_k=3, min_probes=1, n_batches=20)
    trainer_of(probe, steps=30).fit(Both(), {"a": data_of(96), "b": data_of(48, shuffle=True)})
    assert [(report.step, report.n_batches) for report in probe.history] == [(19, 20), (30, 12)]


def test_no_more_of_the_data_than_training_sees():
    probe = SpectralProbe(every_n_steps=100, top_k=3, min_probes=1, gradient_samples=64)
    trainer_of(probe, steps=30, limit_train_batches=3).fit(Tiny(), data_of())
    assert [(report.step, report.n_samples) for report in probe.history] == [(2, 24), (30, 24)]


class Once:
    """Batches that come once."""

    def __init__(self):
        self.left = iter(data_of())

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.left)


def test_batches_that_come_once_leave_none_for_the_final_weights():
    probe = SpectralProbe(every_n_steps=100, top_k=3, min_probes=1)
    trainer = trainer_of(probe, steps=5)
    with pytest.warns(SpectralWarning, match="no probe of the final weights: .* a stream without a length"):
        trainer.fit(Tiny(), Once())
    assert trainer.global_step == 5
    assert steps_of(probe) == [0]


def test_a_final_probe_that_fails_is_counted_and_told():
    def loss_fn(module, batch):
        if module.trainer.global_step:
            raise KeyError("lost")
        return module.training_step(batch, 0)

    rows, probe = ProbeRows(), SpectralProbe(every_n_steps=100, top_k=3, min_probes=1, loss_fn=loss_fn)
    with pytest.warns(SpectralWarning, match="nothing was measured at step 5: KeyError"):
        trainer_of(probe, steps=5, logger=[rows]).fit(Tiny(), data_of())
    assert (probe.probes, probe.failed_probes) == (2, 1)
    assert rows.rows[-1][0] == 5
    assert math.isnan(rows.rows[-1][1]["spectral/alpha_median"])


def test_an_end_that_comes_early_has_its_final_weights():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 7

    probe = SpectralProbe(every_n_steps=100, top_k=3, min_probes=1)
    trainer_of(probe, Stop(), steps=50).fit(Tiny(), data_of())
    assert steps_of(probe) == [0, 7]

    class Validated(Tiny):
        def validation_step(self, batch, batch_idx):
            self.log("flat", 1.0)

    probe = SpectralProbe(every_n_steps=100, top_k=3, min_probes=1)
    stop = EarlyStopping("flat", patience=1)
    trainer_of(probe, stop, steps=None, max_epochs=9).fit(Validated(), data_of(), data_of())
    assert steps_of(probe) == [0, 24]


def test_no_final_probe_after_an_error():
    class Failing(Tiny):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3 and self.training:
                raise RuntimeError("gone")
            return super().training_step(batch, batch_idx)

    probe = SpectralProbe(every_n_steps=100, top_k=3, min_probes=1)
    with pytest.raises(RuntimeError, match="gone"):
        trainer_of(probe, steps=9).fit(Failing(), data_of())
    assert steps_of(probe) == [0]


def test_no_final_probe_where_nothing_is_trained(tmp_path):
    probe = SpectralProbe(every_n_steps=100, top_k=3, min_probes=1)
    trainer = trainer_of(probe, steps=5)
    trainer.fit(Tiny(), data_of())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again, rows = SpectralProbe(every_n_steps=100, top_k=3, min_probes=1), ProbeRows()
    trainer_of(again, steps=5, logger=[rows]).fit(Tiny(), data_of(), ckpt_path=tmp_path / "end.ckpt")
    assert (steps_of(probe), steps_of(again)) == ([0, 5], [])
    assert not rows.rows
    longer = SpectralProbe(every_n_steps=3, top_k=3, min_probes=1)
    trainer_of(longer, steps=8).fit(Tiny(), data_of(), ckpt_path=tmp_path / "end.ckpt")
    assert steps_of(longer) == [6, 8]


def test_no_probe_in_a_search_for_a_learning_rate(tmp_path):
    class Rated(Tiny):
        lr = 1e-2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    probe = SpectralProbe(every_n_steps=100, top_k=3, min_probes=1)
    trainer = trainer_of(probe, steps=None, max_epochs=1, default_root_dir=tmp_path)
    module = Rated()
    Tuner(trainer).lr_find(module, data_of(), num_training=5)
    assert probe.probes == 0
    trainer.fit(module, data_of())
    assert steps_of(probe) == [0, 12]


@pytest.mark.usefixtures("trusting")
def test_measured_exponents_are_those_of_the_steps_alone():
    class Spectral(Tiny):
        def configure_optimizers(self):
            return SpectralNewton(SpectralNewton.groups(self), lr=1e-2, alpha="probe", alpha_range=(0.1, 5.0))

    states, rows = [], ProbeRows()
    for min_probes in (0, 1):
        torch.manual_seed(0)
        module, probe = Spectral(), SpectralProbe(every_n_steps=4, top_k=4, min_probes=min_probes)
        trainer = trainer_of(probe, steps=6, logger=[rows])
        trainer.fit(module, data_of())
        states.append(trainer.optimizers[0].state_dict())
    assert steps_of(probe) == [0, 4, 6]
    assert_identical(*states)
    (step, last) = rows.rows[-1]
    (used,) = [value for key, value in last.items() if key.startswith("spectral_newton/")][:1]
    assert step == 6
    assert used == trainer.optimizers[0].alpha_of(module.net[0].weight)


def test_the_length_of_a_run():
    class Look(pl.Callback):
        def __init__(self, step_seconds=math.nan):
            self.lengths, self.step_seconds = [], step_seconds

        def on_train_batch_start(self, trainer, *args):
            self.lengths.append(total_steps(trainer, self.step_seconds))

    class Two(Tiny):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    def lengths(module=None, loader=None, step_seconds=math.nan, callbacks=(), **options):
        look = Look(step_seconds)
        trainer_of(look, *callbacks, **options).fit(module or Tiny(), data_of() if loader is None else loader)
        return look.lengths

    assert set(lengths(steps=4)) == {4}
    assert set(lengths(steps=None, max_epochs=2, accumulate_grad_batches=5)) == {6}
    assert set(lengths(loader=DataLoader(Stream(), 8), steps=None, max_epochs=1)) == {math.inf}
    assert lengths(Two(), steps=8) == [8, 4, 4, 4]
    timer = Timer(timedelta(hours=1))
    found = lengths(callbacks=[timer], step_seconds=36.0, steps=200)
    assert found[3] == pytest.approx(103, abs=0.5)
    assert max(lengths(callbacks=[timer], steps=4)) == 4
