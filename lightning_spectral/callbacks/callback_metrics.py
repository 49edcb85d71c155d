"""What probes logged last, where EarlyStopping, ModelCheckpoint and plateau schedulers look for a `monitor`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


class CallbackMetrics:
    """Keep the last value of each key, and hold it in `trainer.callback_metrics`.

    A value that is NaN is left out, and the one before it stays: EarlyStopping ends training at a NaN, and a probe that
    fails must not. A key without a value yet is not there.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def write(self, trainer: Any, scalars: Mapping[str, float]) -> None:
        """Hold what a probe logged."""
        self.values |= {key: value for key, value in scalars.items() if math.isfinite(value)}
        self.publish(trainer)

    def publish(self, trainer: Any) -> None:
        """Hold what there is, also in a run that resumes and has yet to probe."""
        # `LightningModule.log` would do, were it allowed before the first batch of a resumed run, too.
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self.values.items()})
