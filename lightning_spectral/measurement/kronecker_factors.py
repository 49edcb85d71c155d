"""Kronecker factors of every layer, from one more backward pass to the outputs of its calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral.curvature import DifferentiableLoss, LayerCall, Recorder, together_or_alone
from lightning_spectral.curvature.products import Block
from lightning_spectral.curvature.seen_layers import see_layers
from lightning_spectral.distributed.assignment import assign_owners
from lightning_spectral.errors import MeasurementError, is_out_of_memory
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.estimation import Evaluation, Window
from lightning_spectral.measurement.factor_sums import FactorSums, InputMoment
from lightning_spectral.measurement.micro_batches import MicroBatch, within_memory
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.records.alignment import KroneckerFactors

SOME_SAMPLES = 8
"""Samples in each of two parts of a batch, to see from their losses whether samples are summed or averaged."""

TOO_LARGE = (
    "out of memory; measure fewer samples (max_samples), or fewer layers (layers): C_A and C_delta of a layer are "
    "matrices of its width, whatever top_k"
)
"""Reason why there are no Kronecker factors."""

OTHER_CALL = "one of its uses is a look-up, takes a part of it, is of a stack, or does not reach the loss"

UNKNOWN_SAMPLES = "the batch does not tell how many samples it holds, so the gradient of one sample's loss is not known"


@dataclass(frozen=True, eq=False)
class KroneckerResult:
    """Kronecker factors of the layers that have them.

    Attributes:
        notes: layer name -> why it has none.
        per_sample: factor from the curvature of the measured loss to that of the mean of the samples' losses: 1, or for
            a loss that sums over samples one over their number.
    """

    factors: dict[str, KroneckerFactors]
    notes: dict[str, str]
    per_sample: float = 1.0


def kronecker_factors(evaluation: Evaluation, directions: Window, *, wanted: bool) -> KroneckerResult:
    """Return the Kronecker factors of an objective, or the reason why a layer has none; curvature goes on without.

    With L = sum_b l_b / B the loss of B samples, delta = B dL / dz is the gradient of one sample's loss l_b; for a loss
    that is the sum of the l_b, it is dL / dz. Which of them holds is inferred from the values of the loss.

    Where memory runs out, the micro-batches are halved.

    Args:
        evaluation: what to measure. If the graph of its first loss is there, it is used, and kept.
    """
    objective = evaluation.objective
    if not wanted:
        return KroneckerResult({}, {})
    if objective.samples is None:
        return KroneckerResult({}, dict.fromkeys(directions, UNKNOWN_SAMPLES))

    def factors(max_size: int | None) -> KroneckerResult:
        micro_batches, first = evaluation.micro_batches, evaluation.first
        if max_size is not None:
            if first is not None:
                first.release()
            micro_batches, first = objective.cut(max_size), None
        try:
            return _factors(objective, micro_batches, first, directions)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return KroneckerResult({}, dict.fromkeys(directions, f"{type(error).__name__}: {str(error)[:200]}"))

    try:
        return within_memory(objective, None, factors)
    except MeasurementError:
        return KroneckerResult({}, dict.fromkeys(directions, TOO_LARGE))


def _factors(
    objective: Objective, micro_batches: Sequence[MicroBatch], first: DifferentiableLoss | None, directions: Window
) -> KroneckerResult:
    group, samples = objective.group, objective.samples or 1
    with group.step() as step:
        step.send(bool(micro_batches) and sums_over_samples(objective))
    summed = any(step.received)
    sums = _empty_sums(objective.layers, directions)
    factors: dict[str, KroneckerFactors] = {}
    notes: dict[str, str] = {}
    with group.step() as step:
        parts = [*micro_batches, *_samples_without_weight(objective, micro_batches)]
        for part in parts:
            loss = first if first is not None and part is micro_batches[0] else objective.differentiable(part)
            # A sum counts each sample once, whatever the share of its batch in all of them.
            scale = part.weight * samples / (objective.sizes[part.batch] or 1 if summed else 1)
            factors |= _add(loss, part, scale, sums, notes, last=group.size == 1 and part is parts[-1])
            if len(micro_batches) > 1:
                loss.release()
        step.send(notes)
    if group.size > 1:
        notes = {name: why for of_rank in step.received for name, why in of_rank.items()}
        factors = _joint_factors(sums, [name for name in directions if name not in notes], objective)
    while sums:
        name, of_layer = sums.popitem()
        factors[name] = of_layer.factors()
    per_sample = samples / sum((size or 0) ** 2 for size in objective.all_sizes) if summed else 1.0
    return KroneckerResult(factors, notes, per_sample)


def _joint_factors(
    sums: dict[str, FactorSums], names: Sequence[str], objective: Objective
) -> dict[str, KroneckerFactors]:
    """Return the factors of the sums over all ranks, each layer's taken by its owner; nothing is left in ``sums``."""
    group = objective.group
    costs = {name: float(sum(side**3 for side in objective.layers[name].shape)) for name in names}
    owned = {}
    for name, owner in assign_owners(costs, group.size).items():
        # Layer by layer, so that no more than one layer's matrices of all ranks are on one of them.
        with group.step():
            local = sums[name].to_cpu()
        parts = group.gather_object(local, owner)
        with group.step():
            if parts is not None:
                owned[name] = sums[name].merged(parts, objective.parameters[name].device)
    sums.clear()
    with group.step() as step:
        step.send({name: of_layer.factors() for name, of_layer in owned.items()})
    return {name: factors for of_rank in step.received for name, factors in of_rank.items()}


def _empty_sums(layers: Mapping[str, MatrixLayer], directions: Window) -> dict[str, FactorSums]:
    """Return empty sums for each layer; they alone hold the inputs that parts of a fused projection share."""
    inputs: dict[str, InputMoment] = {}
    sums = {}
    for name, triplets in directions.items():
        of_parameter = inputs.setdefault(layers[name].parameter, InputMoment(len(triplets)))
        of_parameter.moment.k = max(of_parameter.moment.k, len(triplets))
        sums[name] = FactorSums(layers[name], triplets, of_parameter)
    return sums


def _add(
    loss: DifferentiableLoss,
    micro_batch: MicroBatch,
    scale: float,
    sums: dict[str, FactorSums],
    notes: dict[str, str],
    *,
    last: bool,
) -> dict[str, KroneckerFactors]:
    """Add one micro-batch to the sums, and keep nothing of its graph.

    In the last one a layer's factors are taken as soon as it is added, and its sums, with up to n x n numbers for each
    factor, let go before those of the next.
    """
    factors = {}
    for name, calls in _calls(loss, micro_batch, list(sums), notes):
        complete = last and micro_batch.weight > 0
        of_layer = sums.pop(name) if complete else sums[name]
        try:
            for call, delta in calls:
                of_layer.add(call, delta, scale, loss.parameters[name].shape)
            if complete:
                factors[name] = of_layer.factors()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            notes[name] = f"{type(error).__name__}: {str(error)[:200]}"
    for name in sums.keys() & notes.keys():
        del sums[name]
    for of_layer in sums.values():
        of_layer.inputs.release()
    return factors


def sums_over_samples(objective: Objective) -> bool:
    """Return whether the loss of a batch grows as the number of its samples, as a sum does, and a mean does not.

    Seen from the loss of a few samples and of as many others, alone and together. A batch that cannot be cut, and a
    loss that cannot be computed of few samples, count as a mean.
    """
    batch, size = max(enumerate(objective.sizes), key=lambda item: item[1] or 0)
    n = min((size or 0) // 2, SOME_SAMPLES)
    if not objective.divisible or n == 0:
        return False
    parts = [MicroBatch(batch, 1.0, 0, n), MicroBatch(batch, 1.0, n, 2 * n), MicroBatch(batch, 1.0, 0, 2 * n)]
    try:
        with torch.no_grad():
            first, second, both = (float(objective.differentiable(part).evaluate()) for part in parts)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    # Either ratio may be off where samples depend on each other, or a penalty on the weights is added.
    return abs(both - (first + second)) < abs(both - (first + second) / 2)


def _samples_without_weight(objective: Objective, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield the samples that are in no micro-batch, since nothing of the loss is in them; their inputs count."""
    ends: dict[int, int] = defaultdict(int)
    for part in sorted((p for p in micro_batches if p.stop is not None), key=lambda p: (p.batch, p.start)):
        if part.start > ends[part.batch]:
            yield MicroBatch(part.batch, 0.0, ends[part.batch], part.start)
        ends[part.batch] = part.stop or 0
    for batch, end in ends.items():
        if end < (objective.sizes[batch] or 0):
            yield MicroBatch(batch, 0.0, end, objective.sizes[batch])


def _calls(
    loss: DifferentiableLoss, micro_batch: MicroBatch, names: Sequence[str], notes: dict[str, str]
) -> Iterator[tuple[str, list[tuple[LayerCall, Tensor]]]]:
    """Yield each layer's calls and the gradients of the loss in their outputs; note why a layer has none."""
    if not micro_batch.weight:
        with torch.no_grad(), Recorder({id(leaf) for leaf in loss.parameters.values()}) as recorder:
            loss.evaluate()
        for name in names:
            calls = recorder.trace.calls.get(id(loss.parameters[name]), [])
            yield name, [(call, torch.zeros_like(call.output)) for call in calls]
        return
    loss.run()
    seen = see_layers(loss, names)
    notes |= seen.unseen
    alike = {name: calls for name, calls in seen.calls.items() if _are_alike(loss, name, calls)}
    notes |= dict.fromkeys(seen.calls.keys() - alike.keys(), OTHER_CALL)
    deltas, failed = together_or_alone(alike, lambda some: loss.output_gradients(c for n in some for c in alike[n]))
    notes |= failed
    last = {id(call): name for name, calls in alike.items() for call in calls}
    for name, calls in alike.items():
        # Parts of a fused projection share their outputs; after the last of them one is let go.
        of_calls = [deltas.pop(id(c), None) if last[id(c)] == name else deltas.get(id(c)) for c in calls]
        pairs = [(call, delta) for call, delta in zip(calls, of_calls, strict=True) if delta is not None]
        if name not in notes:
            yield name, pairs


def _are_alike(loss: DifferentiableLoss, name: str, calls: Sequence[LayerCall]) -> bool:
    """Return whether all that a layer is used for are products of rows with all of its matrix, from the same side."""
    layer, leaf = loss.layers[name], loss.parameters[name]
    if len(calls) != len(loss.trace.calls[id(leaf)]):
        return False
    if all(call.is_convolution or call.block is None for call in calls):
        return True
    if leaf.ndim != 2 or any(call.function is F.embedding for call in calls):
        return False
    # A linear layer is a product with the transposed matrix.
    shape = (0, leaf.shape[0]), (0, leaf.shape[1])
    blocks = {Block(*shape, transposed=True) if call.block is None else call.block for call in calls}
    sides = [True, False] if layer.rows is None else [not layer.transposed]
    return len(blocks) == 1 and blocks <= {Block(*shape, transposed=side) for side in sides}
