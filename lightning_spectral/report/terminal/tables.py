"""Tables of a report for the terminal: layers, kinds of layers, and what was measured on request."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_spectral._messages import group_by_reason
from lightning_spectral.analysis import DOUBTFUL, compare_kinds, trusted
from lightning_spectral.layers.names import brief
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport, check_report
from lightning_spectral.report.terminal.formatting import (
    WHOLE_WIDTH,
    dimensions,
    fit_table,
    fixed,
    literal,
    percent,
    printable,
    short,
    width_for,
)

NAME_LEAST, REQUESTED_NAME_LEAST, PAPER_LEAST = 24, 12, 20
"""Characters worth more than another column: of a layer's name, in the first table and in those of options, and
of a line of what the paper has."""

Cell = Callable[[LayerSpectrum], str]


@dataclass(frozen=True)
class Requested:
    """Table of what one option measures, of the layers that were ``measured`` with it: heading -> a layer's cell."""

    title: str
    caption: str
    measured: Callable[[LayerSpectrum], bool]
    columns: Mapping[str, Cell]


def _part(name: str) -> Callable[[LayerSpectrum], bool]:
    return lambda layer: name in layer.parts


def _of(key: str, show: Callable[[float], str] = fixed) -> Cell:
    """Return the cell of a logged quantity, "-" where the layer has none."""
    return lambda layer: show(_value(layer, key))


def _with_error(key: str, show: Callable[[float], str]) -> Cell:
    return lambda layer: _plus_minus(_value(layer, key), _value(layer, f"{key}_stderr"), show)


def _plus_minus(value: float, error: float, show: Callable[[float], str] = fixed) -> str:
    return "-" if math.isnan(value) else f"{show(value)} ± {show(error)}"


def _interval(key: str) -> Cell:
    return lambda layer: f"{fixed(_value(layer, f'{key}_low'))} to {fixed(_value(layer, f'{key}_high'))}"


def _value(layer: LayerSpectrum, key: str) -> float:
    return layer.scalars().get(key, math.nan)


REQUESTED = (
    Requested(
        "bootstrap: what the exponents owe to single points",
        "95 %: of the slopes of draws of the points; by quarter: of the directions, the strongest first",
        _part("intervals"),
        {
            "alpha 95 %": _interval("alpha"),
            "gamma 95 %": _interval("gamma"),
            "s 95 %": _interval("s"),
            "alpha by quarter": lambda layer: "  ".join(fixed(fit.exponent) for fit in layer.alpha_quartiles),
        },
    ),
    Requested(
        "alignment: alpha split by the Kronecker factors",
        "alpha = beta + phi + chi_slope; chi: h over the product's; ratio: 1 where input and gradient are independent; "
        "rank: exp(entropy)",
        _part("alignment"),
        {
            "alpha": _of("alpha"),
            "beta": _of("beta"),
            "phi": _of("phi"),
            "chi_slope": _of("chi_slope"),
            "chi": _of("chi", short),
            "ratio": _of("concentration_ratio"),
            "rank a": _of("effective_rank_a", short),
            "rank delta": _of("effective_rank_delta", short),
        },
    ),
    Requested(
        "curvature_fraction: of the trace of each Hessian block",
        "fraction: sum of h over tr H; over random: how many times the curvature of a random direction",
        _part("fraction"),
        {
            "tr H ± se": _with_error("hessian_trace", short),
            "fraction ± se": _with_error("curvature_fraction", percent),
            "over random": _of("curvature_over_random", short),
        },
    ),
    Requested(
        "weight_spectra: beside those of gradient and curvature",
        "s_weight: decay of their squared singular values over all ranks; gamma_weight: of the leading ones",
        _part("weights"),
        {
            "s_weight": _of("s_weight"),
            "r2": _of("r2_s_weight"),
            "s": _of("s"),
            "gamma_weight": _of("gamma_weight"),
            "gamma": _of("gamma"),
        },
    ),
    Requested(
        "spectrum_top_k: rank models of the gradient spectrum",
        "ΔBIC: of the runner-up to the winner; below 2 none is clearly better",
        lambda layer: len(layer.spectrum) > len(layer.sigma),
        {
            "values": lambda layer: f"{layer.rank_models.n_used}/{len(layer.spectrum)}",
            "model": lambda layer: (layer.rank_models.winner or "-").replace("_", " "),
            "ΔBIC": _of("rank_margin"),
        },
    ),
)
"""Tables in the order in which they are printed."""


def _alpha(layer: LayerSpectrum) -> str:
    mark = " " if trusted(layer) or math.isnan(layer.alpha.exponent) else "?"
    return f"{_plus_minus(layer.alpha.exponent, layer.alpha.stderr)} {mark}"


COLUMNS: dict[str, Cell] = {
    "layer": lambda layer: layer.name,
    "kind": lambda layer: layer.kind,
    "shape": lambda layer: dimensions(layer.shape, layer.groups),
    "alpha ± se": _alpha,
    "r2": lambda layer: fixed(layer.alpha.r2),
    "signal": lambda layer: fixed(layer.gradient_noise.signal),
    "gamma": lambda layer: fixed(layer.gamma.exponent),
    "s": lambda layer: fixed(layer.s.exponent),
    "α·γ": lambda layer: fixed(layer.alpha_gamma),
    "error": lambda layer: percent(layer.transfer_error),
    "PR_h": lambda layer: fixed(layer.pr_curvature),
    "zeta": lambda layer: fixed(layer.zeta_bound),
    "points": lambda layer: f"{layer.alpha.n_used}/{len(layer.sigma)}",
}
"""Columns of the table of layers."""

CAPTION = (
    "h ~ sigma^alpha, sigma ~ k^-gamma, h ~ rank^-s; error: |s - α·γ| / |s|; PR_h: directions that carry h, zeta: its "
    f"bound; signal: share of the squared gradient that is no sampling noise; ?: {DOUBTFUL}"
)
"""Meaning of the columns of the table of layers, in a line."""

PAPER = "alpha in the paper"

LEAST_NEEDED = ("zeta", "shape", "α·γ", "PR_h", "kind", "s", "gamma", "error", "signal")
"""Columns that a narrow terminal may go without, the first ones first; alpha and r2 are always shown."""

KIND_LEAST_NEEDED = ("PR_h", "s", "gamma", "fits", "error")
"""Columns of the table of kinds that a narrow terminal may go without, the first ones first."""


def print_report(
    report: SpectralReport,
    title: str = "spectral report",
    *,
    layers: Collection[str] | None = None,
    console: Console | None = None,
) -> None:
    """Print a report to the terminal: a row per layer, then a row per kind of layer beside the paper's alpha.

    What was measured on request has a table for each option in between. In a narrow terminal names are shortened, the
    columns needed least are left out, and the caption says which.

    Args:
        report: what was measured.
        title: above the tables, before the step, the loss and the number of samples.
        layers: names of those that get a row; None: all.
        console: where to print; None: the terminal.
    """
    check_report(report)
    if console is None:
        console = Console()
        console.width = width_for(console)
    console.print()
    text = f"{title}: {heading(report)}"
    shown = report if layers is None else replace(report, layers={n: report.layers[n] for n in layers})
    if shown.layers or not report.layers:
        _print_table(console, *_layer_table(shown, text, console.width))
        for requested in REQUESTED:
            if not any(map(requested.measured, shown.layers.values())):
                continue
            # A title of its own would be broken to the width of the table.
            console.print(requested.title, style="italic", soft_wrap=_wide(console), highlight=False)
            table, omitted = _table(
                shown, {"layer": COLUMNS["layer"], **requested.columns}, console.width, left=("layer",),
                least=REQUESTED_NAME_LEAST, expendable=list(requested.columns)[:0:-1],
            )  # fmt: skip
            _print_table(console, table, requested.caption + omitted)
        text = "median per kind of layer, over the fits to trust, beside the paper's"
    if left := len(report.layers) - len(shown.layers):
        console.print(f"layers not shown: {left} of {len(report.layers)}\n", style="dim")
    console.print(kind_table(report, text, width=console.width))
    for problem in report.problems():
        console.print(literal(problem), style="yellow", soft_wrap=True)


def heading(report: SpectralReport) -> str:
    """Return when, on what and how a report was measured, in a line."""
    where = "" if report.step is None else f"step {report.step}, "
    how = f"{report.mode} mode, curvature by {method_of(report)}"
    return f"{where}loss {report.loss:.3f}, {samples_of(report)}, {how}"


def samples_of(report: SpectralReport) -> str:
    """Return the samples that gradient and curvature are of."""
    if report.curvature_samples in (None, report.n_samples):
        return f"{report.n_samples} samples"
    return f"gradient of {report.n_samples} samples, curvature of {report.curvature_samples}"


def _print_table(console: Console, table: Table, caption: str) -> None:
    console.print(table)
    # It names layers, which may look like markup.
    console.print(f"{caption}\n", style="dim", soft_wrap=_wide(console), highlight=False, markup=False, emoji=False)


def _wide(console: Console) -> bool:
    """Return whether a long line is left whole, for a file or a wide terminal, or broken between words."""
    return console.width >= WHOLE_WIDTH


def method_of(report: SpectralReport) -> str:
    """Return the method of the curvature: what "auto" chose, or what was asked for."""
    return report.chosen.partition(":")[0] or report.curvature


def layer_table(report: SpectralReport, title: str = "", *, width: int | None = None) -> Table:
    """Return a row per layer: exponents, fits and participation ratio. Fits not to be trusted are dim, with a "?"."""
    return _layer_table(report, title, width)[0]


def _layer_table(report: SpectralReport, title: str, width: int | None) -> tuple[Table, str]:
    """Return the table and its caption."""
    table, omitted = _table(
        report, COLUMNS, width, left=("layer", "kind", "shape"), least=NAME_LEAST, expendable=LEAST_NEEDED, title=title
    )
    return table, CAPTION + other_methods(report) + omitted


def _table(report: SpectralReport, columns: Mapping[str, Cell], width: int | None, **options: Any) -> tuple[Table, str]:
    """Return a row per layer, dim where its fit is not to be trusted, and what a caption says of columns left out."""
    layers = report.layers.values()
    cells = {heading: [printable(cell(layer)) for layer in layers] for heading, cell in columns.items()}
    return fit_table(cells, width, flexible="layer", dim=[not trusted(layer) for layer in layers], **options)


def other_methods(report: SpectralReport) -> str:
    """Return which layers were measured by another method than the one in the title, as a part of the caption."""
    others = {
        printable(brief(layer.name)): f"measured by {layer.method}"
        for layer in report.layers.values()
        if layer.method and layer.method != method_of(report)
    }
    return "".join(f"; {line}" for line in group_by_reason(others))


def kind_table(report: SpectralReport, title: str = "", *, width: int | None = None) -> Table:
    """Return a row per kind of layer: medians over its fits to trust, with their number, beside the paper's alpha."""
    rows = compare_kinds(report)
    columns = {
        "kind": [printable(row.kind) for row in rows],
        "fits": [f"{row.trusted}/{row.layers}" for row in rows],
        "alpha": [fixed(row.alpha) for row in rows],
        "gamma": [fixed(row.gamma) for row in rows],
        "s": [fixed(row.s) for row in rows],
        "error": [percent(row.transfer_error) for row in rows],
        "PR_h": [fixed(row.pr_curvature) for row in rows],
        PAPER: [row.paper_alpha for row in rows],
    }
    return fit_table(
        columns, width, flexible=PAPER, least=PAPER_LEAST, expendable=KIND_LEAST_NEEDED, title=title,
        left=("kind", PAPER), wrap=True,
    )[0]  # fmt: skip
