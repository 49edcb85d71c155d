"""Spectrum of one layer with every fit: the record a measurement is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_spectral._serialization import decode, to_jsonable
from lightning_spectral.numerics.bootstrap import Intervals
from lightning_spectral.numerics.gradient_noise import UNKNOWN_NOISE, GradientNoise
from lightning_spectral.numerics.power_law import PowerLawFit, RankModels, fit_power_law, with_ordinate_errors
from lightning_spectral.records.alignment import LayerAlignment
from lightning_spectral.records.fit_quality import FitQuality
from lightning_spectral.records.log_keys import LAYER_KEYS
from lightning_spectral.records.on_request import CurvatureFraction, WeightSpectrum

NOISE, EQUAL = "below the noise floor", "sigma equal to all others"
"""Reasons for leaving a point out of a fit."""


def fit_alpha(sigma: Tensor, h: Tensor, h_stderr: Tensor, floor: float) -> PowerLawFit:
    """Fit h ~ sigma^alpha over the points above the noise floor."""
    usable = sigma > floor
    # Where all sigma are equal to rounding, h against them has no slope.
    flat = int(usable.sum()) > 1 and float(sigma[usable].max() - sigma[usable].min()) <= floor
    fit = fit_power_law(sigma, h, exclude={NOISE: ~usable, EQUAL: usable & flat})
    return with_ordinate_errors(fit, sigma, h, h_stderr, used=usable & (h > 0))


@dataclass(frozen=True, eq=False)
class LayerMeasurement:
    """Singular values of one layer's gradient and the curvatures along them, in float64 on the CPU.

    Attributes:
        name, kind, shape, groups: as in `LayerSpectrum`.
        sigma: (K,) leading singular values of the gradient, decreasing and not negative.
        h: (K,) curvatures, in the order of sigma.
        noise_floor: largest singular value that is rounding noise.
        method: name of the method that measured h.
        h_stderr: (K,) standard errors of h; None: zeros.
        spectrum: (K',) singular values for the rank models, the first K of them sigma; None: sigma.
        gradient_noise: signal and sampling noise of the gradient.
        note: reason for a missing h; empty where there is none.
        alignment_note: reason for a missing alignment that was asked for.
    """

    name: str
    shape: tuple[int, int]
    sigma: Tensor
    h: Tensor
    noise_floor: float
    kind: str = "dense"
    groups: int = 1
    method: str = "exact"
    h_stderr: Tensor | None = None
    spectrum: Tensor | None = None
    gradient_noise: GradientNoise = UNKNOWN_NOISE
    note: str = ""
    alignment_note: str = ""

    def __post_init__(self) -> None:
        """Fill in the defaults and convert all tensors."""
        if self.sigma.shape != self.h.shape or self.sigma.ndim != 1:
            raise ValueError(f"sigma and h must be (K,), got {tuple(self.sigma.shape)} and {tuple(self.h.shape)}")
        if self.h_stderr is not None and self.h_stderr.shape != self.h.shape:
            raise ValueError(f"h_stderr must be (K,) as h, got {tuple(self.h_stderr.shape)}")
        tensors = {
            "sigma": self.sigma,
            "h": self.h,
            "h_stderr": torch.zeros_like(self.h) if self.h_stderr is None else self.h_stderr,
            "spectrum": self.sigma if self.spectrum is None else self.spectrum,
        }
        for name, tensor in tensors.items():
            object.__setattr__(self, name, tensor.detach().to("cpu", torch.float64))


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """Gradient spectrum of one layer and the curvature along it, with every fit.

    Attributes:
        name: qualified name of the parameter, with ``.q``, ``.k``, ``.v`` for a part of a fused projection.
        kind: conv, attention_qkv, attention_out, mlp_up, mlp_down, embedding, head or dense.
        shape: (m, n) of the matrix.
        groups: number of blocks of rows that are matrices of their own (grouped convolution).
        sigma: (K,) leading singular values of the gradient, decreasing; loss per unit of weight.
        h: (K,) curvatures u_k v_k^T H u_k v_k^T; loss per squared unit of weight. Rayleigh quotients, not
            eigenvalues, of the Hessian block H. NaN where sigma is rounding noise or nothing could be measured.
        h_stderr: (K,) standard errors of h; zero where the method does not sample.
        method: name of the method that measured h.
        noise_floor: sigma_1 * max(m, n) * eps(dtype); a sigma_k at or below it is rounding noise.
        alpha: h ~ sigma^alpha over the k with h_k > 0; its standard error holds those of h and ``alpha_bias``.
        alpha_theil_sen: median of the slopes of log h on log sigma between all pairs of the points of alpha.
        alpha_bias: estimate of what the gradient's sampling noise adds to alpha; NaN where that is not known.
        gamma: sigma_k ~ k^-gamma.
        s: the positive h, sorted, ~ rank^-s.
        transfer_error: abs(s - alpha * gamma) / abs(s).
        pr_curvature: participation ratio of the positive h.
        pr_gradient: participation ratio of sigma^2.
        entropy_rank_curvature, entropy_rank_gradient: exp(entropy) of the positive h, and of sigma^2.
        directions_95_curvature, directions_99_curvature, directions_95_gradient, directions_99_gradient: number of
            directions that hold 95 % and 99 % of the positive h, or of sigma^2, within the window of K.
        zeta_bound: zeta(alpha gamma)^2 / zeta(2 alpha gamma), the bound on pr_curvature; infinite for alpha gamma <= 1.
        zeta_bound_window: the bound with sums over the positive h measured, which a window of K directions obeys.
        n_usable: number of directions above the noise floor.
        n_negative: number of usable directions with h < 0.
        n_repeated: number of usable directions whose sigma equals a neighbour's to rounding: u_k, v_k, h_k are not
            unique.
        spectrum: (K',) leading singular values of the gradient, K' >= K of them; the first K are sigma.
        rank_models: power law, exponential and log-normal in rank of those of ``spectrum`` above the noise floor.
        note: reason for a NaN; empty where all is well.
        gradient_noise: share of the squared gradient that is no sampling noise, and the noise scale.
        weights: spectrum of the weight matrix, on request.
        intervals: bootstrap intervals of alpha, gamma and s, on request.
        fraction: share of the trace of H that the K directions hold, on request.
        alignment: Kronecker factors and the split of alpha, on request; None also where it could not be measured.
        alignment_note: reason for an alignment that could not be measured; else empty.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    groups: int
    sigma: Tensor
    h: Tensor
    h_stderr: Tensor
    method: str
    noise_floor: float
    alpha: PowerLawFit
    alpha_theil_sen: float
    alpha_bias: float
    gamma: PowerLawFit
    s: PowerLawFit
    transfer_error: float
    pr_curvature: float
    pr_gradient: float
    entropy_rank_curvature: float
    entropy_rank_gradient: float
    directions_95_curvature: int
    directions_99_curvature: int
    directions_95_gradient: int
    directions_99_gradient: int
    zeta_bound: float
    zeta_bound_window: float
    n_usable: int
    n_negative: int
    n_repeated: int
    spectrum: Tensor
    rank_models: RankModels
    gradient_noise: GradientNoise = UNKNOWN_NOISE
    note: str = ""
    weights: WeightSpectrum | None = None
    intervals: Intervals | None = None
    fraction: CurvatureFraction | None = None
    alignment: LayerAlignment | None = None
    alignment_note: str = ""

    @cached_property
    def alpha_quartiles(self) -> tuple[PowerLawFit, ...]:
        """Alpha within each quarter of the K directions, in the order of sigma."""
        quarters = torch.arange(len(self.h)).tensor_split(4)
        return tuple(fit_alpha(self.sigma[k], self.h[k], self.h_stderr[k], self.noise_floor) for k in quarters)

    @property
    def alpha_gamma(self) -> float:
        """alpha * gamma, which the transfer relation says is s."""
        return self.alpha.exponent * self.gamma.exponent

    @property
    def sigma_max(self) -> float:
        """Largest singular value of the gradient; NaN where there is none."""
        return float(self.sigma[0]) if len(self.sigma) else float("nan")

    @property
    def h_max(self) -> float:
        """Largest curvature measured; NaN where there is none."""
        measured = self.h[self.h.isfinite()]
        return float(measured.max()) if len(measured) else float("nan")

    @property
    def fit_quality(self) -> FitQuality:
        """What tells whether alpha is to be trusted."""
        fit = self.alpha
        return FitQuality(
            fit.exponent, fit.stderr, fit.r2, fit.n_used, self.alpha_theil_sen, self.gradient_noise.signal
        )

    @property
    def parts(self) -> set[str]:
        """Names of the `PARTS` that were asked for."""
        present = {part for part in PARTS if getattr(self, part) is not None}
        return present | {"alignment"} if self.alignment_note else present

    def scalars(self) -> dict[str, float]:
        """Return the logged quantities of `LAYER_KEYS` by name, without those of parts that were not asked for."""
        parts = {"", *self.parts}
        return {key.name: key.value(self) for key in LAYER_KEYS if key.part in parts}

    def __repr__(self) -> str:
        (m, n), fit, doubt = self.shape, self.alpha, self.fit_quality.doubt
        alpha = (
            f"alpha {fit.exponent:.2f} ± {fit.stderr:.2f}, r2 {fit.r2:.2f}, {fit.n_used} of {len(self.h)} directions"
        )
        trust = f", not to be trusted: {doubt}" if doubt else ""
        return f"LayerSpectrum({self.name}, {self.kind} {m}x{n}, {self.note or alpha + trust})"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values: NaN as None, infinity as "inf"."""
        return to_jsonable(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerSpectrum:
        """Invert `to_dict`.

        Raises:
            KeyError, ValueError: as of `_serialization.decode`, if the data is no layer's spectrum.
        """
        return decode(cls, data)


PARTS: dict[str, Any] = {
    "weights": WeightSpectrum,
    "intervals": Intervals,
    "fraction": CurvatureFraction,
    "alignment": LayerAlignment,
}
"""Optional parts of a `LayerSpectrum`: attributes that are None where they were not asked for."""
