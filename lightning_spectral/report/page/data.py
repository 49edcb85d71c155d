"""Values that the pages of one run and of several show, JSON-able."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning_spectral._messages import group_by_reason
from lightning_spectral.analysis import ALPHA_BAND, layers_of
from lightning_spectral.numerics.statistics import evenly
from lightning_spectral.records.alignment import LayerAlignment
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.log_keys import LAYER_KEYS, LoggedKey, median_key
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report import palette
from lightning_spectral.report.runs.run import Run, RunStep
from lightning_spectral.report.runs.several import comparison, differences, options_of
from lightning_spectral.report.terminal.tables import method_of, samples_of
from lightning_spectral.summary import summary, summary_over_training

DATA_BYTES = 3_000_000
"""Size of the data from which on a longer run is thinned evenly."""

DIGITS = 6
"""Significant digits of the page's figures."""


def script_json(data: Any) -> str:
    """Return JSON that may stand within a script element: no tag, comment or line separator can be in it.

    >>> "<" in script_json("</script><!--")
    False
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(run: Run, *, limit: int = DATA_BYTES) -> dict[str, Any]:
    """Return what the page's scripts show, thinned to about ``limit`` bytes of JSON."""
    reports = [step.report for step in run.steps]
    layers = last_layers(reports)
    parts = {part for report in reports for layer in report.layers.values() for part in layer.parts}
    keys = [key for key in LAYER_KEYS if not key.part or key.part in parts]
    first = run.steps[0].step, layers_of(reports[0])
    rows = [_probe(step, list(layers), keys, first) for step in run.steps]
    for row, sentences in zip(rows, _step_scales(run.steps), strict=True):
        row["summary"] += sentences
    spectra = [[_spectrum(report.layers.get(name)) for name in layers] for report in reports]
    shown, with_spectra = _thin(rows, spectra, limit)
    return {
        **_of_layers(layers, keys),
        "shapes": [_shape(layer) for layer in layers.values()],
        "looks": {"kinds": kind_looks(layer.kind for layer in layers.values()), "models": MODEL_LOOKS},
        "notes": _notes(run, len(shown), len(with_spectra)),
        "probes": [rows[i] | {"spectra": spectra[i] if i in with_spectra else None} for i in shown],
    }


def kind_looks(kinds: Iterable[str]) -> dict[str, list[str | None]]:
    """Return kind -> its colours on white and on dark, None for that of the text, and plotly's symbol."""
    looks = {kind: palette.KIND_STYLE.get(kind, palette.OTHER_STYLE) for kind in kinds}
    return {
        kind: [*[None if colour == palette.INK else colour] * 2, palette.SYMBOLS[marker]]
        for kind, (colour, marker) in looks.items()
    }


MODEL_LOOKS = {
    model: [style.name, style.on_white, style.on_dark, palette.PLOTLY_DASH[style.dash]]
    for model, style in palette.MODEL_STYLE.items()
}
"""Rank model -> its name, its colours on white and on dark, and plotly's line."""


def last_layers(reports: Sequence[SpectralReport]) -> dict[str, LayerSpectrum]:
    """Return each layer as it was measured last, in the order of the last report."""
    layers: dict[str, LayerSpectrum] = {}
    for report in reversed(reports):
        layers = {**layers, **{name: layer for name, layer in report.layers.items() if name not in layers}}
    return layers


def _thin(rows: Sequence[Any], spectra: Sequence[Any], limit: int) -> tuple[list[int], set[int]]:
    """Return which probes to show, and which of these with their spectra.

    Scalars, the curves over training, may take half of the limit, and spectra what is left.
    """
    size = max(len(script_json(row)) for row in rows)
    shown = evenly(len(rows), max(1, limit // 2 // size))
    each = max(len(script_json(spectra[i])) for i in shown)
    with_spectra = evenly(len(shown), (limit - size * len(shown)) // each)
    return shown, {shown[i] for i in with_spectra}


def _notes(run: Run, shown: int, with_spectra: int | None = None, of: str = "") -> list[str]:
    """Return what the page lacks of a run and how to get it."""
    n, notes = len(run.steps), []
    if shown < n:
        notes.append(f"{of}{shown} of {n} probes are shown, evenly, to keep this page small.")
    if with_spectra is not None and with_spectra < shown:
        notes.append(
            f"sigma_k and h_k are shown at {with_spectra} of {n} probes, evenly, to keep this page small; a page of "
            "fewer probes shows them all."
        )
    return [*notes, *(f"Left out: {what}." for what in run.omissions)]


def _probe(
    step: RunStep, names: Sequence[str], keys: Sequence[LoggedKey], first: tuple[int | None, list[LayerSpectrum]]
) -> dict[str, Any]:
    """Return what is shown of a probe; ``first`` is the step and the layers of the run's first one."""
    report = step.report
    layers = [report.layers.get(name) for name in names]
    how = f"{report.mode} mode, {report.precision}, curvature by {method_of(report)}"
    samples = "" if report.n_samples is None else f"{samples_of(report)}, "
    return {
        **_both(step, layers, keys),
        "facts": f"{samples}{how}, {report.top_k} directions per layer",
        "summary": [*summary(report), *summary_over_training([first, (step.step, layers_of(report))])],
        "problems": report.problems(),
        "skipped": group_by_reason(report.skipped),
        "quarters": [layer and shorten(fit.exponent for fit in layer.alpha_quartiles) for layer in layers],
        "winners": [(layer.rank_models.winner or "") if layer else "" for layer in layers],
        "notes": {name: note for name, layer in report.layers.items() if (note := _note(layer))},
    }


def _step_scales(steps: Sequence[RunStep]) -> Iterator[list[str]]:
    """Yield for each probe what the best factor on the optimizer's step was at the last one up to it that knows it."""
    sentences: list[str] = []
    known = too_long = 0
    for step in steps:
        if step.update and not math.isnan(scale := step.update.scale):
            known, too_long = known + 1, too_long + (scale < 0.5)
            sentences = [
                f"step/scale, the best factor on the optimizer's step, was {scale:.2g} at {step.label}; it was below "
                f"1/2, where a step raises the loss of its batch, at {too_long} of {known} probes."
            ]
        yield sentences


def _both(step: RunStep, layers: Sequence[LayerSpectrum | None], keys: Sequence[LoggedKey]) -> dict[str, Any]:
    """Return what both pages show of a probe."""
    report, medians = step.report, step.report.medians()
    return {
        "label": step.label,
        "step": step.step,
        "loss": short(report.loss),
        "kinds": {
            kind: shorten(medians.get(median_key(key.name, kind), math.nan) for key in keys if key.median)
            for kind in report.by_kind()
        },
        "values": [layer and _values(layer.scalars(), keys) for layer in layers],
        "doubts": [layer and layer.fit_quality.doubt for layer in layers],
    }


def _of_layers(layers: Mapping[str, LayerSpectrum], keys: Sequence[LoggedKey]) -> dict[str, Any]:
    """Return what both pages show of layers and quantities."""
    return {
        "layers": list(layers),
        "kinds": [layer.kind for layer in layers.values()],
        "keys": [key.name for key in keys],
        "meanings": {key.name: key.meaning for key in keys},
        "medians": {key.name: int(key.of_fit) for key in keys if key.median},
        "band": ALPHA_BAND,
    }


def _values(scalars: Mapping[str, float], keys: Sequence[LoggedKey]) -> list[Any]:
    return shorten(scalars.get(key.name, math.nan) for key in keys)


def _note(layer: LayerSpectrum) -> str:
    """Return what is missing of a layer, and why."""
    notes = {
        "alignment": layer.alignment_note,
        "weights": layer.weights.note if layer.weights else "",
        "curvature fraction": layer.fraction.note if layer.fraction else "",
    }
    parts = [f"{part}: {note}" for part, note in notes.items() if note and note != layer.note]
    return "; ".join(filter(None, [layer.note, *parts]))


def _spectrum(layer: LayerSpectrum | None) -> dict[str, Any] | None:
    """Return what the plots of one layer need: the points, and the intercepts of the lines through them."""
    if layer is None:
        return None
    sampled = bool((layer.h_stderr > 0).any())
    longer = len(layer.spectrum) > len(layer.sigma)
    models = {model: fit.coefficients for model, fit in layer.rank_models.fits.items() if not math.isnan(fit.bic)}
    return {
        "sigma": shorten(layer.sigma.tolist()),
        "h": shorten(layer.h.tolist()),
        "error": shorten(layer.h_stderr.tolist()) if sampled else None,
        "usable": layer.n_usable,
        "lines": shorten(fit.intercept for fit in (layer.alpha, layer.gamma, layer.s)),
        "method": layer.method,
        "spectrum": shorten(layer.spectrum.tolist()) if longer else None,
        "ranked": int((layer.spectrum > layer.noise_floor).sum()),
        "models": {model: shorten(coefficients) for model, coefficients in models.items()},
        "split": None if layer.alignment is None else _split(layer.alignment),
    }


def _split(alignment: LayerAlignment) -> list[Any]:
    """Return the three factors of h_k whose slopes on log sigma add up to alpha: name, values, intercept."""
    product = alignment.lambda_delta * alignment.lambda_a
    factors = {
        "beta": (product, alignment.beta),
        "phi": (alignment.phi_k, alignment.phi),
        "chi_slope": (alignment.chi, alignment.chi_slope),
    }
    return [[key, shorten(values.tolist()), short(fit.intercept)] for key, (values, fit) in factors.items()]


def _shape(layer: LayerSpectrum) -> str:
    m, n = layer.shape
    return f"{m} × {n}" + (f" / {layer.groups}" if layer.groups > 1 else "")


def shorten(values: Iterable[float]) -> list[Any]:
    """Return figures for JSON, as `short` does one."""
    return [short(value) for value in values]


def short(value: float) -> float | int | str | None:
    """Return a figure for JSON: rounded, NaN as None, infinity as "inf"."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return str(value)
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


BESIDE_MEDIANS = ("alpha_stderr",)
"""Quantities without a median that the page shows, too."""


def runs_data(runs: Sequence[Run], *, limit: int = DATA_BYTES) -> dict[str, Any]:
    """Return what the scripts of the page of several runs show, thinned to about ``limit`` bytes of JSON."""
    # A layer of several runs is as the first of them measured it last.
    layers = last_layers([step.report for run in reversed(runs) for step in run.steps])
    parts = {part for layer in layers.values() for part in layer.parts}
    keys = [
        key for key in LAYER_KEYS if (key.median or key.name in BESIDE_MEDIANS) and (not key.part or key.part in parts)
    ]
    shown = [_run(i, run, list(layers), keys, limit // len(runs)) for i, run in enumerate(runs)]
    return {
        **_of_layers(layers, keys),
        "looks": {"kinds": kind_looks(layer.kind for layer in layers.values())},
        "differences": differences(runs),
        "summary": comparison(runs),
        "notes": [
            note
            for run, data in zip(runs, shown, strict=True)
            for note in _notes(run, len(data["probes"]), of=f"{run.name}: ")
        ],
        "runs": shown,
    }


def _run(i: int, run: Run, names: Sequence[str], keys: Sequence[LoggedKey], limit: int) -> dict[str, Any]:
    rows = [_row(step, names, keys) for step in run.steps]
    size = max(len(script_json(row)) for row in rows)
    style = palette.RUN_STYLE[i % len(palette.RUN_STYLE)]
    dash = palette.PLOTLY_DASH[palette.RUN_DASHES[i // len(palette.RUN_STYLE) % len(palette.RUN_DASHES)]]
    return {
        "name": run.name,
        "look": [style.on_white, style.on_dark, palette.SYMBOLS[style.marker], dash],
        "options": options_of(run),
        "probes": [rows[j] for j in evenly(len(rows), max(2, limit // size))],
    }


def _row(step: RunStep, names: Sequence[str], keys: Sequence[LoggedKey]) -> dict[str, Any]:
    report, medians = step.report, step.report.medians()
    return {
        **_both(step, [report.layers.get(name) for name in names], keys),
        "scale": short(step.update.scale) if step.update else None,
        "medians": {key.name: short(medians.get(median_key(key.name), math.nan)) for key in keys if key.median},
    }
