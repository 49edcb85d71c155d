"""What a loss must be for its curvature to be measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_spectral.errors import MeasurementError


def checked_loss(value: Any) -> Tensor:
    """Return the loss, if curvature can be measured of it.

    Raises:
        MeasurementError: if it is no scalar tensor, is NaN or infinite, or does not depend on any parameter.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not bool(torch.isfinite(value)):
        raise MeasurementError(f"the loss is {value.item()}, so its gradient and curvature mean nothing")
    return scalar_loss(value)


def scalar_loss(value: Any) -> Tensor:
    """Return the loss, if it is a scalar with a gradient, whatever its value.

    Raises:
        MeasurementError: if not.
    """
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise MeasurementError(f"the loss must be a scalar tensor with a gradient, got {found}")
    return value.reshape(())
