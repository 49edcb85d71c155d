"""Write one probe to a logger: W&B, TensorBoard, MLflow, CSV files or any other.

Loggers are recognised by the names of their classes, of either Lightning package. A tracker's own package is imported
where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_spectral.report.trackers.tracker import CSVTracker, MLFlowTracker, Row, TensorBoardTracker, Tracker
from lightning_spectral.report.trackers.wandb_tracker import WandbTracker, offline_wandb_run

__all__ = ["Row", "Tracker", "offline_wandb_run", "tracker_of"]

_TRACKERS: dict[str, type[Tracker]] = {
    "WandbLogger": WandbTracker,
    "TensorBoardLogger": TensorBoardTracker,
    "MLFlowLogger": MLFlowTracker,
    "CSVLogger": CSVTracker,
}


def tracker_of(logger: Any, warn: Callable[[str], None]) -> Tracker:
    """Return the tracker of a Trainer's logger."""
    names = [base.__name__ for base in type(logger).__mro__]
    return next((_TRACKERS[name] for name in names if name in _TRACKERS), Tracker)(logger, warn)
