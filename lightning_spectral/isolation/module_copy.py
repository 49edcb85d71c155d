"""A stand-in for a module that can be run, differentiated and written to without touching the original."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import IOBase
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from lightning_spectral._torch_private import uncompiled
from lightning_spectral.distributed.dtensor import is_communication, plain_class, without_communication
from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.held_state import UNINITIALIZED, Held, shared_state
from lightning_spectral.isolation.muting import NullLogger
from lightning_spectral.numerics.matmul_precision import at_least

# Held by reference: large or bound to the outside. What a loss writes on the first is put back.
STATEFUL_TYPES = (Dataset, DataLoader, Optimizer, LRScheduler)
SHARED_TYPES = (*STATEFUL_TYPES, types.ModuleType, type)
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
TRACKERS = (
    "aim", "clearml", "comet_ml", "mlflow", "neptune", "tensorboardX", "torch.utils.tensorboard.writer", "wandb",
)  # fmt: skip
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
CONTAINERS = (list, deque, dict, OrderedDict, defaultdict)
# Most of what modules hold: nothing can be written on it.
ATOMS = (type(None), bool, int, float, str)
# What a class may define to take its copying into its own hands.
COPY_METHODS = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


@dataclass(frozen=True, eq=False)
class ModuleCopy:
    """A stand-in for a module.

    Attributes:
        module: the stand-in. Parameters are leaves of their own with the same values.
        shared: path of each attribute that cannot be copied and so is the original's own -> why.
        originals: id of each parameter of the stand-in -> what it was copied from; None where it was given.
        held: what else was made for the stand-in, that a step may write to.
        copier: by which it was made, for what is to see the stand-in in the module's place.
    """

    module: nn.Module
    shared: Mapping[str, str]
    originals: Mapping[int, Tensor | None]
    held: Sequence[Held]
    copier: Copier


@contextmanager
def copied_module(
    model: nn.Module, stand_ins: Mapping[int, Any] | None = None, lowest: torch.dtype | None = None
) -> Iterator[ModuleCopy]:
    """Yield a copy of a module; it is emptied at the end, so that no cycle keeps a graph alive.

    Copied are submodules, parameters, buffers, attributes of any depth, and functions that close over any of these.
    Hooks of parameters and backward hooks are left out: the gradient of the copy is that of the loss alone. So are
    forward hooks of tracking packages, such as W&B's ``watch`` sets, which look at modules and change nothing.

    Args:
        stand_ins: id of an object -> what takes its place in the copy.
        lowest: type that floating and complex tensors below it are raised to; None: they stay as they are.
    """
    copier = Copier(lowest)
    copier.memo.update(stand_ins or {})
    try:
        module = copier.copy(model, type(model).__name__)
        for part in module.modules():
            for hooks in BACKWARD_HOOKS:
                part.__dict__[hooks] = OrderedDict()
        substitutes = stand_ins or {}
        pairs = [
            (copier.memo[id(p)], None if id(p) in substitutes else p)
            for p in model.parameters()
            if id(p) in copier.memo
        ]
        originals = {id(new): old for new, old in pairs if new is not old}
        yield ModuleCopy(module, copier.shared, originals, tuple(copier.held), copier)
    finally:
        for created in copier.modules:
            created.__dict__.clear()


class SpentIterator(Iterator[Any]):
    """Stands for one that cannot be copied, whose items training would lack if a measurement took them."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __next__(self) -> Any:
        """Refuse."""
        raise MeasurementError(
            f"{self.path} gives its items once, to training alone: pass a loss_fn, or a method spectral_loss(batch), "
            "that does not read it"
        )


class Copier:
    """copy.deepcopy that shares what cannot be copied, and says so, and that follows functions into their closures."""

    def __init__(self, lowest: torch.dtype | None = None) -> None:
        self.memo: dict[int, Any] = {}
        self.shared: dict[str, str] = {}
        self.modules: list[nn.Module] = []
        self.held: list[Held] = []
        self.kept: list[Held] = []
        self.lowest = lowest
        # An id stands for an object only as long as that lives.
        self._originals: list[Any] = []

    def copy(self, value: Any, path: str) -> Any:
        """Return the copy of a value; ``path`` names it where it cannot be copied."""
        if id(value) in self.memo:
            return self.memo[id(value)]
        if type(value) in ATOMS:
            return value
        if isinstance(value, SHARED_TYPES) or (is_communication(type(value)) and not isinstance(value, nn.Module)):
            if isinstance(value, STATEFUL_TYPES):
                self.kept += shared_state(value, path)
            return value
        try:
            new = self._copy(value, path)
        except MeasurementError:
            raise
        except Exception as error:
            if isinstance(value, nn.Module):
                raise MeasurementError(
                    f"{path}, a {type(value).__name__}, cannot be copied ({error}), and a measurement on the original "
                    "would leave traces; pass a loss_fn for a module without it"
                ) from error
            if isinstance(value, Iterator) and not isinstance(value, IOBase):
                new = SpentIterator(path)
            else:
                self.shared[path] = f"{type(value).__name__}: {error}"
                new = value
        self._note(value, new)
        if new is not value:
            # Containers and plain objects hold nothing but what is noted by itself.
            whole = isinstance(new, (Tensor, nn.Module, *CONTAINERS)) or _has_plain_state(type(new))
            self.held.append(Held(path, new, value if whole else None))
        return new

    def _note(self, value: Any, new: Any) -> None:
        self.memo[id(value)] = new
        self._originals.append(value)

    def _copy(self, value: Any, path: str) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, nn.Module):
            return self._module(value, path)
        if kind in CONTAINERS:
            return self._container(value, path)
        if kind in (tuple, set, frozenset):
            return kind(self.copy(item, f"{path}[{i}]") for i, item in enumerate(value))
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            return self._function(value, path)
        if isinstance(value, Generator):
            return value.clone_state()
        if _is_logger(kind):
            return NullLogger()
        if _has_plain_state(kind):
            new = object.__new__(kind)
            self._note(value, new)
            new.__dict__.update({name: self.copy(item, f"{path}.{name}") for name, item in vars(value).items()})
            return new
        return copy.deepcopy(value, self.memo)

    def _container(self, value: Any, path: str) -> Any:
        # Noted before its items are copied, so that a container that holds itself ends.
        if isinstance(value, (list, deque)):
            new: Any = [] if isinstance(value, list) else deque(maxlen=value.maxlen)
            self._note(value, new)
            new.extend(self.copy(item, f"{path}[{i}]") for i, item in enumerate(value))
            return new
        new = defaultdict(value.default_factory) if isinstance(value, defaultdict) else type(value)()
        self._note(value, new)
        for key, item in value.items():
            new[self.memo.get(id(key), key)] = self.copy(item, f"{path}[{key!r}]" if isinstance(key, str) else path)
        return new

    def _tensor(self, value: Tensor, path: str) -> Any:
        if isinstance(value, UNINITIALIZED):
            return copy.deepcopy(value, self.memo)
        detached = value.detach()
        dtype = value.dtype if self.lowest is None else at_least(value.dtype, self.lowest)
        new = detached.clone() if dtype is value.dtype else detached.to(dtype)
        if isinstance(value, nn.Parameter):
            new = nn.Parameter(new, requires_grad=value.requires_grad)
            new.__dict__.update({name: self.copy(item, f"{path}.{name}") for name, item in vars(value).items()})
            return new
        return new.requires_grad_(value.requires_grad)

    def _module(self, module: nn.Module, path: str) -> nn.Module:
        kind = plain_class(type(module))
        # A parametrized class copies all there is, and so the records of its sharding, and has no state to give.
        parametrized = is_parametrized(module)
        if not parametrized and _defines(kind, ("__deepcopy__", "__reduce__", "__reduce_ex__")):
            for parameter in module.parameters():
                self.copy(parameter, path)
            new = copy.deepcopy(module, self.memo)
            for parameter, original in zip(new.parameters(), module.parameters(), strict=True):
                if not parameter.is_leaf:
                    # Of a scripted module they are clones, with what they were cloned from behind them.
                    parameter.detach_().requires_grad_(original.requires_grad)
            return new
        new = kind.__new__(kind)
        self._note(module, new)
        self.modules.append(new)
        state = without_communication(vars(module) if parametrized else module.__getstate__())  # type: ignore[no-untyped-call]
        hooks = {name: _without_trackers(state[name]) for name in FORWARD_HOOKS if name in state}
        state |= hooks
        self._originals.append(state)
        for name, item in hooks.items():
            # Handles by which hooks are removed know the dictionary.
            self._note(vars(module)[name], self.copy(item, f"{path}.{name}"))
        new.__setstate__({name: self.copy(item, f"{path}.{name}") for name, item in state.items()})  # type: ignore[no-untyped-call]
        return new

    def _cell(self, cell: types.CellType, path: str) -> types.CellType:
        """Return the copy of what functions share that close over one variable; of an empty one, itself."""
        if not _is_filled(cell):
            return cell
        if id(cell) not in self.memo:
            new = types.CellType()
            # Noted before it is filled, so that a function that calls itself ends.
            self._note(cell, new)
            new.cell_contents = self.copy(cell.cell_contents, path)
            self.held.append(Held(path, new, cell))
        copied: types.CellType = self.memo[id(cell)]
        return copied

    def _function(self, value: Any, path: str) -> Any:
        """Return a function whose closure is copied, so that what it reaches is the copy."""
        if isinstance(value, types.MethodType):
            return types.MethodType(self.copy(value.__func__, path), self.copy(value.__self__, path))
        if isinstance(value, functools.partial):
            keywords = {name: self.copy(item, path) for name, item in value.keywords.items()}
            return functools.partial(self.copy(value.func, path), *(self.copy(a, path) for a in value.args), **keywords)
        if (original := uncompiled(value)) is not None:
            # Compiled code has no second derivative.
            return self.copy(original, path)
        cells = value.__closure__ or ()
        closure = tuple(self._cell(cell, path) for cell in cells)
        if all(new is old or _is_fixed(old, new) for new, old in zip(closure, cells, strict=True)):
            return value
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
        new.__kwdefaults__ = value.__kwdefaults__
        new.__dict__.update(value.__dict__)
        return new


def _is_fixed(cell: types.CellType, copied: types.CellType) -> bool:
    """Return whether a cell holds a function or class, the same as its copy: what functions do not write to."""
    if not _is_filled(copied):
        return False
    contents = cell.cell_contents
    return contents is copied.cell_contents and isinstance(contents, (*SHARED_TYPES, *FUNCTIONS))


def _is_logger(kind: type) -> bool:
    """Return whether objects of a class are loggers of Lightning, or runs and writers of a tracking package.

    A mapping of a tracking package, as W&B's config is, holds settings that a loss may depend on, and is none.
    """
    lightning = hasattr(kind, "log_metrics") and hasattr(kind, "log_hyperparams")
    return lightning or (_of_tracker(kind) and not hasattr(kind, "keys"))


def _of_tracker(value: Any) -> bool:
    """Return whether a class or function is a tracking package's."""
    module = str(getattr(value, "__module__", None))
    return module in TRACKERS or module.partition(".")[0] in TRACKERS


def _without_trackers(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """Return the hooks that are none of a tracking package's."""
    return OrderedDict((key, hook) for key, hook in hooks.items() if not _of_tracker(_function_of(hook)))


def _function_of(hook: Any) -> Any:
    """Return the function that a bound method or a partial one calls."""
    while isinstance(hook, (types.MethodType, functools.partial)):
        hook = hook.__func__ if isinstance(hook, types.MethodType) else hook.func
    return hook


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _defines(kind: type, names: tuple[str, ...]) -> bool:
    return any(name in vars(base) for base in kind.__mro__ if base is not object for name in names)


def _has_plain_state(kind: type) -> bool:
    """Return whether objects of a class are their ``__dict__`` and nothing else."""
    bases = [base for base in kind.__mro__ if base is not object]
    heap = all(base.__flags__ & (1 << 9) for base in bases)
    return heap and not _defines(kind, COPY_METHODS) and not any(vars(base).get("__slots__") for base in bases)
