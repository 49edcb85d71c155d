"""What was configured for the parameters of one optimizer, as groups of another one's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.optim.rebind_scheduler import base_rate

CARRIED = ("lr", "weight_decay")
BOOKKEEPING = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")


def carried_groups(
    old: Optimizer, target: type[Optimizer], init_args: Mapping[str, Any], model: nn.Module
) -> list[dict[str, Any]]:
    """Return parameter groups for another optimizer, with the learning rates and weight decays of the old one's.

    Where ``init_args`` gives a rate, the groups keep the ratios to their first; where a weight decay, to the largest.

    Args:
        old: the optimizer that was configured.
        target: class of the new one; its function ``groups(model)``, if it has one, gives the groups to split.
        init_args: what the new one is constructed with.
        model: that holds the parameters.
    """
    accepted = inspect.signature(target).parameters
    source = {id(p): i for i, group in enumerate(old.param_groups) for p in group["params"]}
    groups = []
    for group in _groups(old, target, model):
        for i, before in enumerate(old.param_groups):
            indices = [k for k, parameter in enumerate(group["params"]) if source.get(id(parameter)) == i]
            if indices:
                values = _values(before, old, init_args, group.get("update"))
                groups.append(_part(group, indices) | {key: x for key, x in values.items() if key in accepted})
    return groups


def lost_options(old: Optimizer, new: Optimizer) -> list[str]:
    """Return what was configured for the groups of an optimizer that another one has no counterpart for."""
    kept = {key for group in new.param_groups for key in group if key in CARRIED}
    lost = []
    for key in dict.fromkeys(key for group in old.param_groups for key in group if key not in (*BOOKKEEPING, *kept)):
        values = [group.get(key) for group in old.param_groups]
        if any(value != values[0] for value in values) or (key in (*CARRIED, "maximize") and any(values)):
            lost.append(f"{key} = {', '.join(map(str, dict.fromkeys(map(str, values))))}")
    return lost


def describe_rates(optimizer: Optimizer) -> str:
    """Return an optimizer's class with the learning rate and the weight decay of its groups.

    >>> import torch
    >>> describe_rates(torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1))
    'SGD (lr 0.1, weight_decay 0)'
    """
    texts = []
    for group in optimizer.param_groups:
        name = f"{group['name']}: " if "name" in group else ""
        rates = [f"lr {base_rate(group):.4g}"] if "lr" in group else []
        decay = [f"weight_decay {group['weight_decay']:.4g}"] if "weight_decay" in group else []
        texts.append(name + ", ".join(rates + decay))
    return f"{type(optimizer).__name__} ({'; '.join(texts)})"


def _values(
    before: Mapping[str, Any], old: Optimizer, init_args: Mapping[str, Any], update: str | None
) -> dict[str, float]:
    """Return the learning rate and weight decay of parameters that were in the group ``before``."""

    def given(option: str) -> Any:
        """Return an argument, that of one update alone (``adamw_lr``) before that of all."""
        own = init_args.get(f"{update}_{option}")
        return init_args.get(option) if own is None else own

    decays = [group.get("weight_decay", 0) for group in old.param_groups]
    lr, decay = base_rate(before), before.get("weight_decay")
    if given("lr") is not None:
        first = base_rate(old.param_groups[0])
        lr = given("lr") * (lr / first if first else 1.0)
    if given("weight_decay") is not None:
        largest = max(decays)
        decay = given("weight_decay") * (decay / largest if decay is not None and largest else 1.0)
    return {"lr": lr} | ({} if decay is None else {"weight_decay": decay})


def _groups(old: Optimizer, target: type[Optimizer], model: nn.Module) -> list[dict[str, Any]]:
    kept = ("params", "name")
    own: list[dict[str, Any]] = [{key: group[key] for key in kept if key in group} for group in old.param_groups]
    if not callable(getattr(target, "groups", None)):
        return own
    # What is frozen now may thaw, as with BackboneFinetuning.
    frozen = [p for group in own for p in group["params"] if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        groups: list[dict[str, Any]] = target.groups(model)  # type: ignore[attr-defined]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    held = {id(parameter) for group in groups for parameter in group["params"]}
    outside: list[Tensor] = [p for group in own for p in group["params"] if id(p) not in held]
    return [*groups, *([{"params": outside}] if outside else [])]


def _part(group: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """Return a group with some of its parameters, and what else it holds for each of them."""
    size = len(group["params"])
    return {
        key: [value[i] for i in indices] if isinstance(value, list) and len(value) == size else value
        for key, value in group.items()
    }
