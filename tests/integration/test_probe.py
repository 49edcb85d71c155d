"""The callback: when it measures, on what, what it logs, and what survives a checkpoint."""

from __future__ import annotations

import csv
import math
import threading
import warnings
from collections import UserDict
from dataclasses import dataclass

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from identical import assert_identical
from modules import GPT, ConvNet, ProbeRows, fit
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger
from tiny import Repeated, Tiny, batch_of, fit_tiny
from torch import nn
from torch.utils.data import DataLoader

from lightning_spectral import SpectralProbe, SpectralReport, SpectralWarning, measure_spectra
from lightning_spectral.callbacks._lightning import optimizer_steps
from lightning_spectral.callbacks.alerts import MAX_CAUSES, WarnOnce
from lightning_spectral.callbacks.log_selection import BY_KIND, LOGGED_LAYERS, PER_LAYER
from lightning_spectral.records.log_keys import LAYER_KEYS, PROBE_KEYS, REPORT_KEYS

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


@pytest.mark.parametrize("package", [pl, lightning_pl])
def test_one_probe_for_both_lightning_packages(package):
    class Module(package.LightningModule):
        training_step, configure_optimizers = Tiny.training_step, Tiny.configure_optimizers

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    probe = SpectralProbe(every_n_steps=2)
    assert isinstance(probe, package.Callback)
    fit_tiny(probe, Module(), steps=3, trainer_class=package.Trainer)
    assert (probe.probes, probe.failed_probes) == (2, 0)


@pytest.mark.parametrize(("accumulate", "every", "expected"), [(1, 4, [0, 4, 8]), (3, 1, [0, 1, 2, 3]), (3, 2, [0, 2])])
def test_probes_count_optimizer_steps_and_take_the_first_micro_batch(accumulate, every, expected):
    seen = []

    class Watched(SpectralProbe):
        def _measure(self, trainer, module, batches, batch_idx):
            step = optimizer_steps(trainer)
            seen.append((step, trainer.fit_loop.epoch_loop.batch_idx, module.net[0].weight.clone()))
            return super()._measure(trainer, module, batches, batch_idx)

    module, probe = Tiny(), Watched(every_n_steps=every)
    start = module.net[0].weight.clone()
    fit_tiny(probe, module, steps=12 // accumulate, accumulate_grad_batches=accumulate)
    assert [step for step, _, _ in seen] == expected
    assert [batch_idx for _, batch_idx, _ in seen] == [accumulate * step for step in expected]
    assert torch.equal(seen[0][2], start)
    assert [report.step for report in probe.history] == expected


def test_schedule_can_be_overridden():
    class Early(SpectralProbe):
        def should_measure(self, step):
            return step in (1, 2)

    probe = Early()
    fit_tiny(probe, steps=5)
    assert [report.step for report in probe.history] == [1, 2]


def test_probe_measures_what_measure_spectra_does_before_the_step():
    module, probe = Tiny(), SpectralProbe(every_n_steps=100, max_samples=16)
    expected = measure_spectra(module, batch_of(), max_samples=16)
    fit_tiny(probe, module, steps=1)
    assert probe.last_report.n_samples == 16
    for name, layer in expected.layers.items():
        assert torch.equal(layer.h.nan_to_num(), probe.last_report.layers[name].h.nan_to_num())
    assert not torch.equal(
        expected.layers["net.0.weight"].h, measure_spectra(module, batch_of()).layers["net.0.weight"].h
    )


def test_one_dict_per_probe_with_every_key():
    logger, probe = ProbeRows(), SpectralProbe(every_n_steps=2)
    trainer = fit_tiny(probe, steps=4, logger=[logger])
    assert [step for step, _ in logger.rows] == [0, 2]
    metrics = logger.rows[-1][1]
    layers = {f"spectral/{quantity}/{name}" for name in ("net.0.weight", "net.2.weight") for quantity in PER_LAYER}
    medians = {f"spectral/{key.name}_median" for key in LAYER_KEYS if key.median and not key.part}
    medians |= {f"spectral/{quantity}/median_{kind}" for kind in ("head", "dense") for quantity in BY_KIND}
    assert set(metrics) == layers | medians | {f"spectral/{key}" for key in (*REPORT_KEYS, *PROBE_KEYS)}
    report = probe.last_report
    assert metrics["spectral/alpha/net.0.weight"] == report.layers["net.0.weight"].alpha.exponent
    assert metrics["spectral/probe_seconds"] >= report.seconds > 0
    monitored = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("spectral/")}
    for key, former in {
        "r2_alpha/net.0.weight": "net.0.weight/r2_alpha",
        "r2_alpha_median": "r2_alpha_median",
        "signal/median_head": "kind/head/signal_median",
        "negative_curvature_sum": "negative_curvature",
    }.items():
        assert monitored[f"spectral/{key}"] == monitored[f"spectral/{former}"]
        assert monitored[f"spectral/{key}"] == pytest.approx(metrics[f"spectral/{key}"])


@pytest.mark.usefixtures("trusting")
def test_values_reach_csv_and_tensorboard(tmp_path):
    probe = SpectralProbe(every_n_steps=2)
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    fit_tiny(probe, steps=4, logger=loggers)
    with open(tmp_path / "csv" / "version_0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["spectral/alpha_median"]]
    assert [int(row["step"]) for row in rows] == [0, 2]
    for row, report in zip(rows, probe.history, strict=True):
        logged = probe.logged.scalars(report)
        assert {"alpha_median", "zeta_bound/median_head", "r2_alpha/net.0.weight"} <= set(logged)
        for name, value in logged.items():
            assert float(row[f"spectral/{name}"]) == pytest.approx(value, rel=1e-12, nan_ok=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    values = [(event.step, event.value) for event in events.Scalars("spectral/alpha_median")]
    assert values == [
        (report.step, pytest.approx(report.medians()["alpha_median"], rel=1e-6)) for report in probe.history
    ]


def test_a_logger_that_fails_is_told_once_and_does_not_stop_training():
    class Broken(DummyLogger):
        def log_metrics(self, metrics, step=None):
            if "spectral/loss" in metrics:
                raise OSError("disk full")

    healthy, probe = ProbeRows(), SpectralProbe(every_n_steps=1)
    with pytest.warns(SpectralWarning) as caught:
        trainer = fit_tiny(probe, steps=3, logger=[Broken(), healthy])
    assert [str(w.message) for w in caught if "disk" in str(w.message)] == ["Broken could not log: disk full"]
    assert trainer.global_step == len(healthy.rows) == 3


@pytest.mark.parametrize(
    ("log_layers", "expected"),
    [("all", 30), ("none", 0), ("auto", LOGGED_LAYERS), (["net.0.*", "net.58.weight"], 2), ("net.4.*", 1)],
)
def test_layers_logged_one_by_one(log_layers, expected):
    deep = nn.Sequential(*[part for _ in range(29) for part in (nn.Linear(6, 6), nn.ReLU())], nn.Linear(6, 5))
    logger = ProbeRows()
    fit_tiny(SpectralProbe(log_layers=log_layers, top_k=3), Tiny(deep), steps=1, logger=[logger])
    logged = [key for key in logger.rows[0][1] if key.startswith("spectral/alpha/net.")]
    assert len(logged) == expected
    if log_layers == "auto":
        assert {"spectral/alpha/net.0.weight", "spectral/alpha/net.58.weight"} <= set(logged)


def test_two_probes_with_prefixes():
    logger = ProbeRows()
    probes = [SpectralProbe(prefix="spectral"), SpectralProbe(prefix="spectral_train", mode="train")]
    assert probes[0].state_key != probes[1].state_key
    fit(Tiny(), probes, data=Repeated(batch_of()), batch_size=None, steps=1, logger=[logger])
    assert {key.split("/")[0] for _, metrics in logger.rows for key in metrics} == {"spectral", "spectral_train"}


def test_history_is_bounded():
    probe = SpectralProbe(every_n_steps=1, history_size=2)
    fit_tiny(probe, steps=5)
    assert [report.step for report in probe.history] == [3, 4]
    assert probe.last_report is probe.history[-1]


def test_checkpoint_and_resume(tmp_path):
    first = SpectralProbe(every_n_steps=3)
    trainer = fit_tiny(first, steps=5)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"][first.state_key]
    assert (saved["probes"], saved["failed_probes"], saved["every_n_steps"]) == (2, 0, 3)
    second, module = SpectralProbe(every_n_steps=3), Tiny()
    trainer = pl.Trainer(
        max_steps=8, callbacks=[second], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Repeated(batch_of()), batch_size=None), ckpt_path=path)
    assert [report.step for report in second.history] == [6]
    assert second.probes == 3


def test_state_round_trip():
    probe = SpectralProbe(every_n_steps=3)
    fit_tiny(probe, steps=4)
    other = SpectralProbe(every_n_steps=3)
    other.load_state_dict(probe.state_dict())
    assert other.state_dict() == probe.state_dict()
    assert isinstance(other.last_report, SpectralReport)
    assert other.last_report.to_json() == probe.last_report.to_json()
    fresh = SpectralProbe(every_n_steps=3)
    fresh.load_state_dict(SpectralProbe(every_n_steps=3).state_dict())
    assert fresh.last_report is None


def test_a_state_of_an_earlier_release_loads():
    budget = {
        "probe_seconds": 1.5, "wall_seconds": 60.0, "last_seconds": 0.5, "last_step": 40, "since_seconds": 3.0,
        "next_look": 44, "latest": 43,
    }  # fmt: skip
    state = {
        "every_n_steps": None, "budget": budget, "swap": None, "probes": 3, "failed_probes": 1, "collecting": True,
        "monitored": {"spectral/alpha_median": 2.0}, "last_report": None,
    }  # fmt: skip
    probe = SpectralProbe()
    probe.load_state_dict(state)
    assert (probe.probes, probe.failed_probes, probe.trigger.is_pending, probe.trigger.is_resumed) == (3, 1, True, True)
    added = {"next_seconds": 0.5, "probes": 3, "due_step": 40}
    assert probe.state_dict() == state | {"budget": budget | added}


def test_another_schedule_than_the_checkpoint_s_is_told():
    with pytest.warns(SpectralWarning, match="every_n_steps=7; going on with 3"):
        SpectralProbe(every_n_steps=3).load_state_dict(SpectralProbe(every_n_steps=7).state_dict())


@dataclass
class Example:
    x: torch.Tensor
    y: torch.Tensor


class Encoding(UserDict):
    pass


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        (dict(zip("xy", batch_of(), strict=True)), lambda b: (b["x"], b["y"])),
        (Example(*batch_of()), lambda b: (b.x, b.y)),
        (Encoding(zip("xy", batch_of(), strict=True)), lambda b: (b["x"], b["y"])),
        ([{"x": batch_of()[0]}, {"y": (batch_of()[1],)}], lambda b: (b[0]["x"], b[1]["y"][0])),
    ],
    ids=["dict", "dataclass", "encoding", "nested"],
)
def test_batches_of_every_shape(batch, read):
    class Module(Tiny):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(read(batch), batch_idx), "extra": 1}

    probe = SpectralProbe(max_samples=20)
    fit_tiny(probe, Module(), batch=batch, steps=1)
    assert probe.last_report.n_samples == 20


def test_training_step_without_a_batch_index():
    class Module(Tiny):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    probe = SpectralProbe()
    fit_tiny(probe, Module(), steps=1)
    assert probe.failed_probes == 0


def test_a_step_that_empties_its_batch_leaves_the_batch():
    class Module(Tiny):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch.pop("x").mul_(2), batch.pop("y")), batch_idx)

    x, y = batch_of()
    probe = SpectralProbe()
    trainer = fit_tiny(probe, Module(), batch={"x": x, "y": y}, steps=1)
    assert (probe.failed_probes, trainer.global_step) == (0, 1)


def test_loss_given_by_the_module():
    class Module(Tiny):
        def spectral_loss(self, batch):
            return 3 * F.cross_entropy(self.net(batch[0]), batch[1])

    probe, plain = SpectralProbe(), SpectralProbe()
    torch.manual_seed(0)
    fit_tiny(plain, Tiny(), steps=1)
    torch.manual_seed(0)
    fit_tiny(probe, Module(), steps=1)
    assert probe.last_report.loss == pytest.approx(3 * plain.last_report.loss)
    a, b = (p.last_report.layers["net.0.weight"] for p in (probe, plain))
    torch.testing.assert_close(a.h, 3 * b.h, equal_nan=True)
    assert a.alpha.exponent == pytest.approx(b.alpha.exponent)


class Manual(Tiny):
    """A GAN's way: two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=1e-2) for i in (0, 2)]


def test_manual_optimization_asks_for_a_loss():
    probe = SpectralProbe(every_n_steps=1)
    with pytest.warns(SpectralWarning, match="SpectralProbe is off: Manual optimizes manually.*pass loss_fn"):
        trainer = fit_tiny(probe, Manual(), steps=6)
    assert (probe.probes, trainer.global_step) == (0, 6)


def test_manual_optimization_with_two_optimizers_and_a_loss():
    probe = SpectralProbe(every_n_steps=2, loss_fn=lambda m, b: F.cross_entropy(m.net(b[0]), b[1]))
    fit_tiny(probe, Manual(), steps=12)
    assert [report.step for report in probe.history] == [0, 2, 4]
    assert probe.failed_probes == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true", "32-true"])
def test_precisions_of_the_trainer(precision):
    probe, plain = SpectralProbe(), SpectralProbe()
    torch.manual_seed(0)
    module = Tiny()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    fit_tiny(probe, module, steps=1, precision=precision)
    reference = Tiny()
    reference.load_state_dict({n: v.bfloat16().float() if precision == "bf16-true" else v for n, v in start.items()})
    batch = batch_of()
    if precision == "bf16-true":
        batch = (batch[0].bfloat16().float(), batch[1])
    fit_tiny(plain, reference, batch=batch, steps=1)
    for name, layer in plain.last_report.layers.items():
        torch.testing.assert_close(probe.last_report.layers[name].h, layer.h, rtol=1e-4, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_are_measured_eagerly(whole):
    torch.manual_seed(0)
    module = Tiny()
    expected = measure_spectra(module, batch_of())
    if whole:
        module.compile(backend="aot_eager")
    elif not hasattr(torch.compiler, "set_stance"):
        pytest.skip("what torch.compile wraps is measured with torch 2.6 and later")
    else:
        module.net = torch.compile(module.net, backend="aot_eager")
    probe = SpectralProbe(every_n_steps=1)
    fit_tiny(probe, module, steps=2)
    assert probe.failed_probes == 0
    first = list(probe.history[0].layers.values())
    for layer, reference in zip(first, expected.layers.values(), strict=True):
        torch.testing.assert_close(layer.h, reference.h, equal_nan=True)


class Sequences(Tiny):
    def __init__(self, body, width=8):
        super().__init__(nn.Linear(width, 5))
        self.body = body

    def training_step(self, batch, batch_idx):
        x = self.body(batch[0].reshape(-1, 3, 2).repeat(1, 1, 4))
        x = x[0] if isinstance(x, tuple) else x
        return F.cross_entropy(self.net(x.mean(1)), batch[1])


@pytest.mark.parametrize(
    "body",
    [
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        nn.LSTM(8, 8, batch_first=True),
        nn.GRU(8, 8, batch_first=True),
    ],
    ids=["transformer", "lstm", "gru"],
)
def test_attention_and_recurrent_networks(body):
    probe = SpectralProbe(every_n_steps=1)
    fit_tiny(probe, Sequences(body), steps=2)
    assert probe.failed_probes == 0
    assert all(layer.h.isfinite().any() for layer in probe.last_report.layers.values())


def test_an_attribute_that_cannot_be_copied_is_told():
    module = Tiny()
    module.lock = threading.Lock()
    probe = SpectralProbe(every_n_steps=1)
    with pytest.warns(SpectralWarning) as caught:
        fit_tiny(probe, module, steps=3)
    told = [str(w.message) for w in caught if "lock" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith("Tiny.lock cannot be copied and is shared with the probe")
    assert probe.failed_probes == 0


class Unlabelled(Tiny):
    """Takes a second batch from an iterator of its own, which cannot be copied."""

    def __init__(self, make, reads):
        super().__init__()
        self.reads, self.unlabelled = reads, make(DataLoader(torch.randn(96, 6), 8))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.net(next(self.unlabelled)).square().mean() if self.reads else loss


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("make", [iter, lambda loader: (batch for batch in loader)])
def test_an_iterator_that_cannot_be_copied_is_left_to_training(make, reads, recwarn):
    states = []
    for probes in ([], [probe := SpectralProbe(every_n_steps=1, top_k=3)]):
        torch.manual_seed(0)
        module = Unlabelled(make, reads)
        fit(module, probes, data=Repeated(batch_of()), batch_size=None, steps=4)
        states.append((module.state_dict(), next(module.unlabelled)))
    assert_identical(*states)
    assert probe.failed_probes == (probe.probes if reads else 0)
    told = [str(w.message) for w in recwarn if w.category is SpectralWarning and "unlabelled" in str(w.message)]
    assert len(told) == reads
    assert all("Unlabelled.unlabelled gives its items once, to training alone: pass a loss_fn" in text for text in told)


@pytest.mark.parametrize("loss", [None, "loss_fn", "spectral_loss"])
def test_a_hook_that_runs_after_the_probe_is_told_where_the_loss_may_depend_on_it(loss, recwarn):
    class Weighted(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            self.weight = 1.0 + batch_idx

    def plain(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1])

    if loss == "spectral_loss":
        Weighted.spectral_loss = plain
    fit_tiny(SpectralProbe(every_n_steps=1, loss_fn=plain if loss == "loss_fn" else None), Weighted(), steps=2)
    told = [w for w in recwarn if "Weighted.on_train_batch_start runs after the probe" in str(w.message)]
    assert len(told) == (loss is None)
    fit_tiny(SpectralProbe(every_n_steps=1), Tiny(), steps=1)
    assert len([w for w in recwarn if "runs after the probe" in str(w.message)]) == len(told)


def test_layers_frozen_and_thawed_during_training():
    class Thaw(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.net[0].requires_grad_(batch_idx >= 1)

    module, probe = Tiny(), SpectralProbe(every_n_steps=1)
    module.net[0].requires_grad_(False)
    fit(module, [Thaw(), probe], data=Repeated(batch_of()), batch_size=None, steps=4)
    assert [len(report.layers) for report in probe.history] == [1, 1, 2, 2]
    assert probe.history[0].skipped == {"net.0.weight": "frozen"}


@pytest.mark.parametrize("options", [{"fast_dev_run": 2}, {"overfit_batches": 2}, {"barebones": True}])
def test_trainer_modes(options):
    probe = SpectralProbe(every_n_steps=1)
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", callbacks=[probe], **{
        **({} if "barebones" in options else {
            "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        }), **options,
    })  # fmt: skip
    trainer.fit(Tiny(), torch.utils.data.DataLoader(Repeated(batch_of()), batch_size=None))
    assert (probe.probes, probe.failed_probes) == (2, 0)


def test_fit_twice():
    module, probe = Tiny(), SpectralProbe(every_n_steps=2)
    fit_tiny(probe, module, steps=3)
    fit_tiny(probe, module, steps=3)
    assert [report.step for report in probe.history] == [0, 2, 0, 2]


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_cli_builds_the_probe_from_a_config(package, tmp_path, monkeypatch):
    import importlib

    cli = importlib.import_module(f"{package}.cli")
    module = importlib.import_module(package)
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  accelerator: cpu\n  callbacks:\n"
        "    - class_path: lightning_spectral.SpectralProbe\n"
        "      init_args:\n        every_n_steps: 7\n        layers: ['net.*']\n"
        "        kinds: {'net.0': mlp_up}\n        fused_qkv: {'*.qkv': [8, 4, 4]}\n"
    )

    class Module(module.LightningModule):
        pass

    built = cli.LightningCLI(
        Module, args=["--config", str(config)], run=False, auto_configure_optimizers=False, save_config_callback=None
    )
    probe = next(c for c in built.trainer.callbacks if isinstance(c, SpectralProbe))
    assert probe.every_n_steps == 7
    assert probe.options.layers == ["net.*"]
    assert probe.options.kinds == {"net.0": "mlp_up"}


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_flatten_parameters_are_refused(strategy):
    class Trainer:
        is_global_zero = True

    Trainer.strategy = type(strategy, (), {})()
    probe = SpectralProbe()
    with pytest.warns(SpectralWarning, match=f"SpectralProbe is off: {strategy} flattens parameters .* ModelParallel"):
        probe.on_fit_start(Trainer(), Tiny())


def test_processes_that_torch_distributed_does_not_know_are_refused():
    class Trainer:
        is_global_zero, world_size, accumulate_grad_batches = True, 2, 1

    Trainer.strategy = type("OtherStrategy", (), {})()
    probe = SpectralProbe()
    with pytest.warns(SpectralWarning, match="OtherStrategy has 2 processes that do not talk through"):
        probe.on_fit_start(Trainer(), Tiny())


def test_warnings_come_once_per_cause_whatever_the_numbers():
    probe = SpectralProbe()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("step 3: the loss is nan", "step 17: the loss is nan", "step 20: the loss is 1.5e+3", "other"):
            probe._warn_once(text)
    assert [str(w.message) for w in caught] == ["step 3: the loss is nan", "other"]


def told_once(texts):
    warn = WarnOnce()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in texts:
            warn(text)
    return [str(w.message) for w in caught], warn


def test_addresses_and_shapes_make_no_new_cause_and_names_of_layers_do():
    addresses = ["<Tokens object at 0x7f3a12c0> is empty", "<Tokens object at 0x55d0ab10> is empty"]
    shapes = ["shapes cannot be multiplied (16x64 and 32x10)", "shapes cannot be multiplied (7x60 and 32x10)"]
    layers = ["blocks.0.weight: dead", "blocks.1.weight: dead", "x0x1: dead", "x0x2: dead"]
    assert told_once([*addresses, *shapes, *layers])[0] == [addresses[0], shapes[0], *layers]


def test_a_cause_is_told_once_of_each_layer_however_they_are_grouped():
    texts = ["a.w, b.w: dead", "b.w: dead", "b.w, c.w: dead", "c.w, a.w: dead", "a.w: 3 lost", "a.w: 4 lost"]
    assert told_once(texts)[0] == ["a.w, b.w: dead", "c.w: dead", "a.w: 3 lost"]
    many = ["a, b, c, d, e, f and 2 more: dead", "g: dead", "x, a, b, c, d, e and 1 more: dead", "g: lost"]
    assert told_once(many)[0] == [many[0], many[3]]


def test_a_text_that_is_new_at_each_probe_is_told_so_often_and_kept_no_longer():
    told, warn = told_once(f"sample_{i} is broken" for i in range(3 * MAX_CAUSES))
    assert told[:MAX_CAUSES] == [f"sample_{i} is broken" for i in range(MAX_CAUSES)]
    assert len(told) == MAX_CAUSES + 1
    assert "100 different warnings were given" in told[-1]
    assert len(warn._seen_causes) == MAX_CAUSES + 1


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("module_class", [ConvNet, GPT])
def test_real_modules_have_exponents(module_class):
    probe = SpectralProbe(every_n_steps=5)
    fit(module_class(), [probe], steps=6, logger=[ProbeRows()])
    assert len(probe.history) == 2
    assert not math.isnan(probe.last_report.medians()["alpha_median"])
