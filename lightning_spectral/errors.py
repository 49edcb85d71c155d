"""What this package raises and warns with."""

from __future__ import annotations


class MeasurementError(RuntimeError):
    """A loss, a gradient or a curvature that cannot be measured; the message says why and what to do."""


class SecondDerivativeError(MeasurementError):
    """An operation on the way from a layer to the loss has no second derivative."""


class SpectralWarning(UserWarning):
    """Something was left out of a measurement; the message names it and the reason."""
