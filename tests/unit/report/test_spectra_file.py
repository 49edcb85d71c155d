"""The file of a run's reports: the same reports, whole lines, resumed runs, and what it refuses."""

import json
import math
import os
import time

import pytest
import torch
from cases import CASES
from reports import dead, layer, report
from synthetic import broken, network
from torch import nn

from lightning_spectral import measure_spectra
from lightning_spectral.errors import SpectralWarning
from lightning_spectral.records.layer_spectrum import PARTS
from lightning_spectral.records.step import StepMeasurement
from lightning_spectral.report import RunError, read_run
from lightning_spectral.report.runs import spectra_file
from lightning_spectral.report.runs.spectra_file import (
    append_report,
    append_step,
    decode_reports,
    index_lines,
    read_reports,
    read_steps,
)

ASKED = {"spectrum_top_k": 8, "weight_spectra": True, "bootstrap": 20, "curvature_fraction": 2, "alignment": True}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "spectra.jsonl"


def steps_of(path):
    return [r.step for r in read_reports(path)]


@pytest.mark.parametrize("options", [{}, ASKED, {"precision": "float64"}], ids=["plain", "asked", "float64"])
@pytest.mark.parametrize("curvature", ["exact", "sketch"])
@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_a_measured_report_comes_back_to_the_bit(file, options, curvature):
    for case in (CASES[0], next(c for c in CASES if c.name == "grouped_depthwise_transposed")):
        model, batch = case.build()
        measured = measure_spectra(model, batch, case.loss, top_k=5, curvature=curvature, **options)
        for written in (measured, measured.at(step=3, epoch=1)):
            file.unlink(missing_ok=True)
            append_report(file, written)
            (back,) = read_reports(file)
            assert back.to_json() == written.to_json()


@pytest.mark.parametrize(
    "written",
    [
        broken(),
        network(),
        report(layer("a", noise=0.3, negative=3), dead("b"), step=0, skipped={"c": "frozen"}),
        report(layer("a" * 300, groups=4, note="why", bootstrap=5), warnings=("x",), chosen="ggn: y", n_batches=2),
        report(),
    ],
    ids=["broken", "network", "negative", "facts", "empty"],
)
def test_every_field_comes_back(file, written):
    append_report(file, written)
    (back,) = read_reports(file)
    assert back.to_json() == written.to_json()
    assert list(back.layers) == list(written.layers)


def test_a_line_takes_less_than_1_kb_a_layer(file):
    """20 directions with sampled curvatures; what is asked for besides takes more."""
    sampled = network().layers["block.attention_out.weight"]
    assert (len(sampled.sigma), bool(sampled.h_stderr.all())) == (20, True)
    for layers in (1, 40):
        names = [f"model.decoder.layers.{i}.self_attn.out_proj.weight" for i in range(layers)]
        append_report(file, report(*(layer(n, method="sketch", h_stderr=sampled.h_stderr) for n in names), step=layers))
    first, second = (len(line) for line in file.read_bytes().splitlines())
    assert second - first < 39 * 1000
    assert first < 2000


def test_what_is_asked_for_takes_less_than_4_kb_more(file):
    model, batch = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 30)), torch.randn(64, 40)
    asked = ASKED | {"spectrum_top_k": 25}
    measured = measure_spectra(model, batch, lambda m, x: m(x).square().mean(), top_k=20, curvature="sketch", **asked)
    append_report(file, measured)
    assert all(len(x.sigma) == 20 and x.parts == set(PARTS) for x in measured.layers.values())
    assert file.stat().st_size < 500 + 5000 * len(measured.layers)


@pytest.mark.parametrize("cut", [1, 40, 100_000])
def test_a_torn_last_line_is_left_out_with_a_warning_and_cut_off_by_the_next(file, cut):
    for step in (0, 5):
        append_report(file, report(layer("a"), step=step))
    whole = file.read_bytes()
    end = max(whole.index(b"\n") + 2, len(whole) - cut)
    file.write_bytes(whole[:end])
    with pytest.warns(SpectralWarning, match=r"spectra.jsonl: its last line, 2, is torn and left out"):
        assert steps_of(file) == [0]
    append_report(file, report(layer("a"), step=7))
    assert steps_of(file) == [0, 7]
    assert file.read_bytes().count(b"\n") == 2


def test_a_file_that_holds_a_torn_line_alone(file):
    append_report(file, report(layer("a"), step=1))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(SpectralWarning, match="torn"):
        assert read_reports(file) == []
    append_report(file, report(layer("a"), step=7))
    assert steps_of(file) == [7]


def test_json_of_one_report_is_not_torn_but_of_another_kind(file):
    file.write_text(report(layer("a"), step=1).to_json())
    with pytest.raises(RunError, match=r"JSON of one report is read by SpectralReport\.from_json"):
        read_reports(file)


def test_each_report_is_one_write_and_a_short_one_is_an_error(file, monkeypatch):
    append_report(file, report(layer("a"), step=1))
    writes = []

    class Short(type(file.open("ab", buffering=0))):
        def write(self, data):
            writes.append(bytes(data))
            return super().write(data[:10])

    monkeypatch.setattr(spectra_file.Path, "open", lambda path, mode, **_: Short(os.fspath(path), mode))
    with pytest.raises(OSError, match=r"10 of .* bytes written: is the disk full"):
        append_report(file, report(layer("a"), step=2))
    monkeypatch.undo()
    assert [json.loads(line)["step"] for line in writes] == [2]
    append_report(file, report(layer("a"), step=3))
    assert steps_of(file) == [1, 3]


def test_a_resumed_run_replaces_the_steps_that_it_takes_again(file):
    for alpha, steps in ((1.0, (0, 10, 20, 30)), (3.0, (20, 25))):
        for step in steps:
            append_report(file, report(layer("a", alpha=alpha), step=step))
    reports = read_reports(file)
    assert [(r.step, round(r.layers["a"].alpha.exponent)) for r in reports] == [(0, 1), (10, 1), (20, 3), (25, 3)]
    append_report(file, report(layer("a")))
    append_report(file, report(layer("b"), step=5))
    assert [r.step for r in read_reports(file)] == [0, 10, 20, 25, None, 5]


def update(step, slope=-2.0):
    return StepMeasurement(slope, 1.0, {"a": 0.25, "b": math.inf}, 5.0, math.nan, "why", ("x", "y"), step)


def test_the_step_after_a_probe_is_a_line_of_its_own(file):
    append_report(file, report(layer("a"), step=5))
    append_step(file, update(5))
    assert steps_of(file) == [5]
    (back,) = read_steps(file)
    assert repr(back) == repr(update(5))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(SpectralWarning, match=r"spectra.jsonl: its last line, 2, is torn and left out"):
        assert read_steps(file) == []
    assert [step.update for step in read_run([file]).steps] == [None]


def test_a_resumed_run_replaces_the_updates_that_it_takes_again(file):
    for slope, steps in ((1.0, (0, 10, 20, 30)), (3.0, (20, 25))):
        for step in steps:
            append_report(file, report(layer("a"), step=step))
            append_step(file, update(step, slope))
    assert [(x.step, x.slope) for x in read_steps(file)] == [(0, 1.0), (10, 1.0), (20, 3.0), (25, 3.0)]
    append_step(file, update(25, 4.0))
    assert [(x.step, x.slope) for x in read_steps(file)][-1] == (25, 4.0)
    assert steps_of(file) == [0, 10, 20, 25]
    run = read_run([file])
    assert [(step.step, step.update.slope) for step in run.steps] == [(0, 1.0), (10, 1.0), (20, 3.0), (25, 4.0)]


def test_a_step_with_a_wrong_value_is_refused(file):
    append_report(file, report(layer("a"), step=5))
    append_step(file, update(5))
    file.write_text(file.read_text().replace('"slope":-2.0', '"slope":"x"'))
    assert steps_of(file) == [5]
    with pytest.raises(RunError, match=r"line 2 holds no step \(slope must be float, got 'x'"):
        read_steps(file)


def test_ten_thousand_lines_are_indexed_in_seconds_and_decoded_when_asked_for(file):
    append_report(file, report(*(layer(f"a{i}") for i in range(20)), step=0))
    line = file.read_bytes()
    with file.open("wb") as out:
        for step in range(10_000):
            out.write(line.replace(b'"step":0', b'"step":%d' % step, 1))
    before = time.process_time()
    lines, torn = index_lines(file)
    assert time.process_time() - before < 5
    assert (len(lines), torn, lines[-1].step) == (10_000, "", 9_999)
    assert [r.step for r in decode_reports(file, lines[:: len(lines) - 1])] == [0, 9_999]


GOOD = '{"format":"lightning-spectral-measurement","version":1,"step":0,"epoch":0'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "line 1 is not of a file that a SpectralProbe wrote"),
        ("hello", "line 1 is not of a file"),
        ("[" * 100_000, "line 1 is not of a file"),
        ('{"format":"lightning-spectral-report","version":3,"step":0}', "line 1 is not of a file"),
        (GOOD.replace(":1,", ":99,") + "}", "line 1 is of version 99, expected 1: read it with the release"),
        (GOOD + "}", r"line 1 holds no report \(no 'layers'\)"),
        (GOOD, r"line 1 holds no report \(Expecting"),
        (GOOD + ',"layers":[1]}', "line 1 holds no report"),
        (GOOD + ',"layers":{"a":[1]}}', "line 1 holds no report"),
        (GOOD + ',"layers":' + "[" * 100_000, r"line 1 holds no report \(maximum recursion"),
        (GOOD.replace(':0,"epoch"', ':"0","epoch"') + "}", "line 1 is not of a file"),
    ],
)
def test_garbage_is_refused_in_one_line(file, line, says):
    file.write_text(line + "\n")
    with pytest.raises(RunError, match=says) as error:
        read_reports(file)
    assert str(error.value).startswith(f"{file}: line 1 ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("loss",), "x", "loss must be float, got 'x'"),
        (("layers", "a", "kind"), 5, "kind must be str, got 5"),
        (("layers", "a", "sigma"), "!!!!", "line 1 holds no report"),
        (("layers", "a", "sigma"), "AAAA", "whole float64 numbers, got 3 bytes"),
        (("layers", "a", "sigma"), "", r"sigma and h must be \(K,\), got \(0,\) and \(20,\)"),
        (("layers", "a", "h_stderr"), "", r"h_stderr must be \(K,\) as h"),
        (("layers", "a", "weights"), {"sigma": ""}, "no 'gamma'"),
    ],
)
def test_crafted_lines_are_refused(file, where, value, says):
    append_report(file, report(layer("a"), step=0))
    data = part = json.loads(file.read_text())
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    file.write_text(json.dumps(data) + "\n")
    with pytest.raises(RunError, match=says):
        read_reports(file)


def test_a_file_that_is_not_there(file):
    with pytest.raises(RunError, match=r"spectra.jsonl cannot be read: No such file"):
        read_reports(file)
    file.write_bytes(b"")
    assert read_reports(file) == []


def test_numbers_may_stand_as_lists(file):
    """As another program would write them."""
    append_report(file, report(layer("a"), step=0))
    data = json.loads(file.read_text())
    data["layers"]["a"] |= {"sigma": [4.0, 2, 1.0], "h": [16.0, 4.0, None]}
    file.write_text(json.dumps(data) + "\n")
    (back,) = read_reports(file)
    assert back.layers["a"].sigma.tolist() == [4, 2, 1]
    assert bool(torch.isnan(back.layers["a"].h[2]))
