"""What goes wrong within a run: interrupts, NaN, full disks, layers and batches that change."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from identical import assert_identical
from modules import ProbeRows
from pytorch_lightning.callbacks import BackboneFinetuning, BaseFinetuning
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger
from tiny import Small, fit_small, small_data
from torch import nn
from torch.utils.data import Dataset

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralWarning

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


class Zeroed(Small):
    """Takes gradients that are NaN for zero."""

    def configure_gradient_clipping(self, optimizer, **options):
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0.0)


def nan_at(step):
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == step:
                with torch.no_grad():
                    module.backbone[0].weight[0, 0] = float("nan")

    return Poison()


@pytest.mark.usefixtures("trusting")
def test_weights_that_turn_nan_are_told_and_change_nothing():
    states, rows = [], ProbeRows()
    for probes in ([], [probe := SpectralProbe(every_n_steps=1, weight_spectra=True)]):
        torch.manual_seed(0)
        module = Zeroed()
        trainer = fit_small(module, nan_at(2), *probes, steps=5, logger=[rows])
        states.append([value.nan_to_num(7.0) for value in module.state_dict().values()])
    assert_identical(*states)
    assert int(module.backbone[0].weight.isnan().sum()) == 1
    assert (trainer.global_step, probe.probes, probe.failed_probes) == (5, 5, 3)
    assert [math.isnan(row["spectral/alpha_median"]) for _, row in rows.rows] == [False, False, True, True, True]


def test_a_loss_that_is_nan_at_a_probe_is_told_once_and_the_next_probe_measures():
    class Spiked(Zeroed):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.global_step in (1, 2) else loss

    probe = SpectralProbe(every_n_steps=1)
    with pytest.warns(SpectralWarning) as caught:
        trainer = fit_small(Spiked(), probe, steps=5)
    told = [str(w.message) for w in caught if "nothing was measured" in str(w.message)]
    assert len(told) == 1
    assert "step 1" in told[0]
    assert "the loss is nan" in told[0]
    assert (trainer.global_step, probe.failed_probes) == (5, 2)
    assert [report.step for report in probe.history] == [0, 3, 4]


class TextlessError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def unprintable(module, batch):
    raise TextlessError


class Undecided(SpectralProbe):
    def should_measure(self, step):
        raise KeyError("no schedule")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: SpectralProbe(every_n_steps=1, loss_fn=unprintable),
            "nothing was measured at step 0: TextlessError",
        ),
        (lambda: Undecided(every_n_steps=1, min_probes=0), "no probe: should_measure failed: KeyError: 'no schedule'"),
    ],
)
def test_an_error_without_a_text_and_one_of_a_schedule_end_no_training(make, told, recwarn):
    states = []
    for probes in ([], [probe := make()]):
        torch.manual_seed(0)
        module = Small()
        trainer = fit_small(module, *probes, steps=4)
        states.append(module.state_dict())
    assert_identical(*states)
    assert (trainer.global_step, probe.history) == (4, [])
    (message,) = [str(w.message) for w in recwarn if w.category is SpectralWarning]
    assert message.startswith(told)


class Newton(Small):
    def configure_optimizers(self):
        return SpectralNewton([p for p in self.parameters() if p.requires_grad], lr=1e-3, alpha="probe")


@pytest.mark.parametrize("module_class", [Small, Newton])
def test_a_backbone_that_is_unfrozen_in_training_is_measured_from_then_on(module_class, tmp_path):
    def callbacks():
        return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5)

    probe, module = SpectralProbe(every_n_steps=2), module_class()
    trainer = fit_small(module, callbacks(), probe, steps=8)
    assert [sorted(report.layers) for report in probe.history] == [
        *2 * [["head.weight"]], *2 * [["backbone.0.weight", "backbone.4.weight", "head.weight"]]
    ]  # fmt: skip
    assert probe.history[0].skipped["backbone.0.weight"] == "frozen"
    assert probe.failed_probes == 0
    if module_class is Newton:
        used = [trainer.optimizers[0].alpha_of(p) for p in (module.backbone[0].weight, module.head.weight)]
        assert None not in used


class Surgery(BaseFinetuning):
    """Adds a layer at step 2, freezes one at 4 and takes one away at 6."""

    def freeze_before_training(self, module):
        pass

    def finetune_function(self, module, epoch, optimizer):
        pass

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        step, optimizer = trainer.global_step, trainer.optimizers[0]
        if step == 2:
            module.backbone.append(nn.Linear(8, 8))
            self.unfreeze_and_add_param_group(module.backbone[5], optimizer, lr=1e-3)
        elif step == 4:
            self.freeze(module.backbone[0])
        elif step == 6:
            del module.backbone[4]


def test_layers_that_come_freeze_and_go_in_training(tmp_path):
    probe = SpectralProbe(every_n_steps=2, log_tables=True, log_layers="all")
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = fit_small(Small(), Surgery(), probe, steps=8, logger=logger)
    a, b, new, head = "backbone.0.weight", "backbone.4.weight", "backbone.5.weight", "head.weight"
    # The last one moves into the place of the one that went.
    assert [list(report.layers) for report in probe.history] == [
        [a, b, head],
        [a, b, new, head],
        [b, new, head],
        [b, head],
    ]
    assert (trainer.global_step, probe.failed_probes) == (8, 0)
    written = (Path(logger.log_dir) / "spectral_layers.csv").read_text().splitlines()
    assert len(written) == 1 + 3 + 4 + 3 + 2


def test_layers_chosen_that_go_away_are_told_and_training_goes_on():
    probe = SpectralProbe(every_n_steps=2, layers=["backbone.4"])

    class Remove(Surgery):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 2:
                del module.backbone[4]

    with pytest.warns(SpectralWarning, match="nothing was measured at step 2: .*backbone.4"):
        trainer = fit_small(Small(), Remove(), probe, steps=4)
    assert (trainer.global_step, probe.failed_probes) == (4, 1)


class Changing(Dataset):
    """Batches whose size, nesting and type change from one to the next, as the module can take them."""

    def __init__(self):
        x, y = small_data().tensors
        self.batches = [
            (x, y), (x[:7], y[:7]), {"x": x[:9], "y": y[:9]}, [x.double(), y], (x, y.int()), (x[:5].clone(), y[:5]),
            (x[:6].to("meta"), y[:6]),
        ]  # fmt: skip

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return self.batches[i]


class Tolerant(Small):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def training_step(self, batch, batch_idx):
        x, y = batch.values() if isinstance(batch, dict) else batch
        if x.is_meta:
            x = torch.ones(x.shape)
        return F.cross_entropy(self(x.float()), y.long())


@pytest.mark.parametrize(
    ("options", "probes"),
    [({}, 7), ({"max_samples": 6}, 7), ({"batch": "fixed", "n_batches": 3}, 5), ({"n_batches": 2}, 3)],
)
def test_batches_that_change_shape_type_and_device(options, probes):
    states = []
    for callbacks in ([], [probe := SpectralProbe(every_n_steps=1, **options)]):
        torch.manual_seed(0)
        module = Tolerant()
        trainer = fit_small(module, *callbacks, steps=7, data=Changing(), batch_size=None)
        states.append(dict(module.state_dict()))
    assert_identical(*states)
    assert (trainer.global_step, probe.probes, probe.failed_probes) == (7, probes, 0)


class OfAnyLayout(Tolerant):
    def training_step(self, batch, batch_idx):
        x, y = batch
        x = torch.nested.to_padded_tensor(x, 0.0)[:, 0] if x.is_nested else x.to_dense()
        return super().training_step((x, y), batch_idx)


@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse_coo", "sparse_csr"])
def test_batches_of_nested_and_sparse_tensors(kind):
    x, y = torch.randn(16, 6), torch.arange(16) % 5
    if kind.startswith("sparse"):
        x = x.to_sparse(layout=getattr(torch, kind))
    else:
        x = torch.nested.as_nested_tensor(list(x[:, None]), layout=torch.jagged if kind == "jagged" else torch.strided)
    states = []
    for callbacks in ([], [probe := SpectralProbe(every_n_steps=1)]):
        torch.manual_seed(0)
        module = OfAnyLayout()
        trainer = fit_small(module, *callbacks, steps=3, data=[(x, y)] * 3, batch_size=None)
        states.append(dict(module.state_dict()))
    assert_identical(*states)
    assert (trainer.global_step, probe.failed_probes, len(probe.history)) == (3, 0, probe.probes)


class Lines(DummyLogger):
    """Writes what it is given to a device without space, as a file on a full disk."""

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("spectral") for key in metrics):
            with open("/dev/full", "a") as file:
                file.write(repr(metrics))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
def test_a_full_disk_is_told_once_and_training_goes_on():
    healthy, probe = ProbeRows(), SpectralProbe(every_n_steps=1)
    with pytest.warns(SpectralWarning) as caught:
        trainer = fit_small(Small(), probe, logger=[Lines(), healthy])
    told = [str(w.message) for w in caught if "could not log" in str(w.message)]
    assert told == ["Lines could not log: [Errno 28] No space left on device"]
    assert trainer.global_step == len(healthy.rows) == 6


def test_a_table_cut_short_by_a_full_disk_goes_on_in_a_line_of_its_own(tmp_path):
    probe = SpectralProbe(every_n_steps=1, log_tables=True)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    path = Path(logger.log_dir) / "spectral_layers.csv"

    class Cut(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                path.write_bytes(path.read_bytes()[:-20])

    fit_small(Small(), probe, Cut(), steps=2, logger=logger)
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 3 + 3
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "0", "0", "1", "1", "1"]


def test_a_folder_that_cannot_be_written_is_told_once_and_training_goes_on(tmp_path, monkeypatch):
    # A superuser may write anywhere, so the error is made by hand.
    before = Path.open

    def refused(self, mode="r", *args, **kwargs):
        if self.name == "spectral_layers.csv" and "a" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return before(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    probe = SpectralProbe(every_n_steps=1, log_tables=True)
    with pytest.warns(SpectralWarning) as caught:
        trainer = fit_small(Small(), probe, steps=3, logger=CSVLogger(tmp_path))
    told = [str(w.message) for w in caught if "could not log" in str(w.message)]
    assert told == ["CSVLogger could not log tables: [Errno 30] Read-only file system"]
    assert trainer.global_step == 3
    assert "spectral/alpha_median" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
