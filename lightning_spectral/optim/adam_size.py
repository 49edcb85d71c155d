"""Size of AdamW's step, by matrix: momentum's root mean square over that of the gradients so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral._torch_private import not_compiled
from lightning_spectral.numerics.matmul_precision import at_least
from lightning_spectral.optim.placement import STACK, Layout, Sharding
from lightning_spectral.optim.transfer import SMALLEST_DAMPING

ADAM = "adam"
"""`update_rms` that gives a step AdamW's size."""

NOISE = "noise"
"""`damping` of rms^2, the square of what `adam_rms` returns."""

BETA2 = 0.999
"""Decay rate of v, AdamW's own default."""

LARGEST = 1e38
"""Mean square that a gradient counts with at most: float32 ends there."""


def needs_size(group: Mapping[str, Any]) -> bool:
    """Return whether the matrices of a group need AdamW's size, for the step's own or for the damping."""
    return group.get("update_rms") == ADAM or group.get("damping") == NOISE


def size_state(parameter: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return v of each matrix of a parameter, and the number of its steps, on the CPU as AdamW's, before the first."""
    _, sizes = part_sizes(parameter.shape, layout)
    v = torch.zeros(len(sizes), dtype=at_least(parameter.dtype, torch.float32), device=parameter.device)
    return {"mean_square": v, "step": torch.zeros((), dtype=torch.float32, device="cpu")}


def part_sizes(shape: Sequence[int], layout: Layout) -> tuple[int, list[int]]:
    """Return the dimension along which a parameter's matrices lie, and how much of it each has.

    >>> part_sizes((6, 2), Layout(input_first=0, rows=[4, 2]))
    (0, [4, 2])
    """
    groups, rows = layout["input_first"], layout["rows"]
    if groups == STACK:
        return 0, [1] * shape[0]
    if groups > 1:
        return 0, [shape[0] // groups] * groups
    dim = 1 if groups and rows else 0
    return dim, rows or [shape[dim]]


@not_compiled
def size_units(
    grads: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    shardings: Sequence[Sharding | None],
    layouts: Sequence[Layout],
    states: Sequence[Mapping[str, Any]],
    group: Mapping[str, Any],
) -> list[Tensor]:
    """Take gradients into v, and return for each parameter the (parts,) by which RMS(M) is the size of its step.

    With v <- b v + (1 - b) mean(G^2) and both bias-corrected, rms = min(1, RMS(M / (1 - mu^t)) / sqrt(v / (1 - b^t))):
    1 where gradients agree, about sqrt((1 - mu) / (1 + mu)) where they are noise. What is returned is
    1 / ((1 - mu^t) sqrt(v / (1 - b^t))), with t + 1 for Nesterov's momentum.

    Args:
        grads: of each parameter, as far as this rank holds it.
        shapes: of the whole parameters.
        shardings: how they are split over ranks; None for those that are not.
        layouts: of their matrices.
        states: with ``mean_square`` and ``step``, which are written to.
        group: with ``momentum`` and ``nesterov``.
    """
    parts = [part_sizes(*each) for each in zip(shapes, layouts, strict=True)]
    squares = [_squares(*each) for each in zip(grads, shapes, shardings, parts, strict=True)]
    _sum_over_ranks(squares, shardings)
    counts = [shape.numel() // shape[dim] * sizes[0] for shape, (dim, sizes) in zip(shapes, parts, strict=True)]
    for square, (_, sizes) in zip(squares, parts, strict=True):
        # Only parts of different sizes take a copy to the device.
        if len(set(sizes)) > 1:
            square.mul_(sizes[0] / square.new_tensor(sizes))
    torch._foreach_div_(squares, counts)
    torch._foreach_clamp_max_(squares, LARGEST)
    averages, steps = ([state[key] for state in states] for key in ("mean_square", "step"))
    torch._foreach_lerp_(averages, squares, 1 - BETA2)
    torch._foreach_add_(steps, 1)
    mu, ahead = group["momentum"], int(group["nesterov"])
    corrections = [math.sqrt(1 - BETA2**t) / (1 - mu ** (t + ahead)) for t in map(float, steps)]
    units: list[Tensor] = list(torch._foreach_sqrt(averages))
    torch._foreach_reciprocal_(units)
    torch._foreach_mul_(units, corrections)
    return units


def adam_rms(m_brn: Tensor, unit_b: Tensor) -> Tensor:
    """Return rms = min(1, RMS(M) unit) of each matrix; 1 where both are too small for float32."""
    rms_b: Tensor = torch.linalg.vector_norm(m_brn, dim=(1, 2)) / math.sqrt(m_brn.shape[1] * m_brn.shape[2])
    return (rms_b * unit_b.to(rms_b)).nan_to_num_(nan=1.0).clamp_(max=1.0)


def noise_damping(rms_b: Tensor) -> Tensor:
    """Return d = rms^2 of each matrix: about (1 - mu) / (1 + mu) where gradients are noise, 1 where they agree."""
    return rms_b.square().clamp(min=SMALLEST_DAMPING)


def _squares(grad: Tensor, shape: torch.Size, sharding: Sharding | None, parts: tuple[int, list[int]]) -> Tensor:
    """Return (parts,) sums of squares of this rank's entries."""
    dim, sizes = parts
    others = None if len(sizes) == 1 else [i for i in range(grad.ndim) if i != dim]
    lines: Tensor = torch.linalg.vector_norm(grad, dim=others, dtype=at_least(grad.dtype, torch.float32)).square()
    if others is None:
        return lines[None]
    if sharding is not None and sharding.dim == dim:
        whole = lines.new_zeros(shape[dim])
        start = sum(sharding.counts[: dist.get_rank(sharding.group)])
        whole[start : start + len(lines)] = lines
        lines = whole
    return torch.stack([part.sum() for part in torch.split(lines, sizes)])


def _sum_over_ranks(squares: Sequence[Tensor], shardings: Sequence[Sharding | None]) -> None:
    """Sum those of parameters in shards, in one exchange per group of ranks and device."""
    exchanges: dict[Any, list[Tensor]] = {}
    for square, sharding in zip(squares, shardings, strict=True):
        if sharding is not None:
            exchanges.setdefault((sharding.group, square.device), []).append(square)
    for (ranks, _), of_ranks in exchanges.items():
        flat = torch.cat(of_ranks)
        dist.all_reduce(flat, group=ranks)
        for square, total in zip(of_ranks, torch.split(flat, [len(square) for square in of_ranks]), strict=True):
            square.copy_(total)
