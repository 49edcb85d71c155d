"""Snippets of the manual and of the README run, page by page, and their commands exist."""

import importlib
import json
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import wandb
import yaml
from manual import MANUAL, PAGES, README, ROOT, commands, fences
from modules import ConvNet
from torch.utils.data import DataLoader

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralReport
from lightning_spectral.cli.commands import main
from lightning_spectral.report.terminal.tables import CAPTION


def run(text, scope):
    """Run a page's snippets one after the other, with two steps of training, and return the names they leave."""
    for i, snippet in enumerate(fences("python", text)):
        exec(compile(re.sub(r"max_steps=\d+", "max_steps=2", snippet), "snippet", "exec"), scope)
        if i == 0 and "trainer.fit" in snippet:
            scope["trained"] = scope["probe"]
        # Recipes make other probes, and what comes after them shows the history of the one that ran.
        if "trained" in scope:
            scope["probe"] = scope["trained"]
    # W&B would go on with this run in another test.
    wandb.finish()
    return scope


def given():
    return {"model": ConvNet(), "train_loader": DataLoader(ConvNet.data(), 48)}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Names that the page "Get started" leaves, which other pages use."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(tmp_path_factory.mktemp("started"))
        scope = run(PAGES["start.md"], given())
        scope["saved"] = SpectralReport.from_json(Path("spectra.json"))
        return scope


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_getting_started_trains_measures_and_saves(started):
    assert isinstance(started["trainer"], pl.Trainer)
    # Before the first step, and of the final weights.
    assert started["trained"].probes == 2
    assert started["saved"].n_samples == 512


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("page", sorted(name for name in PAGES if name != "start.md" and "```python" in PAGES[name]))
def test_snippets_of_a_page_run_after_those_of_getting_started(page, started, capsys):
    scope = run(PAGES[page], dict(started))
    printed = capsys.readouterr().out
    if page == "quantities.md":
        alphas = [layer.alpha for layer in scope["report"].layers.values()]
        assert scope["metrics"]["alpha"].points == sum(alpha.n_used for alpha in alphas) > 0
    elif page == "report.md":
        assert {"power_law.pdf", "alpha.pdf", "two_panels.pdf"} <= {path.name for path in Path().iterdir()}
    elif page == "optimizer.md":
        assert scope["optimizer"].alpha_of(scope["net"][0].weight) <= 2.0
        assert "[('dense', 0.003), ('adamw', 0.003)]" in printed


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_snippets_of_the_readme_run_by_themselves(capsys):
    scope = run(README, given())
    assert "alpha" in capsys.readouterr().out
    assert scope["trained"].probes >= 1


@pytest.mark.filterwarnings("ignore:.*look like embeddings or heads:lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize(
    ("text", "probes", "optimizers"), [(MANUAL, 2, 2), (README, None, None)], ids=["manual", "README"]
)
def test_yaml_snippets_build_probes_and_optimizers(text, probes, optimizers):
    configs = [yaml.safe_load(snippet) for snippet in fences("yaml", text)]
    callbacks = [x for config in configs for x in config.get("trainer", {}).get("callbacks", [])]
    assert {callback["class_path"] for callback in callbacks} <= {"lightning_spectral.SpectralProbe"}
    made = [SpectralProbe(**callback["init_args"]) for callback in callbacks]
    steps = [config["optimizer"] for config in configs if "optimizer" in config]
    assert {optimizer["class_path"] for optimizer in steps} <= {"lightning_spectral.SpectralNewton"}
    built = [SpectralNewton(ConvNet().parameters(), **optimizer["init_args"]) for optimizer in steps]
    if probes is not None:
        assert (len(made), len(built)) == (probes, optimizers)
        assert {(probe.budget.max_overhead, probe.every_n_steps) for probe in made} == {(0.03, None), (0.05, 50)}
        assert [[group["lr"] for group in optimizer.param_groups] for optimizer in built] == [[1e-3, 1e-3]] * 2
        assert {optimizer.takes_alpha for optimizer in built} == {False, True}


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
def test_commands_that_measure_plan_and_report_run(folder, monkeypatch):
    (folder / "nets.py").write_text(NETS)
    (folder / "data.py").write_text(DATA)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    nets = importlib.import_module("nets")
    torch.save(nets.resnet().state_dict(), "last.pt")
    gpt = nets.LitGPT(11)
    text = MANUAL + README
    for step in (1000, 2000):
        saved = {"state_dict": gpt.state_dict(), "hyper_parameters": dict(gpt.hparams), "global_step": step, "epoch": 0}
        torch.save(saved, "last.ckpt")
        measuring = dict.fromkeys(commands("lightning-spectral measure ", text))
        assert len(measuring) >= 3
        for line in measuring:
            arguments = shlex.split(line.replace("step-1000", f"step-{step}"), comments=True)
            assert main([*arguments[1:], "--no-page"]) == 0
    planning = dict.fromkeys(commands("lightning-spectral plan ", text))
    assert len(planning) >= 2
    for line in planning:
        assert main(shlex.split(line.replace("512x1024", "64x8"), comments=True)[1:]) == 0
    assert json.loads(Path("plan.json").read_text())["method"] == "sketch"
    for line in commands("report step-", text):
        assert main(shlex.split(line, comments=True)[1:]) == 0
    assert SpectralReport.from_json("step-2000/spectra.json").step == 2000
    for name in ("nets", "data"):
        sys.modules.pop(name)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", MANUAL + README, re.MULTILINE))
    assert {"ablation", "demo", "paper"} <= named <= targets


def test_what_the_demo_prints_has_the_captions_of_the_tables():
    (shown,) = [fence for fence in fences("text", MANUAL) if "ReLU ResNet on digits" in fence]
    assert shown.count(f"\n{CAPTION}\n") == 2
