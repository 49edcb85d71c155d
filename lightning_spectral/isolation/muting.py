"""Loggers, metrics and Trainers of a copy that say nothing to anyone."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lightning_spectral.isolation.held_state import Held, shared_state


class NullLogger:
    """Logger that does nothing: every attribute of it can be read, set and called.

    In every other way it is empty: false, zero, of length zero, a context that does nothing. As a path, or as text, it
    is a folder that is removed with it.
    """

    def __getattr__(self, name: str) -> NullLogger:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> NullLogger:
        """Swallow a call."""
        return self

    def _itself(self, *args: Any) -> NullLogger:
        return self

    def _does_nothing(self, *args: Any) -> None:
        return None

    def _is_false(self, *args: Any) -> bool:
        return False

    __getitem__ = __enter__ = _itself
    __setattr__ = __delattr__ = __setitem__ = __delitem__ = __exit__ = _does_nothing
    __bool__ = __contains__ = __lt__ = __le__ = __gt__ = __ge__ = _is_false
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _itself
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _itself
    __neg__ = __abs__ = __round__ = __or__ = __ror__ = __copy__ = __deepcopy__ = _itself
    # Else numpy would take it for an empty array.
    __array_ufunc__ = None

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __next__(self) -> Any:
        raise StopIteration

    def keys(self) -> tuple[Any, ...]:
        """Return nothing."""
        return ()

    values = items = keys

    def __len__(self) -> int:
        return 0

    __int__ = __index__ = __len__

    def __float__(self) -> float:
        return 0.0

    def __fspath__(self) -> str:
        if "folder" not in vars(self):
            vars(self)["folder"] = folder = tempfile.mkdtemp(prefix="lightning-spectral-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return str(vars(self)["folder"])

    __str__ = __fspath__

    def __format__(self, spec: str) -> str:
        # Any format of a number or a date.
        return str(self)


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


def schedules_of(trainers: Iterable[Any]) -> list[Held]:
    """Return the optimizers' groups and the schedulers of Trainers: a training_step that writes to them is undone."""
    shared = [
        part
        for trainer in trainers
        for part in (
            *getattr(trainer, "optimizers", ()),
            *(config.scheduler for config in getattr(trainer, "lr_scheduler_configs", ())),
        )
    ]
    return [held for part in shared for held in shared_state(part, type(part).__name__)]


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
