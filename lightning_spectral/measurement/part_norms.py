"""Squared norms of one part of the gradients, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.curvature import accumulation_dtype
from lightning_spectral.layers.matrices import MatrixLayer


@dataclass(frozen=True)
class SquaredNorms:
    """Share of all samples that a part is of, and |c|^2 of its term of the gradient, by layer."""

    share: float
    of_layers: Mapping[str, float]


class PartNorms:
    """Squared norms of the gradients of one micro-batch, left on their device until all are computed.

    Args:
        share: of all samples that the micro-batch holds.
        layers: matrices to differentiate in.
        parameters: layer name -> the leaf that holds its matrix.
    """

    def __init__(self, share: float, layers: Mapping[str, MatrixLayer], parameters: Mapping[str, Tensor]) -> None:
        self._share, self._layers, self._parameters = share, layers, parameters
        self._norms: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor | None, weight: float = 1.0) -> None:
        """Take weight times a layer's gradient, in its parameter's shape; None is zero."""
        if gradient is not None:
            matrix = self._layers[name].to_matrix(gradient)
            self._norms[name] = weight * torch.linalg.vector_norm(matrix, dtype=accumulation_dtype(matrix))

    def add_leaf(self, leaf: Tensor, gradient: Tensor) -> None:
        """Take the gradient in a leaf, of every layer that it holds."""
        for name, parameter in self._parameters.items():
            if parameter is leaf:
                self.add(name, gradient)

    def squared_norms(self, weight: float = 1.0) -> SquaredNorms:
        """Return the squared norms of weight times the gradients."""
        by_device: dict[torch.device, list[str]] = {}
        for name, norm in self._norms.items():
            by_device.setdefault(norm.device, []).append(name)
        values: dict[str, float] = {}
        for names in by_device.values():
            norms = torch.stack([self._norms[name] for name in names]).tolist()
            values |= {name: (weight * norm) ** 2 for name, norm in zip(names, norms, strict=True)}
        return SquaredNorms(self._share, {name: values.get(name, 0.0) for name in self._layers})
