"""Every private name of torch that this package touches, each behind one function with a fallback or a clear error.

A torch that renames one breaks this module alone. `tests/unit/test_torch_private.py` tests each name by what it does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

# Not exported by torch, and documented in its notes on extending it.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

Function = TypeVar("Function", bound=Callable[..., Any])


def private(module: str, name: str) -> Any:
    """Return a private name of torch."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"torch {torch.__version__} has no {module}.{name}, which this needs; install a torch between 2.4 and 2.13"
        ) from error


def storage_key(tensor: Tensor) -> int | None:
    """Return a key that all views of a tensor share; None for a tensor without memory of its own.

    The public data_ptr is 0 for every storage that is empty.
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def as_non_view(tensor: Tensor) -> Tensor:
    """Return a tensor as one that is no view, if nothing else can reach what it views.

    An operation in place on a view rebases its grad_fn, and an edge of the graph that was taken before is lost.
    """
    if tensor.requires_grad and tensor._is_view():
        return torch.ops.aten._unsafe_view(tensor, tensor.shape)  # type: ignore[no-any-return]
    return tensor


def trained_on_batch_statistics(node: Any) -> bool:
    """Return whether a batch-norm node of the graph used statistics of the batch; True where it does not tell.

    The node may be of the backward pass.
    """
    return bool(getattr(node, "_saved_training", getattr(node, "_saved_train", True)))


def output_shape(node: Any, number: int) -> torch.Size | None:
    """Return the shape of an output of a node of the graph; None where it does not tell."""
    outputs = getattr(node, "_input_metadata", ())
    try:
        shape = outputs[number].shape
    except (IndexError, RuntimeError):
        # A nested tensor has none, or one in which a size is no number.
        return None
    return torch.Size(shape) if all(isinstance(size, int) for size in shape) else None


def is_complex(node: Any) -> bool:
    """Return whether an output of a node of the graph is complex."""
    return any(output.dtype.is_complex for output in getattr(node, "_input_metadata", ()))


def log_softmax_result(node: Any) -> tuple[Tensor, int] | None:
    """Return what a log-softmax node of the graph gave, and over which dimension; None where it does not tell."""
    result, dim = getattr(node, "_saved_result", None), getattr(node, "_saved_dim", None)
    if not isinstance(result, Tensor) or dim is None:
        return None
    # A negative dimension comes back as an unsigned number.
    return result, int(dim) if dim < result.ndim else int(dim) - 2**64


def uncompiled(function: Any) -> Any:
    """Return the function that torch.compile was given, None for one that was not compiled."""
    return getattr(function, "_torchdynamo_orig_callable", None)


def not_compiled(function: Function) -> Function:
    """Return a function that torch.compile runs as it is; the public decorator loads the compiler at once."""
    lazily: Callable[[Function], Function] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return lazily(function)


COMPILED = "_orig_mod"
"""Attribute of a module that torch.compile has wrapped."""

WRAPPED = (COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Attributes under which wrappers of torch hold a network or a part of it."""


def is_composable_state(name: str) -> bool:
    """Return whether an attribute of a module is what `fully_shard` and its like keep there."""
    return name.startswith("__composable_api")


def may_step_alone(ddp: Any) -> bool:
    """Return whether a rank may stop before the others: within DDP's `join`, one that has run out of batches."""
    return bool(getattr(getattr(ddp, "_join_config", None), "enable", False))


def schedulers_in(scheduler: Any) -> Sequence[Any]:
    """Return the schedulers of a sequence or a chain of them; none for a plain one."""
    return tuple(getattr(scheduler, "_schedulers", ()))


LAST_RATES = "_last_lr"
"""Attribute of a scheduler with the learning rate that it last set, per group."""


def without_worker_iterator(loader: Any) -> Any:
    """Take the iterator of persistent workers, which is the original's, off a copy of a DataLoader."""
    loader._iterator = None
    return loader


def grouped_products() -> tuple[Callable[..., Tensor], ...]:
    """Return the names that this torch has for products of groups of rows, the public and the older private one."""
    holders = ((F, "grouped_mm"), (torch, "_grouped_mm"))
    return tuple(getattr(holder, name) for holder, name in holders if hasattr(holder, name))


def in_forward_mode() -> bool:
    """Return whether derivatives are being taken in forward mode, with `torch.func.jvp` or dual tensors."""
    return bool(getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0)


WEIGHT_NORM: Any = getattr(torch, "_weight_norm", None)
"""What `torch.nn.utils.weight_norm` calls, in both of its forms."""


@contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes inside, (holder, name, value); one that is not there stays missing."""
    present = [(holder, name, value) for holder, name, value in replacements if hasattr(holder, name)]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in present]
    try:
        for holder, name, value in present:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def no_autocast_inside() -> AbstractContextManager[None]:
    """Have every `torch.autocast` that is entered inside do nothing."""
    enter = torch.autocast.__enter__

    def enter_disabled(self: Any) -> Any:
        before, self._enabled = self._enabled, False
        try:
            return enter(self)  # type: ignore[no-untyped-call]
        finally:
            # The object may be the caller's own, to be entered again in training.
            self._enabled = before

    return _replaced((torch.autocast, "__enter__", enter_disabled))


def inert_cudnn_tf32() -> AbstractContextManager[None]:
    """Have torch's older switch of TF32 in cuDNN read False inside, and do nothing when it is set.

    Set once it overrules `torch.backends.fp32_precision` for good, so it cannot be set and put back. Without the
    private names it works as usual.
    """
    switch: Any = vars(type(torch.backends.cudnn)).get("allow_tf32")
    names = ((torch._C, "_get_cudnn_allow_tf32", "_set_cudnn_allow_tf32"), (switch, "getter", "setter"))
    getters = [(holder, getter, lambda: False) for holder, getter, _ in names]
    return _replaced(*getters, *((holder, setter, lambda value: None) for holder, _, setter in names))


def on_saved_tensors_hooks(callback: Callable[[], None]) -> AbstractContextManager[None]:
    """Call back whenever hooks on saved tensors are entered inside."""
    enter = saved_tensors_hooks.__enter__

    def enter_and_call(hooks: saved_tensors_hooks) -> None:
        callback()
        enter(hooks)

    return _replaced((saved_tensors_hooks, "__enter__", enter_and_call))


def recomputed_inside(context: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[None]:
    """Have `torch.utils.checkpoint` compute activations again, in a backward pass, inside a context of its own.

    It is what the forward pass was computed inside of, which is over by then. Without the private name nothing changes.
    """
    older = "_checkpoint_without_reentrant_generator"
    # From torch 2.14 on the older name calls this one, which `checkpoint` calls itself.
    name = f"{older}_impl" if hasattr(torch.utils.checkpoint, f"{older}_impl") else older
    generator: Any = getattr(torch.utils.checkpoint, name, None)

    def in_context(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def recompute(*inputs: Any, **options: Any) -> Any:
            with context():
                return function(*inputs, **options)

        return generator(recompute, *args, **kwargs)

    return _replaced((torch.utils.checkpoint, name, in_context))


def patched_linear(replace: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> AbstractContextManager[None]:
    """Replace `torch.nn.functional.linear`, as `nn.MultiheadAttention` calls it, by ``replace(linear)``."""
    return _replaced((F, "linear", replace(F.linear)))


FUNCTION_MODES: Any = torch.overrides
FUNCTION_MODE_NAMES = ("_get_current_function_mode_stack", "_pop_mode", "_push_mode")
"""Names of torch's stack of function modes."""


@contextmanager
def restored_function_modes(mode: TorchFunctionMode, release: Callable[[BaseException], None]) -> Iterator[None]:
    """Enter a mode, and leave torch's stack of modes as it was.

    Torch takes a mode off the stack for each call that the mode handles. An interrupt in that moment loses it, or has
    it put back when the frames it came through are let go of. Without the private stack the mode is entered as usual.

    Args:
        mode: to enter.
        release: called with the error that ends the context, to let go of its frames.
    """
    if not all(hasattr(FUNCTION_MODES, name) for name in FUNCTION_MODE_NAMES):
        with mode:
            yield
        return
    before = list(FUNCTION_MODES._get_current_function_mode_stack())
    mode.__enter__()  # type: ignore[no-untyped-call]
    try:
        yield
    except BaseException as error:
        release(error)
        raise
    finally:
        while FUNCTION_MODES._get_current_function_mode_stack():
            FUNCTION_MODES._pop_mode()
        for other in before:
            FUNCTION_MODES._push_mode(other)


@contextmanager
def outside_all_modes() -> Iterator[None]:
    """Run operations that are no part of a loss: unseen by autograd, torch.func and modes."""
    entered: list[Callable[[], AbstractContextManager[Any]]] = [
        private("torch._functorch.pyfunctorch", "temporarily_clear_interpreter_stack"),
        torch.no_grad,
        private("torch.utils._python_dispatch", "_disable_current_modes"),
        private("torch._C", "DisableTorchFunction"),
    ]
    with ExitStack() as stack:
        for make in entered:
            stack.enter_context(make())
        yield


def fake_tensor_mode() -> Any:
    """Return a mode whose tensors have shapes and no values."""
    return private("torch._subclasses.fake_tensor", "FakeTensorMode")(allow_non_fake_inputs=True)


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape and no values."""
    return tensor.is_meta or isinstance(tensor, private("torch._subclasses.fake_tensor", "FakeTensor"))


def fake_tensor_refusals() -> tuple[type[BaseException], ...]:
    """Return the errors by which fake tensors refuse what depends on values."""
    names = ("DynamicOutputShapeException", "DataDependentOutputException", "UnsupportedFakeTensorException")
    return tuple(private("torch._subclasses.fake_tensor", name) for name in names)


FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"
"""Name of the logger that fake tensors log their errors to."""


def reads_a_value(operation: Any) -> bool:
    """Return whether an operation hands a tensor's value to Python, as `item` does."""
    return operation is torch.ops.aten._local_scalar_dense.default
