"""What a loss must be for its curvature to be measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_spectral.errors import MeasurementError

LOSS_REMEDY = "pass loss_fn(model, batch) -> scalar, or give the module a method spectral_loss(batch)"


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
    if value is None:
        raise MeasurementError("the loss is None: the step skipped this batch")
    if not isinstance(value, Tensor):
        raise MeasurementError(f"the loss must be a scalar tensor, got {type(value).__name__}; {LOSS_REMEDY}")
    if value.numel() != 1:
        raise MeasurementError(f"the loss must be a scalar, got shape {tuple(value.shape)}; reduce it with .mean()")
    if not value.requires_grad:
        raise MeasurementError(
            "the loss has no gradient: it was computed under no_grad, detached, or not from the module it was given"
        )
    return value.reshape(())
