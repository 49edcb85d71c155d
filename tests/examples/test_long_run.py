"""Probes leave nothing behind: no graphs, no open files, no objects, no memory."""

import json
import sys
from pathlib import Path

import pytest
from manual import PAGES, flat
from pytorch_lightning.loggers import CSVLogger

from lightning_spectral import SpectralProbe
from lightning_spectral.curvature import DifferentiableLoss

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from examples.benchmarks.long_run import MOST_GROWTH, RUNS, Watch, train  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

EVERY = 25
"""Probes between two looks, at each of which CSVLogger holds as many rows."""

BLOCKS_PER_PROBE = 2
"""Blocks of Python's allocator that may come per probe. One report holds 170, a text and its number two or three."""


def growth(folder, probes, history_size=20):
    """What is held at the end and was not at the first look, and the probe."""
    watch, probe = (
        Watch(EVERY),
        SpectralProbe(every_n_steps=1, top_k=4, log_tables=True, history_size=history_size, min_probes=0),
    )
    train(probes, [probe, watch], CSVLogger(folder, flush_logs_every_n_steps=EVERY))
    assert (probe.probes, probe.failed_probes) == (probes, 0)
    return {key: value - watch.rows[0][key] for key, value in watch.rows[-1].items()}, probe


def test_probes_leave_nothing_behind(tmp_path):
    grown, probe = growth(tmp_path, 3 * EVERY)
    assert [report.step for report in probe.history] == list(range(55, 75))
    assert grown["graphs"] == 0
    assert grown["files"] == 0
    assert grown["blocks"] < 2 * EVERY * BLOCKS_PER_PROBE
    assert grown["memory_mb"] < 5


def test_reports_and_graphs_that_are_kept_show(tmp_path, monkeypatch):
    kept, run = [], DifferentiableLoss.run

    def keep(self):
        run(self)
        kept.append(self.value)

    monkeypatch.setattr(DifferentiableLoss, "run", keep)
    grown, _ = growth(tmp_path, 2 * EVERY, history_size=2 * EVERY)
    assert grown["graphs"] >= EVERY
    assert grown["blocks"] > EVERY * 100


def test_the_manual_s_figures_are_the_benchmark_s():
    runs = json.loads((ROOT / "examples/benchmarks/results/long_run_cpu.json").read_text())["figures"]
    assert list(runs) == list(RUNS)
    for run in runs.values():
        assert all(run["growth"][key] <= most for key, most in MOST_GROWTH.items())
    mb = {name: f"{run['growth']['memory_mb']:.2f}" for name, run in runs.items()}
    shown = flat(PAGES["faults.md"])
    assert f"grew by {mb['csv']} MB with CSVLogger and {mb['wandb']} MB with W&B offline" in shown
    assert f"and by {mb['csv, no probe']} and {mb['wandb, no probe']} MB where as many scalars were logged" in shown
