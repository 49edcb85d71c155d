"""What can be told of a loss from its graph, before any value of it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_spectral.curvature.autograd_graph import Dependence
from lightning_spectral.curvature.custom_functions import custom_functions
from lightning_spectral.curvature.graph_kinds import graph_kinds
from lightning_spectral.curvature.ports import sample_layouts
from lightning_spectral.curvature.problem import DifferentiableLoss, scalar_loss
from lightning_spectral.curvature.sample_search import ROWS_UNKNOWN
from lightning_spectral.curvature.seen_layers import see_layers
from lightning_spectral.curvature.selection import LossProperties, choose
from lightning_spectral.layers.kinds import Kind


class FakeLoss(DifferentiableLoss):
    """A problem whose loss has a graph and no value, as on fake tensors."""

    def checked(self, value: Any) -> Tensor:
        """Return it if it is a scalar with a gradient."""
        return scalar_loss(value)


@dataclass(frozen=True)
class Structure:
    """Properties of a loss's graph that decide between curvature methods.

    Attributes:
        unreached: the layers that the loss does not depend on.
        apart: layers that cannot be moved at their outputs -> why; `ggn` and `sketch` measure them by double backward.
        rows: layer name -> rows of its output, samples times positions.
        traced_bytes: bytes of the layers' outputs, in the dtype of the copy.
        loss: its properties, of one direction per layer.
        custom: custom autograd functions, which stand in the way of a sketch.
        kinds: layer name -> its kind by the graph, of those that nothing else tells.
    """

    unreached: tuple[str, ...]
    apart: Mapping[str, str]
    rows: Mapping[str, int]
    traced_bytes: int
    loss: LossProperties
    custom: tuple[str, ...]
    kinds: Mapping[str, Kind]

    def properties(self, directions: Mapping[str, int], samples: int | None) -> LossProperties:
        """Return the loss's properties for so many directions of each layer, and samples in all."""
        windows = tuple(k for name, k in directions.items() if name not in self.apart)
        unseen = sum(k for name, k in directions.items() if name in self.apart)
        return replace(self.loss, windows=windows, unseen=unseen, samples=samples)

    def choice(self, directions: Mapping[str, int], samples: int | None) -> tuple[str, str]:
        """Return what "auto" falls on, and why, as far as no value speaks against it."""
        choices = choose(self.properties(directions, samples))
        if choices[0][0] == "sketch" and self.custom:
            return "exact", f"{choices[-1][1]}; no sketch: custom functions ({', '.join(self.custom)})"
        return choices[0]


def structure(problem: DifferentiableLoss) -> Structure:
    """Read the graph of a problem that has been run."""
    root = problem.value.grad_fn
    assert root is not None
    dependence = Dependence(root, {id(leaf) for leaf in problem.parameters.values()})
    reached = dependence.masks[root]
    names = [name for name, leaf in problem.parameters.items() if dependence.bits[id(leaf)] & reached]
    seen = see_layers(problem, names)
    apart = dict(seen.unseen)
    rows = {}
    for name, calls in seen.calls.items():
        if problem.samples and not all(any(sample_layouts(call.lead, problem.samples)) for call in calls):
            apart[name] = ROWS_UNKNOWN
        rows[name] = sum(call.output.numel() // max(call.width, 1) for call in calls)
    return Structure(
        tuple(name for name in problem.parameters if name not in names),
        apart,
        rows,
        problem.traced_bytes,
        LossProperties.seen(seen, dict.fromkeys(names, 1), problem),
        tuple(custom_functions(problem.value)),
        graph_kinds(problem),
    )
