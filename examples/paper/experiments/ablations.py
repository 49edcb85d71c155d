"""What a LayerNorm, the number of classes and the task do to alpha: two or more trainings beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from examples.paper.finding import Finding, Outcomes, alphas, by_kind, kinds_of, spread
from examples.paper.outcome import Outcome
from examples.paper.plots import strips

OUTPUT_SIZE = {
    "attention_qkv": (2.25, 1.74), "mlp_up": (2.12, 1.62), "mlp_down": (2.05, 1.88), "head": (1.50, 2.03),
}  # fmt: skip
"""alpha of the paper's ViT-Tiny with 10 and with 100 classes."""

TASK = {
    "attention_qkv": (1.46, 1.60), "attention_out": (1.16, 1.57), "mlp_up": (0.73, 1.59), "mlp_down": (1.15, 1.85),
}  # fmt: skip
"""alpha of the paper's small GPT-2 as a language model and as a classifier."""


def layer_norm(outcomes: Outcomes) -> Finding:
    """Networks with and without their LayerNorms."""
    return _beside(
        "LayerNorm",
        "What is alpha of the same network without its LayerNorms?",
        "It has this ablation; the figures of it are not among its published files.",
        outcomes,
        {},
    )


def output_size(outcomes: Outcomes) -> Finding:
    """10 against 100 classes."""
    return _beside(
        "Number of classes",
        "What does alpha do when 10 classes become 100, in the same network?",
        "A ViT-Tiny on CIFAR-10 and CIFAR-100: " + _in_words(OUTPUT_SIZE) + ".",
        outcomes,
        OUTPUT_SIZE,
    )


def task(outcomes: Outcomes) -> Finding:
    """A language model against a classifier of the same text."""
    return _beside(
        "Task",
        "What is alpha of a GPT that classifies text, beside one that predicts it?",
        "A small GPT-2 as a language model and as a classifier: " + _in_words(TASK) + ".",
        outcomes,
        TASK,
    )


def _in_words(paper: Mapping[str, tuple[float, float]]) -> str:
    return ", ".join(f"{kind.replace('_', ' ')} {a:.2f} and {b:.2f}" for kind, (a, b) in paper.items())


class Change(NamedTuple):
    """alpha of one kind of layer in two trainings, a value per seed, and in the paper's two."""

    kind: str
    before: list[float]
    after: list[float]
    paper: tuple[float, float] | None

    @property
    def value(self) -> float:
        """Difference of the means."""
        return fmean(self.after) - fmean(self.before)

    @property
    def agrees(self) -> bool | None:
        """Whether it has the sign of the paper's; None where the paper has none."""
        return None if self.paper is None else (self.paper[1] - self.paper[0]) * self.value > 0

    @property
    def cells(self) -> list[str]:
        """Of the table, from the kind on."""
        paper = "-" if self.paper is None else f"{self.paper[0]:.2f} -> {self.paper[1]:.2f}"
        agrees = {None: "-", True: "yes", False: "no"}[self.agrees]
        return [self.kind, spread(self.before), spread(self.after), f"{self.value:+.2f}", paper, agrees]


def _changes(
    before: Sequence[Outcome], after: Sequence[Outcome], paper: Mapping[str, tuple[float, float]]
) -> list[Change]:
    """Of every kind of layer that has an alpha in all runs."""
    found = []
    for kind in kinds_of(before):
        first, second = ([alphas(by_kind(seed.last, kind)) for seed in seeds] for seeds in (before, after))
        if not any(map(math.isnan, first + second)):
            found.append(Change(kind, first, second, paper.get(kind)))
    return found


def _beside(
    title: str, question: str, paper: str, outcomes: Outcomes, figures: Mapping[str, tuple[float, float]]
) -> Finding:
    """Trainings in pairs: the first against the second, the third against the fourth."""
    rows: list[list[str]] = []
    found: list[str] = []
    groups: dict[str, list[float]] = {}
    kinds, ranges = {}, {}
    every: list[Change] = []
    names = list(outcomes)
    for a, b in zip(names[::2], names[1::2], strict=True):
        changes = _changes(outcomes[a], outcomes[b], figures)
        every += changes
        rows += [[f"{a} -> {b}", *change.cells] for change in changes]
        found.append(_in_a_sentence(a, b, changes))
        for change in changes:
            for i, (name, values) in enumerate(((a, change.before), (b, change.after))):
                row = f"{name}: {change.kind.replace('_', ' ')}"
                groups[row], kinds[row] = values, change.kind
                if change.paper is not None:
                    ranges[row] = (change.paper[i], change.paper[i])
    return Finding(
        title,
        question,
        paper,
        _agreement(every),
        found,
        ["networks", "kind", "alpha of the first", "alpha of the second", "change", "the paper's", "same direction"],
        rows,
        strips(groups, f"{title}: alpha, a tick per seed", "alpha", kinds=kinds, paper=ranges or None),
    )


def _in_a_sentence(a: str, b: str, changes: Sequence[Change]) -> str:
    hidden = [change.value for change in changes if change.kind != "head"]
    if not hidden:
        return f"{a} and {b} have no kind of layer in common before the head that has an alpha."
    low, high = min(hidden), max(hidden)
    text = f"From {a} to {b} alpha before the head changes by {low:+.2f}"
    text += f" to {high:+.2f}" if high > low else ""
    heads = [f", at the head by {change.value:+.2f}" for change in changes if change.kind == "head"]
    return "".join([text, *heads, "."])


def _agreement(changes: Sequence[Change]) -> str:
    """In how many kinds alpha moved as in the paper."""
    told = [change for change in changes if change.agrees is not None]
    if not told:
        return "no figures to compare with"
    same = sum(bool(change.agrees) for change in told)
    word = "yes" if same == len(told) else "in part" if same else "no"
    kinds = ", ".join(dict.fromkeys(change.kind.replace("_", " ") for change in told))
    return f"{word}: the same direction in {same} of {len(told)} comparisons ({kinds})"
