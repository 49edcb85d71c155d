"""The README's snippets run, its table of keys is the code's, and its commands exist."""

import inspect
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import wandb
import yaml
from modules import ConvNet
from reports import layer, report
from torch.utils.data import DataLoader

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralReport
from lightning_spectral.callbacks.alphas import ALPHA_KEY
from lightning_spectral.callbacks.logged import LOGGED_LAYERS, PROBE_KEYS, Logged, charts
from lightning_spectral.callbacks.outputs import FIGURES
from lightning_spectral.record import REPORT_KEYS
from lightning_spectral.report import figures
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
    assert len(snippets) == 7
    for snippet in snippets:
        exec(compile(snippet.replace("max_steps=300", "max_steps=2"), "README.md", "exec"), scope)
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
    assert scope["probe"].probes == 1
    assert scope["optimizer"].alpha_of(scope["net"][0].weight) <= 2.0
    assert "[('dense', 0.003), ('adamw', 0.003)]" in printed


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
    for key in (*REPORT_KEYS, *PROBE_KEYS):
        assert f"`spectral/{key}`" in README, key


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for block in fences("bash") for line in block.splitlines() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


def test_every_figure_is_named_and_those_shown_are_there_and_small():
    for name in figures.__all__:
        assert f"`{name}`" in README, name
    shown = re.findall(r"!\[[^]]+\]\((.*?)\)", README)
    assert len(shown) == 2
    assert all((ROOT / path).stat().st_size < 80_000 for path in shown)


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
    keys = list(Logged("auto", "auto", (), lambda text: None).scalars(measured) | dict.fromkeys(PROBE_KEYS, 0.0))
    assert re.search(rf"\| {row}[^|]*\| {len(keys)} \| {len(charts(keys, 40))}:", README)
