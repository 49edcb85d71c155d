"""Run as a page shows it: its reports in the order of training."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_spectral.errors import first_line
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.records.step import StepMeasurement


class RunError(ValueError):
    """Run that cannot be read or shown; the message says what to do."""


def explain(error: BaseException) -> str:
    """Return the first line of an error that says something.

    >>> explain(KeyError("sigma")), explain(ValueError("no report")), explain(RecursionError())
    ("no 'sigma'", 'no report', 'RecursionError')
    """
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}"
    return first_line(error).removeprefix(f"{type(error).__name__}: ")


@dataclass(frozen=True, eq=False)
class RunStep:
    """One report of a run.

    Attributes:
        label: its name on the page, "step 60" or, outside training, that of a file.
        update: the optimizer's step after it; None where it was not measured.
    """

    label: str
    report: SpectralReport
    update: StepMeasurement | None = None

    @classmethod
    def of(cls, report: SpectralReport, label: str, update: StepMeasurement | None = None) -> RunStep:
        """Return a report as a step of a run; ``label`` is its name outside training."""
        return cls(label if report.step is None else f"step {report.step}", report, update)

    @property
    def step(self) -> int | None:
        """Optimizer steps before the report; None outside training."""
        return self.report.step


@dataclass(frozen=True, eq=False)
class Run:
    """Reports of one run in the order of training.

    Attributes:
        sources: files that it was read from.
        steps: the reports, those outside training first.
        omissions: parts of the files that are not among the steps, and why.
    """

    name: str
    sources: tuple[str, ...]
    steps: tuple[RunStep, ...]
    omissions: tuple[str, ...] = ()
