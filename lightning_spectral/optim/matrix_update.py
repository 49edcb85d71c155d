"""The step of matrices: momentum per parameter, one batched matrix function per shape, one size for all updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_spectral._torch_private import not_compiled
from lightning_spectral.numerics.matmul_precision import at_least, exact_device, exact_products
from lightning_spectral.optim.adam_size import ADAM, NOISE, adam_rms, needs_size, noise_damping
from lightning_spectral.optim.measured_alpha import alpha_used
from lightning_spectral.optim.placement import blocks
from lightning_spectral.optim.transfer import transfer_batch

MAX_BATCH_NUMEL = 2**24
"""Entries of a batch of matrices: enough to fill a device, while the copies stay under 64 MiB each in float32."""

CACHED_NUMEL = 2**19
"""The same on a CPU, whose cache holds no more: a GPT's step takes 0.88 of the time of one with 2**24."""


@dataclass(frozen=True)
class MatrixBlock:
    """One matrix of a parameter: the target of its update, its momentum M, and the group with its options.

    It is the part-th matrix of the group's i-th parameter. Both tensors have the shape (m, ...) of a view into the
    parameter; `flatten(1)` is the matrix. ``unit`` is what `size_units` gives for it, with update_rms="adam".
    """

    target: Tensor
    momentum: Tensor
    group: Mapping[str, Any]
    i: int
    part: int
    unit: Tensor | None = None

    @property
    def alpha(self) -> float:
        """Exponent: the group's, or its own."""
        alpha = self.group["alpha"]
        return alpha_used(self.group["alphas"][self.i][self.part]) if alpha == "probe" else alpha

    @property
    def tall(self) -> bool:
        """True if the matrix is transposed before the update, which commutes with it."""
        return self.target.shape[0] ** 2 > self.target.numel()

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.target.numel()

    @property
    def cost(self) -> int:
        """Cost in units of FLOPs: of its Gram matrix, an inverse of it, and the product, all of order r^2 n."""
        return matrix_cost(self.target.shape[0], self.target.numel())

    @property
    def key(self) -> tuple[Any, ...]:
        """Key that matrices of one batch share."""
        m = self.target.shape[0]
        n, group = self.target.numel() // m, self.group
        options = (self.alpha, group["damping"], group["tolerance"], group["update_rms"], group["max_gain"])
        return (min(m, n), max(m, n), self.momentum.dtype, self.target.device, *options)


def matrix_cost(m: int, numel: int) -> int:
    """Return r^2 n of a matrix with m rows."""
    return min(m, numel // m) * numel


def momentum_step(
    parameters: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: Mapping[str, Any]
) -> Sequence[Tensor]:
    """Set B <- mu B + (1 - mu) G and W <- (1 - lr weight_decay) W; return M = mu B + (1 - mu) G (or B).

    Entry by entry, so that each may be the part of a parameter that this rank holds.
    """
    mu = group["momentum"]
    torch._foreach_lerp_(buffers, grads, 1 - mu)
    updates = torch._foreach_lerp(grads, buffers, mu) if group["nesterov"] else buffers
    if group["weight_decay"] != 0:
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
    return updates


def matrix_blocks(
    target: Tensor, momentum: Tensor, group: Mapping[str, Any], i: int, units: Tensor | None = None
) -> list[MatrixBlock]:
    """Return the matrices of the group's i-th parameter, or of a tensor of its shape."""
    targets, momenta = (blocks(tensor, group["layouts"][i]) for tensor in (target, momentum))
    of_parts = [None] * len(targets) if units is None else units.unbind()
    return [
        MatrixBlock(of_target, of_momentum, group, i, part, unit)
        for part, (of_target, of_momentum, unit) in enumerate(zip(targets, momenta, of_parts, strict=True))
    ]


@not_compiled
def spectral_step(matrices: Iterable[MatrixBlock]) -> None:
    """Set W <- W - lr c U T(sigma_hat) V^T of M, matrices of one shape in one batch.

    Left out of compiled steps: it is factorisations and large products, which a compiler hands on as they are.
    """
    for matrix, update in compute_updates(matrices):
        descend(matrix.target, update, matrix.group["lr"])


def compute_updates(matrices: Iterable[MatrixBlock]) -> Iterator[tuple[MatrixBlock, Tensor]]:
    """Yield each matrix with its update, batch after batch."""
    batches: dict[tuple[Any, ...], list[MatrixBlock]] = {}
    for matrix in matrices:
        batches.setdefault(matrix.key, []).append(matrix)
    for batch in batches.values():
        numel = CACHED_NUMEL if batch[0].target.device.type == "cpu" else MAX_BATCH_NUMEL
        limit = max(1, numel // batch[0].numel)
        for first in range(0, len(batch), limit):
            part = batch[first : first + limit]
            with exact_products(batch[0].target.device.type):
                u_brn = _batch_updates(part)
            for matrix, u_rn in zip(part, u_brn.unbind(), strict=True):
                yield matrix, _wide(u_rn, matrix.tall).reshape(matrix.target.shape)


def descend(target: Tensor, update: Tensor, lr: float | Tensor) -> None:
    """Set W <- W - lr U."""
    if isinstance(lr, Tensor):
        target.sub_(update * lr)
    else:
        target.add_(update, alpha=-lr)


def _batch_updates(batch: Sequence[MatrixBlock]) -> Tensor:
    group = batch[0].group
    momenta = [_wide(matrix.momentum.flatten(1), matrix.tall) for matrix in batch]
    m_brn = torch.stack(momenta) if len(batch) > 1 else momenta[0][None].contiguous()
    m_brn = m_brn.to(exact_device(m_brn.device), at_least(m_brn.dtype, torch.float32))
    rms, damping = group["update_rms"], group["damping"]
    if needs_size(group):
        adam_b = adam_rms(m_brn, torch.stack([matrix.unit for matrix in batch if matrix.unit is not None]))
        rms = adam_b if rms == ADAM else rms
        damping = noise_damping(adam_b) if damping == NOISE else damping
    u_brn = transfer_batch(m_brn, alpha=batch[0].alpha, damping=damping, tolerance=group["tolerance"])
    if rms is not None:
        u_brn.mul_(update_scales(u_brn, rms=rms, max_gain=group["max_gain"])[:, None, None])
    return u_brn.to(batch[0].target.device)


def _wide(matrix: Tensor, tall: bool) -> Tensor:
    return matrix.mT if tall else matrix


def update_scales(u_brn: Tensor, *, rms: float | Tensor, max_gain: float) -> Tensor:
    """Return the factor of each update: rms * min(sqrt(r n) / ||U||_F, max_gain sqrt(n) / ||U||_2), 0 for zero.

    The first gives entries of root mean square rms, a number or (b,) of them: for a flat spectrum rms sqrt(n) U V^T. An
    update of low rank would put all of that into few directions, up to sqrt(r) times
    the step of a flat one along a single direction; the second bounds it to ``max_gain`` times. ||U||_2 is one
    step of the power method from the longest row, exact at rank one and a lower bound elsewhere.
    """
    r, n = u_brn.shape[1:]
    row_br = torch.linalg.vector_norm(u_brn, dim=2)
    frobenius_b = torch.linalg.vector_norm(row_br, dim=1)
    longest_b11 = row_br.argmax(1)[:, None, None]
    # Rows times matrices: batched products with columns take 4 to 20 times as long on a CPU.
    y_b1r = torch.bmm(u_brn.gather(1, longest_b11.expand(-1, 1, n)), u_brn.mT)
    norms = [torch.linalg.vector_norm(product, dim=(1, 2)) for product in (torch.bmm(y_b1r, u_brn), y_b1r)]
    largest_b = torch.maximum(frobenius_b / math.sqrt(r), norms[0] / norms[1] / max_gain)
    return torch.where(frobenius_b > 0, rms * math.sqrt(n) / largest_b, 0.0)
