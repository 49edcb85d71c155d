"""Runs from every source that `lightning-spectral report` takes, and what it says of others."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from modules import ConvNet
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from reports import dead, layer, report
from torch.utils.data import DataLoader

from lightning_spectral import SpectralProbe
from lightning_spectral.cli.commands import main
from lightning_spectral.records.log_keys import LAYER_KEYS
from lightning_spectral.report import RunError, read_run, run_of
from lightning_spectral.report.page.build import page_data
from lightning_spectral.report.trackers import CSVTracker, Row

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


def logged(tracker, reports=(), prefix="spectral"):
    for r in reports or steps():
        tracker.log_metrics({"train_loss": 2.0, "epoch": 0}, step=r.step)
        tracker.log_metrics({f"{prefix}/{k}": v for k, v in r.scalars().items()}, step=r.step)
    return tracker


@pytest.fixture
def log(tmp_path):
    tracker = logged(CSVLogger(tmp_path, name="csv"))
    tracker.save()
    return Path(tracker.log_dir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint and a CSV log of one short training."""
    folder = tmp_path_factory.mktemp("trained")
    probe = SpectralProbe(every_n_steps=2, top_k=5, max_samples=16)
    trainer = pl.Trainer(
        max_steps=3, callbacks=[probe], logger=CSVLogger(folder, name="csv"), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(ConvNet(), DataLoader(ConvNet.data(), 24))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder, probe


def equal_scalars(probe, expected):
    assert set(probe.layers) == set(expected.layers)
    for name, values in probe.layers.items():
        for key, value in expected.layers[name].scalars().items():
            assert values[key] == pytest.approx(value, nan_ok=True), (name, key)


def test_csv_log(log):
    for path in (log, log / "metrics.csv", log.parent):
        run = read_run([path])
        assert [probe.label for probe in run.probes] == ["step 0", "step 4", "step 8"]
        assert run.sources == (f"CSV log {log / 'metrics.csv'}",)
        for probe, expected in zip(run.probes, steps(), strict=True):
            assert probe.report is None
            assert probe.loss == expected.loss
            assert probe.n_layers == 5
            equal_scalars(probe, expected)
            assert [x.alpha for x in probe.exponents()] == pytest.approx(
                [expected.layers[name].alpha.exponent for name in probe.layers], nan_ok=True
            )
    assert list(run.probes[0].layers)[-2:] == ["net.2.weight", "net.10.weight"]
    assert run.name.endswith("csv/version_0") or run.name.endswith("/csv")


def with_table(log, reports=(), prefix="spectral"):
    """The log with the table of layers that log_tables=True writes."""
    for r in reports or steps():
        CSVTracker(SimpleNamespace(log_dir=log), pytest.fail).write_table(Row(prefix, r.step, {}, table=r.rows()))
    return log


def test_a_table_of_layers_beside_a_csv_log(tmp_path):
    tracker = CSVLogger(tmp_path, name="csv")
    for r in steps():
        tracker.log_metrics({f"spectral/{k}": v for k, v in r.scalars([NAMES[1]]).items()}, step=r.step)
    tracker.save()
    run = read_run([with_table(Path(tracker.log_dir))])
    for probe, expected in zip(run.probes, steps(), strict=True):
        assert probe.loss == expected.loss
        assert list(probe.layers) == list(expected.layers)
        for name, spectrum in expected.layers.items():
            known = {key: value for key, value in spectrum.scalars().items() if math.isfinite(value)}
            assert {k: v for k, v in probe.layers[name].items() if math.isfinite(v)} == pytest.approx(known)
            facts = probe.facts[name]
            assert (facts.kind, facts.shape, facts.note) == (spectrum.kind, spectrum.shape, spectrum.note)
            assert facts.rank_model == (spectrum.rank_models.winner or "")
            quarters = [fit.exponent for fit in spectrum.alpha_quartiles]
            assert list(facts.quarters) == pytest.approx(quarters, nan_ok=True)
        assert [x.kind for x in probe.exponents()] == ["dense"] * 5
    data = page_data(run)
    assert (data["kinds"][0], data["shapes"][0]) == ("dense", "64 × 32")
    assert data["probes"][-1]["notes"] == {"dead": "nothing flows through it"}
    assert data["notes"][0].startswith("A log holds scalars only, and the table of layers beside it too")
    assert len(data["notes"]) == 1


def test_tables_are_of_one_probe_the_last_row_counts_and_steps_of_theirs_alone_are_kept(log):
    second = steps()[1]
    others = [report(layer("z.weight", alpha=5.0), step=0)]
    with_table(log, others, prefix="spectral/other")
    with_table(log, [second, report(layer(NAMES[1], alpha=3.0), step=4)])
    resumed = report(layer("late.weight", bootstrap=5, alpha=1.25), step=11)
    with_table(log, [resumed])
    assert sorted(path.name for path in log.glob("*_layers*")) == [
        "spectral_layers.csv", "spectral_layers_1.csv", "spectral_other_layers.csv",
    ]  # fmt: skip
    probes = read_run([log]).probes
    assert [probe.label for probe in probes] == ["step 0", "step 4", "step 8", "step 11"]
    assert probes[0].facts == probes[2].facts == {}
    assert probes[1].layers[NAMES[1]]["alpha"] == pytest.approx(3.0)
    assert probes[1].layers[NAMES[0]]["alpha"] == pytest.approx(second.layers[NAMES[0]].alpha.exponent)
    assert math.isnan(probes[3].loss)
    assert probes[3].layers["late.weight"]["alpha_low"] == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"step,layer\n0,a\n", "no table of layers as log_tables=True writes it \\(KeyError: 'kind'"),
        (b"layer\na\n", "KeyError: 'step'"),
        (b"step,layer,kind,m,n,note,rank_model\n0,a,conv,x,3,,\n", "ValueError: invalid literal"),
        (b"step,layer,alpha,kind\n0,a,blue,conv\n", "could not convert string to float: 'blue'"),
        (b"\xff\xfe", "no CSV file that can be read"),
    ],
)
def test_what_is_no_table_of_layers(log, content, says):
    (log / "spectral_layers.csv").write_bytes(content)
    with pytest.raises(RunError, match=f"spectral_layers.csv: .*{says}"):
        read_run([log])


def test_logged_keys_are_all_read(log):
    assert set(read_run([log]).probes[0].layers["dead"]) == {key.name for key in LAYER_KEYS if not key.part}


def test_wandb_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", minversion="0.28", reason="`wandb leet inspect`, which reads a run, is not there")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = logged(WandbLogger(project="p", save_dir=tmp_path, offline=True))
    folder = Path(tracker.experiment.dir).parent
    tracker.experiment.finish()
    (file,) = folder.glob("*.wandb")
    for path in (folder, file):
        run = read_run([path])
        assert run.sources == (f"W&B run {file}",)
        for probe, expected in zip(run.probes, steps(), strict=True):
            assert probe.step == expected.step
            equal_scalars(probe, expected)
    assert math.isinf(run.probes[0].layers["net.2.weight"]["zeta_bound"])


def test_wandb_without_its_reader(tmp_path, monkeypatch):
    file = tmp_path / "run-x.wandb"
    file.write_bytes(b"nonsense" * 9)
    old = subprocess.CompletedProcess([], 2, "", "Usage: ...\n\nError: No such command 'leet'.")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: old)
    with pytest.raises(RunError, match=r"needs `wandb leet inspect` of W&B 0\.28: pip install --upgrade wandb"):
        read_run([file])


def test_wandb_is_neither_the_current_folder_nor_told_options_by_a_path(tmp_path, monkeypatch):
    pytest.importorskip("wandb", minversion="0.28", reason="`wandb leet inspect`, which reads a run, is not there")
    (tmp_path / "wandb.py").write_text("raise SystemExit('taken from the current folder')")
    (tmp_path / "--help.wandb").write_bytes(b"nonsense" * 9)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"no W&B run that can be read \(.*bad header"):
        read_run(["--help.wandb"])


def test_a_tensorboard_log_alone_beside_a_csv_log_and_without_its_reader(log, tmp_path, monkeypatch):
    tracker = logged(TensorBoardLogger(tmp_path, name="tb"))
    tracker.finalize("success")
    folder = Path(tracker.log_dir)
    (file,) = folder.glob("events*")
    for path in (folder, file, folder.parent):
        run = read_run([path])
        for probe, expected in zip(run.probes, steps(), strict=True):
            assert (probe.step, probe.loss) == (expected.step, expected.loss)
            assert probe.kinds == {"dense": pytest.approx(expected.medians()["kind/dense/alpha_median"])}
            assert probe.layers[NAMES[0]]["alpha"] == pytest.approx(expected.layers[NAMES[0]].alpha.exponent)
    # float32 of the one and float64 of the other are one measurement.
    assert [p.step for p in read_run([folder, log]).probes] == [0, 4, 8]
    file.rename(log / file.name)
    beside = read_run([log])
    assert beside.sources == (f"CSV log {log / 'metrics.csv'}",)
    assert beside.left_out == (
        f"TensorBoard log {log}: taken for the same scalars as the CSV log; name its file to have it read",
    )
    assert page_data(beside)["notes"][-1] == f"Left out: {beside.left_out[0]}."
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(RunError, match="reading TensorBoard's files needs tensorboard: pip install tensorboard"):
        read_run([log / file.name])


def test_checkpoint_alone_and_beside_its_log(trained):
    folder, probe = trained
    alone = read_run([folder / "last.ckpt"])
    assert [p.label for p in alone.probes] == ["step 2"]
    assert alone.probes[0].report.to_json() == probe.last_report.to_json()
    for paths in ([folder / "csv", folder / "last.ckpt"], [folder / "last.ckpt", folder / "csv"]):
        both = read_run(paths)
        assert [(p.step, p.report is not None) for p in both.probes] == [(0, False), (2, True)]
        assert both.left_out == ()
    copy = folder / "copy.ckpt"
    copy.write_bytes((folder / "last.ckpt").read_bytes())
    same = read_run([folder / "last.ckpt", copy])
    assert ([p.step for p in same.probes], same.left_out) == (
        [2], (f"{folder / 'last.ckpt'}: the other inputs hold all of it",),
    )  # fmt: skip


def test_json_reports_one_several_or_a_folder(tmp_path):
    files = []
    for r in steps():
        files.append(tmp_path / f"step{r.step}.json")
        r.to_json(files[-1])
    (tmp_path / "hparams.json").write_text("{}")
    for paths in (files, files[::-1], [tmp_path], [str(tmp_path)]):
        run = read_run(paths)
        assert [p.step for p in run.probes] == [0, 4, 8]
        assert all(p.report is not None for p in run.probes)
    assert run.sources == (f"3 JSON reports in {tmp_path}",)
    outside = tmp_path / "after.json"
    report(layer("a")).to_json(outside)
    assert [p.label for p in read_run([outside]).probes] == ["after"]


def test_reports_outside_training_are_named_by_their_files_and_each_is_a_probe(tmp_path):
    files = [tmp_path / f"step-{i}" / "spectra.json" for i in (1, 2)]
    for i, file in enumerate(files):
        file.parent.mkdir()
        report(layer("a", alpha=1.0 + i)).to_json(file)
    run = read_run([*files, files[0]])
    assert [p.label for p in run.probes] == ["step-1/spectra.json", "step-2/spectra.json"]
    assert run.name.startswith("step-1/spectra.json, step-2/spectra.json")
    files[1].rename(tmp_path / "after.json")
    assert [p.label for p in read_run([files[0], tmp_path / "after.json"]).probes] == ["spectra.json", "after.json"]


def saved(tmp_path, name, *layers, step=None, **kwargs):
    report(*layers, step=step, **kwargs).to_json(tmp_path / name)
    return tmp_path / name


def test_inputs_of_two_networks_are_refused(tmp_path, log, capsys):
    one = saved(tmp_path, "one.json", layer("a"), layer("b"), layer("head"), step=100)
    others = [
        (saved(tmp_path, "two.json", layer("c"), layer("d"), layer("head"), step=200), "of 3 layers, 1 are in both"),
        (saved(tmp_path, "wide.json", *(layer(x, shape=(8, 9)) for x in ("a", "b", "head"))), "of 3 layers, 0 are"),
        (log / "metrics.csv", "of 3 layers, 0 are in both"),
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
    assert len(read_run([tmp_path / "csv" / "0.json", tmp_path / "csv" / "1.json", one]).probes) == 3


def test_two_measurements_of_a_step_are_refused(tmp_path, log):
    first, second, late = steps()[0], report(*(layer(name, alpha=3.0) for name in NAMES), step=0), steps()[2]
    files = [tmp_path / f"{i}.json" for i in range(3)]
    for r, file in zip((first, second, late), files, strict=True):
        r.to_json(file)
    other = logged(CSVLogger(tmp_path, name="csv"), [second])
    other.save()
    for a, b in (
        files[:2],
        (log / "metrics.csv", files[1]),
        (log / "metrics.csv", Path(other.log_dir) / "metrics.csv"),
    ):
        with pytest.raises(
            RunError, match=f"{a} and {b} hold different measurements of step 0: .*; make a page of each"
        ):
            read_run([a, b])
    assert [p.report is not None for p in read_run([log, files[0], files[2]]).probes] == [True, False, True]
    with pytest.raises(RunError, match="report 1 and report 2 hold different measurements of step 0"):
        run_of([first, second], "mine")


def test_a_longer_log_of_the_same_run_counts(tmp_path, log):
    """Of the same step in two logs, the one that holds more layers."""
    tracker = CSVLogger(tmp_path, name="few")
    for r in steps():
        tracker.log_metrics({f"spectral/{k}": v for k, v in r.scalars([NAMES[1]]).items()}, step=r.step)
    tracker.save()
    for paths in ([log, tracker.log_dir], [tracker.log_dir, log]):
        assert [len(p.layers) for p in read_run(paths).probes] == [5, 5, 5]


def test_reports_in_memory():
    run = run_of(steps()[::-1], "mine")
    assert ([p.step for p in run.probes], run.sources) == ([0, 4, 8], ("3 reports",))
    assert run_of([report(layer("a"))], "mine").probes[0].label == "report 1"


def test_two_probes_need_a_prefix(tmp_path):
    tracker = CSVLogger(tmp_path, name="csv")
    for prefix in ("spectral", "other/one"):
        logged(tracker, prefix=prefix)
    tracker.save()
    with pytest.raises(RunError, match="several probes; choose one with --prefix: other/one, spectral"):
        read_run([tracker.log_dir])
    with pytest.raises(RunError, match="no probe with the prefix 'x', but other/one, spectral"):
        read_run([tracker.log_dir], prefix="x")
    steps()[0].to_json(tmp_path / "r.json")
    with pytest.raises(RunError, match=r"r.json: JSON reports hold one probe each and no prefix; leave out --prefix x"):
        read_run([tmp_path / "r.json"], prefix="x")
    assert len(read_run([tracker.log_dir, tmp_path / "r.json"], prefix="spectral").probes) == 3
    assert len(read_run([tracker.log_dir], prefix="other/one").probes) == 3


def test_checkpoint_of_two_probes(tmp_path):
    probes = [SpectralProbe(1), SpectralProbe(1, prefix="it's")]
    for probe in probes:
        probe.last_report = steps()[0]
    torch.save({"callbacks": {p.state_key: p.state_dict() for p in probes}}, tmp_path / "two.ckpt")
    with pytest.raises(RunError, match="choose one with --prefix: it's, spectral"):
        read_run([tmp_path / "two.ckpt"])
    assert read_run([tmp_path / "two.ckpt"], prefix="it's").probes[0].step == 0


def test_failed_probes_are_left_out(tmp_path):
    tracker = logged(CSVLogger(tmp_path, name="csv"), steps()[:1])
    tracker.log_metrics({"spectral/alpha_median": math.nan, "spectral/layers_measured": math.nan}, step=9)
    tracker.save()
    assert [p.step for p in read_run([tracker.log_dir]).probes] == [0]


def test_log_without_steps(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("spectral/layers_measured,spectral/alpha_median,spectral/a/alpha\n1,2.0,2.0\n1,2.1,2.1\n")
    assert [p.label for p in read_run([file]).probes] == ["probe 1", "probe 2"]


def bad(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    return path


HEAD = b"spectral/layers_measured,spectral/alpha_median,spectral/a/alpha\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone", None, "no such file or folder"),
        ("notes.txt", b"hello", "not a file that can be read; give a CSVLogger's"),
        ("metrics.csv", b"step,loss\n0,1.0\n", "holds nothing that a SpectralProbe logged"),
        ("events.out.tfevents.1", b"nonsense", "holds nothing that a SpectralProbe logged"),
        ("metrics.csv", b"", "holds nothing that a SpectralProbe logged"),
        ("metrics.csv", b"\xff\xfe\x00", "no CSV file that can be read"),
        ("metrics.csv", HEAD + b"1,2.0,blue\n", "spectral/a/alpha should be a number, got 'blue'"),
        ("metrics.csv", HEAD + b"nan,nan,\n", "the probe measured nothing"),
        ("metrics.csv", b"spectral/layers_measured,spectral/alpha_median\n5,2.0\n", "medians but no layers"),
        ("r.json", b"{", "no report that can be read"),
        ("r.json", b"[]", "no report that can be read"),
        ("r.json", b"{}", "expected a lightning-spectral-report"),
        ("r.json", b'{"format": "lightning-spectral-report", "version": 99}', "of version"),
        ("r.json", b"[" * 100_000, "no report that can be read"),
        ("metrics.csv", b"step," + HEAD + b"inf,inf,2.0,blue\n", "should be a number, got 'blue'"),
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


def test_a_log_of_infinities_makes_a_page(tmp_path):
    file = bad(
        tmp_path, "metrics.csv", b"step," + HEAD.strip() + b",spectral/a/negative_curvature\ninf,inf,2.0,1.0,inf\n"
    )
    (probe,) = read_run([file]).probes
    assert (probe.step, probe.n_layers) == (None, 1)
    assert main(["report", str(file)]) == 0


def test_folders_with_no_run_and_with_several(tmp_path):
    with pytest.raises(RunError, match="holds no run; give a CSVLogger's folder"):
        read_run([tmp_path])
    for _ in range(2):
        logged(CSVLogger(tmp_path, name="csv")).save()
    with pytest.raises(
        RunError, match=r"holds several runs, name one: .*version_0/metrics.csv, .*version_1/metrics.csv"
    ):
        read_run([tmp_path])


def test_a_log_above_checkpoints_is_the_run(log):
    (log / "checkpoints").mkdir()
    (log / "checkpoints" / "epoch=0.ckpt").write_bytes(b"not read")
    assert [probe.step for probe in read_run([log.parent]).probes] == [0, 4, 8]


def test_command_writes_beside_the_run_and_says_what_it_read(log, tmp_path, capsys, monkeypatch):
    assert main(["report", str(log)]) == 0
    read = f"lightning-spectral report: read CSV log {log / 'metrics.csv'}\n"
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
        assert main(["report", str(log / "metrics.csv"), "--output", str(page)]) == 0
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
    assert "offline W&B run" in " ".join(capsys.readouterr().out.split())
    for arguments in (["report"], ["report", "x", "--colour", "red"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_reading_needs_neither_lightning_nor_wandb_nor_plotly(log):
    done = subprocess.run(
        [
            sys.executable, "-c",
            "import sys\n"
            "for name in ('pytorch_lightning', 'lightning', 'wandb', 'plotly'):\n    sys.modules[name] = None\n"
            "from lightning_spectral.report import read_run\n"
            f"print(len(read_run([{str(log)!r}]).probes))",
        ],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.stdout.strip() == "3", done.stderr
