"""What to measure and how: the options of a measurement in one place, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from lightning_spectral.layers.kinds import Kind
from lightning_spectral.layers.matrices import LayerSelection, check_kinds
from lightning_spectral.layers.selection import check_selection
from lightning_spectral.numerics.power_law import MIN_POINTS

METHODS = ("auto", "exact", "ggn", "sketch")
Mode = Literal["eval", "train"]
MODES: tuple[Mode, ...] = ("eval", "train")
Precision = Literal["float32", "float64"]
PRECISIONS: dict[Precision, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Options:
    """The options of `measure_spectra` and `SpectralProbe` that both have, as they are documented there.

    Raises:
        ValueError: for an option out of range, with its name and what it may be.
    """

    top_k: int = 20
    curvature: str = "auto"
    layers: LayerSelection = None
    kinds: Mapping[str, Kind] | None = None
    fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] = ()
    mode: Mode = "eval"
    max_samples: int | None = None
    micro_batch_size: int | None = None
    precision: Precision = "float32"
    spectrum_top_k: int | None = None
    weight_spectra: bool = False
    bootstrap: int | None = None
    curvature_fraction: int | None = None
    alignment: bool = False

    def __post_init__(self) -> None:
        """Check each of them."""
        if self.curvature not in METHODS:
            raise ValueError(f"curvature must be one of {', '.join(map(repr, METHODS))}, got {self.curvature!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {self.mode!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {self.precision!r}")
        if not _whole(self.top_k, MIN_POINTS):
            raise ValueError(
                f"top_k must be a whole number of at least {MIN_POINTS}, the points that a fit needs, got "
                f"{self.top_k!r}"
            )
        for option in ("max_samples", "micro_batch_size"):
            value = getattr(self, option)
            if value is not None and not _whole(value, 1):
                raise ValueError(f"{option} must be None or a whole number of at least 1, got {value!r}")
        check_selection("layers", self.layers)
        check_selection("fused_qkv", self.fused_qkv, only_patterns=True)
        check_kinds(self.kinds or {})
        self._check_extras()

    def _check_extras(self) -> None:
        if self.spectrum_top_k is not None and not _whole(self.spectrum_top_k, self.top_k):
            raise ValueError(
                f"spectrum_top_k must be None or a whole number of at least top_k={self.top_k}, "
                f"got {self.spectrum_top_k!r}"
            )
        for option in ("weight_spectra", "alignment"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} must be True or False, got {getattr(self, option)!r}")
        # Of one draw nothing tells how far it is from the next.
        for option, least in {"bootstrap": 2, "curvature_fraction": 2}.items():
            value = getattr(self, option)
            if value and not _whole(value, least):
                raise ValueError(
                    f"{option} is a number of random draws: None or 0 for none, else a whole number of at least "
                    f"{least}, got {value!r}"
                )

    @property
    def settings(self) -> dict[str, int | str | bool | None]:
        """What processes that measure together must have in common, beside the layers."""
        apart = ("layers", "kinds", "fused_qkv", "max_samples", "micro_batch_size")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in apart}

    @property
    def parts(self) -> frozenset[str]:
        """The parts of a `LayerSpectrum` that are measured on request, and were asked for."""
        asked = {
            "weights": self.weight_spectra,
            "intervals": bool(self.bootstrap),
            "fraction": bool(self.curvature_fraction),
            "alignment": self.alignment,
        }
        return frozenset(part for part, wanted in asked.items() if wanted)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
