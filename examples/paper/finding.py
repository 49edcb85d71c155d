"""What an experiment found: a table beside the paper's figures, sentences computed from it, a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from examples.paper.outcome import Outcome
from lightning_spectral import LayerSpectrum, SpectralReport
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.fit_quality import GOOD_FIT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Outcomes = Mapping[str, Sequence[Outcome]]
"""Name of a training -> what came of it, one per seed."""


@dataclass(frozen=True)
class Finding:
    """What an experiment found.

    Attributes:
        title: of its section.
        question: what is asked.
        paper: what arXiv 2606.02596 reports.
        agrees: whether the same was found: yes, no, in part, or what there is to say of it in a few words.
        found: sentences.
        columns: heads of the table.
        rows: its cells.
        figure: of the same.
        records: what the table is of, for a file beside the page; none: no file.
    """

    title: str
    question: str
    paper: str
    agrees: str
    found: list[str]
    columns: list[str]
    rows: list[list[str]]
    figure: Figure
    records: Sequence[Mapping[str, Any]] = ()

    def record(self) -> dict[str, Any]:
        """What the pages are made of: all but the figure and the records."""
        kept = ("title", "question", "paper", "agrees", "found", "columns", "rows")
        return {name: getattr(self, name) for name in kept}


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean and sample standard deviation of those that are finite; a dash where there is none.

    >>> spread([1.0, 2.0, 3.0]), spread([0.5]), spread([float("nan")])
    ('2.00 ± 1.00', '0.50', '-')
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    text = f"{fmean(known):.{digits}f}"
    return f"{text} ± {stdev(known):.{digits}f}" if len(known) > 1 else text


def percent(share: float) -> str:
    """0.012 as "1.2 %".

    >>> percent(0.0123), percent(float("nan"))
    ('1.2 %', '-')
    """
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def joined(outcomes: Outcomes) -> SpectralReport:
    """The last reports of the first seed of every network as one, for a figure of them all."""
    reports = {name: seeds[0].last for name, seeds in outcomes.items()}
    layers = {f"{name}: {key}": layer for name, report in reports.items() for key, layer in report.layers.items()}
    return replace(next(iter(reports.values())), layers=layers, step=None, chosen="")


def straight(r2: float) -> bool:
    """Whether a fit is a line, which is all that the paper asks of one; of a fit to trust more is asked.

    >>> straight(0.95), straight(float("nan"))
    (True, False)
    """
    return r2 >= GOOD_FIT


def straight_layers(report: SpectralReport) -> list[LayerSpectrum]:
    """The layers whose alpha has an r2 of at least 0.9."""
    return [layer for layer in report.layers.values() if straight(layer.alpha.r2)]


def interior(report: SpectralReport) -> list[LayerSpectrum]:
    """Convolutions but the first: those that the paper's range is of."""
    return [layer for layer in list(report.layers.values())[1:] if layer.kind == "conv"]


def body(report: SpectralReport) -> list[LayerSpectrum]:
    """Interior convolutions; where there are none, all layers but convolutions and heads."""
    return interior(report) or [layer for layer in report.layers.values() if layer.kind not in ("conv", "head")]


def signals(layers: Iterable[Iterable[LayerSpectrum]]) -> float:
    """The median share of the squared gradient that is no sampling noise, over all layers of all seeds."""
    return median([layer.gradient_noise.signal for of_seed in layers for layer in of_seed])


def alphas(layers: Iterable[LayerSpectrum]) -> float:
    """The median alpha."""
    return median([layer.alpha.exponent for layer in layers])


def kinds_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Kinds of layers, in the order of the network."""
    return list(dict.fromkeys(layer.kind for outcome in outcomes for layer in outcome.last.layers.values()))


def by_kind(report: SpectralReport, kind: str) -> list[LayerSpectrum]:
    """The layers of a kind."""
    return report.by_kind().get(kind, [])


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; NaN for fewer than 3 pairs or no variance.

    >>> round(correlation([1, 2, 3], [2, 4, 6]), 6)
    1.0
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < 3:
        return float("nan")
    try:
        return statistics.correlation(*zip(*pairs, strict=True))
    except statistics.StatisticsError:
        return float("nan")


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest, equal values sharing their mean rank: Spearman's correlation is `correlation` of these.

    >>> ranks([3.0, 1.0, 3.0])
    [2.5, 1.0, 2.5]
    """
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]
