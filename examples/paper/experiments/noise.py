"""alpha against the number of samples that the gradient is taken of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from examples.paper.finding import Finding, Outcomes, alphas, body, by_kind, kinds_of, signals, spread
from examples.paper.outcome import Outcome
from examples.paper.plots import Panel, panels
from lightning_spectral import LayerSpectrum, SpectralReport
from lightning_spectral.analysis import PAPER_RANGES
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.fit_quality import LEAST_SIGNAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AtStep = Mapping[int, Sequence[SpectralReport]]
"""Samples of the gradient -> reports, one per seed."""

BELOW_ZERO = (
    "S far below 0 is that of a network that has learned these very samples until their gradients cancel: parts of "
    "them then have larger gradients than all. The gradient of all training samples is exact for the training loss, "
    "and tells nothing of the expected one."
)


def sampling_noise(outcomes: Outcomes) -> Finding:
    """Compare alpha of a few samples with alpha of many, and the signal at each."""
    measured = {network(name): at_steps(seeds) for name, seeds in outcomes.items()}
    kinds = {network(name): kinds_of(seeds) for name, seeds in outcomes.items()}
    counts = sorted({n for steps in measured.values() for by_samples in steps.values() for n in by_samples})
    rows = [
        [name, kind, str(step), *(_cell(by_samples.get(n, ()), kind) for n in counts), _fit(by_samples, kind)]
        for name, steps in measured.items()
        for step, by_samples in steps.items()
        for kind in kinds[name]
    ]
    own = _of_networks(measured)
    return Finding(
        "Sampling noise",
        "Is alpha the network's, or that of its gradient's sampling noise, whose alpha is near 2? At the same weights "
        "the gradient is taken of more and more samples, the first of one order, and the curvature of the first "
        f"{_curvature(measured)} of them. S is the share of the squared gradient that is no noise.",
        "One batch of 2048 to 4096 samples for gradient and curvature; nothing on noise. Convolutions 1.94 to 2.17, a "
        "small GPT 0.84 to 1.43.",
        own,
        [
            f"With the most samples: {own}.",
            BELOW_ZERO,
            f"In the table: alpha, median over layers, of {_seeds(outcomes)}; in brackets the median S.",
        ],
        ["network", "kind", "step", *(f"{n:,}" for n in counts), "r2, most samples"],
        rows,
        _figure(measured),
        records=_records(outcomes),
    )


def network(training: str) -> str:
    """Return the network of a training's name.

    >>> network("resnet, samples")
    'resnet'
    """
    return training.partition(",")[0]


def at_steps(seeds: Sequence[Outcome]) -> dict[int, dict[int, list[SpectralReport]]]:
    """Return reports by step, and at each by the number of samples, both in ascending order."""
    found: dict[int, dict[int, list[SpectralReport]]] = {}
    for outcome in seeds:
        for report in outcome.reports:
            found.setdefault(report.step or 0, {}).setdefault(report.n_samples or 0, []).append(report)
    return {step: dict(sorted(found[step].items())) for step in sorted(found)}


def _seeds(outcomes: Outcomes) -> str:
    counts = {len(seeds) for seeds in outcomes.values()}
    most = max(counts)
    return f"{most} seed{'s' * (most > 1)}" if len(counts) == 1 else f"{min(counts)} to {most} seeds"


def _cell(reports: Sequence[SpectralReport], kind: str) -> str:
    if not reports:
        return "-"
    layers = [by_kind(report, kind) for report in reports]
    return f"{spread(map(alphas, layers))} ({_number(signals(layers))})"


def _fit(by_samples: AtStep, kind: str) -> str:
    """Median r2 with the most samples."""
    reports = by_samples[max(by_samples)]
    return _number(median([layer.alpha.r2 for report in reports for layer in by_kind(report, kind)]))


def _of_networks(measured: Mapping[str, Mapping[int, AtStep]]) -> str:
    """What alpha is of the most samples, where little of their gradient is noise."""
    found: dict[str, list[float]] = {}
    for steps in measured.values():
        for by_samples in steps.values():
            layers = [body(report) for report in by_samples[max(by_samples)]]
            if signals(layers) >= LEAST_SIGNAL:
                found.setdefault(_family(layers[0]), []).append(fmean(map(alphas, layers)))
    if not found:
        return f"no S of at least {LEAST_SIGNAL}"
    ends = {family: dict.fromkeys((_number(min(values)), _number(max(values)))) for family, values in found.items()}
    ranges = [f"{family} {' to '.join(of_family)}" for family, of_family in ends.items()]
    return f"where S is at least {LEAST_SIGNAL}, alpha is: {', '.join(ranges)}"


def _family(layers: Sequence[LayerSpectrum]) -> str:
    kinds = {layer.kind for layer in layers}
    if kinds == {"conv"}:
        return "interior convolutions"
    return "transformers' blocks" if "attention_qkv" in kinds else "dense layers"


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _curvature(measured: Mapping[str, Mapping[int, AtStep]]) -> str:
    reports = [
        [report for by_samples in steps.values() for of_seeds in by_samples.values() for report in of_seeds]
        for steps in measured.values()
    ]
    most = {max(report.curvature_samples or 0 for report in of_network) for of_network in reports}
    return f"{min(most)} to {max(most)}" if len(most) > 1 else str(max(most))


def _figure(measured: Mapping[str, Mapping[int, AtStep]]) -> Figure:
    """A column per network, a row per step."""
    columns = [
        [_panel(f"{name.replace(' at ', chr(10) + 'at ')}\nstep {step}", at) for step, at in steps.items()]
        for name, steps in measured.items()
    ]
    labels = ("samples of the gradient", "alpha, median", "signal S")
    return panels(columns, "alpha and signal against samples of the gradient", labels, paper=PAPER_RANGES)


def _panel(title: str, by_samples: AtStep) -> Panel:
    layers = {float(n): [body(report) for report in reports] for n, reports in by_samples.items()}
    kinds = dict.fromkeys(layer.kind for of_all in layers.values() for of_seed in of_all for layer in of_seed)
    lines = {
        kind: {n: [alphas(x for x in of_seed if x.kind == kind) for of_seed in of_all] for n, of_all in layers.items()}
        for kind in kinds
    }
    return Panel(title, lines, {n: signals(of_all) for n, of_all in layers.items()})


def _records(outcomes: Outcomes) -> list[dict[str, Any]]:
    return [
        {
            "network": network(name),
            "seed": outcome.seed,
            "step": report.step,
            "gradient_samples": report.n_samples,
            "curvature_samples": report.curvature_samples,
            "kind": kind,
            "layers": len(layers),
            **_medians(layers),
        }
        for name, seeds in outcomes.items()
        for outcome in seeds
        for report in outcome.reports
        for kind, layers in report.by_kind().items()
    ]


def _medians(layers: Sequence[LayerSpectrum]) -> dict[str, float | None]:
    values = {
        "alpha": alphas(layers),
        "r2": median([layer.alpha.r2 for layer in layers]),
        "signal": signals([layers]),
        "noise_scale": median([layer.gradient_noise.noise_scale for layer in layers]),
    }
    return {name: round(value, 4) if math.isfinite(value) else None for name, value in values.items()}
