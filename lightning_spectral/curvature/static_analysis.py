"""What can be told of a loss from its graph, before any value of it is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_spectral.curvature.autograd_graph import Dependence
from lightning_spectral.curvature.custom_functions import custom_functions
from lightning_spectral.curvature.forward_recorder import Recorder
from lightning_spectral.curvature.gauss_newton import EXACT_COLUMNS, RANDOM_COLUMNS, known_losses
from lightning_spectral.curvature.layer_taps import tapped
from lightning_spectral.curvature.output_hessian import columns_of
from lightning_spectral.curvature.problem import DifferentiableLoss
from lightning_spectral.curvature.scalar_loss import scalar_loss
from lightning_spectral.curvature.selection import explain_gauss_newton, fallback_method, obstacle_to_gauss_newton
from lightning_spectral.errors import MeasurementError


class FakeLoss(DifferentiableLoss):
    """A problem whose loss has a graph and no value, as on fake tensors."""

    def run(self) -> None:
        """Compute the loss, if its graph is not known."""
        if self._value is None:
            with Recorder({id(leaf) for leaf in self.parameters.values()}) as recorder:
                loss = scalar_loss(self.evaluate())
            self._trace, self._value, self._loss = recorder.trace, loss, math.nan


@dataclass(frozen=True)
class Structure:
    """Properties of a loss's graph that decide between curvature methods.

    Attributes:
        unreached: the layers that the loss does not depend on.
        tapped: those that can be seen through their outputs.
        apart: the others -> why; `ggn` and `sketch` measure them by double backward.
        rows: layer name -> rows of its output, samples times positions.
        columns: per output of the network, the columns per sample of its Hessian.
        refusal: why there is no Gauss-Newton matrix; empty where there is one.
        obstacle: why it is not the Hessian, or not to be had exactly; empty if it is.
        custom: custom autograd functions, which stand in the way of a sketch.
    """

    unreached: tuple[str, ...]
    tapped: tuple[str, ...]
    apart: Mapping[str, str]
    rows: Mapping[str, int]
    columns: tuple[int, ...]
    refusal: str
    obstacle: str
    custom: tuple[str, ...]

    @property
    def passes(self) -> int:
        """Backward passes of `ggn`: a column each, random ones where there are too many."""
        return sum(columns if columns <= EXACT_COLUMNS else RANDOM_COLUMNS for columns in self.columns)

    def choice(self, samples: int | None) -> tuple[str, str]:
        """Return what "auto" falls on, and why, as far as no value speaks against it.

        Args:
            samples: in all.
        """
        if not self.obstacle:
            return "ggn", explain_gauss_newton(len(self.apart))
        method, why = fallback_method(self.obstacle, len(self.tapped), samples)
        if method == "sketch" and self.custom:
            return "exact", f"exact: {self.obstacle}, and no sketch: custom functions ({', '.join(self.custom)})"
        return method, why


def structure(problem: DifferentiableLoss) -> Structure:
    """Read the graph of a problem that has been run."""
    root = problem.value.grad_fn
    assert root is not None
    dependence = Dependence(root, {id(leaf) for leaf in problem.parameters.values()})
    reached = dependence.leaves_in(dependence.masks[root])
    names = [name for name, leaf in problem.parameters.items() if id(leaf) in reached]
    taps, apart = tapped(problem, names)
    rows = {
        name: call.output.numel() // call.output.shape[-1 if tap.channels_last else 1]
        for name, tap in taps.items()
        for call in [tap.call]
    }
    columns: tuple[int, ...] = ()
    refusal = obstacle = ""
    try:
        calls, samples = known_losses(problem), problem.samples or 1
        columns = tuple(columns_of(call, samples) for call in calls)
        obstacle = obstacle_to_gauss_newton(
            problem, list(zip([call.input for call in calls], columns, strict=True)), taps
        )
    except MeasurementError as error:
        refusal = obstacle = str(error)
    unreached = tuple(name for name in problem.parameters if name not in names)
    return Structure(
        unreached, tuple(taps), apart, rows, columns, refusal, obstacle, tuple(custom_functions(problem.value))
    )
