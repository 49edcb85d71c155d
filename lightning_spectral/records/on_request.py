"""What a layer's spectrum holds on request: the fraction of its Hessian's trace, and the spectrum of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.power_law import PowerLawFit, fit_rank_decay, noise_floor
from lightning_spectral.numerics.svd import singular_values


@dataclass(frozen=True, eq=False)
class WeightSpectrum:
    """Singular values of a weight matrix W and their decay.

    Attributes:
        sigma: (K,) the leading singular values of W, decreasing.
        gamma: sigma_k ~ k^-gamma over the K leading ones: what gamma is to the gradient.
        s: sigma_k^2 ~ k^-s over all ranks: the eigenvalues of W W^T, as s is to those of curvature. In
            arXiv 2606.02596 it stands beside the curvature's s, and is smaller. That paper's figures (``s_weight`` of
            its data) come without a definition. For the nearly random matrices of its GPT they agree with
            squared singular values over all ranks to 10 %; those of the leading 20 would be eight times smaller.
        n_ranks: number of all singular values.
        note: reason for a NaN; empty where all is well.

    Values at or below sigma_1 max(m, n) eps, rounding noise, are in neither fit.
    """

    sigma: Tensor
    gamma: PowerLawFit
    s: PowerLawFit
    n_ranks: int
    note: str = ""

    @classmethod
    def of(
        cls, matrix: Tensor, *, top_k: int, groups: int = 1, eps: float = torch.finfo(torch.float32).eps
    ) -> WeightSpectrum:
        """Decompose a matrix (m, n). Its rows may fall into groups, each a matrix of its own, whose values are pooled.

        Args:
            matrix: (m, n); where it has no singular values (entries that are not finite, a solver that fails, no
                memory) the spectrum is empty, with a note.
            top_k: K.
            groups: as in `top_singular_triplets`.
            eps: machine epsilon of the weights.

        >>> spectrum = WeightSpectrum.of(torch.diag(torch.arange(1.0, 9.0) ** -1), top_k=4)
        >>> round(spectrum.gamma.exponent, 5), round(spectrum.s.exponent, 5), spectrum.n_ranks
        (1.0, 2.0, 8)
        """
        note, sigma = "", torch.zeros(0, dtype=torch.float64)
        try:
            sigma = singular_values(matrix, groups=groups).cpu().double()
        except (RuntimeError, MemoryError) as error:
            explained = isinstance(error, MeasurementError)
            note = str(error) if explained else f"no singular values ({type(error).__name__}: {error})"
        shape = (matrix.shape[0], matrix.shape[1])
        noise = sigma <= noise_floor(sigma, shape, groups, eps)
        return cls(
            sigma=sigma[:top_k].clone(),
            gamma=fit_rank_decay(sigma[:top_k], exclude={"below the noise floor": noise[:top_k]}),
            s=fit_rank_decay(sigma.square(), exclude={"below the noise floor": noise}),
            n_ranks=len(sigma),
            note=note,
        )


@dataclass(frozen=True)
class CurvatureFraction:
    """Curvature along gradient directions beside the trace of the layer's Hessian block H (m n, m n).

    The u_k v_k^T are orthonormal, so sum_k h_k is a part of tr H; where curvatures are negative as well it may exceed
    it. A random direction u v^T, u and v uniform on their unit spheres, has the mean curvature tr H / (m n).

    Attributes:
        trace: the mean of z^T H z over draws of random signs z; loss per squared unit of weight.
        trace_stderr: its standard error, from what the draws differ by.
        n_draws: number of draws.
        n_directions: number of h_k.
        value: sum_k h_k / tr H.
        stderr: its standard error, to first order, from those of the trace and of h.
        over_random: (mean_k h_k) / (tr H / (m n)), the mean curvature in units of a random direction's.
        note: reason for a NaN; empty where all is well.

    A trace within two standard errors of zero tells nothing but its size; more draws do.
    """

    trace: float
    trace_stderr: float
    n_draws: int
    n_directions: int
    value: float
    stderr: float
    over_random: float
    note: str = ""

    @classmethod
    def of(
        cls, draws: Tensor, h: Tensor, *, shape: tuple[int, int], h_stderr: Tensor | None = None, note: str = ""
    ) -> CurvatureFraction:
        """Estimate it from draws (N,) of z^T H z and curvatures h (K,); NaN curvatures are left out.

        >>> fraction = CurvatureFraction.of(torch.tensor([9.0, 11.0]), torch.tensor([4.0, 1.0]), shape=(4, 5))
        >>> fraction.trace, fraction.value, fraction.over_random
        (10.0, 0.5, 5.0)
        """
        draws, h = draws.double(), h.double()
        measured = ~h.isnan()
        n, k = len(draws), int(measured.sum())
        trace = float(draws.mean()) if n else math.nan
        error = float(draws.std()) / math.sqrt(n) if n > 1 else math.nan
        total = float(h[measured].sum()) if k else math.nan
        total_error = 0.0 if h_stderr is None else float(h_stderr.double()[measured].square().sum().sqrt())
        value = total / trace if trace else math.nan
        if trace == 0 and not note:
            note = "its Hessian block has no trace: the loss is linear in it"
        return cls(
            trace=trace,
            trace_stderr=error,
            n_draws=n,
            n_directions=k,
            value=value,
            stderr=math.hypot(total_error, value * error) / abs(trace) if trace else math.nan,
            over_random=value * shape[0] * shape[1] / k if k else math.nan,
            note=note,
        )

    @classmethod
    def missing(cls, note: str) -> CurvatureFraction:
        """Return NaNs for a layer that could not be measured, with the reason."""
        empty = torch.zeros(0)
        return cls.of(empty, empty, shape=(0, 0), note=note)
