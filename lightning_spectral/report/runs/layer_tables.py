"""The tables of layers that `log_tables=True` leaves beside a CSV log and in a W&B run: what their scalars lack."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_spectral._serialization import UNREADABLE
from lightning_spectral.records.log_keys import LAYER_KEYS
from lightning_spectral.report.runs.run import LayerFacts, Probe, RunError

QUANTITIES = frozenset(key.name for key in LAYER_KEYS)
QUARTERS = ("alpha_q1", "alpha_q2", "alpha_q3", "alpha_q4")


@dataclass(frozen=True)
class TableRow:
    """One layer at one step."""

    values: Mapping[str, float]
    facts: LayerFacts


Tables = dict[int, dict[str, TableRow]]


def csv_tables(log: Path, prefix: str) -> Tables:
    """The tables of a probe beside a CSV log, in several files where a resumed run had other columns.

    Raises:
        RunError: if a file is no such table.
    """
    stem = prefix.replace("/", "_")
    named = re.compile(rf"{re.escape(stem)}_layers(?:_(\d+))?\.csv")
    found = [(match, path) for path in log.parent.iterdir() if (match := named.fullmatch(path.name))]
    tables: Tables = {}
    for _, path in sorted(found, key=lambda item: int(item[0].group(1) or 0)):
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{path}: no CSV file that can be read ({error})") from error
        _add(tables, path, rows)
    return tables


def wandb_tables(run: Path, rows: Iterable[Mapping[str, Any]], step_key: str, prefix: str) -> tuple[Tables, list[str]]:
    """The tables that the rows of a W&B run's history name, and those of them that are not there.

    Raises:
        RunError: if a file is no such table, or not of the run.
    """
    tables: Tables = {}
    missing: list[str] = []
    for row in rows:
        if not (name := row.get(f"{prefix}/layers.path")):
            continue
        files = run.parent / "files"
        path = files / str(name)
        if not path.resolve().is_relative_to(files.resolve()):
            raise RunError(f"{run} names a table that is outside of its folder: {path}")
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            heading = ["step", *table["columns"]]
            lines = [[row[step_key], *("" if cell is None else cell for cell in line)] for line in table["data"]]
        except FileNotFoundError:
            missing.append(f"the table {path} of step {row.get(step_key)}: no such file")
        except (*UNREADABLE, OSError) as error:
            raise RunError(f"{path}: no table that can be read ({type(error).__name__}: {error})") from error
        else:
            _add(tables, path, [dict(zip(heading, map(str, line), strict=False)) for line in lines])
    return tables, missing


def _add(tables: Tables, path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Add the rows of one file; of the same step and layer, the last counts."""
    for row in rows:
        try:
            at = tables.setdefault(int(row["step"]), {})
            # What a later row overrides moves to its place, so that the order is that of one probe.
            at.pop(row["layer"], None)
            at[row["layer"]] = _row(row)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{path}: no table of layers as log_tables=True writes it ({type(error).__name__}: {error})"
            ) from error


def with_tables(probes: list[Probe], tables: Tables) -> list[Probe]:
    """A log's probes with what its tables hold; steps that only a table has become probes too, without a loss."""
    logged = {probe.step for probe in probes}
    bare = [Probe(step, f"step {step}", float("nan"), {}, None, 0) for step in tables if step not in logged]
    empty: dict[str, TableRow] = {}
    return [_merged(p, empty if p.step is None else tables.get(p.step, empty)) for p in (*probes, *bare)]


def _merged(probe: Probe, rows: Mapping[str, TableRow]) -> Probe:
    """In the order of the table, which is the network's; layers that it left out come last."""
    names = dict.fromkeys([*rows, *probe.layers])
    layers = {name: {**probe.layers.get(name, {}), **(rows[name].values if name in rows else {})} for name in names}
    facts = {name: row.facts for name, row in rows.items()}
    return replace(probe, layers=layers, facts=facts, n_layers=max(probe.n_layers, len(layers)))


def _row(row: Mapping[str, str]) -> TableRow:
    # An empty cell is NaN or infinite: the log's scalar, if there is one, says no more.
    values = {key: float(text) for key, text in row.items() if key in QUANTITIES and text}
    quarters = tuple(float(row.get(key) or "nan") for key in QUARTERS) if QUARTERS[0] in row else ()
    facts = LayerFacts(
        row["kind"],
        (int(row["m"]), int(row["n"])),
        note=row["note"],
        quarters=quarters,
        rank_model=row["rank_model"],
    )
    return TableRow(values, facts)
