"""The command `lightning-spectral`."""

from lightning_spectral.cli.commands import main

__all__ = ["main"]
