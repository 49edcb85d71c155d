"""The training benchmark: it runs through, tunes as it says, resumes, and its table and claims are right."""

import doctest
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from modules import NEEDS_MUON
from torch import nn
from world import forkserver

from lightning_spectral import SpectralNewton

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.ablation.peers import LayerRateAdamW, MuonWithAdamW  # noqa: E402
from examples.benchmarks import train, train_results, train_runs  # noqa: E402
from examples.benchmarks.train_figure import figure  # noqa: E402
from examples.benchmarks.train_results import DIVERGED, Result, Run, Store, claims, table, wanted_rates  # noqa: E402

KEPT = ROOT / "examples" / "benchmarks" / "results" / "train_cpu.json"


@NEEDS_MUON
def test_quick_runs_through_and_resumes(tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "train.json"
    argv = ["--quick", "--long", "--jobs=1", f"--output={output}", "--task=wrong_labels", "--task=language"]
    train.main(argv)
    printed = capsys.readouterr().out
    assert "| spectral_newton |" in printed
    assert printed.count("below") == 2
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads(output.read_text())
    assert {row["arm"] for row in kept["summary"]} == {"adamw", "muon", "spectral_newton"}
    assert all(len(row["tests"]) == 2 for row in kept["summary"])
    assert {(row["arm"], row["steps"]) for row in kept["long"]} == {("adamw", 12), ("spectral_newton", 12)}

    def fail(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "train", fail)
    train.main(argv)
    assert json.loads(output.read_text()) == kept


@NEEDS_MUON
@pytest.mark.xdist_group("world_of_two")  # where the server of processes is
def test_runs_in_processes_give_the_same_losses(monkeypatch):
    context = forkserver()
    monkeypatch.setattr(train.multiprocessing, "get_context", lambda _: context)
    arm = train_runs.ARMS["muon"]
    runs = {Run("wrong_labels", "muon", 0.01, seed, 3): arm for seed in (0, 1)}
    apart = {r.run: (r.val, r.test) for r in train.train_all(runs, jobs=2, quick=True)}
    here = {r.run: (r.val, r.test) for r in train.train_all(runs, jobs=1, quick=True)}
    assert apart == here
    assert len(set(here.values())) == 2


@pytest.mark.parametrize("arm", ["probe", "layer_rates", "paper"])
@pytest.mark.parametrize("task", ["wrong_labels", "language"])
def test_every_arm_trains(arm, task, monkeypatch):
    made = []
    monkeypatch.setattr(train_runs.Arm, "make", spy(train_runs.Arm.make, made))
    result = train.train(Run(task, arm, 0.01, 0, 3), train_runs.ARMS[arm], quick=True)
    assert math.isfinite(result.test)
    if arm == "layer_rates":
        assert len({group["scale"] for group in made[0].param_groups}) > 1
    if arm == "probe":
        assert any(group["alphas"] != [[None]] for group in made[0].param_groups if "alphas" in group)


def spy(function, made):
    def wrapped(*args):
        made.append(function(*args))
        return made[-1]

    return wrapped


def test_a_recipe_says_what_the_options_come_to():
    language, pixels = train_runs.QUICK["language"], train_runs.QUICK["noisy_pixels"]
    assert train_runs.recipe(language, train_runs.ARMS["adamw"]) == "AdamW weight_decay=0.01"
    assert train_runs.recipe(language, train_runs.ARMS["paper"]) == "SpectralNewton alpha=1.0 damping=0.1"
    assert train_runs.recipe(pixels, train_runs.ARMS["paper"]) == "SpectralNewton alpha=2.0 damping=0.1"
    labels = train_runs.QUICK["wrong_labels"]
    assert train_runs.recipe(labels, train_runs.ARMS["spectral_newton"]).endswith("alpha=2.0 damping=noise")
    assert train_runs.recipe(labels, train_runs.ARMS["fixed_size"]) == "SpectralNewton alpha=2.0 damping=0.1"
    assert train_runs.recipe(pixels, train_runs.Arm(SpectralNewton, {}, {"momentum": 0.8, "damping": 0.5})) == (
        "SpectralNewton momentum=0.8 update_rms=adam alpha=2.0 damping=0.5"
    )
    assert {train_runs.ARMS[name].optimizer for name in ("muon", "layer_rates")} == {MuonWithAdamW, LayerRateAdamW}


def test_the_schedule_warms_up_and_ends_near_zero():
    factors = [train_runs.schedule(step, 600) for step in range(600)]
    assert factors[0] == pytest.approx(1 / 30)
    assert max(factors) == factors[29] == factors[30] == 1
    assert factors[-1] == pytest.approx(1 / 570)
    assert doctest.testmod(train_runs)[0] == doctest.testmod(train_results)[0] == 0


def test_a_loss_is_the_mean_over_samples_and_divergence_a_number():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    def loss(module, batch):
        return module(batch).mean()

    batches = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    assert train_runs.evaluate(Double(), batches, loss) == pytest.approx(8.0)
    assert train_runs.evaluate(Double(), [torch.tensor([math.nan])], loss) == DIVERGED
    run = Run("wrong_labels", "adamw", 1e30, 0, 3)
    assert train.train(run, train_runs.ARMS["adamw"], quick=True).val == DIVERGED


def test_rates_go_on_until_the_best_has_one_on_each_side():
    found, start = {}, 0.01
    while wanted := wanted_rates(found, start):
        found |= {lr: (math.log2(lr / 0.16)) ** 2 for lr in wanted}
    assert min(found, key=found.get) == 0.16
    assert {0.08, 0.16, 0.32} <= set(found)
    falling = {}
    while wanted := wanted_rates(falling, start):
        falling |= {lr: -lr for lr in wanted}
    assert len(falling) == train_results.MOST_RATES


def test_the_store_keeps_runs_apart_and_comes_back(tmp_path):
    path = tmp_path / "train.json"
    store = Store(path, {"torch": "2"})
    for seed, steps in ((0, 3), (1, 3), (0, 4)):
        store.add(Result(Run("language", "AdamW", 0.01, seed, steps), 1.0 + seed, 2.0, 0.1))
    again = Store(path, {})
    assert again.results == store.results
    assert [r.val for r in again.by_rate("language", "AdamW", 3, (0, 1))[0.01]] == [1.0, 2.0]
    assert again.by_rate("language", "AdamW", 4, (0, 1)) == {}


def row(task, arm, test, std=0.02):
    return {"task": task, "arm": arm, "lr": 0.01, "test": test, "std": std, "tests": [test - std, test + std]}


def summary():
    losses = {"spectral_newton": (1.50, 0.52, 0.50), "muon": (1.55, 0.51, 0.40), "adamw": (1.70, 0.60, 0.45)}
    tasks = ("language", "noisy_pixels", "wrong_labels")
    return [row(task, arm, of[i]) for i, task in enumerate(tasks) for arm, of in losses.items()]


def test_claims_say_what_holds():
    found = claims(summary())
    assert [holds for _, holds in found] == [True, False, True, False]
    assert "0.04 nats below muon (it is 0.050)" in found[0][0]
    assert "above muon (it is +0.100)" in found[3][0]
    assert claims(summary()[:1]) == []


def test_the_table_has_a_line_per_arm_and_a_column_per_task():
    lines = table(summary()).splitlines()
    assert lines[0] == "| test loss | language | noisy_pixels | wrong_labels |"
    assert lines[2].startswith("| spectral_newton | 1.500 ± 0.020 (lr 0.01) | 0.520")
    assert len(lines) == 5


def test_the_figure_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"lightning-spectral\[plot\]\""):
        figure(summary(), {}, {}, tmp_path / "train.png")


def test_the_grid_is_of_rates_near_the_best_of_its_arm(tmp_path):
    store = Store(tmp_path / "train.json", {})
    bench = train.Benchmark(store, ["language"], {"fixed_size": train_runs.ARMS["fixed_size"]}, (0,), quick=True)
    (seed,) = train.TUNING_SEEDS["language"]
    losses = {
        "alpha=2 damping=0.03": {0.01: 2.0, 0.02: 1.0, 0.04: 3.0},
        "alpha=2 damping=0.1": {0.01: 1.25, 0.02: 1.5, 0.04: 1.75, 0.08: 0.5},
        "alpha=1.5 damping=0.1": {0.01: 0.1, 0.02: 0.1},
    }
    for arm, curve in losses.items():
        for lr, loss in curve.items():
            store.add(Result(Run("language", bench.recipes["language", arm], lr, seed, 3), loss, 0.0, 0.0))
    assert bench.grid() == {"language": {2.0: {0.03: 1.0, 0.1: 1.25}}}
    trained = []
    bench.train = trained.extend
    bench.study()
    assert trained == [("language", arm, lr, seed) for arm in train_runs.studied() for lr in (0.01, 0.02, 0.04)]


def test_the_study_needs_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train.main(["--study", "--arm=muon"])
    assert "add --arm fixed_size" in capsys.readouterr().err


def test_the_kept_results_are_of_the_tasks_and_arms_as_they_are():
    kept = json.loads(KEPT.read_text())
    rows = {(row["task"], row["arm"]): row for row in kept["summary"]}
    assert set(rows) == {(task, arm) for task in train.TASKS for arm in train.ARMS}
    for (task, arm), found in rows.items():
        assert found["recipe"] == train_runs.recipe(train.TASKS[task], train_runs.ARMS[arm])
        assert len(found["tests"]) == len(train.SEEDS)
