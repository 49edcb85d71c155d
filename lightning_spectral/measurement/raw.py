"""Everything that was measured of an objective before anything is fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_spectral._messages import group_by_reason
from lightning_spectral.curvature import Curvatures
from lightning_spectral.errors import MeasurementError, SecondDerivativeError
from lightning_spectral.measurement.directions import Directions
from lightning_spectral.measurement.kronecker_factors import KroneckerResult


@dataclass(frozen=True, eq=False)
class RawMeasurement:
    """Measurement of an objective, the same on all ranks but for ``micro_batch_sizes``.

    Attributes:
        loss: value of the objective.
        directions: singular triplets of the gradients.
        curvatures: along the triplets above the noise floor.
        traces: draws of the trace of each layer's Hessian block; empty where none were asked for.
        factors: Kronecker factors; empty where they were not asked for.
        narrow_dtypes: half-precision types that the network casts to by itself.
        micro_batch_sizes: samples of the largest micro-batch of this rank, for the curvatures and for the traces.
        curvature_samples: samples that the curvatures are of; None where they cannot be counted.
        gradient_seconds: time that the gradients took.
        no_signal: why the sampling noise of the gradient is not known; empty where it is.
        notes: of the operations that the loss was computed with.
    """

    loss: float
    directions: Directions
    curvatures: Curvatures
    traces: Curvatures
    factors: KroneckerResult
    narrow_dtypes: frozenset[torch.dtype]
    micro_batch_sizes: tuple[int | None, ...]
    curvature_samples: int | None
    gradient_seconds: float
    no_signal: str = ""
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> dict[str, str]:
        """Layer name -> why it has no curvatures."""
        return self.directions.failed | self.curvatures.failed

    @property
    def precision_notes(self) -> list[str]:
        """Limits to the precision of the measurement."""
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.narrow_dtypes))
        return (
            [f"the network casts to {names} by itself, and nothing measured is more precise than that"] if names else []
        )

    def raise_if_nothing_measured(self, n_layers: int) -> None:
        """Raise the reasons if all of so many layers failed."""
        if len(self.failed) == n_layers > 0:
            error = SecondDerivativeError if self.curvatures.failed else MeasurementError
            raise error("; ".join(group_by_reason(self.failed)))
