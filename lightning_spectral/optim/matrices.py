"""The step of matrices: momentum per parameter, one batched matrix function per shape, one size for all updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.optim.alphas import in_use
from lightning_spectral.optim.layout import blocks
from lightning_spectral.optim.transfer import transfer_batch
from lightning_spectral.precision import exact_products

MAX_BATCH_NUMEL = 2**24
"""Entries of a batch of matrices: enough to fill a device, while the copies stay under 64 MiB each in float32."""


@dataclass(frozen=True)
class Piece:
    """One matrix of a parameter: where its update goes, its momentum M, and the group with its hyper-parameters.

    It is the part-th matrix of the group's i-th parameter. Both tensors have the shape (m, ...) of a view into the
    parameter; `flatten(1)` is the matrix.
    """

    target: Tensor
    momentum: Tensor
    group: Mapping[str, Any]
    i: int
    part: int

    @property
    def alpha(self) -> float:
        """Its exponent: the group's, or its own."""
        alpha = self.group["alpha"]
        return in_use(self.group["alphas"][self.i][self.part]) if alpha == "probe" else alpha

    @property
    def tall(self) -> bool:
        """Whether the matrix is transposed before the update, which commutes with it."""
        return self.target.shape[0] ** 2 > self.target.numel()

    @property
    def key(self) -> tuple[Any, ...]:
        """What matrices of one batch share."""
        m = self.target.shape[0]
        n, group = self.target.numel() // m, self.group
        options = (self.alpha, group["damping"], group["tolerance"], group["update_rms"], group["max_gain"])
        return (min(m, n), max(m, n), self.target.dtype, self.target.device, group["capturable"], *options)


def momentum_step(
    parameters: Sequence[Tensor], states: Sequence[Mapping[str, Any]], group: Mapping[str, Any], places: Sequence[int]
) -> list[Piece]:
    """B <- mu B + (1 - mu) G, W <- (1 - lr weight_decay) W, and the pieces of M = mu B + (1 - mu) G (or B).

    Args:
        parameters: of the group, those with a gradient.
        states: of each.
        group: with the hyper-parameters.
        places: of each among the group's parameters.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    buffers = [state["momentum_buffer"] for state in states]
    mu = group["momentum"]
    torch._foreach_lerp_(buffers, grads, 1 - mu)
    updates = torch._foreach_lerp(grads, buffers, mu) if group["nesterov"] else buffers
    if group["weight_decay"] != 0:
        torch._foreach_mul_(list(parameters), 1 - group["lr"] * group["weight_decay"])
    return [
        Piece(target, update, group, i, part)
        for parameter, whole, i in zip(parameters, updates, places, strict=True)
        for part, (target, update) in enumerate(
            zip(blocks(parameter, group["layouts"][i]), blocks(whole, group["layouts"][i]), strict=True)
        )
    ]


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def spectral_step(pieces: Iterable[Piece]) -> None:
    """W <- W - lr * sized(U T(sigma_hat) V^T of M), matrices of one shape in one batch.

    Left out of compiled steps: it is factorisations and large products, which a compiler hands on as they are.
    """
    batches: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in pieces:
        batches.setdefault(piece.key, []).append(piece)
    for batch in batches.values():
        most = max(1, MAX_BATCH_NUMEL // batch[0].target.numel())
        with exact_products(batch[0].target.device.type):
            for first in range(0, len(batch), most):
                _step_batch(batch[first : first + most])


def _step_batch(batch: Sequence[Piece]) -> None:
    group = batch[0].group
    m_brn = torch.stack([_wide(piece.momentum.flatten(1), piece.tall) for piece in batch])
    if m_brn.dtype not in (torch.float32, torch.float64):
        m_brn = m_brn.float()
    u_brn = transfer_batch(
        m_brn,
        alpha=batch[0].alpha,
        damping=group["damping"],
        tolerance=group["tolerance"],
        wait=not group["capturable"],
    )
    if group["update_rms"] is not None:
        u_brn.mul_(sizes(u_brn, rms=group["update_rms"], max_gain=group["max_gain"])[:, None, None])
    for piece, u_rn in zip(batch, u_brn.unbind(), strict=True):
        update = _wide(u_rn, piece.tall).reshape(piece.target.shape)
        lr = piece.group["lr"]
        if isinstance(lr, Tensor):
            piece.target.sub_(update * lr)
        else:
            piece.target.add_(update, alpha=-lr)


def _wide(matrix: Tensor, tall: bool) -> Tensor:
    return matrix.mT if tall else matrix


def sizes(u_brn: Tensor, *, rms: float, max_gain: float) -> Tensor:
    """The factor of each update: rms * min(sqrt(r n) / ||U||_F, max_gain sqrt(n) / ||U||_2), 0 for an update of zero.

    The first is AdamW's size: entries of root mean square 0.2 (Liu et al., arXiv 2502.16982, section 2.2), for a flat
    spectrum 0.2 sqrt(n) U V^T. An update of low rank would put all of that into few directions, up to sqrt(r) times
    the step of a flat one along a single direction; the second bounds it to ``max_gain`` times. ||U||_2 is one
    step of the power method from the longest row, exact at rank one and a lower bound elsewhere.
    """
    r, n = u_brn.shape[1:]
    row_br = torch.linalg.vector_norm(u_brn, dim=2)
    frobenius_b = torch.linalg.vector_norm(row_br, dim=1)
    longest_b = row_br.argmax(1)
    v_bn1 = u_brn[torch.arange(len(u_brn), device=u_brn.device), longest_b, :, None]
    y_br1 = u_brn @ v_bn1
    spectral_b = torch.linalg.vector_norm(u_brn.mT @ y_br1, dim=(1, 2)) / torch.linalg.vector_norm(y_br1, dim=(1, 2))
    largest_b = torch.maximum(frobenius_b / math.sqrt(r), spectral_b / max_gain)
    return torch.where(frobenius_b > 0, rms * math.sqrt(n) / largest_b, 0.0)
