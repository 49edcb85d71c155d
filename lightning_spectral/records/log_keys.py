"""Every key that is logged: of a layer, of a report, of the probe and of the optimizer.

Trackers group keys by what stands before the last slash, so a layer or a kind comes last. No key is the beginning of
another's path, since MLflow's file store makes a folder of one and a file of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from lightning_spectral.numerics.power_law import RankModel

if TYPE_CHECKING:
    from lightning_spectral.records.layer_spectrum import LayerSpectrum

RANK_MODELS: tuple[RankModel, ...] = ("power_law", "exponential", "lognormal")


@dataclass(frozen=True)
class LoggedKey:
    """Quantity logged per layer.

    Attributes:
        name, meaning: of the quantity.
        path: of the attribute of a spectrum that it is.
        median: True where its median over layers is logged.
        part: optional part of a spectrum that it belongs to; empty for what is always measured.
        of_fit: True where it means little of a layer whose alpha is not to be trusted, so that its median is over fits
            to trust.
    """

    name: str
    meaning: str
    path: str = ""
    median: bool = False
    part: str = ""
    of_fit: bool = True

    def value(self, layer: LayerSpectrum) -> float:
        """Return it of a spectrum; NaN where its part is not there."""
        if self.part and getattr(layer, self.part) is None:
            return float("nan")
        return float(attrgetter(self.path)(layer))


_of_trusted = partial(LoggedKey, median=True)
_of_all = partial(LoggedKey, median=True, of_fit=False)
_aligned = partial(LoggedKey, median=True, part="alignment")

LAYER_KEYS: tuple[LoggedKey, ...] = (
    _of_trusted("alpha", "slope of log h on log sigma", "alpha.exponent"),
    LoggedKey("alpha_stderr", "standard error of alpha", "alpha.stderr"),
    _of_all("r2_alpha", "r2 of the fit of alpha", "alpha.r2"),
    LoggedKey("alpha_theil_sen", "median slope of log h on log sigma", "alpha_theil_sen"),
    LoggedKey("alpha_bias", "what sampling noise adds to alpha, estimated", "alpha_bias"),
    _of_all("signal", "share of the squared gradient that is no sampling noise", "gradient_noise.signal"),
    LoggedKey("signal_stderr", "standard error of signal", "gradient_noise.signal_stderr"),
    _of_all("noise_scale", "samples at which half of the squared gradient is noise", "gradient_noise.noise_scale"),
    LoggedKey("noise_scale_stderr", "standard error of noise_scale", "gradient_noise.noise_scale_stderr"),
    _of_all("sigma_max", "largest sigma", "sigma_max"),
    _of_all("h_max", "largest h", "h_max"),
    _of_trusted("gamma", "minus the slope of log sigma_k on log k", "gamma.exponent"),
    LoggedKey("r2_gamma", "r2 of the fit of gamma", "gamma.r2"),
    _of_trusted("s", "minus the slope of log sorted positive h on log rank", "s.exponent"),
    LoggedKey("r2_s", "r2 of the fit of s", "s.r2"),
    _of_trusted("transfer_error", "abs(s - alpha gamma) / abs(s)", "transfer_error"),
    _of_trusted("pr_curvature", "participation ratio of positive h", "pr_curvature"),
    _of_trusted("pr_gradient", "participation ratio of sigma^2", "pr_gradient"),
    _of_trusted("zeta_bound", "zeta(alpha gamma)^2 / zeta(2 alpha gamma)", "zeta_bound"),
    _of_trusted("zeta_bound_window", "zeta bound of the window", "zeta_bound_window"),
    LoggedKey("negative_curvature", "directions with h < 0", "n_negative"),
    LoggedKey("points", "points in the fit of alpha", "alpha.n_used"),
    _of_all("rank_margin", "BIC of the runner-up minus the winner's", "rank_models.margin"),
    LoggedKey("alpha_low", "lower end of alpha's interval", "intervals.alpha.low", part="intervals"),
    LoggedKey("alpha_high", "upper end of alpha's interval", "intervals.alpha.high", part="intervals"),
    LoggedKey("gamma_low", "lower end of gamma's interval", "intervals.gamma.low", part="intervals"),
    LoggedKey("gamma_high", "upper end of gamma's interval", "intervals.gamma.high", part="intervals"),
    LoggedKey("s_low", "lower end of s's interval", "intervals.s.low", part="intervals"),
    LoggedKey("s_high", "upper end of s's interval", "intervals.s.high", part="intervals"),
    _of_all("gamma_weight", "gamma of the weights", "weights.gamma.exponent", part="weights"),
    _of_all("s_weight", "s of the weights", "weights.s.exponent", part="weights"),
    LoggedKey("r2_s_weight", "r2 of the fit of s_weight", "weights.s.r2", part="weights"),
    LoggedKey("hessian_trace", "trace of the Hessian block", "fraction.trace", part="fraction"),
    LoggedKey("hessian_trace_stderr", "standard error of the trace", "fraction.trace_stderr", part="fraction"),
    _of_all("curvature_fraction", "sum of h over the trace", "fraction.value", part="fraction"),
    LoggedKey("curvature_fraction_stderr", "standard error of it", "fraction.stderr", part="fraction"),
    _of_all("curvature_over_random", "mean h over tr H / (m n)", "fraction.over_random", part="fraction"),
    _aligned("beta", "slope of log(Lambda_delta_k Lambda_A_k) on log sigma", "alignment.beta.exponent"),
    _aligned("phi", "slope of log Phi_k on log sigma", "alignment.phi.exponent"),
    _aligned("chi_slope", "slope of log chi_k on log sigma", "alignment.chi_slope.exponent"),
    _aligned("chi", "median of chi_k = h_k / h_kron_k over k", "alignment.median_chi"),
    _aligned(
        "concentration_ratio",
        "mean of products over product of means, median over k",
        "alignment.concentration_ratio",
        of_fit=False,
    ),
    _aligned("effective_rank_a", "exp(entropy) of C_A's eigenvalues", "alignment.effective_rank_a", of_fit=False),
    _aligned(
        "effective_rank_delta", "exp(entropy) of C_delta's eigenvalues", "alignment.effective_rank_delta", of_fit=False
    ),
)
"""Quantities of each layer, in the order in which they are logged."""

STEP_CURVATURE = LoggedKey(
    "step_curvature",
    "share of the curvature along the optimizer's step, Delta_l^T (H Delta)_l / Delta^T H Delta",
    part="step",
)
"""Quantity of each layer that is measured after the step, and so is of a `StepMeasurement` and of no spectrum."""

REPORT_KEYS: dict[str, str] = {
    "loss": "the loss the probe measured, on its own batch and mode",
    "layers_measured": "layers with an alpha",
    "layers_failed": "layers chosen but without an alpha; the report's notes say why",
    "layers_trusted": "layers with an alpha to trust",
    "gradient_samples": "samples that the gradient and the loss are of",
    "curvature_samples": "samples that the curvature is of",
    "negative_curvature_sum": "directions with h < 0, summed over layers",
    "zeta_unbounded": "layers whose zeta bound is infinite, alpha gamma <= 1",
    "check_error": "relative difference of one curvature to an exact product, with curvature ggn by auto",
    **{
        f"rank_model/{model}": "share of the layers whose gradient spectrum it fits best, by BIC"
        for model in RANK_MODELS
    },
}
"""Quantities of a report, logged beside the medians over its layers."""

PROBE_KEYS: dict[str, str] = {
    "probe_seconds": "wall time of the probe, but for that of the step's part",
    "probe_overhead": "share of wall time that all probes took so far",
    "failed_probes": "probes since the start that measured nothing",
}
"""Quantities that the callback adds to those of a report."""

STEP_KEYS: dict[str, str] = {
    "step/scale": "factor on the optimizer's step that would be best on this batch, -g.Delta / Delta^T H Delta",
    "step/predicted_change": "change of the loss by the quadratic model, g.Delta + Delta^T H Delta / 2",
    "step/actual_change": "loss of the same batch after the step, minus that before",
}
"""Quantities of a `StepMeasurement`, logged in a row of their own once the step is taken."""

ALPHA_KEY = "spectral_newton/alpha/<layer>"
"""Exponent that SpectralNewton steps with, given alpha="probe", for each layer."""


def layer_key(quantity: str, layer: str) -> str:
    """Return the key, without a prefix, of a layer's quantity.

    >>> layer_key("alpha", "net.0.weight")
    'alpha/net.0.weight'
    """
    return f"{quantity}/{layer}"


def median_key(quantity: str, kind: str = "", *, of_all: bool = False) -> str:
    """Return the key, without a prefix, of a median over the layers, or over those of a kind.

    >>> median_key("alpha"), median_key("alpha", "conv"), median_key("alpha", "conv", of_all=True)
    ('alpha_median', 'alpha/median_conv', 'alpha/median_all_conv')
    """
    median = "median_all" if of_all else "median"
    return f"{quantity}/{median}_{kind}" if kind else f"{quantity}_{median}"


def former_key(key: str) -> str | None:
    """Return the name that a key, without a prefix, had up to 0.1.0, which monitors may use until 0.2.0; None if none.

    >>> former_key("alpha/net.0.weight"), former_key("alpha/median_conv"), former_key("alpha_median")
    ('net.0.weight/alpha', 'kind/conv/alpha_median', None)
    """
    if key == "negative_curvature_sum":
        return "negative_curvature"
    quantity, _, owner = key.partition("/")
    if not owner or not any(quantity == layer_quantity.name for layer_quantity in (*LAYER_KEYS, STEP_CURVATURE)):
        return None
    for median in ("median_all", "median"):
        if owner.startswith(f"{median}_"):
            return f"kind/{owner.removeprefix(f'{median}_')}/{quantity}_{median}"
    return f"{owner}/{quantity}"
