"""Gradient and curvature of a loss within the memory there is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lightning_spectral.curvature import (
    Curvature,
    Curvatures,
    DifferentiableLoss,
    Gradients,
    HutchinsonTrace,
    LossProperties,
    check_method,
    measure_by,
)
from lightning_spectral.distributed.process_group import SingleProcess, assign_owners
from lightning_spectral.errors import MeasurementError, is_out_of_memory
from lightning_spectral.isolation.sandbox import release_memory
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.kronecker_factors import KroneckerResult, kronecker_factors
from lightning_spectral.measurement.objective import MicroBatch, NoSumError, Objective, joined
from lightning_spectral.numerics.power_law import noise_floor
from lightning_spectral.numerics.svd import SingularTriplets, singular_values, top_singular_triplets
from lightning_spectral.options import Options

MEMORY = 3.0
"""Peak memory of a measurement that is aimed at, in that of a training step on the same samples."""

TRIES = 3
"""How often to measure where memory runs out, each time with pieces half as large."""

NO_GRADIENT = (
    "the loss does not depend on it; a loss_fn must use the module it is given, checkpointing needs "
    "use_reentrant=False; layers of another loss are left out by layers=..."
)
"""Why a layer without a gradient in any process is not measured."""

FACTORS_TOO_LARGE = (
    "out of memory; measure fewer samples (max_samples), or fewer layers (layers): C_A and C_delta of a layer are "
    "matrices of its width, whatever top_k"
)
"""Why there are no Kronecker factors after `TRIES`."""


@dataclass(frozen=True, eq=False)
class RawMeasurement:
    """What was measured of a loss before anything is fitted.

    Attributes:
        triplets: layer name -> its gradient's, on the window of ``top_k``.
        spectra: layer name -> its gradient's leading singular values, ``spectrum_top_k`` of them.
        shorter: layer name -> why its ``spectra`` are those of the window alone, though more were asked for.
        curvatures: along the triplets above the noise floor.
        traces: draws of the trace of each layer's Hessian block; empty where none were asked for.
        failed: layer name -> why it has no curvatures.
        loss: its value.
        most: samples whose curvature was measured at once at most, that of the traces included.
    """

    triplets: dict[str, SingularTriplets]
    spectra: dict[str, Tensor]
    shorter: dict[str, str]
    curvatures: Curvatures
    traces: Curvatures
    failed: dict[str, str]
    loss: float
    most: int | None
    alignment: KroneckerResult = field(default_factory=lambda: KroneckerResult({}, {}))


def measure_within_memory(losses: Objective, options: Options, processes: SingleProcess) -> RawMeasurement:
    """Measure; where memory runs out, on pieces half as large, three tries in all.

    Args:
        losses: what to measure; of several processes, each has its part.
        options: of them, the curvature, the numbers of directions and draws, and ``micro_batch_size``, the samples at
            once; None: as many as `MEMORY` allows.
        processes: that measure together.

    Raises:
        MeasurementError: if memory ran out at every try.
    """
    most = options.micro_batch_size
    errors: list[str] = []
    while len(errors) < TRIES:
        try:
            return _measured(losses, options, most, processes)
        except Exception as error:
            if not is_out_of_memory(error):
                if errors and isinstance(error, MeasurementError):
                    raise MeasurementError(f"out of memory with {errors[0]}, and no smaller pieces: {error}") from None
                raise
            found = processes.all_gather_object((losses.in_use if losses.whole() else 0, losses.divisible))
            largest = _most([size for size, _ in found])
            errors.append(f"{largest or 'all'} samples at once")
        release_memory(losses.parameters.values())
        if largest is None or largest <= 1 or not all(divisible for _, divisible in found):
            break
        most = math.ceil(largest / 2)
    raise MeasurementError(
        f"out of memory with {', with '.join(errors)}; measure fewer samples (max_samples), fewer layers (layers), "
        "or set micro_batch_size"
    )


def _measured(losses: Objective, options: Options, most: int | None, processes: SingleProcess) -> RawMeasurement:
    """Gradient and curvature, on pieces of at most so many samples; None: as many as memory is likely to hold."""
    named = check_method(options.curvature)
    losses.in_use = losses.largest(losses.whole()) if most is None else most
    pieces = processes.call_everywhere(lambda: losses.whole() if most is None else losses.pieces(most), watched=True)
    in_one = len(pieces) == 1 and (most is not None or not losses.divisible)
    keep_graph = in_one and named is not None and named.differentiates_gradients
    # What talks to no other process here does not later: it is the same loss.
    gradients, loss, problem = processes.call_everywhere(
        lambda: losses.gradients(
            pieces, keep_graph=keep_graph, outputs=options.alignment and losses.samples is not None
        ),
        watched=True,
    )
    losses.casts |= {dtype for casts in processes.all_gather_object(losses.casts) for dtype in casts}
    spectra = _of_gradients(losses, gradients, options, processes)
    smallest = processes.call_everywhere(partial(_smallest, gradients))
    del gradients
    directions = processes.call_everywhere(lambda: _directions(losses, spectra.triplets))
    factored = KroneckerResult({}, {})
    if options.alignment:
        factored = _factored(losses, pieces, problem, directions, processes)

    def here(method: Curvature, directions: Mapping[str, SingularTriplets]) -> Curvatures | None:
        if problem is None:
            return None
        # Without a gradient to hold them against, pieces would go unchecked.
        smaller = [] if most is not None or smallest is None else _thrifty(losses, method)
        if smaller:
            problem.release()
            try:
                return losses.curvatures(method, smaller, directions, smallest)
            except NoSumError:
                return losses.curvatures(method, pieces, directions)
        if len(pieces) == 1 and keep_graph == method.differentiates_gradients:
            losses.in_use = losses.largest(pieces)
            return joined([method(problem, directions)], [pieces[0].weight])
        problem.release()
        return losses.curvatures(method, pieces, directions)

    def measure(method: Curvature, directions: Mapping[str, SingularTriplets] = directions) -> Curvatures:
        parts = processes.all_gather_object(processes.call_everywhere(lambda: here(method, directions)))
        found = [part for part in parts if part is not None]
        return joined(found, [1.0] * len(found))

    curvatures = measure_by(options.curvature, lambda: _outlook(problem, directions, processes), measure)
    at_once = [losses.in_use]
    traces = Curvatures({}, "")
    if options.curvature_fraction:
        measurable = {name: t for name, t in directions.items() if name not in curvatures.failed}
        try:
            traces = measure(HutchinsonTrace(options.curvature_fraction, curvatures.h), measurable)
            at_once.append(losses.in_use)
        except MeasurementError as error:
            traces = Curvatures({}, "", dict.fromkeys(measurable, str(error)))
    return RawMeasurement(
        triplets=spectra.triplets,
        spectra=spectra.values,
        shorter=spectra.shorter,
        curvatures=curvatures,
        traces=traces,
        failed=spectra.failed | curvatures.failed,
        loss=sum(processes.all_gather_object(loss)),
        most=max(
            (size for sizes in processes.all_gather_object(at_once) for size in sizes if size is not None), default=None
        ),
        alignment=factored,
    )


def _outlook(
    problem: DifferentiableLoss | None, directions: Mapping[str, SingularTriplets], processes: SingleProcess
) -> LossProperties:
    """What stands in the way of Gauss-Newton in any process, or else the same in all."""
    found = processes.all_gather_object(
        processes.call_everywhere(lambda: None if problem is None else LossProperties.of(problem, directions))
    )
    known = [outlook for outlook in found if outlook is not None]
    return max(known, key=lambda outlook: bool(outlook.obstacle))


def _factored(
    losses: Objective,
    pieces: list[MicroBatch],
    problem: DifferentiableLoss | None,
    directions: Mapping[str, SingularTriplets],
    processes: SingleProcess,
) -> KroneckerResult:
    """The Kronecker factors; where memory runs out, of pieces half as large, and in the end none: curvature goes on."""
    for _ in range(TRIES):
        try:
            return kronecker_factors(losses, pieces, problem, directions, processes)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if problem is not None:
            problem.release()
        release_memory(losses.parameters.values())
        found = processes.all_gather_object((losses.largest(pieces) if pieces else 0, losses.divisible))
        largest = _most([size for size, _ in found])
        if largest is None or largest <= 1 or not all(divisible for _, divisible in found):
            break
        most = math.ceil(largest / 2)
        try:
            pieces = processes.call_everywhere(partial(losses.pieces, most))
        except MeasurementError:
            break
        problem = losses.problem(pieces[0]) if pieces else None
    return KroneckerResult({}, dict.fromkeys(directions, FACTORS_TOO_LARGE))


def _most(sizes: Sequence[int | None]) -> int | None:
    """The largest; None where one is not known."""
    known = [size for size in sizes if size is not None]
    return max(known) if len(known) == len(sizes) else None


def _thrifty(losses: Objective, method: Curvature) -> list[MicroBatch]:
    """Pieces small enough for `MEMORY`; none where whole batches are, or the loss cannot be measured in pieces."""
    parts = math.ceil(method.memory / MEMORY)
    if parts == 1 or not losses.divisible:
        return []
    try:
        pieces = losses.pieces(math.ceil(max(size or 1 for size in losses.sizes) / parts))
    except NoSumError:
        return []
    return pieces if len(pieces) > len(losses.sizes) else []


def _smallest(gradients: Gradients) -> tuple[str, Tensor] | None:
    """The layer with the smallest gradient tensor that is not zero, and that gradient."""
    # Of what has gone to other processes nothing but zeros is left.
    found = {name: value.detach() for name, value in gradients.values.items() if value is not None and value.any()}
    return min(found.items(), key=lambda item: item[1].numel(), default=None)


@dataclass(frozen=True, eq=False)
class _Spectra:
    """Singular triplets and values of the gradients, and of which layers there are none, or fewer than asked for."""

    triplets: dict[str, SingularTriplets] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    shorter: dict[str, str] = field(default_factory=dict)


def _of_gradients(losses: Objective, gradients: Gradients, options: Options, processes: SingleProcess) -> _Spectra:
    """The spectra of the sums over all processes of these gradients, each layer's taken by one process."""
    layers, leaves, sums = losses.layers, losses.parameters, losses.sums
    there = {name: value.detach() for name, value in gradients.values.items() if value is not None}
    gone = {name for name in there if sums is not None and id(leaves[name]) in sums.taken}
    here = {name: value for name, value in there.items() if name not in gone}
    told = processes.all_gather_object((set(here), gone, gradients.failed))
    local, all_gone = (set().union(*(names[i] for names in told)) for i in (0, 1))
    failed = {n: why for some, others, reasons in told for n, why in reasons.items() if n not in some | others}
    present = (local | all_gone) - failed.keys()
    for name in layers.keys() - present - failed.keys():
        failed[name] = NO_GRADIENT
    costs = {name: layer.decomposition_cost for name, layer in layers.items() if name in present}
    owners = assign_owners(costs, processes.size) if sums is None else {n: sums.owners[id(leaves[n])] for n in costs}
    own = processes.call_everywhere(
        lambda: {name: layers[name].to_matrix(here[name]) for name in owners if name in here}
    )
    matrices = processes.reduce_to_owners(
        own,
        {name: owner for name, owner in owners.items() if name in local},
        lambda name: _zeros(layers[name], leaves[name]),
    )
    if sums is not None:
        for name in [name for name in owners if name in all_gone and owners[name] == processes.rank]:
            total = layers[name].to_matrix(sums.sums[id(leaves[name])])
            matrices[name] = matrices[name] + total if name in matrices else total
        sums.clear()
    mine = processes.call_everywhere(lambda: _decomposed(matrices, layers, options))
    others = processes.all_gather_object((mine.failed, mine.shorter))
    shared = processes.broadcast_from_owners(
        {name: [t.u, t.sigma, t.v, mine.values[name]] for name, t in mine.triplets.items()}, owners
    )
    return _Spectra(
        triplets={name: SingularTriplets(u, sigma, v) for name, (u, sigma, v, _) in shared.items()},
        values={name: values for name, (*_, values) in shared.items()},
        failed=_in_order(layers, failed, *(reasons for reasons, _ in others)),
        shorter=_in_order(layers, *(reasons for _, reasons in others)),
    )


def _zeros(layer: MatrixLayer, parameter: Tensor) -> Tensor:
    """In place of the gradient, as a matrix; of the parameter no more than the shape is looked at."""
    shape = layer.to_matrix(torch.empty_like(parameter, device="meta"))
    return torch.zeros_like(shape, device=parameter.device)


def _in_order(layers: Mapping[str, MatrixLayer], *reasons: Mapping[str, str]) -> dict[str, str]:
    merged = {name: why for some in reasons for name, why in some.items()}
    return {name: merged[name] for name in layers if name in merged}


def _decomposed(matrices: Mapping[str, Tensor], layers: Mapping[str, MatrixLayer], options: Options) -> _Spectra:
    found = _Spectra()
    for name, matrix in matrices.items():
        layer = layers[name]
        try:
            triplets = top_singular_triplets(matrix, options.top_k, groups=layer.groups)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            found.failed[name] = f"its gradient has no singular values: {error}"
            continue
        found.triplets[name], found.values[name] = triplets, triplets.sigma
        try:
            found.values[name] = _spectrum(matrix, layer, triplets.sigma, options)
        except (RuntimeError, MemoryError) as error:
            # Smaller pieces would not help: the matrix is as large as it is.
            found.shorter[name] = (
                f"only the {len(triplets)} singular values of the window ({type(error).__name__}: {error})"
            )
    return found


def _spectrum(matrix: Tensor, layer: MatrixLayer, sigma: Tensor, options: Options) -> Tensor:
    """The ``spectrum_top_k`` leading singular values, of which those of the window, sigma, are known."""
    k = options.spectrum_top_k or options.top_k
    # A window that is not full holds all there are.
    if k == options.top_k or len(sigma) < options.top_k:
        return sigma
    values = singular_values(matrix, groups=layer.groups)
    return torch.cat([sigma, values[len(sigma) : k].to(sigma)])


def _directions(losses: Objective, triplets: Mapping[str, SingularTriplets]) -> dict[str, SingularTriplets]:
    """Those above the noise floor, of the layers that have any."""
    usable = {name: t.first(_usable(losses, name, t)) for name, t in triplets.items()}
    return {name: t for name, t in usable.items() if len(t)}


def _usable(losses: Objective, name: str, triplets: SingularTriplets) -> int:
    """How many directions lie above the noise floor: no product is spent on rounding noise."""
    layer = losses.layers[name]
    return int((triplets.sigma > noise_floor(triplets.sigma, layer.shape, layer.groups, losses.eps(name))).sum())
