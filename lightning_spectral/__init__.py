"""Curvature exponents of a network's layers, measured while it trains.

Per layer: singular values sigma_k of the gradient, exact curvature h_k of the loss along them, and the exponents
alpha (h ~ sigma^alpha), gamma (sigma_k ~ k^-gamma) and s (sorted h ~ rank^-s). Source: arXiv 2606.02596.

While it trains, a network is measured by `SpectralProbe`, once by `measure_spectra`; both give a `SpectralReport` of a
`LayerSpectrum` per layer, whose attributes are the quantities with their formulas. `SpectralNewton` is the optimizer,
`SwapOptimizer` the callback that puts it in. Beside these names:

- `lightning_spectral.report`: tables and the HTML page; `lightning_spectral.report.figures`: figures for papers.
- `lightning_spectral.summary` and `lightning_spectral.analysis`: what a report says, in sentences and as records.
- `lightning_spectral.functional`: losses of `torch.nn.functional` by name, as the command `measure` takes them.
- `lightning_spectral.lightning_cli`: a LightningCLI that gives an optimizer the model's groups.
- `lightning_spectral.plan`: what a measurement would do and cost, without doing it.
- `lightning_spectral.options`: the options that the probe and `measure_spectra` share.

Formulas are written as the code has them: sigma_k is an index, a^b a power, and log the natural logarithm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_spectral._version import __version__ as __version__

_NAMES = {
    "callbacks.probe": ("SpectralProbe",),
    "callbacks.swap": ("SwapOptimizer",),
    "errors": ("MeasurementError", "ProcessError", "SecondDerivativeError", "SpectralWarning"),
    "measure": ("directional_curvature", "measure_spectra"),
    "metrics": ("CurvatureDecay", "CurvatureExponent", "ParticipationRatio", "RankDecay"),
    "numerics.power_law": ("PowerLawFit", "fit_power_law", "fit_rank_decay", "fit_rank_models"),
    "numerics.statistics": ("participation_ratio", "zeta_bound"),
    "numerics.svd": ("SingularTriplets", "top_singular_triplets"),
    "optim.spectral_newton": ("SpectralNewton",),
    "optim.transfer": ("spectral_transfer",),
    "records.alignment": ("LayerAlignment",),
    "records.layer_spectrum": ("LayerSpectrum",),
    "records.report": ("SpectralReport",),
}
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from lightning_spectral.callbacks.probe import SpectralProbe as SpectralProbe
    from lightning_spectral.callbacks.swap import SwapOptimizer as SwapOptimizer
    from lightning_spectral.errors import MeasurementError as MeasurementError
    from lightning_spectral.errors import ProcessError as ProcessError
    from lightning_spectral.errors import SecondDerivativeError as SecondDerivativeError
    from lightning_spectral.errors import SpectralWarning as SpectralWarning
    from lightning_spectral.measure import directional_curvature as directional_curvature
    from lightning_spectral.measure import measure_spectra as measure_spectra
    from lightning_spectral.metrics import CurvatureDecay as CurvatureDecay
    from lightning_spectral.metrics import CurvatureExponent as CurvatureExponent
    from lightning_spectral.metrics import ParticipationRatio as ParticipationRatio
    from lightning_spectral.metrics import RankDecay as RankDecay
    from lightning_spectral.numerics.power_law import PowerLawFit as PowerLawFit
    from lightning_spectral.numerics.power_law import fit_power_law as fit_power_law
    from lightning_spectral.numerics.power_law import fit_rank_decay as fit_rank_decay
    from lightning_spectral.numerics.power_law import fit_rank_models as fit_rank_models
    from lightning_spectral.numerics.statistics import participation_ratio as participation_ratio
    from lightning_spectral.numerics.statistics import zeta_bound as zeta_bound
    from lightning_spectral.numerics.svd import SingularTriplets as SingularTriplets
    from lightning_spectral.numerics.svd import top_singular_triplets as top_singular_triplets
    from lightning_spectral.optim.spectral_newton import SpectralNewton as SpectralNewton
    from lightning_spectral.optim.transfer import spectral_transfer as spectral_transfer
    from lightning_spectral.records.alignment import LayerAlignment as LayerAlignment
    from lightning_spectral.records.layer_spectrum import LayerSpectrum as LayerSpectrum
    from lightning_spectral.records.report import SpectralReport as SpectralReport


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*{*globals(), *_PUBLIC}]
