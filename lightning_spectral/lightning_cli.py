"""A LightningCLI of either Lightning package that gives an optimizer the model's groups."""

from lightning_spectral.callbacks import SpectralProbe, SwapOptimizer
from lightning_spectral.cli.lightning import NamedGroups, spectral_cli
from lightning_spectral.optim.spectral_newton import SpectralNewton

__all__ = ["NamedGroups", "SpectralNewton", "SpectralProbe", "SwapOptimizer", "spectral_cli"]
