"""The README's snippets run, its tables are the code's, and its commands exist.

Run as a program, this writes the README's table of logged keys.
"""

import importlib
import inspect
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import wandb
import yaml
from modules import ConvNet
from reports import layer, report
from torch.utils.data import DataLoader

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralReport
from lightning_spectral.callbacks.log_selection import HEALTH, LOGGED_LAYERS, LogSelection, charts
from lightning_spectral.callbacks.report_writer import FIGURES
from lightning_spectral.cli.commands import main
from lightning_spectral.options import Options
from lightning_spectral.records.log_keys import (
    ALPHA_KEY,
    LAYER_KEYS,
    PROBE_KEYS,
    REPORT_KEYS,
    STEP_CURVATURE,
    STEP_KEYS,
    layer_key,
)
from lightning_spectral.report import figures
from lightning_spectral.report.terminal.tables import CAPTION

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fences(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_python_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {"model": ConvNet(), "train_loader": DataLoader(ConvNet.data(), 48)}
    snippets = fences("python")
    assert len(snippets) == 10
    for i, snippet in enumerate(snippets):
        exec(compile(snippet.replace("max_steps=300", "max_steps=2"), "README.md", "exec"), scope)
        if i == 0:
            scope["trained"] = scope["probe"]
        # Recipes make other probes, and what comes after them shows the history of the one that ran.
        scope["probe"] = scope["trained"]
    # W&B would go on with this run in another test.
    wandb.finish()
    printed = capsys.readouterr().out
    assert "alpha" in printed
    assert "PowerLawFit(exponent=" in printed
    alphas = [layer.alpha for layer in scope["report"].layers.values()]
    assert scope["metrics"]["alpha"].points == sum(alpha.n_used for alpha in alphas) > 0
    assert SpectralReport.from_json(Path("spectra.json")).n_samples == 512
    assert {"power_law.pdf", "alpha.png"} <= {path.name for path in tmp_path.iterdir()}
    assert isinstance(scope["trainer"], pl.Trainer)
    assert scope["trained"].probes == 1
    assert scope["optimizer"].alpha_of(scope["net"][0].weight) <= 2.0
    assert "[('dense', 0.003), ('adamw', 0.003)]" in printed


@pytest.mark.filterwarnings("ignore:.*look like embeddings or heads:lightning_spectral.errors.SpectralWarning")
def test_yaml_snippets_build_probes_and_optimizers():
    configs = [yaml.safe_load(snippet) for snippet in fences("yaml")]
    probes = [callback for config in configs for callback in config.get("trainer", {}).get("callbacks", [])]
    assert [probe["class_path"] for probe in probes] == ["lightning_spectral.SpectralProbe"] * 2
    first, second = (SpectralProbe(**probe["init_args"]) for probe in probes)
    assert (first.budget.max_overhead, second.every_n_steps) == (0.03, 50)
    optimizers = [config["optimizer"] for config in configs if "optimizer" in config]
    assert [optimizer["class_path"] for optimizer in optimizers] == ["lightning_spectral.SpectralNewton"] * 2
    made = [SpectralNewton(ConvNet().parameters(), **optimizer["init_args"]) for optimizer in optimizers]
    assert [[group["lr"] for group in optimizer.param_groups] for optimizer in made] == [[1e-3, 1e-3]] * 2
    assert [optimizer.takes_alpha for optimizer in made] == [False, True]


def test_every_logged_key_is_documented():
    for key in LAYER_KEYS:
        assert f"`{key.name}`" in README, key.name
    assert f"`{ALPHA_KEY}`" in README
    for key in (*REPORT_KEYS, *PROBE_KEYS, *STEP_KEYS):
        assert f"`spectral/{key}`" in README, key


KEYS = re.compile(
    r"(?<=<!-- keys: written by `python tests/docs/test_readme.py` -->\n).*?(?=<!-- end of keys -->)", re.DOTALL
)
ON_REQUEST = {"weight_spectra": True, "bootstrap": 2, "curvature_fraction": 2, "alignment": True}


def table_of_keys():
    option_of = {part: name for name, value in ON_REQUEST.items() for part in Options(**{name: value}).parts}
    rows = ["| key | what it is | median | asked for by |", "|---|---|---|---|"]
    for key in LAYER_KEYS:
        option = f"`{option_of[key.part]}`" if key.part else ""
        rows.append(f"| `spectral/{key.name}/<layer>` | {key.meaning} | {'yes' if key.median else ''} | {option} |")
    rows += [f"| `spectral/{name}` | {meaning} | | |" for name, meaning in (REPORT_KEYS | PROBE_KEYS).items()]
    rows += [f"| `spectral/{name}` | {meaning} | | `step` |" for name, meaning in STEP_KEYS.items()]
    rows.append(f"| `spectral/{STEP_CURVATURE.name}/<layer>` | {STEP_CURVATURE.meaning} | | `step` |")
    rows.append(f'| `{ALPHA_KEY}` | exponent a matrix steps with | | `SpectralNewton(alpha="probe")` |')
    medians = "With a median: also as `spectral/<quantity>_median` and `spectral/<quantity>/median_<kind>`."
    return "\n".join([*rows, "", medians, ""])


def test_the_table_of_keys_is_the_codes():
    (written,) = KEYS.findall(README)
    assert written == table_of_keys(), "run `python tests/docs/test_readme.py`"


def test_the_table_of_costs_is_the_benchmarks():
    found = json.loads((ROOT / "examples/benchmarks/results/probe_cpu.json").read_text())["figures"]
    for title, name in {
        "ReLU ResNet, 16": "resnet",
        "GPT of 3 blocks, 13": "gpt3",
        "GPT of 12 blocks, 49": "gpt12",
    }.items():
        (row,) = re.findall(rf"^\| ({title} matrices.*) \|$", README, re.MULTILINE)
        methods = found[name]["methods"]
        shown = ["-" if x not in methods else str(round(methods[x]["steps"])) for x in COSTS]
        assert row.split(" | ")[1:] == shown


def test_what_other_networks_cost_is_the_benchmarks():
    figures = json.loads((ROOT / "examples/benchmarks/results/others_cpu.json").read_text())["figures"].values()
    steps = [row["steps"] for row in figures]
    text = " ".join(README.split())
    assert f"On {len(steps)} networks and losses as other people write them" in text
    assert f"{statistics.median(steps):.0f} training steps in the median and {max(steps):.0f} at most, " in text
    assert f"{sum(x <= 25 for x in steps)} of them within 25;" in text
    assert f"at most 0.03 as well on {sum(row['target'] for row in figures)}." in text


def test_what_real_programs_cost_is_the_benchmarks():
    figures = json.loads((ROOT / "examples/benchmarks/results/programs_cpu.json").read_text())["figures"].values()
    steps = [row["steps"] for row in figures]
    text = " ".join(README.split())
    assert f"{len(steps)} real programs of" in text
    assert f"take {statistics.median(steps):.0f} training steps in the median and {max(steps):.0f} at most, " in text
    assert f"{sum(x <= 25 for x in steps)} of them within 25, and {sum(row['target'] for row in figures)} with" in text


def test_what_noise_does_is_the_benchmarks():
    networks = json.loads((ROOT / "examples/benchmarks/results/noise_cpu.json").read_text())["networks"]
    gpt, cnn = networks["gpt"]["summary"], networks["cnn"]["summary"]
    text = " ".join(README.split())
    batch, auto = ([of[arm]["median_error"] for of in (gpt, cnn)] for arm in ("batch", "auto"))
    costs, room = ([of["auto"][key] for of in (gpt, cnn)] for key in ("cost", "error_with_room"))
    assert (
        f'off by {batch[0]:.2f} on the GPT and {batch[1]:.2f} on the CNN, that of "auto" by {auto[0]:.2f} and '
        f"{auto[1]:.2f}, at {costs[0]:.1f} and {costs[1]:.1f} times the cost; by {room[0]:.2f} and {room[1]:.2f} where "
        "the run went on"
    ) in text
    covered = [networks[name]["coverage"] for name in ("gpt", "cnn")]
    assert f"in {100 * covered[0]:.0f} % of the GPT's fits and {100 * covered[1]:.0f} % of the CNN's." in text


COSTS = ("exact", "curvlinops", "ggn", "sketch", "auto")
NETS = """
import torch
from lightning_spectral.demo.networks import CharacterGPT, DigitsResNet

def resnet():
    return DigitsResNet(8)

class LitGPT(CharacterGPT):
    def __init__(self, vocabulary):
        super().__init__(vocabulary, 8, 16, 2, 1)
        self.save_hyperparameters()
"""
DATA = """
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

def loader():
    return DataLoader(TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 10), 64)

class DataModule(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.arange(512).view(64, 8) % 11, 64)
"""


@pytest.mark.filterwarnings("ignore:.*")
def test_commands_that_measure_run(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "data.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    nets = importlib.import_module("nets")
    torch.save(nets.resnet().state_dict(), "last.pt")
    gpt = nets.LitGPT(11)
    for step in (1000, 2000):
        saved = {"state_dict": gpt.state_dict(), "hyper_parameters": dict(gpt.hparams), "global_step": step, "epoch": 0}
        torch.save(saved, "last.ckpt")
        measuring = [line for fence in fences("bash") for line in fence.splitlines() if " measure " in line]
        assert len(measuring) == 3
        for line in measuring:
            assert main(shlex.split(line.replace("step-1000", f"step-{step}"))[1:]) == 0
    planning = [line for fence in fences("bash") for line in fence.splitlines() if " plan " in line]
    assert len(planning) == 2
    for line in planning:
        assert main(shlex.split(line.replace("512x1024", "64x8"))[1:]) == 0
    assert json.loads(Path("plan.json").read_text())["method"] == "sketch"
    (reporting,) = [line for fence in fences("bash") for line in fence.splitlines() if "report step-" in line]
    assert main(shlex.split(reporting, comments=True)[1:]) == 0
    assert SpectralReport.from_json("step-2000/spectra.json").step == 2000
    for name in ("nets", "data"):
        sys.modules.pop(name)


def test_every_anchor_exists_and_the_contents_name_every_part():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    headings = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in re.findall("^#+ (.+)", prose, re.M)]
    assert len(headings) == len(set(headings))
    anchors = re.findall(r"\]\(#([^)]+)\)", README)
    assert not set(anchors) - set(headings)
    contents = README.partition(f"\n## {re.findall('^## (.+)', prose, re.M)[0]}")[0]
    assert set(re.findall(r"\]\(#([^)]+)\)", contents)) == set(headings[1:])


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for block in fences("bash") for line in block.splitlines() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


def test_every_figure_is_named_and_those_shown_are_there_and_small():
    for name in figures.__all__:
        assert f"`{name}`" in README, name
    shown = re.findall(r"!\[[^]]+\]\((.*?)\)", README)
    assert len(shown) == 3
    assert all((ROOT / path).stat().st_size < 80_000 for path in shown)


def test_what_the_demo_prints_has_the_captions_of_the_tables():
    (shown,) = [fence for fence in fences("text") if "ReLU ResNet on digits" in fence]
    assert shown.count(f"\n{CAPTION}\n") == 2


def test_options_of_logging_are_named():
    parameters = set(inspect.signature(SpectralProbe).parameters)
    options = {
        "log_layers",
        "log_quantities",
        "wandb_charts",
        "log_tables",
        "log_figures_every",
        "print_every",
        "print_end",
    }
    assert options <= parameters
    assert all(f"`{option}`" in README for option in options)
    assert all(f"`plot_{name}" in README for name in FIGURES if name != "rank_models")
    assert f"for up to\n{LOGGED_LAYERS} layers" in README


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ("ResNet-50, 54 layers", ["conv"] * 53 + ["head"]),
        ("GPT of 12 blocks, 49 layers", [*["attention_qkv", "attention_out", "mlp_up", "mlp_down"] * 12, "head"]),
    ],
)
def test_numbers_of_keys_and_charts(row, kinds):
    measured = report(*(layer(f"{i}.weight", kind=kind) for i, kind in enumerate(kinds)))
    selection = LogSelection("auto", "auto", {STEP_CURVATURE.part}, lambda text: None)
    shares = [layer_key(STEP_CURVATURE.name, name) for name in selection.step_layers(list(measured.layers))]
    keys = [*selection.scalars(measured), *PROBE_KEYS, *STEP_KEYS, *shares]
    shown = charts(keys, 40)
    (written,) = re.findall(rf"\| {row}[^|]*\| {len(keys)} \| {len(shown)}: (.*) \|", README)
    medians = {key for key in shown if "_median" in key or "/median_" in key}
    layers, counts = sum(key.startswith("alpha/") for key in {*shown} - medians), sum(key in HEALTH for key in shown)
    curves = len(medians - {*HEALTH})
    parts = [
        f"{curves} curves",
        "the step's scale",
        f"{counts} counts",
        *([f"alpha of {layers} layers"] * bool(layers)),
    ]
    assert written == ", ".join(parts)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(KEYS.sub(lambda _: table_of_keys(), README), encoding="utf-8")
