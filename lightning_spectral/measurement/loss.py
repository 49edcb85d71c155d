"""Which loss is measured: the user's function, the module's ``spectral_loss``, or its ``training_step``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_spectral.errors import MeasurementError, first_line

LossFunction = Callable[[nn.Module, Any], Tensor]

LOSS_REMEDY = "pass loss_fn(model, batch) -> scalar, or give the module a method spectral_loss(batch)"
LOSS_FN = "loss_fn"


@dataclass(frozen=True)
class NamedLoss:
    """A loss with the name by which its author knows it.

    Attributes:
        function: (module, batch) -> scalar.
        name: ``loss_fn``, or a method of the module's class.
    """

    function: LossFunction
    name: str = LOSS_FN

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """Compute the loss."""
        try:
            loss: Any = self.function(module, batch)
        except Exception as error:
            if self.name == LOSS_FN:
                note = f"loss_fn(model, batch) got a {type(module).__name__} and a {type(batch).__name__}"
                # Python 3.10 has no add_note.
                vars(error).setdefault("__notes__", []).append(note)
            raise
        if loss is None:
            raise MeasurementError(f"{self.name} returned None, so there is no loss of this batch")
        if not isinstance(loss, Tensor):
            remedy = "" if self.name == LOSS_FN else f"; {LOSS_REMEDY}"
            raise MeasurementError(f"{self.name} must return a scalar tensor, got {type(loss).__name__}{remedy}")
        if loss.numel() != 1:
            raise MeasurementError(
                f"{self.name} must return a scalar, got shape {tuple(loss.shape)}; reduce it with .mean()"
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            other = ", or not from the module it is given, which is a copy" if self.name == LOSS_FN else ""
            raise MeasurementError(
                f"{self.name} returned a loss without a gradient: it was computed under no_grad, or detached{other}"
            )
        return loss

    @property
    def unreached(self) -> str:
        """Why a layer has no gradient, and what to do about it."""
        of_copy = "it must use the module it is given, which is a copy; else " if self.name == LOSS_FN else ""
        return (
            f"the loss of {self.name} does not depend on it: {of_copy}it is not called, or behind no_grad, detach or "
            "reentrant checkpointing (take use_reentrant=False); leave it out with layers=..."
        )


def checked_loss_fn(loss_fn: LossFunction | None) -> LossFunction | None:
    """Return the user's loss."""
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn must be a callable (module, batch) -> scalar, got {loss_fn!r}")
    return loss_fn


def resolve_loss(model: nn.Module, loss_fn: LossFunction | None, batch_idx: int = 0) -> NamedLoss:
    """Return the loss to measure: ``loss_fn``, else ``model.spectral_loss(batch)``, else ``model.training_step``.

    training_step is given ``batch_idx``. It is taken for automatic optimization only: with manual optimization a call
    would step the optimizer.
    """
    if (function := checked_loss_fn(loss_fn)) is not None:
        return NamedLoss(function)
    name = type(model).__name__
    if callable(getattr(model, "spectral_loss", None)):
        return NamedLoss(lambda module, batch: cast(Any, module).spectral_loss(batch), f"{name}.spectral_loss")
    if not callable(getattr(model, "training_step", None)):
        raise ValueError(f"{name} has no training_step, so its loss is not known; {LOSS_REMEDY}")
    if not getattr(model, "automatic_optimization", True):
        raise ValueError(f"{name} optimizes manually, so its training_step cannot be called to measure; {LOSS_REMEDY}")
    if "dataloader_iter" in inspect.signature(model.training_step).parameters:  # type: ignore[arg-type]
        raise ValueError(f"{name}.training_step takes dataloader_iter and would consume batches; {LOSS_REMEDY}")
    return NamedLoss(partial(_training_step_loss, batch_idx=batch_idx), f"{name}.training_step")


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
            f"training_step failed in eval mode ({first_line(error)}); "
            "if the mode is the cause, as with some detection models, measure with mode='train'"
        ) from error
    return cast(Tensor, output.get("loss") if isinstance(output, Mapping) else output)
