"""The context in which a measurement runs and leaves no trace.

A measurement never touches the network it is given. It runs on a shadow: modules, buffers, metrics, counters and
other attributes are copies; parameters are new autograd leaves on the same storage, so no hook, ``.grad`` or
gradient reducer of the original ever sees a backward pass.
"""

from __future__ import annotations

import copy
import random
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from lightning_spectral.batch import map_leaves

Mode = Literal["eval", "train"]
Precision = Literal["float32", "float64"]
MODES: tuple[Mode, ...] = ("eval", "train")
PRECISIONS: dict[Precision, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}

# Held by reference in a shadow: large or bound to the outside, and nothing that computing a loss writes to.
SHARED_TYPES = (Dataset, DataLoader, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, types.ModuleType)
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Shadow:
    """A stand-in for a module that can be run and differentiated freely.

    Attributes:
        module: the stand-in; its parameters share storage with the original's unless precision raised them.
        shared: path of each attribute that cannot be copied and so is the original's own -> why.
    """

    module: nn.Module
    shared: Mapping[str, str]


@contextmanager
def quiet(model: nn.Module, *, mode: Mode = "eval", precision: Precision = "float32") -> Iterator[Shadow]:
    """Yield a shadow of the model to measure on, and put back all global state at the end.

    Held fixed for the caller: random states of torch (CPU and the model's devices), numpy and Python; buffers and
    training flags of the model; autocast, gradient mode, float32 precision of matrix products, attention kernels,
    cuDNN for recurrent layers and torch.compile, which inside are set so that second derivatives exist and are exact.

    Backward hooks of modules and hooks of parameters do not run: the gradient measured is the loss's own.

    Args:
        model: left as it is, whatever happens inside, an interrupt included.
        mode: "eval", or "train": the flags as they are where the model is in training (frozen BatchNorm layers
            that a fine-tuning keeps in eval mode stay so), else all in training.
        precision: the lowest floating-point precision to compute in; parameters and buffers below it are raised.
    """
    with ExitStack() as stack:
        stack.enter_context(_random_states(model))
        stack.enter_context(_buffers_and_flags(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in {parameter.device.type for parameter in model.parameters()} | {"cpu"}:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        # No other attention kernel, and no cuDNN recurrence, has a second derivative.
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_full_float32())
        stack.enter_context(_eager())
        shadow = shadow_of(model)
        _raise_precision(shadow.module, precision)
        if mode == "eval" or not model.training:
            shadow.module.train(mode == "train")
        yield shadow


def shadow_of(model: nn.Module) -> Shadow:
    """Copy a module so that running and differentiating the copy leaves the original untouched."""
    copier = _Copier()
    for parameter in model.parameters():
        leaf = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        copier.memo[id(parameter)] = leaf
    module = copier.copy(model, type(model).__name__)
    return Shadow(module, copier.shared)


def copy_batch(batch: Any, precision: Precision = "float32") -> Any:
    """A copy of a batch, so that a loss that works in place leaves the original; floating tensors are raised."""
    copier = _Copier(lambda tensor: _at_least(tensor, PRECISIONS[precision]))
    return map_leaves(batch, lambda leaf: copier.copy(leaf, "batch"))


class _Copier:
    """copy.deepcopy with a memo, that shares what it cannot copy, says so, and detaches tensors from their graphs."""

    def __init__(self, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self.memo: dict[int, Any] = {}
        self.shared: dict[str, str] = {}
        self.convert = convert

    def copy(self, value: Any, path: str) -> Any:
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, SHARED_TYPES):
            return value
        try:
            return self._copy(value, path)
        except Exception as error:
            self.shared[path] = f"{type(value).__name__}: {error}"
            return value

    def _copy(self, value: Any, path: str) -> Any:
        kind = type(value)
        new: Any
        if isinstance(value, Tensor):
            new = self._tensor(value)
        elif isinstance(value, nn.Module) and _plain_module(kind):
            return self._module(value, path)
        elif kind is list:
            # Noted before its items are copied, so that a list that holds itself ends.
            new = self.memo[id(value)] = []
            new.extend(self.copy(item, f"{path}[{i}]") for i, item in enumerate(value))
        elif kind is tuple:
            new = tuple(self.copy(item, f"{path}[{i}]") for i, item in enumerate(value))
        elif kind in (dict, OrderedDict, defaultdict):
            new = defaultdict(value.default_factory) if kind is defaultdict else kind()
            self.memo[id(value)] = new
            new.update({key: self.copy(item, f"{path}[{key!r}]") for key, item in value.items()})
        elif isinstance(value, torch.Generator):
            new = value.clone_state()
        else:
            new = copy.deepcopy(value, self.memo)
        self.memo[id(value)] = new
        return new

    def _tensor(self, value: Tensor) -> Tensor:
        detached = value.detach()
        converted = self.convert(detached)
        new = converted.clone() if converted is detached else converted
        return new.requires_grad_(value.requires_grad) if value.is_floating_point() else new

    def _module(self, module: nn.Module, path: str) -> nn.Module:
        new = type(module).__new__(type(module))
        self.memo[id(module)] = new
        state = module.__getstate__()  # type: ignore[no-untyped-call]
        copied = {
            name: OrderedDict() if name in BACKWARD_HOOKS else self.copy(value, f"{path}.{name}")
            for name, value in state.items()
        }
        new.__setstate__(copied)  # type: ignore[no-untyped-call]
        return new


def _plain_module(kind: type) -> bool:
    """Whether a module class pickles by its state, so that its attributes can be copied one by one."""
    own = [vars(base) for base in kind.__mro__ if base is not object]
    return not any(name in attributes for attributes in own for name in ("__deepcopy__", "__reduce__", "__reduce_ex__"))


def _at_least(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, dtype))


def _raise_precision(module: nn.Module, precision: Precision) -> None:
    floating = {p.dtype for p in module.parameters() if p.is_floating_point()}
    floating |= {b.dtype for b in module.buffers() if b.is_floating_point()}
    wanted = PRECISIONS[precision]
    for dtype in floating:
        wanted = torch.promote_types(wanted, dtype)
    if any(torch.promote_types(dtype, PRECISIONS[precision]) != dtype for dtype in floating):
        module.to(wanted)


@contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            if device.type == "mps":
                stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
            else:
                stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


@contextmanager
def _buffers_and_flags(model: nn.Module) -> Iterator[None]:
    """Guard the original against a loss that reaches it past the shadow, through a closure."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        # BatchNorm writes its statistics without raising their version, so there is no telling whether it did;
        # through .data this write raises none either.
        for buffer, before in buffers:
            buffer.data.copy_(before)


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 matrix products and convolutions."""
    backends = torch.backends
    names: list[tuple[Any, str, Any]]
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        holders: list[Any] = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]  # type: ignore[attr-defined]
        holders += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]  # type: ignore[attr-defined]
        names = [(holder, "fp32_precision", "ieee") for holder in holders]
    else:
        names = [(backends.cudnn, "allow_tf32", False), (backends.cuda.matmul, "allow_tf32", False)]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in names]
    try:
        for holder, name, value in names:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled code eagerly: compiled graphs have no second derivative."""
    # Without torch._dynamo loaded nothing is compiled, and loading it takes seconds.
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
