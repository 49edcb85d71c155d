"""Find the files of a run below the paths that a user names."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_spectral._messages import join_names
from lightning_spectral._serialization import UNREADABLE
from lightning_spectral.records.report import FORMAT
from lightning_spectral.report.runs.run import RunError
from lightning_spectral.report.runs.spectra_file import spectra_file_name

SPECTRA, REPORT, CHECKPOINT = "spectra file", "JSON report", "checkpoint"
"""Kinds of files that are read."""

_KIND = {".jsonl": SPECTRA, ".json": REPORT, ".ckpt": CHECKPOINT, ".pt": CHECKPOINT, ".pth": CHECKPOINT}
_READABLE = (
    "a run's folder with the spectra.jsonl that SpectralProbe(keep_reports=True) writes, that file, a checkpoint of a "
    "Trainer with a SpectralProbe, or JSON of SpectralReport.to_json"
)


@dataclass(frozen=True)
class RunFile:
    """File to read: its kind, its path, and a remark on why it was taken."""

    kind: str
    path: Path
    remark: str = ""


def find_files(paths: Iterable[str | Path], prefix: str | None = None) -> list[RunFile]:
    """Return the files of all paths, each once.

    Args:
        paths: files, or folders that hold a run: the newest ``spectra.jsonl`` in or below it (a W&B run's is in its
            ``files``), else checkpoints. JSON reports in a folder itself come before files below it.
        prefix: of the probe's keys, where a run holds the files of several probes.
    """
    files: dict[Path, RunFile] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise RunError(f"{path}: no such file or folder")
        for file in [_file(path)] if path.is_file() else _in_folder(path, prefix):
            files.setdefault(file.path.resolve(), file)
    return list(files.values())


def run_folder(file: Path) -> Path:
    """Return the folder of the run that a file is of; files of a W&B run lie in a folder within it.

    >>> run_folder(Path("wandb/offline-run-1/files/spectra.jsonl")).name
    'offline-run-1'
    """
    return file.parent.parent if file.parent.name == "files" else file.parent


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Return the last parts of each path, as many as tell all paths apart.

    >>> short_names(["a/step-1/spectra.json", "a/step-2/spectra.json"])
    ['step-1/spectra.json', 'step-2/spectra.json']
    """
    parts = [Path(path).resolve().parts for path in paths]
    enough = (n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(set(parts)))
    n = next(enough)
    return ["/".join(p[-n:]) for p in parts]


def natural_sort_key(value: object) -> list[tuple[int, int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", str(value))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _file(path: Path) -> RunFile:
    if _is_log(path):
        raise RunError(f"{path}: a log holds scalars only and is not read; give {_READABLE}")
    kind = _KIND.get(path.suffix.lower()) or (CHECKPOINT if zipfile.is_zipfile(path) else "")
    if not kind:
        raise RunError(f"{path}: not a file that can be read; give {_READABLE}")
    return RunFile(kind, path)


def _in_folder(folder: Path, prefix: str | None) -> list[RunFile]:
    spectra = list(folder.rglob("spectra*.jsonl"))
    if any(file.parent == folder for file in spectra):
        return [_newest(folder, spectra, prefix)]
    files = sorted(folder.iterdir(), key=natural_sort_key)
    checkpoints = [RunFile(CHECKPOINT, file) for file in files if file.suffix == ".ckpt"]
    if reports := [RunFile(REPORT, file) for file in files if file.suffix == ".json" and _is_report(file)]:
        return reports + checkpoints
    if spectra:
        return [_newest(folder, spectra, prefix)]
    if checkpoints:
        return checkpoints
    below = sorted(folder.rglob("*.ckpt"), key=natural_sort_key)
    # Which of a run's checkpoints below its folder is meant is not ours to guess.
    if len(below) > 1:
        raise RunError(f"{folder} holds several checkpoints, name one: {join_names([str(file) for file in below])}")
    if below:
        return [RunFile(CHECKPOINT, below[0])]
    if any(_is_log(file) for file in folder.rglob("*")):
        raise RunError(
            f"{folder} holds a log, whose scalars are not read back, and no spectra.jsonl: give the folder of the "
            "Trainer's first logger, train with SpectralProbe(keep_reports=True), or give a checkpoint or a JSON report"
        )
    raise RunError(f"{folder} holds no run; give {_READABLE}")


def _newest(folder: Path, files: Sequence[Path], prefix: str | None) -> RunFile:
    """Return the spectra file of the run that was written to last."""
    named = [file for file in files if prefix is None or file.name == spectra_file_name(prefix)]
    if not named:
        raise RunError(
            f"{folder} holds no {spectra_file_name(str(prefix))}, of a probe with the prefix {prefix!r}, but "
            f"{join_names(sorted(map(str, files)))}"
        )
    newest = max(named, key=lambda file: (file.stat().st_mtime, natural_sort_key(file)))
    if len(probes := [str(file) for file in named if file.parent == newest.parent]) > 1:
        raise RunError(f"{newest.parent} holds several probes, name the file of one: {join_names(sorted(probes))}")
    runs = len({file.parent for file in named})
    return RunFile(SPECTRA, newest, f", the newest of {runs} runs in {folder}" if runs > 1 else "")


def _is_log(file: Path) -> bool:
    return file.name == "metrics.csv" or file.suffix == ".wandb" or ".tfevents." in file.name


def _is_report(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (*UNREADABLE, OSError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT
