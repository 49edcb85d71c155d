"""Refuse the state of another optimizer, which torch loads wherever groups have the same sizes, and mend its types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_spectral.distributed.dtensor import is_dtensor

STRUCTURE = ("update", "layouts")
"""Options that decide which state a parameter has."""


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
    """Put counts and mean squares back as they were saved.

    torch casts them to the parameter's type on loading, and bfloat16 counts no further than 256.
    """
    saved = (state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"])
    own = (parameter for group in own_groups for parameter in group["params"])
    for parameter, state in zip(own, saved, strict=True):
        for key in ("skipped", "mean_square", *(["step"] if "mean_square" in state else [])):
            if key in state:
                device = states[parameter]["skipped" if key == "skipped" else "mean_square"].device
                states[parameter][key] = state[key].to(device, copy=True)
