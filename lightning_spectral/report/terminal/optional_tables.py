"""Tables of what is measured on request: one for each option, a row per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rich.table import Table

from lightning_spectral.analysis import trusted
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report.terminal.formatting import fit_table, fixed, percent, printable, short

NAME_LEAST = 12
"""Characters of a layer's name that are worth more than another column; the first table has more of it."""

Cell = Callable[[LayerSpectrum], str]


@dataclass(frozen=True)
class Requested:
    """Table of what one option measures.

    Attributes:
        title, caption: above and below it.
        measured: tells whether a layer was measured with the option.
        columns: heading -> a layer's cell.
    """

    title: str
    caption: str
    measured: Callable[[LayerSpectrum], bool]
    columns: Mapping[str, Cell]

    def table(self, layers: Iterable[LayerSpectrum], width: int) -> tuple[Table, str]:
        """Return a row per layer within so many characters, dim where its fit is not to be trusted; and the caption."""
        shown = list(layers)
        columns = {"layer": [printable(layer.name) for layer in shown]}
        columns |= {heading: [cell(layer) for layer in shown] for heading, cell in self.columns.items()}
        table, omitted = fit_table(
            columns, width, flexible="layer", least=NAME_LEAST, expendable=list(self.columns)[:0:-1],
            left=("layer",), dim=[not trusted(layer) for layer in shown],
        )  # fmt: skip
        return table, self.caption + omitted


def requested_of(report: SpectralReport) -> list[Requested]:
    """Return the tables of the options that a report was measured with."""
    return [requested for requested in REQUESTED if any(map(requested.measured, report.layers.values()))]


def _part(name: str) -> Callable[[LayerSpectrum], bool]:
    return lambda layer: name in layer.parts


def _of(key: str, show: Callable[[float], str] = fixed) -> Cell:
    """Return the cell of a logged quantity, "-" where the layer has none."""
    return lambda layer: show(_value(layer, key))


def _with_error(key: str, show: Callable[[float], str]) -> Cell:
    return lambda layer: f"{show(_value(layer, key))} ± {show(_value(layer, f'{key}_stderr'))}"


def _interval(key: str) -> Cell:
    return lambda layer: f"{fixed(_value(layer, f'{key}_low'))} to {fixed(_value(layer, f'{key}_high'))}"


def _value(layer: LayerSpectrum, key: str) -> float:
    return layer.scalars().get(key, math.nan)


def _quarters(layer: LayerSpectrum) -> str:
    return "  ".join(fixed(fit.exponent) for fit in layer.alpha_quartiles)


def _model(layer: LayerSpectrum) -> str:
    return (layer.rank_models.winner or "-").replace("_", " ")


REQUESTED = (
    Requested(
        "bootstrap: what the exponents owe to single points",
        "95 %: of the slopes of draws of the points; by quarter: of the directions, the strongest first",
        _part("intervals"),
        {
            "alpha 95 %": _interval("alpha"),
            "gamma 95 %": _interval("gamma"),
            "s 95 %": _interval("s"),
            "alpha by quarter": _quarters,
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
            "model": _model,
            "ΔBIC": _of("rank_margin"),
        },
    ),
)
"""Tables in the order in which they are printed."""
