"""Gradients of disjoint parts of the samples: by how much they differ tells sampling noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_spectral.curvature import LossValue
from lightning_spectral.errors import is_out_of_memory, text_of
from lightning_spectral.isolation.interrupts import interruption
from lightning_spectral.measurement.gradients import ObjectiveGradients
from lightning_spectral.measurement.micro_batches import MicroBatch, NoSumError, cut_evenly, infer_weights
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.measurement.part_norms import PartNorms, SquaredNorms

PARTS = 8
"""Number of parts that a single batch is cut into."""


@dataclass(frozen=True)
class GradientParts:
    """Disjoint parts of the gradients of an objective, over all ranks.

    Attributes:
        norms: of each part.
        note: why there are none to compare; empty where there are.
    """

    norms: Sequence[SquaredNorms]
    note: str = ""


def gradient_parts(
    objective: Objective, gradients: ObjectiveGradients, micro_batches: Sequence[MicroBatch]
) -> GradientParts:
    """Return the parts that the gradients were summed from; those of a single one are computed in one more pass.

    Args:
        objective: whose gradients they are.
        gradients: summed over all ranks' micro-batches.
        micro_batches: of this rank.
    """
    if len(gradients.parts) > 1:
        return GradientParts(gradients.parts)
    with objective.group.step(watched=True) as step:
        step.send(_cut(objective, gradients, micro_batches[0]) if micro_batches else None)
    of_ranks: list[GradientParts] = [parts for parts in step.received if parts is not None]
    return of_ranks[0]


def _cut(objective: Objective, gradients: ObjectiveGradients, full: MicroBatch) -> GradientParts:
    """Return the parts of a batch that is all there is."""
    size = objective.samples_of(full)
    if not objective.has_tensors(full):
        # A loss of the weights alone has no sampling noise.
        return GradientParts([])
    if objective.reducer is not None or not objective.divisible or size is None or size < 2:
        return GradientParts([], "the gradient is that of one batch, which cannot be cut")
    micro_batches = cut_evenly(full.batch, size, min(size, PARTS))
    gradients_of_parts: list[PartNorms] = []
    losses: list[LossValue] = []
    for micro_batch in micro_batches:
        loss = objective.differentiable(micro_batch)
        try:
            values = loss.gradients(keep_graph=False).values
        except Exception as error:
            if is_out_of_memory(error) or interruption(error):
                raise
            return GradientParts([], f"the loss fails on a part of the batch alone ({text_of(error)})")
        losses.append(LossValue.of(loss.value, loss.trace))
        norms = PartNorms(objective.share_of(micro_batch), objective.layers, objective.parameters)
        for name, value in values.items():
            norms.add(name, value)
        gradients_of_parts.append(norms)
        loss.release()
    dtypes = {dtype for loss in losses for dtype in (loss.dtype, *loss.casts)}
    try:
        weights = infer_weights(gradients.loss, micro_batches, losses, objective.compute_dtype(dtypes))
    except NoSumError:
        return GradientParts([], "the loss of the batch is no sum of those of its parts")
    return GradientParts([part.squared_norms(w) for part, w in zip(gradients_of_parts, weights, strict=True)])
