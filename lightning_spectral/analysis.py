"""Findings of a report: kinds of layers beside the paper's ranges, the transfer identity, and layers that deviate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.fit_quality import DOUBTFUL, TRUSTED
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport

__all__ = ["DOUBTFUL", "TRUSTED"]

DEVIATES, DEVIATES_STDERR, SIBLINGS = 0.25, 3.0, 3
"""A layer deviates from the median of its kind, of at least so many layers, by more than 0.25 and 3 standard errors."""

ALPHA_BAND = (1.85, 2.15)
"""Band around alpha = 2, where curvature is the square of the gradient: the grey band of figures and pages."""

Layers = SpectralReport | Sequence[LayerSpectrum]

Reported = tuple[float, float, str]

REPORTED: dict[str, tuple[Reported, ...]] = {
    "conv": ((1.94, 2.17, "ResNet-18, VGG-11, ResNet-50"),),
    "dense": ((2.18, 2.18, "MLP"),),
    "head": ((1.23, 1.65, "10 classes"), (0.90, 0.90, "200"), (2.83, 2.83, "1000"), (4.53, 4.53, "small GPT")),
    "attention_qkv": ((1.43, 1.43, "small GPT"),),
    "attention_out": ((1.17, 1.17, "small GPT"),),
    "mlp_up": ((0.84, 0.84, "small GPT"),),
    "mlp_down": ((1.15, 1.15, "small GPT"),),
}
"""alpha by kind of layer as arXiv 2606.02596 reports it: the lowest and the highest mean, and of which networks."""


def _in_words(reported: Reported) -> str:
    low, high, networks = reported
    return f"{low:.2f} ({networks})" if low == high else f"{low:.2f} to {high:.2f} ({networks})"


PAPER_ALPHA = {kind: ", ".join(map(_in_words, reported)) for kind, reported in REPORTED.items()}
"""`REPORTED` in words."""

PAPER_RANGES = {kind: reported[0][:2] for kind, reported in REPORTED.items() if len(reported) == 1}
"""(lowest, highest) by kind, but for heads, whose alpha goes with the number of classes."""


@dataclass(frozen=True)
class KindSummary:
    """Medians over the fits to trust of one kind of layer, and what the paper reports.

    Attributes:
        kind: of the layers.
        layers: how many there are.
        trusted: how many of them have a fit to trust.
        alpha, gamma, s, transfer_error, pr_curvature: medians over these; NaN where there is none.
        paper_alpha: the paper's figures in words; empty where it has none.
    """

    kind: str
    layers: int
    trusted: int
    alpha: float
    gamma: float
    s: float
    transfer_error: float
    pr_curvature: float
    paper_alpha: str


def compare_kinds(report: SpectralReport) -> list[KindSummary]:
    """Return the median fit of each kind beside the paper's range, kinds in the order of the network."""
    return [_summarized(kind, layers) for kind, layers in report.by_kind().items()]


def _summarized(kind: str, layers: Sequence[LayerSpectrum]) -> KindSummary:
    fits = [layer for layer in layers if trusted(layer)]
    return KindSummary(
        kind=kind,
        layers=len(layers),
        trusted=len(fits),
        alpha=median([x.alpha.exponent for x in fits]),
        gamma=median([x.gamma.exponent for x in fits]),
        s=median([x.s.exponent for x in fits]),
        transfer_error=median([x.transfer_error for x in fits]),
        pr_curvature=median([x.pr_curvature for x in fits]),
        paper_alpha=PAPER_ALPHA.get(kind, ""),
    )


def trusted(layer: LayerSpectrum) -> bool:
    """Return whether alpha of a layer is to be trusted, as `FitQuality` says."""
    return layer.fit_quality.trusted


@dataclass(frozen=True)
class TransferIdentity:
    """Result of comparing s with alpha gamma.

    Attributes:
        layers: all that have s, alpha and gamma.
        median_error: median of abs(s - alpha gamma) / abs(s) over those with a fit to trust; NaN where there is none.
        worst: of those with a fit to trust, the one with the largest error; None where there is none.
    """

    layers: tuple[LayerSpectrum, ...]
    median_error: float
    worst: LayerSpectrum | None

    @property
    def trusted(self) -> list[LayerSpectrum]:
        """Return the layers with a fit to trust."""
        return [layer for layer in self.layers if layer.fit_quality.trusted]


def transfer_identity(report: Layers) -> TransferIdentity:
    """Compare s with alpha gamma per layer; return the median error over the fits to trust."""
    layers = tuple(x for x in layers_of(report) if not math.isnan(x.transfer_error))
    good = [x for x in layers if trusted(x)]
    worst = max(good, key=lambda x: x.transfer_error, default=None)
    return TransferIdentity(layers, median([x.transfer_error for x in good]), worst)


def deviating(report: Layers) -> list[tuple[LayerSpectrum, float]]:
    """Return layers whose alpha is far from its kind's, each with the median of its kind; among fits to trust."""
    kinds: dict[str, list[LayerSpectrum]] = {}
    for layer in layers_of(report):
        if trusted(layer):
            kinds.setdefault(layer.kind, []).append(layer)
    out = []
    for layers in kinds.values():
        middle = median([x.alpha.exponent for x in layers])
        far = [x for x in layers if abs(x.alpha.exponent - middle) > max(DEVIATES, DEVIATES_STDERR * x.alpha.stderr)]
        out += [(x, middle) for x in far if len(layers) >= SIBLINGS]
    return out


def layers_of(report: Layers) -> list[LayerSpectrum]:
    """Return the layers of a report in the order of the network."""
    return list(report.layers.values() if isinstance(report, SpectralReport) else report)
