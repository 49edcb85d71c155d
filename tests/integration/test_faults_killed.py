"""A run that is killed and resumed is the uninterrupted one, and a W&B that is killed ends no run."""

import json
import subprocess
import sys
from pathlib import Path

import killed
import pytest
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, and found in /proc")

# The checkpoint that a run goes on from, in steps.
RESUMED_FROM = {"probe": 5, "step": 5, "term": 9}
ONE_BEHIND = pytest.mark.skipif(
    not hasattr(_TrainingEpochLoop, "restarted_on_train_batch_end"),
    reason="this Lightning's step axis, and the probe's with it, is one behind after a checkpoint of mid-epoch",
)
FAULTS = [pytest.param(fault, marks=[] if fault == "term" else ONE_BEHIND) for fault in killed.FAULTS]


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(Path(killed.__file__)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "stderr").write_text(done.stderr)
    return folder


def result(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_killed_in_a_probe_or_a_step_resumes_bit_for_bit(fault, killed_runs):
    ended = result(killed_runs, "ended")
    # The second ends by Lightning's SIGTERMException, after the step whose probe the signal came in.
    assert ended[fault] == {"probe": -9, "step": -9, "term": killed.SIGTERM_CODE}[fault]
    assert ended["whole"] == ended[f"{fault}-resumed"] == 0
    whole, resumed = result(killed_runs, "whole"), result(killed_runs, f"{fault}-resumed")
    assert len(set(whole["alphas"])) > 1
    for part in ("weights", "alphas", "random", "probes"):
        assert resumed[part] == whole[part], part
    assert [report["step"] for report in whole["reports"]] == [0, 2, 4, 6, 8, 10, 12, 14]
    start = RESUMED_FROM[fault]
    assert resumed["reports"] == [report for report in whole["reports"] if report["step"] >= start]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rows_of_a_run_killed_and_resumed_are_those_of_the_whole_run(fault, killed_runs):
    whole, before, after = (killed.rows(killed_runs, name) for name in ("whole", fault, f"{fault}-resumed"))
    assert len(whole) > killed.STEPS
    # Up to the kill each row was written as it was logged.
    assert before == whole[: len(before)]
    assert int(before[-1]["step"]) == killed.KILLED_AT - (fault == "probe")
    assert after == [row for row in whole if int(row["step"]) >= RESUMED_FROM[fault]]
    table, tables = (
        killed.table(killed_runs, "whole"),
        [killed.table(killed_runs, name) for name in (fault, f"{fault}-resumed")],
    )
    assert set(table) == {line for lines in tables for line in lines}


@pytest.mark.parametrize("fault", FAULTS)
def test_reports_kept_of_a_run_killed_and_resumed_are_those_of_the_whole_run(fault, killed_runs):
    whole, before, after = (killed.reports(killed_runs, name) for name in ("whole", fault, f"{fault}-resumed"))
    assert whole == result(killed_runs, "whole")["reports"]
    assert before == whole[: len(before)] != []
    assert after == [report for report in whole if report["step"] >= RESUMED_FROM[fault]]


def test_wandb_that_is_killed_is_told_once_and_training_goes_on(killed_runs):
    assert result(killed_runs, "ended")["wandb"] == 0
    steps, probes, told = result(killed_runs, "wandb")
    assert (steps, probes) == (killed.STEPS, killed.STEPS + 1)
    (text,) = [text for text in told if "could not log" in text]
    assert text.startswith("WandbLogger could not log: ")
