"""Sentences about a measurement: pure functions of the layers' exponents, for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_spectral._messages import join_names
from lightning_spectral.analysis import PAPER_ALPHA, Layers, deviating, layers_of, transfer_identity, trusted
from lightning_spectral.layers.names import brief
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.fit_quality import GOOD_FIT, LEAST_SIGNAL, TRUSTED
from lightning_spectral.records.layer_spectrum import LayerSpectrum

IDENTITY_HOLDS, IDENTITY_ROUGH = 0.05, 0.15
"""Median transfer errors up to which s = alpha gamma holds, and holds roughly. The paper's are 0.010 to 0.019."""

SAYS_LITTLE = (
    "A small transfer error says little: it measures how far h lies from its line, not whether sigma and h are power "
    "laws of their rank; for that see r2_gamma and r2_s."
)
"""Where h is a power of sigma exactly, s = alpha gamma follows from the linearity of least squares."""


def summary(report: Layers) -> list[str]:
    """Return a measurement in sentences, one or two per entry: fits, exponents, deviating layers, the identity."""
    layers = layers_of(report)
    parts = (
        _trust,
        _clouds,
        _sampled,
        _noise,
        _unmeasured,
        _exponent,
        _by_kind,
        _deviation,
        _identity,
        _participation,
        _negative,
    )
    return [sentence for part in parts if (sentence := part(layers))]


def summary_over_training(probes: Sequence[tuple[int | None, Sequence[LayerSpectrum]]]) -> list[str]:
    """Say how alpha moved between the first and the last of several measurements of one run.

    Args:
        probes: step and layers of each, in order.
    """
    placed = [(step, _alphas(layers)) for step, layers in probes if step is not None]
    # A trend begins where there is something to trust.
    placed = [(step, alphas) for step, alphas in placed if alphas]
    if not placed or placed[0][0] == placed[-1][0]:
        return []
    (first, before), (last, after) = placed[0], placed[-1]
    low, high = median(before.values()), median(after.values())
    text = f"From step {first} to {last} the median alpha of the fits to trust went from {low:.2f} to {high:.2f}"
    both = [name for name in after if name in before]
    if not both:
        return [f"{text}."]
    most = max(both, key=lambda name: abs(after[name] - before[name]))
    return [f"{text}; {most} moved most, from {before[most]:.2f} to {after[most]:.2f}."]


def _alphas(layers: Sequence[LayerSpectrum]) -> dict[str, float]:
    return {brief(x.name): x.alpha.exponent for x in layers if trusted(x)}


def _trust(layers: Sequence[LayerSpectrum]) -> str:
    if not layers:
        return "No layer was measured."
    good, n = sum(trusted(x) for x in layers), len(layers)
    if good == n:
        who = "The one layer has" if n == 1 else f"All {n} layers have"
    else:
        who = f"{good or 'None'} of {n} layers {'has' if good <= 1 else 'have'}"
    return f"{who} an alpha to trust ({TRUSTED})."


def _clouds(layers: Sequence[LayerSpectrum]) -> str:
    clouds = [x for x in layers if not trusted(x) and not math.isnan(x.alpha.exponent)]
    bad = [f"{brief(x.name)} ({x.fit_quality.doubt})" for x in sorted(clouds, key=lambda x: x.alpha.r2)]
    if not bad:
        return ""
    why = "no straight line in log sigma, and alpha is the slope of a cloud"
    if not all(x.alpha.r2 < GOOD_FIT for x in clouds):
        why = "no straight line in log sigma, or few points, one alone or noise make it one"
    return f"Not to be trusted: {join_names(bad)}. There log h is {why}."


def _sampled(layers: Sequence[LayerSpectrum]) -> str:
    # Fits that only the errors of h may have spoilt; those of noisy gradients have a sentence of their own.
    vague = [
        x
        for x in layers
        if not trusted(x)
        and not x.gradient_noise.signal < LEAST_SIGNAL
        and (x.h_stderr > x.h.abs() / 4).sum() > len(x.h) / 2
    ]
    if not vague:
        return ""
    return (
        f"In {len(vague)} of {len(layers)} layers, without an alpha to trust, h is known to no better than a quarter "
        'along most directions: more samples (max_samples, n_batches), or curvature="exact".'
    )


def _noise(layers: Sequence[LayerSpectrum]) -> str:
    noisy = [x for x in layers if x.gradient_noise.signal < LEAST_SIGNAL]
    if not noisy:
        return ""
    lowest = min(noisy, key=lambda x: x.gradient_noise.signal)
    return (
        f"Sampling noise is more than {1 - LEAST_SIGNAL:.0%} of the squared gradient in {len(noisy)} of {len(layers)} "
        f"layers (signal {lowest.gradient_noise.signal:.2f} in {brief(lowest.name)}); it pulls alpha towards 2: more "
        "gradient_samples."
    )


def _unmeasured(layers: Sequence[LayerSpectrum]) -> str:
    missing = [brief(x.name) for x in layers if math.isnan(x.alpha.exponent)]
    if not missing:
        return ""
    why = sorted({x.note for x in layers if math.isnan(x.alpha.exponent) and x.note})
    return f"No alpha: {join_names(missing)}" + (f" ({why[0]})." if len(why) == 1 else ".")


def _exponent(layers: Sequence[LayerSpectrum]) -> str:
    good = sorted((x for x in layers if trusted(x)), key=lambda x: x.alpha.exponent)
    if not good:
        return ""
    low, high = (f"{x.alpha.exponent:.2f} ({brief(x.name)})" for x in (good[0], good[-1]))
    reach = f", from {low} to {high}" if len(good) > 1 else f" ({brief(good[0].name)}, the only one)"
    middle = median([x.alpha.exponent for x in good])
    return f"The median alpha of the fits to trust is {middle:.2f}{reach}: {in_words(middle)}."


def in_words(alpha: float) -> str:
    """Say in half a sentence how curvature grows with the gradient, by the exponent.

    >>> in_words(2.07), in_words(1.0)
    ('curvature grows about as the square of the gradient', 'curvature grows about in proportion to the gradient')
    """
    bounds = (
        (0.2, "curvature hardly depends on the size of the gradient"),
        (0.8, "curvature grows more slowly than the gradient"),
        (1.2, "curvature grows about in proportion to the gradient"),
        (1.8, "curvature grows faster than the gradient and more slowly than its square"),
        (2.2, "curvature grows about as the square of the gradient"),
        (math.inf, "curvature grows faster than the square of the gradient"),
    )
    if alpha < -bounds[0][0]:
        return "curvature falls where the gradient is large"
    return next(text for bound, text in bounds if alpha <= bound)


def _by_kind(layers: Sequence[LayerSpectrum]) -> str:
    kinds: dict[str, list[float]] = {}
    for x in layers:
        if trusted(x):
            kinds.setdefault(x.kind, []).append(x.alpha.exponent)
    if not kinds:
        return ""
    by_kind = "; ".join(f"{kind} {median(alphas):.2f}" for kind, alphas in kinds.items())
    paper = "; ".join(f"{kind} {PAPER_ALPHA[kind]}" for kind in kinds if kind in PAPER_ALPHA)
    said = f"Median alpha of the fits to trust, by kind of layer: {by_kind}."
    return f"{said} In the paper: {paper}." if paper else said


def _deviation(layers: Sequence[LayerSpectrum]) -> str:
    far = [
        f"{brief(x.name)} ({x.alpha.exponent:.2f} ± {x.alpha.stderr:.2f}; {middle:.2f})"
        for x, middle in deviating(layers)
    ]
    return f"Far from the median of their kind (alpha; the median): {join_names(far)}." if far else ""


def _identity(layers: Sequence[LayerSpectrum]) -> str:
    identity = transfer_identity(layers)
    n, error, worst = len(identity.trusted), identity.median_error, identity.worst
    if worst is None:
        return ""
    verdict = "holds" if error <= IDENTITY_HOLDS else "holds roughly" if error <= IDENTITY_ROUGH else "does not hold"
    text = f"s = alpha gamma {verdict}: median error {100 * error:.1f} % over {n} fit{'s' if n > 1 else ''} to trust"
    text += f", {100 * worst.transfer_error:.1f} % at worst ({brief(worst.name)})." if n > 1 else "."
    return text if error > IDENTITY_ROUGH else f"{text} {SAYS_LITTLE}"


def _participation(layers: Sequence[LayerSpectrum]) -> str:
    middle = median([x.pr_curvature for x in layers])
    if math.isnan(middle):
        return ""
    of = "in the median of all layers: about so many directions carry it"
    return f"The participation ratio of curvature is {middle:.1f} {of}."


def _negative(layers: Sequence[LayerSpectrum]) -> str:
    negative = [x for x in layers if x.n_negative > 0]
    if not negative:
        return ""
    total, most = sum(x.n_negative for x in negative), max(negative, key=lambda x: x.n_negative)
    return (
        f"{total} direction{'s' if total > 1 else ''} of negative curvature, left out of the fits, "
        f"in {len(negative)} layer{'s' if len(negative) > 1 else ''}; most in {brief(most.name)} ({most.n_negative})."
    )
