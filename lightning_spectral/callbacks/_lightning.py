"""The one place that knows both Lightning packages, and where they differ from what is public."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from lightning_spectral.distributed.process_group import DistributedGroup, SingleProcess
from lightning_spectral.errors import MeasurementError

PACKAGES = ("pytorch_lightning", "lightning.pytorch")


def _callback_classes() -> tuple[type, ...]:
    found = []
    for package in PACKAGES:
        try:
            found.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError as error:
            if not package.startswith(str(error.name)):
                raise
    if not found:
        raise ImportError("SpectralProbe needs Lightning: pip install pytorch-lightning, or pip install lightning")
    return tuple(found)


if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Callback

    class AnyCallback(_Callback):
        """A Callback."""

else:

    class AnyCallback(*_callback_classes()):
        """A Callback of each Lightning package that is installed, so that every Trainer and CLI accepts it."""


def jsonargparse_missing() -> str | None:
    """What to do about LightningCLI's own dependency, if it is not installed."""
    if find_spec("jsonargparse") is None:
        return 'LightningCLI needs jsonargparse: pip install "lightning-spectral[cli]"'
    return None


def lightning_cli(package: str) -> type:
    """The LightningCLI of a package; ImportError without jsonargparse."""
    if missing := jsonargparse_missing():
        raise ImportError(missing)
    return importlib.import_module(f"{package}.cli").LightningCLI  # type: ignore[no-any-return]


def package_of(module_class: object) -> str:
    """The package whose LightningModule a class is; the first one installed if it is of neither."""
    bases = [base.__module__ for base in getattr(module_class, "__mro__", ())]
    named = [package for package in PACKAGES if any(f"{base}.".startswith(f"{package}.") for base in bases)]
    return next(iter(named), next(filter(_installed, PACKAGES)))


def _installed(package: str) -> bool:
    return find_spec(package.partition(".")[0]) is not None


def optimizer_steps(trainer: Any) -> int:
    """Optimizer steps taken, once per batch with any number of optimizers: the step axis of Lightning's loggers.

    `Trainer.global_step`, the public count, adds the optimizers up; it serves where Lightning's own counter moved.
    """
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def steps_in_all(trainer: Any) -> float:
    """Optimizer steps of the whole run; infinite where its end is not a number of steps."""
    try:
        steps = float(trainer.estimated_stepping_batches)
    except Exception:
        # A Trainer that cannot tell raises a class of its own package.
        return float("inf")
    # Epochs of a loader without a length give -1.
    return steps if steps >= 0 else float("inf")


def to_device(trainer: Any, module: Any, batch: Any) -> Any:
    """A batch of a loader as training would see it: converted, through the module's hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    before = getattr(module, "_on_before_batch_transfer", module.on_before_batch_transfer)
    return trainer.strategy.batch_to_device(before(batch, dataloader_idx=0), dataloader_idx=0)


def processes_of(trainer: Any) -> SingleProcess:
    """The processes that train together, each on its part of the batches.

    Raises:
        MeasurementError: if they do not talk through torch.distributed.
    """
    if trainer.world_size == 1:
        return SingleProcess()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise MeasurementError(
            f"{type(trainer.strategy).__name__} has {trainer.world_size} processes that do not talk through "
            "torch.distributed, so that they cannot measure together; train with strategy='ddp'"
        )
    return DistributedGroup()


def repeats_a_batch(trainer: Any) -> bool:
    """Whether another process of a tensor-parallel group has the same batch, and takes its part in the measurement."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if mesh is None or "tensor_parallel" not in (mesh.mesh_dim_names or ()):
        return False
    return int(mesh["tensor_parallel"].get_local_rank()) > 0


def sharded(trainer: Any) -> str | None:
    """The name of the Trainer's strategy if it splits parameters so that their matrices cannot be had."""
    name = type(trainer.strategy).__name__
    return name if any(part in name for part in ("FSDP", "DeepSpeed")) else None
