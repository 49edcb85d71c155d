"""`lightning-spectral measure`: what it names, what it loads, what it writes, and one line for whatever is wrong."""

import json
import subprocess
import sys

import pytest
import torch

from lightning_spectral import SpectralReport, measure_spectra
from lightning_spectral.cli.arguments import LOSS_EXAMPLES
from lightning_spectral.cli.checkpoints import Checkpoint, build_model
from lightning_spectral.cli.commands import MEASURE_EPILOG, main
from lightning_spectral.cli.import_paths import SourceError, batch_reader, import_object, named_loss
from lightning_spectral.functional import FUNCTIONAL_LOSSES, TARGETS, functional_loss
from lightning_spectral.plan.planner import FEWER_SAMPLES

NETS = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def small(width=6):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 4))

wide = small(9)

def deep():
    layers = [part for _ in range(4) for part in (nn.Linear(5, 5), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(5, 4))

number = 3

def broken():
    raise RuntimeError("no such luck\\nsecond line")

class Lit(pl.LightningModule):
    def __init__(self, width, rate=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = small(width)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        return loader()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)

class Late(Lit):
    def __init__(self):
        super().__init__(4)
        del self.net

    def configure_model(self):
        self.net = small(7)

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"].pop("counter", None)

class Whole(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.save_hyperparameters(options)
        self.net = small(options["width"])

class Any(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs = kwargs

def data():
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(96, 5, generator=draw), torch.randint(4, (96,), generator=draw))

def loader():
    return DataLoader(data(), 48)

class Module(pl.LightningDataModule):
    def setup(self, stage):
        self.data = data()

    def train_dataloader(self):
        return DataLoader(self.data, 48)

pair = data()[:48]
triple = (*pair, 0)

def batches():
    for i in range(2):
        yield data()[48 * i:48 * (i + 1)]

def summed(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")
"""
BASE = ["measure", "--model=nets_here:small", "--data=nets_here:loader", "--no-page"]


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The module above, importable as `nets_here` in an empty folder."""
    (tmp_path / "nets_here.py").write_text(NETS)
    (tmp_path / "needy.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "crooked.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("nets_here", "needy", "crooked"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield import_object("nets_here:small", "--model").__globals__
    sys.modules.pop("nets_here", None)


def trained(nets, name="Lit", *arguments):
    """A module's checkpoint as a Trainer writes it."""
    import pytorch_lightning as pl

    module = nets[name](*arguments)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module)
    trainer.save_checkpoint("last.ckpt")
    return module


def test_it_prints_the_table_and_writes_json_and_the_page(nets, capsys):
    torch.save(nets["small"]().state_dict(), "w.pt")
    arguments = ["--loss=cross_entropy", "--checkpoint=w.pt", "--top-k=4", "--output=new/folder"]
    assert main([*BASE[:3], *arguments]) == 0
    printed = capsys.readouterr()
    assert "w.pt: loss" in printed.out
    assert printed.out.split()[-2:] == ["new/folder/spectra.json", "new/folder/spectra.html"]
    assert not printed.err
    report = SpectralReport.from_json("new/folder/spectra.json")
    model = nets["small"]()
    model.load_state_dict(torch.load("w.pt"))
    expected = measure_spectra(model, nets["loader"](), functional_loss("cross_entropy"), top_k=4)
    for name, layer in report.layers.items():
        torch.testing.assert_close(layer.h, expected.layers[name].h, equal_nan=True)
    with open("new/folder/spectra.html") as file:
        assert "<title>w.pt</title>" in file.read()


@pytest.mark.filterwarnings("ignore:.*")
def test_a_lightning_checkpoint_brings_its_hyper_parameters_its_loss_and_its_step(nets, capsys):
    module = trained(nets, "Lit", 9)
    assert (
        main(["measure", "--model=nets_here.Lit", "--data=nets_here:Module", "--no-page", "--checkpoint=last.ckpt"])
        == 0
    )
    report = SpectralReport.from_json("spectra/spectra.json")
    assert (report.step, report.epoch) == (2, 1)
    assert report.layers["net.0.weight"].shape == (9, 5)
    expected = measure_spectra(module, nets["loader"]())
    assert report.loss == pytest.approx(expected.loss)
    assert "last.ckpt: step 2, loss" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*")
def test_modules_of_configure_model_and_hooks_of_loading(nets):
    trained(nets, "Late")
    data = torch.load("last.ckpt", weights_only=True)
    data["state_dict"]["counter"] = torch.zeros(())
    torch.save(data, "last.ckpt")
    saved = Checkpoint.read("last.ckpt")
    model = build_model("nets_here.Late", saved)
    assert saved.load_into(model) == ""
    assert model.net[0].weight.equal(saved.state["net.0.weight"])


def test_every_option_reaches_the_measurement(nets):
    options = ["--loss=nets_here:summed", "--layers", "0.*", "--top-k=3", "--curvature=exact", "--n-batches=2"]
    options += [
        "--max-samples=40",
        "--micro-batch-size=20",
        "--alignment",
        "--spectrum-top-k=5",
        "--curvature-fraction=3",
    ]
    options += ["--weight-spectra", "--bootstrap=10", "--mode=train", "--precision=float64", "--device=cpu"]
    options += ["--kinds", "0=mlp_up", "2.*=head"]
    assert main([*BASE, *options]) == 0
    report = SpectralReport.from_json("spectra/spectra.json")
    assert (report.n_samples, report.n_batches, report.micro_batch_size) == (80, 2, 20)
    assert (report.curvature, report.mode, report.precision) == ("exact", "train", "float64")
    ((name, layer),) = report.layers.items()
    assert (name, layer.kind) == ("0.weight", "mlp_up")
    assert (len(layer.sigma), len(layer.spectrum)) == (3, 5)
    assert layer.parts == {"weights", "intervals", "fraction", "alignment"}


@pytest.mark.parametrize(
    ("option", "rows"),
    [(["--fused-qkv", "0"], [2, 2, 2]), (["--fused-qkv", "2=2,1,1", "0.*=1,2,3"], [1, 2, 3])],
)
def test_fused_projections_are_split_into_equal_rows_or_those_given(nets, option, rows):
    assert main([*BASE, "--loss=cross_entropy", "--layers", "*", *option]) == 0
    layers = SpectralReport.from_json("spectra/spectra.json").layers
    assert [layers[f"0.weight.{part}"].shape for part in "qkv"] == [(n, 5) for n in rows]
    assert {layers[f"0.weight.{part}"].kind for part in "qkv"} == {"attention_qkv"}


def test_a_seed_gives_the_same_measurement(nets):
    found = []
    for seed in (1, 1, 2):
        assert main([*BASE, "--loss=cross_entropy", f"--seed={seed}"]) == 0
        found.append(SpectralReport.from_json("spectra/spectra.json").loss)
    assert found[0] == found[1] != found[2]


def test_targets_in_the_help_are_those_of_the_code():
    assert f"targets under {', '.join(TARGETS[:-1])} or {TARGETS[-1]}." in MEASURE_EPILOG


def test_losses_in_the_help_are_those_of_the_code():
    assert set(LOSS_EXAMPLES.split(", ")) <= set(FUNCTIONAL_LOSSES)


@pytest.mark.parametrize("name", ["loader", "Module", "batches", "pair", "data_loader"])
def test_data_of_every_kind(nets, name):
    sys.modules["nets_here"].data_loader = nets["loader"]()
    first = batch_reader(f"nets_here:{name}", 1, nets["small"]())(None)[0]
    assert all(a.equal(b) for a, b in zip(first, nets["data"]()[:48], strict=True))


def test_models_of_every_kind(nets):
    torch.save({"state_dict": nets["small"](8).state_dict(), "hyper_parameters": {"width": 8, "_of_cli": 1}}, "a.ckpt")
    saved = Checkpoint.read("a.ckpt")
    assert build_model("nets_here:wide", saved) is nets["wide"]
    assert build_model("nets_here:small", saved)[0].out_features == 6
    assert build_model("nets_here:Lit", saved).net[0].out_features == 8
    assert build_model("nets_here:Any", saved).kwargs == {"width": 8}
    assert build_model("nets_here:Any").kwargs == {}
    whole = {"state_dict": saved.state, "hyper_parameters": {"width": 8}, "hparams_name": "options"}
    torch.save(whole, "b.ckpt")
    assert build_model("nets_here:Whole", Checkpoint.read("b.ckpt")).net[0].out_features == 8


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", None])
def test_states_are_found_where_they_are_kept(nets, key):
    state = nets["small"]().state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, "w.pt")
    model = nets["small"]()
    saved = Checkpoint.read("w.pt")
    assert saved.load_into(model) == ""
    assert model[0].weight.equal(state["0.weight"])
    assert saved.position == {}


def test_prefixes_and_what_is_in_both(nets, capsys):
    state = nets["small"]().state_dict()
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()} | {"extra": torch.zeros(2)}}, "w.pt")
    saved = Checkpoint.read("w.pt")
    with pytest.raises(
        SourceError, match=r"it lacks 0.weight, .*, and the model lacks .*; with --prefix model. all of"
    ):
        saved.load_into(nets["small"]())
    model = nets["small"]()
    assert saved.load_into(model, prefix="model.") == ""
    assert model[0].weight.equal(state["0.weight"])
    with pytest.raises(SourceError, match=r"--prefix net.: no name in w.pt begins so; it has model.0.weight"):
        saved.load_into(model, prefix="net.")
    torch.save({k: v for k, v in state.items() if k != "2.bias"} | {"extra": torch.zeros(2)}, "w.pt")
    with pytest.raises(
        SourceError, match=r"it lacks 2.bias, and the model lacks extra; --no-strict loads what is in both"
    ):
        Checkpoint.read("w.pt").load_into(model)
    assert main([*BASE, "--loss=cross_entropy", "--checkpoint=w.pt", "--no-strict"]) == 0
    assert (
        capsys.readouterr().err == "lightning-spectral measure: of w.pt, it lacks 2.bias, and the model lacks extra\n"
    )


def test_weights_of_another_network_are_refused(nets):
    torch.save(nets["small"](9).state_dict(), "w.pt")
    with pytest.raises(
        SourceError, match=r"mismatch for 0.weight: .*\[9, 5\].* from checkpoint, .* model is .*\[6, 5\].*same size"
    ):
        Checkpoint.read("w.pt").load_into(nets["small"](), strict=False)
    with pytest.raises(SourceError, match=r"its names are those of the model's net: give that module as --model"):
        Checkpoint.read("w.pt").load_into(nets["Lit"](9))
    torch.save({"other": torch.zeros(2)}, "w.pt")
    with pytest.raises(SourceError, match="no name is in both"):
        Checkpoint.read("w.pt").load_into(nets["small"](), strict=False)


def test_what_loads_weights_in_a_way_of_its_own_does_so(nets, monkeypatch):
    class Own(torch.nn.Linear):
        def load_state_dict(self, state, strict=True):
            super().load_state_dict(state)

    model, weights = Own(2, 2), torch.nn.Linear(2, 2).state_dict()
    torch.save(weights, "w.pt")
    assert Checkpoint.read("w.pt").load_into(model) == ""
    assert model.weight.equal(weights["weight"])

    def refuse(self, *args, **options):
        raise RuntimeError("weights of version 1; convert them")

    monkeypatch.setattr(Own, "load_state_dict", refuse)
    with pytest.raises(SourceError, match=r"--checkpoint w.pt: weights of version 1; convert them"):
        Checkpoint.read("w.pt").load_into(model)


def test_a_file_whose_name_is_no_word_of_python_is_a_module_too(nets, tmp_path):
    (tmp_path / "1-nets.py").write_text(NETS)
    assert import_object("1-nets:small", "--model")(9)[0].out_features == 9


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (exec, ("open('ran', 'w').close()",))


def test_nothing_in_a_checkpoint_is_executed(nets, tmp_path):
    torch.save({"state_dict": nets["small"]().state_dict(), "hyper_parameters": Code()}, "bad.ckpt")
    with pytest.raises(SourceError, match=r"weights_only=True \(it holds \S*exec, which is code\); .* does$"):
        Checkpoint.read("bad.ckpt")
    assert not (tmp_path / "ran").exists()


WRONG = {
    "no module": (
        ["--model=nowhere:net"],
        "--model must be an import path such as pkg.module:name, of what is installed or in ",
    ),
    "no submodule": (["--model=torch.nowhere:net"], "(ModuleNotFoundError: No module named 'torch.nowhere')"),
    "no name": (["--model=nets_here:smal"], "'nets_here:smal' (AttributeError: module 'nets_here' has no attribute"),
    "no path": (["--model=small"], "import path such as pkg.module:name, of what is installed or in "),
    "a module alone": (["--model=nets_here"], "import path such as pkg.module:name, of what is installed or in "),
    "no name in it": (["--data=nets_here:"], "--data must be an import path such as pkg.module:name"),
    "needs more": (["--model=needy:net"], "got 'needy:net' (ModuleNotFoundError: No module named 'a_package"),
    "fails": (["--model=crooked:net"], "got 'crooked:net' (ZeroDivisionError: division by zero)"),
    "no model": (["--model=nets_here:number"], "--model nets_here:number is a int, and no module"),
    "no module made": (["--model=nets_here:data"], "gave a TensorDataset, and should give a torch.nn.Module"),
    "cannot be made": (
        ["--model=nets_here:broken"],
        "calling it with no arguments failed (RuntimeError: no such luck)",
    ),
    "lacks arguments": (["--model=nets_here:Lit"], "calling it with no arguments failed (TypeError: "),
    "no checkpoint": (["--checkpoint=none.ckpt"], "--checkpoint none.ckpt: no such file\n"),
    "a folder": (["--checkpoint=."], "--checkpoint .: no such file; of a sharded checkpoint, make one file first"),
    "no bytes of torch": (["--checkpoint=needy.py"], "weights_only=True (its bytes are not those of a checkpoint)"),
    "a list": (["--checkpoint=list.pt"], "--checkpoint list.pt: a list, and no state dict or checkpoint"),
    "no weights": (["--checkpoint=empty.pt"], "no weights under state_dict, model_state_dict, model; it has epoch"),
    "other names": (["--checkpoint=other.pt"], "it lacks 0.weight, 0.bias, 2.weight, 2.bias, and the model lacks a"),
    "no data": (["--data=nets_here:number"], "--data nets_here:number gave a int, and should give a DataLoader"),
    "a data set": (["--data=nets_here:data"], "is a data set; wrap it in a DataLoader"),
    "broken data": (["--data=nets_here:broken"], "reading it failed (RuntimeError: no such luck)"),
    "too few batches": (["--n-batches=9"], "--n-batches: 9 batches were asked for, and the DataLoader has 2"),
    "too few of others": (["--data=nets_here:pair", "--n-batches=2"], "2 batches were asked for, and there are 1"),
    "no number of batches": (["--n-batches=0"], "--n-batches must be a whole number of at least 1, got 0"),
    "no loss": (["--loss=ctc_loss"], "--loss ctc_loss: must be pkg.module:function or one of cross_entropy, "),
    "a loss that is none": (["--loss=nets_here:number"], "is a int, and should be a function of (model, batch)"),
    "another loss": (["--loss=mse_loss"], "mse_loss needs an output of the targets' shape, got (48, 4) and (48,)"),
    "layers": (["--layers", "conv*"], "--layers: 'conv*' matches no layer; the layers are 0.weight, 2.weight"),
    "a kind that is none": (["--kinds", "0=conf"], "--kinds: 'conf' (for '0') is no kind of layer; take one of conv, "),
    "no kind": (["--kinds", "conv"], "--kinds takes GLOB=KIND, such as '*.c_proj=attention_out', got 'conv'"),
    "rows in words": (["--fused-qkv", "0=2,x,2"], "--fused-qkv takes GLOB or GLOB=ROWS,ROWS,ROWS, got '0=2,x,2'"),
    "other rows": (["--fused-qkv", "0=2,2,3"], "of [2, 2, 3] rows; give --fused-qkv 'GLOB=ROWS,ROWS,ROWS'\n"),
    "an option": (["--top-k=2"], "--top-k must be a whole number of at least 3, the points that a fit needs, got 2"),
    "device": (["--device=abacus"], "--device abacus: no device that torch knows, such as cpu, cuda or cuda:0\n"),
    "no such device": (["--device=cuda:99"], "--device cuda:99: "),
    "output": (["--output=needy.py"], "--output needy.py: there is a file in its place; give a folder\n"),
    "output below": (["--output=needy.py/x"], "--output needy.py/x: there is a file in its place; give a folder\n"),
    "three tensors": (["--data=nets_here:triple"], "of 3; give --loss pkg.module:function of (model, batch)\n"),
    "a loss of its own": (["--loss=nets_here:broken"], "TypeError: broken() takes 0 positional arguments"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(nets, capsys, case):
    torch.save([1], "list.pt")
    torch.save({"epoch": 1}, "empty.pt")
    torch.save({"a": torch.zeros(2)}, "other.pt")
    arguments, says = WRONG[case]
    assert main([*BASE, "--loss=cross_entropy", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("lightning-spectral measure: ")
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["measure", "--modell=x"], "measure: error: the following arguments are required: --model, --data; see lig"),
        ([*BASE, "--topk=3"], "measure: error: unrecognized arguments: --topk=3; see lightning-spectral measure --he"),
        (["demo", "here"], "demo: error: unrecognized arguments: here; see lightning-spectral demo --help\n"),
        ([*BASE, "--top-k=x"], "measure: error: argument --top-k: invalid int value: 'x'; see"),
        (["mesure"], ": error: argument command: invalid choice: 'mesure'"),
    ],
)
def test_arguments_that_are_wrong_are_told_in_one_line(capsys, arguments, says):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("lightning-spectral")
    assert says in told
    assert told.count("\n") == 1


def test_the_choice_of_exact_for_want_of_samples_is_printed(nets, capsys):
    assert main([*BASE, "--model=nets_here:deep", "--loss=cross_entropy", "--max-samples=3"]) == 0
    why = "and 3 samples are too few for a sketch\n"
    assert why in capsys.readouterr().out
    assert main([*BASE, "--model=nets_here:deep", "--loss=cross_entropy"]) == 0
    assert "\ncurvature by sketch: " in capsys.readouterr().out


def test_a_module_without_a_loss_says_what_to_give(nets, capsys):
    assert main(BASE) == 2
    assert (
        "has no training_step, so its loss is not known; pass --loss, cross_entropy or pkg.module:function"
        in capsys.readouterr().err
    )
    assert named_loss(None) is None


def test_files_that_cannot_be_written(nets, capsys, tmp_path):
    (tmp_path / "spectra" / "spectra.json").mkdir(parents=True)
    assert main([*BASE, "--loss=cross_entropy"]) == 2
    assert "--output spectra: Is a directory" in capsys.readouterr().err


def test_without_plotly_there_is_all_but_the_page_and_a_note_how_to_get_it(nets, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main([*(option for option in BASE if option != "--no-page"), "--loss=cross_entropy"]) == 0
    printed = capsys.readouterr()
    assert "alpha ± se" in printed.out
    assert printed.out.endswith("spectra/spectra.json\n")
    assert printed.err.endswith(
        'lightning-spectral measure: no page: the page\'s plots need plotly: pip install "lightning-spectral[report]"; '
        "then lightning-spectral report spectra/spectra.json\n"
    )
    assert [path.name for path in (tmp_path / "spectra").iterdir()] == ["spectra.json"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "spectra/spectra.json"]) == 0
    assert (tmp_path / "spectra" / "spectra.html").is_file()


def test_a_traceback_on_request(nets):
    with pytest.raises(SourceError, match="no such luck"):
        main([*BASE, "--model=nets_here:broken", "--traceback"])


def test_the_installed_command_says_one_line_and_finds_modules_where_it_is_run(nets, tmp_path):
    # Twice in one process, whose imports take most of the time.
    code = (
        "import sys; from lightning_spectral.cli import main; sys.argv[0] = 'lightning-spectral'\n"
        "try:\n    status = main([*sys.argv[1:], '--checkpoint=none.ckpt'])\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "print(f'ended with {status}', file=sys.stderr)\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-P", "-c", code, *BASE, "--loss=cross_entropy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, ended, _ = done.stderr.partition("ended with 2\n")
    assert ended
    assert first == "lightning-spectral measure: --checkpoint none.ckpt: no such file\n"
    assert json.loads((tmp_path / "spectra" / "spectra.json").read_text())["n_samples"] == 48


@pytest.mark.parametrize("command", ["", "demo", "measure", "report", "fit", "validate", "test", "predict"])
def test_every_help_says_what_the_command_does(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "120")
    # As `python -m lightning_spectral` has it.
    monkeypatch.setattr("sys.argv", ["lightning_spectral/__main__.py"])
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lightning-spectral")
    if command == "measure":
        assert f"A sketch of fewer than {FEWER_SAMPLES} takes more" in " ".join(printed.split())
    if command in ("", "demo", "measure", "report"):
        assert max(map(len, printed.splitlines())) <= 120
        # After the usage, what it does, in a sentence.
        assert printed.split("\n\n")[1].strip().endswith(".")
