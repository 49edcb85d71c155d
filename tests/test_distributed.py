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

SCRIPT = """
    import json, os, sys, time, warnings
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader
    sys.path.insert(0, {tests!r})
    from modules import ConvNet
    from lightning_spectral import SpectralProbe

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    rank = int(os.environ.get("LOCAL_RANK", 0))

    class Net(ConvNet):
        def on_train_batch_end(self, *args):
            time.sleep(0.002 + 0.004 * rank)

    class Uneven(torch.utils.data.Dataset):
        def __len__(self):
            return 96

        def __getitem__(self, i):
            x, y = ConvNet.data()[8 * (i % 12) : 8 * (i % 12) + 8]
            return x, y, torch.zeros(3)

    probe = SpectralProbe(max_overhead=0.3, top_k=2, **{options})
    callbacks = [probe] if {with_probe} else []
    module = Net()
    trainer = pl.Trainer(
        max_steps=120, max_epochs=-1, callbacks=callbacks, logger=pl.loggers.CSVLogger({folder!r}),
        accelerator="cpu", devices=2, strategy="ddp", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, log_every_n_steps=1, use_distributed_sampler={data!r} == "same",
        limit_train_batches=1.0 if {data!r} == "same" else 6,
    )
    loader = DataLoader(ConvNet.data(), 8 if {data!r} == "smaller" and rank else 16, shuffle={data!r} == "same")
    if {data!r} == "uncountable" and rank:
        loader = DataLoader(Uneven(), batch_size=None)
    Net.training_step = lambda self, batch, i: ConvNet.training_step(self, batch[:2], i)
    trainer.fit(module, loader)
    weights = [float(p.detach().double().sum()) for p in module.parameters()]
    steps = [report.step for report in probe.history]
    with open(os.path.join({folder!r}, f"rank{{trainer.global_rank}}.json"), "w") as file:
        json.dump({{"steps": steps, "weights": weights}}, file)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ranks(folder, *, with_probe, options="{}", data="same"):
    folder.mkdir()
    script = folder / "train.py"
    values = {
        "tests": str(Path(__file__).parent),
        "folder": str(folder),
        "with_probe": with_probe,
        "options": options,
        "data": data,
    }
    script.write_text(textwrap.dedent(SCRIPT.format(**values)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    subprocess.run([sys.executable, str(script)], check=True, timeout=120, env=environment, capture_output=True)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_both_processes_probe_before_the_same_steps_and_train_as_without(tmp_path):
    first, second = ranks(tmp_path / "with", with_probe=True)
    assert first["steps"] == second["steps"]
    assert first["steps"][0] == 0
    assert len(first["steps"]) > 1
    assert first["weights"] == second["weights"]
    plain, _ = ranks(tmp_path / "without", with_probe=False)
    assert plain["weights"] == first["weights"]


@pytest.mark.parametrize("data", ["smaller", "uncountable"])
def test_a_process_that_collects_longer_or_not_at_all_stops_no_other(tmp_path, data):
    options = {"options": "dict(batch='fixed', fixed_samples=32)", "data": data}
    first, second = ranks(tmp_path / "with", with_probe=True, **options)
    assert first["steps"]
    assert bool(second["steps"]) == (data == "smaller")
    assert first["weights"] == second["weights"]
