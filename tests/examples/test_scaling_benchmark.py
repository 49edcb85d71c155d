"""The scaling benchmark: arms run and are kept, large networks are the published ones, the manual has the figures."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from manual import PAGES, cells_of, flat

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.benchmarks import scaling, scaling_networks  # noqa: E402
from examples.benchmarks.scaling_figure import figure  # noqa: E402
from examples.benchmarks.scaling_networks import GPT2XL, Llama7B  # noqa: E402
from lightning_spectral.plan.cost_model import FACTOR  # noqa: E402

KEPT = json.loads((ROOT / "examples/benchmarks/results/scaling_cpu.json").read_text())
SMALL = replace(scaling.BASE, width=24, depth=1, length=8, samples=32, k=3)


def test_an_arm_runs_and_the_others_are_kept(tmp_path, monkeypatch):
    arms = {
        "directions": ("k", [SMALL, replace(SMALL, k=4)]),
        "classes, ggn": ("words", [replace(scaling.IMAGES, width=4)]),
    }
    for name, sizes in arms.items():
        monkeypatch.setitem(scaling.ARMS, name, sizes)
    output = tmp_path / "new" / "scaling.json"
    for name in arms:
        scaling.main([f"--output={output}", "--repeats=1", "--only", name])
    kept = json.loads(output.read_text())
    assert kept["figures"].keys() == arms.keys()
    rows = [row for arm in kept["figures"].values() for row in arm["points"]]
    assert [row["layers"] for row in rows] == [5, 5, 8]
    assert [row["planned_products"] for row in rows] == [[2, 6], [2, 6], [0, 0]]
    assert all(row["steps"] > 1 and row["bytes"] > row["step_bytes"] / 10 for row in rows)
    low, high = kept["measured_over_planned"]["bytes"]
    assert 0 < low <= high
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:.*")
def test_a_probe_is_timed_in_a_trainer(capsys):
    found = scaling.ranks(2, SMALL, processes=(1,))
    (row,) = found["points"]
    assert row["samples"] == 32
    assert row["probe_seconds"] > 0
    assert row["step_seconds"] > 0
    assert found["of_one"] == 1


def test_large_networks_are_planned_without_weights(monkeypatch):
    class Small(GPT2XL):
        length, sequences = 16, 128

        def __init__(self):
            super().__init__(16, 2, 2, 30)

    class Gated(Llama7B):
        length, sequences = 16, 128

        def __init__(self):
            super().__init__(16, 24, 2, 2, 30)

    monkeypatch.setattr(scaling_networks, "GPT2XL", Small)
    monkeypatch.setattr(scaling_networks, "Llama7B", Gated)
    few = ({"max_samples": 8, "micro_batch_size": 1, "layers": ["blocks.*"]}, 8)
    monkeypatch.setattr(scaling_networks, "SETTINGS", {"as it is": ({}, None), "few": few})
    found = scaling_networks.predictions()
    assert [row["layers"] for row in found.values()] == [9, 8, 15, 14]
    assert {row["method"] for row in found.values()} == {"sketch"}
    assert found["Small, few"]["step_flops"] == found["Small, as it is"]["step_flops"]
    # Half of the sequences, and half of each.
    assert found["Gated, few"]["steps"][1] < found["Gated, as it is"]["steps"][1] / 2
    assert found["Gated, few"]["bytes"]["peak"] < found["Gated, as it is"]["bytes"]["peak"]
    for row in found.values():
        assert row["sharded"]["sent_bytes"] > row["sent_bytes"]


def test_the_networks_are_the_published_ones():
    found = KEPT["figures"]["predictions"]
    assert found["GPT2XL, as it is"]["parameters"] == 1_557_611_200
    assert found["Llama7B, as it is"]["parameters"] == 6_738_415_616
    assert all(1 < row["flops_per_token_over_6n"] < 1.15 for row in found.values())


def test_the_figure_of_no_arms_is_not_drawn(tmp_path):
    figure({"predictions": {}}, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_the_figure_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="the figure needs matplotlib"):
        figure({}, tmp_path / "none.png")


@pytest.mark.parametrize("name", KEPT["figures"]["predictions"])
def test_the_manuals_predictions_are_the_benchmarks(name):
    row = KEPT["figures"]["predictions"][name]
    network, _, setting = name.partition(", ")
    shown = cells_of(f"{network}, {setting}", "methods.md")
    products, steps = (" to ".join(dict.fromkeys(f"{x:.2g}" for x in row[of])) for of in ("products", "steps"))
    expected = [products, steps, f"{row['bytes']['peak'] / 1e9:,.0f} GB"]
    assert shown[1:4] == expected
    of_shards = row["sharded"]["bytes"]["peak"], row["sharded"]["sent_bytes"]
    assert shown[5:] == [f"{size / 1e9:,.0f} GB" for size in of_shards]


def test_the_manuals_share_of_two_processes_is_the_benchmarks():
    one, two = KEPT["figures"]["ranks"]["points"]
    probe, step = (two[what] / one[what] for what in ("probe_seconds", "step_seconds"))
    assert f"with two on two cores {probe:.2f} of one's, as a training step took {step:.2f}" in flat(
        PAGES["distributed.md"]
    )


def test_plans_hold_within_what_is_said():
    found = KEPT["measured_over_planned"]
    assert all(1 / FACTOR < low <= high < FACTOR for low, high in found.values())
    told = re.findall(
        r"time is ([\d.]+) to ([\d.]+) times what is planned, and memory ([\d.]+) to ([\d.]+)",
        flat(PAGES["methods.md"]),
    )
    least_time, most_time, least_memory, most_memory = map(float, told[0])
    assert least_time <= found["steps"][0] <= found["steps"][1] <= most_time
    assert least_memory <= found["bytes"][0] <= found["bytes"][1] <= most_memory


def test_the_manuals_exponents_are_the_benchmarks():
    for name in scaling.ARMS:
        fits = KEPT["figures"][name]["exponents"]
        assert cells_of(name, "methods.md")[1:] == [f"{fits[y]['exponent']:.2f}" for y in ("steps", "bytes")]
