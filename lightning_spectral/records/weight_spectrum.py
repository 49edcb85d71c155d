"""Spectrum of a layer's weight matrix, to compare with those of its gradient and its curvature."""

from __future__ import annotations

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
