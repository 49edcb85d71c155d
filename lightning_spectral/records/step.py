"""`StepMeasurement`: what an optimizer's step was to do to the loss by its quadratic model, and what it did."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_spectral.records.log_keys import STEP_CURVATURE, STEP_KEYS, layer_key


@dataclass(frozen=True)
class StepMeasurement:
    """The update Delta of all trained parameters by an optimizer, on the batch of a probe.

    g and H are gradient and Hessian of the loss at the weights before the step. What cannot be measured is NaN.

    Attributes:
        slope: g . Delta.
        curvature: Delta^T H Delta.
        layer_curvatures: layer name -> Delta_l^T (H Delta)_l. With the parameters that belong to no layer they add up
            to ``curvature``.
        loss_before, loss_after: loss of the batch at the weights before and after the step; buffers are those before.
        failed: why slope and curvature are not known; empty if they are.
        notes: limits to what was measured.
        step: optimizer steps taken before it.
    """

    slope: float
    curvature: float
    layer_curvatures: Mapping[str, float]
    loss_before: float
    loss_after: float
    failed: str = ""
    notes: tuple[str, ...] = ()
    step: int | None = None

    @property
    def scale(self) -> float:
        """Factor eta* = -g . Delta / Delta^T H Delta on the step that would be best by the quadratic model.

        1 is the minimum along the step, above 1 a step too timid, below 1 one that overshoots. NaN where the curvature
        along the step is not positive, so that there is no minimum.

        >>> StepMeasurement(-2.0, 1.0, {}, 5.0, 3.5).scale
        2.0
        """
        return -self.slope / self.curvature if self.curvature > 0 else float("nan")

    @property
    def predicted_change(self) -> float:
        """Change of the loss by the quadratic model, g . Delta + 1/2 Delta^T H Delta."""
        return self.slope + self.curvature / 2

    @property
    def actual_change(self) -> float:
        """Change of the loss."""
        return self.loss_after - self.loss_before

    @property
    def shares(self) -> dict[str, float]:
        """Layer name -> its share of the curvature along the step; NaN where that is zero."""
        total = self.curvature or float("nan")
        return {name: value / total for name, value in self.layer_curvatures.items()}

    @property
    def rest(self) -> float:
        """Share of the parameters that belong to no layer that was measured."""
        return 1.0 - sum(self.shares.values()) if self.curvature else float("nan")

    def scalars(self, layers: Iterable[str] = ()) -> dict[str, float]:
        """Return the logged keys, without a prefix, with the shares of these layers; infinity becomes NaN."""
        values = dict(zip(STEP_KEYS, (self.scale, self.predicted_change, self.actual_change), strict=True))
        shares = self.shares
        values |= {layer_key(STEP_CURVATURE.name, name): shares[name] for name in layers if name in shares}
        return {key: value if math.isfinite(value) else float("nan") for key, value in values.items()}
