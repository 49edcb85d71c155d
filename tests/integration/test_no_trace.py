"""Training with a probe is bit-identical to training without it."""

import functools
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from identical import assert_identical
from modules import GPT, ConvNet, fit
from pytorch_lightning.loggers import CSVLogger

from lightning_spectral import SpectralProbe, measure_spectra

STEPS = 15
"""Two epochs and a half, or with accumulated gradients seven: what a probe leaves shows at the next batch."""


class Recorder(pl.Callback):
    """Everything a probe could change, after each batch."""

    def __init__(self):
        self.trail = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.trail.append(
            {
                "state": {name: value.clone() for name, value in module.state_dict().items()},
                "grad": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
                "metric": {k: v.clone() for k, v in module.accuracy.metric_state.items()},
                "flags": [m.training for m in module.modules()],
                "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
                "generator": module.generator.get_state(),
                "attributes": (module.steps_seen, module.average.clone(), len(module.losses)),
                "logged": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("spectral")},
                "batch": [t.clone() for t in batch],
            }
        )


def train(module_class, accumulate, folder, callbacks):
    pl.seed_everything(7, verbose=False)
    module, recorder = module_class(), Recorder()
    logger = CSVLogger(folder)
    trainer = fit(module, [*callbacks, recorder], steps=STEPS, logger=logger, accumulate_grad_batches=accumulate)
    optimizer = trainer.optimizers[0].state_dict()
    rows = (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    return recorder.trail, optimizer, rows


@functools.cache
def train_plain(module_class, accumulate):
    """Train without a probe, once for all that are compared with it."""
    with TemporaryDirectory() as folder:
        return train(module_class, accumulate, Path(folder), [])


def user_rows(rows):
    """The logged rows without the probe's columns and without rows that hold only those."""
    header = rows[0].split(",")
    keep = [i for i, key in enumerate(header) if not key.startswith("spectral/")]
    cut = [[row.split(",")[i] for i in keep] for row in rows]
    step = [header[i] for i in keep].index("step")
    return [row for row in cut if any(cell for i, cell in enumerate(row) if i != step)]


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("module_class", [ConvNet, GPT])
@pytest.mark.parametrize(
    ("curvature", "mode"), [("exact", "eval"), ("exact", "train"), ("ggn", "eval"), ("sketch", "eval")]
)
def test_training_is_bit_identical(module_class, accumulate, curvature, mode, tmp_path):
    probe = SpectralProbe(every_n_steps=5, top_k=4, curvature=curvature, mode=mode)
    plain = train_plain(module_class, accumulate)
    probed = train(module_class, accumulate, tmp_path, [probe])
    assert (probe.probes, probe.failed_probes) == (3, 0)
    assert len(plain[0]) >= STEPS
    assert_identical(plain[0], probed[0])
    assert_identical(plain[1], probed[1])
    assert user_rows(plain[2]) == user_rows(probed[2])
    assert any(key.startswith("spectral/") for key in probed[2][0].split(","))


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("curvature", ["exact", "auto"])
def test_training_is_bit_identical_with_all_that_is_measured_on_request(curvature, tmp_path):
    extras = {"spectrum_top_k": 8, "weight_spectra": True, "bootstrap": 20, "curvature_fraction": 2}
    probe = SpectralProbe(every_n_steps=5, top_k=4, curvature=curvature, **extras)
    plain = train_plain(GPT, 1)
    probed = train(GPT, 1, tmp_path, [probe])
    assert (probe.probes, probe.failed_probes) == (3, 0)
    assert_identical(plain[0], probed[0])
    assert_identical(plain[1], probed[1])


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_an_interrupt_leaves_the_model_as_it_was():
    module = ConvNet()
    module.train()
    module.net[1].eval()
    flags = [m.training for m in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batch = (torch.randn(4, 1, 8, 8),)
    states = torch.get_rng_state(), random.getstate()

    def interrupted(model, batch):
        # Past the copy it is given, on the module itself: what a closure may do.
        module.train()
        module(batch[0])
        torch.rand(3), random.random()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_spectra(module, batch, interrupted)
    assert [m.training for m in module.modules()] == flags
    assert_identical(before, dict(module.state_dict()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_hooks_and_gradients_of_the_original_are_not_touched():
    module, calls = ConvNet(), []
    batch = torch.randn(8, 1, 8, 8), torch.randint(0, 5, (8,))
    torch.nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
    grads = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.net[0].weight.register_hook(lambda g: calls.append(1))
    module.net[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(2))
    module.net[0].register_full_backward_hook(lambda *_: calls.append(3))
    measure_spectra(module, batch, lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]), top_k=3)
    assert calls == []
    assert_identical(grads, {n: p.grad for n, p in module.named_parameters()})


class Reentered(pl.LightningModule):
    """A module-wide autocast object and a decorated method, entered again at each step."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind, self.dtypes = torch.nn.Linear(6, 5), kind, []
        self.context = torch.autocast("cpu", torch.bfloat16)

    @torch.autocast("cpu", torch.bfloat16)
    def decorated(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if self.kind == "object":
            with self.context:
                y = self.net(batch[0])
        else:
            y = self.decorated(batch[0])
        self.dtypes.append(y.dtype)
        return torch.nn.functional.cross_entropy(y.float(), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("kind", ["object", "decorator"])
def test_an_autocast_that_is_entered_again_stays_on(kind):
    module = Reentered(kind)
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(0, 5, (32,)))
    fit(module, [SpectralProbe(every_n_steps=2)], steps=4, data=data, batch_size=8)
    assert module.dtypes == [torch.bfloat16] * 4
