"""Figures of networks in shards: the benchmark runs, and the manual says what it found."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from manual import PAGES, flat
from world import forkserver

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.benchmarks import shards  # noqa: E402

KEPT = json.loads((ROOT / "examples/benchmarks/results/shards_cpu.json").read_text(encoding="utf-8"))


@pytest.mark.xdist_group("world_of_two")  # where the server of processes is
def test_shards_and_whole_weights_give_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["shards.py", "--layers=3", "--width=24", f"--output={tmp_path / 'found.json'}"])
    monkeypatch.setattr(shards, "METHODS", ("ggn",))
    forkserver()
    monkeypatch.setattr(shards.mp, "spawn", partial(mp.start_processes, start_method="forkserver"))
    for name, value in shards.OWN_PAGES.items():
        monkeypatch.setenv(name, value)
    shards.main()
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["figures"]["ggn"]
    assert found["largest_difference_of_alpha"] < 1e-4
    assert found["whole"]["bytes"] > 0
    assert found["shards"]["planned_bytes"] > 0


def test_the_manual_says_what_was_found():
    page = flat(PAGES["distributed.md"])
    of_ggn, of_sketch = (KEPT["figures"][method] for method in ("ggn", "sketch"))
    sizes = [KEPT["weights_bytes"], of_ggn["shards"]["bytes"], of_ggn["whole"]["bytes"]]
    weights, split, whole = (f"{size / 1e9:.2f} GB" for size in sizes)
    assert f"{weights} of weights, two processes take {split} each, and {whole} where each holds the whole" in page
    assert f"in {of_ggn['seconds_ratio']:.1f} (`ggn`) and {of_sketch['seconds_ratio']:.1f} (`sketch`) times" in page
    assert of_sketch["shards"]["bytes"] == pytest.approx(of_ggn["shards"]["bytes"], rel=0.1)
    assert of_ggn["largest_difference_of_alpha"] < 1e-6
