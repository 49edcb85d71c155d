"""What a probe logs: expected of the loggers, and read back from W&B's offline runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from modules import fit
from pytorch_lightning.loggers import WandbLogger
from tiny import Repeated, Tiny, batch_of
from torch import nn

FIGURES = ("alpha_by_depth", "power_law", "rank_models", "scale", "transfer_identity")


def deep(n=29):
    return Tiny(nn.Sequential(*[part for _ in range(n) for part in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 5)))


def wandb_records(path):
    """Return what an offline run's file holds, in its order, as W&B's own command prints it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def offline_run(folder, probe, module=None, steps=5):
    """The records of a training's W&B run and its folder of files."""
    pytest.importorskip("wandb", minversion="0.28", reason="`wandb leet inspect`, which reads a run, is not there")
    tracker = WandbLogger(project="p", save_dir=folder, offline=True)
    fit(
        module or Tiny(), [probe], data=Repeated(batch_of()), batch_size=None, steps=steps, logger=[tracker],
    )  # fmt: skip
    files = Path(tracker.experiment.dir)
    tracker.experiment.finish()
    (file,) = files.parent.glob("*.wandb")
    return wandb_records(file), files


def history_rows(records):
    return [record["history"]["item"] for record in records if record.get("type") == "history"]


def probe_rows(records, prefix="spectral"):
    return [row for row in history_rows(records) if f"{prefix}/failed_probes" in row]


def step_rows(records, prefix="spectral"):
    return [row for row in history_rows(records) if f"{prefix}/step/scale" in row]


def same(found, expected):
    """Equal to 1e-6, and NaN where no finite number is expected."""
    return float(found) == pytest.approx(expected if math.isfinite(expected) else math.nan, rel=1e-6, nan_ok=True)


def equal_tables(columns, cells, measured):
    expected = [{"step": measured.step, **row} for row in measured.rows()]
    assert columns == list(expected[0])
    for row, truth in zip(cells, expected, strict=True):
        for found, value in zip(row, truth.values(), strict=True):
            if isinstance(value, str):
                assert (found or "") == value
            elif math.isfinite(value):
                assert float(found) == pytest.approx(value, rel=1e-6)
            else:
                assert found in (None, "")
