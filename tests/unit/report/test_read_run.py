"""Runs from every file that `lightning-spectral report` takes, and what it says of others."""

import itertools
import json
import os
import sys
import time

import pytest
import pytorch_lightning as pl
import torch
from modules import ConvNet
from pytorch_lightning.loggers import CSVLogger
from reports import dead, layer, report
from torch.utils.data import DataLoader

from lightning_spectral import SpectralProbe
from lightning_spectral.cli.commands import main
from lightning_spectral.report import RunError, read_run, run_of
from lightning_spectral.report.page.data import page_data
from lightning_spectral.report.runs import read
from lightning_spectral.report.runs.read import MAX_REPORTS
from lightning_spectral.report.runs.spectra_file import append_report, spectra_file_name

pytestmark = pytest.mark.filterwarnings("ignore:.*")

NAMES = ["net.2.weight", "net.10.weight", "a/b.weight", "<script>alert(1)</script>.weight"]


def steps():
    """Three probes of one run."""
    return [
        report(
            *(layer(name, alpha=0.9 + step / 4, negative=i) for i, name in enumerate(NAMES)), dead("dead"), step=step
        )
        for step in (0, 4, 8)
    ]


def write(folder, reports=(), name="spectra.jsonl"):
    """The file of a run in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for r in reports or steps():
        append_report(folder / name, r)
    return folder / name


@pytest.fixture
def log(tmp_path):
    """The folder of a run of a CSVLogger: a log beside the file of its reports."""
    folder = tmp_path / "csv" / "version_0"
    write(folder)
    (folder / "metrics.csv").write_text("step,spectral/alpha_median\n0,2.0\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint and a CSV log of one short training."""
    folder = tmp_path_factory.mktemp("trained")
    probe = SpectralProbe(every_n_steps=2, top_k=5, max_samples=16, min_probes=0)
    trainer = pl.Trainer(
        max_steps=3, callbacks=[probe], logger=CSVLogger(folder, name="csv"), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(ConvNet(), DataLoader(ConvNet.data(), 24))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder, probe


def same(run, expected):
    assert [step.report.to_json() for step in run.steps] == [r.to_json() for r in expected]


def test_a_file_of_reports_by_every_path_that_leads_to_it(log):
    file = log / "spectra.jsonl"
    for path in (log, str(log), file, log.parent, log.parent.parent):
        run = read_run([path])
        assert [step.label for step in run.steps] == ["step 0", "step 4", "step 8"]
        assert (run.sources, run.omissions) == ((f"spectra file {file}",), ())
        same(run, steps())
    assert read_run([log]).name == "csv/version_0"


def test_in_the_files_of_a_wandb_run_and_below_default_root_dir(tmp_path):
    run = tmp_path / "wandb" / "offline-run-20260101_120000-abc"
    file = write(run / "files")
    (run / "run-abc.wandb").write_bytes(b"not read")
    for path in (run, tmp_path / "wandb", tmp_path):
        assert read_run([path]).sources == (f"spectra file {file}",)


def test_of_several_runs_the_newest_is_taken_and_said(log, capsys):
    other = write(log.parent / "version_1", steps()[:1])
    for newest, n in ((other, 1), (log / "spectra.jsonl", 3)):
        os.utime(newest, (time.time() + n, time.time() + n))
        run = read_run([log.parent])
        assert len(run.steps) == n
        assert run.sources == (f"spectra file {newest}, the newest of 2 runs in {log.parent}",)
    # A second probe makes no run of its own.
    second = write(other.parent, name="spectra-second.jsonl")
    os.utime(second, (0, 0))
    assert main(["report", str(log.parent)]) == 0
    assert f"read spectra file {newest}, the newest of 2 runs in {log.parent}\n" in capsys.readouterr().err
    second.unlink()
    assert len(read_run([other]).steps) == 1
    os.utime(other, (newest.stat().st_mtime,) * 2)
    assert len(read_run([log.parent]).steps) == 1


def test_a_stale_file_above_a_newer_run_is_not_taken(log, tmp_path):
    stale = write(tmp_path, steps()[:1])
    os.utime(stale, (0, 0))
    assert len(read_run([tmp_path]).steps) == 3
    os.utime(stale, (time.time() + 9,) * 2)
    assert len(read_run([tmp_path]).steps) == 1


def test_a_torn_line_is_left_out_and_said(log, capsys):
    file = log / "spectra.jsonl"
    with file.open("ab") as out:
        out.write(b'{"format":"light')
    run = read_run([log])
    same(run, steps())
    (said,) = run.omissions
    assert said.startswith(f"{file}: its last line, 4, is torn")
    assert page_data(run)["notes"] == [f"Left out: {said}."]
    assert main(["report", str(log)]) == 0
    assert f"lightning-spectral report: left out: {said}\n" in capsys.readouterr().err


def test_long_runs_are_thinned_before_they_are_fitted(log, monkeypatch):
    (log / "spectra.jsonl").unlink()
    two_layers = report(layer("a"), layer("b"), step=0)
    file, line = log / "spectra.jsonl", write(log, [two_layers]).read_bytes()
    file.write_bytes(b"".join(line.replace(b'"step":0', b'"step":%d' % step) for step in range(1000)))
    run = read_run([log])
    shown = [step.step for step in run.steps]
    assert (len(shown), shown[0], shown[-1]) == (MAX_REPORTS, 0, 999)
    assert {b - a for a, b in itertools.pairwise(shown)} <= {5, 6}
    assert run.omissions == (f"{file}: 800 of 1000 probes, evenly; 200 are read",)
    for fits, n in ((40, 20), (3, 2)):
        monkeypatch.setattr(read, "MAX_FITS", fits)
        assert [step.step for step in read_run([log]).steps][:: n - 1] == [0, 999]


def test_a_log_without_its_reports_says_what_to_do(tmp_path):
    folder = tmp_path / "version_0"
    folder.mkdir()
    for name in ("metrics.csv", "run-x.wandb", "events.out.tfevents.1"):
        (folder / name).write_bytes(b"step\n0\n")
        with pytest.raises(RunError, match=r"holds a log, .* no spectra.jsonl: give .* train with SpectralProbe\(keep"):
            read_run([folder])
        with pytest.raises(RunError, match=r"a log holds scalars only and is not read; give a run's folder"):
            read_run([folder / name])
        (folder / name).unlink()


def test_checkpoint_alone_and_beside_its_run(trained):
    folder, probe = trained
    alone = read_run([folder / "last.ckpt"])
    assert [step.label for step in alone.steps] == ["step 2"]
    same(alone, [probe.last_report])
    whole = write(folder / "run", probe.history)
    for paths in ([whole, folder / "last.ckpt"], [folder / "last.ckpt", whole]):
        same(read_run(paths), probe.history)
    early = write(folder / "early", probe.history[:1])
    same(read_run([early, folder / "last.ckpt"]), probe.history)
    copy = folder / "copy.ckpt"
    copy.write_bytes((folder / "last.ckpt").read_bytes())
    twice = read_run([folder / "last.ckpt", copy])
    assert ([p.step for p in twice.steps], twice.omissions) == (
        [2], (f"{copy}: the other inputs hold all of it",),
    )  # fmt: skip


def test_json_reports_one_several_or_a_folder(tmp_path):
    files = []
    for r in steps():
        files.append(tmp_path / f"step{r.step}.json")
        r.to_json(files[-1])
    (tmp_path / "hparams.json").write_text("{}")
    for paths in (files, files[::-1], [tmp_path], [str(tmp_path)]):
        run = read_run(paths)
        assert [p.step for p in run.steps] == [0, 4, 8]
        same(run, steps())
    assert run.sources == (f"3 JSON reports in {tmp_path}",)
    outside = tmp_path / "after.json"
    report(layer("a")).to_json(outside)
    assert [p.label for p in read_run([outside]).steps] == ["after"]


def test_reports_outside_training_are_named_by_their_files_and_each_is_a_probe(tmp_path):
    files = [tmp_path / f"step-{i}" / "spectra.json" for i in (1, 2)]
    for i, file in enumerate(files):
        file.parent.mkdir()
        report(layer("a", alpha=1.0 + i)).to_json(file)
    run = read_run([*files, files[0]])
    assert [p.label for p in run.steps] == ["step-1/spectra.json", "step-2/spectra.json"]
    assert run.name.startswith("step-1/spectra.json, step-2/spectra.json")
    files[1].rename(tmp_path / "after.json")
    assert [p.label for p in read_run([files[0], tmp_path / "after.json"]).steps] == ["spectra.json", "after.json"]


def saved(tmp_path, name, *layers, step=None, **kwargs):
    report(*layers, step=step, **kwargs).to_json(tmp_path / name)
    return tmp_path / name


def test_inputs_of_two_networks_are_refused(tmp_path, log, capsys):
    one = saved(tmp_path, "one.json", layer("a"), layer("b"), layer("head"), step=100)
    others = [
        (saved(tmp_path, "two.json", layer("c"), layer("d"), layer("head"), step=200), "of 3 layers, 1 are in both"),
        (saved(tmp_path, "wide.json", *(layer(x, shape=(8, 9)) for x in ("a", "b", "head"))), "of 3 layers, 0 are"),
        (log / "spectra.jsonl", "of 3 layers, 0 are in both"),
    ]
    for other, why in others:
        assert main(["report", str(one), str(other)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"lightning-spectral report: {one} and {other} are of different networks: {why}")
        assert said.endswith("make a page of each\n")
        assert said.count("\n") == 1
    # Frozen layers are of the network, and a head alone is of it before the rest thaws.
    for i, (layers, skipped) in enumerate((("a", {"head": "frozen", "b": "frozen"}), ("head", {"a": "frozen"}))):
        saved(tmp_path / "csv", f"{i}.json", layer(layers), skipped=skipped, step=i)
    assert len(read_run([tmp_path / "csv" / "0.json", tmp_path / "csv" / "1.json", one]).steps) == 3


def test_two_measurements_of_a_step_are_refused(tmp_path, log):
    first, second, late = steps()[0], report(*(layer(name, alpha=3.0) for name in NAMES), step=0), steps()[2]
    files = [tmp_path / f"{i}.json" for i in range(3)]
    for r, file in zip((first, second, late), files, strict=True):
        r.to_json(file)
    other = write(tmp_path / "other", [second])
    for a, b in (files[:2], (log / "spectra.jsonl", files[1]), (log / "spectra.jsonl", other)):
        with pytest.raises(RunError, match=f"{a} and {b} hold different measurements of step 0: .*; lay two runs"):
            read_run([a, b])
    same(read_run([log, files[0], files[2]]), steps())
    with pytest.raises(RunError, match="report 1 and report 2 hold different measurements of step 0"):
        run_of([first, second], "mine")


def test_reports_in_memory():
    run = run_of(steps()[::-1], "mine")
    assert ([p.step for p in run.steps], run.sources) == ([0, 4, 8], ("3 reports",))
    assert run_of([report(layer("a"))], "mine").steps[0].label == "report 1"


def test_two_probes_need_a_prefix(tmp_path):
    for prefix, n in (("spectral", 3), ("other/one", 1)):
        write(tmp_path / "run", steps()[:n], spectra_file_name(prefix))
    names = "run/spectra-other%2Fone.jsonl, .*run/spectra.jsonl"
    with pytest.raises(RunError, match=f"several probes, name the file of one: .*{names}"):
        read_run([tmp_path])
    with pytest.raises(RunError, match=f"no spectra-x.jsonl, of a probe with the prefix 'x', but .*{names}"):
        read_run([tmp_path], prefix="x")
    for prefix, n in (("spectral", 3), ("other/one", 1)):
        assert len(read_run([tmp_path / "run"], prefix=prefix).steps) == n
        assert len(read_run([tmp_path / "run" / spectra_file_name(prefix)]).steps) == n
    steps()[0].to_json(tmp_path / "r.json")
    with pytest.raises(RunError, match=r"r.json: a file of reports is of one probe; leave out --prefix x"):
        read_run([tmp_path / "r.json"], prefix="x")
    assert len(read_run([tmp_path / "run", tmp_path / "r.json"], prefix="spectral").steps) == 3


def test_checkpoint_of_two_probes(tmp_path):
    probes = [SpectralProbe(1), SpectralProbe(1, prefix="it's")]
    for probe in probes:
        probe.last_report = steps()[0]
    torch.save({"callbacks": {p.state_key: p.state_dict() for p in probes}}, tmp_path / "two.ckpt")
    with pytest.raises(RunError, match="choose one with --prefix: it's, spectral"):
        read_run([tmp_path / "two.ckpt"])
    assert read_run([tmp_path / "two.ckpt"], prefix="it's").steps[0].step == 0


def bad(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone", None, "no such file or folder"),
        ("notes.txt", b"hello", "not a file that can be read; give a run's folder with the spectra.jsonl"),
        ("metrics.csv", b"step,loss\n0,1.0\n", "a log holds scalars only"),
        ("events.out.tfevents.1", b"nonsense", "a log holds scalars only"),
        ("run-x.wandb", b"nonsense", "a log holds scalars only"),
        ("spectra.jsonl", b"", "the probe measured nothing in this run"),
        ("spectra.jsonl", b"torn", "the probe measured nothing in this run"),
        ("spectra.jsonl", b"nonsense\n", "line 1 is not of a file that a SpectralProbe wrote"),
        ("other.jsonl", b"{}\n", "line 1 is not of a file that a SpectralProbe wrote"),
        ("r.json", b"{", "no report that can be read"),
        ("r.json", b"[]", "no report that can be read"),
        ("r.json", b"{}", "expected a lightning-spectral-report"),
        ("r.json", b'{"format": "lightning-spectral-report", "version": 99}', "of version"),
        ("r.json", b"[" * 100_000, "no report that can be read"),
        ("x.ckpt", b"nonsense", "no checkpoint that loads with weights_only=True"),
        ("x.ckpt", b"", "no checkpoint that loads with weights_only=True"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, capsys, name, content, says):
    path = bad(tmp_path, name, content)
    with pytest.raises(RunError, match=says):
        read_run([path])
    assert main(["report", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"lightning-spectral report: {path}")
    assert printed.err.count("\n") == 1
    assert not printed.out


class Code:
    """Not for a checkpoint that loads with weights_only."""


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "is no checkpoint of a Trainer with a SpectralProbe"),
        ([1, 2], "is no checkpoint of a Trainer with a SpectralProbe"),
        ({"callbacks": [1]}, "is no checkpoint of a Trainer with a SpectralProbe"),
        ({"callbacks": {SpectralProbe(1).state_key: [1]}}, "is no checkpoint of a Trainer with a SpectralProbe"),
        ({"callbacks": {"EarlyStopping": {}}}, "is no checkpoint of a Trainer with a SpectralProbe"),
        ({"callbacks": {SpectralProbe(1).state_key: {"last_report": None}}}, "the probe measured nothing"),
        ({"callbacks": {SpectralProbe(1).state_key: {"last_report": {"format": "x"}}}}, "its report cannot be read"),
        ({"hyper_parameters": Code()}, "loads with weights_only=True .* can be read instead"),
    ],
)
def test_checkpoints_without_a_report(tmp_path, state, says):
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(RunError, match=says):
        read_run([tmp_path / "x.ckpt"])


def test_report_with_a_field_missing(tmp_path):
    data = report(layer("a")).to_dict()
    del data["layers"]["a"]["sigma"]
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(RunError, match=r"no report that can be read \(no 'sigma'\)"):
        read_run([tmp_path / "r.json"])


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("layers", "a", "kind"), 5, "kind must be str, got 5"),
        (("layers", "a", "shape"), [1, 2, 3], r"shape must be tuple\[int, int\], got \[1, 2, 3\]"),
        (("layers", "a", "n_usable"), 10**30, "n_usable must be int, got 10+"),
        (("layers", "a", "alpha", "intercept"), [], r"intercept must be float, got \[\]"),
        (("layers", "a", "sigma"), [10**400], "sigma must be float, got 10+"),
        (("skipped",), {"b": 1}, "skipped must be str, got 1"),
        (("warnings",), [1], "warnings must be str, got 1"),
        (("step",), "1", "step must be int, got '1'"),
    ],
)
def test_report_with_a_wrong_value(tmp_path, where, value, says):
    data = part = report(layer("a")).to_dict()
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(RunError, match=rf"no report that can be read \({says}"):
        read_run([tmp_path / "r.json"])


def test_folders_with_no_run_and_with_several_checkpoints(tmp_path):
    with pytest.raises(RunError, match=r"holds no run; give a run's folder with the spectra.jsonl"):
        read_run([tmp_path])
    (tmp_path / "checkpoints").mkdir()
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / "checkpoints" / name).write_bytes(b"not read")
    with pytest.raises(RunError, match=r"holds several checkpoints, name one: .*a.ckpt, .*b.ckpt"):
        read_run([tmp_path])


def test_one_checkpoint_below_a_folder_is_the_run(tmp_path, trained):
    folder, probe = trained
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    same(read_run([tmp_path]), [probe.last_report])


def test_reports_above_checkpoints_are_the_run(log):
    (log / "checkpoints").mkdir()
    (log / "checkpoints" / "epoch=0.ckpt").write_bytes(b"not read")
    (log / "last.ckpt").write_bytes(b"not read")
    for path in (log, log.parent):
        assert [step.step for step in read_run([path]).steps] == [0, 4, 8]


def test_command_writes_beside_the_run_and_says_what_it_read(log, tmp_path, capsys, monkeypatch):
    assert main(["report", str(log)]) == 0
    read = f"lightning-spectral report: read spectra file {log / 'spectra.jsonl'}\n"
    assert capsys.readouterr() == (f"{log / 'report.html'}\n", read)
    files = [tmp_path / "runs" / name / "one.json" for name in "ab"]
    for step, file in enumerate(files):
        file.parent.mkdir(parents=True)
        report(layer("a"), step=step).to_json(file)
    assert main(["report", str(files[0]), "--title", "A & B"]) == 0
    assert "<title>A &amp; B</title>" in files[0].with_suffix(".html").read_text()
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, files)]) == 0
    assert capsys.readouterr() == ("runs/report.html\n", "")
    assert main(["report", *map(str, files), "--output", "page.htm"]) == 0
    assert (tmp_path / "page.htm").stat().st_size > 1e6
    assert not files[1].with_suffix(".html").exists()


def test_a_page_is_replaced_and_another_file_is_not(log, capsys):
    page, other = log / "report.html", log / "notes.html"
    for said in ("", f"lightning-spectral report: {page} was there and is replaced\n"):
        assert main(["report", str(log / "spectra.jsonl"), "--output", str(page)]) == 0
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == (f"{page}\n", said)
    other.write_text("<p>mine</p>")
    assert main(["report", str(log), "--output", str(other)]) == 2
    told = f"{other} is there and no page of this command; give another --output, or --force\n"
    assert capsys.readouterr().err == f"lightning-spectral report: {told}"
    assert other.read_text() == "<p>mine</p>"
    assert main(["report", str(log), "--output", str(other), "--force"]) == 0
    assert other.stat().st_size > 1e6


def test_command_says_where_it_cannot_write(log, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    refused = {
        tmp_path / "page.txt": "the name of a page ends in .html or .htm",
        tmp_path: "the name of a page ends in .html or .htm",
        tmp_path / "new" / "p.html": f"there is no folder {tmp_path / 'new'}; make it first, or give another",
        tmp_path / "file" / "p.html": f"there is no folder {tmp_path / 'file'}",
        tmp_path / "folder.html": "cannot be written",
    }
    for target, why in refused.items():
        assert main(["report", str(log), "--output", str(target)]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_command_without_plotly(log, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(log)]) == 2
    assert capsys.readouterr().err == (
        'lightning-spectral report: the page\'s plots need plotly: pip install "lightning-spectral[report]"\n'
    )


def test_help_and_unknown_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    assert "spectra.jsonl" in " ".join(capsys.readouterr().out.split())
    for arguments in (["report"], ["report", "x", "--colour", "red"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
