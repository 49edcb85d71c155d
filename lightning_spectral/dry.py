"""A network without numbers: made without its weights, and a loss of it traced on tensors that have shapes alone.

Two ways to do without memory serve two ends. A factory is run with real tensors whose parameters go to the meta device
as modules take them in, so that what it computes of sizes and rates (`torch.linspace(...).tolist()`) has values. The
loss is traced on fake tensors, which say that they lie on the CPU: a network that moves or creates tensors there works,
as it would not with meta ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_spectral.batch import batch_size, divisible, map_leaves
from lightning_spectral.curvature import DryProblem, Problem, Structure, structure
from lightning_spectral.errors import MeasurementError, first_line
from lightning_spectral.layers import MatrixLayer
from lightning_spectral.loss import LossFunction, mute, resolve_loss, stand_ins
from lightning_spectral.quiet import PRECISIONS, UNINITIALIZED, Mode, Precision, quiet
from lightning_spectral.shadow import Copier

LARGE_BUFFER = 2**16
"""Entries from which on a buffer goes to the meta device, too: an attention mask, whose values no factory reads."""

MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


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
        with _Unmoved():
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
    """Tensors of the meta device stay there, whatever device they are moved to; a change of type is made."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function as it is, moves of such tensors without the device."""
        kwargs = kwargs or {}
        if func not in MOVES or not args[0].is_meta:
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
    """

    samples: int | None
    divisible: bool
    structure: Structure
    activations: int
    step_flops: int


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
        MeasurementError: if the loss cannot be computed without values, or it is no scalar with a gradient.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    copier = _Shapes(fakes, PRECISIONS[precision])
    shapes, given = copier.copy(model, type(model).__name__), map_leaves(batch, lambda x: copier.copy(x, "batch"))
    samples, loss, replaced = batch_size(given), resolve_loss(model, loss_fn), stand_ins(model)
    with quiet(shapes, mode=mode, precision=precision) as shadow:
        mute(shadow.module, model, replaced)
        parameters = dict(shadow.module.named_parameters(remove_duplicate=False))
        leaves = {name: parameters[layer.parameter] for name, layer in layers.items()}
        problem = DryProblem(lambda: loss(shadow.module, given), layers, leaves, samples)
        try:
            activations, forward = _forward(problem, fakes, parameters.values())
            backward = _backward(problem.value, fakes, parameters.values())
        except MeasurementError:
            raise
        except Exception as error:
            # The model and the loss are anyone's code, and fake tensors refuse whatever needs a value.
            raise MeasurementError(f"the loss could not be traced without values ({first_line(error)})") from error
        found = structure(problem)
    return Traced(samples, divisible(given), found, activations, forward + backward)


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


def _forward(problem: Problem, fakes: FakeTensorMode, weights: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes saved for the backward pass in storages that are not the parameters', and FLOPs."""
    kept: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with fakes, FlopCounterMode(display=False) as flops, saved_tensors_hooks(save, lambda tensor: tensor):
        problem.run()
    for weight in weights:
        kept.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values()), int(flops.get_total_flops())


def _backward(loss: Tensor, fakes: FakeTensorMode, weights: Iterable[Tensor]) -> int:
    """FLOPs to every parameter that is trained."""
    leaves = {id(weight): weight for weight in weights if weight.requires_grad}
    with fakes, FlopCounterMode(display=False) as flops:
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return int(flops.get_total_flops())
