"""What the Kronecker factors of activations and backpropagated gradients say of alpha."""

from __future__ import annotations

import math
from collections.abc import Iterable

from examples.paper.finding import Finding, Outcomes, correlation, ranks, spread
from examples.paper.plots import clouds, strips
from lightning_spectral import LayerSpectrum
from lightning_spectral.record import median

LOW_RANK = 10.0


def kronecker(outcomes: Outcomes) -> Finding:
    """Effective ranks of the factors against the rank model, and the Kronecker curvature against the curvature."""
    rows, groups = [], {}
    everything: list[LayerSpectrum] = []
    for name, seeds in outcomes.items():
        layers = [layer for seed in seeds for layer in _with_factors(seed.last.layers.values())]
        everything += layers
        logs = [_log_correlation(layer) for layer in layers]
        rows.append([name, str(len(layers)), *_ranks_by_winner(layers), f"{median(logs):.2f}"])
        groups[name] = [_smaller_rank(layer) for layer in layers], [median(_finite(layer)) for layer in layers]
    by_model = {model: _of_model(everything, model) for model in ("exponential", "lognormal", "power_law")}
    found = [
        "Smaller effective rank, median: "
        + ", ".join(f"{model.replace('_', ' ')} {median(v):.1f} ({len(v)})" for model, v in by_model.items())
        + ". "
        + _low_rank(everything)
        + f" log h and log h_kron correlate at {median([_log_correlation(x) for x in everything]):.2f} (median)."
    ]
    return Finding(
        "Kronecker factors",
        "Do the spectra of C_A and C_delta decide which rank model the gradient follows, and how near does the "
        "Kronecker curvature h_kron come to h? Effective rank is exp(entropy) of a factor's eigenvalues.",
        "Where one factor has an effective rank below 10 the gradient's spectrum is exponential: mean 4.7 for "
        "exponential, 19.4 for log-normal layers; log h_kron and log h correlate at 0.97. Its chi carries powers of "
        "the batch size, ours does not.",
        found,
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
    rows, groups = [], {}
    for name, seeds in outcomes.items():
        layers = [layer for seed in seeds for layer in _with_factors(seed.last.layers.values())]
        for kind in dict.fromkeys(layer.kind for layer in layers):
            slopes = {
                "beta": [layer.alignment.beta.exponent for layer in layers if layer.kind == kind],
                "phi": [layer.alignment.phi.exponent for layer in layers if layer.kind == kind],
                "chi": [layer.alignment.chi_slope.exponent for layer in layers if layer.kind == kind],
                "alpha": [layer.alpha.exponent for layer in layers if layer.kind == kind],
            }
            rows.append([name, kind, *(spread(values) for values in slopes.values())])
            if kind != "embedding":
                groups |= {f"{name}, {kind}: {part}": values for part, values in slopes.items() if part != "alpha"}
    return Finding(
        "Alignment",
        "alpha = beta + phi + (slope of log chi): how much of it comes from the factors' eigenvalues, how much from "
        "how gradient directions lie in them, how much from what a Kronecker product misses? Over layers and seeds.",
        "alpha near 2 in convolutions is where the three balance.",
        ["The three add up to alpha in every layer, by the linearity of least squares."],
        ["network", "kind", "beta", "phi", "slope of log chi", "alpha"],
        rows,
        strips(groups, "The three parts of alpha, a tick per layer and seed", "slope on log sigma"),
    )


def concentration(outcomes: Outcomes) -> Finding:
    """abs(alpha - 2) against the concentration ratio."""
    rows, groups, every = [], {}, []
    for name, seeds in outcomes.items():
        layers = [layer for seed in seeds for layer in _with_factors(seed.last.layers.values())]
        slack = [abs(1 - layer.alignment.concentration_ratio) for layer in layers]
        gap = [abs(layer.alpha.exponent - 2) for layer in layers]
        pairs = [(s, g) for s, g in zip(slack, gap, strict=True) if math.isfinite(s) and math.isfinite(g)]
        every += pairs
        x, y = [s for s, _ in pairs], [g for _, g in pairs]
        groups[name] = x, y
        rows.append(
            [
                name,
                str(len(pairs)),
                spread([layer.alignment.concentration_ratio for layer in layers]),
                spread(y),
                f"{correlation(x, y):.2f}",
                f"{correlation(ranks(x), ranks(y)):.2f}",
            ]
        )
    x, y = [s for s, _ in every], [g for _, g in every]
    return Finding(
        "Concentration ratio",
        "Is alpha far from 2 where (u^T delta)^2 and (v^T a)^2 are not independent, that is where the mean of their "
        "product over the product of their means is far from 1?",
        "A correlation of 0.48 between abs(alpha - 2) and abs(1 - ratio), over 5 layers of one network.",
        [
            f"Over {len(every)} layers of all networks and seeds the correlation is {correlation(x, y):.2f}, of ranks "
            f"{correlation(ranks(x), ranks(y)):.2f}."
        ],
        ["network", "layers", "ratio, median over k", "abs(alpha - 2)", "correlation", "of ranks"],
        rows,
        clouds(groups, "A point per layer and seed", ("abs(1 - concentration ratio)", "abs(alpha - 2)")),
    )


def _with_factors(layers: Iterable[LayerSpectrum]) -> list[LayerSpectrum]:
    return [layer for layer in layers if layer.alignment is not None and not math.isnan(layer.alpha.exponent)]


def _smaller_rank(layer: LayerSpectrum) -> float:
    return min(layer.alignment.effective_rank_delta, layer.alignment.effective_rank_a)


def _of_model(layers: Iterable[LayerSpectrum], model: str) -> list[float]:
    return [_smaller_rank(layer) for layer in layers if layer.rank_models.winner == model]


def _ranks_by_winner(layers: list[LayerSpectrum]) -> list[str]:
    return [spread(_of_model(layers, model), 1) for model in ("exponential", "lognormal", "power_law")]


def _low_rank(layers: list[LayerSpectrum]) -> str:
    low = [layer for layer in layers if _smaller_rank(layer) < LOW_RANK]
    exponential = sum(layer.rank_models.winner == "exponential" for layer in low)
    return f"Of {len(low)} layers with one below 10, {exponential} have an exponential spectrum."


def _finite(layer: LayerSpectrum) -> list[float]:
    return [value for value in layer.alignment.chi.tolist() if math.isfinite(value) and value > 0]


def _log_correlation(layer: LayerSpectrum) -> float:
    pairs = [(h, k) for h, k in zip(layer.h.tolist(), layer.alignment.h_kron.tolist(), strict=True) if h > 0 and k > 0]
    return correlation([math.log(h) for h, _ in pairs], [math.log(k) for _, k in pairs])
