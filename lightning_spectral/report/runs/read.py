"""Read a run back: the file of its reports, JSON reports, or checkpoints."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lightning_spectral._messages import join_names
from lightning_spectral._serialization import UNREADABLE
from lightning_spectral.errors import first_line
from lightning_spectral.numerics.statistics import evenly
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.runs.discover import (
    CHECKPOINT,
    REPORT,
    SPECTRA,
    RunFile,
    find_files,
    run_folder,
    short_names,
)
from lightning_spectral.report.runs.run import Run, RunError, RunStep, explain
from lightning_spectral.report.runs.spectra_file import decode_reports, decode_steps, index_lines

MAX_REPORTS, MAX_FITS = 200, 10_000
"""Limits of what is read of one file: its reports, and their layers, each of which is fitted again in 3 ms."""


def run_of(reports: Iterable[SpectralReport], name: str) -> Run:
    """Return reports, such as a probe's `history`, as a run.

    Raises:
        RunError: if two reports are of the same step and not the same.
    """
    labelled = [(f"report {i}", report) for i, report in enumerate(reports, start=1)]
    inputs = [Run(label, (), (RunStep.of(report, label),)) for label, report in labelled]
    return Run(name, (f"{len(inputs)} report{'s' if len(inputs) != 1 else ''}",), _in_order(inputs))


def read_run(paths: Sequence[str | Path], *, prefix: str | None = None) -> Run:
    """Read one run from one path or several.

    Args:
        paths: each a run's ``spectra.jsonl``, a JSON report, a checkpoint, or a folder that holds them.
        prefix: of the probe's keys, where a run holds those of several probes.

    Raises:
        RunError: if there is nothing to read, or not what it looks like; or if it is not of one run.
    """
    files = find_files(paths, prefix)
    if prefix is not None and all(file.kind != CHECKPOINT and file.path in map(Path, paths) for file in files):
        raise RunError(f"{_show(paths)}: a file of reports is of one probe; leave out --prefix {prefix}")
    inputs = _named([_read(file, prefix) for file in files], [file.path for file in files])
    _check_networks(inputs)
    steps = _in_order(inputs)
    if not steps:
        raise RunError(f"{_show(paths)}: the probe measured nothing in this run")
    used = set(map(id, steps))
    omissions = [text for item in inputs for text in item.omissions]
    omissions += [
        f"{item.name}: the other inputs hold all of it"
        for item in inputs
        if item.steps and used.isdisjoint(map(id, item.steps))
    ]
    return Run(_name(paths, files), _sources(files), steps, tuple(omissions))


def _read(file: RunFile, prefix: str | None) -> Run:
    if file.kind == CHECKPOINT:
        return _read_checkpoint(file.path, prefix)
    return {SPECTRA: _read_spectra, REPORT: _read_json}[file.kind](file.path)


def _read_spectra(path: Path) -> Run:
    lines, torn = index_lines(path)
    all_reports = [line for line in lines if not line.of_step]
    layers = max((len(report.layers) for report in decode_reports(path, all_reports[-1:])), default=0)
    count = max(2, min(MAX_REPORTS, MAX_FITS // max(1, layers)))
    shown = [all_reports[i] for i in evenly(len(all_reports), count)]
    omissions = [f"{path}: {torn}"] if torn else []
    if len(shown) < len(all_reports):
        n = len(all_reports)
        omissions.append(f"{path}: {n - len(shown)} of {n} probes, evenly; {len(shown)} are read")
    wanted = {line.step for line in shown}
    of_steps = [line for line in lines if line.of_step and line.step in wanted]
    updates = {update.step: update for update in decode_steps(path, of_steps)}
    reports = enumerate(decode_reports(path, shown), start=1)
    steps = [RunStep.of(report, f"probe {i}", updates.get(report.step)) for i, report in reports]
    return Run(str(path), (str(path),), tuple(steps), tuple(omissions))


def _read_json(path: Path) -> Run:
    try:
        return Run(str(path), (str(path),), (RunStep.of(SpectralReport.from_json(path), path.stem),))
    except (*UNREADABLE, OSError) as error:
        raise RunError(f"{path}: no report that can be read ({explain(error)})") from error


def load_plain(path: str | Path) -> Any:
    """Return the content of a checkpoint's file: tensors and plain values alone, so that nothing is executed.

    Raises:
        ValueError: if it holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Whatever bytes may raise in torch.load, whose advice is to execute them.
        why = first_line(error)
        if "WeightsUnpickler error" in str(error) or type(error).__name__ == "UnpicklingError":
            code = re.search(r"\bGLOBAL (\S+)", str(error))
            why = f"it holds {code[1]}, which is code" if code else "its bytes are not those of a checkpoint"
        raise ValueError(f"no checkpoint that loads with weights_only=True ({why})") from error


def _read_checkpoint(path: Path, prefix: str | None) -> Run:
    try:
        data = load_plain(path)
    except ValueError as error:
        remedy = "the run's spectra.jsonl, or JSON of probe.last_report, can be read instead"
        raise RunError(f"{path}: {error}; {remedy}") from error
    callbacks = data.get("callbacks") if isinstance(data, dict) else None
    states = callbacks.items() if isinstance(callbacks, dict) else ()
    by_prefix = {
        _prefix_of(str(key)): state
        for key, state in states
        if str(key).startswith("SpectralProbe{") and isinstance(state, dict)
    }
    saved = by_prefix[_choose(path, list(by_prefix), prefix)].get("last_report")
    if saved is None:
        return Run(str(path), (str(path),), ())
    try:
        return Run(str(path), (str(path),), (RunStep.of(SpectralReport.from_dict(saved), path.stem),))
    except UNREADABLE as error:
        raise RunError(f"{path}: its report cannot be read ({explain(error)})") from error


def _prefix_of(state_key: str) -> str:
    match = re.fullmatch(r"SpectralProbe\{'prefix': (['\"])(.*)\1\}", state_key)
    return match.group(2) if match else state_key


def _choose(path: Path, prefixes: Sequence[str], prefix: str | None) -> str:
    """Return the prefix that is meant."""
    if not prefixes:
        raise RunError(f"{path} is no checkpoint of a Trainer with a SpectralProbe")
    if prefix is None and len(prefixes) > 1:
        raise RunError(f"{path} holds several probes; choose one with --prefix: {join_names(sorted(prefixes))}")
    if prefix is not None and prefix not in prefixes:
        raise RunError(f"{path} holds no probe with the prefix {prefix!r}, but {join_names(sorted(prefixes))}")
    return prefixes[0] if prefix is None else prefix


def _check_networks(inputs: Sequence[Run]) -> None:
    """Refuse inputs of different networks.

    Layers may come and go in a training. Two inputs are of one network where most of the smaller one's layers are in
    both, with the same shape; a frozen layer's is unknown.
    """
    networks = [(item.name, shapes) for item in inputs if (shapes := _shapes(item.steps))]
    for (a, before), (b, after) in pairwise(networks):
        both = [name for name in before if name in after]
        same = sum(None in (before[name], after[name]) or before[name] == after[name] for name in both)
        fewer = min(len(before), len(after))
        if 2 * same < fewer:
            raise RunError(
                f"{a} and {b} are of different networks: of {fewer} layers, {same} are in both with the same shape; "
                "make a page of each"
            )


def _shapes(steps: Sequence[RunStep]) -> dict[str, tuple[int, int] | None]:
    """Return the shapes of an input's layers; None for frozen ones."""
    shapes: dict[str, tuple[int, int] | None] = {name: None for step in steps for name in step.report.skipped}
    return shapes | {name: layer.shape for step in steps for name, layer in step.report.layers.items()}


def _in_order(inputs: Sequence[Run]) -> tuple[RunStep, ...]:
    """Return the steps of all inputs in the order of training, those outside training first."""
    outside: list[RunStep] = []
    by_step: dict[int, tuple[str, RunStep]] = {}
    for item in inputs:
        for step in item.steps:
            if step.step is None:
                outside.append(step)
                continue
            name, other = by_step.setdefault(step.step, (item.name, step))
            if other is not step and other.report.to_dict() != step.report.to_dict():
                raise RunError(
                    f"{name} and {item.name} hold different measurements of step {step.step}: they are of two runs, or "
                    "were measured in two ways; lay two runs over each other by giving their folders"
                )
    return (*outside, *(by_step[step][1] for step in sorted(by_step)))


def _named(inputs: Sequence[Run], files: Sequence[Path]) -> list[Run]:
    """Label reports outside training, where there are several files, by the files' names."""
    if len(files) == 1:
        return list(inputs)
    return [
        replace(item, steps=tuple(replace(x, label=name) if x.step is None else x for x in item.steps))
        for item, name in zip(inputs, short_names(files), strict=True)
    ]


def _name(paths: Sequence[str | Path], files: Sequence[RunFile]) -> str:
    """Return a run's name: of its folder, or of the file where that is no spectra file."""
    if len(paths) > 1:
        return join_names(short_names(paths))
    only = files[0].path.resolve() if files[0].kind == SPECTRA else Path(paths[0]).resolve()
    folder = run_folder(only) if files[0].kind == SPECTRA else only
    return only.name if folder.is_file() else "/".join(folder.parts[-2:])


def _sources(files: Sequence[RunFile]) -> tuple[str, ...]:
    """Return where a run is from, several files of a folder in one."""
    groups: dict[tuple[str, Path], list[RunFile]] = {}
    for file in files:
        groups.setdefault((file.kind, file.path.parent), []).append(file)
    return tuple(
        f"{kind} {group[0].path}{group[0].remark}" if len(group) == 1 else f"{len(group)} {kind}s in {folder}"
        for (kind, folder), group in groups.items()
    )


def _show(paths: Sequence[str | Path]) -> str:
    return join_names([str(path) for path in paths])
