"""The optimizer's step that was taken: its effect by the quadratic model of the loss at the weights before, and after.

With Delta the weights after the step minus those before, g and H of the batch's loss at the weights before, one
Hessian-vector product gives g . Delta, Delta^T H Delta and its parts by layer, and two forward passes the two losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.curvature import LOSS, STEP, Curvatures, StepProducts
from lightning_spectral.distributed.dtensor import is_dtensor
from lightning_spectral.distributed.process_group import SINGLE_PROCESS, Group
from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.held_state import UNINITIALIZED
from lightning_spectral.layers.names import unwrapped
from lightning_spectral.measurement.estimation import SMALL_BYTES, Evaluation
from lightning_spectral.measurement.gradients import sum_gradients
from lightning_spectral.measurement.loss import LossFunction, resolve_loss
from lightning_spectral.measurement.micro_batches import MicroBatch, within_memory
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.measurement.setup import (
    NetworkCopy,
    first_buffers,
    isolated_copy,
    select_layers,
    set_up_objective,
)
from lightning_spectral.options import Options
from lightning_spectral.records.step import StepMeasurement

REMEDY = "give a loss_fn without it, or set step=False"


@dataclass(frozen=True, eq=False)
class Weights:
    """Parameters and buffers of a network, by name."""

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """Return the weights themselves, which the next step of an optimizer changes."""
        inner = unwrapped(model)
        return cls(
            {name: p.detach() for name, p in inner.named_parameters() if not isinstance(p, UNINITIALIZED)},
            {name: b.detach() for name, b in inner.named_buffers() if not isinstance(b, UNINITIALIZED)},
        )

    @classmethod
    def copied(cls, model: nn.Module) -> Weights:
        """Return a copy of the trained parameters and of all buffers, on their devices."""
        trained = {name for name, parameter in unwrapped(model).named_parameters() if parameter.requires_grad}
        weights = cls.of(model)
        if lazy := sorted(trained - weights.parameters.keys()):
            raise MeasurementError(f"{lazy[0]} is of a lazy module that has not seen a batch, so it has no value yet")
        return cls(
            {name: value.clone() for name, value in weights.parameters.items() if name in trained},
            {name: value.clone() for name, value in weights.buffers.items()},
        )


def measure_step(
    model: nn.Module,
    batches: Sequence[Any],
    options: Options,
    loss_fn: LossFunction | None = None,
    *,
    before: Weights,
    after: Weights | None = None,
    batch_idx: int = 0,
    group: Group = SINGLE_PROCESS,
) -> StepMeasurement:
    """Measure the step from the weights ``before`` to those ``after``; one joint result for all ranks of ``group``.

    Buffers are those before, and random states the same, in both losses. Nothing is written to the model.

    Args:
        model, batches, options, loss_fn, batch_idx, group: as in `run_measurement`.
        before: all trained parameters before the step, and the buffers.
        after: parameters after it; None: the model's.

    Raises:
        MeasurementError: if no parameter moved, they are not the same ones before and after, or they are in shards.
    """
    after = Weights.of(model) if after is None else after
    with isolated_copy(model, options.mode, options.precision, group) as copy:
        with group.step():
            leaves = _leaves(copy, before)
            delta = _update(leaves, before, after)
            layers = select_layers(copy.original, options).layers
            loss = resolve_loss(copy.original, loss_fn, batch_idx)
        buffers = first_buffers(copy.module, before.buffers, group)
        with group.step():
            copy_before = _at(copy, leaves, before.parameters, {**before.buffers, **buffers})
            copy_after = _at(copy_before, leaves, after.parameters, {})
            names = {id(leaf): name for name, leaf in leaves.items()}
            held = {name: names[id(leaf)] for name, leaf in copy.leaves(layers).items() if id(leaf) in names}
            products = StepProducts(delta, [(layers[name], parameter) for name, parameter in held.items()])
        objective = set_up_objective(copy_before, loss, batches, layers, options, group, leaves)
        measure = partial(_measure, objective, products)
        micro_batches, curvatures = within_memory(objective, options.micro_batch_size, measure)
        moved = set_up_objective(copy_after, loss, batches, layers, options, group, leaves)
        loss_after = _loss(moved, micro_batches)
    (loss_before,) = curvatures.h[LOSS].tolist()
    slope, curvature, *parts = curvatures.h[STEP].tolist()
    failed = f"{curvatures.failed[STEP]}; {REMEDY}" if curvatures.failed else ""
    if not failed and not math.isfinite(slope + curvature):
        failed = "the weights after the step, or the products of the Hessian with it, are NaN or infinite"
    return StepMeasurement(
        slope, curvature, dict(zip(held, parts, strict=True)), loss_before, loss_after, failed, curvatures.notes
    )


def _leaves(copy: NetworkCopy, weights: Weights) -> dict[str, Tensor]:
    parameters = dict(copy.module.named_parameters())
    for name, value in weights.parameters.items():
        if is_dtensor(value):
            raise MeasurementError(f"{name} is in shards (DTensor), of which no rank holds the whole update")
        if name not in parameters or parameters[name].shape != value.shape:
            raise MeasurementError(
                f"{name}, a trained parameter before the step, is not there after it, or has another shape: "
                "nothing says how the optimizer moved it"
            )
        # Also where it was frozen meanwhile.
        parameters[name].requires_grad_(True)
    return {name: parameters[name] for name in weights.parameters}


def _update(leaves: Mapping[str, Tensor], before: Weights, after: Weights) -> dict[str, Tensor]:
    """Return Delta, in the precision of the copy's parameters."""
    delta = {}
    for name, leaf in leaves.items():
        delta[name] = after.parameters[name].to(leaf.dtype) - before.parameters[name].to(leaf.dtype)
    if not any(bool(update.any()) for update in delta.values()):
        raise MeasurementError(
            "the optimizer moved no parameter: its learning rate is 0, a GradScaler skipped the step because a "
            "gradient overflowed, or training_step returned None"
        )
    return delta


def _at(
    copy: NetworkCopy, leaves: Mapping[str, Tensor], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> NetworkCopy:
    """Return the copy with a state of these weights; of buffers, those whose shape is still the same."""
    own = dict(copy.module.named_buffers())
    values = {id(leaf): parameters[name] for name, leaf in leaves.items()}
    values |= {id(own[name]): b for name, b in buffers.items() if name in own and own[name].shape == b.shape}
    return replace(copy, initial_state=copy.initial_state.replaced(values))


def _measure(objective: Objective, products: StepProducts, max_size: int | None) -> tuple[list[MicroBatch], Curvatures]:
    """Return the micro-batches and the products, by micro-batches of at most so many samples; None: by memory."""
    micro_batches = objective.cut(max_size)
    with objective.group.step(watched=True) as step:
        first = objective.differentiable(micro_batches[0]) if micro_batches else None
        if first is not None:
            first.run()
        step.send(max_size is None and first is not None and first.traced_bytes * products.memory >= SMALL_BYTES)
    if any(step.received):
        # Large batches are cut, as those of a probe, where their gradients add up.
        first = None
        gradients = sum_gradients(objective, micro_batches, norms=False)
        narrow, reference = gradients.narrow_dtypes, gradients.smallest
        evaluation = Evaluation(objective, micro_batches, gradients.first, False, narrow, reference)
    else:
        evaluation = Evaluation(objective, micro_batches, first, has_graph=True)
    return micro_batches, evaluation.measure(products, {})


def _loss(objective: Objective, micro_batches: Sequence[MicroBatch]) -> float:
    with objective.group.step(watched=True) as step:
        total = 0.0
        for micro_batch, loss in objective.losses(micro_batches):
            value = loss.evaluate()
            total += micro_batch.weight * float(value.detach() if isinstance(value, Tensor) else math.nan)
        step.send(total)
    return float(torch.tensor(step.received, dtype=torch.float64).sum())
