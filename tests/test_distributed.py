"""Two processes: they probe before the same steps, and train as they would without a probe."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

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
"""
TRAIN = """
    class Net(ConvNet):
        def on_train_batch_end(self, *args):
            time.sleep(0.002 + 0.004 * rank)

    probe = SpectralProbe(max_overhead=0.3, top_k=2)
    callbacks = [probe] if {with_probe} else []
    module = Net()
    logger = pl.loggers.CSVLogger(folder)
    trainer = pl.Trainer(max_steps=120, max_epochs=-1, callbacks=callbacks, logger=logger, **options)
    trainer.fit(module, DataLoader(ConvNet.data(), 16, shuffle=True))
    result["steps"] = [report.step for report in probe.history]
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

    probe = SpectralProbe(max_overhead=0.3, top_k=2, batch="fixed", fixed_samples=32)
    module = Net()
    trainer = pl.Trainer(
        max_steps=60, max_epochs=-1, callbacks=[probe], logger=pl.loggers.CSVLogger(folder),
        use_distributed_sampler=False, limit_train_batches=6, **options,
    )
    loader = DataLoader(ConvNet.data(), 16)
    if rank:
        loader = {loader}
    trainer.fit(module, loader)
    result["steps"] = [report.step for report in probe.history]
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
    begin = BEGIN.format(tests=str(Path(__file__).parent), folder=str(folder))
    script.write_text(textwrap.dedent(begin + train + END))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    subprocess.run([sys.executable, str(script)], check=True, timeout=300, env=environment, capture_output=True)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_both_processes_probe_before_the_same_steps_and_train_as_without(tmp_path):
    first, second = run_two(tmp_path / "with", TRAIN.format(with_probe=True))
    assert first["steps"] == second["steps"]
    assert first["steps"][0] == 0
    assert len(first["steps"]) > 1
    assert first["weights"] == second["weights"]
    plain, _ = run_two(tmp_path / "without", TRAIN.format(with_probe=False))
    assert plain["weights"] == first["weights"]


@pytest.mark.parametrize("name", LOADERS)
def test_a_process_that_collects_longer_or_not_at_all_stops_no_other(tmp_path, name):
    first, second = run_two(tmp_path / name, APART.format(loader=LOADERS[name]))
    assert first["steps"]
    assert bool(second["steps"]) == (name == "smaller")
    assert first["weights"] == second["weights"]
