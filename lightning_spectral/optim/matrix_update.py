"""The step of matrices: momentum per parameter, one batched matrix function per shape, one size for all updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.numerics.matmul_precision import exact_products
from lightning_spectral.optim.matrix_layout import blocks
from lightning_spectral.optim.measured_alpha import in_use
from lightning_spectral.optim.transfer import transfer_batch

MAX_BATCH_NUMEL = 2**24
"""Entries of a batch of matrices: enough to fill a device, while the copies stay under 64 MiB each in float32."""


@dataclass(frozen=True)
class MatrixBlock:
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
    def numel(self) -> int:
        """How many entries it has."""
        return self.target.numel()

    @property
    def cost(self) -> int:
        """In units of flops: that of its Gram matrix, an inverse of it, and the product, all of order r^2 n."""
        return matrix_cost(self.target.shape[0], self.target.numel())

    @property
    def key(self) -> tuple[Any, ...]:
        """What matrices of one batch share."""
        m = self.target.shape[0]
        n, group = self.target.numel() // m, self.group
        options = (self.alpha, group["damping"], group["tolerance"], group["update_rms"], group["max_gain"])
        return (min(m, n), max(m, n), self.momentum.dtype, self.target.device, group["capturable"], *options)


def matrix_cost(m: int, numel: int) -> int:
    """r^2 n of a matrix with m rows."""
    return min(m, numel // m) * numel


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type that matrix functions of this type have, and their updates."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def momentum_step(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], group: Mapping[str, Any]
) -> Sequence[Tensor]:
    """B <- mu B + (1 - mu) G, W <- (1 - lr weight_decay) W; returns M = mu B + (1 - mu) G (or B).

    Entry by entry, so that each may be the part of a parameter that this process holds.
    """
    mu = group["momentum"]
    torch._foreach_lerp_(list(buffers), list(grads), 1 - mu)
    updates = torch._foreach_lerp(list(grads), list(buffers), mu) if group["nesterov"] else buffers
    if group["weight_decay"] != 0:
        torch._foreach_mul_(list(parameters), 1 - group["lr"] * group["weight_decay"])
    return updates


def pieces_of(target: Tensor, momentum: Tensor, group: Mapping[str, Any], i: int) -> list[MatrixBlock]:
    """The matrices of the group's i-th parameter, or of a tensor of its shape."""
    parts = zip(blocks(target, group["layouts"][i]), blocks(momentum, group["layouts"][i]), strict=True)
    return [MatrixBlock(of_target, of_momentum, group, i, part) for part, (of_target, of_momentum) in enumerate(parts)]


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def spectral_step(pieces: Iterable[MatrixBlock]) -> None:
    """W <- W - lr * sized(U T(sigma_hat) V^T of M), matrices of one shape in one batch.

    Left out of compiled steps: it is factorisations and large products, which a compiler hands on as they are.
    """
    for piece, update in updates_of(pieces):
        descend(piece.target, update, piece.group["lr"])


def updates_of(pieces: Iterable[MatrixBlock]) -> Iterator[tuple[MatrixBlock, Tensor]]:
    """Each piece with its update, batch after batch."""
    batches: dict[tuple[Any, ...], list[MatrixBlock]] = {}
    for piece in pieces:
        batches.setdefault(piece.key, []).append(piece)
    for batch in batches.values():
        most = max(1, MAX_BATCH_NUMEL // batch[0].target.numel())
        for first in range(0, len(batch), most):
            chosen = batch[first : first + most]
            with exact_products(batch[0].target.device.type):
                u_brn = _batch_updates(chosen)
            for piece, u_rn in zip(chosen, u_brn.unbind(), strict=True):
                yield piece, _wide(u_rn, piece.tall).reshape(piece.target.shape)


def descend(target: Tensor, update: Tensor, lr: float | Tensor) -> None:
    """W <- W - lr U."""
    if isinstance(lr, Tensor):
        target.sub_(update * lr)
    else:
        target.add_(update, alpha=-lr)


def _batch_updates(batch: Sequence[MatrixBlock]) -> Tensor:
    group = batch[0].group
    m_brn = torch.stack([_wide(piece.momentum.flatten(1), piece.tall) for piece in batch])
    m_brn = m_brn.to(computed_in(m_brn.dtype))
    u_brn = transfer_batch(
        m_brn,
        alpha=batch[0].alpha,
        damping=group["damping"],
        tolerance=group["tolerance"],
        wait=not group["capturable"],
    )
    if group["update_rms"] is not None:
        u_brn.mul_(sizes(u_brn, rms=group["update_rms"], max_gain=group["max_gain"])[:, None, None])
    return u_brn


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
