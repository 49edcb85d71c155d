"""What a step works on: parameters with their gradients and states, each as far as this process holds it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.optim.adamw import adamw_state, adamw_step
from lightning_spectral.optim.ddp import GOOD, NONE, Scope, agree, shared_step
from lightning_spectral.optim.fsdp import ShardedMatrix, sharded_step
from lightning_spectral.optim.matrix_update import MatrixBlock, momentum_step, pieces_of, spectral_step
from lightning_spectral.optim.placement import exchange_device, local, local_gradient, sharding_of


@dataclass(frozen=True)
class Entry:
    """The i-th parameter of a group, its gradient, if it has one, and the processes that step it."""

    parameter: Tensor
    grad: Tensor | None
    group: dict[str, Any]
    i: int
    scope: Scope

    @property
    def name(self) -> str:
        """Its name, or its place."""
        named = "param_names" in self.group
        return self.group["param_names"][self.i] if named else f"{self.i} of group {self.group['name']!r}"


@dataclass(frozen=True)
class Ready:
    """An entry that is stepped, with its state."""

    entry: Entry
    state: dict[str, Any]

    @property
    def grad(self) -> Tensor:
        """Of the part of the parameter that this process holds."""
        assert self.entry.grad is not None
        return self.entry.grad

    @property
    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        return [self.entry.parameter, *(value for key, value in self.state.items() if key != "skipped")]


def entry_of(parameter: Tensor, group: dict[str, Any], i: int, scope: Scope) -> Entry:
    """The entry of a parameter.

    Raises:
        RuntimeError: if its gradient is sparse, or it is a matrix no more.
    """
    entry = Entry(parameter, local_gradient(parameter), group, i, scope)
    if entry.grad is not None and entry.grad.is_sparse:
        raise RuntimeError(
            f"the gradient of parameter {entry.name} is sparse, which Spectral Newton does not take; "
            "make its embedding with sparse=False, or give it to torch.optim.SparseAdam"
        )
    if group["update"] == "spectral" and parameter.ndim < 2:
        raise RuntimeError(
            f"parameter {entry.name} was a matrix and has now the shape {tuple(parameter.shape)}: something has "
            "flattened it since, as DeepSpeed does; Spectral Newton needs DDP, FSDP2 (fully_shard) or one device"
        )
    return entry


def new_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a parameter that was never stepped."""
    skipped = torch.zeros((), dtype=torch.float32, device=parameter.device if group["capturable"] else "cpu")
    if group["update"] == "adamw":
        return {**adamw_state(parameter, capturable=group["capturable"]), "skipped": skipped}
    buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {"momentum_buffer": buffer, "skipped": skipped}


def update(chosen: Iterable[Ready], *, share: bool = True) -> None:
    """Step parameters, in the order of their groups; without ``share``, every process computes what it has."""
    wholes: dict[Any, list[MatrixBlock]] = {}
    sharded: list[ShardedMatrix] = []
    for _, of_group in groupby(chosen, key=lambda ready: id(ready.entry.group)):
        members = list(of_group)
        group = members[0].entry.group
        parameters = [local(ready.entry.parameter) for ready in members]
        grads = [ready.grad for ready in members]
        states = [{key: local(value) for key, value in ready.state.items()} for ready in members]
        if group["update"] == "adamw":
            adamw_step(parameters, grads, states, group)
            continue
        momenta = momentum_step(parameters, grads, [state["momentum_buffer"] for state in states], group)
        for ready, target, momentum in zip(members, parameters, momenta, strict=True):
            entry, sharding = ready.entry, sharding_of(ready.entry.parameter)
            if sharding is None:
                processes = entry.scope.whole if share else None
                wholes.setdefault(processes, []).extend(pieces_of(target, momentum, group, entry.i))
            else:
                sharded.append(ShardedMatrix(target, momentum, sharding, group, entry.i))
    for processes, pieces in wholes.items():
        if processes is None:
            spectral_step(pieces)
        else:
            shared_step(pieces, processes)
    if sharded:
        sharded_step(sharded)


def gradient_norms(grads: Sequence[Tensor]) -> list[float]:
    """Frobenius norms, infinite where they overflow and NaN where entries are not finite; one look at each device."""
    norms: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, norm in enumerate(torch._foreach_norm(list(grads)) if grads else []):
        norms.setdefault(norm.device, []).append((i, norm))
    out = [0.0] * len(grads)
    for of_device in norms.values():
        values = torch.stack([norm.float() for _, norm in of_device]).tolist()
        for (i, _), value in zip(of_device, values, strict=True):
            # A norm that overflowed says nothing about the entries.
            finite = math.isfinite(value) or bool(grads[i].isfinite().all())
            out[i] = value if finite else math.nan
    return out


@dataclass(frozen=True)
class SortedOut:
    """What a step does with its parameters, the same in all processes.

    Attributes:
        stepped: with a finite gradient in all of them.
        skipped: with a gradient in some, and in some none or one that is not finite.
        unlike: names of those whose gradients should be the same in all of them and are not.
    """

    stepped: list[Entry]
    skipped: list[Entry]
    unlike: list[str]


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def sort_out(entries: Sequence[Entry]) -> SortedOut:
    """Agree with the other processes on what to step."""
    norms = _norms_of(entries)
    by_scope: dict[Scope, list[int]] = {}
    for k, entry in enumerate(entries):
        by_scope.setdefault(entry.scope, []).append(k)
    lowest, highest, unlike = [NONE] * len(entries), [NONE] * len(entries), []
    for scope, places in by_scope.items():
        found = agree([norms[k] for k in places], scope, exchange_device(entries[places[0]].parameter))
        for j, k in enumerate(places):
            lowest[k], highest[k] = found.lowest[j], found.highest[j]
        if scope.whole is not None:
            unlike += [entries[places[j]].name for j in found.unlike]
    return SortedOut(
        [entry for entry, low in zip(entries, lowest, strict=True) if low == GOOD],
        [entry for entry, low, high in zip(entries, lowest, highest, strict=True) if low < GOOD and high > NONE],
        unlike,
    )


def _norms_of(entries: Sequence[Entry]) -> list[float | None]:
    """Of each gradient; None where there is none."""
    norms = iter(gradient_norms([entry.grad for entry in entries if entry.grad is not None]))
    return [None if entry.grad is None else next(norms) for entry in entries]


def mesh_scope(parameter: Any) -> Scope:
    """All processes of a DTensor's mesh."""
    groups = tuple(parameter.device_mesh.get_all_groups())
    return Scope(groups, groups[0] if len(groups) == 1 and sharding_of(parameter) is None else None)
