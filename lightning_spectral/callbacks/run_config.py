"""Arguments of a probe as plain values, for the configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from lightning_spectral._version import __version__


def run_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a probe, and the version of this package, as values that JSON holds.

    >>> config = run_config({"top_k": 20, "layers": ("net.*",), "loss_fn": run_config, "batch": DataLoader([0, 1, 2])})
    >>> config.pop("version") == __version__
    True
    >>> config["layers"], config["loss_fn"], config["batch"]
    (['net.*'], 'lightning_spectral.callbacks.run_config.run_config', 'DataLoader, batch_size=1')
    """
    return {name: _plain(value) for name, value in arguments.items()} | {"version": __version__}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if isinstance(value, DataLoader):
        return f"{type(value).__name__}, batch_size={value.batch_size}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
