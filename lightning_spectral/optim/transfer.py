"""T(sigma; alpha, d) = sigma / (sigma^alpha + d) applied to the singular values of matrices, without an SVD.

Shapes: x_brn is a batch of b matrices with r <= n, a_brr their Gram matrices, lambda = sigma_hat^2 their eigenvalues.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_spectral._validation import number
from lightning_spectral.numerics.matmul_precision import at_least, exact_device, exact_products
from lightning_spectral.numerics.svd import solve_symmetric
from lightning_spectral.optim.rational_fit import ShiftedInverses, fit_poles

Normalize = Literal["rms", "none"]

TOLERANCE = 1e-2
"""Of an update whose alpha is not 2."""

CHOLESKY_TOLERANCE = 1e-6
"""Of an update with alpha = 2, where one inverse is exact and rounding is all that is left."""

FIT_SHARE = 0.7
"""Of the tolerance, for the fit; rounding has the rest."""

ROUNDING_OF_LARGEST, ROUNDING_OF_SMALL = 3.5, 0.3
"""The two terms of `rounding_error` in units of eps: with these it lies above the rounding measured on 1321 matrices
of 16 to 768 rows, 14 spectra and alpha from 0.5 to 2 (closest at rank one, by 13 %)."""

PROBES = 4
"""Random vectors in the estimate of ||f'(A) X||_F / ||f(A) X||_F, a norm over n columns."""

SMALLEST_DAMPING = 1e-2
"""Of a batch whose matrices have a damping each."""

SMALLEST_ALPHA_OF_MANY = 0.5
"""Exponent from which on such a batch has a sum of inverses: below, its range would be lambda_1 / d^4 and more."""

STRIPS, SMALLEST_IN_STRIPS = 4, 128
"""Strips of rows that half a Gram matrix is computed in on a CPU, and rows from which on: 5/8 of the flops."""

COLUMNS_PER_ROW = 256
"""From which on rounding grows with the columns: an update of 8 x 16384 was off by twice the tolerance."""

PADDING = 8
"""Columns added to a Gram matrix of 128 k rows: its inverse shares few lines of the cache, at 2.5 times the time."""


def transfer(sigma: Tensor, *, alpha: float, damping: float) -> Tensor:
    """Return T(sigma; alpha, d) = sigma / (sigma^alpha + d) (arXiv 2606.02596, its Spectral Newton).

    >>> transfer(torch.tensor([0.0, 1.0, 3.0]), alpha=2.0, damping=1.0)
    tensor([0.0000, 0.5000, 0.3000])
    """
    return sigma / (sigma**alpha + damping)


@torch.no_grad()
def spectral_transfer(
    matrix: Tensor,
    *,
    alpha: float,
    damping: float,
    normalize: Normalize = "rms",
    exact: bool = False,
    tolerance: float | None = None,
) -> Tensor:
    """Return U diag(T(sigma_hat)) V^T of matrices U diag(sigma) V^T, with T(s) = s / (s^alpha + d).

    sigma_hat = sigma sqrt(r) / ||X||_F, r = min(m, n): singular values in units of their root mean square, so that d
    means the same whatever the gradient's scale. On the Gram matrix A of sigma_hat, with eigenvalues sigma_hat^2:

    - alpha = 0: X_hat / (1 + d).
    - alpha = 2: (A + d I)^-1 X_hat, one Cholesky factorisation.
    - 0 < alpha < 2: c_0 X_hat + sum_j c_j (A + p_j I)^-1 X_hat, with 2 to 8 cached terms (`fit_poles`).
    - alpha > 2, ``exact``, or where these do not reach the tolerance: eigenvalues of A, in float64.

    A matrix whose update would lose more than the tolerance to float32 (large lambda_1 / d) is done in float64. That
    needs one look at the result, which waits for the device. Limits of `exact`: singular values below 1e-8 sigma_1.
    No gradient flows through it.

    Args:
        matrix: (..., m, n), real; half precision is computed in float32.
        alpha: exponent, at least 0. 1 with d -> 0 gives U V^T, 0 the scaled gradient.
        damping: d > 0, in units of sigma_hat^alpha.
        normalize: "rms" as above, or "none" for sigma_hat = sigma, always by eigenvalues.
        exact: take the eigenvalues in any case.
        tolerance: of the relative error in the Frobenius norm. Default: 1e-6 for alpha = 2, else 1e-2; results in
            half precision carry the rounding of their type on top.

    Returns:
        A tensor of the matrix's shape and type. Zero where the matrix is zero.

    Raises:
        ValueError: if the tensor is no real matrix, has entries that are not finite, or an option is out of range.

    Source: arXiv 2606.02596, which leaves the normaliser open; root mean square is this library's choice.

    >>> spectral_transfer(torch.diag(torch.tensor([4.0, 4.0])), alpha=2.0, damping=1.0)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    check_transfer(alpha, damping)
    if normalize not in ("rms", "none"):
        raise ValueError(f"normalize must be 'rms' or 'none', got {normalize!r}")
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise ValueError(f"need real matrices (..., m, n), got {matrix.dtype} of shape {tuple(matrix.shape)}")
    if bad := int((~matrix.isfinite()).sum()):
        raise ValueError(f"{bad} of {matrix.numel()} entries are NaN or infinite; a singular value needs finite ones")
    if matrix.numel() == 0:
        return matrix.clone()
    tolerance = (CHOLESKY_TOLERANCE if alpha == 2 else TOLERANCE) if tolerance is None else tolerance
    check_tolerance(tolerance)
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if tall else matrix
    x_brn = wide.reshape(-1, *wide.shape[-2:])
    x_brn = x_brn.to(exact_device(x_brn.device), at_least(x_brn.dtype, torch.float32))
    with exact_products(x_brn.device.type):
        if exact or normalize == "none":
            u_brn = transfer_by_eigenvalues(x_brn, alpha=alpha, damping=damping, normalize=normalize)
        else:
            u_brn = transfer_batch(x_brn, alpha=alpha, damping=damping, tolerance=tolerance)
    u = u_brn.reshape(wide.shape).to(matrix)
    return u.mT if tall else u


def check_transfer(alpha: float, damping: float) -> None:
    """Raise ValueError for an exponent or a damping out of range."""
    number("alpha", alpha, lambda x: 0 <= x < math.inf, "be a finite number of at least 0")
    remedy = "; alpha=1 with 1e-6 is U V^T"
    number("damping", damping, lambda x: 0 < x < math.inf, "be a finite number above 0", remedy=remedy)


def check_tolerance(tolerance: float) -> None:
    """Raise ValueError for a tolerance that no path can keep or that is none."""
    number("tolerance", tolerance, lambda x: 1e-7 <= x <= 0.1, "lie in [1e-7, 0.1]")


def transfer_batch(x_brn: Tensor, *, alpha: float, damping: float | Tensor, tolerance: float) -> Tensor:
    """Return `spectral_transfer` of a batch of finite matrices (b, r, n) with r <= n, in float32 or float64.

    To be called in `exact_products`: with TF32 or bfloat16 in A, lambda_1 / 1000 would be taken for damping. A damping
    of each matrix, (b,) from `SMALLEST_DAMPING` to 1, is not read from its device.
    """
    x_brn = scaled_by_power_of_two(x_brn)
    r, dtype = x_brn.shape[1], x_brn.dtype
    if alpha == 0:
        inverse_b = _inverse_rms(torch.linalg.vector_norm(x_brn, dim=(1, 2)).square(), r)
        return x_brn * (inverse_b / (1 + damping))[:, None, None]
    poles = _poles(float(alpha), damping, 2.0 ** max(4, (r - 1).bit_length()), FIT_SHARE * tolerance)
    if poles is None:
        return transfer_by_eigenvalues(x_brn, alpha=alpha, damping=damping)
    budget = rounding_budget(poles, tolerance) / max(1.0, x_brn.shape[2] / r / COLUMNS_PER_ROW)
    # A flat spectrum has the smallest ||A||_F, sqrt(r): where not even that will do, float32 need not be tried.
    if rounding_error(dtype, poles.at_zero / poles(math.sqrt(r)), 0.0) > budget:
        x_brn = x_brn.double()
    # No eigenvalue exceeds the trace, so that most batches of one inverse need no look at theirs.
    largest = r * (SMALLEST_DAMPING ** (-2 / alpha) if isinstance(damping, Tensor) else 1.0)
    budget = budget if _may_round_off(x_brn.dtype, poles, largest, budget) else math.inf
    u_brn, failed_b = _sum_of_inverses(x_brn, poles, budget, *_scales(alpha, damping))
    if bool(failed_b.any()):
        d_b = damping[failed_b] if isinstance(damping, Tensor) else damping
        u_brn[failed_b] = _in_float64(x_brn[failed_b], poles, alpha, d_b).to(u_brn)
    return u_brn.to(dtype)


def _poles(alpha: float, damping: float | Tensor, largest: float, tolerance: float) -> ShiftedInverses | None:
    """Return the inverses for a damping, those of d = 1 for a tensor (see `_scales`); None if they do not pay."""
    if isinstance(damping, Tensor):
        damping, largest = 1.0, largest * SMALLEST_DAMPING ** (-2 / max(alpha, SMALLEST_ALPHA_OF_MANY))
        alpha = alpha if alpha >= SMALLEST_ALPHA_OF_MANY else math.inf
    return fit_poles(alpha, float(damping), largest, tolerance) if alpha <= 2 else None


def _scales(alpha: float, damping: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Return (stretch, height): f is height times the sum of inverses at stretch times lambda.

    1 / (x^(alpha/2) + d) = 1 / d / ((x d^(-2/alpha))^(alpha/2) + 1), so that one sum serves many dampings.
    """
    return (damping ** (-2 / alpha), 1 / damping) if isinstance(damping, Tensor) else (1.0, 1.0)


def _in_float64(x_brn: Tensor, poles: ShiftedInverses, alpha: float, damping: float | Tensor) -> Tensor:
    x_brn = x_brn.double()
    u_brn, failed_b = _sum_of_inverses(x_brn, poles, math.inf, *_scales(alpha, damping))
    return transfer_by_eigenvalues(x_brn, alpha=alpha, damping=damping) if bool(failed_b.any()) else u_brn


def rounding_error(dtype: torch.dtype, spill: Any, shift: Any) -> Any:
    """Return an upper estimate of the update's relative rounding error, eps (2.5 spill + 0.3 shift).

    spill = f(0) sqrt(r) / ||U||_F: what the large directions leave in the small ones; f(0) / f(lambda_1) at rank one.
    shift = lambda_1 ||f'(A) X||_F / ||f(A) X||_F: how far the small ones move when A does, by eps lambda_1.
    """
    return torch.finfo(dtype).eps * (ROUNDING_OF_LARGEST * spill + ROUNDING_OF_SMALL * shift)


def rounding_budget(poles: ShiftedInverses, tolerance: float) -> float:
    """Return what the fit leaves of the tolerance; the errors are independent, the fit's sqrt(1.25) `error` at most."""
    return math.sqrt(max(0.0, tolerance**2 - 1.25 * poles.error**2))


def scaled_by_power_of_two(x_brn: Tensor) -> Tensor:
    """Scale each matrix to a largest entry of about 1, without rounding: squares of 1e25 overflow."""
    # Two reductions, since neither the maximum norm nor a norm in float64 is vectorised on the CPU.
    tiny = torch.finfo(x_brn.dtype).tiny  # of which, and of 0.5 / tiny, the power of two is still normal
    largest_b = torch.maximum(x_brn.amax((1, 2)), -x_brn.amin((1, 2))).clamp_(tiny, 0.5 / tiny)
    return x_brn * (torch.frexp(largest_b).mantissa / largest_b)[:, None, None]


def _inverse_rms(trace_b: Tensor, r: int) -> Tensor:
    """Return 1 / (root mean square singular value), 0 for a matrix of zeros. trace_b = ||X||_F^2."""
    return torch.where(trace_b > 0, math.sqrt(r) * trace_b.rsqrt(), 0.0)


def _gram(x_brn: Tensor, *, to_invert: bool) -> Tensor:
    """Return X X^T; of large ones on a CPU the upper half, and `PADDING` columns of zeros if an inverse needs them."""
    b, r, _ = x_brn.shape
    if r < SMALLEST_IN_STRIPS or x_brn.device.type != "cpu":
        return x_brn @ x_brn.mT
    p = r + PADDING if to_invert and r % SMALLEST_IN_STRIPS == 0 else r
    a_bpp = x_brn.new_empty(b, p, p)
    if p > r:
        a_bpp[:, :, r:] = 0
    for i in range(STRIPS):
        first, end = r * i // STRIPS, r * (i + 1) // STRIPS
        torch.bmm(x_brn[:, first:end], x_brn[:, first:].mT, out=a_bpp[:, first:end, first:r])
    return a_bpp


def _norm(a_bpp: Tensor) -> Tensor:
    """Return ||A||_F from the upper half: above lambda_1, and tight where it matters, near rank one."""
    diagonal_b = torch.linalg.vector_norm(a_bpp.diagonal(dim1=1, dim2=2), dim=1)
    return torch.hypot(diagonal_b, math.sqrt(2) * torch.linalg.matrix_norm(a_bpp.triu(1)))


def _sum_of_inverses(
    x_brn: Tensor, poles: ShiftedInverses, budget: float, stretch: float | Tensor = 1.0, height: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the update and a mask of the batch that failed: no factorisation, or rounding over the budget."""
    r, n = x_brn.shape[1:]
    # One inverse of a nearly square matrix: two triangular systems take 0.7 to 0.9 of the time.
    one_inverse = len(poles.shifts) == 1 and poles.constant == 0
    by_solves = one_inverse and x_brn.device.type == "cpu" and r > SMALLEST_IN_STRIPS and n < 1.25 * r
    a_bpp = _gram(x_brn, to_invert=not by_solves)
    diagonal_bp = a_bpp.diagonal(dim1=1, dim2=2)
    inverse_b = _inverse_rms(diagonal_bp.sum(1, dtype=torch.float64), r).to(a_bpp.dtype)
    a_bpp.mul_((inverse_b.square() * stretch)[:, None, None])
    largest_b = _norm(a_bpp) if budget < math.inf else inverse_b
    watched = budget < math.inf and _may_round_off(x_brn.dtype, poles, largest_b, budget)
    estimate = _RoundingEstimate(x_brn @ _signs(n, x_brn.dtype, x_brn.device)) if watched else None
    unshifted_bp = diagonal_bp.clone()
    failed_b, s_brr = torch.zeros_like(inverse_b, dtype=torch.bool), None
    for weight, shift in zip(poles.weights, poles.shifts, strict=True):
        torch.add(unshifted_bp, shift, out=diagonal_bp)
        factor_bpp, info_b = torch.linalg.cholesky_ex(a_bpp.mT)  # the half that it reads
        failed_b |= info_b > 0
        # cholesky_inverse raises on a zero there, whatever the rest of the batch.
        factor_bpp.diagonal(dim1=1, dim2=2).masked_fill_(failed_b[:, None], 1.0)
        if by_solves and not watched:
            u_bnr = torch.linalg.solve_triangular(factor_bpp.mT, x_brn.mT, upper=True, left=False)
            torch.linalg.solve_triangular(factor_bpp, u_bnr, upper=False, left=False, out=u_bnr)
            return u_bnr.mT.mul_((inverse_b * height)[:, None, None]), failed_b
        inverse_brr = torch.cholesky_inverse(factor_bpp)[:, :r, :r]
        if estimate is not None:
            estimate.add(weight, inverse_brr)
        s_brr = inverse_brr.mul_(weight) if s_brr is None else s_brr.add_(inverse_brr, alpha=weight)
    assert s_brr is not None
    if poles.constant:
        s_brr.diagonal(dim1=1, dim2=2).add_(poles.constant)
    if estimate is not None:
        failed_b |= ~(estimate.of(s_brr, largest_b, inverse_b, poles) <= budget)
    return torch.bmm(s_brr.mul_((inverse_b * height)[:, None, None]), x_brn), failed_b


def _may_round_off(dtype: torch.dtype, poles: ShiftedInverses, largest: Any, budget: float) -> bool:
    """Return whether `rounding_error` may exceed a budget with eigenvalues up to this: of several inverses, always."""
    if len(poles.shifts) > 1:
        return True
    exceeds = rounding_error(dtype, poles.at_zero / poles(largest), largest / poles.shifts[0]) > budget
    return bool(exceeds.any() if isinstance(exceeds, Tensor) else exceeds)


class _RoundingEstimate:
    """The terms of `rounding_error` on random vectors z of signs, for which ||f(A) X||_F^2 = E ||f(A) X z||^2.

    f'(A) X z = -sum_j c_j (A + p_j I)^-2 X z.
    """

    def __init__(self, x_z_brp: Tensor) -> None:
        self.x_z_brp = x_z_brp
        self.slope_brp = torch.zeros_like(x_z_brp)

    def add(self, weight: float, inverse_brr: Tensor) -> None:
        self.slope_brp.add_(inverse_brr @ (inverse_brr @ self.x_z_brp), alpha=weight)

    def of(self, f_brr: Tensor, largest_b: Tensor, inverse_b: Tensor, poles: ShiftedInverses) -> Tensor:
        """Return the error of each matrix; 0 for one of zeros."""
        value_b = torch.linalg.vector_norm(f_brr @ self.x_z_brp, dim=(1, 2))
        slope_b = torch.linalg.vector_norm(self.slope_brp, dim=(1, 2))
        spill_b = poles.at_zero * math.sqrt(f_brr.shape[1] * PROBES) / (value_b * inverse_b)
        error_b: Tensor = rounding_error(f_brr.dtype, spill_b, largest_b * slope_b / value_b)
        return torch.where(value_b > 0, error_b, 0.0)


@functools.lru_cache(maxsize=64)
def _signs(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random signs (n, PROBES), the same in every call."""
    generator = torch.Generator().manual_seed(0)  # its own, so that no draw of the user's training changes
    signs = torch.randint(0, 2, (n, PROBES), generator=generator, device="cpu")
    return (2 * signs - 1).to(device, dtype)


def transfer_by_eigenvalues(
    x_brn: Tensor, *, alpha: float, damping: float | Tensor, normalize: Normalize = "rms"
) -> Tensor:
    """Return the reference Q f(lambda) Q^T X_hat with the eigenvalues of the Gram matrix, in float64."""
    x64_brn = x_brn.double()
    if normalize == "rms":
        x64_brn = scaled_by_power_of_two(x64_brn)
        x64_brn = x64_brn * _inverse_rms(x64_brn.square().sum((1, 2)), x_brn.shape[1])[:, None, None]
    lambda_br, q_brr = (x.to(x64_brn) for x in solve_symmetric(torch.linalg.eigh, x64_brn @ x64_brn.mT))
    f_br = 1 / (lambda_br.clamp_min(0) ** (alpha / 2) + (damping[:, None] if isinstance(damping, Tensor) else damping))
    return torch.bmm((q_brr * f_br[:, None, :]) @ q_brr.mT, x64_brn).to(x_brn.dtype)
