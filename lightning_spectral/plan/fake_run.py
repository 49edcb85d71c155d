"""Networks made without their weights, and a loss traced on tensors that have shapes and no values.

The latter are fake tensors, which say that they lie on the CPU: a network that creates tensors there works, as it would
not with meta ones.
"""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_spectral._torch_private import (
    FAKE_TENSOR_LOGGER,
    TorchDispatchMode,
    fake_tensor_mode,
    fake_tensor_refusals,
    is_fake,
    reads_a_value,
    storage_key,
)
from lightning_spectral.curvature import DifferentiableLoss, FakeLoss, Structure, structure
from lightning_spectral.errors import MeasurementError, first_line
from lightning_spectral.isolation.batch_tree import batch_size, divisible, map_leaves
from lightning_spectral.isolation.held_state import UNINITIALIZED
from lightning_spectral.isolation.module_copy import Copier
from lightning_spectral.isolation.muting import silence_logging, silent_trainers
from lightning_spectral.isolation.sandbox import isolated
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.loss import LossFunction, resolve_loss
from lightning_spectral.numerics.matmul_precision import PRECISIONS, at_least
from lightning_spectral.options import Mode, Precision

LARGE_BUFFER = 2**16
"""Entries from which on a buffer goes to the meta device, too: an attention mask, whose values no factory reads."""

MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


@contextmanager
def weightless() -> Iterator[None]:
    """Have modules hold their parameters and large buffers on the meta device.

    A parameter is made as ever and let go when a module takes it in, so that at most one has memory at a time. What
    reads the values of weights fails.
    """
    # One that two modules share stays one.
    substitutes: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]] = {}

    def parameter_on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta or isinstance(parameter, nn.UninitializedParameter):
            return parameter
        original, substitute = substitutes.get(id(parameter), (lambda: None, None))
        if substitute is None or original() is not parameter:
            empty = torch.empty_like(parameter, device="meta")
            substitute = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            substitute.__dict__.update(vars(parameter))
            substitutes[id(parameter)] = weakref.ref(parameter), substitute
        return substitute

    def buffer_on_meta(module: nn.Module, name: str, buffer: Tensor) -> Tensor:
        large = not isinstance(buffer, UNINITIALIZED) and buffer.numel() >= LARGE_BUFFER
        return buffer.to("meta") if large else buffer

    with ExitStack() as stack:
        # Typed by torch as returning nothing, and documented to return what is registered.
        stack.callback(register_module_parameter_registration_hook(parameter_on_meta).remove)  # type: ignore[arg-type]
        stack.callback(register_module_buffer_registration_hook(buffer_on_meta).remove)  # type: ignore[arg-type]
        stack.enter_context(IgnoreDeviceMoves())
        stack.enter_context(warnings.catch_warnings())
        # Weights that a factory loads are let go like those that it draws.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        yield


class IgnoreDeviceMoves(TorchFunctionMode):
    """Leave tensors without values where they are, whatever device they are moved to; a change of type is made."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in MOVES or not is_fake(args[0]):
            return func(*args, **kwargs)
        values = [*args[1:], *kwargs.values()]
        dtypes = [value.dtype if isinstance(value, Tensor) else value for value in values]
        dtype = next((value for value in dtypes if isinstance(value, torch.dtype)), None)
        return args[0] if dtype is None else func(args[0], dtype=dtype)


class NeedsValuesError(MeasurementError):
    """Raised for a loss that cannot be traced on tensors that have shapes alone."""


@dataclass(frozen=True, eq=False)
class Traced:
    """Result of a forward and a backward pass without values.

    Attributes:
        structure: what a curvature method can use.
        activations: bytes that the graph keeps for the backward pass, parameters aside.
        step_flops: of matrix products and convolutions, forward and backward to every parameter that is trained.
        values_read: number of values that the loss read, all taken as zero.
    """

    samples: int | None
    divisible: bool
    structure: Structure
    activations: int
    step_flops: int
    values_read: int


def trace_loss(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None,
    layers: Mapping[str, MatrixLayer],
    *,
    mode: Mode = "eval",
    precision: Precision = "float32",
) -> Traced:
    """Trace the loss of a batch; nothing of the size of the network is allocated.

    Args:
        model: on any device, meta included.
        batch, loss_fn, mode, precision: as in `measure_spectra`; of the batch the shapes count alone.
        layers: to be measured.

    Raises:
        NeedsValuesError: if a shape in it depends on values.
        MeasurementError: if it is no scalar with a gradient.
    """
    fakes = fake_tensor_mode()
    copier, replaced = _Shapes(fakes, PRECISIONS[precision]), silent_trainers(model)
    copier.memo.update(replaced)
    shapes, fake_batch = copier.copy(model, type(model).__name__), map_leaves(batch, lambda x: copier.copy(x, "batch"))
    samples, loss = batch_size(fake_batch), resolve_loss(model, loss_fn)
    _silence_metrics(shapes)
    values = _Zeros()
    substitutes = {id(stand_in): stand_in for stand_in in replaced.values()}
    with isolated(shapes, mode=mode, precision=precision, stand_ins=substitutes) as copied:
        silence_logging(copied.module, model, replaced)
        parameters = dict(copied.module.named_parameters(remove_duplicate=False))
        leaves = {name: parameters[layer.parameter] for name, layer in layers.items()}
        fake_loss = FakeLoss(lambda: loss(copied.module, fake_batch), layers, leaves, samples)
        try:
            with fakes, values, IgnoreDeviceMoves(), _unlogged():
                activations, forward = _forward(fake_loss, parameters.values())
                backward = _backward(fake_loss.value, parameters.values())
        except Exception as error:
            # The model and the loss are anyone's code; their own errors are those of a measurement, too.
            if cause := _data_dependence_in(error):
                raise NeedsValuesError(f"the loss cannot be traced without values ({first_line(cause)})") from error
            raise
        graph = structure(fake_loss)
    return Traced(samples, divisible(fake_batch), graph, activations, forward + backward, values.n_read)


class _Shapes(Copier):
    """Copier to tensors that have shapes and no values."""

    def __init__(self, fakes: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.fakes, self.dtype = fakes, dtype

    def _tensor(self, value: Any, path: str) -> Any:
        if isinstance(value, UNINITIALIZED):
            return super()._tensor(value, path)
        dtype = at_least(value.dtype, self.dtype)
        with self.fakes:
            new = torch.empty_strided(value.size(), value.stride(), dtype=dtype, device="cpu")
        if isinstance(value, nn.Parameter):
            return nn.Parameter(new, requires_grad=value.requires_grad)
        return new.requires_grad_(value.requires_grad)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Silence the traceback that fake tensors log of an error, which is raised as well."""
    logger = logging.getLogger(FAKE_TENSOR_LOGGER)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _data_dependence_in(error: BaseException | None) -> BaseException | None:
    """Return what fake tensors refused, if that is behind an error."""
    while error is not None and not isinstance(error, fake_tensor_refusals()):
        error = error.__cause__
    return error


class _Zeros(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Give zero, or false, for each value that is read of a tensor that has none: a loss that is logged or compared."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_read = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not reads_a_value(func):
            return func(*args, **(kwargs or {}))
        self.n_read += 1
        dtype = args[0].dtype
        return 0.0 if dtype.is_floating_point else False if dtype is torch.bool else 0


def _silence_metrics(model: nn.Module) -> None:
    """Keep metrics, which no loss depends on, from looking at values, and LightningModules on the CPU."""
    for part in model.modules():
        if "_device" in part.__dict__:
            part.__dict__["_device"] = torch.device("cpu")
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is None:
        return
    methods = ("forward", "update", "compute")
    for part in model.modules():
        if isinstance(part, torchmetrics.Metric):
            part.__dict__.update(dict.fromkeys(methods, lambda *args, **kwargs: torch.zeros(())))
        elif isinstance(part, torchmetrics.MetricCollection):
            part.__dict__.update(dict.fromkeys(methods, lambda *args, **kwargs: {}))


def _forward(fake_loss: DifferentiableLoss, weights: Iterable[Tensor]) -> tuple[int, int]:
    """Return bytes saved for the backward pass in storages that are not the parameters', and FLOPs."""
    storages: dict[int | None, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage_key(tensor)] = storage
        return tensor

    with FlopCounterMode(display=False) as flops, saved_tensors_hooks(save, lambda tensor: tensor):
        fake_loss.run()
    for weight in weights:
        storages.pop(storage_key(weight), None)
    return sum(storage.nbytes() for storage in storages.values()), int(flops.get_total_flops())


def _backward(loss: Tensor, weights: Iterable[Tensor]) -> int:
    """Return the FLOPs of a backward pass to every parameter that is trained."""
    leaves = {id(weight): weight for weight in weights if weight.requires_grad}
    with FlopCounterMode(display=False) as flops:
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return int(flops.get_total_flops())
