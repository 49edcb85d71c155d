"""Hundreds of probes leave nothing behind: no memory, no graphs, no open files."""

import sys
import tracemalloc
from pathlib import Path

import pytest

from lightning_spectral.curvature import Problem

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.benchmarks.long_run import long_run

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def growth(folder, probes):
    """What is held after all probes and was not after the first 100, of the history's full length."""
    tracemalloc.start()
    try:
        watch, probe = long_run(probes, str(folder), every=20)
    finally:
        tracemalloc.stop()
    assert (probe.probes, probe.failed_probes, len(probe.history)) == (probes, 0, min(probes, 100))
    rows = [row for row in watch.rows if row["probes"] >= 100]
    return {key: rows[-1][key] - rows[0][key] for key in rows[0]}


def test_probes_leave_nothing_behind(tmp_path):
    grown = growth(tmp_path, 300)
    assert grown["memory_mb"] < 5
    assert grown["python_mb"] < 1
    assert grown["graphs"] == 0
    assert grown["files"] == 0


def test_a_graph_that_is_kept_alive_shows(tmp_path, monkeypatch):
    kept, run = [], Problem.run

    def keep(self):
        run(self)
        kept.append(self.value)

    monkeypatch.setattr(Problem, "run", keep)
    assert growth(tmp_path, 140)["graphs"] >= 40
