"""One optimizer after another: its options and schedulers are carried over, and its state is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_spectral._torch_private import LAST_RATES, schedulers_in
from lightning_spectral.distributed.dtensor import is_dtensor
from lightning_spectral.numerics.matmul_precision import at_least

STRUCTURE = ("update", "layouts")
"""Options that decide which state a parameter has."""

OWN = (*STRUCTURE, "kind")
"""Options that SpectralNewton and its `groups` set by themselves."""

CARRIED = ("lr", "weight_decay")
BOOKKEEPING = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")

RATES = ("base_lrs", LAST_RATES, "max_lrs", "min_lrs")
"""Attributes of schedulers that hold a learning rate per group."""

PER_GROUP = ("lr_lambdas", "base_momentums", "max_momentums")
"""Attributes that hold something else per group."""

FLOORS = ("eta_min",)
"""Attributes that hold one learning rate for all groups."""

GROUP_RATES = ("initial_lr", "max_lr", "min_lr")
GROUP_KEYS = ("base_momentum", "max_momentum")
"""Keys that schedulers keep in the groups."""


def carried_groups(
    old: Optimizer, target: type[Optimizer], init_args: Mapping[str, Any], model: nn.Module
) -> list[dict[str, Any]]:
    """Return parameter groups for another optimizer, with the learning rates and weight decays of the old one's.

    Where ``init_args`` gives a rate, the groups keep the ratios to their first; where a weight decay, to the largest.

    Args:
        target: class of the new one; its function ``groups(model)``, if it has one, gives the groups to split.
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
    own = {*BOOKKEEPING, *OWN, *(key for group in new.param_groups for key in group if key in CARRIED)}
    # Groups of SpectralNewton with unlike updates have unlike options.
    first = {group.get("update"): group for group in reversed(old.param_groups)}
    lost = []
    for key in dict.fromkeys(key for group in old.param_groups for key in group if key not in own):
        values = [group.get(key) for group in old.param_groups]
        unlike = any(group.get(key) != first[group.get("update")].get(key) for group in old.param_groups)
        if unlike or (key in (*CARRIED, "maximize") and any(values)):
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


def rebind_scheduler(scheduler: Any, old: Optimizer, new: Optimizer) -> None:
    """Make a scheduler of ``old`` one of ``new``.

    A group of ``new``, of learning rate l, follows the group of ``old`` that its first parameter was in, of base rate b
    (``max_lr`` of OneCycleLR, else ``initial_lr``): all rates are multiplied by l / b, so that l plays the part of b at
    every position of the schedule.

    Args:
        scheduler: of torch, or a subclass of its schedulers; a sequence or a chain of them too.
        old: the optimizer it was made for.
        new: another one, as constructed, for the same parameters in any groups.

    Raises:
        ValueError: if it also schedules a momentum that a group of ``new`` does not have.
    """
    sources = [_source(group, old) for group in new.param_groups]
    bases = [base_rate(old.param_groups[j]) for j in sources]
    factors = [float(group["lr"] / b) if b else 1.0 for group, b in zip(new.param_groups, bases, strict=True)]
    _check_momentum(scheduler, new)
    # A scheduler wants to see that its optimizer steps; making one is how torch marks the optimizer.
    LambdaLR(new, lambda _: 1.0)
    for group, j, factor in zip(new.param_groups, sources, factors, strict=True):
        before = old.param_groups[j]
        group["lr"] = before["lr"] * factor
        group |= {key: before[key] * factor for key in GROUP_RATES if key in before}
        group |= {key: before[key] for key in GROUP_KEYS if key in before}
    _rebind(scheduler, old, new, sources, factors)


def _rebind(scheduler: Any, old: Optimizer, new: Optimizer, sources: Sequence[int], factors: Sequence[float]) -> None:
    for part in schedulers_in(scheduler):
        _rebind(part, old, new, sources, factors)
    n = len(old.param_groups)
    for name, value in vars(scheduler).items():
        if name in (*RATES, *PER_GROUP) and isinstance(value, (list, tuple)) and len(value) == n:
            scheduler.__dict__[name] = [
                value[j] * factor if name in RATES else value[j] for j, factor in zip(sources, factors, strict=True)
            ]
        elif name in FLOORS:
            scheduler.__dict__[name] = value * factors[0]
    scheduler.optimizer = new


def _source(group: dict[str, Any], old: Optimizer) -> int:
    """Return the index of the old optimizer's group that the first parameter was in."""
    first = next(iter(group["params"]), None)
    for j, before in enumerate(old.param_groups):
        if any(parameter is first for parameter in before["params"]):
            return j
    return 0


def base_rate(group: Mapping[str, Any]) -> float:
    """Return the learning rate that a schedule scales: ``max_lr`` of OneCycleLR, else ``initial_lr``, else ``lr``."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _check_momentum(scheduler: Any, new: Optimizer) -> None:
    for part in schedulers_in(scheduler):
        _check_momentum(part, new)
    if not getattr(scheduler, "cycle_momentum", False):
        return
    key = "betas" if getattr(scheduler, "use_beta1", getattr(scheduler, "_use_beta1", False)) else "momentum"
    lacking = [group.get("name", i) for i, group in enumerate(new.param_groups) if key not in group]
    if lacking:
        raise ValueError(
            f"{type(scheduler).__name__} also schedules {key!r}, which groups {', '.join(map(str, lacking))} of "
            f"{type(new).__name__} do not have; give the scheduler cycle_momentum=False"
        )


def check_own_state(
    own_groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]], name: str
) -> None:
    """Raise ValueError unless the saved groups are an optimizer's of this class with the same split of parameters.

    Different numbers of groups and of parameters in them are left to torch, which names them.
    """
    for i, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=False)):
        if "update" not in saved:
            raise ValueError(
                f"{name}.load_state_dict got the state of another optimizer: group {i} has no 'update' but "
                f"{', '.join(sorted(set(saved) - {'params'}))}. Neither can continue the other's state: resume "
                f"with the optimizer of the checkpoint, or start {name} without its optimizer state"
            )
        if len(own["params"]) != len(saved["params"]):
            continue
        for key in STRUCTURE:
            if own.get(key) != saved.get(key):
                raise ValueError(
                    f"{name}.load_state_dict: group {i} ({own['name']}) has {key}={own.get(key)!r}, its saved state "
                    f"{key}={saved.get(key)!r}; build the optimizer from the same groups as in the saved run"
                )


def check_parts(states: Mapping[Tensor, Mapping[str, Any]], name: str) -> None:
    """Raise ValueError if a part of a parameter was given the state of the whole, or the other way around."""
    for parameter, state in states.items():
        for key, value in state.items():
            if (
                isinstance(value, Tensor)
                and value.ndim
                and key != "mean_square"
                and is_dtensor(value) != is_dtensor(parameter)
            ):
                whole, part = ("parameter", "saved state") if is_dtensor(value) else ("saved state", "parameter")
                raise ValueError(
                    f"{name}.load_state_dict: the {part} is a DTensor and the {whole} is not (state {key!r} of shape "
                    f"{tuple(value.shape)}); save and load with get_optimizer_state_dict and set_optimizer_state_dict "
                    "of torch.distributed.checkpoint.state_dict, which split and join them"
                )


def restore_numbers(
    states: Mapping[Tensor, dict[str, Any]], own_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> None:
    """Put counts, on the CPU, and mean squares back as they were saved, in at least float32.

    torch casts them to the parameter's type on loading, and bfloat16 counts no further than 256.
    """
    saved = (state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"])
    own = (parameter for group in own_groups for parameter in group["params"])
    for parameter, state in zip(own, saved, strict=True):
        places = {"skipped": ("cpu", torch.float32), "step": ("cpu", torch.float32)}
        places["mean_square"] = (parameter.device, at_least(parameter.dtype, torch.float32))
        for key in places.keys() & state.keys():
            states[parameter][key] = state[key].to(*places[key], copy=True)
