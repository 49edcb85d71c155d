"""The spectrum of one layer with every fit: the record a measurement is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_spectral._serialization import checked, number, numbers, plain
from lightning_spectral.numerics.bootstrap import Intervals, exponent_intervals
from lightning_spectral.numerics.power_law import (
    MIN_POINTS,
    PowerLawFit,
    RankModels,
    directions_holding,
    entropy_rank,
    fit_power_law,
    fit_rank_decay,
    fit_rank_models,
    noise_floor,
    participation_ratio,
    with_ordinate_errors,
    zeta_bound,
)
from lightning_spectral.records.alignment import KroneckerFactors, LayerAlignment
from lightning_spectral.records.curvature_fraction import CurvatureFraction
from lightning_spectral.records.weight_spectrum import WeightSpectrum

NOISE, EQUAL = "below the noise floor", "sigma equal to all others"
"""Why a point is left out of a fit."""


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The gradient spectrum of one layer and the curvature along it, with every fit.

    Attributes:
        name: qualified name of the parameter, with ``.q``, ``.k``, ``.v`` for a part of a fused projection.
        kind: conv, attention_qkv, attention_out, mlp_up, mlp_down, embedding, head or dense.
        shape: (m, n) of the matrix.
        groups: how many blocks of rows are matrices of their own (grouped convolution).
        sigma: (K,) leading singular values of the gradient, decreasing; loss per unit of weight.
        h: (K,) curvatures u_k v_k^T H u_k v_k^T; loss per squared unit of weight. Rayleigh quotients, not
            eigenvalues, of the Hessian block H. NaN where sigma is rounding noise or nothing could be measured.
        h_stderr: (K,) standard errors of h; zero where the method does not sample.
        method: what measured h.
        noise_floor: sigma_1 * max(m, n) * eps(dtype); a sigma_k at or below it is rounding noise.
        alpha: h ~ sigma^alpha over the k with h_k > 0; its standard error holds those of h.
        gamma: sigma_k ~ k^-gamma.
        s: the positive h, sorted, ~ rank^-s.
        transfer_error: abs(s - alpha * gamma) / abs(s).
        pr_curvature: participation ratio of the positive h.
        pr_gradient: participation ratio of sigma^2.
        entropy_rank_curvature, entropy_rank_gradient: exp(entropy) of the same.
        directions_95_curvature, directions_99_curvature, directions_95_gradient, directions_99_gradient: how many
            directions hold 95 % and 99 % of the positive h, or of sigma^2, within the window of K.
        zeta_bound: zeta(alpha gamma)^2 / zeta(2 alpha gamma), the bound on pr_curvature; infinite for alpha gamma <= 1.
        zeta_bound_window: the same with sums over the positive h measured, which a window of K directions obeys.
        n_usable: directions above the noise floor.
        n_negative: of them, those with h < 0.
        n_repeated: of them, those whose sigma equals a neighbour's to rounding: u_k, v_k, h_k are not unique.
        spectrum: (K',) leading singular values of the gradient, K' >= K of them; the first K are sigma.
        rank_models: power law, exponential and log-normal in rank of those of ``spectrum`` above the noise floor.
        alpha_quartiles: alpha within each quarter of the K directions, in the order of sigma.
        note: why something is NaN; empty where all is well.
        weights: the spectrum of the weight matrix, on request.
        intervals: bootstrap intervals of alpha, gamma and s, on request.
        fraction: how much of the trace of H the K directions hold, on request.
        alignment: Kronecker factors and the split of alpha; None where not asked for, or not to be had.
        alignment_note: why it was not to be had; empty where it was, or was not asked for.
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
    alpha_quartiles: tuple[PowerLawFit, ...]
    note: str = ""
    weights: WeightSpectrum | None = None
    intervals: Intervals | None = None
    fraction: CurvatureFraction | None = None
    alignment: LayerAlignment | None = None
    alignment_note: str = ""

    @property
    def alpha_gamma(self) -> float:
        """alpha * gamma, which the transfer relation says is s."""
        return self.alpha.exponent * self.gamma.exponent

    @classmethod
    def from_spectrum(
        cls,
        sigma: Tensor,
        h: Tensor,
        *,
        name: str,
        kind: str = "dense",
        shape: tuple[int, int],
        groups: int = 1,
        h_stderr: Tensor | None = None,
        method: str = "exact",
        eps: float = torch.finfo(torch.float32).eps,
        note: str = "",
        spectrum: Tensor | None = None,
        bootstrap: int | None = None,
        factors: KroneckerFactors | None = None,
        alignment_note: str = "",
        per_sample: float = 1.0,
    ) -> LayerSpectrum:
        """Fit everything there is to fit to singular values (K,) and curvatures (K,).

        Args:
            sigma: decreasing, not negative.
            h: in the order of sigma.
            name, kind, shape, groups, h_stderr, method, note, alignment_note: as in the attributes.
            eps: machine epsilon of the gradient, for the noise floor.
            spectrum: as in the attributes; None: sigma.
            bootstrap: draws for the intervals; None or 0: none are made.
            factors: Kronecker factors along the leading directions, for ``alignment``.
            per_sample: what h is multiplied by to be that of the mean of the samples' losses.
        """
        h_stderr = torch.zeros_like(h) if h_stderr is None else h_stderr
        spectrum = sigma if spectrum is None else spectrum
        sigma, h, h_stderr, spectrum = (t.detach().to("cpu", torch.float64) for t in (sigma, h, h_stderr, spectrum))
        if sigma.shape != h.shape or sigma.ndim != 1:
            raise ValueError(f"sigma and h must be (K,), got {tuple(sigma.shape)} and {tuple(h.shape)}")
        floor = noise_floor(sigma, shape, groups, eps)
        usable = sigma > floor
        noise = {NOISE: ~usable}
        positive = h[usable & (h > 0)]
        energy = sigma[usable].square()
        alpha = _alpha(sigma, h, h_stderr, floor)
        used = usable & (h > 0) & (EQUAL not in alpha.dropped)
        gamma = fit_rank_decay(sigma, exclude=noise)
        h = torch.where(usable, h, torch.full_like(h, float("nan")))
        s = fit_rank_decay(h, exclude=noise)
        product = alpha.exponent * gamma.exponent
        if not note and alpha.n_used < MIN_POINTS:
            note = (
                "all sigma are equal to rounding, so h has no slope against them"
                if EQUAL in alpha.dropped
                else (
                    f"{int(usable.sum())} directions above the noise floor, {len(positive)} of them with h > 0; "
                    f"a fit of alpha needs {MIN_POINTS}"
                )
            )
        return cls(
            name=name,
            kind=kind,
            shape=shape,
            groups=groups,
            sigma=sigma,
            h=h,
            h_stderr=h_stderr,
            method=method,
            noise_floor=floor,
            alpha=alpha,
            gamma=gamma,
            s=s,
            transfer_error=abs(s.exponent - product) / abs(s.exponent) if s.exponent else float("nan"),
            pr_curvature=participation_ratio(positive),
            pr_gradient=participation_ratio(energy),
            entropy_rank_curvature=entropy_rank(positive),
            entropy_rank_gradient=entropy_rank(energy),
            directions_95_curvature=directions_holding(positive, 0.95),
            directions_99_curvature=directions_holding(positive, 0.99),
            directions_95_gradient=directions_holding(energy, 0.95),
            directions_99_gradient=directions_holding(energy, 0.99),
            zeta_bound=zeta_bound(product),
            zeta_bound_window=zeta_bound(product, len(positive)),
            n_usable=int(usable.sum()),
            n_negative=int((h[usable] < 0).sum()),
            n_repeated=_repeated(sigma[usable], floor),
            spectrum=spectrum,
            rank_models=fit_rank_models(spectrum[spectrum > floor]),
            alpha_quartiles=tuple(
                _alpha(sigma[k], h[k], h_stderr[k], floor) for k in torch.arange(len(sigma)).tensor_split(4)
            ),
            note=note,
            intervals=exponent_intervals(sigma[usable], h[usable], used=used[usable], draws=bootstrap)
            if bootstrap
            else None,
            alignment=None
            if factors is None
            else LayerAlignment.from_factors(
                factors,
                sigma,
                h,
                used=used,
                h_stderr=h_stderr,
                per_sample=per_sample,
            ),
            alignment_note=alignment_note,
        )

    @property
    def parts(self) -> set[str]:
        """Which of `PARTS` were asked for."""
        found = {part for part in PARTS if getattr(self, part) is not None}
        return found | {"alignment"} if self.alignment_note else found

    def scalars(self) -> dict[str, float]:
        """The logged quantities of `LAYER_KEYS` by name; of those on request, the ones that were asked for."""
        return {key.name: float(key.value(self)) for key in LAYER_KEYS if key.given(self)}

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-able values: NaN as None, infinity as "inf"."""
        return plain(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerSpectrum:
        """The inverse of `to_dict`."""
        values = {f.name: data[f.name] for f in fields(cls)}
        read: dict[str, Any] = {name: values.pop(name) for name in ("name", "kind", "method", "note", "alignment_note")}
        read["shape"] = tuple(values.pop("shape"))
        for name in ("sigma", "h", "h_stderr", "spectrum"):
            read[name] = torch.tensor([number(x) for x in values.pop(name)], dtype=torch.float64)
        for name in ("alpha", "gamma", "s"):
            read[name] = PowerLawFit.from_dict(values.pop(name))
        read["alpha_quartiles"] = tuple(PowerLawFit.from_dict(fit) for fit in values.pop("alpha_quartiles"))
        read["rank_models"] = RankModels.from_dict(values.pop("rank_models"))
        for name, part in PARTS.items():
            of_part = values.pop(name)
            read[name] = None if of_part is None else part.from_dict(of_part)
        return checked(cls(**read, **numbers(values)))


PARTS: dict[str, Any] = {
    "weights": WeightSpectrum,
    "intervals": Intervals,
    "fraction": CurvatureFraction,
    "alignment": LayerAlignment,
}
"""What is measured on request: the attribute of a `LayerSpectrum` that is None where it was not asked for."""


@dataclass(frozen=True)
class LoggedKey:
    """A quantity logged per layer.

    Attributes:
        name, meaning: what it is.
        value: reads it from a spectrum, which must hold the part.
        median: whether its median over layers is logged.
        part: which of `PARTS` it belongs to; empty for what is always measured.
    """

    name: str
    meaning: str
    value: Callable[[Any], float]
    median: bool = False
    part: str = ""

    def given(self, layer: LayerSpectrum) -> bool:
        """Whether it was asked for, so that the layer holds it or says why not."""
        return not self.part or self.part in layer.parts


def _aligned(name: str, meaning: str, value: Callable[[LayerAlignment], float]) -> LoggedKey:
    """A quantity of a layer's alignment; NaN where it was asked for and not to be had."""

    def read(layer: LayerSpectrum) -> float:
        return float("nan") if layer.alignment is None else value(layer.alignment)

    return LoggedKey(name, meaning, read, median=True, part="alignment")


LAYER_KEYS: tuple[LoggedKey, ...] = (
    LoggedKey("alpha", "slope of log h on log sigma", lambda x: x.alpha.exponent, median=True),
    LoggedKey("alpha_stderr", "standard error of alpha", lambda x: x.alpha.stderr),
    LoggedKey("r2_alpha", "r2 of the fit of alpha", lambda x: x.alpha.r2, median=True),
    LoggedKey("gamma", "minus the slope of log sigma_k on log k", lambda x: x.gamma.exponent, median=True),
    LoggedKey("r2_gamma", "r2 of the fit of gamma", lambda x: x.gamma.r2),
    LoggedKey("s", "minus the slope of log sorted positive h on log rank", lambda x: x.s.exponent, median=True),
    LoggedKey("r2_s", "r2 of the fit of s", lambda x: x.s.r2),
    LoggedKey("transfer_error", "abs(s - alpha gamma) / abs(s)", lambda x: x.transfer_error, median=True),
    LoggedKey("pr_curvature", "participation ratio of positive h", lambda x: x.pr_curvature, median=True),
    LoggedKey("pr_gradient", "participation ratio of sigma^2", lambda x: x.pr_gradient, median=True),
    LoggedKey("zeta_bound", "zeta(alpha gamma)^2 / zeta(2 alpha gamma)", lambda x: x.zeta_bound, median=True),
    LoggedKey("zeta_bound_window", "zeta bound of the window", lambda x: x.zeta_bound_window, median=True),
    LoggedKey("negative_curvature", "directions with h < 0", lambda x: x.n_negative),
    LoggedKey("points", "points in the fit of alpha", lambda x: x.alpha.n_used),
    LoggedKey("rank_margin", "BIC of the runner-up minus the winner's", lambda x: x.rank_models.margin, median=True),
    LoggedKey("alpha_low", "lower end of alpha's interval", lambda x: x.intervals.alpha.low, part="intervals"),
    LoggedKey("alpha_high", "upper end of alpha's interval", lambda x: x.intervals.alpha.high, part="intervals"),
    LoggedKey("gamma_low", "lower end of gamma's interval", lambda x: x.intervals.gamma.low, part="intervals"),
    LoggedKey("gamma_high", "upper end of gamma's interval", lambda x: x.intervals.gamma.high, part="intervals"),
    LoggedKey("s_low", "lower end of s's interval", lambda x: x.intervals.s.low, part="intervals"),
    LoggedKey("s_high", "upper end of s's interval", lambda x: x.intervals.s.high, part="intervals"),
    LoggedKey("gamma_weight", "gamma of the weights", lambda x: x.weights.gamma.exponent, True, "weights"),
    LoggedKey("s_weight", "s of the weights", lambda x: x.weights.s.exponent, True, "weights"),
    LoggedKey("r2_s_weight", "r2 of the fit of s_weight", lambda x: x.weights.s.r2, part="weights"),
    LoggedKey("hessian_trace", "trace of the Hessian block", lambda x: x.fraction.trace, part="fraction"),
    LoggedKey(
        "hessian_trace_stderr", "standard error of the trace", lambda x: x.fraction.trace_stderr, part="fraction"
    ),
    LoggedKey("curvature_fraction", "sum of h over the trace", lambda x: x.fraction.value, True, "fraction"),
    LoggedKey("curvature_fraction_stderr", "standard error of it", lambda x: x.fraction.stderr, part="fraction"),
    LoggedKey("curvature_over_random", "mean h over tr H / (m n)", lambda x: x.fraction.over_random, True, "fraction"),
    _aligned("beta", "slope of log(Lambda_delta_k Lambda_A_k) on log sigma", lambda x: x.beta.exponent),
    _aligned("phi", "slope of log Phi_k on log sigma", lambda x: x.phi.exponent),
    _aligned("chi_slope", "slope of log chi_k on log sigma", lambda x: x.chi_slope.exponent),
    _aligned("chi", "median of chi_k = h_k / h_kron_k over k", lambda x: x.median_chi),
    _aligned(
        "concentration_ratio", "mean of products over product of means, median over k", lambda x: x.concentration_ratio
    ),
    _aligned("effective_rank_a", "exp(entropy) of C_A's eigenvalues", lambda x: x.effective_rank_a),
    _aligned("effective_rank_delta", "exp(entropy) of C_delta's eigenvalues", lambda x: x.effective_rank_delta),
)


def _alpha(sigma: Tensor, h: Tensor, h_stderr: Tensor, floor: float) -> PowerLawFit:
    """h ~ sigma^alpha over the points above the noise floor."""
    usable = sigma > floor
    # Where all sigma are equal to rounding, h against them has no slope.
    flat = int(usable.sum()) > 1 and float(sigma[usable].max() - sigma[usable].min()) <= floor
    fit = fit_power_law(sigma, h, exclude={NOISE: ~usable, EQUAL: usable & flat})
    return with_ordinate_errors(fit, sigma, h, h_stderr, used=usable & (h > 0))


def _repeated(sigma: Tensor, floor: float) -> int:
    equal = (sigma[:-1] - sigma[1:]) <= floor
    padding = torch.zeros(1, dtype=torch.bool)
    return int((torch.cat([equal, padding]) | torch.cat([padding, equal])).sum()) if len(sigma) > 1 else 0
