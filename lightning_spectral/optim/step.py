"""Parameters of one step with gradients and states, as far as this rank holds them, and AdamW for all but matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lightning_spectral._torch_private import not_compiled
from lightning_spectral.optim.adam_size import needs_size, size_state, size_units
from lightning_spectral.optim.ddp import GradientState, Scope, agree, shared_step
from lightning_spectral.optim.fsdp import ShardedMatrix, sharded_step
from lightning_spectral.optim.matrix_update import MatrixBlock, matrix_blocks, momentum_step, spectral_step
from lightning_spectral.optim.placement import exchange_device, local, local_gradient, sharding_of


@dataclass(frozen=True)
class ParameterStep:
    """Step of the i-th parameter of a group: its gradient, if it has one, and the ranks that step it."""

    parameter: Tensor
    grad: Tensor | None
    group: dict[str, Any]
    i: int
    scope: Scope

    @classmethod
    def of(cls, parameter: Tensor, group: dict[str, Any], i: int, scope: Scope) -> ParameterStep:
        """Return the step of a parameter.

        Raises:
            RuntimeError: if its gradient is sparse, or it is a matrix no more.
        """
        step = cls(parameter, local_gradient(parameter), group, i, scope)
        if step.grad is not None and step.grad.is_sparse:
            raise RuntimeError(
                f"the gradient of parameter {step.name} is sparse, which Spectral Newton does not take; "
                "make its embedding with sparse=False, or give it to torch.optim.SparseAdam"
            )
        if group["update"] == "spectral" and parameter.ndim < 2:
            raise RuntimeError(
                f"parameter {step.name} was a matrix and has now the shape {tuple(parameter.shape)}: something has "
                "flattened it since, as DeepSpeed does; Spectral Newton needs DDP, FSDP2 (fully_shard) or one device"
            )
        return step

    @property
    def name(self) -> str:
        """Name of the parameter, or its place."""
        named = "param_names" in self.group
        return self.group["param_names"][self.i] if named else f"{self.i} of group {self.group['name']!r}"

    def initial_state(self) -> dict[str, Any]:
        """Return the state of the parameter before its first step."""
        skipped = torch.zeros((), dtype=torch.float32, device="cpu")
        if self.group["update"] == "adamw":
            return {**adamw_state(self.parameter), "skipped": skipped}
        buffer = torch.zeros_like(self.parameter, memory_format=torch.preserve_format)
        sizes = size_state(self.parameter, self.group["layouts"][self.i]) if needs_size(self.group) else {}
        return {"momentum_buffer": buffer, "skipped": skipped, **sizes}


def complete_states(steps: Iterable[ParameterStep], states: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """Give each parameter what its state lacks: at the first step, or since an option was changed."""
    for step in steps:
        state = states[step.parameter]
        if not state or (needs_size(step.group) and "mean_square" not in state):
            states[step.parameter] = step.initial_state() | state


def update(steps: Iterable[ParameterStep], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Step parameters, in the order of their groups."""
    full: dict[Any, list[MatrixBlock]] = {}
    sharded: list[ShardedMatrix] = []
    for _, of_group in groupby(steps, key=lambda step: id(step.group)):
        members = list(of_group)
        group = members[0].group
        parameters = [local(step.parameter) for step in members]
        grads = [step.grad for step in members if step.grad is not None]
        own = [{key: local(value) for key, value in states[step.parameter].items()} for step in members]
        if group["update"] == "adamw":
            adamw_step(parameters, grads, own, group)
            continue
        shardings = [sharding_of(step.parameter) for step in members]
        units: Sequence[Tensor | None] = [None] * len(members)
        if needs_size(group):
            layouts, shapes = [group["layouts"][step.i] for step in members], [step.parameter.shape for step in members]
            units = size_units(grads, shapes, shardings, layouts, own, group)
        momenta = momentum_step(parameters, grads, [state["momentum_buffer"] for state in own], group)
        for step, target, momentum, sharding, unit in zip(members, parameters, momenta, shardings, units, strict=True):
            if sharding is None:
                full.setdefault(step.scope.whole, []).extend(matrix_blocks(target, momentum, group, step.i, unit))
            else:
                sharded.append(ShardedMatrix(target, momentum, sharding, group, step.i, unit))
    for process_group, matrices in full.items():
        if process_group is None:
            spectral_step(matrices)
        else:
            shared_step(matrices, process_group)
    if sharded:
        sharded_step(sharded)


def are_finite(grads: list[Tensor]) -> list[bool]:
    """Return whether all entries of each gradient are finite; one look at each device."""
    norms: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, norm in enumerate(torch._foreach_norm(grads) if grads else []):
        norms.setdefault(norm.device, []).append((i, norm))
    finite = [True] * len(grads)
    for of_device in norms.values():
        for (i, _), norm in zip(of_device, torch.stack([norm for _, norm in of_device]).tolist(), strict=True):
            # A norm that overflowed says nothing about the entries.
            finite[i] = math.isfinite(norm) or bool(grads[i].isfinite().all())
    return finite


@not_compiled
def agree_on_steps(steps: Sequence[ParameterStep]) -> tuple[list[ParameterStep], list[ParameterStep]]:
    """Return the steps to take and those to skip, the same on all ranks.

    Taken are those with a finite gradient on all ranks; skipped those with a gradient on some, and on others none or
    one that is not finite.
    """
    finite = iter(are_finite([step.grad for step in steps if step.grad is not None]))
    states = [
        GradientState.NONE if step.grad is None else GradientState.FINITE if next(finite) else GradientState.NOT_FINITE
        for step in steps
    ]
    by_scope: dict[Scope, list[int]] = {}
    for k, step in enumerate(steps):
        by_scope.setdefault(step.scope, []).append(k)
    taken: dict[int, ParameterStep] = {}
    skipped: dict[int, ParameterStep] = {}
    for scope, places in by_scope.items():
        agreed = agree([states[k] for k in places], scope, exchange_device(steps[places[0]].parameter))
        for k, (low, high) in zip(places, agreed, strict=True):
            if high > GradientState.NONE:
                (taken if low == GradientState.FINITE else skipped)[k] = steps[k]
    return [taken[k] for k in sorted(taken)], [skipped[k] for k in sorted(skipped)]


def mesh_scope(parameter: Any) -> Scope:
    """Return all ranks of a DTensor's mesh."""
    groups = tuple(parameter.device_mesh.get_all_groups())
    return Scope(groups, groups[0] if len(groups) == 1 and sharding_of(parameter) is None else None)


def adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of AdamW as `torch.optim.AdamW` starts it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def adamw_step(
    parameters: list[Tensor], grads: list[Tensor], states: Sequence[Mapping[str, Any]], group: Mapping[str, Any]
) -> None:
    """Step as `torch.optim.AdamW` does, with the group's lr, betas, eps and weight_decay."""
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
