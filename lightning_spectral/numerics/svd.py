"""Leading singular triplets of a gradient, and singular values alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.block_lanczos import leading_triplets
from lightning_spectral.numerics.matmul_precision import exact_device

LANCZOS_SIDE = 512
"""Shorter side of a matrix from which on block Lanczos beats the full SVD, measured for k = 20."""
SIDE_PER_TRIPLET = 20
"""Least ratio of the shorter side to k at which block Lanczos does."""


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
        """Return the k leading triplets."""
        return SingularTriplets(self.u[:, :k], self.sigma[:k], self.v[:, :k])


def top_singular_triplets(matrix: Tensor, k: int, *, groups: int = 1) -> SingularTriplets:
    """Return the min(k, m, n) leading singular triplets of a matrix (m, n).

    Large float32 matrices, with a shorter side of at least 512 and 20 k, take block Lanczos in place of the full SVD.
    Its triplets are checked: before u_k and v_k are rounded to float32, ||A v_k - sigma_k u_k|| and
    ||A^T u_k - sigma_k v_k|| are at most 1e-5 sigma_k, or 1e-6 sigma_1 where sigma_k is below the noise floor
    sigma_1 max(m, n) eps; above it, sigma_k is right to about 1e-7. That is nearer than a full SVD in float32 comes,
    which takes over wherever the check fails. Float64, and everything on devices without it, takes the full SVD. The
    result depends on the matrix alone, and the global random state is left as it is; the sign of a pair u_k, v_k is
    arbitrary.

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
    blocks_gmn = _blocks(matrix, groups)
    m = len(matrix)
    u_gmr, sigma_gr, vh_grn = _svd(blocks_gmn, k)
    r = sigma_gr.shape[1]
    sigma_k, order = sigma_gr.flatten().sort(descending=True, stable=True)
    sigma_k, order = sigma_k[:k], order[:k]
    group_k, rank_k = order // r, order % r
    u_gmk = blocks_gmn.new_zeros(groups, m // groups, len(order))
    u_gmk[group_k, :, torch.arange(len(order), device=order.device)] = u_gmr[group_k, :, rank_k]
    return SingularTriplets(u_gmk.reshape(m, -1), sigma_k, vh_grn[group_k, rank_k].T.contiguous())


def is_large(shape: tuple[int, int], k: int) -> bool:
    """Return whether the k leading triplets of a float32 matrix of this shape take block Lanczos."""
    return min(shape) >= max(LANCZOS_SIDE, SIDE_PER_TRIPLET * k)


def singular_values(matrix: Tensor, *, groups: int = 1) -> Tensor:
    """Return all singular values of a matrix (m, n), decreasing, without the vectors.

    Those of a float32 matrix are the roots of its Gram matrix's eigenvalues in float64: right to about 1e-7 above the
    noise floor sigma_1 max(m, n) eps, at a third to a half of a full SVD's time.

    Args:
        matrix: (m, n).
        groups: as in `top_singular_triplets`; the values of all blocks together.

    Raises:
        ValueError: if the matrix is not two-dimensional, or the groups do not divide its rows.
        MeasurementError: if an entry is not finite.
        torch.linalg.LinAlgError: if no solver converges.

    >>> singular_values(torch.diag(torch.tensor([1.0, 3.0, 2.0]))).tolist()
    [3.0, 2.0, 1.0]
    """
    blocks_gmn = _blocks(matrix, groups)
    if blocks_gmn.dtype is not torch.float32 or blocks_gmn.device.type == "mps":
        sigma_gr = torch.linalg.svdvals(blocks_gmn)
    else:
        tall = blocks_gmn if blocks_gmn.shape[1] >= blocks_gmn.shape[2] else blocks_gmn.mT
        tall = tall.double()
        sigma_gr = gram_eigenvalues(tall.mT @ tall).sqrt().to(blocks_gmn)
    values: Tensor = sigma_gr.flatten().sort(descending=True).values
    return values


def gram_eigenvalues(gram_gnn: Tensor) -> Tensor:
    """Return eigenvalues (g, n) of Gram matrices (g, n, n), decreasing; rounding leaves no negative ones.

    >>> gram_eigenvalues(torch.diag(torch.tensor([1.0, 4.0]))[None]).tolist()
    [[4.0, 1.0]]
    """
    values: Tensor = solve_symmetric(torch.linalg.eigvalsh, gram_gnn)
    return values.flip(-1).clamp(min=0)


def solve_symmetric(solver: Callable[[Tensor], Any], gram_gnn: Tensor) -> Any:
    """Return what `torch.linalg.eigvalsh` or `eigh` gives, from the CPU where the device has none or it fails."""
    try:
        return solver(gram_gnn.to(exact_device(gram_gnn.device)))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Eigenvalues that repeat can stop a GPU's solver.
        return solver(gram_gnn.cpu())


def _blocks(matrix: Tensor, groups: int) -> Tensor:
    """Return the groups' matrices (g, m / g, n), finite and of a type that has an SVD."""
    if matrix.ndim != 2 or groups < 1 or matrix.shape[0] % groups:
        raise ValueError(f"need a matrix (m, n) whose m rows {groups} groups divide, got shape {tuple(matrix.shape)}")
    matrix = matrix.detach()
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    # NaN passes through aminmax, which reads the matrix once and writes nothing.
    if matrix.numel() and not bool(torch.stack(torch.aminmax(matrix)).isfinite().all()):
        bad = int((~matrix.isfinite()).sum())
        raise MeasurementError(
            f"{bad} of {matrix.numel()} entries are NaN or infinite; a singular value needs finite ones"
        )
    m, n = matrix.shape
    return matrix.reshape(groups, m // groups, n)


def _svd(blocks: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, sigma, V^T of each block; of large ones the k leading triplets only."""
    if (
        not is_large((blocks.shape[1], blocks.shape[2]), k)
        or blocks.dtype is not torch.float32
        or blocks.device.type == "mps"
    ):
        return _full_svd(blocks)
    u, sigma, vh = zip(*(_leading(block, k) for block in blocks), strict=True)
    return torch.stack(u), torch.stack(sigma), torch.stack(vh)


def _leading(block: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    try:
        triplets = leading_triplets(block, k)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        triplets = None
    if triplets is None:
        u, sigma, vh = _full_svd(block)
        return u[:, :k], sigma[:k], vh[:k]
    u, sigma, v = triplets
    return u, sigma, v.T


def _full_svd(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        u, sigma, vh = torch.linalg.svd(blocks, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Divide and conquer can fail to converge where float64 on the CPU does not.
        u, sigma, vh = (t.to(blocks) for t in torch.linalg.svd(blocks.cpu().double(), full_matrices=False))
    return u, sigma, vh
