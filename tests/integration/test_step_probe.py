"""The optimizer's step after a probe, in a Trainer: what is logged, when, of which batch, and what is left out."""

import copy
import csv
import math
import weakref
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from identical import assert_identical
from modules import ProbeRows, fit
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from steps import StepRecorder, derivatives
from tiny import Repeated, Tiny, batch_of, fit_tiny, small_data
from torch import nn

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralWarning, SwapOptimizer
from lightning_spectral.callbacks.step_probe import obstacle
from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.records.log_keys import STEP_KEYS

KEYS = [f"spectral/{key}" for key in STEP_KEYS]


class Trained(pl.LightningModule):
    """A network with statistics, trained as it is told."""

    def __init__(self, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), scheduler=None):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)
        )
        self.make_optimizer, self.make_scheduler = optimizer, scheduler

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]


def train(module, *callbacks, steps=6, **options):
    return fit(module, callbacks, data=small_data(48), batch_size=8, steps=steps, **options)


def loss_of(batch):
    inputs, labels = batch[0].double(), batch[1]
    return lambda call: F.cross_entropy(call(inputs), labels)


def truths(recorder, module, take=lambda batch: batch, key="batch"):
    """Scale, predicted and actual change of each step, and the layers' shares, in float64."""
    results = []
    network = copy.deepcopy(module.net).eval()
    for step in recorder.steps:
        before, after = (
            {name.removeprefix("net."): value for name, value in step[when].items()} for when in ("before", "after")
        )
        slope, matrix, start, end, names = derivatives(loss_of(take(step[key])), network, before, after)
        total = float(matrix.sum())
        shares = {f"net.{name}": float(row.sum()) / total for name, row in zip(names, matrix, strict=True)}
        results.append((-slope / total if total > 0 else math.nan, slope + total / 2, end - start, shares))
    return results


def assert_equal_to_truth(rows, truth, rel=1e-5):
    for (_, row), (scale, predicted, actual, shares) in zip(rows, truth, strict=True):
        assert row["spectral/step/scale"] == pytest.approx(scale, rel=rel, nan_ok=True)
        assert row["spectral/step/predicted_change"] == pytest.approx(predicted, rel=rel, abs=1e-9)
        assert row["spectral/step/actual_change"] == pytest.approx(actual, rel=rel, abs=1e-9)
        layers = [key for key in row if key.startswith("spectral/step_curvature/")]
        assert len(layers) == 3
        for key in layers:
            assert row[key] == pytest.approx(shares[key.removeprefix("spectral/step_curvature/")], rel=rel, abs=1e-7)


SETUPS = {
    "momentum": (Trained, {}),
    "adamw": (lambda: Trained(lambda p: torch.optim.AdamW(p, lr=1e-2)), {}),
    "clipping": (Trained, {"gradient_clip_val": 0.05}),
    "accumulation": (Trained, {"accumulate_grad_batches": 3}),
    "scheduler": (lambda: Trained(scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)), {}),
    "newton": (lambda: Trained(lambda p: SpectralNewton(p, lr=0.02)), {}),
    "bf16": (Trained, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("name", SETUPS)
def test_each_step_is_what_the_optimizer_did_on_the_probes_batch(name):
    make, options = SETUPS[name]
    recorder, rows = StepRecorder(), ProbeRows()
    module, probe = make(), SpectralProbe(every_n_steps=1, top_k=3, precision="float64", print_end=False)
    train(module, recorder, probe, logger=[rows], **options)
    assert [step for step, _ in rows.steps] == [0, 1, 2, 3, 4, 5]
    assert (probe.probes, probe.failed_probes) == (6, 0)
    truth = truths(recorder, module)
    # Steps that are told apart: other ones would not do.
    assert len({round(actual, 7) for _, _, actual, _ in truth}) == 6
    assert_equal_to_truth(rows.steps, truth)


def test_a_step_at_half_the_rate_is_half_as_long():
    scales = []
    for lr in (0.2, 0.1):
        probe = SpectralProbe(every_n_steps=1, top_k=3, precision="float64")
        train(Trained(lambda p, lr=lr: torch.optim.SGD(p, lr=lr)), probe, steps=1, logger=[rows := ProbeRows()])
        scales.append(rows.steps[0][1]["spectral/step/scale"])
    assert scales[1] == pytest.approx(2 * scales[0], rel=1e-5)


def test_the_samples_that_the_probe_measured_are_those_of_the_step():
    recorder, rows = StepRecorder(), ProbeRows()
    module, probe = Trained(), SpectralProbe(every_n_steps=1, top_k=3, precision="float64", max_samples=5)
    train(module, recorder, probe, logger=[rows])
    assert_equal_to_truth(rows.steps, truths(recorder, module, lambda batch: [part[:5] for part in batch]))


def test_a_batch_that_training_writes_on_is_measured_as_it_was():
    class Writing(Trained):
        def training_step(self, batch, batch_idx):
            batch[0].add_(0.5)
            return super().training_step(batch, batch_idx)

    recorder, rows = StepRecorder(), ProbeRows()
    module, probe = Writing(), SpectralProbe(every_n_steps=1, top_k=3, precision="float64")
    train(module, recorder, probe, logger=[rows])
    # Added once by the loss, and not before by training.
    assert_equal_to_truth(rows.steps, truths(recorder, module, lambda batch: (batch[0] + 0.5, batch[1])))


def test_as_many_batches_as_are_accumulated_are_those_that_the_step_was_taken_on():
    recorder, rows = StepRecorder(), ProbeRows()
    module, probe = Trained(), SpectralProbe(every_n_steps=1, top_k=3, precision="float64", n_batches=2)
    # Its statistics would be those before the last micro-batch, at which the probe measures.
    module.net[1] = nn.Identity()
    train(module, recorder, probe, logger=[rows], accumulate_grad_batches=2)
    truth = truths(recorder, module, lambda batches: [torch.cat(parts) for parts in zip(*batches, strict=True)], "all")
    assert len(rows.steps) == 6
    assert_equal_to_truth(rows.steps, truth)


def test_fixed_batches_are_those_of_the_step_too():
    recorder, rows = StepRecorder(), ProbeRows()
    probe = SpectralProbe(every_n_steps=1, top_k=3, precision="float64", batch="fixed", n_batches=2)
    module = Trained()
    train(module, recorder, probe, logger=[rows])
    fixed = [torch.cat(parts) for parts in zip(*(step["batch"] for step in recorder.steps[:2]), strict=True)]
    recorder.steps = recorder.steps[1:]
    assert [step for step, _ in rows.steps] == [1, 2, 3, 4, 5]
    assert_equal_to_truth(rows.steps, truths(recorder, module, lambda _: fixed))


@pytest.mark.parametrize("callback", [SwapOptimizer, lambda: SwapOptimizer("AdamW", {"lr": 0.01}, at_step=2)])
def test_steps_of_an_optimizer_that_was_swapped_in(callback):
    recorder, rows, module = StepRecorder(), ProbeRows(), Trained()
    train(module, callback(), recorder, SpectralProbe(every_n_steps=1, top_k=3, precision="float64"), logger=[rows])
    assert_equal_to_truth(rows.steps, truths(recorder, module))


def test_the_row_of_a_step_follows_that_of_its_probe_at_the_same_step(tmp_path):
    class Ordered(ProbeRows):
        order = ()

        def log_metrics(self, metrics, step=None):
            self.order = (*self.order, (step, KEYS[0] in metrics, "spectral/loss" in metrics))

    ordered = Ordered()
    module, probe = Trained(), SpectralProbe(every_n_steps=2, top_k=3)
    trainer = train(module, probe, logger=[ordered, CSVLogger(tmp_path)], accumulate_grad_batches=2)
    ours = [row for row in ordered.order if row[1] or row[2]]
    assert ours == [(step, later, not later) for step in (0, 2, 4) for later in (False, True)]
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row[KEYS[0]]]
    assert [int(row["step"]) for row in logged] == [0, 2, 4]
    assert all(math.isfinite(float(row[key])) for row in logged for key in KEYS[1:])
    for key in KEYS:
        values = [float(row[key]) for row in logged if math.isfinite(float(row[key]))]
        assert float(trainer.callback_metrics[key]) == pytest.approx(values[-1], rel=1e-6)
    assert probe.step_probe.last.step == 4


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, 3),
        ({"log_layers": ["net.0"]}, 1),
        ({"log_layers": "none"}, 0),
        ({"log_quantities": ["gamma"]}, 0),
        ({"log_quantities": ["step_curvature"]}, 3),
        ({"layers": ["net.4"]}, 1),
    ],
)
def test_shares_are_logged_of_the_layers_and_quantities_chosen(options, layers):
    probe = SpectralProbe(every_n_steps=2, top_k=3, **options)
    train(Trained(), probe, steps=1, logger=[rows := ProbeRows()])
    assert list(rows.steps[0][1])[:3] == KEYS
    assert len(rows.steps[0][1]) == 3 + layers


def test_charts_of_both_rows_are_as_many_as_were_asked_for(trusting):
    shown = []

    class WandbLogger(ProbeRows):
        _prefix = ""

        class experiment:  # noqa: N801
            @staticmethod
            def define_metric(name, hidden=False, **options):
                if hidden:
                    shown.append(name)

    # There are 18 curves of medians before the scale of the step.
    for n in (3, 20, None):
        shown.clear()
        rows = WandbLogger()
        probe = SpectralProbe(every_n_steps=1, top_k=6, wandb_charts=n, keep_reports=False)
        train(Trained(), probe, steps=2, logger=[rows])
        hidden, keys = set(shown), {*rows.rows[0][1], *rows.steps[0][1]}
        assert len(keys - hidden) == (len(keys) if n is None else n)
        assert (KEYS[0] in hidden) == (n == 3)


def state_of(module, trainer):
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
        "random": torch.get_rng_state(),
        "metrics": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("spectral")},
    }


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_is_bit_identical_with_and_without_steps(options, mode):
    states = []
    for step in ("no probe", False, None, True):
        pl.seed_everything(5, verbose=False)
        probe = SpectralProbe(every_n_steps=2, top_k=3, mode=mode, step=step if step != "no probe" else None)
        module = Trained(lambda p: torch.optim.AdamW(p, lr=1e-2))
        trainer = train(module, *([] if step == "no probe" else [probe]), **options)
        states.append(state_of(module, trainer))
        assert (probe.step_probe.last is None) == (step in ("no probe", False))
    for state in states[1:]:
        assert_identical(states[0], state)


def test_without_steps_nothing_of_them_is_logged_or_kept():
    probe = SpectralProbe(every_n_steps=1, top_k=3, step=False)
    trainer = train(Trained(), probe, logger=[rows := ProbeRows()])
    assert rows.steps == []
    assert not [key for key in trainer.callback_metrics if "step" in key]
    with pytest.raises(ValueError, match="'step_curvature' is measured on request"):
        SpectralProbe(step=False, log_quantities=["step_curvature"])


def test_only_true_false_and_none_are_steps():
    with pytest.raises(ValueError, match="step must be None, True or False, got 1"):
        SpectralProbe(step=1)


class Manual(Trained):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Unoptimized(Trained):
    def configure_optimizers(self):
        return None


@pytest.mark.parametrize(
    ("module_class", "says"),
    [
        (Manual, "step=True: the optimizer's steps are not measured, since Manual optimizes manually, where nothing"),
        (Unoptimized, "not measured, since configure_optimizers of Unoptimized gave no optimizer of its parameters"),
    ],
)
@pytest.mark.parametrize("step", [True, None])
def test_where_no_step_can_be_measured_it_is_told_only_if_it_was_asked_for(module_class, says, step, recwarn):
    def loss(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1])

    probe = SpectralProbe(every_n_steps=2, top_k=3, step=step, loss_fn=loss)
    train(module_class(), probe, logger=[rows := ProbeRows()])
    told = [str(w.message) for w in recwarn if issubclass(w.category, SpectralWarning)]
    assert len([text for text in told if says in text]) == (step is True)
    assert (len(rows.steps), probe.probes > 0, probe.failed_probes) == (0, True, 0)


def test_several_optimizers_are_an_obstacle_and_one_is_none():
    module = Trained()
    optimizers = [torch.optim.SGD(module.net[i].parameters(), lr=0.1) for i in (0, 4)]
    assert obstacle(SimpleNamespace(optimizers=optimizers[:1]), module) == ""
    assert obstacle(SimpleNamespace(optimizers=optimizers), module).startswith("configure_optimizers of Trained gave 2")


class Overflowing(torch.amp.GradScaler):
    """Skips the second step as one with an overflow."""

    def __init__(self):
        super().__init__("cpu", init_scale=1.0)
        self.calls = 0

    def step(self, optimizer, *args, **options):
        self.calls += 1
        return None if self.calls == 2 else super().step(optimizer, *args, **options)


def test_a_step_that_a_scaler_skips_is_nan_and_told_once(recwarn):
    rows, probe = ProbeRows(), SpectralProbe(every_n_steps=1, top_k=3)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=Overflowing())
    trainer = train(Trained(), probe, steps=4, plugins=[plugin], logger=[rows])
    assert plugin.scaler.calls == 4
    assert [math.isnan(row[KEYS[2]]) for _, row in rows.steps] == [False, True, False, False]
    assert all(math.isnan(value) for value in rows.steps[1][1].values())
    assert list(rows.steps[1][1]) == list(rows.steps[0][1])
    told = [str(w.message) for w in recwarn if "the optimizer moved no parameter" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith("the optimizer's step 1 was not measured: MeasurementError: the optimizer moved no")
    assert "a GradScaler skipped the step" in told[0]
    # A NaN is not monitored.
    assert math.isfinite(float(trainer.callback_metrics[KEYS[2]]))


def test_a_warm_up_from_zero_is_told_once_and_the_next_steps_are_measured(recwarn):
    module = Trained(scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(step // 2, 3)))
    train(module, SpectralProbe(every_n_steps=1, top_k=3), logger=[rows := ProbeRows()])
    assert [math.isnan(row[KEYS[1]]) for _, row in rows.steps] == [True, True, False, False, False, False]
    assert len([w for w in recwarn if "its learning rate is 0" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_a_probe_that_fails_has_no_step():
    def loss(module, batch):
        if module.trainer.global_step == 2:
            raise KeyError("lost")
        return F.cross_entropy(module.net(batch[0]), batch[1])

    probe = SpectralProbe(every_n_steps=2, top_k=3, loss_fn=loss)
    train(Trained(), probe, logger=[rows := ProbeRows()])
    assert probe.failed_probes == 1
    assert [step for step, _ in rows.rows] == [0, 2, 4]
    assert [step for step, _ in rows.steps] == [0, 4]


def test_an_error_in_the_step_is_told_once_and_training_goes_on(recwarn):
    def loss(module, batch):
        if module.trainer.global_step % 2:
            raise KeyError("lost")
        return F.cross_entropy(module.net(batch[0]), batch[1])

    probe = SpectralProbe(every_n_steps=2, top_k=3, loss_fn=loss)
    trainer = train(Trained(), probe, logger=[rows := ProbeRows()])
    assert (trainer.global_step, probe.failed_probes) == (6, 0)
    assert [math.isnan(row[KEYS[1]]) for _, row in rows.steps] == [True, True, True]
    told = [str(w.message) for w in recwarn if "lost" in str(w.message)]
    got = "loss_fn(model, batch) got a Trained and a list"
    assert told == [f"the optimizer's step 0 was not measured: KeyError: 'lost'; {got}"]


def test_an_interrupt_in_the_step_ends_training():
    def loss(module, batch):
        if module.trainer.global_step:
            raise KeyboardInterrupt
        return F.cross_entropy(module.net(batch[0]), batch[1])

    probe = SpectralProbe(every_n_steps=2, top_k=3, loss_fn=loss)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(Trained(), probe)
    assert probe.step_probe._pending is None


class Weights:
    """Watches what the probe keeps."""

    def __init__(self, probe):
        self.probe, self.kept = probe, None

    def see(self):
        pending = self.probe.step_probe._pending
        self.kept = weakref.ref(pending.weights.parameters["net.0.weight"])


@pytest.mark.parametrize("end", ["error", "max_time"])
def test_weights_kept_are_let_go_where_training_stops_before_the_step(end):
    probe = SpectralProbe(every_n_steps=1, top_k=3)
    kept = Weights(probe)

    class Stopping(Trained):
        def training_step(self, batch, batch_idx):
            # Not in the probe, whose module is a copy.
            if self.trainer is fitting[0]:
                kept.see()
                if end == "error":
                    raise ArithmeticError("stopped")
                self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

    fitting = []

    class Note(pl.Callback):
        def on_fit_start(self, trainer, module):
            fitting.append(trainer)

    def run():
        train(Stopping(), Note(), probe, accumulate_grad_batches=3 if end == "max_time" else 1)

    if end == "error":
        with pytest.raises(ArithmeticError):
            run()
    else:
        run()
    assert kept.kept() is None
    assert probe.step_probe._pending is None


def test_an_epoch_that_ends_within_an_accumulation_steps_and_is_measured():
    recorder, rows, module = StepRecorder(), ProbeRows(), Trained()
    probe = SpectralProbe(every_n_steps=1, top_k=3, precision="float64")
    # Six batches an epoch: steps of four and of two.
    train(module, recorder, probe, logger=[rows], accumulate_grad_batches=4, steps=4)
    assert [step for step, _ in rows.steps] == [0, 1, 2, 3]
    assert_equal_to_truth(rows.steps, truths(recorder, module))


def test_a_second_fit_and_a_resume_measure_their_own_steps(tmp_path):
    probe = SpectralProbe(every_n_steps=2, top_k=3)
    train(Trained(), probe, steps=3, logger=[first := ProbeRows()])
    train(Trained(), probe, steps=3, logger=[second := ProbeRows()])
    assert [step for step, _ in first.steps] == [step for step, _ in second.steps] == [0, 2]
    assert first.steps[0][1] == second.steps[0][1]
    trainer = train(Trained(), probe, steps=3, accumulate_grad_batches=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = SpectralProbe(every_n_steps=2, top_k=3)
    train(Trained(), again, steps=5, logger=[third := ProbeRows()], ckpt_path=tmp_path / "a.ckpt")
    assert [step for step, _ in third.steps] == [4]


def test_memory_that_runs_out_for_the_copy_costs_that_step(monkeypatch, recwarn):
    def fails(module):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lightning_spectral.callbacks.step_probe.Weights.copied", fails)
    trainer = fit_tiny(probe := SpectralProbe(every_n_steps=1, top_k=3), steps=2, logger=[rows := ProbeRows()])
    assert len([w for w in recwarn if "was not measured" in str(w.message)]) == 1
    assert (trainer.global_step, probe.failed_probes) == (2, 0)
    assert all(math.isnan(value) for _, row in rows.steps for value in row.values())


def test_time_of_the_step_counts_as_probing_and_not_as_time_since_the_probe():
    now = [0.0]
    budget = TimeBudget(0.5, 0, lambda: now[0])
    budget.start(0)
    now[0] = 2.0
    budget.record_probe(0, 2.0)
    # Two seconds of training, then one for the step.
    now[0] = 5.0
    budget.record_step(1)
    budget.extend_probe(1.0)
    assert (budget.probe_seconds, budget.last_seconds) == (3.0, 3.0)
    assert budget.overhead == pytest.approx(3 / 5)
    assert budget.step_seconds(1) == pytest.approx(2.0)
    # P + c <= f (W + c): 3 + 3 <= (5 + t + 3) / 2, and of its own interval 3 <= (2 + t + 3) / 2.
    assert budget.missing(0.5) == pytest.approx(4.0)


def test_the_budget_holds_with_steps_that_take_long(monkeypatch):
    now = [0.0]

    class Slow(Tiny):
        def on_train_batch_end(self, *args):
            now[0] += 0.1

    class Timed(SpectralProbe):
        def _measure(self, *args):
            now[0] += 0.2
            return super()._measure(*args)

    real = TimeBudget.extend_probe

    def takes_long(self, seconds):
        now[0] += 0.3
        real(self, seconds + 0.3)

    monkeypatch.setattr(TimeBudget, "extend_probe", takes_long)
    probe = Timed(max_overhead=0.1, top_k=3)
    probe.budget.clock = lambda: now[0]
    fit(Slow(), [probe], data=Repeated(batch_of()), batch_size=None, steps=300)
    assert probe.probes > 3
    # 0.2 of the probe, 0.3 of its logging and 0.3 of the step after it.
    assert probe.budget.probe_seconds == pytest.approx(0.8 * probe.probes)
    assert probe.budget.overhead <= 0.1
