"""What the Kronecker factors of activations and backpropagated gradients say of alpha."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from examples.paper.finding import Finding, Outcomes, correlation, ranks, spread, straight
from examples.paper.outcome import Outcome
from examples.paper.plots import clouds, parts
from lightning_spectral import LayerAlignment, LayerSpectrum
from lightning_spectral.numerics.power_law import RankModel
from lightning_spectral.numerics.statistics import median

LOW_RANK = 10.0
MODELS: tuple[RankModel, ...] = ("exponential", "lognormal", "power_law")


class Aligned(NamedTuple):
    """A layer with an alpha, and what its factors say of it."""

    layer: LayerSpectrum
    split: LayerAlignment

    @property
    def alpha(self) -> float:
        """Exponent of curvature in sigma."""
        return self.layer.alpha.exponent

    @property
    def winner(self) -> RankModel | None:
        """The rank model of its gradient."""
        return self.layer.rank_models.winner

    @property
    def smaller_rank(self) -> float:
        """The smaller effective rank of the two factors."""
        return min(self.split.effective_rank_delta, self.split.effective_rank_a)

    @property
    def log_correlation(self) -> float:
        """Of log h and log h_kron over k."""
        found = zip(self.layer.h.tolist(), self.split.h_kron.tolist(), strict=True)
        pairs = [(math.log(h), math.log(k)) for h, k in found if h > 0 and k > 0]
        return correlation([h for h, _ in pairs], [k for _, k in pairs])


def _aligned(seeds: Sequence[Outcome]) -> list[Aligned]:
    layers = chain.from_iterable(seed.last.layers.values() for seed in seeds)
    found = [Aligned(layer, layer.alignment) for layer in layers if layer.alignment is not None]
    return [x for x in found if not math.isnan(x.alpha) and not math.isnan(x.split.beta.exponent)]


def kronecker(outcomes: Outcomes) -> Finding:
    """Effective ranks of the factors against the rank model, and the Kronecker curvature against the curvature."""
    rows: list[list[str]] = []
    groups: dict[str, Any] = {}
    every: list[Aligned] = []
    for name, seeds in outcomes.items():
        layers = _aligned(seeds)
        every += layers
        of_models = [spread([x.smaller_rank for x in layers if x.winner == model], 1) for model in MODELS]
        rows.append([name, str(len(layers)), *of_models, f"{median([x.log_correlation for x in layers]):.2f}"])
        groups[name] = [x.smaller_rank for x in layers], [x.split.median_chi for x in layers]
    medians = [
        f"{model.replace('_', ' ')} {median(of_model):.1f} ({len(of_model)} layers)"
        for model in MODELS
        if (of_model := [x.smaller_rank for x in every if x.winner == model])
    ]
    low = [x for x in every if x.smaller_rank < LOW_RANK]
    exponential = sum(x.winner == "exponential" for x in low)
    return Finding(
        "Kronecker factors",
        "Do the spectra of C_A and C_delta decide which rank model the gradient follows, and how near does the "
        "Kronecker curvature h_kron come to h? Effective rank is exp(entropy) of a factor's eigenvalues.",
        "Where one factor has an effective rank below 10 the gradient's spectrum is exponential: mean 4.7 for "
        "exponential, 19.4 for log-normal layers; log h_kron and log h correlate at 0.97. Its chi carries powers of "
        "the batch size, ours does not.",
        f"log h and log h_kron correlate at {median([x.log_correlation for x in every]):.2f}; "
        f"{exponential} of {len(low)} layers of low rank are exponential",
        [
            f"Smaller effective rank, median: {', '.join(medians)}. Of the {len(low)} layers with one below 10, "
            f"{exponential} have an exponential spectrum. log h and log h_kron correlate at "
            f"{median([x.log_correlation for x in every]):.2f} (median over layers); the median of chi = h / h_kron "
            f"is {median([x.split.median_chi for x in every]):.3g}; it grows with the positions (pixels, tokens) that "
            "a sample's gradient is summed over."
        ],
        ["network", "layers", "rank: exponential", "log-normal", "power law", "correlation of log h and log h_kron"],
        rows,
        clouds(
            groups,
            "Curvature over Kronecker curvature, a point per layer and seed",
            ("smaller effective rank of the two factors", "median chi = h / h_kron"),
            log=True,
        ),
    )


def alignment(outcomes: Outcomes) -> Finding:
    """alpha as a sum of three slopes."""
    rows: list[list[str]] = []
    drawn: dict[str, dict[str, list[float]]] = {}
    for name, seeds in outcomes.items():
        layers = _aligned(seeds)
        for kind in dict.fromkeys(x.layer.kind for x in layers):
            of_kind = [x for x in layers if x.layer.kind == kind]
            slopes = _slopes(of_kind) | {"alpha": [x.alpha for x in of_kind]}
            rows.append([name, kind, *map(spread, slopes.values())])
            drawn[f"{name}: {kind.replace('_', ' ')}"] = slopes
    return Finding(
        "Alignment",
        "alpha = beta + phi + (slope of log chi): how much of it comes from the factors' eigenvalues, how much from "
        "how gradient directions lie in them, how much from what a Kronecker product misses? Over layers and seeds.",
        "The decomposition is the paper's; its published files hold eigenvalues and rho of 15 layers, not the slopes.",
        "no figures to compare with",
        [_parts([x for seeds in outcomes.values() for x in _aligned(seeds) if straight(x.layer.alpha.r2)])],
        ["network", "kind", "beta", "phi", "slope of log chi", "alpha"],
        rows,
        parts(
            drawn, "alpha and its three parts, mean and standard deviation over layers and seeds", "slope on log sigma"
        ),
    )


def _slopes(layers: Sequence[Aligned]) -> dict[str, list[float]]:
    return {
        "beta": [x.split.beta.exponent for x in layers],
        "phi": [x.split.phi.exponent for x in layers],
        "the slope of log chi": [x.split.chi_slope.exponent for x in layers],
    }


def _parts(layers: Sequence[Aligned]) -> str:
    """How much of alpha is where, over all layers, and what goes with it."""
    alpha, slopes = [x.alpha for x in layers], _slopes(layers)
    means = ", ".join(f"{name} {spread(values)}" for name, values in slopes.items())
    with_alpha = ", ".join(f"{name} {correlation(values, alpha):+.2f}" for name, values in slopes.items())
    kronecker_only = [b + p for b, p in zip(slopes["beta"], slopes["phi"], strict=True)]
    return (
        f"Over the {len(layers)} layers with an r2 of at least 0.9: {means}, which add up to alpha {spread(alpha)} in "
        f"every layer, by the linearity of least squares. Correlation with alpha: {with_alpha}; beta + phi, which is "
        f"what the Kronecker factors know, {correlation(kronecker_only, alpha):+.2f}."
    )


def concentration(outcomes: Outcomes) -> Finding:
    """abs(alpha - 2) against the concentration ratio."""
    rows: list[list[str]] = []
    groups: dict[str, Any] = {}
    every: list[tuple[float, float]] = []
    for name, seeds in outcomes.items():
        layers = _aligned(seeds)
        found = [(abs(1 - x.split.concentration_ratio), abs(x.alpha - 2)) for x in layers]
        pairs = [pair for pair in found if all(map(math.isfinite, pair))]
        every += pairs
        groups[name] = [s for s, _ in pairs], [g for _, g in pairs]
        ratios = spread([x.split.concentration_ratio for x in layers])
        rows.append([name, str(len(pairs)), ratios, spread([g for _, g in pairs]), *_correlations(pairs)])
    pearson, spearman = _correlations(every)
    return Finding(
        "Concentration ratio",
        "Is alpha far from 2 where (u^T delta)^2 and (v^T a)^2 are not independent, that is where the mean of their "
        "product over the product of their means is far from 1?",
        "A correlation of 0.48 between abs(alpha - 2) and abs(1 - ratio), over 5 layers of one network.",
        f"a correlation of {pearson} over {len(every)} layers",
        [f"Over {len(every)} layers of all networks and seeds the correlation is {pearson}, of ranks {spearman}."],
        ["network", "layers", "ratio, median over k", "abs(alpha - 2)", "correlation", "of ranks"],
        rows,
        clouds(groups, "A point per layer and seed", ("abs(1 - concentration ratio)", "abs(alpha - 2)")),
    )


def _correlations(pairs: Sequence[tuple[float, float]]) -> list[str]:
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    found = (correlation(x, y), correlation(ranks(x), ranks(y)))
    return [f"{value:.2f}" if math.isfinite(value) else "-" for value in found]
