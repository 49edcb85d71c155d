"""Trainers of two ranks of DDP or FSDP2: they probe together; run in each of them."""

import copy
import time
import warnings

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from metric_updates import spectrum
from modules import GPT, ConvNet, ProbeRows
from steps import StepRecorder, derivatives
from torch.utils.data import DataLoader
from trust import every_fit_trusted
from world import patches

from lightning_spectral import CurvatureExponent, SpectralNewton, SpectralProbe, measure_spectra
from lightning_spectral.measurement.step import Weights


def options_of(n):
    pl.seed_everything(0, verbose=False)
    return {
        "accelerator": "cpu", "devices": n, "strategy": "ddp", "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1,
    }  # fmt: skip


def with_weights(result, module):
    return {**result, "weights": [float(p.detach().double().sum()) for p in module.parameters()]}


def texts(caught):
    return [str(w.message) for w in caught if "Spectral" in w.category.__name__]


def train(rank, n, folder, with_probe):
    """Train with a probe by a budget of time, in ranks of unlike speed."""
    options, result = options_of(n), {}

    class Net(ConvNet):
        def on_train_batch_end(self, *args):
            time.sleep(0.002 + 0.004 * rank)

    probe = SpectralProbe(max_overhead=0.6, top_k=3, gradient_samples=None)
    callbacks = [probe] if with_probe else []
    module = Net()
    logger = pl.loggers.CSVLogger(folder)
    trainer = pl.Trainer(max_steps=120, max_epochs=-1, callbacks=callbacks, logger=logger, **options)
    trainer.fit(module, DataLoader(ConvNet.data(), 16, shuffle=True))
    result["steps"] = [report.step for report in probe.history]
    return with_weights(result, module)


def probe_jointly(rank, n, folder):
    """Probe batches of unlike sizes, with a loss that fails in one rank at step 4."""
    options, result = options_of(n), {}

    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    def fails_in_one(module, batch):
        if rank and module.steps_seen == 4:
            raise KeyError("lost")
        return loss(module, batch)

    class SingleProcess(pl.Callback):
        # Before the probe: the joined batch, measured by the first process on a copy of its module.
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batches = [None, None]
            dist.all_gather_object(batches, batch)
            if rank == 0 and trainer.global_step == 2:
                joined = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
                again = copy.deepcopy(module.net)
                report = measure_spectra(
                    again, joined, lambda m, b: F.cross_entropy(m(b[0]), b[1]), curvature="exact", top_k=3
                )
                result["alone"] = {name: x.h.tolist() for name, x in report.layers.items()}
                result["samples"] = [len(part[0]) for part in batches]

    class Loader:
        # Batches of 12 samples for one process and of 20 for the other.
        def __iter__(self):
            data, start = ConvNet.data(), 0
            while start + 32 <= len(data):
                yield data[start : start + 12] if rank == 0 else data[start + 12 : start + 32]
                start += 32

    probe = SpectralProbe(every_n_steps=2, curvature="exact", top_k=3, loss_fn=fails_in_one, gradient_samples=None)
    loader = DataLoader(ConvNet.data(), 8, shuffle=False)
    fixed = SpectralProbe(
        every_n_steps=2, curvature="exact", top_k=3, prefix="held", batch=loader, n_batches=3, gradient_samples=None
    )
    module = ConvNet()
    trainer = pl.Trainer(
        max_steps=8,
        max_epochs=-1,
        callbacks=[SingleProcess(), probe, fixed],
        logger=pl.loggers.CSVLogger(folder),
        use_distributed_sampler=False,
        **options,
    )
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as caught:
        trainer.fit(module, Loader())
    result["warnings"] = texts(caught)
    result["steps"] = [report.step for report in probe.history]
    result["failed"] = probe.failed_probes
    result["joint"] = {n.removeprefix("net."): x.h.tolist() for n, x in probe.history[1].layers.items()}
    result["reports"] = [[x.h.tolist() for x in report.layers.values()] for report in (*probe.history, *fixed.history)]
    held = fixed.history[0]
    result["held"] = [held.n_samples, held.n_batches]
    return with_weights(result, module)


def probe_unlike_loaders(rank, n, folder, second):
    """Probe fixed batches, of which the second rank has smaller or uncountable ones."""
    options, result = options_of(n), {}

    class Uneven(torch.utils.data.Dataset):
        def __len__(self):
            return 96

        def __getitem__(self, i):
            x, y = ConvNet.data()[8 * (i % 12) : 8 * (i % 12) + 8]
            return x, y, torch.zeros(3)

    class Net(ConvNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    probe = SpectralProbe(max_overhead=0.3, top_k=3, batch="fixed", fixed_samples=32, gradient_samples=None)
    module = Net()
    trainer = pl.Trainer(
        max_steps=60,
        max_epochs=-1,
        callbacks=[probe],
        logger=pl.loggers.CSVLogger(folder),
        use_distributed_sampler=False,
        limit_train_batches=6,
        **options,
    )
    loader = DataLoader(ConvNet.data(), 16)
    if rank:
        loader = DataLoader(ConvNet.data(), 8) if second == "smaller" else DataLoader(Uneven(), batch_size=None)
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as caught:
        trainer.fit(module, loader)
    result["warnings"] = texts(caught)
    result["steps"] = [report.step for report in probe.history]
    return with_weights(result, module)


def train_shards(rank, n, folder):
    """Train weights in shards with a probe, without, and with exponents of a probe."""
    options, result = options_of(n), {}
    from pytorch_lightning.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Net(ConvNet):
        def configure_model(self):
            mesh = self.device_mesh["data_parallel"]
            if not any("FSDP" in type(module).__name__ for module in self.net):
                for module in (self.net[0], self.net[4], self.net[8]):
                    fully_shard(module, mesh=mesh)
                fully_shard(self.net, mesh=mesh)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    class Spectral(Net):
        def configure_optimizers(self):
            return SpectralNewton(
                SpectralNewton.groups(self),
                lr=0.05,
                alpha="probe",
                alpha_momentum=0.0,
                alpha_range=(0.1, 5.0),
            )

    def fit(callbacks, module_class=Net):
        pl.seed_everything(0, verbose=False)
        module = module_class()
        chosen = options | {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
        trainer = pl.Trainer(
            max_steps=5, max_epochs=-1, callbacks=callbacks, logger=pl.loggers.CSVLogger(folder), **chosen
        )
        trainer.fit(module, DataLoader(ConvNet.data(), 16, shuffle=True))
        return trainer, module, [p.to_local().tolist() for p in module.parameters()]

    probe = SpectralProbe(every_n_steps=2, curvature="exact", top_k=3, step=True, gradient_samples=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, module, weights = fit([probe])
    result["warnings"], result["step"] = texts(caught), probe.step_probe.last
    result["steps"] = [report.step for report in probe.history]
    result["alphas"] = [[x.alpha.exponent for x in report.layers.values()] for report in probe.history]
    result["layers"] = list(probe.last_report.layers)
    result["samples"] = probe.last_report.n_samples
    result["as without"] = weights == fit([])[2]
    again = SpectralProbe(every_n_steps=2, curvature="exact", top_k=6, gradient_samples=None)
    with every_fit_trusted():
        trainer, spectral, _ = fit([again], Spectral)
    used = trainer.optimizers[0].alpha_of(spectral.net[4].weight)
    # The final weights come after the last step.
    result["used"] = [used, again.history[-2].layers["net.4.weight"].alpha.exponent]
    return with_weights(result, module)


def train_with_measured_alpha(rank, n, folder, failing):
    """Train with exponents of a probe, whose batches fail in a rank."""
    options, result = options_of(n), {}

    class Net(GPT):
        def configure_optimizers(self):
            return SpectralNewton(SpectralNewton.groups(self), lr=0.05, alpha="probe")

    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, i):
            if rank == failing:
                raise RuntimeError("gone")
            return GPT.data()[i]

    batch = "train" if failing is None else DataLoader(Broken(), 16)
    probe = SpectralProbe(every_n_steps=2, top_k=4, batch=batch, gradient_samples=None)
    module = Net()
    trainer = pl.Trainer(max_steps=6, max_epochs=-1, callbacks=[probe], logger=pl.loggers.CSVLogger(folder), **options)
    with every_fit_trusted():
        trainer.fit(module, DataLoader(GPT.data(), 16, shuffle=True))
    result["alphas"] = [a for g in trainer.optimizers[0].param_groups for of in g.get("alphas", ()) for a in of]
    result["measured"] = [x.alpha.exponent for report in probe.history for x in report.layers.values()]
    return with_weights(result, module)


def log_metrics(rank, n, folder):
    """Log metrics that each rank updates in its own way."""
    options, result = options_of(n), {}

    class Net(ConvNet):
        def __init__(self):
            super().__init__()
            self.alpha, self.never = CurvatureExponent(), CurvatureExponent()

        def training_step(self, batch, batch_idx):
            for seed in range(rank, 4, 3):
                self.alpha.update(*spectrum(seed))
                if not rank:
                    self.never.update(*spectrum(seed))
            self.log("alpha", self.alpha, on_step=False, on_epoch=True)
            self.log("never", self.never, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    module = Net()
    trainer = pl.Trainer(max_epochs=2, limit_train_batches=1, logger=pl.loggers.CSVLogger(folder), **options)
    trainer.fit(module, DataLoader(ConvNet.data(), 16))
    result["logged"] = {name: float(trainer.callback_metrics[name]) for name in ("alpha", "never")}
    return with_weights(result, module)


class UnequalBatches:
    """Batches of 12 samples for the first rank and of 20 for the second."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        data = ConvNet.data()
        for start in range(0, len(data) - 31, 32):
            yield data[start : start + 12] if self.rank == 0 else data[start + 12 : start + 32]


def measure_steps(rank, n, folder, fault, with_probe=True):
    """Measure the steps after probes, of which the second one fails in the last rank where a fault is given."""
    options, result = options_of(n), {}

    def loss(module, batch):
        if fault == "loss" and rank and module.trainer.global_step == 3:
            raise KeyError("lost")
        return F.cross_entropy(module(batch[0]), batch[1])

    real = Weights.copied

    def copied(module):
        if fault == "memory" and rank and module.trainer.global_step == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(module)

    patches.setattr("lightning_spectral.callbacks.step_probe.Weights.copied", copied)
    rows, recorder, module = ProbeRows(), StepRecorder(), ConvNet()
    probe = SpectralProbe(
        every_n_steps=2, top_k=3, precision="float64", loss_fn=loss, curvature="exact", gradient_samples=None
    )
    trainer = pl.Trainer(
        max_steps=6, max_epochs=-1, callbacks=[recorder, *([probe] if with_probe else [])], logger=[rows],
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as caught:
        trainer.fit(module, UnequalBatches(rank))
    result["warnings"] = texts(caught)
    result["rows"] = rows.steps
    metrics = trainer.callback_metrics
    result["monitored"] = {
        key: float(value) for key, value in metrics.items() if key[:8] == "spectral" and "step" in key
    }
    result["last"] = probe.step_probe.last
    batches = [None] * n
    dist.all_gather_object(batches, [step["batch"] for step in recorder.steps[::2]])
    result["samples"] = [len(of_rank[0][1]) for of_rank in batches]
    if rank == 0:
        result["truth"] = []
        network = copy.deepcopy(module.net).eval()
        for step, *parts in zip(recorder.steps[::2], *batches, strict=True):
            joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
            states = [
                {name[4:]: value for name, value in step[when].items() if name.startswith("net.")}
                for when in ("before", "after")
            ]
            slope, matrix, before, after, names = derivatives(
                lambda call, batch=joined: F.cross_entropy(call(batch[0].double()), batch[1]), network, *states
            )
            shares = dict(zip(names, (matrix.sum(1) / matrix.sum()).tolist(), strict=True))
            result["truth"].append((slope, float(matrix.sum()), after - before, shares))
    return with_weights(result, module)
