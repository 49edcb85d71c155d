"""Micro-batches of a batch, the weights with which their losses add up to its own, and smaller ones for little memory.

With L the loss of a batch and L_i those of its micro-batches, L = sum_i w_i L_i for a mean over samples (w_i the share
of the samples), a mean over targets that count (w_i their share) and a sum (w_i = 1). Which of them holds is inferred
from the values of the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lightning_spectral.curvature import LossValue
from lightning_spectral.errors import MeasurementError, is_out_of_memory
from lightning_spectral.isolation.devices import release_memory

if TYPE_CHECKING:
    from lightning_spectral.measurement.objective import Objective

T = TypeVar("T")

SUM_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Relative tolerance for sum_i w_i L_i = L, by compute dtype.

Below it a term of the weights in a sum of losses, or one across samples, is taken for rounding. Its share of the
curvature may be much larger than its share of the loss.
"""

SPREAD = 1e-2
"""Relative spread of the losses of micro-batches from which on they tell their weights to about 1e-3."""

TRIES = 3
"""Number of tries where memory runs out, each with micro-batches half as large."""


class NoSumError(MeasurementError):
    """Raised for a loss that is no weighted sum of those of micro-batches of its batch."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples start to stop of one batch and the weight of their loss; stop is None for a batch that is not cut."""

    batch: int
    weight: float
    start: int = 0
    stop: int | None = None


def cut_evenly(batch: int, size: int, n: int) -> list[MicroBatch]:
    """Return n micro-batches of nearly equal size of a batch of so many samples, each of weight 1."""
    bounds = pairwise(round(i * size / n) for i in range(n + 1))
    return [MicroBatch(batch, 1.0, start, stop) for start, stop in bounds]


def infer_weights(
    total: float, micro_batches: Sequence[MicroBatch], parts: Sequence[LossValue], compute_dtype: torch.dtype
) -> list[float]:
    """Return w_i with L = sum_i w_i L_i.

    Args:
        micro_batches: all of one batch, in order.
        parts: L_i, with what was seen of how they came about.
        compute_dtype: the dtype whose rounding counts.
    """
    losses = [0.0 if part.normalizer == 0 else part.value for part in parts]
    tolerance = SUM_TOLERANCE[compute_dtype]
    apart = max(losses) - min(losses) >= SPREAD * max(abs(loss) for loss in losses)
    fitting = []
    for weights in _candidates(parts, micro_batches, apart):
        terms = torch.tensor([w * x for w, x in zip(weights, losses, strict=True)], dtype=torch.float64)
        if abs(float(terms.sum()) - total) <= tolerance * max(abs(total), float(terms.abs().sum())):
            fitting.append(weights)
    # Losses that add up to zero do so as a sum and as a mean; where all are zero, so is their gradient.
    ones = [1.0] * len(parts)
    either = any(losses) and bool(fitting) and fitting[0] == ones and fitting[-1] != ones
    if fitting and not either:
        return fitting[0]
    if either or not apart:
        what = "add up to zero" if either else f"are equal ({losses[0]:.6g})"
        raise NoSumError(
            f"micro_batch_size: the losses of the micro-batches {what}, so that their weights cannot be told; measure "
            "the batch whole, or fewer samples of it (max_samples)"
        )
    raise NoSumError(
        f"micro_batch_size: the loss of the batch, {total:.6g}, is neither a mean nor the sum of those of its "
        f"micro-batches ({', '.join(f'{loss:.6g}' for loss in losses[:4])}), so its samples depend on each other "
        "(BatchNorm or dropout in train mode, a loss across the batch); measure the batch whole, or fewer samples of "
        "it (max_samples)"
    )


def _candidates(parts: Sequence[LossValue], micro_batches: Sequence[MicroBatch], apart: bool) -> list[list[float]]:
    """Return the weights to try: shares of the targets that count, those of a sum, shares of the samples."""
    counts = [part.normalizer for part in parts if part.normalizer is not None]
    candidates = [[count / sum(counts) for count in counts]] if len(counts) == len(parts) and sum(counts) > 0 else []
    candidates.append([1.0] * len(parts))
    if apart:
        size = micro_batches[-1].stop or 1
        candidates.append([((part.stop or 0) - part.start) / size for part in micro_batches])
    return candidates


def within_memory(objective: Objective, max_size: int | None, measure: Callable[[int | None], T]) -> T:
    """Return what ``measure`` returns, given half as large a size of micro-batches each time that memory runs out.

    Args:
        max_size: samples of the largest micro-batch in the first try; None: full batches.
        measure: function of the size.

    Raises:
        MeasurementError: if memory runs out in `TRIES`, or batches cannot be cut further.
    """
    failures: list[str] = []
    while True:
        try:
            return measure(max_size)
        except Exception as error:
            if not is_out_of_memory(error):
                if failures and isinstance(error, MeasurementError):
                    text = f"out of memory with {failures[0]}, and no smaller micro-batches: {error}"
                    raise MeasurementError(text) from None
                raise
        # Here the error, whose frames hold memory, is gone.
        own = objective.size_in_use if objective.full_batches() else 0, objective.divisible
        sizes, divisible = zip(*objective.group.all_gather_object(own), strict=True)
        largest = largest_size(sizes)
        failures.append(f"{largest or 'all'} samples at once")
        release_memory(objective.parameters.values())
        if largest is None or largest <= 1 or not all(divisible) or len(failures) == TRIES:
            raise MeasurementError(
                f"out of memory with {', with '.join(failures)}; measure fewer samples (max_samples), fewer layers "
                "(layers), or set micro_batch_size"
            )
        max_size = math.ceil(largest / 2)


def largest_size(sizes: Sequence[int | None]) -> int | None:
    """Return the largest of these sizes; None where one is not known."""
    counts = [size for size in sizes if size is not None]
    return max(counts) if len(counts) == len(sizes) else None


def add_weighted(total: Tensor | None, value: Tensor | None, weight: float) -> Tensor | None:
    """Return total + weight * value; None stands for zero."""
    if value is None:
        return total
    value = value if weight == 1 else weight * value
    return value if total is None else total + value
