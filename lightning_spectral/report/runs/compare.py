"""Runs beside each other: how each was measured, where that differs, and their last alphas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.runs.run import Run
from lightning_spectral.report.terminal.tables import method_of

OPTIONS: dict[str, Callable[[SpectralReport], str]] = {
    "mode": lambda report: report.mode,
    "method": method_of,
    "precision": lambda report: report.precision,
    "directions": lambda report: str(report.top_k),
}
"""How a report was measured, beside its samples."""

SAMPLES: dict[str, Callable[[SpectralReport], int | None]] = {
    "gradient samples": lambda report: report.n_samples,
    "curvature samples": lambda report: report.curvature_samples or report.n_samples,
}


def options_of(run: Run) -> dict[str, str]:
    """Return how a run was measured: name -> value, or values where probes differ."""
    reports = [step.report for step in run.steps]
    samples = {name: _range(_samples(run, read)) for name, read in SAMPLES.items()}
    return samples | {name: ", ".join(dict.fromkeys(map(read, reports))) for name, read in OPTIONS.items()}


def differences(runs: Sequence[Run]) -> list[str]:
    """Return in which options runs differ, a line each: alphas may then differ for that alone.

    Numbers of samples that a probe chooses move from probe to probe; they differ where two runs' ranges do not meet.
    """
    measured = [options_of(run) for run in runs]
    apart = [name for name in OPTIONS if len({options[name] for options in measured}) > 1]
    for name, read in reversed(SAMPLES.items()):
        ranges = [(min(counts), max(counts)) for run in runs if (counts := _samples(run, read))]
        if ranges and max(low for low, _ in ranges) > min(high for _, high in ranges):
            apart.insert(0, name)
    return [
        f"{name}: " + ", ".join(f"{options[name]} in {run.name}" for run, options in zip(runs, measured, strict=True))
        for name in apart
    ]


def comparison(runs: Sequence[Run]) -> list[str]:
    """Return the last alphas of several runs in sentences: of each against the first."""
    return [_against(runs[0], run) for run in runs[1:]]


def _against(first: Run, other: Run) -> str:
    before, after = _alphas(first), _alphas(other)
    changes = sorted(after[name] - before[name] for name in after if name in before)
    if not changes:
        return f"{other.name} against {first.name}: no layer has an alpha to trust in both."
    higher, n = sum(change > 0 for change in changes), len(changes)
    return (
        f"{other.name} against {first.name}: the last alpha is higher in {higher} of {n} layers to trust in both; the "
        f"change is {median(changes):+.2f} in the median, from {changes[0]:+.2f} to {changes[-1]:+.2f}."
    )


def _alphas(run: Run) -> dict[str, float]:
    report = run.steps[-1].report
    return {name: report.layers[name].alpha.exponent for name in report.trusted}


def _samples(run: Run, read: Callable[[SpectralReport], int | None]) -> list[int]:
    return [count for step in run.steps if (count := read(step.report)) is not None]


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return "unknown"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
