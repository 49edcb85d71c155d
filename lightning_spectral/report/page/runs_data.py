"""Values that the page of several runs shows, JSON-able."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_spectral.analysis import ALPHA_BAND
from lightning_spectral.numerics.statistics import evenly
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.log_keys import LAYER_KEYS, LoggedKey, median_key
from lightning_spectral.report.page.data import (
    DATA_BYTES,
    kind_looks,
    last_layers,
    layer_values,
    script_json,
    short,
    shorten,
)
from lightning_spectral.report.palette import PLOTLY_DASH, RUN_DASHES, RUN_STYLE, SYMBOLS
from lightning_spectral.report.runs.compare import comparison, differences, options_of
from lightning_spectral.report.runs.run import Run, RunStep

BESIDE_MEDIANS = ("alpha_stderr",)
"""Quantities without a median that the page shows, too."""


def runs_data(runs: Sequence[Run], *, limit: int = DATA_BYTES) -> dict[str, Any]:
    """Return what the scripts of the page of several runs show, thinned to about ``limit`` bytes of JSON."""
    layers: dict[str, LayerSpectrum] = {}
    for run in runs:
        layers = layers | {
            name: layer
            for name, layer in last_layers([step.report for step in run.steps]).items()
            if name not in layers
        }
    parts = {part for layer in layers.values() for part in layer.parts}
    keys = [
        key for key in LAYER_KEYS if (key.median or key.name in BESIDE_MEDIANS) and (not key.part or key.part in parts)
    ]
    shown = [_run(i, run, list(layers), keys, limit // len(runs)) for i, run in enumerate(runs)]
    return {
        "layers": list(layers),
        "kinds": [layer.kind for layer in layers.values()],
        "keys": [key.name for key in keys],
        "meanings": {key.name: key.meaning for key in keys},
        "medians": {key.name: int(key.of_fit) for key in keys if key.median},
        "band": ALPHA_BAND,
        "looks": {"kinds": kind_looks(layer.kind for layer in layers.values())},
        "differences": differences(runs),
        "summary": comparison(runs),
        "notes": [note for run, data in zip(runs, shown, strict=True) for note in _notes(run, len(data["probes"]))],
        "runs": shown,
    }


def _run(i: int, run: Run, names: Sequence[str], keys: Sequence[LoggedKey], limit: int) -> dict[str, Any]:
    rows = [_probe(step, names, keys) for step in run.steps]
    size = max(len(script_json(row)) for row in rows)
    style = RUN_STYLE[i % len(RUN_STYLE)]
    dash = PLOTLY_DASH[RUN_DASHES[i // len(RUN_STYLE) % len(RUN_DASHES)]]
    return {
        "name": run.name,
        "look": [style.on_white, style.on_dark, SYMBOLS[style.marker], dash],
        "options": options_of(run),
        "probes": [rows[j] for j in evenly(len(rows), max(2, limit // size))],
    }


def _probe(step: RunStep, names: Sequence[str], keys: Sequence[LoggedKey]) -> dict[str, Any]:
    report, medians = step.report, step.report.medians()
    layers = [report.layers.get(name) for name in names]
    return {
        "label": step.label,
        "step": step.step,
        "loss": short(report.loss),
        "scale": short(step.update.scale) if step.update else None,
        "medians": {key.name: short(medians.get(median_key(key.name), math.nan)) for key in keys if key.median},
        "kinds": {
            kind: shorten(medians.get(median_key(key.name, kind), math.nan) for key in keys if key.median)
            for kind in report.by_kind()
        },
        "values": [layer_values(layer, keys) for layer in layers],
        "doubts": [layer and layer.fit_quality.doubt for layer in layers],
    }


def _notes(run: Run, shown: int) -> list[str]:
    """Return what the page lacks of a run."""
    n = len(run.steps)
    thinned = [f"{run.name}: {shown} of {n} probes are shown, evenly, to keep this page small."] if shown < n else []
    return [*thinned, *(f"Left out: {what}." for what in run.omissions)]
