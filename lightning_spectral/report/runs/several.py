"""Read one run or several from the paths that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_spectral._messages import join_names
from lightning_spectral.report.palette import MOST_RUNS
from lightning_spectral.report.runs.discover import find_files, run_folder, short_names
from lightning_spectral.report.runs.read import read_run
from lightning_spectral.report.runs.run import Run, RunError


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
