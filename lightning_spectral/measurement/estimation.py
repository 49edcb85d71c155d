"""Curvature along directions, estimated jointly by all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_spectral.curvature import Curvature, Curvatures, DifferentiableLoss, HutchinsonTrace, LossProperties
from lightning_spectral.curvature.draws import noisy_layers
from lightning_spectral.curvature.exact import ExactCurvature
from lightning_spectral.curvature.ports import REMEDY
from lightning_spectral.curvature.selection import JOINT_PRODUCT, PRODUCT, CheckedGGN, check_method, choose
from lightning_spectral.curvature.sketch import SketchCurvature, sketch_products
from lightning_spectral.errors import MeasurementError
from lightning_spectral.measurement.micro_batches import MicroBatch, add_weighted
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.numerics.svd import SingularTriplets

MEMORY = 3.0
"""Peak memory of a measurement that is aimed at, in that of a training step on the same samples."""

SMALL_BYTES = 2**28
"""Memory that is used without cutting a batch for it: a smaller batch would take as long."""

SAME_GRADIENT = {torch.float32: 1e-3, torch.float64: 1e-7}
"""Relative tolerance for the gradients of micro-batches to add up to that of their batch, by compute dtype."""

CHOICES: dict[str, Callable[[], Curvature]] = {
    "ggn": CheckedGGN,
    "sketch": partial(SketchCurvature, cheap=True),
    "exact": ExactCurvature,
}
"""What "auto" chooses among."""

Window = Mapping[str, SingularTriplets]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An objective whose gradients are known, and by which micro-batches its curvature is measured.

    Attributes:
        first: loss of the first of them; None on a rank without samples.
        has_graph: whether the gradients of ``first`` can be differentiated again.
        narrow_dtypes: half-precision types that the network casts to.
        reference: a layer and the gradient of the objective in it, to which smaller micro-batches must add up; None:
            they must not be made smaller.
    """

    objective: Objective
    micro_batches: Sequence[MicroBatch]
    first: DifferentiableLoss | None
    has_graph: bool = False
    narrow_dtypes: frozenset[torch.dtype] = frozenset()
    reference: tuple[str, Tensor] | None = None

    def measure(self, method: Curvature, directions: Window) -> Curvatures:
        """Return the curvatures of the objective by one method, summed over all ranks.

        One micro-batch's graph at a time is in memory. A batch that would take more than `MEMORY` is cut, as long as
        the gradients of its parts add up to ``reference``.
        """
        with self.objective.group.step() as step:
            for micro_batches in self._cuts(method):
                parts, gradient = [], None
                for micro_batch, loss in self.objective.losses(micro_batches, self._first_for(method, micro_batches)):
                    parts.append(method(loss, directions))
                    if self.reference is not None and micro_batches is not self.micro_batches:
                        gradient = add_weighted(gradient, loss.gradient(self.reference[0]), micro_batch.weight)
                step.send(weighted_sum(parts, [micro_batch.weight for micro_batch in micro_batches]))
                if micro_batches is self.micro_batches or self._is_reference(gradient):
                    break
        of_ranks = [part for part in step.received if part is not None]
        return weighted_sum(of_ranks, [1.0] * len(of_ranks))

    def properties(self, directions: Window) -> LossProperties:
        """Return what stands in the way of Gauss-Newton on any rank, or else the properties that all ranks share."""
        with self.objective.group.step() as step:
            if self.first is not None:
                step.send(LossProperties.of(self.first, directions))
        of_ranks: list[LossProperties] = [properties for properties in step.received if properties is not None]
        return max(of_ranks, key=lambda properties: (bool(properties.obstacle), properties.outputs))

    def _cuts(self, method: Curvature) -> Iterator[Sequence[MicroBatch]]:
        """Yield the micro-batches to measure by: smaller ones where memory asks for them, then those there are."""
        if self.first is None:
            return
        is_small = self.first.traced_bytes * method.memory < SMALL_BYTES
        parts = 1 if is_small or self.reference is None else math.ceil(method.memory / MEMORY)
        if smaller := self.objective.split(parts):
            yield smaller
        yield self.micro_batches

    def _first_for(self, method: Curvature, micro_batches: Sequence[MicroBatch]) -> DifferentiableLoss | None:
        """Return the first loss, if a method can go on from its graph; else let go of that."""
        if self.first is None:
            return None
        is_first = micro_batches is self.micro_batches and len(micro_batches) == 1
        if is_first and self.has_graph == method.differentiates_gradients:
            return self.first
        self.first.release()
        return None

    def _is_reference(self, gradient: Tensor | None) -> bool:
        if self.reference is None:
            return True
        expected = self.reference[1]
        difference = expected if gradient is None else gradient - expected
        tolerance = SAME_GRADIENT[self.objective.compute_dtype(self.narrow_dtypes)]
        return float(difference.norm() / expected.norm()) <= tolerance


def wants_graph(method: str) -> bool:
    """Return whether the method of that name goes on from the graph of the gradients."""
    named = check_method(method)
    return named is not None and named.differentiates_gradients


def estimate_curvature(evaluation: Evaluation, directions: Window, method: str) -> Curvatures:
    """Return the curvatures along directions by the method of that name.

    "auto" is the cheapest by what the graph shows; where a method refuses, the next takes over. Layers whose alpha a
    sketch leaves in its noise are measured again by double backward, as long as that costs half of the sketch at most.
    """
    if (named := check_method(method)) is not None:
        return evaluation.measure(named, directions)
    properties = evaluation.properties(directions)
    refused = ""
    for name, why in choose(properties):
        try:
            curvatures = evaluation.measure(CHOICES[name](), directions)
        except MeasurementError as error:
            if name == ExactCurvature.name:
                raise
            refused += f"; no {name}: {str(error).removesuffix(f'; {REMEDY}')}"
            continue
        methods = {curvatures.methods.get(layer, name) for layer in curvatures.h}
        if name != ExactCurvature.name and methods == {ExactCurvature.name}:
            why = f"{ExactCurvature.name}: {properties.n_directions} products, as no layer could be measured by {name}"
        curvatures = replace(curvatures, chosen=why + refused)
        return _without_noise(evaluation, directions, curvatures, properties) if name == "sketch" else curvatures
    exact = evaluation.measure(ExactCurvature(), directions)
    return replace(exact, chosen=f"exact: {properties.n_directions} products{refused}")


def _without_noise(
    evaluation: Evaluation, directions: Window, curvatures: Curvatures, properties: LossProperties
) -> Curvatures:
    """Measure layers again whose alpha would be noise, where they are few."""
    noisy = [name for name in noisy_layers(directions, curvatures) if name not in curvatures.methods]
    noisy = [name for name in noisy if bool(curvatures.h[name].isfinite().any())]
    most = sketch_products(properties.windows, properties.samples)[1]
    affordable = JOINT_PRODUCT * most / PRODUCT / 2
    if not noisy or sum(len(directions[name]) for name in noisy) > affordable:
        return curvatures
    again = evaluation.measure(ExactCurvature(), {name: directions[name] for name in noisy})
    return replace(
        curvatures,
        h=curvatures.h | again.h,
        stderr={name: stderr for name, stderr in curvatures.stderr.items() if name not in again.h},
        failed=curvatures.failed | again.failed,
        methods=curvatures.methods | dict.fromkeys(again.h, ExactCurvature.name),
        notes=(*curvatures.notes, *again.notes),
        chosen=f"{curvatures.chosen}; layers again by exact, whose alpha was noise: {len(noisy)}",
    )


def estimate_trace(evaluation: Evaluation, directions: Window, curvatures: Curvatures, draws: int | None) -> Curvatures:
    """Return draws of the trace of the Hessian block of each layer that has curvatures."""
    if not draws:
        return Curvatures({}, "")
    measurable = {name: triplets for name, triplets in directions.items() if name not in curvatures.failed}
    try:
        return evaluation.measure(HutchinsonTrace(draws, curvatures.h), measurable)
    except MeasurementError as error:
        return Curvatures({}, "", dict.fromkeys(measurable, str(error)))


def weighted_sum(parts: Sequence[Curvatures], weights: Sequence[float]) -> Curvatures:
    """Return the curvatures of a weighted sum of losses."""
    if len(parts) == 1 and weights[0] == 1:
        return parts[0]
    failed = {name: why for part in parts for name, why in part.failed.items()}
    h: dict[str, Tensor] = {}
    variance: dict[str, Tensor] = {}
    methods: dict[str, dict[str, None]] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, h_k in part.h.items():
            h[name] = h.get(name, torch.zeros_like(h_k)) + weight * h_k
            methods.setdefault(name, {})[part.methods.get(name, part.method)] = None
        for name, stderr in part.stderr.items():
            variance[name] = variance.get(name, torch.zeros_like(stderr)) + (weight * stderr).square()
    errors = [part.check_error for part in parts if not math.isnan(part.check_error)]
    return Curvatures(
        h={name: torch.full_like(h_k, float("nan")) if name in failed else h_k for name, h_k in h.items()},
        method=parts[0].method,
        failed=failed,
        stderr={name: v.sqrt() for name, v in variance.items()},
        methods={name: "+".join(used) for name, used in methods.items()},
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        check_error=max(errors, default=float("nan")),
        chosen="; ".join(dict.fromkeys(part.chosen for part in parts if part.chosen)),
    )
