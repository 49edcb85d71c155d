"""Which loss is measured: the user's function, the module's ``spectral_loss``, or its ``training_step``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_spectral.curvature.scalar_loss import LOSS_REMEDY
from lightning_spectral.errors import MeasurementError

LossFunction = Callable[[nn.Module, Any], Tensor]


def checked_loss_fn(loss_fn: LossFunction | None) -> LossFunction | None:
    """Return the user's loss.

    Raises:
        ValueError: if it cannot be called.
    """
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn must be a callable (module, batch) -> scalar, got {loss_fn!r}")
    return loss_fn


def resolve_loss(model: nn.Module, loss_fn: LossFunction | None, batch_idx: int = 0) -> LossFunction:
    """Return the loss to measure: ``loss_fn``, else ``model.spectral_loss(batch)``, else ``model.training_step``.

    training_step is given ``batch_idx``. It is taken for automatic optimization only: with manual optimization a call
    would step the optimizer.

    Raises:
        ValueError: if the module offers none of them.
    """
    if checked_loss_fn(loss_fn) is not None:
        return cast(LossFunction, loss_fn)
    if callable(getattr(model, "spectral_loss", None)):
        return lambda module, batch: module.spectral_loss(batch)  # type: ignore[operator]
    name = type(model).__name__
    if not callable(getattr(model, "training_step", None)):
        raise ValueError(f"{name} has no training_step, so its loss is not known; {LOSS_REMEDY}")
    if not getattr(model, "automatic_optimization", True):
        raise ValueError(f"{name} optimizes manually, so its training_step cannot be called to measure; {LOSS_REMEDY}")
    if "dataloader_iter" in inspect.signature(model.training_step).parameters:  # type: ignore[arg-type]
        raise ValueError(f"{name}.training_step takes dataloader_iter and would consume batches; {LOSS_REMEDY}")
    return partial(_training_step_loss, batch_idx=batch_idx)


def _training_step_loss(module: nn.Module, batch: Any, batch_idx: int) -> Tensor:
    step: Any = module.training_step
    arguments = inspect.signature(step).parameters.values()
    takes_two = len(arguments) > 1 or any(a.kind is a.VAR_POSITIONAL for a in arguments)
    try:
        output: Any = step(batch, batch_idx) if takes_two else step(batch)
    except (MeasurementError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        if module.training:
            raise
        raise MeasurementError(
            f"training_step failed in eval mode ({type(error).__name__}: {error}); "
            "if the mode is the cause, as with some detection models, measure with mode='train'"
        ) from error
    return cast(Tensor, output.get("loss") if isinstance(output, Mapping) else output)
