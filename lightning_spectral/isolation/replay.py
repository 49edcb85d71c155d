"""A loss that can be computed again: the same state before each call, and the same value after it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.attention import MathAttention
from lightning_spectral.isolation.interrupts import function_mode
from lightning_spectral.isolation.rng import RandomStates

UNINITIALIZED = (nn.UninitializedParameter, nn.UninitializedBuffer)


class InitialState:
    """Snapshot of weights, buffers and random states, restored before each evaluation of a loss.

    Args:
        module: on whose weights and buffers a step may write.
        originals: id of a weight -> the weight that it is a copy of, which nothing writes on meanwhile, and from which
            it is put back; None where ``restore`` does. Of the rest, and of buffers, a copy is kept.
        restore: puts back the weights that have no original here.
    """

    def __init__(
        self,
        module: nn.Module,
        originals: Mapping[int, Tensor | None] | None = None,
        restore: Callable[[], None] | None = None,
    ) -> None:
        self._random = RandomStates(module)
        copied_from = originals or {}
        tensors = [t for t in (*module.parameters(), *module.buffers()) if not isinstance(t, UNINITIALIZED)]
        self._tensors = [t for t in tensors if copied_from.get(id(t), t) is not None]
        self._values = [_value(t, copied_from.get(id(t))) for t in self._tensors]
        self._restore = restore
        self._called = False
        self.dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}

    def restore(self) -> None:
        """Restore everything. Weights through .data, so that graphs of earlier calls stay valid."""
        self._random.restore()
        if self._called:
            if self._restore is not None:
                self._restore()
            for tensor, value in zip(self._tensors, self._values, strict=True):
                tensor.data.copy_(value)
        self._called = True

    def replaced(self, values: Mapping[int, Tensor]) -> InitialState:
        """Return the state with other values of some weights and buffers, by their ids; nothing may write on them."""
        other = copy.copy(self)
        other._values = [values.get(id(t), value) for t, value in zip(self._tensors, self._values, strict=True)]
        # The tensors do not hold the values yet.
        other._called = True
        return other


def _value(tensor: Tensor, original: Tensor | None) -> Tensor:
    return tensor.detach().clone() if original is None else original.detach()


class ReplayedLoss:
    """Loss of one batch that starts from the same state at each call, and must have the same value.

    Args:
        loss: batch -> its loss.
        batch: gives the batch, anew for each call.
        initial_state: restored before each call.
        values: of the loss, so far; each call adds one.
    """

    def __init__(
        self,
        loss: Callable[[Any], Any],
        batch: Callable[[], Any],
        initial_state: InitialState,
        values: list[float],
    ) -> None:
        self._loss, self._batch, self._initial_state, self._values = loss, batch, initial_state, values

    def __call__(self) -> Any:
        """Compute the loss.

        Raises:
            MeasurementError: if the value is another one than at the first call.
        """
        self._initial_state.restore()
        # Around the user's code alone: every operation would pass the mode.
        with function_mode(MathAttention()):
            loss, values = self._loss(self._batch()), self._values
        if isinstance(loss, Tensor) and loss.numel() == 1:
            values.append(float(loss.detach()))
            if not math.isclose(values[0], values[-1], rel_tol=1e-4, abs_tol=1e-12) and math.isfinite(values[0]):
                raise MeasurementError(
                    f"the loss is {values[-1]:.6g} at a second call on the same batch, after {values[0]:.6g}: it draws "
                    "from a generator of its own, or counts its calls; use curvature='exact' with micro_batch_size of "
                    "the whole batch, which calls it once"
                )
        return loss
