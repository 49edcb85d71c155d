"""Parameters of a model that are matrices: their kinds, names, and selection by pattern."""

from lightning_spectral.layers.kinds import Kind
from lightning_spectral.layers.matrices import LayerSelection, LayerSet, MatrixLayer, find_layers

__all__ = ["Kind", "LayerSelection", "LayerSet", "MatrixLayer", "find_layers"]
