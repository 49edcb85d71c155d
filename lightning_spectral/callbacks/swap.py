"""`SwapOptimizer`: train with another optimizer than the configured one, from the start or from a step on."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_spectral._validation import optional_positive_int
from lightning_spectral.callbacks._lightning import AnyCallback, optimizer_steps
from lightning_spectral.callbacks.terminal import log_above_bar
from lightning_spectral.errors import SpectralWarning
from lightning_spectral.optim.carry_over import carried_groups, describe_rates, lost_options, rebind_scheduler

UNSUPPORTED = ("FSDPStrategy", "DeepSpeed")
"""Parts of names of strategies that tie the optimizer to flattened parameters."""


class SwapOptimizer(AnyCallback):
    """Replace the configured optimizer, for the same parameters; its schedulers go on with the new one.

    Each parameter keeps its learning rate and weight decay, unless ``init_args`` gives others: then the ratios between
    the configured groups are kept. What else differs between these groups is warned about. The schedule goes on with
    its shape and position; see `rebind_scheduler`. The new optimizer begins without state. Checkpoints of either side
    of the swap resume on that side; one written without this callback can be resumed with ``at_step``, not with a swap
    from the start.

    Args:
        optimizer: a class, its import path, or a name: "SpectralNewton", or one in torch.optim. If the class has a
            function ``groups(model)``, as `SpectralNewton` has, its groups are what it is given, else the list of
            parameters.
        init_args: its other arguments; without ``lr`` the configured rates hold, whatever the two optimizers' scales.
        at_step: swap before this optimizer step, counted from 0; None: before training.
        at_epoch: or before the first step of this epoch.

    Raises:
        ValueError: at construction, for a class that cannot be found; when fitting starts, for manual optimization,
            several optimizers, none at all, FSDP1 or DeepSpeed; for a checkpoint of another optimizer.

    >>> SwapOptimizer("SGD", {"lr": 0.1, "momentum": 0.9}, at_step=1000).optimizer_class.__name__
    'SGD'
    """

    def __init__(
        self,
        optimizer: str | type[Optimizer] = "lightning_spectral.SpectralNewton",
        init_args: dict[str, Any] | None = None,
        at_step: int | None = None,
        at_epoch: int | None = None,
    ) -> None:
        super().__init__()
        self.optimizer_class = _optimizer_class(optimizer)
        self.init_args = dict(init_args or {})
        if at_step is not None and at_epoch is not None:
            raise ValueError(f"give at_step or at_epoch, not both; got at_step={at_step} and at_epoch={at_epoch}")
        self.at_step = optional_positive_int("at_step", at_step, 0)
        self.at_epoch = optional_positive_int("at_epoch", at_epoch, 0)
        self.swapped = False
        self._step: int | None = None
        self._description = ""
        self._restore: Callable[[], None] = _do_nothing

    @property
    def from_the_start(self) -> bool:
        """True if the configured optimizer never takes a step."""
        return self.at_step is None and self.at_epoch is None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap the module's configure_optimizers."""
        if stage != "fit":
            return
        strategy = type(trainer.strategy).__name__
        if any(name in strategy for name in UNSUPPORTED):
            raise ValueError(
                f"SwapOptimizer cannot swap under {strategy}, which ties the optimizer to parameters of its own; "
                "return the optimizer from configure_optimizers, or train with DDP or ModelParallelStrategy (FSDP2)"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"SwapOptimizer needs automatic optimization, and {type(pl_module).__name__} optimizes manually; "
                "make the optimizer in its configure_optimizers"
            )
        self.swapped, self._step = False, None
        self._wrap(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its configure_optimizers back."""
        self._restore()
        self._restore = _do_nothing

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the module its configure_optimizers back: Lightning does not call `teardown` after an error."""
        self.teardown(trainer, pl_module, "fit")

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that holds the state of the optimizer that is swapped out from the start."""
        self.check(checkpoint, checkpoint.get("callbacks", {}).get(self.state_key))

    def check(self, checkpoint: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Raise ValueError for a checkpoint with another optimizer's state; ``state`` is this callback's in it."""
        if state is None and self.from_the_start and checkpoint.get("optimizer_states"):
            raise ValueError(
                "the checkpoint was written without SwapOptimizer, so it holds the state of the configured optimizer, "
                f"with which {self.optimizer_class.__name__} cannot go on; give SwapOptimizer "
                f"at_step={checkpoint.get('global_step')}, or start from the checkpoint's weights alone"
            )
        if state is not None and state["swapped"] and state["optimizer"] != _import_path(self.optimizer_class):
            raise ValueError(
                f"the checkpoint holds the state of {state['optimizer']}, and SwapOptimizer was given "
                f"{_import_path(self.optimizer_class)}; resume with the optimizer of the checkpoint"
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Swap, if it is time."""
        if self.at_epoch is not None and trainer.current_epoch >= self.at_epoch:
            self._swap_now(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Swap, if it is time, before a step and not between its micro-batches."""
        step = optimizer_steps(trainer)
        is_first, self._step = step != self._step, step
        if is_first and self.at_step is not None and step >= self.at_step:
            self._swap_now(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn if training ended before the swap."""
        if not self.swapped:
            when = f"at_epoch={self.at_epoch}" if self.at_step is None else f"at_step={self.at_step}"
            warnings.warn(
                f"training ended before {when}: no optimizer was swapped",
                SpectralWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return on which side of the swap the checkpoint is."""
        return {"swapped": self.swapped, "optimizer": _import_path(self.optimizer_class)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`, before the optimizers are configured."""
        self.swapped = state_dict["swapped"]

    def _wrap(self, module: Any) -> None:
        attributes, configure = module.__dict__, module.configure_optimizers
        overridden = {name: attributes[name] for name in ("configure_optimizers",) if name in attributes}

        def restore() -> None:
            attributes.pop("configure_optimizers", None)
            attributes.update(overridden)

        def configure_optimizers() -> Any:
            configuration = configure()
            return self._swap_in(configuration, module) if self.swapped or self.from_the_start else configuration

        attributes["configure_optimizers"] = configure_optimizers
        self._restore = restore

    def _swap_in(self, configuration: Any, module: nn.Module) -> Any:
        """Return the result of configure_optimizers with the new optimizer in it."""
        parts: list[Any] = []
        _map_parts(configuration, parts.append)
        old = _only_optimizer([part for part in parts if isinstance(part, Optimizer)])
        new = self._new_optimizer(old, module)
        for part in parts:
            if getattr(part, "optimizer", None) is old:
                rebind_scheduler(part, old, new)
        self._record_swap(module.trainer, "before training")
        return _map_parts(configuration, lambda part: new if part is old else part)

    def _swap_now(self, trainer: Any, module: nn.Module) -> None:
        if self.swapped:
            return
        old = _only_optimizer(trainer.strategy.optimizers)
        new = self._new_optimizer(old, module)
        for config in trainer.strategy.lr_scheduler_configs:
            rebind_scheduler(config.scheduler, old, new)
        trainer.strategy.optimizers = [new]
        self._record_swap(trainer, f"before step {optimizer_steps(trainer)}")

    def _new_optimizer(self, old: Optimizer, module: nn.Module) -> Optimizer:
        """Return the new optimizer, for the parameters of the old one, and warn of what has no counterpart in it."""
        groups = carried_groups(old, self.optimizer_class, self.init_args, module)
        new = self.optimizer_class(groups, **self.init_args)
        if type(new) is type(old) and not self.init_args:
            name = type(new).__name__
            warnings.warn(
                f"SwapOptimizer puts a {name} of default options, but for its rates, in place of a {name}, which was "
                "configured or put there by another SwapOptimizer, as by that of SpectralProbe(swap_optimizer=True); "
                "one of them is enough",
                SpectralWarning,
                stacklevel=2,
            )
        if lost := lost_options(old, new):
            warnings.warn(
                f"{type(new).__name__} does not take over what {type(old).__name__} was configured with: "
                f"{'; '.join(lost)}; give it in SwapOptimizer's init_args if it has a counterpart",
                SpectralWarning,
                stacklevel=2,
            )
        self._description = f"{describe_rates(new)} takes the place of {describe_rates(old)}"
        return new

    def _record_swap(self, trainer: Any, when: str) -> None:
        self.swapped = True
        log_above_bar(trainer, f"SwapOptimizer, {when}: {self._description}")


def _optimizer_class(option: str | type[Optimizer]) -> type[Optimizer]:
    target: Any = option
    if isinstance(option, str):
        # A name alone, as for the --optimizer of `lightning-spectral fit`.
        path = "lightning_spectral.SpectralNewton" if option == "SpectralNewton" else option
        module, _, name = path.rpartition(".")
        try:
            target = getattr(importlib.import_module(module) if module else torch.optim, name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"optimizer must be the import path of a class, or a name in torch.optim; {option!r}: {error}"
            ) from error
    if not (isinstance(target, type) and issubclass(target, Optimizer)):
        got = f"an object of {type(target).__name__}" if isinstance(target, Optimizer) else repr(option)
        raise ValueError(f"optimizer must be a class of optimizers, got {got}")
    return target


def _import_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _only_optimizer(optimizers: list[Optimizer]) -> Optimizer:
    if len(optimizers) != 1:
        raise ValueError(
            f"SwapOptimizer swaps one optimizer, and configure_optimizers gave {len(optimizers) or 'none'}"
        )
    return optimizers[0]


def _map_parts(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a configuration with ``function`` of its parts. A scheduler may be a dataclass with the optimizer."""
    if isinstance(value, Mapping):
        return {key: _map_parts(item, function) for key, item in value.items()}
    return [_map_parts(item, function) for item in value] if isinstance(value, (list, tuple)) else function(value)


def _do_nothing() -> None:
    return None
