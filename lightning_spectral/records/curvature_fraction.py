"""Share of a layer's curvature that lies along its leading gradient directions, beside that of random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CurvatureFraction:
    """Curvature along gradient directions beside the trace of the layer's Hessian block H (m n, m n).

    The u_k v_k^T are orthonormal, so sum_k h_k is a part of tr H; where curvatures are negative as well it may exceed
    it. A random direction u v^T, u and v uniform on their unit spheres, has the mean curvature tr H / (m n).

    Attributes:
        trace: the mean of z^T H z over draws of random signs z; loss per squared unit of weight.
        trace_stderr: its standard error, from what the draws differ by.
        n_draws: number of draws.
        n_directions: number of h_k.
        value: sum_k h_k / tr H.
        stderr: its standard error, to first order, from those of the trace and of h.
        over_random: (mean_k h_k) / (tr H / (m n)), the mean curvature in units of a random direction's.
        note: reason for a NaN; empty where all is well.

    A trace within two standard errors of zero tells nothing but its size; more draws do.
    """

    trace: float
    trace_stderr: float
    n_draws: int
    n_directions: int
    value: float
    stderr: float
    over_random: float
    note: str = ""

    @classmethod
    def of(
        cls, draws: Tensor, h: Tensor, *, shape: tuple[int, int], h_stderr: Tensor | None = None, note: str = ""
    ) -> CurvatureFraction:
        """Estimate it from draws (N,) of z^T H z and curvatures h (K,); NaN curvatures are left out.

        >>> fraction = CurvatureFraction.of(torch.tensor([9.0, 11.0]), torch.tensor([4.0, 1.0]), shape=(4, 5))
        >>> fraction.trace, fraction.value, fraction.over_random
        (10.0, 0.5, 5.0)
        """
        draws, h = draws.double(), h.double()
        measured = ~h.isnan()
        n, k = len(draws), int(measured.sum())
        trace = float(draws.mean()) if n else math.nan
        error = float(draws.std()) / math.sqrt(n) if n > 1 else math.nan
        total = float(h[measured].sum()) if k else math.nan
        total_error = 0.0 if h_stderr is None else float(h_stderr.double()[measured].square().sum().sqrt())
        value = total / trace if trace else math.nan
        if trace == 0 and not note:
            note = "its Hessian block has no trace: the loss is linear in it"
        return cls(
            trace=trace,
            trace_stderr=error,
            n_draws=n,
            n_directions=k,
            value=value,
            stderr=math.hypot(total_error, value * error) / abs(trace) if trace else math.nan,
            over_random=value * shape[0] * shape[1] / k if k else math.nan,
            note=note,
        )

    @classmethod
    def missing(cls, note: str) -> CurvatureFraction:
        """Return NaNs for a layer that could not be measured, with the reason."""
        empty = torch.zeros(0)
        return cls.of(empty, empty, shape=(0, 0), note=note)
