"""A network without numbers: made without its weights, and a loss of it traced on tensors that have shapes alone.

Two ways to do without memory serve two ends. A factory is run with real tensors whose parameters go to the meta device
as modules take them in, so that what it computes of sizes and rates (`torch.linspace(...).tolist()`) has values. The
loss is traced on fake tensors, which say that they lie on the CPU: a network that creates tensors there works, as it
would not with meta ones.
"""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_spectral._messages import first_line
from lightning_spectral.curvature import DifferentiableLoss, FakeLoss, Structure, structure
from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.batch_tree import batch_size, divisible, map_leaves
from lightning_spectral.isolation.module_copy import Copier
from lightning_spectral.isolation.sandbox import UNINITIALIZED, quiet
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.loss import LossFunction, mute, resolve_loss, stand_ins
from lightning_spectral.numerics.matmul_precision import PRECISIONS
from lightning_spectral.options import Mode, Precision

LARGE_BUFFER = 2**16
"""Entries from which on a buffer goes to the meta device, too: an attention mask, whose values no factory reads."""

REFUSALS = (
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.UnsupportedFakeTensorException,
)

MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


class NeedsValuesError(MeasurementError):
    """A loss that cannot be traced on tensors that have shapes alone."""


@contextmanager
def weightless() -> Iterator[None]:
    """While active, modules hold their parameters and large buffers on the meta device.

    A parameter is made as ever and let go when a module takes it in, so that at most one has memory at a time. What
    reads the values of weights fails.
    """
    taken: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]] = {}
    add_parameter, add_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        add_parameter(self, name, _on_meta(param, taken))

    def register_buffer(self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        large = tensor is not None and not isinstance(tensor, UNINITIALIZED) and tensor.numel() >= LARGE_BUFFER
        add_buffer(self, name, tensor.to("meta") if large and tensor is not None else tensor, persistent)

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]
    try:
        with _Unmoved(), warnings.catch_warnings():
            # Weights that a factory loads are let go like those that it draws.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            yield
    finally:
        nn.Module.register_parameter = add_parameter  # type: ignore[method-assign]
        nn.Module.register_buffer = add_buffer  # type: ignore[method-assign]


def _on_meta(
    parameter: nn.Parameter | None, taken: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]]
) -> nn.Parameter | None:
    """A parameter's stand-in; one that two modules share has one."""
    if parameter is None or parameter.is_meta or isinstance(parameter, nn.UninitializedParameter):
        return parameter
    original, stand_in = taken.get(id(parameter), (lambda: None, None))
    if stand_in is None or original() is not parameter:
        empty = torch.empty_like(parameter, device="meta")
        stand_in = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        stand_in.__dict__.update(vars(parameter))
        taken[id(parameter)] = weakref.ref(parameter), stand_in
    return stand_in


class _Unmoved(TorchFunctionMode):
    """Tensors without values stay where they are, whatever device they are moved to; a change of type is made."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function as it is, moves of such tensors without the device."""
        kwargs = kwargs or {}
        if func not in MOVES or not (args[0].is_meta or isinstance(args[0], fake_tensor.FakeTensor)):
            return func(*args, **kwargs)
        given = [*args[1:], *kwargs.values()]
        dtypes = [value.dtype if isinstance(value, Tensor) else value for value in given]
        dtype = next((value for value in dtypes if isinstance(value, torch.dtype)), None)
        return args[0] if dtype is None else func(args[0], dtype=dtype)


@dataclass(frozen=True, eq=False)
class Traced:
    """What a forward and a backward pass tell of a loss without its value.

    Attributes:
        samples: in the batch; None where it does not tell.
        divisible: whether the batch can be cut by samples.
        structure: what a curvature method can use.
        activations: bytes that the graph keeps for the backward pass, parameters aside.
        step_flops: of matrix products and convolutions, forward and backward to every parameter that is trained.
        read: how many values the loss read, which were all taken as zero.
    """

    samples: int | None
    divisible: bool
    structure: Structure
    activations: int
    step_flops: int
    read: int


def traced(
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
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    copier, replaced = _Shapes(fakes, PRECISIONS[precision]), stand_ins(model)
    copier.memo.update(replaced)
    shapes, given = copier.copy(model, type(model).__name__), map_leaves(batch, lambda x: copier.copy(x, "batch"))
    samples, loss = batch_size(given), resolve_loss(model, loss_fn)
    _quieten(shapes)
    values = _Zeros()
    kept = {id(stand_in): stand_in for stand_in in replaced.values()}
    with quiet(shapes, mode=mode, precision=precision, stand_ins=kept) as shadow:
        mute(shadow.module, model, replaced)
        parameters = dict(shadow.module.named_parameters(remove_duplicate=False))
        leaves = {name: parameters[layer.parameter] for name, layer in layers.items()}
        problem = FakeLoss(lambda: loss(shadow.module, given), layers, leaves, samples)
        try:
            with fakes, values, _Unmoved(), _unlogged():
                activations, forward = _forward(problem, parameters.values())
                backward = _backward(problem.value, parameters.values())
        except Exception as error:
            # The model and the loss are anyone's code; their own errors are those of a measurement, too.
            if needed := _needed(error):
                raise NeedsValuesError(f"the loss cannot be traced without values ({first_line(needed)})") from error
            raise
        found = structure(problem)
    return Traced(samples, divisible(given), found, activations, forward + backward, values.read)


class _Shapes(Copier):
    """Copies whose tensors have shapes and no values.

    Args:
        fakes: the mode that their tensors belong to.
        dtype: the lowest floating type.
    """

    def __init__(self, fakes: FakeTensorMode, dtype: torch.dtype) -> None:
        super().__init__()
        self.fakes, self.dtype = fakes, dtype

    def _tensor(self, value: Any, path: str) -> Any:
        if isinstance(value, UNINITIALIZED):
            return super()._tensor(value, path)
        dtype = torch.promote_types(value.dtype, self.dtype) if value.is_floating_point() else value.dtype
        with self.fakes:
            new = torch.empty_strided(value.size(), value.stride(), dtype=dtype, device="cpu")
        if isinstance(value, nn.Parameter):
            return nn.Parameter(new, requires_grad=value.requires_grad)
        return new.requires_grad_(value.requires_grad)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without the traceback that fake tensors log of an error, which is raised as well."""
    logger = logging.getLogger(fake_tensor.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _needed(error: BaseException | None) -> BaseException | None:
    """What fake tensors refused, if that is behind an error."""
    while error is not None and not isinstance(error, REFUSALS):
        error = error.__cause__
    return error


class _Zeros(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Zero, or false, for each value that is read of a tensor that has none: a loss that is logged or compared."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation as it is, but for reading."""
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        self.read += 1
        dtype = args[0].dtype
        return 0.0 if dtype.is_floating_point else False if dtype is torch.bool else 0


def _quieten(model: nn.Module) -> None:
    """Keep metrics, which no loss depends on, from looking at values, and LightningModules on the CPU."""
    for part in model.modules():
        if "_device" in part.__dict__:
            part.__dict__["_device"] = torch.device("cpu")
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is None:
        return
    for part in model.modules():
        if isinstance(part, torchmetrics.Metric):
            part.__dict__.update(dict.fromkeys(("forward", "update", "compute"), _nothing))
        elif isinstance(part, torchmetrics.MetricCollection):
            part.__dict__.update(dict.fromkeys(("forward", "update", "compute"), _no_values))


def _nothing(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(())


def _no_values(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return {}


def _forward(problem: DifferentiableLoss, weights: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes saved for the backward pass in storages that are not the parameters', and FLOPs."""
    kept: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FlopCounterMode(display=False) as flops, saved_tensors_hooks(save, lambda tensor: tensor):
        problem.run()
    for weight in weights:
        kept.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values()), int(flops.get_total_flops())


def _backward(loss: Tensor, weights: Iterable[Tensor]) -> int:
    """FLOPs to every parameter that is trained."""
    leaves = {id(weight): weight for weight in weights if weight.requires_grad}
    with FlopCounterMode(display=False) as flops:
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return int(flops.get_total_flops())
