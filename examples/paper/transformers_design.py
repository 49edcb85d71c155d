"""Sixteen two-level factors in 32 runs, and their main effects by least squares.

The design is 2^(16-11) of resolution IV (Box, Hunter and Hunter, Statistics for Experimenters, 2nd edition, chapter 6):
all 32 combinations of five letters, each factor an odd word of them (5 letters, 10 triples, 1 quintuple). A product of
two odd words is even and so is no factor: no main effect is mixed up with an interaction of two factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import torch
from torch import Tensor

from examples.paper.small_gpt import Setting

Levels = tuple[Mapping[str, object], Mapping[str, object]]

BASE = Setting()
"""The README's GPT: two blocks of width 64 on Python's source, 400 steps, held-out sequences."""

CENTRE = replace(BASE, batch=32)
"""What the factors change."""

FACTORS: dict[str, Levels] = {
    "data: text -> uniform tokens": ({}, {"data": "uniform"}),
    "training set: endless -> the measured sequences": ({}, {"memorise": True}),
    "steps: 100 -> 400": ({"steps": 100}, {"steps": 400}),
    "vocabulary: 96 -> 512": ({}, {"vocabulary": 512}),
    "depth: 1 -> 2": ({"depth": 1}, {"depth": 2}),
    "width: 32 -> 64": ({"width": 32}, {"width": 64}),
    "batch: 32 -> 8": ({}, {"batch": 8}),
    "length: 32 -> 64": ({"length": 32}, {"length": 64}),
    "measured sequences: 64 -> 256": ({}, {"sequences": 256}),
    "measured positions: all -> last": ({}, {"positions": "last"}),
    "dropout 0.1 and train mode": ({}, {"dropout": 0.1}),
    "LayerNorm: pre -> none": ({}, {"norm": "none"}),
    "head: own -> tied": ({}, {"tied": True}),
    "initialisation: torch -> normal, 0.02": ({}, {"init": "gpt2"}),
    "activation: GELU -> ReLU": ({}, {"activation": "relu"}),
    "learning rate: 3e-3 -> 1e-3": ({}, {"lr": 1e-3}),
}
"""Factor -> what its low and its high level change in `CENTRE`."""


def design_matrix() -> Tensor:
    """(32, 16) of -1 and 1: runs by factors."""
    letters = torch.tensor(list(product((-1, 1), repeat=5)))
    words = [word for size in (1, 3, 5) for word in combinations(range(5), size)]
    return torch.stack([letters[:, list(word)].prod(1) for word in words], 1)


def setting_of(levels: Sequence[int]) -> Setting:
    """The setting of one row of the design."""
    changes: dict[str, object] = {}
    for (low, high), level in zip(FACTORS.values(), levels, strict=True):
        changes |= high if level > 0 else low
    return replace(CENTRE, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Effect:
    """High minus low level of one column in a response.

    Attributes:
        estimate: the difference.
        stderr: its standard error.
        share: of the variance between the runs' means.
    """

    estimate: float
    stderr: float
    share: float


@dataclass(frozen=True)
class Analysis:
    """Main effects of one response.

    Attributes:
        mean: of all runs.
        effects: by column.
        r2: share of the variance between the runs' means that the columns explain.
        seed_deviation: standard deviation between seeds of one run, pooled.
        n: runs with a response.
    """

    mean: float
    effects: dict[str, Effect]
    r2: float
    seed_deviation: float
    n: int


def analyse(columns: Mapping[str, Sequence[float]], responses: Sequence[Sequence[float]]) -> Analysis:
    """Least squares of the runs' means on an intercept and columns of -1 and 1.

    The error is what the columns leave between the runs, interactions included, which is more than what seeds do.

    Args:
        columns: name -> (runs,) of -1 and 1.
        responses: (runs, seeds); NaN where a run gave none.

    Raises:
        ValueError: with fewer runs than it takes to estimate an error.
    """
    y_rs = torch.tensor(responses, dtype=torch.float64)
    known = ~y_rs.isnan().all(1)
    y_r = y_rs.nanmean(1)[known]
    x_rc = torch.tensor(list(columns.values()), dtype=torch.float64).T.reshape(len(y_rs), -1)[known]
    x_rc = torch.cat([torch.ones(len(x_rc), 1, dtype=torch.float64), x_rc], 1)
    freedom = len(y_r) - x_rc.shape[1]
    if freedom < 1:
        raise ValueError(f"columns: {len(columns)} and an intercept need more than {len(y_r)} runs with a response")
    beta = torch.linalg.lstsq(x_rc, y_r[:, None], driver="gelsd").solution[:, 0]
    rss = float((y_r - x_rc @ beta).square().sum())
    tss = float((y_r - y_r.mean()).square().sum())
    errors = (rss / freedom * torch.linalg.inv(x_rc.T @ x_rc).diagonal()).sqrt()
    within = (y_rs - y_rs.nanmean(1, keepdim=True)).square()
    spare = int((~y_rs.isnan()).sum() - known.sum())
    effects = {
        name: Effect(2 * float(b), 2 * float(e), float(b) ** 2 * len(y_r) / tss if tss else math.nan)
        for name, b, e in zip(columns, beta[1:], errors[1:], strict=True)
    }
    deviation = math.sqrt(float(within.nansum()) / spare) if spare else math.nan
    return Analysis(float(beta[0]), effects, 1 - rss / tss if tss else math.nan, deviation, int((~y_rs.isnan()).sum()))
