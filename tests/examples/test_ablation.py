"""The ablation: every configuration trains, the peers do what they say, the table is right, the sweep is valid."""

import doctest
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import synthetic
import torch
import torch.nn.functional as F
import yaml
from modules import NEEDS_MUON
from rich.console import Console
from torch import nn
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from lightning_spectral import SpectralNewton, SpectralProbe
from lightning_spectral.lightning_cli import spectral_cli
from lightning_spectral.report import read_run
from lightning_spectral.report.runs.spectra_file import append_report

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.ablation import run as ablation  # noqa: E402
from examples.ablation.peers import LayerRateAdamW, MuonWithAdamW, ScaleRates, scale_rates  # noqa: E402
from examples.ablation.results import RESULTS, Result, Run, figure, report, table  # noqa: E402
from examples.ablation.tasks import DigitsData, Language, LanguageData  # noqa: E402
from examples.benchmarks.run import BENCHMARKS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*")

OPTIMIZERS = sorted(path.stem for path in (ROOT / "examples" / "ablation" / "optimizers").glob("*.yaml"))
TASKS = list(ablation.rates())
SHORT = [
    "--trainer.max_epochs=2", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
]  # fmt: skip
SMALL = {
    "digits": ["--model.width=4"],
    "wrong_labels": ["--model.width=4"],
    "language": ["--model.width=16", "--model.depth=1", "--data.characters=100000"],
}


def same(a, b, **tolerances):
    return all(x.allclose(y, **tolerances) for x, y in zip(a.parameters(), b.parameters(), strict=True))


CASES = [
    *(pytest.param("language", name, marks=[NEEDS_MUON] if name == "muon" else []) for name in OPTIMIZERS),
    *((task, "spectral_newton_2") for task in TASKS[:-1]),
]


@pytest.mark.parametrize(("task", "optimizer"), CASES)
def test_every_overlay_takes_two_steps(task, optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py"])
    (planned,) = ablation.plan([task], [optimizer], [3])
    result = ablation.train(planned, tmp_path, probe=ablation.PROBE, extra=[*SMALL[task], *SHORT])
    assert len(result.curve) == 2
    measured = read_run([planned.folder(tmp_path)])
    assert [step.step for step in measured.steps] == [0, 2]
    assert result.val_loss == pytest.approx(result.curve[-1])
    assert math.isfinite(result.test_loss)
    saved = yaml.safe_load((planned.folder(tmp_path) / "config.yaml").read_text())
    assert saved["optimizer"]["init_args"]["lr"] == pytest.approx(planned.lr)
    assert saved["seed_everything"] == 3


def test_every_task_has_a_rate_for_every_optimizer():
    for of_task in ablation.rates().values():
        assert sorted(of_task) == OPTIMIZERS
    runs = ablation.plan()
    assert len(runs) == len(set(runs)) == len(TASKS) * len(OPTIMIZERS) * len(ablation.SEEDS)
    assert [r.lr for r in ablation.plan(["digits"], ["sgd"], [0], [0.5, 1])] == pytest.approx(
        [0.5 * ablation.rates()["digits"]["sgd"], ablation.rates()["digits"]["sgd"]]
    )


def test_the_swapped_arm_trains_spectral_newton_at_adamws_rate(tmp_path, monkeypatch):
    assert all(of_task["swapped"] == of_task["adamw"] for of_task in ablation.rates().values())
    monkeypatch.setattr("sys.argv", ["run.py"])
    (planned,) = ablation.plan(["digits"], ["swapped"], [0])
    told = []
    monkeypatch.setattr("lightning_spectral.callbacks.swap.log_above_bar", lambda trainer, text: told.append(text))
    ablation.train(planned, tmp_path, extra=[*SMALL["digits"], *SHORT])
    (line,) = told
    new, old = line.split("takes the place of")
    assert "SpectralNewton" in new
    assert "AdamW" in old
    assert "0.003" in new
    assert "0.003" in old


def test_a_tiny_ablation_writes_what_the_manual_reads(tmp_path, monkeypatch, capsys):
    train = ablation.train
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(ablation, "train", lambda *run, **of: train(*run, **of, extra=[*SMALL["language"], *SHORT]))
    words = ["--task=language", "--optimizer=adamw", "--optimizer=sgd", "--seed=0", "--seed=1", "--jobs=1"]
    _, _, *arguments = BENCHMARKS["ablation_cpu"].command("ablation_cpu", tmp_path)
    assert ablation.main([*arguments, *words]) == 0
    (written,) = tmp_path.glob("ablation_cpu.*")
    found = json.loads(written.read_text())
    assert found["environment"]["torch"] == torch.__version__
    assert [(row["run"]["optimizer"], row["run"]["seed"]) for row in found["runs"]] == [
        ("adamw", 0), ("adamw", 1), ("sgd", 0), ("sgd", 1)
    ]  # fmt: skip
    assert all(0 < row["test_loss"] < 10 and row["seconds"] > 0 for row in found["runs"])
    assert f"{statistics.fmean(row['test_loss'] for row in found['runs'][:2]):.4f} ± " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"), [({"tasks": ["nothing"]}, "not in rates.yaml"), ({"optimizers": ["x"]}, "give it one")]
)
def test_a_run_without_a_rate_is_refused(options, message, capsys):
    with pytest.raises(ValueError, match=message):
        ablation.plan(**options)
    with pytest.raises(SystemExit):
        ablation.main([f"--{key[:-1]}={value[0]}" for key, value in options.items()])
    assert message in capsys.readouterr().err


@NEEDS_MUON
def test_the_same_seed_gives_the_same_losses_and_another_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py"])
    extra = [*SMALL["digits"], *SHORT]
    first, again, other = (
        ablation.train(ablation.plan(["digits"], ["muon"], [seed])[0], tmp_path, extra=extra) for seed in (0, 0, 1)
    )
    assert first.curve == again.curve
    assert first.curve != other.curve


def test_a_run_with_wandb_logs_there_too(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py"])
    (planned,) = ablation.plan(["digits"], ["sgd"], [0])
    ablation.train(planned, tmp_path, wandb=True, extra=[*SMALL["digits"], *SHORT])
    (run,) = planned.folder(tmp_path).glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    # W&B's own process writes the file.
    while b"test_loss" not in run.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- data


def test_the_parts_are_disjoint_and_no_seed_changes_them():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        data = DigitsData(held_out=100)
        data.setup("fit")
        found.append((data.train.indices, data.val.indices, data.test.indices, data.train[0][0].tolist()))
    assert found[0] == found[1]
    train, val, test = map(set, found[0][:3])
    assert len(train) + len(val) + len(test) == len(train | val | test) == 1797
    assert len(val) == len(test) == 100


def test_wrong_labels_are_in_the_training_part_alone():
    clean, wrong = DigitsData(held_out=200), DigitsData(held_out=200, wrong_labels=0.5)
    clean.setup("fit")
    wrong.setup("fit")
    for name, share in {"train": 0.5 * 0.9, "val": 0, "test": 0}.items():
        labels = [torch.stack([label for _, label in getattr(data, name)]) for data in (clean, wrong)]
        assert (labels[0] != labels[1]).float().mean() == pytest.approx(share, abs=0.03)


def test_language_loss_is_uniform_before_training_and_that_of_the_training_step():
    data, module = LanguageData(batch_size=4, held_out=8, characters=20_000), Language(width=16, depth=1)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    module.log = lambda *args, **options: None
    loss = module._loss(batch)
    assert loss.equal(module.training_step(batch, 0))
    assert loss.item() == pytest.approx(math.log(96), rel=0.1)


# --- peers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.up = nn.Linear(144, 32)
        self.down = nn.Linear(32, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.down(self.up(self.conv(x).flatten(1)).relu()).relu())


def pair():
    torch.manual_seed(0)
    one, other = Net(), Net()
    other.load_state_dict(one.state_dict())
    return one, other


def steps(net, optimizers, n=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()


@NEEDS_MUON
def test_muon_with_adamw_is_torchs_two_on_matrices_and_the_rest():
    one, other = pair()
    steps(one, [MuonWithAdamW(MuonWithAdamW.groups(one), lr=0.02, weight_decay=0.1)])
    # The twin: a network whose kernels are flattened parameters from the start.
    flat = [nn.Parameter(other.conv.weight.detach().flatten(1)), other.up.weight, other.down.weight]
    matrices = {"conv.weight", "up.weight", "down.weight"}
    rest = [parameter for name, parameter in other.named_parameters() if name not in matrices]
    muon = torch.optim.Muon(flat, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1)

    class Flattened:
        def step(self):
            flat[0].grad = other.conv.weight.grad.flatten(1)
            muon.step()
            with torch.no_grad():
                other.conv.weight.copy_(flat[0].view_as(other.conv.weight))

    steps(other, [Flattened(), adamw])
    assert same(one, other, atol=1e-7)


@NEEDS_MUON
def test_muon_with_adamw_splits_a_fused_projection():
    grad = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12, bias=False)
            self.proj = nn.Linear(4, 4, bias=False)

    model = Attention()
    start = model.qkv.weight.detach().clone()
    model.qkv.weight.grad = grad.clone()
    groups = MuonWithAdamW.groups(model)
    assert any(layout["rows"] == [4, 4, 4] for group in groups for layout in group.get("layouts", []))
    MuonWithAdamW(groups, lr=0.1).step()
    pieces = [nn.Parameter(piece.clone()) for piece in start.split(4)]
    for piece, part in zip(pieces, grad.split(4), strict=True):
        piece.grad = part.clone()
    torch.optim.Muon(pieces, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw").step()
    assert torch.allclose(model.qkv.weight, torch.cat(list(pieces)))
    assert model.proj.weight.grad is None


@pytest.mark.parametrize("peer", [pytest.param(MuonWithAdamW, marks=NEEDS_MUON), LayerRateAdamW])
def test_peers_resume_bit_for_bit(peer):
    one, other = pair()
    first, second = (peer(peer.groups(net), lr=0.01) for net in (one, other))
    steps(one, [first])
    other.load_state_dict(one.state_dict())
    second.load_state_dict(torch.load(saved(first.state_dict()), weights_only=True))
    steps(one, [first])
    steps(other, [second])
    assert all(x.equal(y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


def saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@NEEDS_MUON
def test_muon_with_adamw_refuses_a_flat_list_and_calls_a_closure():
    one, _ = pair()
    with pytest.raises(ValueError, match=r"pass MuonWithAdamW.groups\(model\)"):
        MuonWithAdamW(one.parameters())
    optimizer = MuonWithAdamW(MuonWithAdamW.groups(one))

    def closure():
        loss = one(torch.ones(2, 1, 8, 8)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad


def test_equal_scales_are_adamw_and_others_scale_a_layers_rate():
    one, other = pair()
    steps(one, [LayerRateAdamW(LayerRateAdamW.groups(one), lr=0.01)])
    steps(other, [torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.01)])
    assert same(one, other, atol=1e-7)
    one, other = pair()
    scaled = LayerRateAdamW(LayerRateAdamW.groups(one), lr=0.01)
    scale_rates(scaled, {"conv.weight": 1.0, "up.weight": 3.0, "down.weight": -1.0, "gone": 7.0})
    scales = {group["name"]: group["scale"] for group in scaled.param_groups}
    assert scales == {"conv.weight": 0.5, "up.weight": 1.5, "down.weight": 1.0, "rest": 1.0}
    rates = {"conv.weight": 0.005, "up.weight": 0.015}
    twin = torch.optim.AdamW(
        [{"params": [p], "lr": rates.get(name, 0.01)} for name, p in other.named_parameters()], weight_decay=0.01
    )
    steps(one, [scaled])
    steps(other, [twin])
    assert same(one, other, atol=1e-7)
    assert [group["lr"] for group in scaled.param_groups] == [0.01] * 4


def test_scaling_rates_needs_its_optimizer(monkeypatch):
    callback = ScaleRates(every_n_steps=1)

    def measured(self, *args):
        self.last_report = SimpleNamespace(layers={})

    monkeypatch.setattr("lightning_spectral.SpectralProbe.on_train_batch_start", measured)
    with pytest.raises(ValueError, match="LayerRateAdamW, got SGD"):
        callback.on_train_batch_start(
            SimpleNamespace(optimizers=[torch.optim.SGD(pair()[0].parameters())]), None, None, 0
        )


def test_spectral_newton_and_its_peers_take_the_same_matrices():
    net = Net()
    spectral = {name for g in SpectralNewton.groups(net) if g["update"] == "spectral" for name in g["param_names"]}
    assert spectral == {group["name"] for group in LayerRateAdamW.groups(net)} - {"rest"}
    assert spectral == {name for g in MuonWithAdamW.groups(net) if g["update"] != "adamw" for name in g["param_names"]}


# --- table and figure


def results():
    return [
        Result(Run("digits", "adamw", 0, 0.01), 1.0, 0.5, 3.0, [2.0, 1.0]),
        Result(Run("digits", "adamw", 1, 0.01), 3.0, 0.7, 3.0, [4.0, 3.0]),
        Result(Run("digits", "muon", 0, 0.02), 1.25, 1.5, 3.0, [2.0, 1.25]),
        Result(Run("digits", "muon", 1, 0.02), math.nan, math.inf, 3.0, [2.0, math.nan]),
        Result(Run("language", "adamw", 0, 0.02, 2.0), 1.75, 1.5, 3.0, [1.75]),
    ]


def rows_of(made):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(made)
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_the_table_gives_mean_and_deviation_over_seeds():
    assert rows_of(table(results())) == [
        ["digits", "adamw", "0.01", "2.0000 ± 1.4142", "0.6000 ± 0.1414"],
        ["", "muon", "0.02", "1 of 2 diverged", "1 of 2 diverged"],
        ["language", "adamw at 2 lr", "0.02", "1.7500", "1.5000"],
    ]


def test_examples_in_docstrings_run():
    assert doctest.testmod(sys.modules["examples.ablation.results"]) == (0, 1)


def test_the_report_is_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report(results(), tmp_path / "new")
    printed = capsys.readouterr().out
    assert "2.0000 ± 1.4142" in printed
    assert 'the figure needs matplotlib: pip install "lightning-spectral[plot]"' in printed
    assert "2.0000 ± 1.4142" in (tmp_path / "new" / "table.txt").read_text()
    rows = json.loads((tmp_path / "new" / RESULTS).read_text())["runs"]
    assert rows[0]["run"] == {"task": "digits", "optimizer": "adamw", "seed": 0, "lr": 0.01, "factor": 1.0}


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    figure(results(), tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_each_task_has_a_page_of_the_runs_that_were_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = results()
    for result in (made[0], made[2]):
        folder = result.run.folder(tmp_path)
        folder.mkdir(parents=True)
        append_report(folder / "spectra.jsonl", synthetic.network(0))
    report(made, tmp_path)
    text = (tmp_path / "digits" / "report.html").read_text()
    assert "<title>digits: optimizers side by side</title>" in text
    assert '"name":"adamw"' in text
    assert '"name":"muon"' in text
    printed = capsys.readouterr().out
    assert f"runs side by side in {tmp_path / 'digits' / 'report.html'}" in printed
    assert "language, adamw at 2 lr is not on the page" in printed
    assert not (tmp_path / "language" / "report.html").exists()


def test_the_first_seeds_runs_are_measured(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        ablation, "train", lambda run, output, **options: asked.append((run.seed, bool(options["probe"])))
    )
    list(ablation.train_all(ablation.plan(["digits"], ["adamw", "sgd"], [4, 5]), tmp_path, jobs=1))
    assert asked == [(4, True), (5, False)] * 2


# --- sweep and make


SWEEP = ROOT / "examples" / "ablation" / "sweep.yaml"


def test_the_sweep_is_valid_for_wandb():
    config = pytest.importorskip("sweeps.config", reason="W&B's schema is in wandb[sweeps]")
    assert config.schema_violations_from_proposed_config(load_sweep_config(str(SWEEP))) == []


@pytest.mark.parametrize(("optimizer", "adds"), [("sgd", True), ("swapped", True), ("spectral_newton_probe", False)])
def test_options_of_a_probe_are_of_the_one_that_is_added(optimizer, adds, tmp_path):
    (planned,) = ablation.plan(["digits"], [optimizer], [0])
    words = ablation.arguments(planned, tmp_path, probe=ablation.probe_options(["--probe.every_n_steps", "7"]))
    cli = spectral_cli()(args=[*words, *SMALL["digits"]], run=False)
    (probe,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, SpectralProbe)]
    assert (probe.every_n_steps == 7) == adds


@pytest.mark.parametrize("words", [["--prob", "3"], ["--probe.top_k"], ["digits"]])
def test_words_that_are_no_option_of_a_probe(words):
    with pytest.raises(ValueError, match="unrecognized argument"):
        ablation.probe_options(words)


def test_the_sweep_is_the_ablation_run_by_run(monkeypatch):
    sweep = load_sweep_config(str(SWEEP))
    assert {"method", "metric", "parameters", "program", "command"} <= set(sweep)
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["method"] == "grid"
    assert sweep["metric"] == {"name": "val_loss", "goal": "minimize"}
    values = {name: choice.get("values", [choice.get("value")]) for name, choice in sweep["parameters"].items()}
    planned = {(run.task, run.optimizer, run.seed) for run in ablation.plan()}
    assert planned == {(t, o, s) for t in values["task"] for o in values["optimizer"] for s in values["seed"]}
    trained = []

    def train_all(runs, output, *, jobs, wandb, probe):
        trained.extend((run.task, run.optimizer, run.seed, wandb, probe) for run in runs)
        return []

    monkeypatch.setattr(ablation, "train_all", train_all)
    monkeypatch.setattr(ablation, "report", lambda results, output: None)
    macros = create_sweep_command(list(sweep["command"]))
    # What the agent makes of one point of the grid.
    args = create_sweep_command_args({"args": {name: {"value": of[-1]} for name, of in values.items()}})["args"]
    command = [part for macro in macros for part in (args if macro == "${args}" else [macro])]
    assert command[:3] == ["${env}", "${interpreter}", "${program}"]
    assert ablation.main(command[3:]) == 0
    probe = {"every_n_steps": "50", "max_samples": "32", "log_layers": "none"}
    assert trained == [(values["task"][-1], values["optimizer"][-1], values["seed"][-1], True, probe)]


def test_make_ablation_runs_it():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^ablation: \$\(READY\)\n\t\$\(BIN\)/python examples/ablation/run.py$", makefile, re.MULTILINE)
    assert re.search(r"^\.PHONY:.* ablation\b", makefile, re.MULTILINE)
