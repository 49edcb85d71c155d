"""Runs as a page shows them: from CSV logs, W&B's offline files, checkpoints and JSON reports."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_spectral.encoding import UNREADABLE
from lightning_spectral.errors import refused, some_of
from lightning_spectral.record import FORMAT, SpectralReport
from lightning_spectral.report.layers_csv import QUANTITIES, layer_tables, read_tables, with_tables
from lightning_spectral.report.run import Probe, Run, RunError

MARK = "layers_measured"
"""Every probe logs it, so that the keys that end in it tell the prefixes in a log."""

READABLE = (
    "a CSVLogger's folder or metrics.csv, an offline W&B run's folder or .wandb file, a checkpoint of a Trainer with a "
    "SpectralProbe, or JSON reports"
)


def run_of(reports: Iterable[SpectralReport], name: str) -> Run:
    """A run of whole reports, such as a probe's `history`."""
    reports = list(reports)
    probes = [Probe.of(report, f"report {i}") for i, report in enumerate(reports, start=1)]
    return Run(name, (f"{len(reports)} report{'s' if len(reports) != 1 else ''}",), tuple(_in_order(probes)))


def read_run(paths: Sequence[str | Path], *, prefix: str | None = None) -> Run:
    """Read one run from one path or several; of one step, a whole report counts before a log's scalars.

    Args:
        paths: each a CSV log, an offline W&B run, a checkpoint, a JSON report, or a folder of one of these.
        prefix: of the probe's keys, where a run holds those of several probes.

    Raises:
        RunError: if there is nothing to read, or not what it looks like.
    """
    found = [item for path in paths for item in _find(Path(path))]
    probes: list[Probe] = []
    for reader, file in found:
        probes += _READERS[reader](file, prefix)
    if not probes:
        raise RunError(f"{_shown(paths)}: the probe measured nothing in this run")
    if not any(probe.layers for probe in probes):
        raise RunError(
            f"{_shown(paths)}: medians but no layers (log_layers='none'); log_tables=True, a checkpoint or JSON "
            "reports hold the layers"
        )
    first = Path(paths[0]).resolve()
    name = first.name if first.is_file() else "/".join(first.parts[-2:])
    return Run(name, _sources(found), tuple(_in_order(probes)))


def _sources(found: Sequence[tuple[str, Path]]) -> tuple[str, ...]:
    """Where a run is from, several files of a folder in one."""
    groups: dict[tuple[str, Path], list[Path]] = {}
    for reader, file in found:
        groups.setdefault((reader, file.parent), []).append(file)
    return tuple(
        f"{reader} {files[0]}" if len(files) == 1 else f"{len(files)} {reader}s in {folder}"
        for (reader, folder), files in groups.items()
    )


def _find(path: Path) -> list[tuple[str, Path]]:
    """The files to read with each one's reader."""
    if not path.exists():
        raise RunError(f"{path}: no such file or folder")
    if path.is_file():
        return [(_reader_of(path), path)]
    if own := _in_folder(path.iterdir()):
        return own
    below = _in_folder(file for file in path.rglob("*") if file.suffix in (".csv", ".wandb", ".ckpt"))
    # Lightning keeps checkpoints below its log's folder; which of them is the run's is not for us to guess.
    below = [item for item in below if item[0] != "checkpoint"] or below
    if len(below) == 1:
        return below
    if below:
        raise RunError(f"{path} holds several runs, name one: {some_of([str(file) for _, file in below])}")
    raise RunError(f"{path} holds no run; give {READABLE}")


def _in_folder(files: Iterable[Path]) -> list[tuple[str, Path]]:
    found: dict[str, list[Path]] = {}
    for file in sorted(files, key=_natural):
        if file.name == "metrics.csv" or file.suffix in (".wandb", ".ckpt"):
            found.setdefault(_reader_of(file), []).append(file)
        elif file.suffix == ".json" and _is_report(file):
            found.setdefault("JSON report", []).append(file)
    # Checkpoints beside a log add to it; of the same scalars logged twice, one log will do.
    if "CSV log" in found:
        found.pop("W&B run", None)
    return [(reader, file) for reader, files in found.items() for file in files]


def _reader_of(path: Path) -> str:
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


def _read_json(path: Path, prefix: str | None) -> list[Probe]:
    try:
        return [Probe.of(SpectralReport.from_json(path), path.stem)]
    except (*UNREADABLE, OSError) as error:
        raise RunError(f"{path}: no report that can be read ({_why(error)})") from error


def _read_checkpoint(path: Path, prefix: str | None) -> list[Probe]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Whatever bytes may raise in torch.load.
        raise RunError(
            f"{path}: no checkpoint that loads with weights_only=True ({refused(error) or _why(error)}); "
            "a CSV log, or JSON of probe.last_report, can be read instead"
        ) from error
    callbacks = data.get("callbacks") if isinstance(data, dict) else None
    kept = callbacks.items() if isinstance(callbacks, dict) else ()
    states = {k: v for k, v in kept if str(k).startswith("SpectralProbe{") and isinstance(v, dict)}
    by_prefix = {_prefix_of(str(key)): state for key, state in states.items()}
    state = by_prefix[_choose(path, by_prefix, prefix, "is no checkpoint of a Trainer with a SpectralProbe")]
    saved = state.get("last_report")
    if saved is None:
        return []
    try:
        return [Probe.of(SpectralReport.from_dict(saved), path.stem)]
    except UNREADABLE as error:
        raise RunError(f"{path}: its report cannot be read ({_why(error)})") from error


def _prefix_of(state_key: str) -> str:
    match = re.fullmatch(r"SpectralProbe\{'prefix': (['\"])(.*)\1\}", state_key)
    return match.group(2) if match else state_key


def _read_csv(path: Path, prefix: str | None) -> list[Probe]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"{path}: no CSV file that can be read ({_why(error)})") from error
    chosen = _probe_in(path, rows, prefix)
    return with_tables(_logged(path, rows, "step", chosen), read_tables(layer_tables(path, chosen)))


def wandb_records(path: str | Path) -> list[dict[str, Any]]:
    """All that an offline run's file holds, in its order, as W&B's own command prints it.

    Raises:
        RunError: if there is no such command, or it cannot read the file.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(Path(path).absolute())]
    # Offline, it reports nothing to anyone.
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    # Python's -m looks into the current folder first, which may hold a wandb.py, or W&B's own folder of runs.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, capture_output=True, check=False, encoding="utf-8", errors="replace", env=environment, cwd=folder
        )
    if done.returncode:
        missing = "No module named" in done.stderr or "No such" in done.stderr
        what = (
            "reading it needs `wandb leet inspect` of W&B 0.28: pip install --upgrade wandb"
            if missing
            else f"no W&B run that can be read ({_why(done.stderr)})"
        )
        raise RunError(f"{path}: {what}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _read_wandb(path: Path, prefix: str | None) -> list[Probe]:
    """The history in an offline run's file."""
    rows = [record["history"].get("item", {}) for record in wandb_records(path) if record.get("type") == "history"]
    return _logged(path, rows, "trainer/global_step", _probe_in(path, rows, prefix))


def _probe_in(path: Path, rows: Sequence[Mapping[str, Any]], prefix: str | None) -> str:
    """The prefix of the probe whose keys are read."""
    marks = {key.removesuffix(f"/{MARK}") for row in rows for key in row if key.endswith(f"/{MARK}")}
    return _choose(path, marks, prefix, "holds nothing that a SpectralProbe logged")


def _logged(path: Path, rows: Sequence[Mapping[str, Any]], step_key: str, chosen: str) -> list[Probe]:
    """The probes in the rows of a log. Their layers are in the order of their names: its scalars keep no other."""
    probes: list[Probe] = []
    for row in rows:
        layers = _layers_in(path, row, f"{chosen}/")
        measured = _number(path, row, f"{chosen}/{MARK}")
        # A probe that measured nothing logs NaN.
        if f"{chosen}/alpha_median" not in row or (not layers and measured != measured):
            continue
        step = _number(path, row, step_key)
        counted = (_number(path, row, f"{chosen}/{key}") for key in (MARK, "layers_failed"))
        n_layers = sum(int(value) for value in counted if math.isfinite(value))
        loss = _number(path, row, f"{chosen}/loss")
        whole = int(step) if math.isfinite(step) else None
        label = f"probe {len(probes) + 1}" if whole is None else f"step {whole}"
        probes.append(Probe(whole, label, loss, layers, None, max(n_layers, len(layers))))
    return probes


def _layers_in(path: Path, row: Mapping[str, Any], prefix: str) -> dict[str, dict[str, float]]:
    layers: dict[str, dict[str, float]] = {}
    for key in sorted(row, key=_natural):
        name, _, quantity = key.removeprefix(prefix).rpartition("/")
        if key.startswith(prefix) and name and quantity in QUANTITIES:
            layers.setdefault(name, {})[quantity] = _number(path, row, key)
    return layers


def _number(path: Path, row: Mapping[str, Any], key: str) -> float:
    try:
        return float(row.get(key, "nan"))
    except (TypeError, ValueError) as error:
        raise RunError(f"{path}: {key} should be a number, got {row[key]!r}") from error


def _choose(path: Path, prefixes: Iterable[str], prefix: str | None, nothing: str) -> str:
    known = sorted(prefixes)
    if not known:
        raise RunError(f"{path} {nothing}")
    if prefix is None and len(known) > 1:
        raise RunError(f"{path} holds several probes; choose one with --prefix: {some_of(known)}")
    if prefix is not None and prefix not in known:
        raise RunError(f"{path} holds no probe with the prefix {prefix!r}, but {some_of(known)}")
    return known[0] if prefix is None else prefix


def _in_order(probes: Sequence[Probe]) -> list[Probe]:
    """One probe per step, the last one given and whole reports before scalars; those outside training first."""
    by_step: dict[int, Probe] = {}
    for probe in probes:
        if probe.step is not None and (probe.report is not None or not _whole(by_step.get(probe.step))):
            by_step[probe.step] = probe
    return [probe for probe in probes if probe.step is None] + [by_step[step] for step in sorted(by_step)]


def _whole(probe: Probe | None) -> bool:
    return probe is not None and probe.report is not None


def _natural(value: object) -> list[tuple[int, int, str]]:
    """A key that sorts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", str(value))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _why(error: object) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else text[:200]


def _shown(paths: Sequence[str | Path]) -> str:
    return some_of([str(path) for path in paths])


_READERS: dict[str, Callable[[Path, str | None], list[Probe]]] = {
    "CSV log": _read_csv,
    "W&B run": _read_wandb,
    "checkpoint": _read_checkpoint,
    "JSON report": _read_json,
}
