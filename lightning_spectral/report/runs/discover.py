"""Which files of a path are a run's, and what reads each of them."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_spectral._messages import join_names
from lightning_spectral._serialization import UNREADABLE
from lightning_spectral.records.report import FORMAT
from lightning_spectral.report.runs.run import RunError

READABLE = (
    "a CSVLogger's folder or metrics.csv, an offline W&B run's folder or .wandb file, a TensorBoardLogger's folder or "
    "event file, a checkpoint of a Trainer with a SpectralProbe, or JSON reports"
)

LOGS = ("CSV log", "W&B run", "TensorBoard log")
"""Of the same scalars logged twice one log will do: the first of these, which holds most."""

Found = tuple[str, Path]
"""What reads it, and the file; of TensorBoard, whose runs have several, their folder."""


def find(paths: Iterable[str | Path]) -> tuple[list[Found], list[str]]:
    """The files to read of all paths, each once, and what lies beside them and is not read.

    Raises:
        RunError: if a path is not there, or holds no run or several.
    """
    found: dict[Path, Found] = {}
    left_out: list[str] = []
    for path in paths:
        items, beside = _find(Path(path))
        for item in items:
            found.setdefault(item[1].resolve(), item)
        left_out += beside
    return list(found.values()), left_out


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """What tells paths apart: the last part of each, or as many as it takes.

    >>> short_names(["a/step-1/spectra.json", "a/step-2/spectra.json"])
    ['step-1/spectra.json', 'step-2/spectra.json']
    """
    parts = [Path(path).resolve().parts for path in paths]
    enough = (n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(set(parts)))
    n = next(enough)
    return ["/".join(p[-n:]) for p in parts]


def natural_sort_key(value: object) -> list[tuple[int, int, str]]:
    """A key that sorts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", str(value))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _find(path: Path) -> tuple[list[Found], list[str]]:
    if not path.exists():
        raise RunError(f"{path}: no such file or folder")
    if path.is_file():
        return [(_reader_of(path), path)], []
    own, left_out = _in_folder(path.iterdir())
    if own:
        return own, left_out
    below, left_out = _in_folder(file for file in path.rglob("*") if _is_log(file) or file.suffix == ".ckpt")
    # Lightning keeps checkpoints below its log's folder; which of them is the run's is not for us to guess.
    below = [item for item in below if item[0] != "checkpoint"] or below
    if len(below) == 1:
        return below, left_out
    if below:
        raise RunError(f"{path} holds several runs, name one: {join_names([str(file) for _, file in below])}")
    raise RunError(f"{path} holds no run; give {READABLE}")


def _in_folder(files: Iterable[Path]) -> tuple[list[Found], list[str]]:
    found: dict[str, dict[Path, None]] = {}
    for file in sorted(files, key=natural_sort_key):
        if _is_log(file) or file.suffix == ".ckpt":
            reader = _reader_of(file)
            found.setdefault(reader, {})[file.parent if reader == "TensorBoard log" else file] = None
        elif file.suffix == ".json" and _is_report(file):
            found.setdefault("JSON report", {})[file] = None
    first, *others = [log for log in LOGS if log in found] or [""]
    left_out = [
        f"{log} {file}: taken for the same scalars as the {first}; name its file to have it read"
        for log in others
        for file in found.pop(log)
    ]
    return [(reader, file) for reader, files in found.items() for file in files], left_out


def _is_log(file: Path) -> bool:
    return file.name == "metrics.csv" or file.suffix == ".wandb" or ".tfevents." in file.name


def _reader_of(path: Path) -> str:
    if ".tfevents." in path.name:
        return "TensorBoard log"
    reader = {".csv": "CSV log", ".wandb": "W&B run", ".json": "JSON report"}.get(path.suffix.lower())
    if reader is None and (path.suffix.lower() in (".ckpt", ".pt", ".pth") or zipfile.is_zipfile(path)):
        reader = "checkpoint"
    if reader is None:
        raise RunError(f"{path}: not a file that can be read; give {READABLE}")
    return reader


def _is_report(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (*UNREADABLE, OSError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT
