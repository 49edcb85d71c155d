"""What is trusted: no code out of files, no network, no shell, and names that are shown as they are."""

import ast
import csv
import io
import os
import pickle
import re
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from reports import layer, report
from rich.console import Console

import lightning_spectral
from lightning_spectral.cli.commands import main
from lightning_spectral.report import figures, print_report
from lightning_spectral.report.trackers import Row, tracker_of

PACKAGE = Path(lightning_spectral.__file__).parent
EXAMPLES = PACKAGE.parent / "examples"

# --- what the source may say

PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NETWORK = {"urllib", "http", "requests", "httpx", "aiohttp", "socket", "ssl", "ftplib", "smtplib", "xmlrpc"}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
YAML = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all"}
UNPACK = {"extractall", "unpack_archive"}


def offences(text):
    """What a module's source does that could run someone else's code or reach a network, one text each."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= _imported(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found |= _imported([node.module or ""])
            found |= {"torch.load by another name" for a in node.names if (node.module, a.name) == ("torch", "load")}
        elif isinstance(node, ast.Call):
            found |= _called(node)
    return found


def _imported(names):
    # urllib.parse takes texts apart, and reaches nothing.
    tops = {name.partition(".")[0] for name in names if name != "urllib.parse"}
    return {f"import {top}" for top in tops & (PICKLES | NETWORK | {"subprocess"})}


def _called(node):
    name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    found = {name} & (RUN_TEXT | SHELLS | YAML)
    found |= {"unpacks an archive"} if name.rpartition(".")[2] in UNPACK else set()
    found |= {"shell="} if given.get("shell", "False") != "False" else set()
    found |= {"allow_pickle="} if given.get("allow_pickle", "False") != "False" else set()
    found |= {"torch.load"} if name == "torch.load" and given.get("weights_only") != "True" else set()
    return found


KNOWN = {
    # Runs the benchmarks beside it, each in a process of its own.
    "examples/benchmarks/run.py": {"import subprocess"},
    # Downloads what it is asked for, checked, and reads CIFAR's pickles by an unpickler that calls nothing.
    "examples/paper/archives.py": {"import urllib", "import http", "import pickle"},
    # Reads the pickles that were published: it checks their digest first.
    "examples/cifar10.py": {"import urllib", "import pickle"},
    # Makes environments and trains in them, when it is asked to.
    "examples/clients/run.py": {"import subprocess"},
}


def test_no_source_runs_what_it_reads_or_reaches_a_network():
    files = [*PACKAGE.rglob("*.py"), *EXAMPLES.rglob("*.py")]
    found = {str(file.relative_to(PACKAGE.parent)): offences(file.read_text(encoding="utf-8")) for file in files}
    assert len(files) > 100
    assert {name: what for name, what in found.items() if what} == KNOWN


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("torch.load(f)", "torch.load"),
        ("torch.load(f, weights_only=False)", "torch.load"),
        ("torch.load(f, weights_only=maybe)", "torch.load"),
        ("from torch import load", "torch.load by another name"),
        ("import pickle as p", "import pickle"),
        ("from urllib.request import urlopen", "import urllib"),
        ("def f():\n    import socket", "import socket"),
        ("x = eval(text)", "eval"),
        ("os.system(text)", "os.system"),
        ("subprocess.run(text, shell=True)", "shell="),
        ("numpy.load(f, allow_pickle=True)", "allow_pickle="),
        ("yaml.load(f, Loader)", "yaml.load"),
        ("tar.extractall(f)", "unpacks an archive"),
    ],
)
def test_offences_are_seen(text, what):
    assert offences(text) == {what}
    assert offences("from urllib.parse import quote") == set()


def test_what_is_downloaded_is_checked():
    made = [
        node
        for file in EXAMPLES.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Archive"
    ]
    assert len(made) >= 4
    for call in made:
        _, url, digest = (ast.literal_eval(argument) for argument in call.args)
        assert url.startswith("https://")
        assert re.fullmatch(r"(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})", digest), url


# --- files


class Code:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return (exec, ("open('ran', 'w').close()",))


def crafted(path, form):
    """A checkpoint with weights, a probe's state and code in it."""
    state = {"callbacks": {"SpectralProbe{'prefix': 'spectral'}": {"last_report": Code()}}}
    content = {"state_dict": {"weight": torch.zeros(2, 2)}, **state}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


NETWORKS = "import torch\nnet = lambda: torch.nn.Linear(6, 6, bias=False)\ndata = lambda: torch.randn(64, 6)\n" + (
    "def loss(model, x):\n    return model(x).square().mean()\n"
)
BORING = "lightning.pytorch.demos.boring_classes.BoringModel"
MEASURE = ["measure", "--model=safe_nets:net", "--data=safe_nets:data", "--loss=safe_nets:loss"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("safe_nets.py").write_text(NETWORKS)
    return tmp_path


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_with_code_in_it_is_refused_in_one_line(folder, capsys, form):
    crafted(folder / "x.ckpt", form)
    commands = {
        "report": ["report", "x.ckpt"],
        "measure": [*MEASURE, "--checkpoint=x.ckpt"],
        "fit": ["fit", f"--model={BORING}", "--ckpt_path=x.ckpt", "--seed_everything=false"],
    }
    for name, command in commands.items():
        capsys.readouterr()
        assert main(command) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert re.match(rf"lightning-spectral {name}: .*x.ckpt: no checkpoint that loads with weights_only", told[0])
        assert "\x1b" not in told[0]
        # torch's own message says how to have it executed all the same.
        assert "weights_only` set to" not in told[0]
    assert not Path("ran").exists()
    # The code would have worked.
    pickle.loads(Path("x.ckpt").read_bytes()) if form == "pickle" else torch.load("x.ckpt", weights_only=False)
    assert Path("ran").exists()


def test_a_configuration_makes_no_objects_while_it_is_read(folder, capsys):
    (folder / "c.yaml").write_text("trainer: !!python/object/apply:os.mkdir [ran]\n")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config=c.yaml", f"--model={BORING}"])
    assert stopped.value.code == 2
    assert "python/object/apply" in capsys.readouterr().err
    assert not Path("ran").exists()


def test_measuring_and_reporting_reach_no_network(folder, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    assert main([*MEASURE, "--output=out"]) == 0
    assert main(["report", "out/spectra.json"]) == 0
    assert "spectra.html" in capsys.readouterr().out


# --- names

HOSTILE = [
    "[red]x[/red]", "[/]", "[/nothing]", "[link=file:///etc]y[/link]", ":warning:", "a\\", "[a\\", "$x_1$", r"$\frac{$",
    "$", "$$", r"\$a$", "_hidden", 'a,"b"', "a|b*c*`d`__e__", "<img src=x onerror=alert(1)>&amp;", "</script>", "*",
    "{0}",
]  # fmt: skip


def hostile(names=HOSTILE):
    layers = (layer(name, kind=name, alpha=1 + i / 9) for i, name in enumerate(names))
    return report(*layers, step=3, chosen="[/]$a$:")


def test_tables_show_names_as_they_are():
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=False)
    print_report(hostile(), "[/]:warning:", console=console)
    shown = text.getvalue()
    assert all(shown.count(name) >= 2 for name in HOSTILE)
    assert "[/]:warning:: step 3" in shown
    assert "curvature by [/]$a$" in shown


def test_tables_let_no_name_steer_the_terminal():
    text = io.StringIO()
    named = report(layer("a\x1b[2Jb\r\u202ec"), layer("d\ne"))
    print_report(named, console=Console(file=text, width=200, force_terminal=True))
    assert "\x1b[2J" not in text.getvalue()
    assert not {"\r", "\u202e"} & set(text.getvalue())
    assert r"a\x1b[2Jb\r\u202ec" in text.getvalue()
    assert r"d\ne" in text.getvalue()


@pytest.mark.parametrize("name", sorted(figures.__all__))
def test_figures_read_no_mathematics_in_names(name):
    pytest.importorskip("matplotlib")
    from matplotlib.cbook import is_math_text
    from matplotlib.text import Text

    names = [name for name in HOSTILE if "$" in name]
    figure = getattr(figures, name)(hostile(names))
    figure.savefig(io.BytesIO(), format="svg")
    texts = [text.get_text() for text in figure.findobj(Text)]
    own = (r"\sigma", "10^")
    assert [text for text in texts if is_math_text(text) is True and not any(part in text for part in own)] == []
    if name in NAMED:
        # Without mathematics in it, matplotlib draws \$ as $ and all else as it is.
        assert set(names) <= {line.replace(r"\$", "$") for text in texts for line in text.split("\n")}


NAMED = ("plot_power_law", "plot_rank_profiles", "plot_alpha_by_depth", "plot_spectrum_heatmap")


class Cells(HTMLParser):
    """The texts of a table's cells, and the tags that there are."""

    def __init__(self):
        super().__init__()
        self.cells, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


class Logger:
    """Keeps what it is given, under the name of a logger's class."""

    def __init__(self, folder=""):
        self.log_dir, self.experiment, self.texts, self.hidden = folder, self, [], []

    def add_text(self, tag, text, step):
        self.texts.append(text)

    def define_metric(self, name, **kwargs):
        # As W&B's own.
        if "*" in name[:-1]:
            raise ValueError("glob suffixes only")
        self.hidden.append(name)

    def log_metrics(self, scalars, step):
        self.texts.append(scalars)


def logged(kind, folder="", warn=pytest.fail, **row):
    logger = type(kind, (Logger,), {})(folder)
    tracker_of(logger, warn).write(Row("spectral", 0, **{"scalars": {}, **row}))
    return logger


def test_names_stay_in_their_cells_of_tensorboards_tables():
    util = pytest.importorskip("tensorboard.plugin_util")
    names = [*HOSTILE, "a\nb"]
    text = logged("TensorBoardLogger", table=[{"layer": name, "x": 1.5} for name in names]).texts[-1]
    cells = Cells()
    cells.feed(util.markdown_to_safe_html(text))
    assert [cell.strip() for cell in cells.cells[0::2]] == [*HOSTILE, "a b"]
    assert cells.tags == {"table", "thead", "tbody", "tr", "th", "td"}


def test_names_stay_in_their_cells_of_csv_files(tmp_path):
    names = [*HOSTILE, "a\nb", "c\r\nd"]
    logged("CSVLogger", tmp_path, table=[{"step": 0, "layer": name} for name in names])
    assert os.listdir(tmp_path) == ["spectral_layers.csv"]
    with (tmp_path / "spectral_layers.csv").open(newline="", encoding="utf-8") as file:
        assert [row[1] for row in csv.reader(file)] == ["layer", *names]


def test_a_name_that_wandb_does_not_take_leaves_the_others_hidden():
    told = []
    logger = logged("WandbLogger", scalars={f"spectral/{n}/s": 1.0 for n in ("a", "b*c", "d")}, warn=told.append)
    assert logger.hidden == ["spectral/a/s", "spectral/d/s"]
    assert [text for text in told if "could not log which keys have charts" in text] == told != []
    assert len(logger.texts[-1]) == 3
