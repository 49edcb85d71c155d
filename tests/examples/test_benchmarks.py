"""Every benchmark can be run by `make benchmarks`; those without a test file of their own run at a tiny size here."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.ablation import tasks  # noqa: E402
from examples.benchmarks import long_run, noise, optimizer_step, overhead, probe, run, shared_step  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def figures(monkeypatch, module, path, *arguments):
    """Run a script's main and return what it wrote."""
    monkeypatch.setattr(sys, "argv", [module.__name__, f"--output={path}", *arguments])
    module.main()
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_script_is_run_and_every_result_is_of_one():
    scripts = {p.name for p in run.HERE.glob("*.py") if '__name__ == "__main__"' in p.read_text(encoding="utf-8")}
    assert {benchmark.script for benchmark in run.BENCHMARKS.values()} == scripts - {"run.py"} | {"../ablation/run.py"}
    kept = {path.stem for path in (run.HERE / "results").glob("*.json")}
    assert kept == set(run.BENCHMARKS) - {"gpu"}


def test_contributing_has_their_minutes():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Benchmarks")[2]
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ", text, re.MULTILINE)
    assert rows == [(name.removesuffix("_cpu"), str(of.minutes)) for name, of in run.BENCHMARKS.items()]


class Parsed(Exception):  # noqa: N818
    """Raised when a command line has been understood."""


@pytest.mark.parametrize("name", run.BENCHMARKS)
def test_a_script_knows_its_command_line(name, monkeypatch, tmp_path):
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    _, script, *arguments = run.BENCHMARKS[name].command(name, tmp_path)
    path = Path(script).resolve().relative_to(ROOT).with_suffix("")
    module = importlib.import_module(".".join(path.parts))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(Parsed) as parsed:
        module.main()
    ((options, unknown),) = parsed.value.args
    assert not unknown
    assert Path(options.output) == (tmp_path if run.BENCHMARKS[name].folder else tmp_path / f"{name}.json")


def test_one_that_fails_keeps_its_earlier_result_and_the_others_run(monkeypatch, tmp_path, capfd):
    scripts, runs, results = (tmp_path / name for name in ("scripts", "runs", "results"))
    scripts.mkdir()
    write = "import sys; open(sys.argv[-1].partition('=')[2], 'w').write('new')\n"
    (scripts / "good.py").write_text(write)
    (scripts / "bad.py").write_text(write + "sys.exit(3)\n")
    results.mkdir()
    (results / "bad_cpu.json").write_text("earlier")
    made = {"bad_cpu": run.Benchmark("bad.py", 1), "good_cpu": run.Benchmark("good.py", 1)}
    monkeypatch.setattr(run, "HERE", scripts)
    monkeypatch.setattr(run, "BENCHMARKS", made)
    assert run.main([f"--runs={runs}", f"--results={results}"]) == 1
    assert "FAILED: exit status 3" in capfd.readouterr().out
    assert {path.name: path.read_text() for path in results.iterdir()} == {
        "bad_cpu.json": "earlier", "good_cpu.json": "new"
    }  # fmt: skip
    assert run.main([f"--runs={runs}", f"--results={results}", "--only", "good"]) == 0


def test_probe(monkeypatch, tmp_path):
    matrices = probe.spectra
    monkeypatch.setattr(probe, "spectra", lambda *_: matrices(48, 32))
    monkeypatch.setattr(probe, "K", 4)
    monkeypatch.setitem(probe.PARTS, "gpt12", lambda repeats: probe.run(probe.gpt(2, 1, ("exact", "auto")), repeats))
    found = figures(monkeypatch, probe, tmp_path / "found.json", "--repeats=1", "--only", "gpt12", "svd")["figures"]
    assert found["gpt12"]["layers"] == 5
    assert found["gpt12"]["methods"]["auto"]["alpha_median"] < 1
    assert all(row["fast_subspace_sine"] < 1e-2 for row in found["svd"].values())


def test_noise(monkeypatch, tmp_path):
    monkeypatch.setitem(noise.TASKS, "cnn", (tasks.Digits, lambda: tasks.DigitsData(batch_size=16), 1, 2))
    for name, value in {"REFERENCE": 64, "REFERENCE_CURVATURE": 32, "SAMPLES": (32, 80), "DRAWS": 1}.items():
        monkeypatch.setattr(noise, name, value)
    picture = tmp_path / "noise.png"
    found = figures(monkeypatch, noise, tmp_path / "found.json", "--seeds=1", "--only", "cnn", f"--figure={picture}")[
        "networks"
    ]["cnn"]
    assert {row["arm"] for row in found["probes"]} == {"batch", "auto"}
    assert [(row["arm"], row["samples"]) for row in found["varied"]] == [("plain", 32), ("plain", 80), ("few", 80)]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_overhead(monkeypatch, tmp_path):
    found = figures(monkeypatch, overhead, tmp_path / "found.json", "--seconds=0.5")["figures"]
    assert list(found) == ["gpt", "resnet"]
    assert all(row["steps"] > 0 and 0 <= row["share"] < 1 for row in found.values())


def test_optimizer_step(monkeypatch, tmp_path):
    shapes = {"8x16": [(8, 16)], "two": [(8, 8), (4, 8)]}
    monkeypatch.setattr(optimizer_step, "TASKS", shapes)
    found = figures(monkeypatch, optimizer_step, tmp_path / "found.json", "--repeats=1")
    assert list(found["figures"]) == list(shapes)
    assert found["figures"]["two"]["spectral_newton"]["of_muon"] > 0
    assert max(found["largest_error"].values()) <= optimizer_step.TOLERANCE


def test_shared_step(monkeypatch, tmp_path):
    found = figures(monkeypatch, shared_step, tmp_path / "found.json", "--repeats=1", "--only", "16x16")["figures"]
    assert found["16x16"]["share"] == pytest.approx(0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_long_run(monkeypatch, tmp_path):
    here = SimpleNamespace(apply=lambda function, arguments: function(*arguments))
    pools = SimpleNamespace(Pool=lambda *_, **__: nullcontext(here))
    monkeypatch.setattr(long_run.multiprocessing, "get_context", lambda _: pools)
    monkeypatch.setattr(long_run, "Watch", lambda watch=long_run.Watch: watch(2))
    monkeypatch.setattr(long_run, "SETTLED", 2)
    monkeypatch.setattr(long_run, "MOST_GROWTH", {"graphs": 0})
    monkeypatch.setattr(long_run, "RUNS", {name: of for name, of in long_run.RUNS.items() if "csv" in name})
    picture = tmp_path / "long_run.png"
    found = figures(monkeypatch, long_run, tmp_path / "found.json", "--probes=4", f"--figure={picture}")["figures"]
    assert found["csv"]["probes"] == 4
    assert (found["csv"]["chosen"], found["csv, exact"]["chosen"]) == ("ggn", "exact")
    assert [row["step"] for row in found["csv, no probe"]["rows"]] == [2, 4]
    assert found["csv"]["scalars"] == found["csv, no probe"]["scalars"]
    assert picture.read_bytes().startswith(b"\x89PNG")
