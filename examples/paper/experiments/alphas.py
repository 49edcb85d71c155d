"""alpha by architecture and over training, and the transfer identity."""

from __future__ import annotations

import math
from itertools import chain

from examples.paper.finding import (
    Finding,
    Outcomes,
    alphas,
    by_kind,
    interior,
    joined,
    kinds_of,
    percent,
    signals,
    spread,
    straight,
    straight_layers,
)
from examples.paper.plots import curves, strips
from lightning_spectral.analysis import PAPER_ALPHA, PAPER_RANGES
from lightning_spectral.analysis import transfer_identity as identity_of
from lightning_spectral.numerics.statistics import median
from lightning_spectral.report.figures import plot_transfer_identity

ROUGH_ERROR = 0.06


def architectures(outcomes: Outcomes) -> Finding:
    """alpha by kind of layer in trained networks of every sort."""
    rows, groups, kinds, ranges = [], {}, {}, {}
    for name, seeds in outcomes.items():
        for kind in kinds_of(seeds):
            layers = [by_kind(seed.last, kind) for seed in seeds]
            values = [alphas(of_seed) for of_seed in layers]
            r2 = median([layer.alpha.r2 for layer in chain.from_iterable(layers)])
            fit = [spread(values), f"{r2:.2f}", spread([signals(layers)])]
            rows.append([name, kind, str(len(layers[0])), *fit, PAPER_ALPHA.get(kind, "-")])
            row = f"{name}: {kind.replace('_', ' ')}"
            groups[row], kinds[row] = values, kind
            if kind in PAPER_RANGES:
                ranges[row] = PAPER_RANGES[kind]
    convolutions = {name: [alphas(interior(seed.last)) for seed in seeds] for name, seeds in outcomes.items()}
    found = [
        f"Interior convolutions of {name}: {spread(values)}."
        for name, values in convolutions.items()
        if any(value == value for value in values)
    ]
    low, high = PAPER_RANGES["conv"]
    near = [name for name, values in convolutions.items() if low <= median(values) <= high]
    far = [name for name, values in convolutions.items() if values and not math.isnan(median(values))]
    return Finding(
        "alpha by architecture",
        "How does curvature along gradient directions grow with their strength, h ~ sigma^alpha, in which layers?",
        "Convolutions 1.97 to 2.17 (ResNet-18, VGG-11 on CIFAR-10) and 1.94 (ResNet-50 on Tiny-ImageNet), dense layers "
        "2.18, a small GPT 0.84 to 1.43.",
        f"interior convolutions of {len(near)} of {len(far)} networks are within {low} to {high}",
        [
            *found,
            f"Within the paper's {low} to {high}: {', '.join(near) or 'neither'}.",
            "S is the signal at the samples measured, the share of the squared gradient that is no sampling noise.",
        ],
        ["network", "kind", "layers", "alpha, median over layers", "median r2", "median S", "alpha in the paper"],
        rows,
        strips(groups, "alpha by kind of layer, a tick per seed", "alpha", kinds=kinds, paper=ranges),
    )


def transfer_identity(outcomes: Outcomes) -> Finding:
    """s against alpha gamma."""
    rows, every = [], []
    for name, seeds in outcomes.items():
        layers = [layer for seed in seeds for layer in identity_of(seed.last).layers if straight(layer.alpha.r2)]
        every += layers
        rows.append([name, str(len(layers)), *_errors([layer.transfer_error for layer in layers])])
    errors = [layer.transfer_error for layer in every]
    rows.append(["all", str(len(every)), *_errors(errors)])
    within = sum(error <= ROUGH_ERROR for error in errors)
    return Finding(
        "Transfer identity",
        "Is the decay s of the curvature alpha times the decay gamma of the gradient? Layers of all seeds whose "
        "alpha has an r2 of at least 0.9, after training; the error is abs(s - alpha gamma) / abs(s).",
        "Median error 1.9 % (CIFAR), 1.0 % (Tiny-ImageNet), 1.6 % (ImageNet-1K).",
        f"yes: a median error of {percent(median(errors))}",
        [
            f"Median error {percent(median(errors))}; {within} of {len(errors)} layers are within 6 %. Mind how little "
            "it takes: where h is a power of sigma exactly, s = alpha gamma follows from the linearity of least "
            "squares, whatever the shape of the two spectra. The error measures how far h lies from its line, and "
            "what sorting it changes; it says nothing of whether sigma or h are power laws of their rank."
        ],
        ["network", "layers", "median error", "90th percentile", "largest"],
        rows,
        plot_transfer_identity(joined(outcomes)),
    )


def _errors(errors: list[float]) -> list[str]:
    if not errors:
        return ["-", "-", "-"]
    ordered = sorted(errors)
    return [percent(value) for value in (median(ordered), ordered[int(0.9 * (len(ordered) - 1))], ordered[-1])]


def dynamics(outcomes: Outcomes) -> Finding:
    """alpha over training."""
    rows, series, kinds, found, told = [], {}, {}, [], []
    for name, seeds in outcomes.items():
        steps = [report.step for report in seeds[0].reports]
        for kind in kinds_of(seeds):
            values = {step: [alphas(by_kind(seed.reports[i], kind)) for seed in seeds] for i, step in enumerate(steps)}
            rows += [[name, kind, *(spread(of_step) for of_step in values.values())]]
            row = f"{name}: {kind.replace('_', ' ')}"
            series[row], kinds[row] = {float(step or 0): of_step for step, of_step in values.items()}, kind
        moves = {
            kind: [[alphas(by_kind(report, kind)) for report in (seed.reports[0], seed.last)] for seed in seeds]
            for kind in ("conv", "head")
        }
        below = sum(last < 2 for _, last in moves["head"])
        for kind, pairs in moves.items():
            before, after = (spread([pair[i] for pair in pairs]) for i in (0, 1))
            found.append(
                f"alpha of {name}'s {'head' if kind == 'head' else 'convolutions'} goes from {before} to {after}."
            )
        found.append(f"The head ends below 2 with {below} of {len(seeds)} seeds.")
        shares = [len(straight_layers(seed.last)) / len(seed.last.layers) for seed in seeds]
        found.append(f"{percent(sum(shares) / len(shares))} of its layers then have an r2 of at least 0.9.")
        rises = [last - first for first, last in moves["conv"]]
        told.append(f"{name}'s convolutions {'rise' if median(rises) > 0 else 'fall'}")
        told.append(f"its head ends below 2 with {below} of {len(seeds)} seeds")
    first = next(iter(outcomes.values()))[0]
    return Finding(
        "alpha over training",
        "How does alpha move while a network learns?",
        "Convolutions of ResNet-18 rise from 1.45 to 1.90 at epoch 0 toward 2; its head falls from 1.99 to 1.05 by "
        "epoch 1.",
        "; ".join(told),
        found,
        ["network", "kind", *(f"step {report.step}" for report in first.reports)],
        rows,
        curves(series, "alpha over training", ("optimizer step", "alpha, median"), kinds=kinds, log_x=True),
    )
