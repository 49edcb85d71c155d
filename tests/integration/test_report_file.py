"""The file of a run's reports: where it lies, what is in it, and that no error of writing ends training."""

from __future__ import annotations

import errno
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from modules import ProbeRows, fit
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from reports import layer, report
from tiny import Repeated, Tiny, batch_of, fit_tiny

from lightning_spectral import SpectralProbe, SpectralWarning
from lightning_spectral.callbacks import report_file
from lightning_spectral.callbacks.report_file import ReportFile, run_folder
from lightning_spectral.report.runs.read import read_run
from lightning_spectral.report.runs.spectra_file import read_reports, read_steps

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


REMEDY = (
    "free space, make the folder writable or set the Trainer's default_root_dir, else it lacks this report; "
    "keep_reports=False writes no file"
)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*spectra*"))


def as_dicts(reports):
    return [one.to_dict() for one in reports]


def trainer_in(folder, *loggers, **options):
    return SimpleNamespace(
        loggers=list(loggers), default_root_dir=str(folder), fast_dev_run=False, is_global_zero=True,
        progress_bar_callback=None, callback_metrics={}, **options,
    )  # fmt: skip


@pytest.mark.parametrize("logger_class", [CSVLogger, TensorBoardLogger])
def test_reports_lie_in_the_folder_of_the_logger(tmp_path, logger_class):
    probe, logger = SpectralProbe(every_n_steps=2), logger_class(tmp_path)
    fit_tiny(probe, steps=5, logger=[ProbeRows(), logger], default_root_dir=tmp_path / "root")
    assert files_below(tmp_path) == ["lightning_logs/version_0/spectra.jsonl"]
    kept = read_reports(Path(logger.log_dir) / "spectra.jsonl")
    assert [one.step for one in kept] == [0, 2, 4]
    assert as_dicts(kept) == as_dicts(probe.history)
    assert as_dicts(read_reports(logger.log_dir)) == as_dicts(kept)


@pytest.mark.parametrize("logger", [False, [ProbeRows()]])
def test_reports_without_a_folder_of_a_logger_lie_below_the_root(tmp_path, logger):
    probe = SpectralProbe(every_n_steps=2)
    fit_tiny(probe, steps=3, logger=logger, default_root_dir=tmp_path / "root")
    assert files_below(tmp_path) == ["root/spectra.jsonl"]
    assert as_dicts(read_reports(tmp_path / "root" / "spectra.jsonl")) == as_dicts(probe.history)


def test_urls_are_no_folders(tmp_path):
    bucket = SimpleNamespace(log_dir="s3://bucket/version_0")
    assert run_folder(trainer_in(tmp_path, bucket)) == tmp_path
    with pytest.raises(ValueError, match="default_root_dir=s3://bucket is not on this machine"):
        run_folder(trainer_in("s3://bucket", bucket))
    told = []
    ReportFile("spectral", told.append).append(trainer_in("s3://bucket", bucket), report(layer("a"), step=0))
    reason = "default_root_dir=s3://bucket is not on this machine"
    assert told == [f"spectra.jsonl could not be written: {reason}; {REMEDY}"]


class Failing(Tiny):
    def spectral_loss(self, batch):
        raise RuntimeError("no loss")


class Never(SpectralProbe):
    def should_measure(self, step):
        return False


@pytest.mark.parametrize(
    ("probe", "module", "options"),
    [
        (SpectralProbe(keep_reports=False), Tiny, {}),
        (Never(min_probes=0), Tiny, {}),
        (SpectralProbe(), Failing, {}),
        (SpectralProbe(), Tiny, {"fast_dev_run": True}),
    ],
    ids=["unwanted", "before the first probe", "failed", "fast_dev_run"],
)
def test_nothing_is_written(tmp_path, probe, module, options):
    fit_tiny(probe, module(), steps=2, default_root_dir=tmp_path, **options)
    assert files_below(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path):
    measured = report(layer("a"), step=0)
    for is_zero, files in ((False, []), (True, ["spectra.jsonl"])):
        trainer = trainer_in(tmp_path)
        trainer.is_global_zero = is_zero
        write = SpectralProbe().outputs.write
        write(trainer, 0, [measured], (1, 0), report=measured, alphas={}, later=[])
        assert files_below(tmp_path) == files


def test_each_probe_of_a_trainer_has_a_file(tmp_path):
    probes = [SpectralProbe(prefix=prefix, top_k=3) for prefix in ("spectral", "a/b", "a-b", "a b")]
    fit(Tiny(), probes, data=Repeated(batch_of()), batch_size=None, steps=1, default_root_dir=tmp_path)
    files = [tmp_path / probe.outputs.file.name for probe in probes]
    assert files_below(tmp_path) == sorted(file.name for file in files)
    for probe, file in zip(probes, files, strict=True):
        assert as_dicts(read_reports(file)) == as_dicts(probe.history)


@pytest.mark.parametrize("torn", ["", "step", "report"])
def test_a_resumed_run_goes_on_in_the_same_file(tmp_path, torn):
    def train(probe, steps, **options):
        logger = CSVLogger(tmp_path, version=0)
        return fit_tiny(probe, steps=steps, logger=[logger], default_root_dir=tmp_path, **options)

    first, second = SpectralProbe(every_n_steps=2), SpectralProbe(every_n_steps=2)
    trainer = train(first, 5)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    (path,) = tmp_path.rglob("spectra.jsonl")
    whole = path.read_bytes()
    # The run was killed in mid-line: of the step after the last probe, or of its report.
    *_, report_line, step_line = whole.splitlines(keepends=True)
    path.write_bytes(whole[: len(whole) - {"": 0, "step": 1, "report": len(step_line) + len(report_line) // 2}[torn]])
    train(second, 9, ckpt_path=tmp_path / "five.ckpt")
    kept = first.history[: 2 if torn == "report" else 3] + second.history
    assert [one.step for one in kept] == [0, 2, *([] if torn == "report" else [4]), 6, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpectralWarning)
        assert as_dicts(read_reports(path)) == as_dicts(kept)
        assert [one.step for one in read_steps(path)] == [0, 2, *([] if torn else [4]), 6, 8]
    assert files_below(tmp_path) == ["lightning_logs/version_0/spectra.jsonl"]


def test_a_run_anew_in_one_folder_has_a_file_of_its_own(tmp_path, caplog):
    probes = [SpectralProbe(every_n_steps=n) for n in (2, 3, 4)]
    with caplog.at_level("INFO", "lightning_spectral"):
        for probe in probes:
            fit_tiny(probe, steps=7, default_root_dir=tmp_path)
    assert files_below(tmp_path) == ["earlier-1-spectra.jsonl", "earlier-2-spectra.jsonl", "spectra.jsonl"]
    for probe, name in zip(probes, files_below(tmp_path), strict=True):
        assert as_dicts(read_reports(tmp_path / name)) == as_dicts(probe.history)
    aside = tmp_path / "earlier-2-spectra.jsonl"
    assert f"{tmp_path / 'spectra.jsonl'} is of an earlier run, and is now {aside}" in caplog.messages
    # The folder's run is the last; an earlier one is read by its file.
    assert [step.report.step for step in read_run([tmp_path]).steps] == [0, 4]
    assert [step.report.step for step in read_run([aside]).steps] == [0, 3, 6]


def told_of(file, probe, folder):
    with pytest.warns(SpectralWarning) as caught:
        trainer = fit_tiny(probe, steps=4, default_root_dir=folder)
    assert (trainer.global_step, probe.failed_probes, len(probe.history)) == (4, 0, 4)
    return [str(w.message) for w in caught if str(file) in str(w.message)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
def test_a_full_disk_costs_the_reports_and_one_warning(tmp_path):
    path = tmp_path / "spectra.jsonl"
    path.symlink_to("/dev/full")
    (text,) = told_of(path, SpectralProbe(every_n_steps=1), tmp_path)
    assert text == f"{path} could not be written: No space left on device; {REMEDY}"


def test_a_disk_that_has_room_again_gets_the_next_report(tmp_path, monkeypatch):
    path, append = tmp_path / "spectra.jsonl", report_file.append_report

    def append_in_part(path, one):
        if one.step == 1:
            # A full disk takes a part of the line.
            append(path, one)
            path.write_bytes(path.read_bytes()[:-40])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, one)

    monkeypatch.setattr(report_file, "append_report", append_in_part)
    probe = SpectralProbe(every_n_steps=1)
    assert len(told_of(path, probe, tmp_path)) == 1
    assert as_dicts(read_reports(path)) == as_dicts(one for one in probe.history if one.step != 1)


def test_a_read_only_folder_costs_the_reports_and_one_warning(tmp_path, monkeypatch):
    # A superuser may write anywhere, so the error is made by hand.
    before = Path.open

    def refused(self, mode="r", *args, **kwargs):
        if self.name == "spectra.jsonl" and "a" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return before(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    (text,) = told_of(tmp_path / "spectra.jsonl", SpectralProbe(every_n_steps=1), tmp_path)
    assert text.endswith(f"could not be written: Read-only file system; {REMEDY}")


def test_a_folder_that_is_a_file_costs_the_reports_and_one_warning(tmp_path):
    (tmp_path / "taken").write_text("")
    logger = SimpleNamespace(log_dir=str(tmp_path / "taken"))
    told, measured = [], report(layer("a"), step=0)
    ReportFile("spectral", told.append).append(trainer_in(tmp_path, logger), measured)
    ReportFile("spectral", told.append).append(trainer_in(tmp_path, logger), replace(measured, step=1))
    assert len(set(told)) == 1
    assert str(tmp_path / "taken" / "spectra.jsonl") in told[0]


def test_writing_counts_as_probing(tmp_path, monkeypatch):
    now = [0.0]

    def slow(path, one):
        now[0] += 2.0

    monkeypatch.setattr(report_file, "append_report", slow)
    probe = SpectralProbe(every_n_steps=1)
    probe.budget.clock = lambda: now[0]
    fit_tiny(probe, steps=3, default_root_dir=tmp_path)
    assert probe.budget.probe_seconds == 6.0
