"""The tables of TRANSFORMERS.md and of results/transformers.md, from the record of transformers_results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from examples.paper.transformers_design import FACTORS
from examples.paper.transformers_results import KINDS, PUBLISHED, Run, field_of, mean_and_deviation, over_seeds

COLUMNS = ("qkv", "out", "up", "down", "head")
"""Of the tables, in the order of `KINDS`."""

UNITS = (
    "Mean ± standard deviation over seeds of medians over layers; pr is PR_h, alpha_upper and alpha_lower are of k = 1 "
    "to 10 and 11 to 20, sigma_1_2 is sigma_1 / sigma_2, sigma_2_K is sigma_2 / sigma_20, and signal is the share of "
    "the gradient that a fresh batch confirms."
)

PATH_TABLES = (
    "alpha",
    "alpha_without_first",
    "alpha_upper",
    "alpha_lower",
    "r2",
    "pr",
    "sigma_1_2",
    "sigma_2_K",
)


def effects_table(record: Mapping[str, Any]) -> str:
    """Main effects with standard errors, a column per response, as Markdown."""
    names = [name for name, analysis in record["effects"].items() if analysis]
    lines = ["| high minus low level | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for factor in FACTORS:
        cells = []
        for name in names:
            effect = record["effects"][name]["effects"][factor]
            cell = f"{effect['estimate']:+.2f} ± {effect['stderr']:.2f}"
            cells.append(f"**{cell}**" if abs(effect["estimate"]) > 2.5 * effect["stderr"] else cell)
        lines.append(f"| {factor} | " + " | ".join(cells) + " |")
    for title, key in (("mean", "mean"), ("r2 of the main effects", "r2"), ("deviation of seeds", "seed_deviation")):
        lines.append(f"| {title} | " + " | ".join(f"{record['effects'][name][key]:.2f}" for name in names) + " |")
    return "\n".join(lines)


def group_table(record: Mapping[str, Any], group: str, key: str = "alpha", **match: object) -> str:
    """label by kind of layer, mean ± standard deviation over seeds, as Markdown."""
    lines = [f"| {key} | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, kinds in over_seeds(record["runs"], group, key, **match).items():
        cells = [f"{kinds[kind][0]:.2f} ± {kinds[kind][1]:.2f}" for kind in KINDS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def exact_table(record: Mapping[str, Any]) -> str:
    """The layers' median alpha by the sketch and by exact products of the same networks, as Markdown."""
    by_key = {
        (run["label"], run["seed"], run["curvature"]): run["kinds"]["block"]
        for run in record["runs"]
        if run["group"] in ("path", "exact")
    }
    lines = ["| network, seed | alpha, exact | sketch | PR_h, exact | sketch |", "|---" * 5 + "|"]
    for (label, seed, curvature), exact in by_key.items():
        sketch = by_key.get((label, seed, "auto"))
        if curvature == "exact" and sketch:
            cells = [f"{values[key]:.2f}" for key in ("alpha", "pr") for values in (exact, sketch)]
            lines.append(f"| {label}, {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paper_table(record: Mapping[str, Any]) -> str:
    """The refits of the paper's GPT layers, as Markdown."""
    columns = ("alpha", "r2", "alpha_without_first", "r2_without_first", "pr", "sigma_1_2", "sigma_2_K",
               "leverage_of_first")  # fmt: skip
    lines = ["| experiment, layer | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    rows = (
        f"| {row['experiment']}, {row['layer']} | " + " | ".join(f"{row[c]:.3g}" for c in columns) + " |"
        for row in record["paper"]
    )
    return "\n".join([*lines, *rows])


def cells_table(record: Mapping[str, Any], group: str, field: str, keys: Sequence[str]) -> str:
    """label by a field of the setting: the block layers' medians of some quantities, as Markdown."""
    runs = [run for run in record["runs"] if run["group"] == group]
    levels = sorted({field_of(run, field) for run in runs})
    lines = [f"| {field} | " + " | ".join(map(str, levels)) + " |", "|---" * (len(levels) + 1) + "|"]
    for label, key in ((label, key) for label in dict.fromkeys(run["label"] for run in runs) for key in keys):
        cells = []
        for level in levels:
            members = [run for run in runs if run["label"] == label and field_of(run, field) == level]
            cells.append("{:.2f} ± {:.2f}".format(*mean_and_deviation([r["kinds"]["block"][key] for r in members])))
        lines.append(f"| {label}: {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def learned_table(record: Mapping[str, Any]) -> str:
    """The design's runs on uniform tokens by how much of log(vocabulary) was learned, as Markdown.

    Of uniform tokens nothing can be learned but the sequences themselves.
    """
    groups: dict[str, list[Run]] = {"nothing (loss above 98 %)": [], "a part": [], "half or more": []}
    for run in record["runs"]:
        if run["group"] == "design" and field_of(run, "data") == "uniform" and field_of(run, "positions") == "all":
            share = run["loss"] / math.log(field_of(run, "vocabulary"))
            groups["nothing (loss above 98 %)" if share > 0.98 else "a part" if share > 0.5 else "half or more"] += [
                run
            ]
    lines = ["| learned by heart | runs | alpha, blocks | alpha, head | PR_h, blocks |", "|---" * 5 + "|"]
    for name, runs in groups.items():
        values = [
            [run["kinds"][k][key] for run in runs]
            for k, key in (("block", "alpha"), ("head", "alpha"), ("block", "pr"))
        ]
        cells = ["{:.2f} ± {:.2f}".format(*mean_and_deviation(column)) for column in values]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def path_table(record: Mapping[str, Any]) -> str:
    """The path: alpha, mean ± standard deviation over seeds, and in brackets PR_h, beside the paper, as Markdown."""
    lines = ["| alpha (PR_h) | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    ratios = over_seeds(record["runs"], "path", "pr")
    for label, kinds in over_seeds(record["runs"], "path", "alpha").items():
        cells = ["{:.2f} ± {:.2f}".format(*kinds[kind]) + f" ({ratios[label][kind][0]:.1f})" for kind in KINDS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "| *paper* | " + " | ".join(f"*{alpha:.2f}*" for alpha in PUBLISHED) + " |"])


def page_tables(record: Mapping[str, Any]) -> list[str]:
    """The tables of TRANSFORMERS.md."""
    tokens = cells_table(record, "tokens", "sequences", ("alpha", "pr", "signal"))
    return [path_table(record), tokens, learned_table(record)]


def tables(record: Mapping[str, Any]) -> str:
    """results/transformers.md: every table, under what it is of."""
    parts: dict[str, list[str]] = {}
    if record["paper"]:
        parts["The paper's layers, fitted again with all points and without k = 1"] = [paper_table(record)]
    parts["The path, one change at a time"] = [group_table(record, "path", key) for key in PATH_TABLES]
    parts["Sequences measured, with the data's labels and with labels drawn from the model"] = [
        cells_table(record, "tokens", "sequences", ("alpha", "pr", "signal", "r2"))
    ]
    parts["Over training, medians of the blocks' layers"] = [cells_table(record, "steps", "steps", ("alpha", "pr"))]
    parts["Single changes at batch 16"] = [group_table(record, "one by one", key) for key in ("alpha", "pr")]
    parts["Sketch and exact products of the same networks"] = [exact_table(record)]
    parts["The design: runs on uniform tokens by what was learned, and main effects"] = [
        learned_table(record), effects_table(record)
    ]  # fmt: skip
    lines = ["# The tables of a small GPT's alpha", "", "[The page to read](../TRANSFORMERS.md). " + UNITS, ""]
    for title, found in parts.items():
        lines += [f"## {title}", "", *(line for part in found for line in (part, ""))]
    return "\n".join(lines)
