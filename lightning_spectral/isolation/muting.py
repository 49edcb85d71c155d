"""Loggers, metrics and Trainers of a copy that say nothing to anyone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn


class NullLogger:
    """Logger that does nothing: every attribute of it can be read and called."""

    def __getattr__(self, name: str) -> NullLogger:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> NullLogger:
        """Swallow a call."""
        return self

    def __getitem__(self, key: Any) -> NullLogger:
        return self


def silent_trainers(model: nn.Module) -> dict[int, Any]:
    """Return id -> copy with silent loggers, of the Trainers that a module's parts hold."""
    trainers: dict[int, Any] = {}
    for module in model.modules():
        trainer = _trainer_of(module)
        if trainer is not None and id(trainer) not in trainers:
            silent = copy.copy(trainer)
            silent.loggers = [NullLogger() for _ in trainer.loggers]
            trainers[id(trainer)] = silent
    return trainers


def silence_logging(copied: nn.Module, original: nn.Module, replaced: Mapping[int, Any]) -> None:
    """Keep a copy's training_step from logging, its metrics from asking other ranks, and attach a Trainer."""
    for module in copied.modules():
        for flag in ("sync_on_compute", "dist_sync_on_step"):
            if flag in module.__dict__:
                module.__dict__[flag] = False
    originals = dict(original.named_modules(remove_duplicate=False))
    for name, module in copied.named_modules(remove_duplicate=False):
        if not hasattr(module, "training_step"):
            continue
        for method in ("log", "log_dict", "print"):
            if hasattr(module, method):
                module.__dict__[method] = _nothing
        # A parent attaches its Trainer to its children, which come after it.
        if name in originals and _is_attachable(originals[name]):
            module.trainer = replaced.get(id(_trainer_of(originals[name])))


def _is_attachable(module: nn.Module) -> bool:
    """Return whether a module has the public properties by which a LightningModule knows what runs it."""
    return all(isinstance(getattr(type(module), name, None), property) for name in ("trainer", "fabric"))


def _trainer_of(module: Any) -> Any:
    """Return the Trainer that a module is attached to; None without one, or with a Fabric in its place."""
    if not _is_attachable(module) or module.fabric is not None:
        return None
    try:
        return module.trainer
    except RuntimeError:
        # What an unattached LightningModule raises.
        return None


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
