"""Callbacks for Trainers of `lightning.pytorch` and `pytorch_lightning`."""

from lightning_spectral.callbacks.probe import SpectralProbe

__all__ = ["SpectralProbe"]
