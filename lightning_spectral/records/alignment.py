"""Split of alpha: curvature along gradient directions as a product of Kronecker factors and a remainder.

With a the input of a layer and delta the gradient of one sample's loss at the layer's output, C_A = E[a a^T] and
C_delta = E[delta delta^T]. E is the mean over all samples and, in convolutions and sequences, all positions of each:
every product of the weights with an a counts alike, also where delta is zero (padding, ignored targets). Then

    h_k = chi_k h_kron_k,  h_kron_k = (u_k^T C_delta u_k)(v_k^T C_A v_k) = Phi_k Lambda_delta_k Lambda_A_k,

and the slopes on log sigma add up, alpha = beta + phi + (slope of log chi), since least squares is linear in them.

Source: A. Calvo, Spectral Asymptotics of Neural Network Loss Landscapes, arXiv 2606.02596 (2026). There chi and delta
carry powers of the batch size; here delta is the gradient of one sample's loss, and chi does not depend on the batch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.numerics.power_law import PowerLawFit, fit_power_law, with_ordinate_errors
from lightning_spectral.numerics.statistics import median


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """Measured quantities of C_delta and C_A of one layer, in float64 on the CPU.

    Attributes:
        energy_delta: (K,) u_k^T C_delta u_k = E[(u_k^T delta)^2].
        energy_a: (K,) v_k^T C_A v_k = E[(v_k^T a)^2].
        joint: (K,) E[(u_k^T delta)^2 (v_k^T a)^2].
        lambda_delta: (K,) the k-th eigenvalue of C_delta. A grouped convolution has factors for each group: of the
            group of u_k, the eigenvalue of the rank that k has among the directions in it.
        lambda_a: (K,) the k-th eigenvalue of C_A.
        effective_rank_delta: exp(entropy) of all eigenvalues of C_delta; of groups, the mean. NaN where only the
            leading ones were computed.
        effective_rank_a: exp(entropy) of all eigenvalues of C_A.
        rows: number of vectors a and delta, samples times positions.
        note: quantities that were not computed, and why.
    """

    energy_delta: Tensor
    energy_a: Tensor
    joint: Tensor
    lambda_delta: Tensor
    lambda_a: Tensor
    effective_rank_delta: float
    effective_rank_a: float
    rows: int
    note: str = ""


@dataclass(frozen=True, eq=False)
class LayerAlignment:
    """Kronecker factors of one layer along its gradient directions, and the split of alpha that follows.

    Vectors are (K,), NaN where h_k was not measured.

    Attributes:
        lambda_delta, lambda_a: Lambda_delta_k and Lambda_A_k, the leading eigenvalues of C_delta and C_A.
        rho_delta: u_k^T C_delta u_k / Lambda_delta_k.
        rho_a: v_k^T C_A v_k / Lambda_A_k.
        phi_k: Phi_k = rho_delta_k rho_A_k.
        h_kron: (u_k^T C_delta u_k)(v_k^T C_A v_k), which is Phi_k Lambda_delta_k Lambda_A_k.
        chi: h_k / h_kron_k, with h of the mean of the samples' losses; of a loss that is a sum over samples, h_k is
            divided by their number. Over batches of unequal sizes such a loss weighs each batch by its size once more,
            and chi is that of the summed loss, which differs from the mean's. Where delta and a are independent and
            the Hessian is the Fisher matrix it is 1 for one position, and from P positions, of which h_k holds the sum
            and h_kron_k the mean, P to P^2.
        concentration: E[(u_k^T delta)^2 (v_k^T a)^2] / (E[(u_k^T delta)^2] E[(v_k^T a)^2]).
        beta: Lambda_delta_k Lambda_A_k ~ sigma_k^beta, over the points of the fit of alpha, as the other two.
        phi: Phi_k ~ sigma_k^phi.
        chi_slope: chi_k ~ sigma_k^chi_slope; its standard error holds those of h.
        effective_rank_delta, effective_rank_a: exp(entropy) of all eigenvalues of each factor; of a grouped
            convolution, the mean over groups. NaN where only the leading eigenvalues were computed.
        rows: number of samples times positions that E is the mean over.
        note: quantities that are NaN or a bound, and why; empty where all is well.
    """

    lambda_delta: Tensor
    lambda_a: Tensor
    rho_delta: Tensor
    rho_a: Tensor
    phi_k: Tensor
    h_kron: Tensor
    chi: Tensor
    concentration: Tensor
    beta: PowerLawFit
    phi: PowerLawFit
    chi_slope: PowerLawFit
    effective_rank_delta: float
    effective_rank_a: float
    rows: int
    note: str = ""

    @property
    def concentration_ratio(self) -> float:
        """Median of ``concentration`` over k."""
        return median(_finite(self.concentration))

    @property
    def median_chi(self) -> float:
        """Median of chi over k."""
        return median(_finite(self.chi))

    @classmethod
    def from_factors(
        cls,
        factors: KroneckerFactors,
        sigma: Tensor,
        h: Tensor,
        *,
        used: Tensor,
        h_stderr: Tensor | None = None,
        per_sample: float = 1.0,
    ) -> LayerAlignment:
        """Split alpha.

        Args:
            factors: Kronecker factors along the leading K' <= K directions.
            sigma: (K,) singular values of the gradient.
            h: (K,) curvatures along them.
            used: (K,) mask of the points that alpha was fitted to.
            h_stderr: (K,) standard errors of h; None: zeros.
            per_sample: factor that makes h that of the mean of the samples' losses.

        >>> one = torch.ones(4, dtype=torch.float64)
        >>> sigma = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
        >>> factors = KroneckerFactors(sigma, one, 2 * sigma, sigma, 2 * one, 4.0, 4.0, 64)
        >>> split = LayerAlignment.from_factors(factors, sigma, 3 * sigma**2, used=one > 0)
        >>> [round(fit.exponent, 6) + 0.0 for fit in (split.beta, split.phi, split.chi_slope)]
        [1.0, 0.0, 1.0]
        >>> split.concentration_ratio
        2.0
        """
        h_stderr = torch.zeros_like(h) if h_stderr is None else h_stderr
        parts = {
            name: _padded(getattr(factors, name), len(sigma))
            for name in ("energy_delta", "energy_a", "joint", "lambda_delta", "lambda_a")
        }
        rho_delta = parts["energy_delta"] / parts["lambda_delta"]
        rho_a = parts["energy_a"] / parts["lambda_a"]
        h_kron = parts["energy_delta"] * parts["energy_a"]
        chi, chi_stderr = per_sample * h / h_kron, per_sample * h_stderr / h_kron
        factors_of_h = parts["lambda_delta"] * parts["lambda_a"], rho_delta * rho_a, chi
        note = factors.note
        complete = all(bool(((y > 0) & y.isfinite())[used].all()) for y in factors_of_h)
        if not complete:
            zero = "a factor has no variance, to rounding, along a direction that alpha was fitted to: no slopes"
            note = "; ".join(filter(None, (note, zero)))
        # A sum of slopes is a slope where all are of the same points.
        unused = {"not in the fit of alpha": ~used} if complete else {"no variance in a factor": torch.ones_like(used)}
        beta, phi, chi_slope = (fit_power_law(sigma, y, exclude=unused) for y in factors_of_h)
        return cls(
            lambda_delta=parts["lambda_delta"],
            lambda_a=parts["lambda_a"],
            rho_delta=rho_delta,
            rho_a=rho_a,
            phi_k=factors_of_h[1],
            h_kron=h_kron,
            chi=chi,
            concentration=parts["joint"] / h_kron,
            beta=beta,
            phi=phi,
            chi_slope=with_ordinate_errors(chi_slope, sigma, chi, chi_stderr, used),
            effective_rank_delta=factors.effective_rank_delta,
            effective_rank_a=factors.effective_rank_a,
            rows=factors.rows,
            note=note,
        )


def _finite(values: Tensor) -> list[float]:
    return values[values.isfinite()].tolist()


def _padded(values: Tensor, n: int) -> Tensor:
    values = values.detach().to("cpu", torch.float64)
    return torch.cat([values, values.new_full((n - len(values),), float("nan"))])
