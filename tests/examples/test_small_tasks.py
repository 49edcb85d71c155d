"""The small tasks: each trains, evaluation repeats, the benchmark resumes, and its table counts right."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.benchmarks import small_task_images, small_task_sequences, small_tasks  # noqa: E402
from examples.benchmarks.other_networks import cnn  # noqa: E402
from examples.benchmarks.small_task_images import Rows, places_and_colours  # noqa: E402
from examples.benchmarks.small_tasks import DEFAULT, FIXED, TASKS, excess, table  # noqa: E402
from examples.benchmarks.small_tasks_figure import figure  # noqa: E402
from examples.benchmarks.train_results import Run  # noqa: E402
from examples.benchmarks.train_runs import evaluate, recipe, train_task  # noqa: E402

KEPT = ROOT / "examples" / "benchmarks" / "results" / "small_tasks_cpu.json"


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    monkeypatch.setattr(small_task_sequences, "trained_gpt", small_task_sequences.gpt)
    monkeypatch.setattr(small_task_images, "trained_on_low_digits", partial(cnn, 1, 5, width=16))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_its_matrices_and_evaluates_alike(name):
    task = replace(TASKS[name], steps=1)
    data = task.data()
    data.setup("fit")
    data.train, data.val, data.test = (
        torch.utils.data.Subset(part, range(64)) for part in (data.train, data.val, data.test)
    )
    data.batch_size = 16
    torch.manual_seed(0)
    module = task.module()
    optimizer = DEFAULT.make(module, 0.01)
    matrices = [p for group in optimizer.param_groups if group["update"] == "spectral" for p in group["params"]]
    first = evaluate(module, data.val_dataloader(), task.loss)
    assert first == evaluate(module, data.val_dataloader(), task.loss)
    module.train()
    task.loss(module, next(iter(data.train_dataloader()))).backward()
    optimizer.step()
    assert matrices
    assert all(p.grad is not None for p in matrices)
    assert evaluate(module, data.val_dataloader(), task.loss) != first
    result = train_task(Run(name, "", 0.01, 0, 1), task, data, DEFAULT)
    assert math.isfinite(result.val)
    assert math.isfinite(result.test)


def test_no_row_is_in_two_parts_and_no_seed_changes_them():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        data = TASKS["tabular regression"].data()
        data.setup("fit")
        found.append(
            [
                set(part.dataset.tensors[1][part.indices].flatten().tolist())
                for part in (data.train, data.val, data.test)
            ]
        )
    assert found[0] == found[1]
    train, val, test = found[0]
    assert len(train) + len(val) + len(test) == len(train | val | test) == 3000


def test_it_runs_through_and_resumes(tmp_path, capsys, monkeypatch):
    data = partial(Rows, partial(places_and_colours, 20), 16, 50)
    monkeypatch.setattr(small_tasks, "TASKS", {"coordinates": replace(TASKS["coordinates"], steps=2, data=data)})
    output = tmp_path / "new" / "small_tasks.json"
    argv = [f"--output={output}"]
    small_tasks.main(argv)
    printed = capsys.readouterr().out
    assert "| coordinates |" in printed
    assert "swapped: not worse than AdamW on" in printed
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads(output.read_text())
    by_arm = {row["arm"]: row for row in kept["summary"]}
    assert by_arm["adamw"]["lr"] == by_arm["swapped"]["lr"] == by_arm["swapped_fixed"]["lr"]
    assert "damping=0.1" in by_arm["swapped_fixed"]["recipe"]
    assert all(len(row["tests"]) == len(small_tasks.SEEDS) for row in kept["summary"])

    def fail(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(small_tasks, "train_task", fail)
    small_tasks.main(argv)
    assert json.loads(output.read_text()) == kept


def row(arm, test, std, task="graph"):
    return {"task": task, "arm": arm, "lr": 0.01, "test": test, "std": std, "tests": [test - std, test + std]}


def test_not_worse_is_at_most_a_standard_deviation_above():
    adamw = row("adamw", 1.0, 0.03)
    assert excess(row("swapped", 1.05, 0.04), adamw) == pytest.approx(0.05 / math.sqrt((0.03**2 + 0.04**2) / 2))
    assert excess(row("swapped", 1.0, 0.0), row("adamw", 1.0, 0.0)) == 0
    assert excess(row("swapped", 1.1, 0.0), row("adamw", 1.0, 0.0)) == math.inf
    near, far = row("swapped", 1.02, 0.03), row("spectral_newton", 1.04, 0.03)
    lines = table([adamw, near, row("swapped_fixed", 0.9, 0.03), far]).splitlines()
    assert lines[2].startswith("| graph | 1.0000 ± 0.0300 (0.01) | 1.0200 ± 0.0300 (0.01), +0.7 sd | ")
    assert lines[3] == "swapped: not worse than AdamW on 1 of 1, with the lower mean on 0"
    assert lines[4] == "swapped_fixed: not worse than AdamW on 1 of 1, with the lower mean on 1"
    assert lines[5] == "spectral_newton: not worse than AdamW on 0 of 1, with the lower mean on 0"


def test_the_figure_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"lightning-spectral\[plot\]\""):
        figure([], tmp_path / "small_tasks.png")


def test_the_kept_results_are_of_the_tasks_and_defaults_as_they_are():
    kept = json.loads(KEPT.read_text())
    rows = {(row["task"], row["arm"]): row for row in kept["summary"]}
    arms = {"adamw": small_tasks.ADAMW, "swapped": DEFAULT, "swapped_fixed": FIXED, "spectral_newton": DEFAULT}
    assert set(rows) == {(task, arm) for task in TASKS for arm in arms}
    for (task, arm), found in rows.items():
        assert found["recipe"] == recipe(TASKS[task], arms[arm])
        assert len(found["tests"]) == len(small_tasks.SEEDS)
        assert found["lr"] == rows[task, "adamw"]["lr"] or arm == "spectral_newton"
