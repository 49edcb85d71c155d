"""What every curvature method is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lightning_spectral.errors import MeasurementError
from lightning_spectral.layers import MatrixLayer
from lightning_spectral.loss import checked_loss
from lightning_spectral.svd import SingularTriplets


class Problem:
    """One loss of one network on one batch, differentiated at most once.

    Args:
        evaluate: computes the loss.
        layers: the matrices in question.
        parameters: layer name -> the leaf that holds its matrix; parts of a fused projection share one.
    """

    def __init__(
        self, evaluate: Callable[[], Tensor], layers: Mapping[str, MatrixLayer], parameters: Mapping[str, Tensor]
    ) -> None:
        self.evaluate = evaluate
        self.layers = layers
        self.parameters = parameters
        self._gradients: dict[str, Tensor | None] | None = None
        self._loss: float | None = None

    def gradients(self, *, keep_graph: bool) -> dict[str, Tensor | None]:
        """Layer name -> gradient in the parameter's shape; None where the loss does not depend on it.

        With keep_graph they can be differentiated again.
        """
        if self._gradients is None:
            loss = checked_loss(self.evaluate())
            self._loss = float(loss.detach())
            leaves = {id(leaf): leaf for leaf in self.parameters.values()}
            try:
                values = torch.autograd.grad(loss, list(leaves.values()), create_graph=keep_graph, allow_unused=True)
            except RuntimeError as error:
                raise MeasurementError(f"the gradient of the loss cannot be computed: {_first_line(error)}") from error
            by_leaf = dict(zip(leaves, values, strict=True))
            self._gradients = {name: by_leaf[id(leaf)] for name, leaf in self.parameters.items()}
        return self._gradients

    @property
    def loss(self) -> float:
        """The value of the loss."""
        if self._loss is None:
            raise MeasurementError("the loss is known once the gradients are")
        return self._loss


@dataclass(frozen=True, eq=False)
class Curvatures:
    """What a method measured.

    Attributes:
        h: layer name -> (K,) curvatures in float64 on the CPU, NaN where ``failed``.
        failed: layer name -> why it could not be measured.
    """

    h: dict[str, Tensor]
    failed: dict[str, str] = field(default_factory=dict)


class Curvature(Protocol):
    """A way to the curvatures of all layers along given directions."""

    name: str
    differentiates_gradients: bool
    """Whether `Problem.gradients` must keep its graph."""

    def __call__(self, problem: Problem, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure h_k for each layer in ``directions``, for each of its triplets."""
        ...


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
