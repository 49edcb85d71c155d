"""`ReportFile`: a probe's reports, and the steps after them, in the run's folder, a line each in ``spectra.jsonl``."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_spectral._serialization import UNREADABLE
from lightning_spectral.callbacks._lightning import optimizer_steps
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.records.step import StepMeasurement
from lightning_spectral.report.runs.spectra_file import append_report, append_step, spectra_file_name

logger = logging.getLogger(__name__)


class ReportFile:
    """File that grows by a line per report or step, and goes on in a resumed run whose logger has the same folder.

    An error of writing is warned about once and costs that line; training goes on.

    The prefix of the probe's keys names it: each probe of a Trainer has its own.
    """

    def __init__(self, prefix: str, warn: Callable[[str], None]) -> None:
        self.name, self.warn = spectra_file_name(prefix), warn
        self.path: Path | None = None
        self._begins = False

    def start(self, trainer: Any) -> None:
        """Begin a run. One that begins at step 0 has a file of its own, also in the folder of another."""
        self.path, self._begins = None, optimizer_steps(trainer) == 0

    def append(self, trainer: Any, record: SpectralReport | StepMeasurement) -> None:
        """Append a report, or the step after it; call it on rank 0 only.

        Runs that leave no logs (fast_dev_run, barebones) leave no file.
        """
        if trainer.fast_dev_run or getattr(trainer, "barebones", False):
            return
        path = Path(self.name)
        try:
            path = run_folder(trainer) / self.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._begins:
                set_aside(path)
                self._begins = False
            if isinstance(record, StepMeasurement):
                append_step(path, record)
            else:
                append_report(path, record)
            self.path = path
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            self.warn(
                f"{path} could not be written: {reason}; free space, make the folder writable or set the Trainer's "
                "default_root_dir, else it lacks this report; keep_reports=False writes no file"
            )


def set_aside(path: Path) -> None:
    """Rename the file of an earlier run, if there is one, to the first free ``earlier-<n>-<name>``.

    It can be read by that name, and is not taken for the run's own in its folder.
    """
    if path.is_file():
        aside = next(
            free for n in itertools.count(1) if not (free := path.with_name(f"earlier-{n}-{path.name}")).exists()
        )
        path.rename(aside)
        logger.info("%s is of an earlier run, and is now %s", path, aside)


def run_folder(trainer: Any) -> Path:
    """Return the folder of a run on this machine: the first logger's that has one, else default_root_dir.

    `Trainer.log_dir` is a collective: on rank 0 alone it would hang.
    """
    for folder in (*map(_logger_folder, trainer.loggers), trainer.default_root_dir):
        if folder and "://" not in str(folder):
            return Path(folder)
    raise ValueError(f"default_root_dir={trainer.default_root_dir} is not on this machine")


def saved_report(saved: dict[str, Any] | None, warn: Callable[[str], None]) -> SpectralReport | None:
    """Return the report in a checkpoint; None without one, and with a warning for one that cannot be read."""
    try:
        return None if saved is None else SpectralReport.from_dict(saved)
    except UNREADABLE as error:
        warn(f"the checkpoint's last report cannot be read ({error}); none until the next probe")
        return None


def _logger_folder(logger: Any) -> Any:
    """Return a logger's folder: `log_dir` of CSV, TensorBoard and others; W&B's, whose files are uploaded; or None."""
    if any(base.__name__ == "WandbLogger" for base in type(logger).__mro__):
        run = logger.experiment
        return None if getattr(run, "disabled", False) else run.dir
    return getattr(logger, "log_dir", None)
