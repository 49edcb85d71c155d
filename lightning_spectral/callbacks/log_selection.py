"""`LogSelection`: the scalars that a probe logs, of which layers; `charts`: the keys with a chart of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from lightning_spectral.layers.names import check_matches, check_selection, layer_names, select
from lightning_spectral.numerics.statistics import evenly
from lightning_spectral.options import OPTION_OF_PART
from lightning_spectral.records.log_keys import LAYER_KEYS, REPORT_KEYS, STEP_CURVATURE
from lightning_spectral.records.report import SpectralReport

LOGGED_LAYERS = 24
"""Number of layers that `log_layers="auto"` logs one by one."""

CURVES = ("alpha", "gamma", "s", "transfer_error", "pr_curvature", "zeta_bound")
"""Quantities whose medians are the first to get charts, over all layers and for each kind of layer."""

BY_KIND = (*CURVES, "signal", "noise_scale")
"""Quantities whose medians are logged for each kind of layer, too."""

PER_LAYER = ("alpha", "r2_alpha", "sigma_max", "h_max")
"""Quantities that `log_quantities="auto"` logs per layer: the exponent, whether to trust it, and its scales."""

HEALTH = ("layers_trusted", "signal_median", "layers_failed", "negative_curvature_sum", "probe_overhead")
"""Keys that tell whether to trust the others."""

SUMMARIZED = (
    *(f"{name}_median" for name in (*CURVES, "signal", "noise_scale")),
    *("layers_trusted", "layers_failed", "negative_curvature_sum", "step/scale"),
)
"""Keys whose minimum and maximum over a run tell something beside the last value."""

STEP_SCALE = "step/scale"
"""Key that tells whether the optimizer's steps are too long."""

_PART_OF = {key.name: key.part for key in (*LAYER_KEYS, STEP_CURVATURE)}


class LogSelection:
    """Choose the scalars of a report that are logged.

    Args:
        parts: parts of a `LayerSpectrum` that are measured on request, and "step" where steps may be.
    """

    def __init__(
        self,
        log_layers: str | Sequence[str],
        log_quantities: str | Sequence[str],
        parts: Iterable[str],
        warn: Callable[[str], None],
    ) -> None:
        check_selection("log_layers", log_layers, only_patterns=True)
        self.log_layers = log_layers
        self.parts = {"", *parts}
        self.quantities = self._quantities(log_quantities)
        self._all = log_quantities == "all"
        self.warn = warn

    def _quantities(self, selection: str | Sequence[str]) -> frozenset[str]:
        available = [name for name, part in _PART_OF.items() if part in self.parts]
        if selection == "all":
            return frozenset(available)
        if selection == "auto":
            return frozenset(name for name in available if name in PER_LAYER or _PART_OF[name])
        names = [selection] if isinstance(selection, str) else list(selection)
        if unknown := [name for name in names if name not in _PART_OF]:
            raise ValueError(
                f"log_quantities must be 'auto', 'all' or names of quantities, got {unknown[0]!r}; "
                f"there are {', '.join(_PART_OF)}"
            )
        if missing := [name for name in names if name not in available]:
            part = _PART_OF[missing[0]]
            raise ValueError(
                f"log_quantities: {missing[0]!r} is measured on request, and was not asked for with the option "
                f"{OPTION_OF_PART.get(part, part)}"
            )
        return frozenset(names)

    def layers(self, names: Sequence[str]) -> list[str]:
        """Return the layers that are logged one by one."""
        if self.log_layers == "all" or (self.log_layers == "auto" and len(names) <= LOGGED_LAYERS):
            return list(names)
        if self.log_layers == "none":
            return []
        if self.log_layers == "auto":
            self.warn(f"logging {LOGGED_LAYERS} of {len(names)} layers one by one; log_layers chooses which")
            return [names[i] for i in evenly(len(names), LOGGED_LAYERS)]
        return list(select({name: name for name in names}, self.log_layers, layer_names))

    def step_layers(self, names: Sequence[str]) -> list[str]:
        """Return the layers whose share of the curvature along the optimizer's step is logged."""
        return self.layers(names) if STEP_CURVATURE.name in self.quantities else []

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if patterns of layers to log match none of these."""
        if names and self.log_layers not in ("none", []) and not self.layers(names):
            check_matches("log_layers", self.log_layers, {name: name for name in names}, layer_names)

    def scalars(self, report: SpectralReport | None) -> dict[str, float]:
        """Return key without prefix -> value, in the order of the table of keys; all NaN for a probe that failed.

        Infinity becomes NaN: no chart shows it, and some trackers store it as the largest number there is.
        """
        if report is None:
            keys = [f"{key.name}_median" for key in LAYER_KEYS if key.median and key.part in self.parts]
            return dict.fromkeys((*keys, *REPORT_KEYS), float("nan"))
        layers = self.layers(list(report.layers))
        return {
            key: value if math.isfinite(value) else float("nan")
            for key, value in report.scalars(layers).items()
            if self._logs(key, layers)
        }

    def _logs(self, key: str, layers: Sequence[str]) -> bool:
        quantity, _, owner = key.partition("/")
        if quantity not in _PART_OF:
            return self._all or not quantity.endswith("_all")
        if owner in layers:
            return quantity in self.quantities
        return (quantity in BY_KIND or bool(_PART_OF[quantity])) and (self._all or not owner.startswith("median_all_"))


def charts(keys: Iterable[str], n: int | None) -> list[str]:
    """Return the keys, without a prefix, that get one of n charts; the most telling first, layers evenly over depth.

    The order: medians of `CURVES` over all layers, those of each kind, the step's scale, `HEALTH`, medians of what is
    measured on request, alpha of the layers, other counts and medians, everything else.

    >>> keys = ["loss", "alpha_median", "alpha/median_conv", "layers_failed", *(f"alpha/{i}" for i in range(9))]
    >>> charts(keys, 6)
    ['alpha_median', 'alpha/median_conv', 'layers_failed', 'alpha/0', 'alpha/4', 'alpha/8']
    """
    keys = list(keys)
    if n is None:
        return keys
    groups: dict[tuple[int, int], list[str]] = {}
    for key in keys:
        groups.setdefault(_priority(key), []).append(key)
    charted: list[str] = []
    for _, group in sorted(groups.items()):
        charted += [group[i] for i in evenly(len(group), n - len(charted))]
    return charted


def _priority(key: str) -> tuple[int, int]:
    """Return the place of a key's group in the order of `charts`."""
    quantity, _, owner = key.partition("/")
    if quantity.removesuffix("_median") in CURVES and not owner:
        return (0, 0)
    if key == STEP_SCALE:
        return (2, -1)
    if key in HEALTH:
        return (2, 0)
    if not owner:
        return (3, 0) if _PART_OF.get(quantity.removesuffix("_median")) else (5, 0)
    if quantity in CURVES and owner.startswith("median_"):
        return (6, 0) if owner.startswith("median_all_") else (1, CURVES.index(quantity))
    if quantity in _PART_OF or quantity == "spectral_newton":
        return (4, 0) if quantity == "alpha" else (6, 0)
    return (5, 0)
