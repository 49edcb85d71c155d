"""Leading singular triplets of a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.errors import MeasurementError


@dataclass(frozen=True, eq=False)
class SingularTriplets:
    """Columns u_k and v_k and values sigma_k of a matrix (m, n), in decreasing order of sigma.

    Attributes:
        u: (m, k) left singular vectors.
        sigma: (k,) singular values.
        v: (n, k) right singular vectors.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor

    def __len__(self) -> int:
        return self.sigma.numel()

    def first(self, k: int) -> SingularTriplets:
        """The k leading triplets."""
        return SingularTriplets(self.u[:, :k], self.sigma[:k], self.v[:, :k])


def top_singular_triplets(matrix: Tensor, k: int, *, groups: int = 1) -> SingularTriplets:
    """The min(k, m, n) leading singular triplets of a matrix (m, n), from a full SVD.

    Half precision is raised to float32, since LAPACK and cuSOLVER have nothing below it.

    Args:
        matrix: (m, n).
        k: how many triplets, at least 1.
        groups: the rows are this many equal blocks, each a matrix of its own (a grouped convolution).
            The triplets are the leading ones of all blocks together; every u_k is zero outside its block,
            so u_k v_k^T still is the direction in the stacked matrix.

    Raises:
        ValueError: if k < 1, the matrix is not two-dimensional, or the groups do not divide its rows.
        MeasurementError: if an entry is not finite.

    >>> triplets = top_singular_triplets(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> triplets.sigma.tolist()
    [3.0, 2.0]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if matrix.ndim != 2 or groups < 1 or matrix.shape[0] % groups:
        raise ValueError(f"need a matrix (m, n) whose m rows {groups} groups divide, got shape {tuple(matrix.shape)}")
    matrix = matrix.detach()
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    if not bool(matrix.isfinite().all()):
        bad = int((~matrix.isfinite()).sum())
        raise MeasurementError(
            f"{bad} of {matrix.numel()} entries are NaN or infinite; a singular value needs finite ones"
        )
    m, n = matrix.shape
    blocks_gmn = matrix.reshape(groups, m // groups, n)
    u_gmr, sigma_gr, vh_grn = _svd(blocks_gmn)
    r = sigma_gr.shape[1]
    sigma_k, order = sigma_gr.flatten().sort(descending=True, stable=True)
    sigma_k, order = sigma_k[:k], order[:k]
    group_k, rank_k = order // r, order % r
    u_gmk = matrix.new_zeros(groups, m // groups, len(order))
    u_gmk[group_k, :, torch.arange(len(order), device=order.device)] = u_gmr[group_k, :, rank_k]
    return SingularTriplets(u_gmk.reshape(m, -1), sigma_k, vh_grn[group_k, rank_k].T.contiguous())


def _svd(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        u, sigma, vh = torch.linalg.svd(blocks, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Divide and conquer can fail to converge where float64 on the CPU does not.
        u, sigma, vh = (t.to(blocks) for t in torch.linalg.svd(blocks.cpu().double(), full_matrices=False))
    return u, sigma, vh
