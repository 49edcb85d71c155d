"""Runs beside each other: how each was measured, where that differs, and their last alphas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_spectral._messages import join_names
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
    return [f"{name}: {_by_value(runs, [options[name] for options in measured])}" for name in apart]


def _by_value(runs: Sequence[Run], values: Sequence[str]) -> str:
    """Return each value with the runs that have it."""
    names: dict[str, list[str]] = {}
    for run, value in zip(runs, values, strict=True):
        names.setdefault(value, []).append(run.name)
    return "; ".join(f"{value} in {join_names(of)}" for value, of in names.items())


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
        f"change is {_signed(median(changes))} in the median, from {_signed(changes[0])} to {_signed(changes[-1])}."
    )


def _signed(change: float) -> str:
    """Return a change with its sign; nothing has none.

    >>> _signed(0.2), _signed(-0.001)
    ('+0.20', '0.00')
    """
    text = f"{change:+.2f}"
    return "0.00" if float(text) == 0 else text


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
