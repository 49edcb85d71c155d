"""Models, data and losses that a command line names by import path, pkg.module:name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_spectral._validation import positive_int
from lightning_spectral.errors import first_line
from lightning_spectral.functional import FUNCTIONAL_LOSSES, functional_loss
from lightning_spectral.measurement.loader_batches import count_samples, first_batches
from lightning_spectral.measurement.loss import LossFunction


class SourceError(ValueError):
    """Error of a name that cannot be found or loaded: names the option, what was found and the remedy."""


def import_object(path: str, option: str) -> Any:
    """Return the object that ``pkg.module:name`` or ``pkg.module.name`` names."""
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        return attrgetter(name)(importlib.import_module(module))
    except Exception as error:
        raise SourceError(
            f"{option} must be an import path such as pkg.module:name, of what is installed or in "
            f"{os.getcwd()}, got {path!r} ({first_line(error)})"
        ) from error


def batch_reader(path: str, n_batches: int, model: nn.Module) -> Callable[[int | None], list[Any]]:
    """Return what reads the first batches of the data that an import path names, as many as hold so many samples.

    Args:
        path: of a DataLoader, a LightningDataModule (its training data), another iterable of batches, or one batch: a
            tensor, tuple, list or mapping; or of something that returns one of these when called without arguments.
    """
    positive_int("--n-batches", n_batches)
    value = import_object(path, "--data")
    with _naming(path):
        value = value() if callable(value) else value
        if callable(getattr(value, "train_dataloader", None)):
            value.prepare_data()
            value.setup("fit")
            value = value.train_dataloader()
        is_loader = isinstance(value, DataLoader)
        batches, rest = ([], iter(())) if is_loader else _opened(path, value)

    def read(samples: int | None) -> list[Any]:
        with _naming(path):
            if is_loader:
                return list(first_batches(value, n_batches, model, samples=samples))
            n_samples = 0 if samples is None else sum(count_samples(batch, "--gradient-samples") for batch in batches)
            while len(batches) < n_batches or (samples is not None and n_samples < samples):
                if (batch := next(rest, rest)) is rest:
                    break
                batches.append(batch)
                n_samples += 0 if samples is None else count_samples(batch, "--gradient-samples")
        if len(batches) < n_batches:
            raise SourceError(f"--data {path}: {n_batches} batches were asked for, and there are {len(batches)}")
        return batches

    return read


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Have errors of the user's data name it."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"--data {path}: reading it failed ({first_line(error)})") from error


def _opened(path: str, value: Any) -> tuple[list[Any], Iterator[Any]]:
    """Return the batches that are there, and what gives more."""
    if isinstance(value, (Tensor, tuple, list, Mapping)):
        return [value], iter(())
    if isinstance(value, Dataset):
        raise SourceError(f"--data {path} is a data set; wrap it in a DataLoader, whose batch size is what is measured")
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [], iter(value)
    raise SourceError(f"--data {path} gave a {type(value).__name__}, and should give a DataLoader or a batch")


def named_loss(name: str | None) -> LossFunction | None:
    """Return the loss of that name: of `torch.nn.functional`, or ``pkg.module:function`` of (model, batch).

    None stays None: the module's own loss.
    """
    if name is None or name in FUNCTIONAL_LOSSES:
        return None if name is None else functional_loss(name)
    if ":" not in name and "." not in name:
        raise SourceError(f"--loss {name}: must be pkg.module:function or one of {', '.join(FUNCTIONAL_LOSSES)}")
    loss = import_object(name, "--loss")
    if not callable(loss):
        raise SourceError(f"--loss {name} is a {type(loss).__name__}, and should be a function of (model, batch)")
    return loss  # type: ignore[no-any-return]
