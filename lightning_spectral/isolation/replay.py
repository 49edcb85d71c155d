"""A loss that can be computed again: the same state before each call, and the same value after it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.errors import MeasurementError, first_line, is_out_of_memory, text_of
from lightning_spectral.isolation.batch_tree import batch_size
from lightning_spectral.isolation.devices import RandomStates
from lightning_spectral.isolation.held_state import UNINITIALIZED, Held, HeldState, put_back
from lightning_spectral.isolation.operations import MeasuredOperations


class InitialState:
    """Snapshot of weights, buffers, attributes and random states, restored before each evaluation of a loss.

    Attributes:
        operations: torch's functions, as each evaluation runs them.

    Args:
        module: on whose weights and buffers a step may write.
        originals: id of a weight -> the weight that it is a copy of, which nothing writes on meanwhile, and from which
            it is put back; None where ``restore`` does. Of the rest, and of buffers, a copy is kept.
        restore: puts back the weights that have no original here.
        held: what else a step may write on.
        raised: floating types that the copying of the module raised to higher ones.
    """

    def __init__(
        self,
        module: nn.Module,
        originals: Mapping[int, Tensor | None] | None = None,
        restore: Callable[[], None] | None = None,
        held: Sequence[Held] = (),
        raised: Iterable[torch.dtype] = (),
    ) -> None:
        self._random = RandomStates(module)
        copied_from = originals or {}
        tensors = [t for t in (*module.parameters(), *module.buffers()) if not isinstance(t, UNINITIALIZED)]
        self._tensors = [t for t in tensors if copied_from.get(id(t), t) is not None]
        originals_of = (copied_from.get(id(t)) for t in self._tensors)
        pairs = zip(self._tensors, originals_of, strict=True)
        self._values = [t.detach().clone() if original is None else original.detach() for t, original in pairs]
        self._restore = restore
        self.held = HeldState(held, map(id, (*module.parameters(), *module.buffers())))
        self.raised = frozenset(raised)
        self.operations = MeasuredOperations()
        self._called = False
        self.dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}

    def restore(self) -> None:
        """Restore everything. Weights through .data, so that graphs of earlier calls stay valid."""
        self._random.restore()
        if self._called:
            # First, since a step may have put others in the place of buffers.
            self.held.restore()
            if self._restore is not None:
                self._restore()
            for tensor, value in zip(self._tensors, self._values, strict=True):
                if not tensor.is_leaf and not isinstance(tensor, nn.Parameter):
                    tensor.detach_()
                put_back(tensor, value)
        self._called = True

    def random_states(self) -> list[Any]:
        """Return the states of the random generators after the last evaluation."""
        return self._random.now()

    def replaced(self, values: Mapping[int, Tensor]) -> InitialState:
        """Return the state with other values of some weights and buffers, by their ids; nothing may write on them."""
        other = copy.copy(self)
        other._values = [values.get(id(t), value) for t, value in zip(self._tensors, self._values, strict=True)]
        # The tensors do not hold the values yet.
        other._called = True
        return other


class ReplayedLoss:
    """Loss of one batch that starts from the same state at each call, and must have the same value.

    Args:
        values: of the loss, so far; each call adds one.
    """

    def __init__(
        self, loss: Callable[[Any], Any], batch: Callable[[], Any], initial_state: InitialState, values: list[float]
    ) -> None:
        self._loss, self._batch, self._initial_state, self._values = loss, batch, initial_state, values

    def __call__(self) -> Any:
        """Compute the loss.

        Raises:
            MeasurementError: if the value is another one than at the first call.
        """
        self._initial_state.restore()
        batch, values = self._batch(), self._values
        try:
            loss = self._initial_state.operations.run(self._loss, batch)
        except Exception as error:
            if not is_out_of_memory(error) and (cause := self._cause_of(error, batch)):
                raise MeasurementError(cause) from error
            raise
        if isinstance(loss, Tensor) and loss.numel() == 1:
            values.append(float(loss.detach()))
            if not math.isclose(values[0], values[-1], rel_tol=1e-4, abs_tol=1e-12) and math.isfinite(values[0]):
                raise MeasurementError(
                    f"the loss is {values[-1]:.6g} at a second call on the same batch, after {values[0]:.6g}, with all "
                    "that the model holds put back: it depends on something that changes outside of it, such as a "
                    "global, a counter of the loss function or an iterator; use curvature='exact' with "
                    "micro_batch_size of the whole batch, which calls it once, or keep it in an attribute of the model"
                )
        return loss

    def again(self, loss: Any) -> bool:
        """Return whether a loss is to be computed again, by operations that have the derivatives it needs."""
        if not self._initial_state.operations.compose_for(loss):
            return False
        self._values.clear()
        return True

    def value(self) -> None:
        """Compute the loss for its value alone: without a graph, unless it takes gradients of its own."""
        try:
            with torch.no_grad():
                self()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self()

    def _cause_of(self, error: Exception, batch: Any) -> str | None:
        """Return what a measurement does to a loss that makes it fail, and the remedy; None for another cause."""
        if isinstance(error, MeasurementError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        text, samples = text_of(error), batch_size(batch)
        raised = self._initial_state.raised
        if raised and DTYPE_ERROR.search(text):
            found = _scripted_line(text) or first_line(error)
            dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in raised))
            return (
                f"the loss fails on the copy of the model, of which tensors in {dtypes} are raised to a higher "
                f"precision ({found}); it holds or makes a tensor that this does not reach: write "
                ".to(weight.dtype) or .type_as(x) where it is used, or register it as a buffer"
            )
        numbers = set(map(int, re.findall(r"\d+", text)))
        for held in self._initial_state.held.tensors:
            shape = tuple(held.value.shape)
            if samples in numbers and any(size in numbers and size not in (1, samples) for size in shape):
                return (
                    f"{held.path}, a tensor {shape} that the model keeps between batches, does not fit {samples} "
                    f"samples ({first_line(error)}); measure whole batches, with max_samples=None and "
                    "micro_batch_size=None, or have the model drop it when the number of samples changes"
                )
        return None


DTYPE_ERROR = re.compile(r"\bdtype|scalar type|data type|BFloat16|Half\b|Double\b|Promot")


def _scripted_line(text: str) -> str:
    """Return what failed within `torch.jit.script`, and where, of an error that tells it last; else nothing."""
    if "TorchScript" not in text:
        return ""
    places = re.findall(r'File "(.+?)", line (\d+), in (\w+)', text)
    where = [f", in {name} of {file}:{line}, which torch.jit.script has compiled" for file, line, name in places[-1:]]
    return "".join([text.strip().splitlines()[-1], *where])
