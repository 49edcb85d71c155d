"""Give a learning-rate scheduler another optimizer, with its position and its shape kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_spectral._torch_private import LAST_RATES, schedulers_in

RATES = ("base_lrs", LAST_RATES, "max_lrs", "min_lrs")
"""Attributes of schedulers that hold a learning rate per group."""

PER_GROUP = ("lr_lambdas", "base_momentums", "max_momentums")
"""Attributes that hold something else per group."""

FLOORS = ("eta_min",)
"""Attributes that hold one learning rate for all groups."""

GROUP_RATES = ("initial_lr", "max_lr", "min_lr")
GROUP_KEYS = ("base_momentum", "max_momentum")
"""Keys that schedulers keep in the groups."""


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
    factors = [_factor(group["lr"], old.param_groups[j]) for group, j in zip(new.param_groups, sources, strict=True)]
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
            scaled = factors if name in RATES else [1] * len(factors)
            scheduler.__dict__[name] = [
                value[j] * factor if name in RATES else value[j] for j, factor in zip(sources, scaled, strict=True)
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


def _factor(lr: float, before: dict[str, Any]) -> float:
    base = base_rate(before)
    return float(lr / base) if base else 1.0


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
