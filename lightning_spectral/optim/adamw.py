"""AdamW for the parameters that are no matrices: torch's own function on state with torch's own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of AdamW as `torch.optim.AdamW` starts it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def adamw_step(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Any]], group: Mapping[str, Any]
) -> None:
    """Step as `torch.optim.AdamW` does, with the group's lr, betas, eps and weight_decay."""
    beta1, beta2 = group["betas"]
    adamw(
        list(parameters),
        list(grads),
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
