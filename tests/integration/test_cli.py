"""`lightning-spectral fit` and users' own LightningCLIs, of both Lightning packages."""

import importlib
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from lightning_spectral import SpectralNewton, SpectralProbe, SwapOptimizer
from lightning_spectral.callbacks._lightning import PACKAGES, lightning_cli, package_of
from lightning_spectral.cli.commands import main
from lightning_spectral.cli.lightning import named_model, suggestion
from lightning_spectral.lightning_cli import NamedGroups, spectral_cli

pytestmark = pytest.mark.filterwarnings("ignore:.*")

MODULE = '''
import {package} as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

class Words(pl.LightningModule):
    """Tied to nothing: an embedding, two matrices, a head."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.words = nn.Embedding(11, width)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU())
        self.head = nn.Linear(width, 11)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.head(self.hidden(self.words(batch))), batch)
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        return DataLoader(torch.arange(40) % 11, 8)

class Empty(Words):
    """Has no data."""

    train_dataloader = pl.LightningModule.train_dataloader

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.arange(40) % 11, 8)

class Plain(Words):
    """Has an optimizer of its own."""

    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters())

class Lazy(Words):
    """Its matrices come with configure_model."""

    def __init__(self):
        super().__init__()
        del self.hidden

    def configure_model(self):
        self.hidden = nn.Linear(8, 8)

class Impatient(pl.Callback):
    """Refuse what it was given."""

    def __init__(self):
        raise ValueError("no patience")


class Tell(pl.Callback):
    """Print what the optimizer holds."""

    def on_train_end(self, trainer, pl_module):
        print([(group["name"], group.get("alpha")) for group in trainer.optimizers[0].param_groups])
'''

GROUPS = ["dense", "adamw"]
FLAT = ["spectral", "adamw"]


@pytest.fixture(params=PACKAGES)
def package(request, tmp_path, monkeypatch):
    """A Lightning package, with a module of it importable as `words`, in an empty folder."""
    (tmp_path / "words.py").write_text(MODULE.replace("{package}", request.param))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-spectral"])
    monkeypatch.delitem(sys.modules, "words", raising=False)
    yield request.param
    sys.modules.pop("words", None)


def words(package, *, steps=2):
    return [
        "fit",
        "--model=words.Words",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1",
    ]


def own_cli(package):
    return importlib.import_module(f"{package}.cli").LightningCLI


def quiet(cli, arguments):
    return cli(args=arguments, save_config_callback=None)


def names(cli):
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, SpectralNewton)
    return [group["name"] for group in optimizer.param_groups]


def test_our_cli_gives_named_groups_and_a_users_the_flat_list(package):
    arguments = [*words(package), "--optimizer=SpectralNewton", "--optimizer.alpha=1.5", "--optimizer.lr=0.01"]
    ours, users = quiet(spectral_cli(package), arguments), quiet(own_cli(package), arguments)
    assert names(ours) == GROUPS
    assert names(users) == FLAT
    for cli in (ours, users):
        assert cli.trainer.global_step == 2
        assert cli.trainer.optimizers[0].param_groups[0]["alpha"] == 1.5
    embedding = ours.model.words.weight
    assert any(embedding is parameter for parameter in ours.trainer.optimizers[0].param_groups[1]["params"])


def test_alpha_by_kind_of_layer_needs_named_groups(package):
    arguments = [*words(package), "--optimizer=lightning_spectral.SpectralNewton", "--optimizer.alpha=auto"]
    assert names(quiet(spectral_cli(package), arguments)) == GROUPS
    with pytest.raises(ValueError, match="alpha='auto' needs the kind of each layer"):
        quiet(own_cli(package), arguments)


def test_a_users_cli_gets_named_groups_from_the_mixin_and_keeps_its_own_configure_optimizers(package):
    class Cli(NamedGroups, own_cli(package)):
        @staticmethod
        def configure_optimizers(lightning_module, optimizer, lr_scheduler=None):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

    arguments = [*words(package, steps=5), "--optimizer=SpectralNewton", "--optimizer.lr=0.1", "--lr_scheduler=StepLR"]
    cli = quiet(Cli, [*arguments, "--lr_scheduler.step_size=2", "--lr_scheduler.gamma=0.5"])
    assert names(cli) == GROUPS
    assert [group["lr"] for group in cli.trainer.optimizers[0].param_groups] == pytest.approx([0.025, 0.025])


def test_other_optimizers_and_no_optimizer_are_lightnings_business(package):
    sgd = quiet(spectral_cli(package), [*words(package), "--optimizer=SGD", "--optimizer.lr=0.1"])
    assert type(sgd.trainer.optimizers[0]).__name__ == "SGD"
    assert len(sgd.trainer.optimizers[0].param_groups) == 1
    own = [*words(package), "--model=words.Plain"]
    for options in ({}, {"auto_configure_optimizers": False}):
        cli = spectral_cli(package)(args=own, save_config_callback=None, **options)
        assert type(cli.trainer.optimizers[0]).__name__ == "Adagrad"
        assert cli.auto_configure_optimizers is not bool(options)


def test_a_scheduler_acts_on_every_group(package):
    arguments = [
        *words(package, steps=10),
        "--optimizer=SpectralNewton",
        "--optimizer.lr=0.1",
        "--optimizer.adamw_lr=0.2",
    ]
    cli = quiet(spectral_cli(package), [*arguments, "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.1"])
    (config,) = cli.trainer.lr_scheduler_configs
    assert config.scheduler.optimizer is cli.trainer.optimizers[0]
    # Two epochs of five steps.
    assert [group["lr"] for group in cli.trainer.optimizers[0].param_groups] == pytest.approx([0.001, 0.002])


def test_a_scheduler_that_watches_a_metric(package):
    plateau = [f"--lr_scheduler={package}.cli.ReduceLROnPlateau", "--lr_scheduler.monitor=loss"]
    cli = quiet(spectral_cli(package), [*words(package), "--optimizer=SpectralNewton", *plateau])
    (config,) = cli.trainer.lr_scheduler_configs
    assert config.monitor == "loss"
    assert config.scheduler.optimizer is cli.trainer.optimizers[0]


def test_layers_made_by_configure_model_are_in_the_groups(package):
    arguments = [*words(package), "--model=words.Lazy", "--optimizer=SpectralNewton"]
    cli = quiet(spectral_cli(package), arguments)
    assert cli.trainer.optimizers[0].param_groups[0]["param_names"] == ["hidden.weight"]


def test_callbacks_by_class_path_and_by_short_name(package):
    config = {
        "model": {"class_path": "words.Words", "init_args": {"width": 4}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "trainer": {
            "max_steps": 2,
            "callbacks": [
                {
                    "class_path": "lightning_spectral.SpectralProbe",
                    "init_args": {"every_n_steps": 1, "max_samples": 8, "min_probes": 0},
                },
                {"class_path": "lightning_spectral.SwapOptimizer", "init_args": {"init_args": {"alpha": "auto"}}},
            ],
        },
    }
    with open("config.yaml", "w") as file:
        yaml.safe_dump(config, file)
    for cli in (spectral_cli(package), own_cli(package)):
        built = quiet(cli, [*words(package)[:1], "--config=config.yaml", *words(package)[2:]])
        probe, swap = built.trainer.callbacks[:2]
        assert isinstance(probe, SpectralProbe)
        assert probe.probes == 2
        assert isinstance(swap, SwapOptimizer)
        assert names(built) == GROUPS
    short = quiet(
        spectral_cli(package),
        [*words(package), "--trainer.callbacks+=SpectralProbe", "--trainer.callbacks.top_k=3", "--optimizer=SGD"],
    )
    assert short.trainer.callbacks[0].options.top_k == 3


def test_a_swap_over_the_command_lines_optimizer(package):
    swap = {"optimizer": "SGD", "init_args": {"lr": 0.1}, "at_step": 1}
    callback = json.dumps({"class_path": "SwapOptimizer", "init_args": swap})
    arguments = [*words(package), "--optimizer=SpectralNewton", f"--trainer.callbacks={callback}"]
    cli = quiet(spectral_cli(package), arguments)
    assert type(cli.trainer.optimizers[0]).__name__ == "SGD"
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def settings(cli):
    """What a command was given, without where it was read from."""

    def plain(value):
        return {k: plain(v) for k, v in value.items() if k[:2] != "__"} if isinstance(value, dict) else value

    return plain(cli.config["fit"].as_dict()) | {"config": None}


def test_a_printed_configuration_gives_the_same_run(package, capsys):
    arguments = [*words(package), "--optimizer=SpectralNewton", "--optimizer.alpha=1.5", "--lr_scheduler=StepLR"]
    arguments += ["--lr_scheduler.step_size=3", "--trainer.callbacks+=SpectralProbe", "--trainer.callbacks.top_k=3"]
    arguments += ["--seed_everything=3"]
    with pytest.raises(SystemExit) as stop:
        quiet(spectral_cli(package), [*arguments, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    with open("printed.yaml", "w") as file:
        file.write(printed)
    first, second = quiet(spectral_cli(package), arguments), quiet(spectral_cli(package), ["fit", "-c", "printed.yaml"])
    assert settings(first) == settings(second)
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert one.equal(other)
    with pytest.raises(SystemExit):
        quiet(spectral_cli(package), ["fit", "-c", "printed.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)


def test_the_saved_configuration_holds_the_optimizer(package, tmp_path):
    arguments = [a for a in words(package) if "logger" not in a]
    arguments += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--optimizer=SpectralNewton"]
    cli = spectral_cli(package)(args=arguments)
    saved = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "config.yaml").read_text())
    assert saved["optimizer"]["class_path"].endswith("SpectralNewton")
    assert cli.trainer.global_step == 2


def test_the_command_runs_the_package_that_the_model_is_of(package, capsys):
    arguments = [*words(package), "--optimizer=SpectralNewton", "--trainer.callbacks+=words.Tell"]
    assert main([*arguments, "--optimizer.alpha=1"]) == 0
    assert "[('dense', 1.0), ('adamw', None)]" in capsys.readouterr().out
    Path("config.yaml").unlink()
    with open("model.yaml", "w") as file:
        yaml.safe_dump({"model": {"class_path": "words.Words"}}, file)
    assert main(["fit", "--config", "model.yaml", *arguments[2:]]) == 0
    assert "[('dense', 2.0), ('adamw', None)]" in capsys.readouterr().out


@pytest.mark.parametrize("package", PACKAGES[1:], indirect=True)
def test_the_installed_command_finds_modules_where_it_is_run(package, tmp_path):
    code = "import sys; from lightning_spectral.cli import main; sys.argv[0] = 'lightning-spectral'; sys.exit(main())"
    arguments = [*words(package), "--optimizer=SpectralNewton", "--trainer.callbacks+=words.Tell"]
    # Without -c's entry for the current folder, as a console script.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[('dense', 2.0), ('adamw', None)]" in done.stdout
    assert "LightningCLI's args" not in done.stderr


def test_the_model_named_in_arguments(tmp_path):
    for name, content in {
        "path": {"model": "a.B"},
        "class": {"model": {"class_path": "c.D", "init_args": {}}},
        "none": {"trainer": {}},
        "odd": {"model": {"width": 3}},
        "list": [1],
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "broken.yaml").write_text("a: [")
    config = {name: str(tmp_path / f"{name}.yaml") for name in ("path", "class", "none", "odd", "list", "broken")}
    assert named_model(["fit", "--model", "x.Y", "-c", config["path"]]) == "x.Y"
    assert named_model(["fit", "--model.class_path=x.Y"]) == "x.Y"
    assert named_model(["fit", "-c", config["path"]]) == "a.B"
    assert named_model(["fit", "-c", config["path"], "--config", config["class"], "-c", config["none"]]) == "c.D"
    for useless in ("none", "odd", "list", "broken"):
        assert named_model(["fit", "-c", config[useless], "-c", "nowhere.yaml"]) is None


def test_a_class_of_neither_package_is_left_to_the_first():
    assert package_of(None) == PACKAGES[0]
    assert package_of(dict) == PACKAGES[0]
    assert [package_of(importlib.import_module(name).LightningModule) for name in PACKAGES] == list(PACKAGES)


def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch, capsys):
    (tmp_path / "needy.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-spectral"])
    for model, missing in {"needy.Model": "a_package_that_is_not_there", "nowhere.Model": "nowhere"}.items():
        assert main(["fit", "--model", model]) == 2
        assert capsys.readouterr().err == (
            "lightning-spectral fit: --model must be an import path such as pkg.module:name, of what is installed or "
            f"in {Path.cwd()}, got {model!r} (ModuleNotFoundError: No module named {missing!r})\n"
        )


@pytest.mark.parametrize("wrong", [["--config", "nowhere.yaml"], ["--model", "nowhere.yaml"], ["--colour", "red"]])
def test_what_lightning_cli_refuses_comes_with_a_short_usage(monkeypatch, capsys, wrong):
    monkeypatch.setattr("sys.argv", ["lightning-spectral"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", *wrong])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: lightning-spectral")
    assert wrong[1] in printed
    assert len(printed.splitlines()) < 16


LISTED = pytest.mark.skipif(
    Version(version("jsonargparse")) < Version("4.33"), reason="errors do not say what an optimizer may be"
)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        pytest.param("--optimizer=SpectralNewtn", "SpectralNewton", marks=LISTED),
        ("--optimizer=lightning_spectral.SpectralNewtn", "SpectralNewton"),
        pytest.param("--optimizer=AdmW", "AdamW", marks=LISTED),
        ("--lr_scheduler=CosineAnealingLR", "CosineAnnealingLR"),
        ("--trainer.callbacks=SpectralProb", "SpectralProbe"),
        ("--trainer.callbacks+=SwapOptimiser", "SwapOptimizer"),
        ("--data=words.Datta", "Data"),
        ("--optimizer=SpectralNewton --optimizer.alhpa=2", "alpha"),
    ],
)
def test_a_name_with_a_typo_is_answered_with_the_right_one(package, capsys, wrong, meant):
    with pytest.raises(SystemExit) as stop:
        main([*words(package), *wrong.split()])
    assert stop.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert re.match(rf"did you mean {meant}\b", last)


@pytest.mark.parametrize(
    "refusal",
    [
        "Option 'alhpa' is not accepted",
        "Key 'alhpa' is not expected",
        'key "optimizer.init_args": No action for key "alhpa" to check its value.',
    ],
)
def test_an_option_is_known_in_the_words_of_each_jsonargparse(refusal):
    message = f"Problem with given class_path 'lightning_spectral.SpectralNewton':\n  Validation failed: {refusal}"
    assert suggestion(message).startswith("\ndid you mean alpha")


def test_what_nothing_resembles_is_answered_with_nothing():
    assert suggestion("anything") == ""
    assert suggestion('Parser key "optimizer":\nErrors:\n  - Expected a dot import path string: Zzzz') == ""
    assert suggestion("Problem with given class_path 'nowhere.Thing'") == ""


def test_an_option_that_is_there_is_no_typo():
    refused = [
        "Problem with given class_path 'lightning_spectral.SpectralProbe':\n  Expected a <class 'int'>. Got value: abc",
        "Problem with given class_path 'pytorch_lightning.Callback':\n  Option 'max_samples' is not accepted",
    ]
    assert suggestion("\n".join(refused)) == ""


def test_a_command_without_data_or_optimizer_is_one_line(package, capsys):
    assert main([*words(package), "--model=words.Empty", "--optimizer=SGD"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == (
        "lightning-spectral fit: there is no data to fit on: name a LightningDataModule with --data, or give Empty a "
        "method train_dataloader"
    )
    assert main(words(package)) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.endswith("name one with --optimizer, or give Words a method configure_optimizers")
    main([*words(package), "--model=words.Empty", "--optimizer=SGD", "--data=words.Data"])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            "--trainer.callbacks+=SpectralProbe --trainer.callbacks.top_k=2",
            "top_k must be a whole number of at least 3, the points that a fit needs, got 2",
        ),
        (
            "--trainer.callbacks+=SwapOptimizer --trainer.callbacks.optimizer=torch.nn.Linear",
            "optimizer must be a class of optimizers, got 'torch.nn.Linear'",
        ),
        ("--optimizer=SpectralNewton --optimizer.alpha=-3", "alpha must be a finite number of at least 0, got -3.0"),
        (
            "--trainer.callbacks+=SpectralProbe --trainer.callbacks.layers+=nowhere.*",
            "layers: 'nowhere.*' matches no layer; the layers are words.weight, hidden.0.weight, hidden.2.weight, "
            "head.weight",
        ),
    ],
)
def test_what_this_package_refuses_is_one_line(package, capsys, wrong, says):
    assert main([*words(package), "--optimizer=SGD", *wrong.split()]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"lightning-spectral fit: {says}"


def test_what_others_refuse_is_theirs_to_say(package):
    with pytest.raises(ValueError, match="patience"):
        main([*words(package), "--optimizer=SGD", "--trainer.callbacks+=words.Impatient"])


def test_without_jsonargparse_the_command_names_the_extra(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_spectral.callbacks._lightning.find_spec",
        lambda name: None if name == "jsonargparse" else found(name),
    )
    assert main(["fit", "--help"]) == 2
    assert 'pip install "lightning-spectral[cli]"' in capsys.readouterr().err
    with pytest.raises(ImportError, match=r"lightning-spectral\[cli\]"):
        lightning_cli(PACKAGES[0])
