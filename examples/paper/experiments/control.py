"""The negative control: what the spectrum says of a layer, put into one number, its learning rate."""

from __future__ import annotations

import math
from statistics import fmean, stdev

from examples.paper.finding import Finding, Outcomes, percent, spread
from examples.paper.plots import strips


def scalar_control(outcomes: Outcomes) -> Finding:
    """AdamW with and without learning rates scaled by powers of s; the first training is the one without."""
    accuracy = {name: [seed.test["test_accuracy"] for seed in seeds] for name, seeds in outcomes.items()}
    shown = {name: [100 * value for value in values] for name, values in accuracy.items()}
    losses = {name: [seed.test["test_loss"] for seed in seeds] for name, seeds in outcomes.items()}
    rows = [[name, spread(shown[name]), spread(losses[name], 3)] for name in outcomes]
    plain, *scaled = accuracy
    gains = {name: fmean(accuracy[name]) - fmean(accuracy[plain]) for name in scaled}
    best = max(gains, key=lambda name: gains[name])
    deviations = [stdev(accuracy[name]) if len(accuracy[name]) > 1 else float("nan") for name in (plain, best)]
    noise = math.hypot(*deviations)
    verdict = "within" if gains[best] <= noise else "beyond"
    return Finding(
        "Scalar preconditioner",
        "Does scaling each layer's learning rate by a power of its s, over the mean of all layers, help AdamW? "
        "Inverse is power -1; shuffled gives each layer the scale of another.",
        "No: of six arms on CIFAR-10 none beats Adam by more than 0.2 % of accuracy, within the noise of seeds.",
        f"{'yes' if verdict == 'within' else 'no'}: the best arm gains {percent(gains[best])}",
        [
            f"The best arm, {best}, gains {percent(gains[best])} of accuracy over {plain}, {verdict} one standard "
            f"deviation of that difference between seeds ({percent(noise)})."
        ],
        ["optimizer", "test accuracy, %", "test loss"],
        rows,
        strips(shown, "Test accuracy, a tick per seed", "%"),
    )
