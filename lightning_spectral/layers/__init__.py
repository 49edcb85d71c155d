"""Which parameters of a model are matrices, of what kind, and which of them a pattern selects."""

from lightning_spectral.layers.kinds import Kind
from lightning_spectral.layers.matrices import LayerSelection, LayerSet, MatrixLayer, find_layers

__all__ = ["Kind", "LayerSelection", "LayerSet", "MatrixLayer", "find_layers"]
