"""Curvature of all layers and directions at once from backward passes of the network's output: the columns method.

The Gauss-Newton matrix of one layer is J^T H J, J the Jacobian of z in its weights and H the Hessian of the head, all
that follows z, in z. It equals the Hessian block where the network below z is piecewise linear in that layer's weights:
convolutions, linear layers, ReLU, pooling, BatchNorm in eval mode. z is found by the graph, as near to the loss as
that holds. With y_bk = J_b d_k the output's change along direction k, and H = sum_c x_c x'_c^T,

    h_k = sum_b sum_c (x_bc^T y_bk)(x'_bc^T y_bk),

where one backward pass of x_c gives x_bc^T y_bk for all layers, samples and directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.curvature.direction_graph import DirectionGraph
from lightning_spectral.curvature.draws import PRIOR_COUNT, is_precise
from lightning_spectral.curvature.exact import measured_exactly, with_unseen
from lightning_spectral.curvature.head import Column, Head, parts_of
from lightning_spectral.curvature.ports import REMEDY
from lightning_spectral.curvature.problem import Curvatures, DifferentiableLoss
from lightning_spectral.curvature.sample_search import MovedNetwork, move_network, split_samples
from lightning_spectral.curvature.seen_layers import SeenLayers, see_layers
from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.svd import SingularTriplets

EXACT_COLUMNS = 20
"""Up to how many outputs per sample all eigenvectors of the head's Hessian are taken: a backward pass of each."""

SIGNED_COLUMNS = 64
"""The same where some eigenvalues are negative: random columns take two passes each, and are noisier."""

SPLIT_COLUMNS = 4
"""What it costs to tell the views of a sample apart, in backward passes."""

COUPLED_OUTPUTS = 128
"""Up to how many outputs per sample a head that couples samples is measured: a backward pass of each."""

LEAST_COLUMNS = 8
"""Random columns beyond that, at least; each h_k has a relative standard error of sqrt(2 / (columns * samples))."""

RANDOM_COLUMNS = 40
"""Random columns at most."""

TARGET_ERROR = 0.02
"""Standard error of alpha, from that of h, below which no further column is worth its time."""


@dataclass(frozen=True)
class GGNCurvature:
    """h_k of the Gauss-Newton matrix: exact columns for few outputs, random ones with standard errors for many.

    Layers that cannot be moved at their outputs are measured by double backward.

    Args:
        exact_columns: outputs per sample up to which all columns are taken.
        random_columns: how many random ones otherwise, at most.
        target_error: stop before that, once the standard error that h gives alpha is below it in the median layer.
        seed: of the random signs.
        as_hessian: refuse a network of which Gauss-Newton is not the Hessian.
        cheap: refuse a loss that couples samples over as many outputs as there are directions, or more.

    Raises:
        MeasurementError: when called, if samples interact within the network, or the batch does not tell their number.
    """

    exact_columns: int = EXACT_COLUMNS
    random_columns: int = RANDOM_COLUMNS
    target_error: float = TARGET_ERROR
    seed: int = 0
    as_hessian: bool = False
    cheap: bool = False
    name: str = "ggn"
    differentiates_gradients: bool = False
    memory: float = 2.7

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure all layers that can be moved together, and the others one by one."""
        problem.run()
        seen = see_layers(problem, directions)
        if not seen.calls:
            return measured_exactly(problem, directions, seen.unseen)
        if is_piecewise_linear(seen):
            zeros = _zeros({name: directions[name] for name in seen.calls})
            return with_unseen(problem, directions, seen.unseen, self.name, lambda: (zeros, {}))
        moved = move_network(problem, seen, directions, nearest=self.as_hessian)
        return with_unseen(problem, directions, moved.unseen, self.name, lambda: self._measure(moved, problem))

    def _measure(self, moved: MovedNetwork, problem: DifferentiableLoss) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        graph, head = moved.graph, moved.head
        if self.as_hessian and not moved.is_exact:
            raise MeasurementError("the samples cannot be told apart where the network stops being piecewise linear")
        if head.cut.is_nested:
            raise MeasurementError(f"the loss depends on what is inside the network, beside its output; {REMEDY}")
        if head.is_complex:
            raise MeasurementError(f"the network's output is complex; {REMEDY}")
        if head.is_flat:
            return _zeros(graph.triplets), {}
        apart = head.keeps_samples_apart()
        if self.cheap and not apart:
            refuse_dear_coupling(graph, head)
        few = head.outputs <= self.exact_columns or (head.outputs <= SIGNED_COLUMNS and head.is_indefinite())
        if few or not apart:
            return by_all_outputs(moved, apart), {}
        moments = {name: _Moments() for name in graph.names}
        # Micro-batches of a batch draw signs of their own, so that their errors average out.
        first, total = (problem.place.first, problem.place.total) if problem.place else (0, graph.samples)
        random = head.random_columns(torch.Generator().manual_seed(self.seed + first))
        for n, column in enumerate(random, 1):
            _add(moments, moved, column)
            if n < min(LEAST_COLUMNS, self.random_columns):
                continue
            h = {name: of_layer.mean().cpu() for name, of_layer in moments.items()}
            stderr = {name: of_layer.variance_of_mean().sqrt().cpu() for name, of_layer in moments.items()}
            if n >= self.random_columns or is_precise(
                graph.triplets, h, stderr, self.target_error, graph.samples / total
            ):
                break
        return h, stderr


def by_all_outputs(moved: MovedNetwork, apart: bool) -> dict[str, Tensor]:
    """Return (K,) h of every layer, without noise.

    By the head's eigenvectors; if it couples samples, or if that is cheaper, by its outputs.

    Args:
        apart: whether the head keeps samples apart.

    Raises:
        MeasurementError: if it does not, over more than `COUPLED_OUTPUTS`.
    """
    graph, head = moved.graph, moved.head
    columns = head.exact_columns() if apart else []
    passes = len(columns) if apart else head.outputs
    # A classifier's few columns are not worth a look.
    split = None if apart and passes <= EXACT_COLUMNS else split_samples(moved, passes - SPLIT_COLUMNS)
    if split is not None or not apart:
        return _through_head(*(split or (graph, head)))
    moments = {name: _Moments() for name in graph.names}
    for column in columns:
        _add(moments, moved, column)
    # Of a head without curvature there is no column.
    return _zeros(graph.triplets) | {name: x.total().cpu() for name, x in moments.items() if x.count}


def refuse_dear_coupling(graph: DirectionGraph, head: Head) -> None:
    """Raise MeasurementError for a head that couples samples over as many outputs as there are directions, or more."""
    passes = head.outputs // parts_of(head.shapes, graph.samples)
    if passes >= sum(map(len, graph.triplets.values())):
        raise MeasurementError(f"the loss couples samples, which takes {passes} backward passes")


def _through_head(graph: DirectionGraph, head: Head) -> dict[str, Tensor]:
    """Return h with y read off at each output, and y^T H y taken through the head, which may couple samples."""
    if head.outputs > COUPLED_OUTPUTS:
        raise MeasurementError(
            f"the loss couples samples over {head.outputs} outputs of each, more than {COUPLED_OUTPUTS}; {REMEDY}"
        )
    y: dict[str, list[Tensor]] = {name: [] for name in graph.names}
    for c in range(head.outputs):
        one = torch.zeros(graph.samples, head.outputs, device=head.device)
        one[:, c] = 1
        for name, t_bk in graph.columns(head.edges, head.as_outputs(one)).items():
            y[name].append(t_bk)
    h = {}
    for name in graph.names:
        y_bck = torch.stack(y.pop(name), 1)
        values = []
        for k in range(y_bck.shape[2]):
            bent = head.by_sample(head.product(head.as_outputs(y_bck[:, :, k])))
            values.append((y_bck[:, :, k] * bent.to(y_bck)).sum())
        h[name] = torch.stack(values).cpu().double()
    return h


def _zeros(directions: Mapping[str, SingularTriplets]) -> dict[str, Tensor]:
    return {name: torch.zeros(len(triplets), dtype=torch.float64) for name, triplets in directions.items()}


def is_piecewise_linear(seen: SeenLayers) -> bool:
    """Return whether the loss itself is piecewise linear in each layer, so that its Hessian is zero."""
    return bool(seen.calls) and not seen.cut.edges and len(seen.cut.inside) == len(seen.calls)


def _add(moments: Mapping[str, _Moments], moved: MovedNetwork, column: Column) -> None:
    edges = moved.head.edges
    first = moved.graph.columns(edges, column.x)
    second = first if column.partner is None else moved.graph.columns(edges, column.partner)
    for name, t_bk in first.items():
        product = t_bk * second[name]
        moments[name].add(product if column.sign is None else product * column.sign.to(product)[:, None])


class _Moments:
    """Sum and squared deviations over columns of per-sample values (B, K), summed over samples (Welford)."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, values_bk: Tensor) -> None:
        self.count += 1
        if self.count == 1:
            self.average, self.deviations = values_bk.clone(), torch.zeros_like(values_bk)
            return
        delta = values_bk - self.average
        self.average += delta / self.count
        self.deviations += delta * (values_bk - self.average)

    def total(self) -> Tensor:
        return self.average.sum(0) * self.count

    def mean(self) -> Tensor:
        return self.average.sum(0)

    def variance_of_mean(self) -> Tensor:
        """Return the variance of the mean; a guess of it, that of squares of normal values, is worth `PRIOR_COUNT`."""
        n = self.count
        guess, own = 2 * self.average.square().sum(0), self.deviations.sum(0)
        return (PRIOR_COUNT * guess + own) / (PRIOR_COUNT + n - 1) / n
