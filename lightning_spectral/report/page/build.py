"""One self-contained HTML page of a run: summary in words, table of layers, interactive plots."""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_spectral._messages import group_by_reason
from lightning_spectral._version import __version__
from lightning_spectral.analysis import ALPHA_BAND, DOUBTFUL
from lightning_spectral.records.alignment import LayerAlignment
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.log_keys import LAYER_KEYS, LoggedKey
from lightning_spectral.records.report import SpectralReport, evenly
from lightning_spectral.report.runs.run import LayerFacts, Probe, Run, RunError
from lightning_spectral.summary import summary, summary_over_training

PAGE_BYTES = 6_000_000
"""What a page may weigh, to be sent by mail. plotly.js takes 2 MB of it, compressed."""

DATA_BYTES = 3_000_000
"""What its data may weigh. Longer runs are thinned evenly."""

DIGITS = 6
"""Significant digits of the page's figures."""

GENERATOR = b'<meta name="generator" content="lightning-spectral '
"""By which a page is known as one."""


def plotly_js() -> str:
    """The source of plotly.js, from the Python package plotly.

    Raises:
        ImportError: if plotly is not installed; the message says how to install it.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('the page\'s plots need plotly: pip install "lightning-spectral[report]"') from error
    source: str = get_plotlyjs()
    return source


def write_page(run: Run, path: str | Path, *, title: str | None = None) -> Path:
    """Write a run's page to a file, whose folder is made if it is not there.

    Args:
        run: what to show: `read_run` of files, or `run_of` a probe's history.
        path: the file.
        title: of the page; the run's name where none is given.

    Raises:
        ImportError: if plotly is not installed.
        RunError: if the run is empty, or the file cannot be written.
    """
    path = Path(path)
    text = page(run, title=title)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files may hold bytes that are no UTF-8.
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def is_page(path: Path) -> bool:
    """Whether a file can be read and is a page that `write_page` wrote."""
    try:
        with path.open("rb") as file:
            return GENERATOR in file.read(4096)
    except OSError:
        return False


def page(run: Run, *, title: str | None = None) -> str:
    """The page's HTML, which needs no network: its style, its scripts and its data are within it."""
    if not run.probes:
        raise RunError(f"{run.name}: no probe to show")
    data = page_data(run)
    compressed = gzip.compress(plotly_js().encode(), mtime=0)
    parts = {
        "title": html.escape(title or run.name),
        "version": __version__,
        "summary": "".join(f"<li>{html.escape(sentence)}</li>" for sentence in data["probes"][-1]["summary"]),
        "sources": html.escape("; ".join(run.sources)),
        "doubtful": html.escape(DOUBTFUL),
        "style": _asset("page.css"),
        "plotly": base64.b64encode(compressed).decode(),
        "data": script_json(data),
        **{name: _asset(f"{name}.js") for name in ("figures", "overview", "layer", "page")},
    }
    # In one pass: what is put in may look like a place to put something.
    return re.sub(
        r"<!--=(\w+)-->|/\*=(\w+)\*/", lambda match: parts[match.group(1) or match.group(2)], _asset("page.html")
    )


def script_json(data: Any) -> str:
    """JSON that may stand within a script element: no tag, comment or line separator can be in it.

    >>> "<" in script_json("</script><!--")
    False
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(run: Run, *, limit: int = DATA_BYTES) -> dict[str, Any]:
    """What the page's scripts show, thinned to about ``limit`` bytes of JSON."""
    names = _names(run.probes)
    held = {quantity for probe in run.probes for quantity in _quantities(probe)}
    keys = [key for key in LAYER_KEYS if not key.part or key.name in held]
    rows = [_probe(probe, names, keys, run.probes[: i + 1]) for i, probe in enumerate(run.probes)]
    spectra = [None if p.report is None else _spectra(p.report, names) for p in run.probes]
    kept, whole = _thin(rows, spectra, limit)
    facts = {name: fact for probe in run.probes for name, fact in probe.facts.items()}
    return {
        "layers": names,
        "kinds": [facts[name].kind if name in facts else "" for name in names],
        "shapes": [_shape(facts[name]) if name in facts else "" for name in names],
        "keys": [key.name for key in keys],
        "meanings": {key.name: key.meaning for key in keys},
        "band": ALPHA_BAND,
        "notes": _notes(run, spectra, kept, whole),
        "probes": [rows[i] | {"spectra": spectra[i] if i in whole else None} for i in kept],
    }


def _thin(rows: Sequence[Any], spectra: Sequence[Any], limit: int) -> tuple[list[int], set[int]]:
    """Which probes to keep, and of these the ones to keep with their spectra.

    Scalars, the curves over training, may take half of the limit, and spectra what is left.
    """
    size = max(len(script_json(row)) for row in rows)
    with_spectra = [i for i, spectrum in enumerate(spectra) if spectrum is not None]
    half = limit // 2 if with_spectra else limit
    kept = evenly(len(rows), max(1, half // size))
    candidates = [i for i in kept if spectra[i] is not None]
    if not candidates:
        return kept, set()
    each = max(len(script_json(spectra[i])) for i in candidates)
    whole = evenly(len(candidates), (limit - size * len(kept)) // each)
    return kept, {candidates[i] for i in whole}


def _notes(run: Run, spectra: Sequence[Any], kept: Sequence[int], whole: set[int]) -> list[str]:
    """What the page lacks and how to get it."""
    n, known = len(run.probes), sum(spectrum is not None for spectrum in spectra)
    notes = []
    if not known:
        notes.append(_scalars_alone(run.probes))
    elif known < n:
        notes.append(
            f"sigma_k and h_k are known at {known} of {n} probes, where a checkpoint or JSON report holds them; the "
            "others are scalars of a log."
        )
    if len(kept) < n:
        notes.append(f"{len(kept)} of {n} probes are shown, evenly, to keep this page small.")
    if known and len(whole) < min(known, len(kept)):
        notes.append(
            f"sigma_k and h_k are shown at {len(whole)} of {known} probes, evenly, to keep this page small; a page of "
            "fewer probes shows them all."
        )
    most = max(probe.n_layers for probe in run.probes)
    logged = max(len(probe.layers) for probe in run.probes)
    if logged < most:
        notes.append(f"{logged} of {most} layers were logged one by one; SpectralProbe(log_layers=...) chooses which.")
    if any(probe.report is None and not _quantities(probe) >= {"gamma", "s"} for probe in run.probes):
        notes.append(
            'The log holds some quantities of each layer; SpectralProbe(log_quantities="all") logs all of them.'
        )
    return [*notes, *(f"Left out: {what}." for what in run.left_out)]


def _scalars_alone(probes: Sequence[Probe]) -> str:
    """What a log lacks, with a table of layers beside it and without."""
    more = (
        "Checkpoints and JSON reports hold all of it and can be given beside the log: lightning-spectral report LOG "
        "last.ckpt, or a file written by probe.last_report.to_json(FILE)."
    )
    if any(probe.facts for probe in probes):
        return f"A log holds scalars only, and the table of layers beside it too: no single sigma_k and h_k. {more}"
    return (
        "A log holds scalars only: no single sigma_k and h_k, and neither the kind nor the shape nor the place of "
        f"a layer. Layers stand in the order of their names. {more} In a CSVLogger's or a WandbLogger's run, "
        "SpectralProbe(log_tables=True) writes kinds, shapes and all quantities of every layer."
    )


def _quantities(probe: Probe) -> set[str]:
    return {quantity for values in probe.layers.values() for quantity in values}


def _names(probes: Sequence[Probe]) -> list[str]:
    """All layers, in the order of the last probe that tells the network's, else of the last one."""
    first = next((p for p in reversed(probes) if p.facts), probes[-1])
    return list(dict.fromkeys(name for probe in (first, *reversed(probes)) for name in probe.layers))


def _probe(probe: Probe, names: Sequence[str], keys: Sequence[LoggedKey], until: Sequence[Probe]) -> dict[str, Any]:
    exponents = probe.exponents()
    said = [*summary(exponents), *summary_over_training([(p.step, p.exponents()) for p in (until[0], until[-1])])]
    empty: dict[str, float] = {}
    rows = [probe.layers.get(name, empty) for name in names]
    report = probe.report
    trusted = {x.name for x in exponents if x.trusted}
    return {
        "label": probe.label,
        "step": probe.step,
        "kinds": {kind: _short(alpha) for kind, alpha in probe.kind_alphas().items()},
        "loss": _short(probe.loss),
        "facts": "" if report is None else _facts(report),
        "summary": said,
        "problems": [] if report is None else report.problems(),
        "skipped": [] if report is None else group_by_reason(report.skipped),
        "values": [[_short(row.get(key.name, math.nan)) for key in keys] if row else None for row in rows],
        "trusted": [int(name in trusted) for name in names],
        "quarters": [_quarters(probe.facts.get(name)) for name in names],
        "winners": [probe.facts[name].rank_model if name in probe.facts else "" for name in names],
        "notes": _notes_of(probe),
    }


def _quarters(facts: LayerFacts | None) -> list[Any] | None:
    return [_short(alpha) for alpha in facts.quarters] if facts and facts.quarters else None


def _notes_of(probe: Probe) -> dict[str, str]:
    """What is missing of which layer, and why."""
    layers = {} if probe.report is None else probe.report.layers
    notes = {name: [facts.note] for name, facts in probe.facts.items()}
    for name, layer in layers.items():
        parts = {"alignment": layer.alignment_note, "weights": layer.weights, "curvature fraction": layer.fraction}
        found = {what: part if isinstance(part, str) else part.note if part else "" for what, part in parts.items()}
        notes[name] += [f"{what}: {note}" for what, note in found.items() if note and note != layer.note]
    return {name: "; ".join(filter(None, lines)) for name, lines in notes.items() if any(lines)}


def _spectra(report: SpectralReport, names: Sequence[str]) -> list[Any]:
    return [_spectrum(report.layers[name]) if name in report.layers else None for name in names]


def _spectrum(layer: LayerSpectrum) -> dict[str, Any]:
    """What the plots of one layer need: the points, and the intercepts of the lines through them."""
    sampled = bool((layer.h_stderr > 0).any())
    longer = len(layer.spectrum) > len(layer.sigma)
    models = {model: fit.coefficients for model, fit in layer.rank_models.fits.items() if not math.isnan(fit.bic)}
    return {
        "sigma": [_short(x) for x in layer.sigma.tolist()],
        "h": [_short(x) for x in layer.h.tolist()],
        "error": [_short(x) for x in layer.h_stderr.tolist()] if sampled else None,
        "usable": layer.n_usable,
        "lines": [_short(fit.intercept) for fit in (layer.alpha, layer.gamma, layer.s)],
        "method": layer.method,
        "spectrum": [_short(x) for x in layer.spectrum.tolist()] if longer else None,
        "ranked": int((layer.spectrum > layer.noise_floor).sum()),
        "models": {model: [_short(x) for x in coefficients] for model, coefficients in models.items()},
        "split": None if layer.alignment is None else _split(layer.alignment),
    }


def _split(alignment: LayerAlignment) -> list[Any]:
    """The three factors of h_k whose slopes on log sigma add up to alpha: name of the slope, values, intercept."""
    product = alignment.lambda_delta * alignment.lambda_a
    parts = {
        "beta": (product, alignment.beta),
        "phi": (alignment.phi_k, alignment.phi),
        "chi_slope": (alignment.chi, alignment.chi_slope),
    }
    return [[key, [_short(x) for x in values.tolist()], _short(fit.intercept)] for key, (values, fit) in parts.items()]


def _facts(report: SpectralReport) -> str:
    samples = "" if report.n_samples is None else f"{report.n_samples} samples, "
    method = report.chosen.partition(":")[0] or report.curvature
    return (
        f"{samples}{report.mode} mode, {report.precision}, curvature by {method}, {report.top_k} directions per layer"
    )


def _shape(layer: LayerFacts) -> str:
    m, n = layer.shape
    return f"{m} × {n}" + (f" / {layer.groups}" if layer.groups > 1 else "")


def _short(value: float) -> float | int | str | None:
    """A figure for JSON: rounded, NaN as None, infinity as "inf"."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return str(value)
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


def _asset(name: str) -> str:
    return (files("lightning_spectral.report.page") / "assets" / name).read_text(encoding="utf-8")
