"""What else a Trainer may do around a probe: stop and save by its values, tune, average weights, fit again."""

from __future__ import annotations

import csv
import importlib
import math
import warnings
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from identical import assert_identical
from pytorch_lightning.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tiny import Tiny
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralWarning, SwapOptimizer
from lightning_spectral.callbacks._lightning import PACKAGES
from lightning_spectral.callbacks.time_budget import TimeBudget

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

KEY = "spectral/alpha_median"


def data(n=24):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randint(0, 5, (n,), generator=generator))


class Small(pl.LightningModule):
    """Four batches an epoch, and a validation after each."""

    def __init__(self, batch_size=6, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 5))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def train_dataloader(self):
        return DataLoader(data(), batch_size=self.hparams.batch_size)

    def val_dataloader(self):
        return DataLoader(data(), batch_size=24)

    test_dataloader = predict_dataloader = val_dataloader

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def trainer_of(*callbacks, epochs=3, **options):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "log_every_n_steps": 1}
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **options})


class Scripted(SpectralProbe):
    """Measures, and logs a median of alpha that is told."""

    def __init__(self, values, **options):
        super().__init__(every_n_steps=1, layers=["net.4"], top_k=3, **options)
        self.values = values
        scalars = self.logged.scalars
        self.logged.scalars = lambda report: {**scalars(report), "alpha_median": values[self.probes - 1]}


def test_early_stopping_and_checkpoints_monitor_a_probes_values(tmp_path):
    alphas = [1.0, 2.0, 3.0, 5.0, 4.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0]
    stop = EarlyStopping(KEY, mode="max", patience=2)
    best = ModelCheckpoint(tmp_path, monitor=KEY, mode="max", save_top_k=1, filename="{epoch}")
    trainer = trainer_of(Scripted(alphas), stop, best, epochs=9)
    trainer.fit(Small())
    assert (trainer.current_epoch, stop.wait_count, float(stop.best_score)) == (3, 2, 5.0)
    assert (best.best_model_path, float(best.best_model_score)) == (str(tmp_path / "epoch=0.ckpt"), 5.0)
    assert float(trainer.callback_metrics[KEY]) == 1.0


def test_a_value_that_is_nan_is_not_monitored_and_the_one_before_it_stays():
    nan = float("nan")
    stop = EarlyStopping(KEY, patience=9)
    probe = Scripted([3.0, 2.0, 1.5, 1.0, nan, nan, nan, nan, nan, nan, nan, nan])
    trainer = trainer_of(probe, stop)
    trainer.fit(Small())
    assert (trainer.current_epoch, stop.wait_count, float(stop.best_score)) == (3, 2, 1.0)
    assert math.isnan(float(probe.logged.scalars(None)["alpha_median"]))


def test_a_key_without_a_value_is_not_there():
    nan = [float("nan")] * 12
    trainer = trainer_of(Scripted(nan), EarlyStopping(KEY, strict=False))
    trainer.fit(Small())
    assert (trainer.current_epoch, KEY in trainer.callback_metrics) == (3, False)
    with pytest.raises(RuntimeError, match=f"conditioned on metric `{KEY}` which is not available"):
        trainer_of(Scripted(nan), EarlyStopping(KEY)).fit(Small())
    with pytest.raises(MisconfigurationException, match="could not find the monitored key"):
        trainer_of(Scripted(nan), ModelCheckpoint(monitor=KEY)).fit(Small())


@pytest.mark.usefixtures("trusting")
def test_a_resumed_run_monitors_before_its_first_probe(tmp_path):
    trainer = trainer_of(SpectralProbe(every_n_steps=100), epochs=1)
    trainer.fit(Small())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    stop = EarlyStopping(KEY, patience=9)
    resumed = trainer_of(probe := SpectralProbe(every_n_steps=100), stop, epochs=2)
    resumed.fit(Small(), ckpt_path=tmp_path / "one.ckpt")
    assert (resumed.global_step, probe.history) == (8, [])
    assert float(stop.best_score) == float(trainer.callback_metrics[KEY])
    # Another training begins without the values of this one.
    probe.should_measure = lambda step: False
    again = trainer_of(probe, epochs=1)
    again.fit(Small())
    assert (again.global_step, KEY in again.callback_metrics) == (4, False)


def test_a_probe_that_was_collecting_its_batches_collects_anew_after_a_resume(tmp_path):
    def probe():
        return SpectralProbe(every_n_steps=8, n_batches=3)

    trainer = trainer_of(first := probe(), epochs=-1, max_steps=10)
    trainer.fit(Small())
    trainer.save_checkpoint(tmp_path / "ten.ckpt")
    trainer_of(second := probe(), epochs=-1, max_steps=16).fit(Small(), ckpt_path=tmp_path / "ten.ckpt")
    assert [report.step for report in first.history + second.history] == [2, 12]


def test_plateau_schedulers_monitor_a_probes_values():
    class Plateau(Small):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": KEY}}

    trainer = trainer_of(Scripted([2.0] * 12))
    trainer.fit(Plateau())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_no_probe_outside_of_fitting(stage):
    module = Small()
    probe = SpectralProbe(every_n_steps=1, swap_optimizer=True)
    getattr(trainer_of(probe), stage)(module)
    assert probe.probes == 0
    assert "configure_optimizers" not in module.__dict__


@pytest.mark.usefixtures("trusting")
def test_no_probe_in_the_sanity_check():
    seen = []

    class Sanity(pl.Callback):
        def on_sanity_check_end(self, trainer, module):
            seen.append((probe.probes, KEY in trainer.callback_metrics))

    probe = SpectralProbe(every_n_steps=1)
    trainer = trainer_of(probe, Sanity(), epochs=1, num_sanity_val_steps=2)
    trainer.fit(Small())
    assert seen == [(0, False)]
    assert (probe.probes, KEY in trainer.callback_metrics) == (4, True)


def test_fit_again_with_the_same_module_and_with_another():
    probe, module = SpectralProbe(every_n_steps=3), Small()
    trainer = trainer_of(probe, epochs=1)
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert [report.step for report in probe.history] == [0, 3, 6]

    class Wider(Small):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))

    trainer.fit_loop.max_epochs = 3
    trainer.fit(Wider())
    assert [(report.step, len(report.layers)) for report in probe.history] == [(0, 2), (3, 2), (6, 2), (9, 3)]
    assert probe.failed_probes == 0


def test_probes_of_one_prefix_are_refused_by_the_trainer():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SpectralProbe`"):
        trainer_of(SpectralProbe(), SpectralProbe())


@pytest.mark.parametrize("batch", ["train", "fixed"])
def test_batch_size_and_learning_rate_finders(batch, tmp_path):
    probe, module = SpectralProbe(every_n_steps=2, batch=batch), Small()
    trainer = trainer_of(probe, epochs=1, default_root_dir=tmp_path)
    tuner = Tuner(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpectralWarning)
        assert tuner.scale_batch_size(module, steps_per_trial=1, max_trials=2, init_val=3) in (6, 12, 24)
        tuner.lr_find(module, num_training=5)
        assert (probe.probes, trainer.global_step) == (0, 0)
        module.hparams.batch_size = 6
        trainer.fit(module)
    assert [report.step for report in probe.history] == [0, 2]


def test_a_learning_rate_finder_before_the_first_step_is_no_resume(tmp_path):
    probe = SpectralProbe(every_n_steps=2, batch="fixed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpectralWarning)
        trainer = trainer_of(LearningRateFinder(num_training_steps=4), probe, epochs=2, default_root_dir=tmp_path)
        trainer.fit(Small())
    # An old Lightning takes the finder's steps for the first epoch, with or without a probe.
    assert trainer.global_step in (4, 8)
    assert [report.step for report in probe.history] == list(range(0, trainer.global_step, 2))


def test_a_learning_rate_finder_in_mid_training_leaves_the_schedule(tmp_path):
    class Later(LearningRateFinder):
        def on_fit_start(self, trainer, module):
            pass

        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, module)

    probe = SpectralProbe(every_n_steps=3, batch="fixed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpectralWarning)
        trainer_of(probe, Later(num_training_steps=4), default_root_dir=tmp_path).fit(Small())
    assert [report.step for report in probe.history] == [0, 3, 6, 9]


def test_a_budget_that_is_put_back_in_mid_training_goes_on():
    now = [0.0]
    budget = TimeBudget(0.1, 0, lambda: now[0])
    budget.start(0)
    assert budget.is_due(0)
    now[0] = 1.0
    budget.record_probe(0, 1.0)
    saved = budget.state_dict()
    now[0] = 5.0
    budget.load_state_dict(saved)
    assert budget.wall_seconds == 1.0
    now[0] = 30.0
    assert budget.wall_seconds == 26.0
    assert budget.missing(0.1) <= 0


@pytest.mark.parametrize("epochs", [2, 3])
def test_weight_averaging_is_bit_identical(epochs):
    states = []
    for probes in ([], [probe := SpectralProbe(every_n_steps=2)]):
        pl.seed_everything(1, verbose=False)
        module = Small()
        trainer_of(*probes, StochasticWeightAveraging(1e-2, swa_epoch_start=1), epochs=epochs).fit(module)
        states.append({name: value.clone() for name, value in module.state_dict().items()})
    assert probe.probes > 2 * epochs - 1
    assert probe.failed_probes == 0
    assert_identical(*states)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("callback", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages_that_come_after_the_probe_of_the_final_weights_are_told(package, callback, recwarn):
    lightning = importlib.import_module(package)
    if not hasattr(lightning.callbacks, callback):
        pytest.skip("of Lightning 2.6 and later")

    class Linear(lightning.LightningModule):
        def __init__(self, *between):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), *between, nn.Tanh(), nn.Linear(8, 5))

        training_step, configure_optimizers = Tiny.training_step, Tiny.configure_optimizers

    def told(module, *callbacks):
        recwarn.clear()
        warnings.simplefilter("always")
        trainer = lightning.Trainer(
            max_epochs=3, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data(), 6))
        return [text.partition(" ")[0] for w in recwarn if "that are not averaged" in (text := str(w.message))]

    def averages():
        cls = getattr(lightning.callbacks, callback)
        return cls(1e-2, swa_epoch_start=1) if callback.startswith("Stochastic") else cls()

    def probe(**options):
        return SpectralProbe(every_n_steps=6, top_k=3, **{"min_probes": 1, **options})

    assert told(Linear(), first := probe(), averages()) == [callback]
    module = Linear()
    assert told(module, averages(), second := probe()) == []
    # The last report is of the weights that the run leaves.
    batch = next(iter(DataLoader(data(), 6)))
    assert second.last_report.loss == pytest.approx(module.training_step(batch, 0).item(), rel=1e-5)
    assert first.last_report.step == second.last_report.step == 12
    assert told(Linear(), probe(min_probes=0), averages()) == []
    # With BatchNorm, SWA puts them in before its last pass over the data.
    assert told(Linear(nn.BatchNorm1d(8)), probe(), averages()) == [callback] * (not callback.startswith("Stochastic"))


def test_accumulation_that_changes_between_epochs():
    probe = SpectralProbe(every_n_steps=2, n_batches=2)
    trainer_of(probe, GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), epochs=4).fit(Small())
    # Four steps of a batch, two of two, two of four; a probe takes two batches.
    assert [(report.step, report.epoch, report.n_samples) for report in probe.history] == [
        (1, 0, 12), (3, 0, 12), (4, 1, 12), (6, 2, 12),
    ]  # fmt: skip


def test_learning_rates_of_spectral_newton_are_monitored(tmp_path):
    class Newton(Small):
        def configure_optimizers(self):
            return SpectralNewton(SpectralNewton.groups(self), lr=1e-2, alpha="probe")

    probe = SpectralProbe(every_n_steps=2)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer_of(probe, LearningRateMonitor("step"), logger=logger, epochs=1).fit(Newton())
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"lr-SpectralNewton/dense", "lr-SpectralNewton/adamw"} <= set(rows[0])
    assert [int(row["step"]) for row in rows if row[KEY]] == [0, 2]


def test_time_that_a_probe_takes_counts_for_a_timer():
    def slow(module, batch):
        torch.linalg.svd(torch.randn(400, 400))
        return module.training_step(batch, 0)

    timer = Timer(duration=timedelta(milliseconds=1))
    trainer = trainer_of(SpectralProbe(every_n_steps=1, loss_fn=slow), timer)
    trainer.fit(Small())
    assert trainer.global_step == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_training_gives_the_module_its_optimizers_back(error):
    class Failing(Small):
        def on_train_batch_end(self, *args):
            raise error

    for callback in (SwapOptimizer(), SpectralProbe(swap_optimizer=True)):
        module = Failing()
        with pytest.raises((SystemExit, RuntimeError)):
            trainer_of(callback, epochs=1).fit(module)
        assert "configure_optimizers" not in module.__dict__


def test_time_after_an_error_does_not_count():
    now = [0.0]
    probe = SpectralProbe()
    probe.budget.clock = lambda: now[0]

    class Failing(Small):
        def on_train_batch_end(self, *args):
            now[0] += 1.0
            raise RuntimeError("once")

    with pytest.raises(RuntimeError, match="once"):
        trainer_of(probe).fit(Failing())
    now[0] = 100.0
    assert probe.budget.wall_seconds == 1.0
    trainer_of(probe, epochs=1).fit(Small())
    assert probe.budget.wall_seconds == 1.0
