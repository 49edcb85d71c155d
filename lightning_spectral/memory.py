"""Gradient and curvature of a loss within the memory there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_spectral.curvature import (
    Curvature,
    Curvatures,
    Gradients,
    HutchinsonTrace,
    Problem,
    check_method,
    measure_by,
)
from lightning_spectral.errors import MeasurementError, is_out_of_memory
from lightning_spectral.factors import Factored, kronecker_factors
from lightning_spectral.fits import noise_floor
from lightning_spectral.layers import MatrixLayer
from lightning_spectral.options import Options
from lightning_spectral.pieces import Losses, NoSumError, Piece
from lightning_spectral.quiet import release_memory
from lightning_spectral.svd import SingularTriplets, singular_values, top_singular_triplets

MEMORY = 3.0
"""Peak memory of a measurement that is aimed at, in that of a training step on the same samples."""

TRIES = 3
"""How often to measure where memory runs out, each time with pieces half as large."""

FACTORS_TOO_LARGE = (
    "out of memory; measure fewer samples (max_samples), or fewer layers (layers): C_A and C_delta of a layer are "
    "matrices of its width, whatever top_k"
)
"""Why there are no Kronecker factors after `TRIES`."""


@dataclass(frozen=True, eq=False)
class Measured:
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
    alignment: Factored = field(default_factory=lambda: Factored({}, {}))


def measure_within_memory(losses: Losses, options: Options) -> Measured:
    """Measure; where memory runs out, on pieces half as large, three tries in all.

    Args:
        losses: what to measure.
        options: of them, the curvature, the numbers of directions and draws, and ``micro_batch_size``, the samples at
            once; None: as many as `MEMORY` allows.

    Raises:
        MeasurementError: if memory ran out at every try.
    """
    most = options.micro_batch_size
    errors: list[str] = []
    while len(errors) < TRIES:
        try:
            return _measured(losses, options, most)
        except Exception as error:
            if not is_out_of_memory(error):
                if errors and isinstance(error, MeasurementError):
                    raise MeasurementError(f"out of memory with {errors[0]}, and no smaller pieces: {error}") from None
                raise
            largest = losses.in_use
            errors.append(f"{largest or 'all'} samples at once")
        release_memory(losses.parameters.values())
        if largest is None or largest == 1 or not losses.divisible:
            break
        most = math.ceil(largest / 2)
    raise MeasurementError(
        f"out of memory with {', with '.join(errors)}; measure fewer samples (max_samples), fewer layers (layers), "
        "or set micro_batch_size"
    )


def _measured(losses: Losses, options: Options, most: int | None) -> Measured:
    """Gradient and curvature, on pieces of at most so many samples; None: as many as memory is likely to hold."""
    named = check_method(options.curvature)
    pieces = losses.whole() if most is None else losses.pieces(most)
    in_one = len(pieces) == 1 and (most is not None or not losses.divisible)
    keep_graph = in_one and named is not None and named.differentiates_gradients
    gradients, loss, problem = losses.gradients(
        pieces, keep_graph=keep_graph, outputs=options.alignment and losses.samples is not None
    )
    triplets, failed = _triplets(gradients, losses.layers, options)
    spectra, shorter = _spectra(gradients, triplets, losses.layers, options)
    smallest = _smallest(gradients)
    del gradients
    usable = {name: t.first(_usable(losses, name, t)) for name, t in triplets.items()}
    directions = {name: t for name, t in usable.items() if len(t)}
    factored = _factored(losses, pieces, problem, directions) if options.alignment else Factored({}, {})

    def measure(method: Curvature, directions: Mapping[str, SingularTriplets] = directions) -> Curvatures:
        smaller = [] if most is not None else _thrifty(losses, method)
        if smaller:
            problem.release()
            try:
                return losses.curvatures(method, smaller, directions, smallest)
            except NoSumError:
                return losses.curvatures(method, pieces, directions)
        if len(pieces) == 1 and keep_graph == method.differentiates_gradients:
            losses.in_use = losses.largest(pieces)
            return method(problem, directions)
        problem.release()
        return losses.curvatures(method, pieces, directions)

    curvatures = measure_by(options.curvature, problem, directions, measure)
    at_once = [losses.in_use]
    traces = Curvatures({}, "")
    if options.curvature_fraction:
        measurable = {name: t for name, t in directions.items() if name not in curvatures.failed}
        try:
            traces = measure(HutchinsonTrace(options.curvature_fraction, curvatures.h), measurable)
            at_once.append(losses.in_use)
        except MeasurementError as error:
            traces = Curvatures({}, "", dict.fromkeys(measurable, str(error)))
    failed |= curvatures.failed
    largest = max((size for size in at_once if size is not None), default=None)
    return Measured(triplets, spectra, shorter, curvatures, traces, failed, loss, largest, factored)


def _factored(
    losses: Losses, pieces: list[Piece], problem: Problem, directions: Mapping[str, SingularTriplets]
) -> Factored:
    """The Kronecker factors; where memory runs out, of pieces half as large, and in the end none: curvature goes on."""
    for _ in range(TRIES):
        try:
            return kronecker_factors(losses, pieces, problem, directions)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        problem.release()
        release_memory(losses.parameters.values())
        largest = losses.largest(pieces)
        if largest is None or largest == 1 or not losses.divisible:
            break
        try:
            pieces = losses.pieces(math.ceil(largest / 2))
        except MeasurementError:
            break
        problem = losses.problem(pieces[0])
    return Factored({}, dict.fromkeys(directions, FACTORS_TOO_LARGE))


def _thrifty(losses: Losses, method: Curvature) -> list[Piece]:
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
    found = {name: value.detach() for name, value in gradients.values.items() if value is not None and value.any()}
    return min(found.items(), key=lambda item: item[1].numel(), default=None)


def _triplets(
    gradients: Gradients, layers: Mapping[str, MatrixLayer], options: Options
) -> tuple[dict[str, SingularTriplets], dict[str, str]]:
    """The triplets, and the layers that have none."""
    triplets, failed = {}, {}
    for name, gradient in gradients.values.items():
        layer = layers[name]
        if gradient is None and name in gradients.failed:
            failed[name] = gradients.failed[name]
            continue
        if gradient is None:
            failed[name] = (
                "the loss does not depend on it; a loss_fn must use the module it is given, "
                "checkpointing needs use_reentrant=False; layers of another loss are left out by layers=..."
            )
            continue
        try:
            matrix = layer.to_matrix(gradient.detach())
            triplets[name] = top_singular_triplets(matrix, options.top_k, groups=layer.groups)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            failed[name] = f"its gradient has no singular values: {error}"
    return triplets, failed


def _spectra(
    gradients: Gradients, triplets: Mapping[str, SingularTriplets], layers: Mapping[str, MatrixLayer], options: Options
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The ``spectrum_top_k`` leading singular values, and why some layers have those of their window alone."""
    spectra, shorter = {}, {}
    for name, gradient in gradients.values.items():
        if gradient is None or name not in triplets:
            continue
        sigma = triplets[name].sigma
        try:
            spectra[name] = _spectrum(gradient.detach(), layers[name], sigma, options)
        except (RuntimeError, MemoryError) as error:
            # Smaller pieces would not help: the matrix is as large as it is.
            spectra[name] = sigma
            shorter[name] = f"only the {len(sigma)} singular values of the window ({type(error).__name__}: {error})"
    return spectra, shorter


def _spectrum(gradient: Tensor, layer: MatrixLayer, sigma: Tensor, options: Options) -> Tensor:
    """The ``spectrum_top_k`` leading singular values, of which those of the window, sigma, are known."""
    k = options.spectrum_top_k or options.top_k
    # A window that is not full holds all there are.
    if k == options.top_k or len(sigma) < options.top_k:
        return sigma
    values = singular_values(layer.to_matrix(gradient), groups=layer.groups)
    return torch.cat([sigma, values[len(sigma) : k].to(sigma)])


def _usable(losses: Losses, name: str, triplets: SingularTriplets) -> int:
    """How many directions lie above the noise floor: no product is spent on rounding noise."""
    layer = losses.layers[name]
    return int((triplets.sigma > noise_floor(triplets.sigma, layer.shape, layer.groups, losses.eps(name))).sum())
