"""Leading singular triplets of a large matrix by block Lanczos, verified, at a fraction of a full SVD's price.

Shapes: A (m, n) with m >= n, G = A^T A (n, n), b vectors per block, c columns of the basis so far. Vectors are rows,
since products of a row-major matrix with a few rows are up to four times faster than with a few columns.

The Ritz vectors of G in the Krylov space of b random vectors (Golub and Van Loan, Matrix Computations, 10.3.6) give
V; the SVD of A V gives U, sigma and the rotation of V, and a product with A^T the residual that decides. Products are
in float64: in float32, G loses every sigma below sqrt(eps) sigma_1, which a power law has among its first 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

EXTRA = 4
"""Vectors in a block beyond k. With b >= k a sigma that repeats cannot hide from the Krylov space."""
TOLERANCE = 1e-6
"""Largest residual over sigma at which the iteration ends; three times that where it runs in float32."""
SLACK = 10
"""Factor by which the residuals of the triplets returned may exceed `TOLERANCE`."""
FLAT = 0.25
"""Participation ratio of the eigenvalues of G over n, from which on the iteration is so long that G pays.

Then sigma_1 is close to the others, and G in float32 accurate enough: a CPU computes it in a third of the time.
"""
ROUNDING = 100
"""Multiple of eps and the norm of a product below which a vector is rounding noise."""
EPS = torch.finfo(torch.float32).eps
CACHED_ENTRIES = 2**18
"""Entries converted to float64 at a time: 2 MiB stay in a CPU's cache, and no copy of the matrix is held."""


def leading_triplets(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return U (m, k), sigma (k,), V (n, k) of a finite float32 matrix (m, n), or None where they fail the check.

    Found where ||A v_k - sigma_k u_k|| and ||A^T u_k - sigma_k v_k|| are at most 1e-5 sigma_k, and 1e-6 sigma_1 for
    those sigma_k below the noise floor sigma_1 max(m, n) eps. Deterministic: the random start comes from a generator
    of its own.
    """
    largest = max(abs(float(bound)) for bound in torch.aminmax(matrix))
    if largest == 0:
        return None
    # Squares of squares must neither overflow nor underflow; a power of 2 scales without rounding.
    scale = 1.0 if 1e-5 < largest < 1e5 else 2.0 ** min(126, max(-126, math.frexp(largest)[1]))
    tall = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    tall = tall if scale == 1.0 else tall / scale
    with torch.autocast(matrix.device.type, enabled=False):
        rows_v = _leading_right_vectors(tall, k)
        verified = None if rows_v is None else _verified(tall, rows_v)
    if verified is None:
        return None
    u, sigma, v = verified
    u, v = (v, u) if tall.shape != matrix.shape else (u, v)
    return u.to(matrix), (sigma * scale).to(matrix), v.to(matrix)


def _leading_right_vectors(matrix: Tensor, k: int) -> Tensor | None:
    """Return rows (k, n) close to the leading right singular vectors, None if they do not converge in time."""
    n, b = matrix.shape[1], k + EXTRA
    generator = torch.Generator().manual_seed(0)
    random_bn = _random(b, n, generator).to(matrix.device)
    image_bm = random_bn @ matrix.T
    start_bn = image_bm @ matrix
    # E ||A x||^2 = tr G and E ||G x||^2 = tr G^2 for standard normal x.
    trace, trace_square = image_bm.double().square().sum() / b, start_bn.double().square().sum() / b
    floor = _floor(matrix)
    if bool(trace**2 >= FLAT * n * trace_square):
        # Eigenvalues at the edge of a flat spectrum lie n^(-2/3) apart, which takes a number of steps as n^(1/3); the
        # factor is that of Gaussian matrices.
        first, last = int(2.25 * b * n ** (1 / 3)), 7 * n // 8
        if first > last:
            return None
        # Reduced float32 products (TF32) would not do, and accelerators may have them on.
        gram = _gram(matrix if matrix.is_cpu else matrix.double())
        return _block_lanczos(
            lambda block: block @ gram, start_bn.to(gram), k, floor, generator, first=first, last=last
        )
    return _block_lanczos(
        lambda block: _image(matrix, block), start_bn.double(), k, floor, generator, first=2 * b, last=5 * n // 8
    )


def _block_lanczos(
    product: Callable[[Tensor], Tensor],
    start_bn: Tensor,
    k: int,
    floor: float,
    generator: torch.Generator,
    *,
    first: int,
    last: int,
) -> Tensor | None:
    """Return the leading Ritz vectors (k, n) once their residuals are small; None if not within `last` columns.

    The basis is kept orthogonal in full; where the Krylov space is exhausted it grows by random vectors. The residuals
    are looked at from `first` columns on, and then when the rate of the last two looks lets them have arrived.
    """
    b, n = start_bn.shape
    basis_cn, small_cc = start_bn.new_empty(last, n), start_bn.new_zeros(last, last)
    block_bn = _orthonormal(start_bn)
    look, looked, excess = first, 0, math.inf
    for c in range(b, last + 1, b):
        basis_cn[c - b : c] = block_bn
        q_cn = basis_cn[:c]
        image_bn = product(block_bn)
        coefficients_bc = image_bn @ q_cn.T
        small_cc[c - b : c, :c] = coefficients_bc
        rest_nb, r_bb = torch.linalg.qr((image_bn - coefficients_bc @ q_cn).T)
        if c >= look:
            before, (excess, ritz_kn) = excess, _ritz(small_cc[:c, :c], q_cn, r_bb, k, floor)
            if excess <= 1:
                return ritz_kn
            rate = math.log(before / excess) / (c - looked) if before > excess and looked else 0.0
            look, looked = c + min(4 * b, max(b, int(math.log(excess) / rate))) if rate else c + 2 * b, c
        exhausted_b = r_bb.diagonal().abs() <= ROUNDING * torch.finfo(r_bb.dtype).eps * image_bn.norm()
        block_bn = rest_nb.T
        if bool(exhausted_b.any()):
            block_bn = torch.where(exhausted_b[:, None], _random(b, n, generator).to(block_bn), block_bn)
        block_bn = _orthonormal(block_bn - (block_bn @ q_cn.T) @ q_cn)
    return None


def _ritz(small_cc: Tensor, basis_cn: Tensor, r_bb: Tensor, k: int, floor: float) -> tuple[float, Tensor]:
    """Return the k leading Ritz vectors as rows, and by what factor their largest residual exceeds `TOLERANCE`."""
    ritz_c, y_cc = torch.linalg.eigh(small_cc)
    ritz_k, y_ck = ritz_c[-k:], y_cc[:, -k:]
    residual_k = (r_bb @ y_ck[-len(r_bb) :]).norm(dim=0)
    sigma_k = ritz_k.clamp(min=0).sqrt()
    # ||G v - sigma^2 v|| = sigma ||A^T u - sigma v||
    residual_k = residual_k / sigma_k.clamp(min=EPS * sigma_k[-1])
    excess = _excess(residual_k, sigma_k, floor) / max(1.0, 25 * torch.finfo(sigma_k.dtype).eps / TOLERANCE)
    return excess, y_ck.T @ basis_cn


def _excess(residual_k: Tensor, sigma_k: Tensor, floor: float) -> float:
    """Return the largest ratio of a residual to `TOLERANCE` times sigma, or to eps sigma_1 below the noise floor."""
    largest = sigma_k.max()
    allowed_k = torch.where(sigma_k > floor * largest, TOLERANCE * sigma_k, EPS * largest)
    return float((residual_k / allowed_k).max())


def _verified(matrix: Tensor, rows_v: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return U, sigma, V of the matrix within the span of the rows, None if they are no triplets of the matrix."""
    v_kn = _orthonormal(rows_v.double())
    image_km = torch.cat([v_kn @ rows.T for rows in _chunks(matrix)], dim=1)
    u_mk, sigma_k, w_kk = torch.linalg.svd(image_km.T, full_matrices=False)
    v_kn = w_kk @ v_kn
    back_kn = torch.zeros_like(v_kn)
    for rows, u in zip(_chunks(matrix), torch.split(u_mk, _height(matrix)), strict=True):
        back_kn += u.T @ rows
    residual_k = (back_kn - sigma_k[:, None] * v_kn).norm(dim=1)
    if not _excess(residual_k, sigma_k, _floor(matrix)) <= SLACK:  # NaN fails
        return None
    return u_mk, sigma_k, v_kn.T


def _floor(matrix: Tensor) -> float:
    return max(matrix.shape) * EPS


def _random(b: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(b, n, generator=generator, dtype=torch.float32)


def _orthonormal(rows: Tensor) -> Tensor:
    q_nb: Tensor = torch.linalg.qr(rows.T)[0]
    return q_nb.T


def _image(matrix: Tensor, block_bn: Tensor) -> Tensor:
    """Return (A^T A x) for each row x, in float64."""
    image_bn = torch.zeros_like(block_bn)
    for rows in _chunks(matrix):
        image_bn += (block_bn @ rows.T) @ rows
    return image_bn


def _gram(matrix: Tensor) -> Tensor:
    """Return A^T A, its upper triangle of blocks copied from the lower one."""
    n = matrix.shape[1]
    gram = matrix.new_empty(n, n)
    width = -(-n // 4)
    for i in range(0, n, width):
        gram[i:, i : i + width] = matrix[:, i:].T @ matrix[:, i : i + width]
        gram[i : i + width, i:] = gram[i:, i : i + width].T
    return gram


def _height(matrix: Tensor) -> int:
    return max(1, CACHED_ENTRIES // matrix.shape[1]) if matrix.is_cpu else matrix.shape[0]


def _chunks(matrix: Tensor) -> Iterator[Tensor]:
    """Yield the rows in float64, some at a time, all in one buffer: the next chunk overwrites the last."""
    height = _height(matrix)
    buffer = torch.empty(min(height, len(matrix)), matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in torch.split(matrix, height):
        yield buffer[: len(rows)].copy_(rows)
