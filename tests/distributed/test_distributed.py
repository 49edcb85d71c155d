"""Two processes of DDP: they measure their batches together, before the same steps, and train as without a probe."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import cases
import pytest
from torch.distributed import fsdp

BEGIN = """
    import json, os, sys, time, warnings
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader
    sys.path.insert(0, {tests!r})
    from modules import GPT, ConvNet
    from lightning_spectral import SpectralNewton, SpectralProbe

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    folder = {folder!r}
    options = dict(
        accelerator="cpu", devices=2, strategy="ddp", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, log_every_n_steps=1,
    )
    result = {{}}
"""
END = """
    result["weights"] = [float(p.detach().double().sum()) for p in module.parameters()]
    with open(os.path.join(folder, f"rank{trainer.global_rank}.json"), "w") as file:
        json.dump(result, file)
    # Threads of gloo and of Lightning's launcher may abort a process whose interpreter ends under them.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
"""
TRAIN = """
    class Net(ConvNet):
        def on_train_batch_end(self, *args):
            time.sleep(0.002 + 0.004 * rank)

    probe = SpectralProbe(max_overhead=0.3, top_k=3)
    callbacks = [probe] if {with_probe} else []
    module = Net()
    logger = pl.loggers.CSVLogger(folder)
    trainer = pl.Trainer(max_steps=120, max_epochs=-1, callbacks=callbacks, logger=logger, **options)
    trainer.fit(module, DataLoader(ConvNet.data(), 16, shuffle=True))
    result["steps"] = [report.step for report in probe.history]
"""

JOINT = """
    import copy
    import torch.distributed as dist
    import torch.nn.functional as F
    from lightning_spectral import measure_spectra

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
                joined = tuple(torch.cat(parts) for parts in zip(*batches))
                again = copy.deepcopy(module.net)
                report = measure_spectra(
                    again, joined, lambda m, b: F.cross_entropy(m(b[0]), b[1]), curvature="exact", top_k=3
                )
                result["alone"] = {{name: x.h.tolist() for name, x in report.layers.items()}}
                result["samples"] = [len(part[0]) for part in batches]

    class Loader:
        # Batches of 12 samples for one process and of 20 for the other.
        def __iter__(self):
            data, start = ConvNet.data(), 0
            while start + 32 <= len(data):
                yield data[start : start + 12] if rank == 0 else data[start + 12 : start + 32]
                start += 32

    probe = SpectralProbe(every_n_steps=2, curvature="exact", top_k=3, loss_fn=fails_in_one)
    loader = DataLoader(ConvNet.data(), 8, shuffle=False)
    fixed = SpectralProbe(every_n_steps=2, curvature="exact", top_k=3, prefix="held", batch=loader, n_batches=3)
    module = ConvNet()
    trainer = pl.Trainer(
        max_steps=8, max_epochs=-1, callbacks=[SingleProcess(), probe, fixed], logger=pl.loggers.CSVLogger(folder),
        use_distributed_sampler=False, **options,
    )
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as told:
        trainer.fit(module, Loader())
    result["told"] = [str(w.message) for w in told if "Spectral" in w.category.__name__]
    result["steps"] = [report.step for report in probe.history]
    result["failed"] = probe.failed_probes
    result["joint"] = {{n.removeprefix("net."): x.h.tolist() for n, x in probe.history[1].layers.items()}}
    result["reports"] = [
        [x.h.tolist() for x in report.layers.values()] for report in (*probe.history, *fixed.history)
    ]
    held = fixed.history[0]
    result["held"] = [held.n_samples, held.n_batches]
"""

APART = """
    class Uneven(torch.utils.data.Dataset):
        def __len__(self):
            return 96

        def __getitem__(self, i):
            x, y = ConvNet.data()[8 * (i % 12) : 8 * (i % 12) + 8]
            return x, y, torch.zeros(3)

    class Net(ConvNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    probe = SpectralProbe(max_overhead=0.3, top_k=3, batch="fixed", fixed_samples=32)
    module = Net()
    trainer = pl.Trainer(
        max_steps=60, max_epochs=-1, callbacks=[probe], logger=pl.loggers.CSVLogger(folder),
        use_distributed_sampler=False, limit_train_batches=6, **options,
    )
    loader = DataLoader(ConvNet.data(), 16)
    if rank:
        loader = {loader}
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as told:
        trainer.fit(module, loader)
    result["told"] = [str(w.message) for w in told if "Spectral" in w.category.__name__]
    result["steps"] = [report.step for report in probe.history]
"""
SHARDED = """
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
                SpectralNewton.groups(self), lr=0.05, alpha="probe", alpha_min_r2=0.0, alpha_momentum=0.0,
                alpha_range=(0.1, 5.0),
            )

    def fit(callbacks, Net=Net):
        pl.seed_everything(0, verbose=False)
        module = Net()
        chosen = options | {{"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}}
        trainer = pl.Trainer(
            max_steps=5, max_epochs=-1, callbacks=callbacks, logger=pl.loggers.CSVLogger(folder), **chosen
        )
        trainer.fit(module, DataLoader(ConvNet.data(), 16, shuffle=True))
        return trainer, module, [p.to_local().tolist() for p in module.parameters()]

    probe = SpectralProbe(every_n_steps=2, curvature="exact", top_k=3)
    trainer, module, weights = fit([probe])
    result["steps"] = [report.step for report in probe.history]
    result["alphas"] = [[x.alpha.exponent for x in report.layers.values()] for report in probe.history]
    result["layers"] = list(probe.last_report.layers)
    result["samples"] = probe.last_report.n_samples
    result["as without"] = weights == fit([])[2]
    again = SpectralProbe(every_n_steps=2, curvature="exact", top_k=6)
    trainer, spectral, _ = fit([again], Spectral)
    used = trainer.optimizers[0].alpha_of(spectral.net[4].weight)
    result["used"] = [used, again.last_report.layers["net.4.weight"].alpha.exponent]
"""
LOADERS = {"smaller": "DataLoader(ConvNet.data(), 8)", "uncountable": "DataLoader(Uneven(), batch_size=None)"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_two(folder, train):
    """What each of two processes leaves in `result` after these lines, and its weights."""
    folder.mkdir()
    script = folder / "train.py"
    begin = BEGIN.format(tests=str(Path(cases.__file__).parent), folder=str(folder))
    script.write_text(textwrap.dedent(begin + train + END))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, timeout=300, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"status {done.returncode}:\n{done.stderr[-4000:]}"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_both_processes_probe_before_the_same_steps_and_train_as_without(tmp_path):
    first, second = run_two(tmp_path / "with", TRAIN.format(with_probe=True))
    assert first["steps"] == second["steps"]
    assert first["steps"][0] == 0
    assert len(first["steps"]) > 1
    assert first["weights"] == second["weights"]
    plain, _ = run_two(tmp_path / "without", TRAIN.format(with_probe=False))
    assert plain["weights"] == first["weights"]


def test_two_processes_measure_the_joined_batch_and_skip_a_probe_together(tmp_path):
    first, second = run_two(tmp_path / "joint", JOINT.format())
    assert first["samples"] == [12, 20]
    for name, h in first["joint"].items():
        assert h == pytest.approx(first["alone"][name], rel=1e-5, abs=1e-5 * max(map(abs, h)))
    assert first["reports"] == second["reports"]
    # Before step 4 the loss fails in the second process.
    assert first["steps"] == second["steps"] == [0, 2, 6]
    assert first["failed"] == second["failed"] == 1
    assert [text for text in first["told"] if "process 1: KeyError: 'lost'" in text]
    assert not second["told"]
    assert first["weights"] == second["weights"]
    # Three batches of 8, two for one process and one for the other.
    assert first["held"] == [24, 3]


@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="FSDP2 is of torch 2.6 and later")
def test_fully_sharded_training_is_probed_and_goes_on_as_without(tmp_path):
    first, second = run_two(tmp_path / "sharded", SHARDED.format())
    assert first["steps"] == second["steps"] == [0, 2, 4]
    assert first["layers"] == ["net.0.weight", "net.4.weight", "net.8.weight"]
    assert first["alphas"] == second["alphas"]
    assert all(alpha == alpha for alphas in first["alphas"] for alpha in alphas)
    assert first["samples"] == 32
    assert first["used"] == second["used"]
    # A step takes the exponent to the nearest tenth.
    assert first["used"][0] == pytest.approx(first["used"][1], abs=0.051)
    assert first["as without"]
    assert second["as without"]


@pytest.mark.parametrize("name", LOADERS)
def test_processes_wait_for_the_batches_of_all_or_are_all_off(tmp_path, name):
    first, second = run_two(tmp_path / name, APART.format(loader=LOADERS[name]))
    assert first["steps"] == second["steps"]
    assert bool(first["steps"]) == (name == "smaller")
    off = [text for text in first["told"] if "SpectralProbe is off: process 1: its batches cannot be had" in text]
    assert bool(off) == (name == "uncountable")
    assert first["weights"] == second["weights"]
