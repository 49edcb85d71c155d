"""Curvature methods by name."""

from __future__ import annotations

from collections.abc import Callable

from lightning_spectral.curvature.exact import ExactCurvature
from lightning_spectral.curvature.problem import Curvature

METHODS: dict[str, Callable[[], Curvature]] = {"exact": ExactCurvature}


def curvature_method(name: str) -> Curvature:
    """The method of that name; ValueError if there is none."""
    if name not in METHODS:
        raise ValueError(f"curvature must be one of {', '.join(map(repr, METHODS))}, got {name!r}")
    return METHODS[name]()
