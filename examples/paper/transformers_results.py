"""The runs of transformers.py as one record: medians by kind of layer, main effects, the paper's refits."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lightning_spectral
from examples.paper.transformers_design import BASE, FACTORS, Analysis, analyse, design_matrix
from lightning_spectral import fit_power_law, participation_ratio
from lightning_spectral.numerics.statistics import median

Run = Mapping[str, Any]

KINDS = ("attention_qkv", "attention_out", "mlp_up", "mlp_down", "head")
BLOCK = KINDS[:-1]
PUBLISHED = (1.43, 1.17, 0.84, 1.15, 4.53)
"""alpha by kind in arXiv 2606.02596, its small GPT-2."""

KEPT = ("alpha", "alpha_without_first", "r2", "pr", "negative", "sigma_1_2", "sigma_2_K", "signal")
PARTS = {"alpha_upper": slice(0, 10), "alpha_lower": slice(10, 20)}
"""alpha over a half of the directions."""


def condensed(run: Run) -> dict[str, Any]:
    """A run without its spectra: medians by kind of layer, and over the layers of the blocks."""
    kinds: dict[str, dict[str, float]] = {}
    for kind, members in {**{kind: (kind,) for kind in KINDS}, "block": BLOCK}.items():
        layers = [layer for layer in run["layers"] if layer["kind"] in members]
        kinds[kind] = {key: _short(median(layer[key] for layer in layers)) for key in KEPT}
        kinds[kind] |= {name: _short(median(_part(layer, part) for layer in layers)) for name, part in PARTS.items()}
    winners = [layer["rank_model"] for layer in run["layers"] if layer["kind"] in BLOCK]
    known = {key: run[key] for key in ("group", "label", "seed", "curvature")}
    changes = {key: value for key, value in run["setting"].items() if value != getattr(BASE, key)}
    last = run["train_loss"]
    return known | {
        "setting": changes,
        "loss": _short(run.get("loss", math.nan)),
        "train_loss": _short(statistics.mean(last) if last else math.nan),
        "failed": run.get("failed", ""),
        "rank_models": {name: winners.count(name) for name in ("power_law", "exponential", "lognormal")},
        "kinds": kinds,
    }


def collect(runs: Sequence[Run], paper: str | Path | None = None) -> dict[str, Any]:
    """Everything that is committed: the environment, each run condensed, the effects, the paper's refits.

    Args:
        runs: as transformers.py wrote them.
        paper: the paper's frozen measurements, of which the refits alone are kept.
    """
    short = [condensed(run) for run in runs]
    return {
        "environment": {
            "lightning_spectral": lightning_spectral.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
        },
        "effects": {name: _plain(effects(short, response)) for name, response in RESPONSES.items()},
        "paper": paper_refits(paper) if paper else [],
        "spectra": spectra(runs),
        "runs": short,
    }


def field_of(run: Run, name: str) -> Any:
    """Of the setting of a condensed run, which holds what differs from `BASE` alone."""
    return run["setting"].get(name, getattr(BASE, name))


RESPONSES: dict[str, Callable[[Run], float]] = {
    "alpha, blocks": lambda run: run["kinds"]["block"]["alpha"],
    "alpha, head": lambda run: run["kinds"]["head"]["alpha"],
    "alpha without k = 1, blocks": lambda run: run["kinds"]["block"]["alpha_without_first"],
    "PR_h, blocks": lambda run: run["kinds"]["block"]["pr"],
    "r2, blocks": lambda run: run["kinds"]["block"]["r2"],
}
"""Of the design: medians over the layers of a run."""


def effects(runs: Sequence[Run], response: Callable[[Run], float]) -> Analysis | None:
    """Main effects in the design; None where no seed of it is complete enough."""
    chosen = [run for run in runs if run["group"] == "design"]
    seeds = sorted({run["seed"] for run in chosen})
    matrix = design_matrix()
    table = [[math.nan] * len(seeds) for _ in matrix]
    for run in chosen:
        table[int(run["label"])][seeds.index(run["seed"])] = response(run)
    if sum(any(math.isfinite(value) for value in row) for row in table) < matrix.shape[1] + 2:
        return None
    return analyse(dict(zip(FACTORS, matrix.T.tolist(), strict=True)), table)


def paper_refits(folder: str | Path) -> list[dict[str, Any]]:
    """The paper's GPT layers fitted with all points, and without the first and the first three."""
    triangle = json.loads((Path(folder) / "results_alpha_triangle.json").read_text(encoding="utf-8"))
    tasks = json.loads((Path(folder) / "results_hypothesis.json").read_text(encoding="utf-8"))["task_structure"]
    layers = [("alpha triangle", layer) for e in triangle if "gpt2" in e["experiment"] for layer in e["results"]]
    layers += [(name, layer) for name, members in tasks.items() for layer in members]
    return [_refit(experiment, layer) for experiment, layer in layers]


def _refit(experiment: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    sigma = torch.tensor(layer["sigma"], dtype=torch.float64)
    h = torch.tensor(layer["h_exact"], dtype=torch.float64)
    fits = [fit_power_law(sigma[i:], h[i:]) for i in (0, 1, 3)]
    log = sigma[h > 0].log()
    leverage = (log - log.mean()).square() / (log - log.mean()).square().sum()
    return {
        "experiment": experiment,
        "layer": layer["name"],
        "alpha": _short(fits[0].exponent),
        "r2": _short(fits[0].r2),
        "alpha_without_first": _short(fits[1].exponent),
        "r2_without_first": _short(fits[1].r2),
        "alpha_without_three": _short(fits[2].exponent),
        "pr": _short(participation_ratio(h)),
        "sigma_1_2": _short(float(sigma[0] / sigma[1])),
        "sigma_2_K": _short(float(sigma[1] / sigma[-1])),
        "h_1_2": _short(float(h[0] / h[1])),
        "leverage_of_first": _short(float(leverage[0])),
        "negative": int((h < 0).sum()),
    }


def spectra(runs: Sequence[Run]) -> dict[str, Any]:
    """sigma and h of three layers of the path's first seed, for the figure."""
    found = {}
    for run in runs:
        if run["group"] == "path" and run["seed"] == 0:
            for layer in run["layers"]:
                if layer["name"] in ("blocks.1.up.weight", "blocks.1.down.weight", "head.weight"):
                    found[f"{run['label']}/{layer['name']}"] = {key: layer[key] for key in ("sigma", "h", "alpha")}
    return found


def over_seeds(runs: Sequence[Run], group: str, key: str, **match: object) -> dict[str, dict[str, tuple[float, float]]]:
    """label -> kind -> (mean, standard deviation) over seeds, of one quantity in one group.

    Args:
        match: fields of the setting that have to hold.
    """
    chosen = [run for run in runs if run["group"] == group and all(field_of(run, k) == v for k, v in match.items())]
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for label in dict.fromkeys(run["label"] for run in chosen):
        members = [run["kinds"] for run in chosen if run["label"] == label]
        found[label] = {kind: mean_and_deviation([m[kind][key] for m in members]) for kind in (*KINDS, "block")}
    return found


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Of the values that are finite; the deviation of fewer than two is NaN."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return math.nan, math.nan
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else math.nan


def encoded(record: Mapping[str, Any]) -> str:
    """JSON with a run per line; NaN as null."""
    runs = ",\n".join(json.dumps(_without_nan(run)) for run in record["runs"])
    rest = json.dumps(_without_nan({key: value for key, value in record.items() if key != "runs"}))
    return f'{rest[:-1]},\n"runs": [\n{runs}\n]}}\n'


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _part(layer: Mapping[str, Any], part: slice) -> float:
    return fit_power_law(layer["sigma"][part], layer["h"][part]).exponent


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _plain(analysis: Analysis | None) -> dict[str, Any] | None:
    if analysis is None:
        return None
    effects = {
        name: {"estimate": _short(e.estimate), "stderr": _short(e.stderr), "share": _short(e.share)}
        for name, e in analysis.effects.items()
    }
    numbers = {key: _short(getattr(analysis, key)) for key in ("mean", "r2", "seed_deviation")}
    return numbers | {"n": analysis.n, "effects": effects}
