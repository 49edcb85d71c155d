"""The loss in train mode beside that in eval mode: what is measured should be what is trained."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_spectral.errors import is_out_of_memory
from lightning_spectral.isolation.interrupts import function_mode, interruption
from lightning_spectral.measurement.objective import Loss, Objective

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)

RANDOM_IN_TRAINING = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.RReLU, nn.RNNBase, nn.MultiheadAttention),
)
"""Modules, beside those with "Drop" in their name, whose train mode is random or normalises by the batch."""

TOLERANCE = 1e-3
"""Relative difference of the losses from which on they are two."""


DRAWS = (
    *(torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint, torch.randperm, torch.bernoulli),
    *(Tensor.uniform_, Tensor.normal_, Tensor.bernoulli, Tensor.bernoulli_),
)
"""Functions that a dropout or stochastic depth written by hand draws with."""


class _WithoutDropout(TorchFunctionMode):
    def __init__(self) -> None:
        self.draws = 0
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, but leave dropout out; count what is drawn."""
        kwargs = kwargs or {}
        self.draws += func in DRAWS
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
            if len(args) > 4:
                args, kwargs = args[:4], {"is_causal": args[5] if len(args) > 5 else False, **kwargs}
        return func(*args, **kwargs)


def other_loss_in_training(objective: Objective, module: nn.Module) -> str:
    """Return what a network's loss in train mode is, where it is another than in eval mode; else nothing.

    Dropout is left out, and BatchNorm has its running statistics in both, so that what differs is something else:
    outputs that are rescaled or turned into probabilities, another branch. Nothing is said of a network that draws
    more in train mode, as a stochastic depth written by hand does.
    """
    with objective.group.step(watched=True) as step:
        micro_batches = objective.full_batches()
        step.send(_difference(objective, module) if micro_batches else "")
    return next(filter(None, step.received), "")


def _difference(objective: Objective, module: nn.Module) -> str:
    micro_batch = objective.full_batches()[0]
    try:
        # What the user's code warns of, it does in eval mode, too.
        with torch.no_grad(), _in_train_mode(module) as wrapped, _without_warnings():
            in_training = _WithoutDropout()
            with function_mode(in_training):
                trained = objective.value_of(micro_batch, wrapped)
        measured = objective.known_value(micro_batch)
    except Exception as error:
        # What is measured is the loss in eval mode, which does not fail.
        if is_out_of_memory(error) or interruption(error):
            raise
        return ""
    if measured is None or not (math.isfinite(trained) and math.isfinite(measured)):
        return ""
    if math.isclose(trained, measured, rel_tol=TOLERANCE, abs_tol=1e-6):
        return ""
    if in_training.draws:
        in_evaluation = _WithoutDropout()
        with torch.no_grad(), function_mode(in_evaluation):
            objective.value_of(micro_batch, lambda loss: loss)
        if in_training.draws > in_evaluation.draws:
            return ""
    return (
        f"the loss of the first batch is {measured:.4g} in eval mode and {trained:.4g} in train mode, without dropout "
        "and with BatchNorm's running statistics: the network computes another loss there, and that is trained; "
        "measure it with mode='train', or give a loss_fn"
    )


@contextmanager
def _in_train_mode(module: nn.Module) -> Iterator[Callable[[Loss], Loss]]:
    """Yield what makes a loss of (batch) one in train mode; the flags are as before at the end."""
    flags = [(part, part.training) for part in module.modules()]

    def wrapped(loss: Loss) -> Loss:
        def in_train_mode(batch: Any) -> Any:
            for part, _ in flags:
                is_random = isinstance(part, RANDOM_IN_TRAINING) or "Drop" in type(part).__name__
                part.training = not is_random
            return loss(batch)

        return in_train_mode

    try:
        yield wrapped
    finally:
        for part, flag in flags:
            part.training = flag


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore warnings, and leave Python's record of those that were shown.

    After `warnings.catch_warnings` it shows each of them once more, in the user's loop at each measurement.
    """
    # The pattern tells it from a filter that the user's code sets meanwhile.
    ignore = ("ignore", re.compile(""), Warning, None, 0)
    filters: Any = warnings.filters
    filters.insert(0, ignore)
    try:
        yield
    finally:
        if ignore in filters:
            filters.remove(ignore)
