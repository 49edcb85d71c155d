"""Last values logged, where EarlyStopping, ModelCheckpoint and plateau schedulers look for a `monitor`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


class CallbackMetrics:
    """Keep the last value of each key, and publish it in `trainer.callback_metrics`.

    A NaN does not replace the value before it: EarlyStopping ends training at a NaN, and a probe that fails must not.
    A key that never had a value is absent.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def write(self, trainer: Any, scalars: Mapping[str, float]) -> None:
        """Keep and publish the scalars of a probe."""
        self.values |= {key: value for key, value in scalars.items() if math.isfinite(value)}
        self.publish(trainer)

    def publish(self, trainer: Any) -> None:
        """Publish the values, also in a resumed run that has yet to probe."""
        # `LightningModule.log` raises before the first batch of a resumed run.
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self.values.items()})
