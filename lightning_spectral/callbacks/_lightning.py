"""Both Lightning packages, and the only uses of their private names, each with a public fallback."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from lightning_spectral.distributed.process_group import SINGLE_PROCESS, Group, joint_group
from lightning_spectral.errors import MeasurementError
from lightning_spectral.measurement.loader_batches import length_of, unused_copy

PACKAGES = ("pytorch_lightning", "lightning.pytorch")


def _callback_classes() -> tuple[type, ...]:
    classes = []
    for package in PACKAGES:
        try:
            classes.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError as error:
            if not package.startswith(str(error.name)):
                raise
    if not classes:
        raise ImportError("SpectralProbe needs Lightning: pip install pytorch-lightning, or pip install lightning")
    return tuple(classes)


if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Callback

    class AnyCallback(_Callback):
        """Callback."""

else:

    class AnyCallback(*_callback_classes()):
        """Callback of every Lightning package that is installed, so that every Trainer and CLI accepts it."""


def lightning_cli(package: str) -> type:
    """Return the LightningCLI of a package; raise ImportError without jsonargparse."""
    if find_spec("jsonargparse") is None:
        raise ImportError('LightningCLI needs jsonargparse: pip install "lightning-spectral[cli]"')
    return importlib.import_module(f"{package}.cli").LightningCLI  # type: ignore[no-any-return]


def package_of(module_class: object) -> str:
    """Return the package whose LightningModule a class is; the first one installed if it is of neither."""
    bases = [base.__module__ for base in getattr(module_class, "__mro__", ())]
    matches = [package for package in PACKAGES if any(f"{base}.".startswith(f"{package}.") for base in bases)]
    installed = (package for package in PACKAGES if find_spec(package.partition(".")[0]) is not None)
    return next(iter(matches), next(installed))


def overrides(module: Any, hook: str) -> bool:
    """Return whether a module has a hook of its own in place of Lightning's, which does nothing."""
    return not str(getattr(getattr(module, hook, None), "__module__", ".core.hooks")).endswith(".core.hooks")


def optimizer_steps(trainer: Any) -> int:
    """Return the optimizer steps taken, once per batch with any number of optimizers: the axis of Lightning's loggers.

    The public `Trainer.global_step` counts each optimizer's; it serves where the private counter is missing.
    """
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def total_steps(trainer: Any, step_seconds: float = math.nan) -> float:
    """Return the optimizer steps of the whole run, by steps, epochs or time; infinity where they are not known.

    Args:
        step_seconds: that a step takes; NaN: not known, so that a limit of time says nothing.
    """
    done = optimizer_steps(trainer)
    try:
        steps = float(trainer.estimated_stepping_batches)
    except Exception:
        # A Trainer that cannot tell raises an error class of its own package.
        steps = math.inf
    # Epochs of a loader without a length give -1.
    steps = steps if steps >= 0 else math.inf
    if steps == trainer.max_steps and done and trainer.global_step:
        # Each of several optimizers takes a step per batch, and max_steps counts them all.
        steps *= done / float(trainer.global_step)
    timers = [callback for callback in trainer.callbacks if _is_lightnings(callback, "Timer")]
    left = [seconds for timer in timers if (seconds := timer.time_remaining()) is not None]
    by_time: list[float] = [done + max(seconds, 0.0) / step_seconds for seconds in left if step_seconds > 0]
    return min([steps, *by_time])


def averages_after(trainer: Any, probe: Any, module: Any) -> list[str]:
    """Return the callbacks after a probe that put averaged weights into the module when training has ended."""
    names = []
    for callback in itertools.dropwhile(lambda callback: callback is not probe, trainer.callbacks):
        swa = _is_lightnings(callback, "StochasticWeightAveraging")
        # With BatchNorm it does so before its last pass over the data.
        if _is_lightnings(callback, "WeightAveraging") or (swa and not callback.pl_module_contains_batch_norm(module)):
            names.append(type(callback).__name__)
    return names


def _is_lightnings(callback: Any, name: str) -> bool:
    """Return whether a callback is Lightning's of this name, of either package, and not one of the user's by it."""
    lightnings = ("pytorch_lightning", "lightning")
    return any(x.__name__ == name and x.__module__.split(".")[0] in lightnings for x in type(callback).__mro__)


class TrainingPass:
    """Batches of a further pass over a Trainer's training data, of this rank, at most as many as an epoch has."""

    def __init__(self, trainer: Any) -> None:
        # The public train_dataloader does not tell how several loaders are combined.
        self._combined = getattr(trainer.fit_loop, "_combined_loader", None)
        self._one = trainer.train_dataloader
        self._most = trainer.num_training_batches
        self.loaders = [self._one] if self._combined is None else self._combined.flattened

    @property
    def ends(self) -> bool:
        """True where all loaders have a length: a feed without one may have stopped, and reading it wait for ever."""
        return all(length_of(loader) is not None for loader in self.loaders)

    def __copy__(self) -> TrainingPass:
        """Return the same of copies of the loaders."""
        other = object.__new__(TrainingPass)
        vars(other).update(vars(self), loaders=list(map(unused_copy, self.loaders)))
        if self._combined is None:
            other._one = other.loaders[0]
        else:
            other._combined = copy.copy(self._combined)
            other._combined.flattened = other.loaders
        return other

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches as the loaders give them."""
        batches = self._one if self._combined is None else (batch for batch, _, _ in self._combined)
        return itertools.islice(batches, None if math.isinf(self._most) else int(self._most))


def to_device(trainer: Any, module: Any, batch: Any) -> Any:
    """Return a loader's batch as training would see it: converted, passed through the module's hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    before = getattr(module, "_on_before_batch_transfer", module.on_before_batch_transfer)
    return trainer.strategy.batch_to_device(before(batch, dataloader_idx=0), dataloader_idx=0)


def process_group_of(trainer: Any) -> Group:
    """Return the group of all ranks of a Trainer, each with its share of the batches.

    Raises:
        MeasurementError: if its strategy flattens parameters, or does not communicate through torch.distributed.
    """
    strategy = type(trainer.strategy).__name__
    if "FSDP" in strategy or "DeepSpeed" in strategy:
        raise MeasurementError(
            f"{strategy} flattens parameters into shards, where no matrix can be measured; train with "
            "ModelParallelStrategy (FSDP2) or DDP"
        )
    if trainer.world_size == 1:
        return SINGLE_PROCESS
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise MeasurementError(
            f"{strategy} has {trainer.world_size} processes that do not talk through torch.distributed, so that they "
            "cannot measure together; train with strategy='ddp'"
        )
    return joint_group()


def repeats_batch(trainer: Any) -> bool:
    """Return whether a lower rank of a tensor-parallel group has the same batch, and measures it for this one."""
    try:
        mesh = trainer.strategy.device_mesh
    except (AttributeError, RuntimeError):
        # Only ModelParallelStrategy has one, which raises RuntimeError before it is set up.
        return False
    if mesh is None or "tensor_parallel" not in (mesh.mesh_dim_names or ()):
        return False
    return int(mesh["tensor_parallel"].get_local_rank()) > 0
