"""Callbacks for Trainers of `lightning.pytorch` and `pytorch_lightning`."""

from lightning_spectral.callbacks.probe import SpectralProbe
from lightning_spectral.callbacks.swap import SwapOptimizer

__all__ = ["SpectralProbe", "SwapOptimizer"]
