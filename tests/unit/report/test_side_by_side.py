"""Several runs: which paths are a run each, how they are named, in what they differ, and what their page holds."""

import json
import re
from dataclasses import replace

import pytest
from reports import dead, layer, report

from lightning_spectral.cli.commands import main
from lightning_spectral.records.step import StepMeasurement
from lightning_spectral.report import RunError, read_runs, run_of, write_page
from lightning_spectral.report.page.build import runs_page
from lightning_spectral.report.page.data import runs_data, script_json
from lightning_spectral.report.palette import MOST_RUNS
from lightning_spectral.report.runs.run import Run
from lightning_spectral.report.runs.several import comparison, differences, options_of
from lightning_spectral.report.runs.spectra_file import append_report, append_step


def steps(alpha=2.0, **options):
    return [
        report(layer("a", alpha=alpha + step / 10), layer("b", kind="conv", alpha=1.0), step=step, **options)
        for step in (0, 5)
    ]


def write(folder, reports):
    folder.mkdir(parents=True)
    for r in reports:
        append_report(folder / "spectra.jsonl", r)
        append_step(folder / "spectra.jsonl", StepMeasurement(-3.0, 2.0, {}, 1.0, 0.5, step=r.step))
    return folder


@pytest.fixture
def two(tmp_path):
    return [write(tmp_path / name / "version_0", steps(alpha)) for name, alpha in (("adamw", 2.0), ("muon", 1.5))]


def names(paths, **options):
    return [run.name for run in read_runs(paths, **options)]


def test_each_folder_and_each_file_of_spectra_is_a_run(two):
    assert names(two) == names([f / "spectra.jsonl" for f in two]) == ["adamw", "muon"]
    assert names([two[0], f"newton={two[1]}"]) == ["adamw", "newton"]
    assert names([two[0], two[0] / "spectra.jsonl"]) == ["adamw/version_0"]
    assert names([f"mine={two[0]}"]) == ["mine"]
    first, second = read_runs(two)
    assert [round(step.report.layers["a"].alpha.exponent, 1) for step in second.steps] == [1.5, 2.0]
    assert first.steps[1].update.scale == 1.5


def test_files_of_reports_are_one_run_and_belong_to_the_only_folder(two, tmp_path):
    files = [tmp_path / f"{i}.json" for i in (7, 9)]
    for file, step in zip(files, (7, 9), strict=True):
        report(layer("a"), layer("b", kind="conv"), step=step).to_json(file)
    (run,) = read_runs(files)
    assert [step.step for step in run.steps] == [7, 9]
    (run,) = read_runs([two[0], *files])
    assert [step.step for step in run.steps] == [0, 5, 7, 9]
    with pytest.raises(RunError, match=r"7\.json: to which of 2 runs does it belong"):
        read_runs([*two, files[0]])
    with pytest.raises(RunError, match="one, two: files are one run, which has one name"):
        read_runs([f"one={files[0]}", f"two={files[1]}"])


def test_names_of_files_with_an_equals_sign_are_no_names_of_runs(two, tmp_path):
    file = tmp_path / "epoch=1.json"
    report(layer("a"), step=7).to_json(file)
    assert names([file]) == ["epoch=1.json"]
    with pytest.raises(RunError, match="no such file or folder"):
        read_runs([f"{tmp_path}/x=y"])


def test_runs_that_cannot_be_told_apart_are_refused(two):
    with pytest.raises(RunError, match="two runs have one name, x, x; give each its own"):
        read_runs([f"x={two[0]}", f"x={two[1]}"])
    with pytest.raises(RunError, match=f"{MOST_RUNS + 1} runs cannot be told apart"):
        read_runs([two[0]] * (MOST_RUNS + 1))
    for runs in ([], [run_of(steps(), "x")] * (MOST_RUNS + 1)):
        with pytest.raises(RunError, match=f"need 1 to {MOST_RUNS} runs for one page, got {len(runs)}"):
            runs_page(runs)
    with pytest.raises(RunError, match="empty: no probe to show"):
        runs_page([run_of(steps(), "x"), Run("empty", (), ())])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({}, []),
        ({"curvature_samples": 2}, ["curvature samples: 8 in one; 2 in two"]),
        ({"chosen": "ggn: piecewise linear"}, ["method: exact in one; ggn in two"]),
    ],
)
def test_differences_name_option_and_values(other, says):
    assert differences([run_of(steps(), "one"), run_of(steps(**other), "two")]) == says


def test_samples_that_move_from_probe_to_probe_differ_where_ranges_do_not_meet():
    def of(name, *counts):
        made = zip(steps(), counts, strict=True)
        return run_of([replace(r, n_samples=n, curvature_samples=4) for r, n in made], name)

    assert differences([of("one", 8, 32), of("two", 16, 64)]) == []
    apart = [of("one", 8, 32), of("two", 64, 64)]
    assert differences(apart) == ["gradient samples: 8 to 32 in one; 64 in two"]
    assert options_of(apart[0])["curvature samples"] == "4"
    assert differences([*apart, replace(apart[0], name="three")]) == [
        "gradient samples: 8 to 32 in one, three; 64 in two"
    ]
    trained = run_of([replace(r, mode="train", precision="float64", top_k=5) for r in steps()], "two")
    assert [text.split(":")[0] for text in differences([run_of(steps(), "one"), trained])] == [
        "mode", "precision", "directions",
    ]  # fmt: skip


def test_sentences_compare_last_alphas_to_trust_in_both():
    first, second = run_of(steps(2.0), "one"), run_of(steps(1.5), "two")
    assert comparison([first, second]) == [
        "two against one: the last alpha is higher in 0 of 2 layers to trust in both; the change is -0.25 in the "
        "median, from -0.50 to 0.00."
    ]
    assert comparison([first, run_of([report(dead("a"))], "none")]) == [
        "none against one: no layer has an alpha to trust in both."
    ]
    assert comparison([first, run_of([report(layer("z"))], "other")]) == [
        "other against one: they have no layer in common."
    ]


def test_data_are_the_reports(two):
    runs = read_runs(two)
    data = runs_data(runs)
    assert (data["layers"], data["kinds"]) == (["a", "b"], ["dense", "conv"])
    assert [run["name"] for run in data["runs"]] == ["adamw", "muon"]
    assert len({tuple(run["look"]) for run in data["runs"]}) == 2
    last = data["runs"][1]["probes"][-1]
    assert (last["label"], last["step"], last["loss"], last["scale"]) == ("step 5", 5, 1.25, 1.5)
    at = data["keys"].index("alpha")
    assert [row[at] for row in last["values"]] == pytest.approx([2.0, 1.0])
    assert last["kinds"]["dense"][list(data["medians"]).index("alpha")] == pytest.approx(2.0)
    assert last["doubts"] == ["", ""]
    assert last["medians"]["noise_scale"] is None


def test_layers_of_some_runs_alone_and_long_runs():
    other = [report(layer("c", kind="head"), layer("a"), step=step) for step in range(200)]
    data = runs_data([run_of(steps(), "one"), run_of(other, "two")], limit=60_000)
    assert data["layers"] == ["a", "b", "c"]
    assert data["runs"][0]["probes"][0]["values"][2] is None
    shown = [probe["step"] for probe in data["runs"][1]["probes"]]
    assert (shown[0], shown[-1]) == (0, 199)
    assert len(shown) < 200
    assert data["notes"] == [f"two: {len(shown)} of 200 probes are shown, evenly, to keep this page small."]
    assert len(script_json(data)) < 80_000


def test_the_page_is_one_file_with_escaped_names():
    text = runs_page([run_of(steps(), "<b>"), run_of(steps(), "</script>")])
    assert "<h1>&lt;b&gt;, &lt;/script&gt;</h1>" in text
    assert text.count("<b>") == text.count("</b>")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    assert [run["name"] for run in data["runs"]] == ["<b>", "</script>"]
    assert "default-src 'none'" in text
    assert len(text.encode()) < 3_000_000


def test_one_run_in_a_list_has_its_own_page(tmp_path):
    run = run_of(steps(), "x")
    one, listed = (write_page(runs, tmp_path / "p.html").read_text() for runs in (run, [run]))
    assert one == listed


def test_command_lays_folders_over_each_other_and_says_where_they_differ(two, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sgd", steps(1.0, chosen="ggn: y"))
    assert main(["report", "adamw/version_0", "plain=sgd", "--title", "mine"]) == 0
    out, err = capsys.readouterr()
    assert out == "report.html\n"
    assert "report: adamw/version_0: read spectra file" in err
    assert "measured in different ways, method: exact in adamw/version_0; ggn in plain" in err
    assert "<title>mine</title>" in (tmp_path / "report.html").read_text()
    assert main(["report", "adamw/version_0", "muon/version_0", "missing.json"]) == 2
    assert "missing.json" in capsys.readouterr().err
