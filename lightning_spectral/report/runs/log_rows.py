"""The probes in the rows of a log, whichever logger wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_spectral._messages import join_names
from lightning_spectral.report.runs.discover import natural_sort_key
from lightning_spectral.report.runs.layer_tables import QUANTITIES
from lightning_spectral.report.runs.run import Probe, RunError

MARK = "layers_measured"
"""Every probe logs it, so that the keys that end in it tell the prefixes in a log."""


def probe_in(path: Path, rows: Sequence[Mapping[str, Any]], prefix: str | None) -> str:
    """The prefix of the probe whose keys are read."""
    marks = {key.removesuffix(f"/{MARK}") for row in rows for key in row if key.endswith(f"/{MARK}")}
    return choose(path, marks, prefix, "holds nothing that a SpectralProbe logged")


def logged(path: Path, rows: Sequence[Mapping[str, Any]], step_key: str, chosen: str) -> list[Probe]:
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
        kinds = _kinds_in(path, row, f"{chosen}/kind/")
        probes.append(Probe(whole, label, loss, layers, None, max(n_layers, len(layers)), kinds=kinds))
    return probes


def _kinds_in(path: Path, row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The median alpha of each kind of layer."""
    keys = [key for key in row if key.startswith(prefix) and key.endswith("/alpha_median")]
    return {key.removeprefix(prefix).removesuffix("/alpha_median"): _number(path, row, key) for key in keys}


def _layers_in(path: Path, row: Mapping[str, Any], prefix: str) -> dict[str, dict[str, float]]:
    layers: dict[str, dict[str, float]] = {}
    for key in sorted(row, key=natural_sort_key):
        name, _, quantity = key.removeprefix(prefix).rpartition("/")
        if key.startswith(prefix) and name and quantity in QUANTITIES:
            layers.setdefault(name, {})[quantity] = _number(path, row, key)
    return layers


def _number(path: Path, row: Mapping[str, Any], key: str) -> float:
    try:
        return float(row.get(key, "nan"))
    except (TypeError, ValueError) as error:
        raise RunError(f"{path}: {key} should be a number, got {row[key]!r}") from error


def choose(path: Path, prefixes: Iterable[str], prefix: str | None, nothing: str) -> str:
    """The one of these prefixes that is meant."""
    known = sorted(prefixes)
    if not known:
        raise RunError(f"{path} {nothing}")
    if prefix is None and len(known) > 1:
        raise RunError(f"{path} holds several probes; choose one with --prefix: {join_names(known)}")
    if prefix is not None and prefix not in known:
        raise RunError(f"{path} holds no probe with the prefix {prefix!r}, but {join_names(known)}")
    return known[0] if prefix is None else prefix
