"""Reports of a run in one file, ``spectra.jsonl``: a line per probe, appended while the run goes on.

The optimizer's step after a probe, where it is measured, is a line of its own, since it is known only later.

A line holds what was measured, from which reading fits again: the very same report, to the bit. Its vectors are base64
of little-endian float64, 11 characters a number where decimals take 20, so that 20 directions of a layer take less
than 1 kB. What was asked for besides (weights, intervals, fraction, alignment) stands in it as in the report.
"""

from __future__ import annotations

import json
import mmap
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import torch
from torch import Tensor

from lightning_spectral._serialization import UNREADABLE, decode, to_jsonable
from lightning_spectral.errors import SpectralWarning
from lightning_spectral.measurement.layer_fit import fit_layer
from lightning_spectral.records.layer_spectrum import PARTS, LayerMeasurement, LayerSpectrum
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.records.step import StepMeasurement
from lightning_spectral.report.runs.run import RunError, explain

T = TypeVar("T")

FORMAT, STEP_FORMAT, FORMAT_VERSION = "lightning-spectral-measurement", "lightning-spectral-step", 1

_START = re.compile(
    rb'\s*\{\s*"format"\s*:\s*"(' + f"{FORMAT}|{STEP_FORMAT}".encode() + rb')"\s*,\s*"version"\s*:\s*(\d+)\s*,\s*'
)
_STEP = re.compile(rb'"step"\s*:\s*(null|\d{1,18})\s*[,}]')
_HEAD_BYTES = 200
"""Bytes of a line that tell its format and step, which stand first."""


@dataclass(frozen=True)
class Line:
    """Place of a report, or of an optimizer's step, in a file: the line's number, from 1, and the bytes before it."""

    number: int
    offset: int
    step: int | None
    of_step: bool = False


def spectra_file_name(prefix: str = "spectral") -> str:
    """Return the name of the file of a probe whose logged keys begin with ``prefix``.

    >>> spectra_file_name(), spectra_file_name("spectral/late")
    ('spectra.jsonl', 'spectra-spectral%2Flate.jsonl')
    """
    if prefix == "spectral":
        return "spectra.jsonl"
    # As in a URL: no two prefixes have one name.
    return f"spectra-{quote(prefix, safe='')}.jsonl"


def append_report(path: str | Path, report: SpectralReport) -> None:
    """Append a report to a file as one line, in one write: a run that is killed leaves whole lines.

    A last line without its end, of a killed run or a full disk, is cut off first: nothing can be read from it, and
    what follows it must begin a line.
    """
    first = {"format": FORMAT, "version": FORMAT_VERSION, "step": report.step, "epoch": report.epoch}
    layers = {name: _layer_of(layer) for name, layer in report.layers.items()}
    _append(path, {**first, **to_jsonable(replace(report, layers={})), "layers": layers})


def append_step(path: str | Path, measurement: StepMeasurement) -> None:
    """Append the measurement of the optimizer's step after a probe, as `append_report` does a report."""
    first = {"format": STEP_FORMAT, "version": FORMAT_VERSION, "step": measurement.step}
    _append(path, {**first, **to_jsonable(measurement)})


def _append(path: str | Path, data: dict[str, Any]) -> None:
    line = json.dumps(data, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    with Path(path).open("ab", buffering=0) as file:
        end = end_of_lines(Path(path))
        if end < file.tell():
            file.truncate(end)
        if (written := file.write(line)) < len(line):
            raise OSError(f"{path}: {written} of {len(line)} bytes written: is the disk full?")


def read_reports(path: str | Path) -> list[SpectralReport]:
    """Return all reports of a file, or of the ``spectra.jsonl`` in a folder, fitted again.

    Of a run that was resumed from an older checkpoint, lines of steps that it took again replace those before.

    Warns:
        SpectralWarning: of a torn last line, which is left out.

    Raises:
        RunError: if the file cannot be read or holds anything else.
    """
    file = _file_of(path)
    return list(decode_reports(file, _lines_with_warning(file, of_step=False)))


def read_steps(path: str | Path) -> list[StepMeasurement]:
    """Return the measurements of the optimizer's steps after the probes of a file, each with its probe's ``step``.

    It takes paths, warns and raises as `read_reports` does.
    """
    file = _file_of(path)
    return list(decode_steps(file, _lines_with_warning(file, of_step=True)))


def _file_of(path: str | Path) -> Path:
    return Path(path) / spectra_file_name() if Path(path).is_dir() else Path(path)


def _lines_with_warning(path: str | Path, *, of_step: bool) -> list[Line]:
    lines, torn = index_lines(path)
    if torn:
        warnings.warn(f"{path}: {torn}", SpectralWarning, stacklevel=3)
    return [line for line in lines if line.of_step == of_step]


def index_lines(path: str | Path) -> tuple[list[Line], str]:
    """Return where a file's reports and steps are, without decoding them, and what there is to say of its end."""
    lines: list[Line] = []
    offset = 0
    for number, line in enumerate(_lines(path), start=1):
        is_whole = line.endswith(b"\n")
        # A long line tells its kind without its end: JSON of another kind is not torn.
        if is_whole or len(line) > _HEAD_BYTES:
            placed = _place_of(path, Line(number, offset, None), line)
        if not is_whole:
            return lines, f"its last line, {number}, is torn and left out: the run was killed or the disk was full"
        while lines and _replaces(placed, lines[-1]):
            lines.pop()
        lines.append(placed)
        offset += len(line)
    return lines, ""


def _replaces(new: Line, old: Line) -> bool:
    """Return whether a run took an old line's step again. A step's line follows the report's of its number."""
    if new.step is None or old.step is None:
        return False
    return old.step >= new.step if old.of_step or not new.of_step else old.step > new.step


def decode_reports(path: str | Path, lines: Iterable[Line]) -> Iterator[SpectralReport]:
    """Yield the reports of these lines, each read, checked and fitted when it is asked for."""
    return _decoded(path, lines, _report_of, "report")


def decode_steps(path: str | Path, lines: Iterable[Line]) -> Iterator[StepMeasurement]:
    """Yield the optimizer's steps of these lines."""
    return _decoded(path, lines, partial(decode, StepMeasurement), "step")


def _decoded(path: str | Path, lines: Iterable[Line], decoded: Callable[[Any], T], what: str) -> Iterator[T]:
    with Path(path).open("rb") as file:
        for line in lines:
            file.seek(line.offset)
            try:
                yield decoded(json.loads(file.readline()))
            except UNREADABLE as error:
                raise RunError(f"{path}: line {line.number} holds no {what} ({explain(error)})") from error


def _layer_of(layer: LayerSpectrum) -> dict[str, Any]:
    """Return what was measured of a layer, without what has its default value."""
    values = {field.name: getattr(layer, field.name) for field in fields(LayerMeasurement) if field.name != "name"}
    usual = {field.name: field.default for field in fields(LayerMeasurement)}
    if not layer.h_stderr.any():
        values["h_stderr"] = None
    if torch.equal(layer.spectrum, layer.sigma):
        values["spectrum"] = None
    values = {name: value for name, value in values.items() if isinstance(value, Tensor) or value != usual[name]}
    parts = {name: part for name in PARTS if (part := getattr(layer, name)) is not None}
    return {name: to_jsonable(value, pack=True) for name, value in (values | parts).items()}


def _report_of(data: Any) -> SpectralReport:
    layers = {name: _fit(name, values) for name, values in data["layers"].items()}
    return replace(decode(SpectralReport, data | {"layers": {}}), layers=layers)


def _fit(name: str, values: Any) -> LayerSpectrum:
    parts = {part: decode(kind, values[part]) for part, kind in PARTS.items() if part in values}
    return replace(fit_layer(decode(LayerMeasurement, values | {"name": name})), **parts)


def _lines(path: str | Path) -> Iterator[bytes]:
    try:
        with Path(path).open("rb") as file:
            yield from file
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error


def _place_of(path: str | Path, place: Line, line: bytes) -> Line:
    """Return a line's place with what its head tells."""
    start = _START.match(line[:_HEAD_BYTES])
    step = start and _STEP.match(line[:_HEAD_BYTES], start.end())
    if not start or not step:
        raise RunError(
            f"{path}: line {place.number} is not of a file that a SpectralProbe wrote, such as spectra.jsonl; "
            "JSON of one report is read by SpectralReport.from_json"
        )
    if int(start[2]) != FORMAT_VERSION:
        raise RunError(
            f"{path}: line {place.number} is of version {int(start[2])}, expected {FORMAT_VERSION}: read it with the "
            "release that wrote it"
        )
    number = None if step[1] == b"null" else int(step[1])
    return replace(place, step=number, of_step=start[1] == STEP_FORMAT.encode())


def end_of_lines(path: Path) -> int:
    """Return the size of a file up to the end of its last whole line."""
    if not path.stat().st_size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as content:
        return content.rfind(b"\n") + 1
