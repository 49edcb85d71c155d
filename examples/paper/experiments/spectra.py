"""Participation ratios and their bounds, their growth with width, and rank models over training."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from statistics import fmean

from lightning_spectral.report.figures import plot_participation_ratio, plot_rank_models_over_training

from examples.paper.finding import Finding, Outcomes, joined, percent, spread
from examples.paper.plots import curves
from lightning_spectral.record import median

STRAIGHT = 0.98
PAPER_WIDTH = {64.0: 2.5, 512.0: 3.3}


def participation(outcomes: Outcomes) -> Finding:
    """PR_h against the finite-window zeta bound."""
    rows = []
    total = Counter[str]()
    for name, seeds in outcomes.items():
        layers = [layer for seed in seeds for layer in seed.last.layers.values()]
        straight = [layer for layer in layers if layer.s.r2 > STRAIGHT]
        # A pure power law attains the bound, up to rounding.
        held = [layer for layer in straight if layer.pr_curvature <= layer.zeta_bound_window * (1 + 1e-9)]
        excess = [layer.pr_curvature / layer.zeta_bound_window - 1 for layer in straight if layer not in held]
        total.update(straight=len(straight), held=len(held))
        rows.append(
            [
                name,
                str(len(layers)),
                f"{median([layer.pr_curvature for layer in layers]):.2f}",
                f"{median([layer.zeta_bound_window for layer in layers]):.2f}",
                f"{len(held)} of {len(straight)}",
                percent(max(excess)) if excess else "-",
            ]
        )
    return Finding(
        "Participation ratio and the zeta bound",
        "How many directions carry the curvature, PR_h = (sum h)^2 / sum h^2, and is that at most "
        "zeta(alpha gamma)^2 / zeta(2 alpha gamma), with sums over the window, where the curvature is a power law of "
        "its rank (r2 of s above 0.98)?",
        "PR_h on the window is 1.0 to 1.8.",
        [f"The bound holds in {total['held']} of the {total['straight']} layers with an r2 of s above 0.98."],
        ["network", "layers", "median PR_h", "median bound", "bound holds, r2 of s > 0.98", "largest excess"],
        rows,
        plot_participation_ratio(joined(outcomes)),
    )


def width_scaling(outcomes: Outcomes) -> Finding:
    """PR of the hidden layer of an MLP against its width."""
    hidden = {
        float(next(iter(seeds[0].last.layers.values())).shape[0]): [
            next(iter(seed.last.layers.values())) for seed in seeds
        ]
        for seeds in outcomes.values()
    }
    pr_h = {width: [layer.pr_curvature for layer in layers] for width, layers in hidden.items()}
    pr_grad = {width: [layer.pr_gradient for layer in layers] for width, layers in hidden.items()}
    rows = [
        [f"{width:g}", spread(pr_h[width]), spread(pr_grad[width]), spread([x.alpha.exponent for x in layers])]
        for width, layers in hidden.items()
    ]
    means = [fmean(values) for values in pr_h.values()]
    steady = all(a < b for a, b in pairwise(means))
    found = [
        f"PR_h goes from {means[0]:.2f} at width {min(hidden):g} to {means[-1]:.2f} at {max(hidden):g}, "
        f"{'growing at every step' if steady else 'not growing at every step'}."
    ]
    return Finding(
        "Width",
        "Does the number of directions that carry the curvature grow with the width of a layer? An MLP with one "
        "hidden layer, trained alike at every width.",
        "PR grows from 2.5 to 3.3 as the width goes from 64 to 512.",
        found,
        ["width", "PR_h", "PR of the gradient", "alpha"],
        rows,
        curves(
            {"PR_h": pr_h, "PR of the gradient": pr_grad},
            "Participation ratio of the hidden layer",
            ("width", "participation ratio"),
            paper=PAPER_WIDTH,
            log_x=True,
        ),
    )


def rank_models(outcomes: Outcomes) -> Finding:
    """Which rank model wins, over training."""
    models = ("power_law", "exponential", "lognormal")
    rows = []
    for name, seeds in outcomes.items():
        for i, report in enumerate(seeds[0].reports):
            layers = [layer for seed in seeds for layer in seed.reports[i].layers.values()]
            wins = Counter(layer.rank_models.winner for layer in layers)
            margin = median([layer.rank_models.margin for layer in layers])
            shares = [percent(wins[model] / len(layers)) for model in models]
            rows.append([name, str(report.step), str(len(layers)), *shares, f"{margin:.1f}"])
    final = [layer for seeds in outcomes.values() for seed in seeds for layer in seed.last.layers.values()]
    first = [layer for seeds in outcomes.values() for seed in seeds for layer in seed.reports[0].layers.values()]
    before, after = (Counter(layer.rank_models.winner for layer in layers) for layers in (first, final))
    found = [
        f"Log-normal wins {after['lognormal']} of {len(final)} spectra after training "
        f"({percent(before['lognormal'] / len(first))} before, {percent(after['lognormal'] / len(final))} after); "
        f"the power law goes from {percent(before['power_law'] / len(first))} to "
        f"{percent(after['power_law'] / len(final))}, the exponential from "
        f"{percent(before['exponential'] / len(first))} to {percent(after['exponential'] / len(final))}."
    ]
    largest = max(outcomes.values(), key=lambda seeds: len(seeds[0].last.layers))
    return Finding(
        "Rank models",
        "Is the gradient's spectrum a power law of its rank, an exponential or log-normal, by BIC, and does that "
        "change in training?",
        "Log-normal wins 21 of 24 layers; power law and exponential gain during training, a spectral phase transition.",
        found,
        ["network", "step", "spectra", "power law", "exponential", "log-normal", "median BIC margin"],
        rows,
        plot_rank_models_over_training(largest[0].reports),
    )
