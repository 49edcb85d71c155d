"""Runs as a page shows them: from CSV logs, W&B's offline files, TensorBoard's, checkpoints and JSON reports."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_spectral._messages import join_names, unpickling_refusal
from lightning_spectral._serialization import UNREADABLE
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.runs.discover import Found, find, short_names
from lightning_spectral.report.runs.layer_tables import csv_tables, wandb_tables, with_tables
from lightning_spectral.report.runs.log_rows import choose, logged, probe_in
from lightning_spectral.report.runs.merge import check_networks, in_order
from lightning_spectral.report.runs.run import Probe, Reading, Run, RunError
from lightning_spectral.report.trackers import STEP


def run_of(reports: Iterable[SpectralReport], name: str) -> Run:
    """A run of whole reports, such as a probe's `history`.

    Raises:
        RunError: if two reports are of the same step and not the same.
    """
    labelled = [(f"report {i}", report) for i, report in enumerate(reports, start=1)]
    readings = [Reading(label, [Probe.of(report, label)]) for label, report in labelled]
    return Run(name, (f"{len(readings)} report{'s' if len(readings) != 1 else ''}",), in_order(readings))


def read_run(paths: Sequence[str | Path], *, prefix: str | None = None) -> Run:
    """Read one run from one path or several; of one step, a whole report counts before a log's scalars.

    Args:
        paths: each a CSV log, an offline W&B run, a TensorBoard log, a checkpoint, a JSON report, or a folder of these.
        prefix: of the probe's keys, where a run holds those of several probes.

    Raises:
        RunError: if there is nothing to read, or not what it looks like; or if it is not of one run.
    """
    found, left_out = find(paths)
    if prefix is not None and all(reader == "JSON report" for reader, _ in found):
        raise RunError(f"{_shown(paths)}: JSON reports hold one probe each and no prefix; leave out --prefix {prefix}")
    readings = _named([_READERS[reader](file, prefix) for reader, file in found], [file for _, file in found])
    check_networks(readings)
    probes = in_order(readings)
    if not probes:
        raise RunError(f"{_shown(paths)}: the probe measured nothing in this run")
    if not any(probe.layers for probe in probes):
        raise RunError(
            f"{_shown(paths)}: medians but no layers (log_layers='none'); log_tables=True, a checkpoint or JSON "
            "reports hold the layers"
        )
    kept = set(map(id, probes))
    left_out += [text for item in readings for text in item.left_out]
    left_out += [
        f"{item.name}: the other inputs hold all of it"
        for item in readings
        if item.probes and kept.isdisjoint(map(id, item.probes))
    ]
    return Run(_name(paths), _sources(found), probes, tuple(left_out))


def _named(readings: Sequence[Reading], files: Sequence[Path]) -> list[Reading]:
    """Of several files, reports outside training are labelled by their files' names, as long as it takes."""
    if len(files) == 1:
        return list(readings)
    named = zip(readings, short_names(files), strict=True)
    return [
        replace(
            reading,
            probes=[replace(p, label=name) if p.step is None and p.report else p for p in reading.probes],
        )
        for reading, name in named
    ]


def _name(paths: Sequence[str | Path]) -> str:
    if len(paths) > 1:
        return join_names(short_names(paths))
    only = Path(paths[0]).resolve()
    return only.name if only.is_file() else "/".join(only.parts[-2:])


def _sources(found: Sequence[Found]) -> tuple[str, ...]:
    """Where a run is from, several files of a folder in one."""
    groups: dict[tuple[str, Path], list[Path]] = {}
    for reader, file in found:
        groups.setdefault((reader, file.parent), []).append(file)
    return tuple(
        f"{reader} {files[0]}" if len(files) == 1 else f"{len(files)} {reader}s in {folder}"
        for (reader, folder), files in groups.items()
    )


def _read_json(path: Path, prefix: str | None) -> Reading:
    try:
        return Reading(str(path), [Probe.of(SpectralReport.from_json(path), path.stem)])
    except (*UNREADABLE, OSError) as error:
        raise RunError(f"{path}: no report that can be read ({_why(error)})") from error


def _read_checkpoint(path: Path, prefix: str | None) -> Reading:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Whatever bytes may raise in torch.load.
        raise RunError(
            f"{path}: no checkpoint that loads with weights_only=True ({unpickling_refusal(error) or _why(error)}); "
            "a CSV log, or JSON of probe.last_report, can be read instead"
        ) from error
    callbacks = data.get("callbacks") if isinstance(data, dict) else None
    kept = callbacks.items() if isinstance(callbacks, dict) else ()
    states = {k: v for k, v in kept if str(k).startswith("SpectralProbe{") and isinstance(v, dict)}
    by_prefix = {_prefix_of(str(key)): state for key, state in states.items()}
    state = by_prefix[choose(path, by_prefix, prefix, "is no checkpoint of a Trainer with a SpectralProbe")]
    saved = state.get("last_report")
    if saved is None:
        return Reading(str(path), [])
    try:
        return Reading(str(path), [Probe.of(SpectralReport.from_dict(saved), path.stem)])
    except UNREADABLE as error:
        raise RunError(f"{path}: its report cannot be read ({_why(error)})") from error


def _prefix_of(state_key: str) -> str:
    match = re.fullmatch(r"SpectralProbe\{'prefix': (['\"])(.*)\1\}", state_key)
    return match.group(2) if match else state_key


def _read_csv(path: Path, prefix: str | None) -> Reading:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"{path}: no CSV file that can be read ({_why(error)})") from error
    chosen = probe_in(path, rows, prefix)
    return Reading(str(path), with_tables(logged(path, rows, "step", chosen), csv_tables(path, chosen)))


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


def _read_wandb(path: Path, prefix: str | None) -> Reading:
    """The history in an offline run's file, and the tables beside it."""
    rows = [record["history"].get("item", {}) for record in wandb_records(path) if record.get("type") == "history"]
    chosen = probe_in(path, rows, prefix)
    tables, missing = wandb_tables(path, rows, STEP, chosen)
    return Reading(str(path), with_tables(logged(path, rows, STEP, chosen), tables), tuple(missing))


def _read_tensorboard(path: Path, prefix: str | None) -> Reading:
    """The scalars of an event file, or of all in a folder."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise RunError(f"{path}: reading TensorBoard's files needs tensorboard: pip install tensorboard") from error
    # Its own limit is 10 000 of each scalar, drawn at random; 0 is none.
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    rows: dict[int, dict[str, Any]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"step": event.step})[tag] = event.value
    in_order_of_steps = [rows[step] for step in sorted(rows)]
    return Reading(str(path), logged(path, in_order_of_steps, "step", probe_in(path, in_order_of_steps, prefix)))


def _why(error: object) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else text[:200]


def _shown(paths: Sequence[str | Path]) -> str:
    return join_names([str(path) for path in paths])


_READERS: dict[str, Callable[[Path, str | None], Reading]] = {
    "CSV log": _read_csv,
    "W&B run": _read_wandb,
    "TensorBoard log": _read_tensorboard,
    "checkpoint": _read_checkpoint,
    "JSON report": _read_json,
}
