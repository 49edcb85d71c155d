"""What a LayerNorm, the number of classes and the task do to alpha: two or more trainings beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from examples.paper.finding import Finding, Outcomes, alphas, by_kind, kinds_of, spread
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


def _beside(
    title: str, question: str, paper: str, outcomes: Outcomes, figures: Mapping[str, tuple[float, float]]
) -> Finding:
    """Trainings in pairs: the first against the second, the third against the fourth."""
    rows, groups, kinds, found, ranges = [], {}, {}, [], {}
    names = list(outcomes)
    for a, b in zip(names[::2], names[1::2], strict=True):
        for kind in kinds_of(outcomes[a]):
            values = [[alphas(by_kind(seed.last, kind)) for seed in outcomes[name]] for name in (a, b)]
            if any(value != value for of_name in values for value in of_name):
                continue
            change = fmean(values[1]) - fmean(values[0])
            told = figures.get(kind)
            agrees = "-" if told is None else "yes" if (told[1] - told[0]) * change > 0 else "no"
            cells = "-" if told is None else f"{told[0]:.2f} -> {told[1]:.2f}"
            rows.append([f"{a} -> {b}", kind, spread(values[0]), spread(values[1]), f"{change:+.2f}", cells, agrees])
            for i, name in enumerate((a, b)):
                row = f"{name}: {kind.replace('_', ' ')}"
                groups[row], kinds[row] = values[i], kind
                if told is not None:
                    ranges[row] = (told[i] - 0.01, told[i] + 0.01)
        agreeing = [row[-1] for row in rows if row[0] == f"{a} -> {b}" and row[-1] != "-"]
        hidden = [float(row[4]) for row in rows if row[0] == f"{a} -> {b}" and row[1] != "head"]
        text = f"From {a} to {b} alpha before the head changes by {min(hidden):+.2f} to {max(hidden):+.2f}"
        if agreeing:
            text += f", in the paper's direction in {agreeing.count('yes')} of {len(agreeing)} kinds"
        found.append(f"{text}.")
    return Finding(
        title,
        question,
        paper,
        found,
        ["networks", "kind", "alpha of the first", "alpha of the second", "change", "the paper's", "same direction"],
        rows,
        strips(groups, f"{title}: alpha, a tick per seed", "alpha", kinds=kinds, paper=ranges or None),
    )
