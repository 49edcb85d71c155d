"""Read runs from the paths that a user names; how each was measured, and their last alphas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_spectral._messages import join_names
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.palette import MOST_RUNS
from lightning_spectral.report.runs.discover import find_files, run_folder, short_names
from lightning_spectral.report.runs.read import read_run
from lightning_spectral.report.runs.run import Run, RunError
from lightning_spectral.report.terminal.tables import method_of


def read_runs(paths: Sequence[str | Path], *, prefix: str | None = None) -> list[Run]:
    """Read the runs that paths hold: of each folder, and of each ``.jsonl`` file, one.

    Files of JSON reports and checkpoints are together one run, or belong to the only folder given.

    Args:
        paths: as `read_run` takes them; ``NAME=PATH`` gives a run a name, else it is what tells its folder from others.
        prefix: of the probe's keys, where a run holds those of several probes.

    Raises:
        RunError: as `read_run`; if there are files of which it is not known to which of several runs they belong; or if
            there are more runs than can be told apart.
    """
    inputs = [named_path(str(path)) for path in paths]
    of_runs = [pair for pair in inputs if _is_run(pair[1])]
    if len(of_runs) < 2:
        names = [name for name, _ in inputs if name]
        if len(names) > 1:
            raise RunError(f"{join_names(names)}: files are one run, which has one name; give the folder of each run")
        run = read_run([path for _, path in inputs], prefix=prefix)
        return [replace(run, name=names[0])] if names else [run]
    if rest := [str(path) for _, path in inputs if not _is_run(path)]:
        raise RunError(f"{join_names(rest)}: to which of {len(of_runs)} runs does it belong? Give their folders alone")
    if len(of_runs) > MOST_RUNS:
        raise RunError(f"{len(of_runs)} runs cannot be told apart on one page; give at most {MOST_RUNS}")
    # A folder and the file in it are one run.
    found = {tuple(file.path.resolve() for file in find_files([path], prefix)): (name, path) for name, path in of_runs}
    runs = [read_run([path], prefix=prefix) for _, path in found.values()]
    own = run_names([run_folder(files[0]) for files in found]) if len(found) > 1 else [runs[0].name]
    names = [name or own[i] for i, (name, _) in enumerate(found.values())]
    if len(set(names)) < len(names):
        raise RunError(f"two runs have one name, {join_names(names)}; give each its own, NAME=RUN")
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return what tells folders apart: the parts of their paths that not all of them share.

    >>> run_names([Path("/logs/adamw/version_0"), Path("/logs/muon/version_0")])
    ['adamw', 'muon']
    >>> run_names([Path("/logs/adamw"), Path("/logs/muon/late"), Path("/logs/muon")])
    ['adamw', 'muon/late', 'muon']
    """
    parts = [folder.parts for folder in folders]
    if len(set(parts)) < 2:
        return [folder.name for folder in folders]
    start = next(i for i in range(max(map(len, parts))) if len({p[i : i + 1] for p in parts}) > 1)
    inner = [p[start:] for p in parts]
    end = 0
    while all(len(p) > end + 1 for p in inner) and len({p[-1 - end] for p in inner}) == 1:
        end += 1
    names = ["/".join(p[: len(p) - end]) for p in inner]
    return names if all(names) and len(set(names)) == len(names) else short_names(folders)


def named_path(text: str) -> tuple[str, Path]:
    """Return a name, empty without one, and a path; names of checkpoints hold an equals sign, too.

    >>> named_path("muon=logs/version_3")[0], named_path("logs/epoch=1.ckpt")[0]
    ('muon', '')
    """
    name, equals, path = text.partition("=")
    if equals and name and path and not Path(text).exists() and "/" not in name:
        return name, Path(path)
    return "", Path(text)


def _is_run(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".jsonl"


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
        shared = first.steps[-1].report.layers.keys() & other.steps[-1].report.layers.keys()
        why = "no layer has an alpha to trust in both" if shared else "they have no layer in common"
        return f"{other.name} against {first.name}: {why}."
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
