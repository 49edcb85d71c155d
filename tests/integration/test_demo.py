"""The demo in small, its data, its tables, and the command line."""

import inspect
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import reports as made_up
import torch
from fits import fit_numbers
from reports import layer
from rich.console import Console

from lightning_spectral import SpectralProbe, SpectralReport
from lightning_spectral.cli import commands as cli
from lightning_spectral.cli import main
from lightning_spectral.demo import run as demo
from lightning_spectral.demo.networks import CHARACTERS, PythonSource, digits
from lightning_spectral.records.alignment import KroneckerFactors
from lightning_spectral.records.on_request import CurvatureFraction, WeightSpectrum
from lightning_spectral.report import kind_table, layer_table, print_report, run_of
from lightning_spectral.report.runs.spectra_file import read_reports
from lightning_spectral.report.terminal.formatting import WHOLE_WIDTH, width_for
from lightning_spectral.report.terminal.tables import REQUESTED


def wandb_summary(run):
    """The last values of an offline run, as W&B itself reads them from its file."""
    pytest.importorskip("wandb", minversion="0.28", reason="`wandb leet inspect`, which reads a run, is not there")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [wandb, "leet", "inspect", "--summary", "--json", run], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)["summary"]


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_demo_trains_measures_logs_and_prints(tmp_path, capsys, monkeypatch):
    # As it is by default: the last probe is that of the final weights.
    monkeypatch.setitem(inspect.unwrap(SpectralProbe.__init__).__kwdefaults__, "min_probes", 8)
    threads, real = [], demo.print_report
    monkeypatch.setattr(demo, "print_report", lambda *args: (threads.append(torch.get_num_threads()), real(*args)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        histories = demo.run(tmp_path, steps_factor=0.0025)
        assert (threads, torch.get_num_threads()) == ([1, 1], 2)
    finally:
        torch.set_num_threads(before)
    reports = {name: history[-1] for name, history in histories.items()}
    printed, complaints = capsys.readouterr()
    # One epoch is enough for so few steps. Not every Lightning's bar tells of how many it is.
    assert "Epoch 0" in printed + complaints
    assert set(re.findall(r"Epoch \d+/(-?\d+)", printed + complaints)) <= {"0"}
    assert "anonymous" not in printed + complaints
    assert {name: len(report.layers) for name, report in reports.items()} == {"resnet-digits": 9, "gpt-python": 9}
    for name, report in reports.items():
        assert [probed.step for probed in histories[name]] == [0, 1]
        rows = (tmp_path / name / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
        assert "spectral/alpha_median" in rows[0]
        for named in report.layers:
            assert named.removesuffix(".weight") in printed
        command = re.search(rf"wandb leet run (\S*{name}\S*)", printed)
        summary = wandb_summary(command.group(1))
        signals = [median for kept in histories[name] if not math.isnan(median := kept.medians()["signal_median"])]
        extremes = {"last": signals[-1], "min": min(signals), "max": max(signals)}
        assert summary["spectral/signal_median"] == pytest.approx(extremes, rel=1e-6)
        assert summary["spectral/r2_alpha/head.weight"] == pytest.approx(report.layers["head.weight"].alpha.r2)
    for name, history in histories.items():
        kept = read_reports(tmp_path / name / "csv" / "version_0" / "spectra.jsonl")
        assert [report.to_dict() for report in kept] == [report.to_dict() for report in history]
        page = tmp_path / name / "report.html"
        assert str(page) in printed.replace("\n", "")
        made = page.read_text(encoding="utf-8")
        assert "blocks.0" in made
        # The command makes the same page of what lies there.
        assert cli.main(["report", str(tmp_path / name), "--output", str(tmp_path / "again.html")]) == 0
        again = (tmp_path / "again.html").read_text(encoding="utf-8")
        assert again.count('"spectra":') == made.count('"spectra":') > 0
    for word in ("attention_qkv", "mlp_up", "conv", "head", "192x64", "1.94 to 2.17", "alpha in the paper"):
        assert word in printed


def test_without_plotly_the_demo_says_how_to_get_a_page(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    run = run_of([made_up.report(layer("a"), step=1)], "gpt-python")
    assert demo._page(run, tmp_path, "GPT") == (
        'none of gpt-python: the page\'s plots need plotly: pip install "lightning-spectral[report]"; then '
        f"lightning-spectral report {tmp_path}"
    )
    assert list(tmp_path.iterdir()) == []


def test_digits_are_standardised():
    images, labels = digits().tensors
    assert images.shape == (1797, 1, 8, 8)
    assert images.mean().abs() < 1e-6
    assert set(labels.tolist()) == set(range(10))


def test_python_source_is_text():
    data = PythonSource(64, limit=10_000)
    assert len(data) == 156
    assert data[0].shape == (65,)
    assert torch.equal(data[1][0], data[0][-1])
    text = "".join(CHARACTERS[i] for i in data.text)
    assert "import" in text
    assert data.text.max() < len(CHARACTERS)


def text_of(table, width=140):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_tables_show_what_is_missing_and_escape_names():
    k = torch.arange(1, 21, dtype=torch.float64)
    layers = [
        fit_numbers(k**-1, k**-2, name="a[bold].weight", kind="conv", shape=(64, 288), groups=2),
        fit_numbers(torch.zeros(0), torch.zeros(0), name="b.weight", kind="head", shape=(5, 5), note="x"),
        fit_numbers(k**-1, k**-0.5, name="c.weight", kind="dense", shape=(64, 64)),
    ]
    report = SpectralReport({x.name: x for x in layers}, {}, 1.0, 8, "exact", "eval", "float32", 20, 0.1)
    rows = [re.split(r"\s{2,}", line.strip()) for line in text_of(layer_table(report)).splitlines()[3:] if line.strip()]
    expected = ["a[bold]", "conv", "64x288 /2", "2.00 ± 0.00", "1.00", "-", "1.00", "2.00", "2.00", "0.0 %"]
    assert rows[0][:10] == expected
    assert rows[0][11:] == ["2.50", "20/20"]
    assert rows[1] == ["b", "head", "5x5", "-", "-", "-", "-", "-", "-", "-", "-", "-", "0/0"]
    assert rows[2][11] == "inf"
    kinds = text_of(kind_table(report))
    assert "1.94 to 2.17" in kinds
    assert math.isnan(report.layers["b.weight"].alpha.exponent)


def printed(report, *, width=140, **options):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(report, console=console, **options)
    return console.export_text()


def reported(*layers):
    return SpectralReport({x.name: x for x in layers}, {}, 1.0, 8, "exact", "eval", "float32", 20, 0.1)


def test_columns_are_explained_below_the_table_and_nothing_more_is_printed_unasked():
    text = printed(reported(layer("a.weight", noise=0.2)))
    assert text.count("error: |s - α·γ| / |s|; PR_h: directions that carry h, zeta: its bound; signal: share") == 1
    assert text.count("?: r2 below 0.9") == 1
    assert not any(requested.title in text for requested in REQUESTED)


def test_what_was_measured_on_request_is_printed_and_no_more():
    k = torch.arange(1, 21, dtype=torch.float64)
    factors = KroneckerFactors(3 * k**-0.5, k**-0.5, k**-1, 2 * k**-0.5, k**0, 4.5, 7.25, 64)
    longer = torch.arange(1, 41, dtype=torch.float64) ** -1
    rich = layer("a[bold].weight", noise=0.2, bootstrap=20, factors=factors, spectrum=longer)
    fraction = CurvatureFraction.of(torch.tensor([9.0, 11.0]), rich.h, shape=rich.shape)
    rich = replace(rich, weights=WeightSpectrum.of(torch.diag(k), top_k=5), fraction=fraction)
    intervals, alignment = rich.intervals, rich.alignment
    ends = [f"{x.low:.2f} to {x.high:.2f}" for x in (intervals.alpha, intervals.gamma, intervals.s)]
    slopes = [f"{fit.exponent:.2f}" for fit in (alignment.beta, alignment.phi, alignment.chi_slope)]
    cells = {
        "bootstrap": [*ends, *(f"{fit.exponent:.2f}" for fit in rich.alpha_quartiles)],
        "alignment": [f"{rich.alpha.exponent:.2f}", *slopes, f"{alignment.median_chi:.3g}", "0.33", "7.25", "4.5"],
        "curvature_fraction": [
            "10 ± 1", f"{100 * fraction.value:.1f} % ± {100 * fraction.stderr:.1f} %", f"{fraction.over_random:.3g}",
        ],
        "weight_spectra": [f"{x:.2f}" for x in (
            rich.weights.s.exponent, rich.weights.s.r2, rich.s.exponent, rich.weights.gamma.exponent,
            rich.gamma.exponent,
        )],
        "spectrum_top_k": ["40/40", "power law", f"{rich.rank_models.margin:.2f}"],
    }  # fmt: skip
    text = printed(reported(rich, layer("other.weight", alignment_note="is applied twice")))
    assert [requested.title.partition(":")[0] for requested in REQUESTED] == list(cells)
    for requested, expected in zip(REQUESTED, cells.values(), strict=True):
        rows = text.partition(requested.title)[2].partition(requested.caption)[0].splitlines()[4:6]
        assert re.split(r"\s{2,}", rows[0].strip()) == ["a[bold]", *expected]
        assert rows[1].split()[0] == "other"
    (unaligned,) = re.findall(r"other +2\.00 +- +-.*", text)
    assert unaligned.split() == ["other", "2.00", *["-"] * 7]
    assert "alignment" not in printed(reported(rich), layers=[])


def test_tables_fit_the_terminal_and_say_what_they_leave_out(monkeypatch):
    long = layer("model.transformer.h.11.attention.qkv.weight.q", kind="attention_qkv", noise=0.2, bootstrap=20)
    report = reported(long, layer("a[b]" + "c" * 60 + "d.weight", kind="attention_out"))
    for width in (40, 60, 80, 100):
        text = printed(report, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert {"alpha", "r2", "points"} <= set(next(x for x in text.splitlines() if x.startswith(" layer")).split())
        # Figures and the ends of names are whole.
        assert f"{long.alpha.exponent:.2f} ± {long.alpha.stderr:.2f}" in text
        assert "?" not in text.partition("h ~ sigma")[0]
        rows = [line.split()[0] for line in text.splitlines() if "20/20" in line]
        assert rows[0].endswith("11.attention.qkv.q" if width > 40 else ".q")
        assert rows[1].startswith("a[b]")
        assert "…" in rows[1]
        assert rows[1].endswith("d")
    assert "no room for kind, shape, s, α·γ, PR_h, zeta" in " ".join(printed(report, width=80).split())
    assert "no room" not in printed(reported(layer("a.weight")), width=120)
    # COLUMNS counts where there is no terminal; without it, a file gets all columns.
    monkeypatch.delenv("COLUMNS", raising=False)
    assert width_for(Console(file=StringIO())) == WHOLE_WIDTH
    monkeypatch.setenv("COLUMNS", "80")
    assert width_for(Console(file=StringIO())) == 80


def test_command_line(capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    folders = []
    monkeypatch.setattr(demo, "run", folders.append)
    assert main(["demo", "--output", str(tmp_path / "here")]) == 0
    assert folders == [str(tmp_path / "here")]


def test_command_line_without_scikit_learn(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def missing(folder):
        raise ImportError('the digits need scikit-learn: pip install "lightning-spectral[demo]"')

    monkeypatch.setattr(demo, "run", missing)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.startswith("lightning-spectral demo: the digits need scikit-learn")


def test_a_demo_without_its_packages_leaves_no_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lightning_spectral.demo.run", None)
    assert main(["demo"]) == 2
    assert "lightning_spectral.demo.run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
