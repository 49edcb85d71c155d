"""The README's snippets run, its table of keys is the code's, and its commands exist."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import yaml
from modules import ConvNet
from torch.utils.data import DataLoader

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralReport
from lightning_spectral.callbacks.probe import PROBE_KEYS
from lightning_spectral.record import REPORT_KEYS
from lightning_spectral.spectrum import LAYER_KEYS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fences(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_python_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {"model": ConvNet(), "train_loader": DataLoader(ConvNet.data(), 48)}
    snippets = fences("python")
    assert len(snippets) == 4
    for snippet in snippets:
        exec(compile(snippet.replace("max_steps=300", "max_steps=2"), "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "alpha" in printed
    assert "PowerLawFit(exponent=" in printed
    assert SpectralReport.from_json(Path("spectra.json")).n_samples == 512
    assert isinstance(scope["trainer"], pl.Trainer)
    assert scope["probe"].probes == 1
    assert "[('dense', 0.003), ('adamw', 0.003)]" in printed


def test_yaml_snippets_build_a_probe_and_an_optimizer():
    probe, optimizer = (yaml.safe_load(snippet) for snippet in fences("yaml"))
    (callback,) = probe["trainer"]["callbacks"]
    assert callback["class_path"] == "lightning_spectral.SpectralProbe"
    assert SpectralProbe(**callback["init_args"]).budget.max_overhead == 0.03
    assert optimizer["optimizer"]["class_path"] == "lightning_spectral.SpectralNewton"
    made = SpectralNewton(ConvNet().parameters(), **optimizer["optimizer"]["init_args"])
    assert [group["lr"] for group in made.param_groups] == [1e-3, 1e-3]


def test_every_logged_key_is_documented():
    for key in LAYER_KEYS:
        assert f"`{key.name}`" in README, key.name
    for key in (*REPORT_KEYS, *PROBE_KEYS):
        assert f"`spectral/{key}`" in README, key


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for block in fences("bash") for line in block.splitlines() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets
