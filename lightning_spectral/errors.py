"""What this package raises and warns with."""

from __future__ import annotations

from collections.abc import Mapping

NAMES_SHOWN = 6
"""How many layers a message names."""


class MeasurementError(RuntimeError):
    """A loss, a gradient or a curvature that cannot be measured; the message says why and what to do."""


class SecondDerivativeError(MeasurementError):
    """An operation on the way from a layer to the loss has no second derivative."""


class SpectralWarning(UserWarning):
    """Something was left out of a measurement; the message names it and the reason."""


def by_cause(failed: Mapping[str, str]) -> list[str]:
    """A line per cause that names the layers it struck.

    >>> by_cause({"a": "frozen", "b": "dead", "c": "frozen"})
    ['a, c: frozen', 'b: dead']
    """
    layers: dict[str, list[str]] = {}
    for name, why in failed.items():
        layers.setdefault(why, []).append(name)
    return [
        ", ".join(names[:NAMES_SHOWN])
        + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
        + f": {why}"
        for why, names in layers.items()
    ]
