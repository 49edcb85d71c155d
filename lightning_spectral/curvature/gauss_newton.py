"""Gauss-Newton curvature of all layers and directions at once, from backward passes of the network's output.

The Gauss-Newton matrix of one layer is J^T (d2L / dz2) J, J the Jacobian of the output z in its weights. It equals the
Hessian block where the network is piecewise linear in that layer's weights: convolutions, linear layers, ReLU, pooling,
BatchNorm in eval mode. With a square root S of the output Hessian,

    h_k = sum_b sum_c (sum_p (u_k^T r_bcp)(v_k^T a_bp))^2,

r the backward pass of column c of S to the layer's output, p its positions, a its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.curvature.autograd_graph import LINEAR, PIECEWISE, Dependence, named
from lightning_spectral.curvature.forward_recorder import LossCall
from lightning_spectral.curvature.layer_taps import (
    REMEDY,
    Tap,
    check_samples_apart,
    groups_of,
    half_of,
    measured_exactly,
    tapped,
)
from lightning_spectral.curvature.output_hessian import OutputHessian, output_hessian
from lightning_spectral.curvature.problem import Curvatures, DifferentiableLoss, accumulation_dtype
from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.svd import SingularTriplets

EXACT_COLUMNS = 64
"""Up to how many columns per sample the output Hessian is taken exactly: a backward pass each."""

RANDOM_COLUMNS = 20
"""Random columns beyond that; each h_k then has a relative standard error of about sqrt(2 / (columns * samples))."""


@dataclass(frozen=True)
class GGNCurvature:
    """h_k of the Gauss-Newton matrix: exact columns for few outputs, random ones with standard errors for many.

    Layers that are not applied exactly once as a linear layer or convolution are measured by double backward.

    Args:
        exact_columns: columns per sample up to which all are taken.
        random_columns: how many random ones otherwise, at least 2.
        seed: of the random signs.

    Raises:
        MeasurementError: when called, if the loss or the samples cannot be told apart in the network's output.
    """

    exact_columns: int = EXACT_COLUMNS
    random_columns: int = RANDOM_COLUMNS
    seed: int = 0
    name: str = "ggn"
    differentiates_gradients: bool = False
    memory: float = 2.7

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure all layers that can be tapped together, and the rest one by one."""
        problem.run()
        outputs = output_hessians(problem)
        taps, rest = tapped(problem, directions)
        if not taps:
            return measured_exactly(problem, directions, rest)
        met = set().union(*(_layers_reached(output, taps) for output in outputs))
        # A layer with a gradient but no way from the output to it would have a curvature of zero.
        apart = [name for name in taps if name not in met]
        rest |= dict.fromkeys(apart, "the backward pass from the network's output does not meet its own")
        exact = measured_exactly(problem, directions, rest)
        taps = {name: tap for name, tap in taps.items() if name not in rest}
        if not taps:
            return exact
        # Pieces of a batch draw signs of their own, so that their errors average out.
        seed = self.seed + (problem.place.first if problem.place else 0)
        h, stderr = self._measure(outputs, taps, directions, seed)
        return Curvatures(h | exact.h, self.name, exact.failed, stderr, exact.methods, exact.notes)

    def _measure(
        self, outputs: list[OutputHessian], taps: dict[str, Tap], directions: Mapping[str, SingularTriplets], seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        right = {
            name: tap.right(directions[name].v, groups_of(tap.layer, directions[name])) for name, tap in taps.items()
        }
        h = {name: torch.zeros(len(directions[name]), dtype=torch.float64) for name in taps}
        variance = {name: torch.zeros_like(value) for name, value in h.items()}
        sampled = False
        for output in outputs:
            exact = output.columns <= self.exact_columns
            sampled |= not exact
            squares = {name: _Moments() for name in taps}
            for column in self._columns(output, exact, seed):
                r = torch.autograd.grad(
                    output.output, [t.edge for t in taps.values()], column, retain_graph=True, allow_unused=True
                )
                for (name, tap), r_l in zip(taps.items(), r, strict=True):
                    if r_l is not None:
                        t_bk = (tap.left(r_l, directions[name].u) * right[name]).sum(2, dtype=accumulation_dtype(r_l))
                        squares[name].add(t_bk.square())
            for name, moments in squares.items():
                if moments.count:
                    h[name] += moments.total().cpu() if exact else moments.mean().cpu()
                    variance[name] += 0.0 if exact else moments.variance_of_mean().cpu()
        return h, {name: value.sqrt() for name, value in variance.items()} if sampled else {}

    def _columns(self, output: OutputHessian, exact: bool, seed: int) -> Iterator[Tensor]:
        if exact:
            yield from output.exact()
            return
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.random_columns):
            yield output.random(generator)


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
        return (self.deviations / (self.count - 1)).sum(0) / self.count


def output_hessians(problem: DifferentiableLoss) -> list[OutputHessian]:
    """Return the output Hessian of every known loss that the measured one is made of.

    Raises:
        MeasurementError: as in `known_losses` and `output_hessian`.
    """
    used, samples = known_losses(problem), problem.samples
    assert samples is not None
    weights = torch.autograd.grad(problem.value, [call.output for call in used], retain_graph=True)
    return [output_hessian(call, weight, samples) for call, weight in zip(used, weights, strict=True)]


def known_losses(problem: DifferentiableLoss) -> list[LossCall]:
    """Return the calls of known losses that the measured one is made of; read from its graph, and from no value.

    Raises:
        MeasurementError: if there is none, or the measured loss holds more than a linear combination of them.
    """
    calls = problem.trace.losses
    if problem.samples is None:
        raise MeasurementError(
            f"the tensors of the batch share no leading dimension, so samples cannot be told apart; {REMEDY}"
        )
    if not calls:
        raise MeasurementError(
            "no call of cross_entropy, binary_cross_entropy_with_logits or mse_loss was seen in the loss; "
            f"compute it with one of these, or {REMEDY}"
        )
    leaves = {id(leaf) for leaf in problem.parameters.values()}
    root, stops = problem.value.grad_fn, [call.output.grad_fn for call in calls]
    assert root is not None
    dependence = Dependence(root, leaves, [stop for stop in stops if stop is not None])
    if beside := dependence.leaves_in(dependence.masks[root]):
        names = [name for name, leaf in problem.parameters.items() if id(leaf) in beside]
        raise MeasurementError(f"the loss has a term of {', '.join(names[:3])} beside the known losses; {REMEDY}")
    if obstacles := dependence.obstacles(LINEAR):
        raise MeasurementError(f"the loss is no linear combination of known losses ({named(obstacles)}); {REMEDY}")
    return [call for call in calls if call.output.grad_fn in dependence.masks]


def half_alone(output: OutputHessian, taps: Mapping[str, Tap]) -> dict[str, Tensor | None]:
    """Return the backward pass of random weights on the output of half of the samples, per layer."""
    shape = output.output.shape
    rows = half_of(output.samples).repeat_interleave(shape[0] // output.samples)
    seed = 1 + torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(output.output)
    seed[~rows.to(seed.device)] = 0
    z = [tap.edge for tap in taps.values()]
    return dict(
        zip(taps, torch.autograd.grad(output.output, z, seed, retain_graph=True, allow_unused=True), strict=True)
    )


def _layers_reached(output: OutputHessian, taps: Mapping[str, Tap]) -> set[str]:
    """Return the layers that a backward pass from this output reaches, after checking that it keeps samples apart."""
    moved = half_alone(output, taps)
    check_samples_apart(taps, moved)
    return {name for name, r in moved.items() if r is not None}


def not_piecewise_linear(problem: DifferentiableLoss, outputs: Iterable[Tensor], names: Iterable[str]) -> str:
    """Return which operations between these layers and the output are not piecewise linear; empty if there is none."""
    leaves = {id(problem.parameters[name]) for name in names}
    obstacles: dict[str, int] = {}
    for output in outputs:
        if output.grad_fn is not None:
            obstacles |= Dependence(output.grad_fn, leaves).obstacles(LINEAR | PIECEWISE)
    return named(obstacles)
