"""The loss of one or more batches, measured piece by piece so that one piece's graph at a time is in memory.

With L the loss of a batch and L_i those of its pieces, L = sum_i w_i L_i for a mean over samples (w_i the share of the
samples), a mean over targets that count (w_i their share) and a sum (w_i = 1). Gradient and curvature, linear in the
loss, are then sums with the same weights. Which of them holds is seen from the values of the losses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.curvature import (
    Curvature,
    Curvatures,
    DifferentiableLoss,
    Gradients,
    LossValue,
    SampleRange,
    loss_value,
)
from lightning_spectral.errors import MeasurementError, is_out_of_memory
from lightning_spectral.isolation.batch_tree import batch_size, divisible, take_samples
from lightning_spectral.isolation.sandbox import InitialState, repeatable
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.sharded.gradient_reduction import GradientReducer
from lightning_spectral.numerics.svd import SingularTriplets

ADDS_UP = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Relative difference up to which the losses of pieces add up to that of their batch, by what all is computed in.

Below it a term of the weights in a sum of losses, or one across samples, is taken for rounding. Its share of the
curvature may be much larger than its share of the loss.
"""

SPREAD = 1e-2
"""How far the losses of pieces must lie apart, relatively, for that to tell their weights to about 1e-3."""

SAME_GRADIENT = {torch.float32: 1e-3, torch.float64: 1e-7}
"""Relative difference up to which the gradients of pieces add up to that of their batch, likewise."""


class NoSumError(MeasurementError):
    """A loss that cannot be had as a sum of those of pieces of its batch."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples start to stop of one batch and the weight of their loss; stop is None for a batch that is not cut."""

    batch: int
    weight: float
    start: int = 0
    stop: int | None = None


class Objective:
    """The mean, weighted by samples, of the losses of batches.

    Args:
        loss: of a batch.
        batches: each is fetched when it is needed.
        layers: the matrices to differentiate in.
        parameters: layer name -> the leaf that holds its matrix.
        beginning: what each call of the loss starts from.
        sums: where gradients go that are summed over processes as they come; None: all stay.
    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Any],
        layers: Mapping[str, MatrixLayer],
        parameters: Mapping[str, Tensor],
        beginning: InitialState,
        sums: GradientReducer | None = None,
    ) -> None:
        self.loss, self.batches, self.beginning, self.sums = loss, batches, beginning, sums
        self.layers, self.parameters = layers, parameters
        self.sizes = [batch_size(batch) for batch in batches]
        self.divisible = all(divisible(batch) for batch, size in zip(batches, self.sizes, strict=True) if size != 0)
        self.among([self.sizes], 0)
        self.in_use: int | None = None
        self.casts: set[torch.dtype] = set()
        self._values: dict[tuple[int, int, int | None], list[float]] = defaultdict(list)

    def among(self, sizes: Sequence[Sequence[int | None]], rank: int) -> None:
        """Be a part of a larger loss, the mean over the batches of several processes.

        Args:
            sizes: the samples of each batch of each process.
            rank: which process this is.
        """
        self.all_sizes = [size for of_process in sizes for size in of_process]
        known = [size for size in self.all_sizes if size is not None]
        self.samples = sum(known) if len(known) == len(self.all_sizes) else None
        self._first = sum(size or 0 for of_process in sizes[:rank] for size in of_process)

    def whole(self) -> list[MicroBatch]:
        """A piece per batch, but for those without a sample."""
        even = 1 / sum(size != 0 for size in self.all_sizes) if any(size != 0 for size in self.all_sizes) else 0.0
        return [
            MicroBatch(i, even if self.samples is None or size is None else size / self.samples)
            for i, size in enumerate(self.sizes)
            if size != 0
        ]

    def pieces(self, most: int) -> list[MicroBatch]:
        """Pieces of nearly equal size, of at most so many samples.

        Raises:
            MeasurementError: if a batch cannot be cut.
            NoSumError: if its loss is no weighted sum of those of its pieces, or that cannot be told.
        """
        found: list[MicroBatch] = []
        for piece in self.whole():
            size = self.sizes[piece.batch]
            if size is None:
                take_samples(self.batches[piece.batch], most, option="micro_batch_size")
            if size is None or size <= most:
                found.append(piece)
                continue
            n = math.ceil(size / most)
            parts = list(pairwise(round(i * size / n) for i in range(n + 1)))
            for (start, stop), weight in zip(parts, self._weights(piece.batch, parts), strict=True):
                if weight:
                    found.append(MicroBatch(piece.batch, piece.weight * weight, start, stop))
        return found

    def largest(self, pieces: Sequence[MicroBatch]) -> int | None:
        """The samples of the largest of these pieces; None where a batch does not tell."""
        sizes = [self.sizes[p.batch] if p.stop is None else p.stop - p.start for p in pieces]
        known = [size for size in sizes if size is not None]
        return max(known, default=None) if len(known) == len(sizes) else None

    def problem(self, piece: MicroBatch) -> DifferentiableLoss:
        """The loss of one piece, to be differentiated."""
        samples = self.sizes[piece.batch] if piece.stop is None else piece.stop - piece.start
        place = None
        if self.samples is not None:
            before = sum(size or 0 for size in self.sizes[: piece.batch])
            place = SampleRange(self._first + before + piece.start, self.samples)
        return DifferentiableLoss(self._repeatable(piece), self.layers, self.parameters, samples, place)

    def gradients(
        self, pieces: Sequence[MicroBatch], *, keep_graph: bool, outputs: bool = False
    ) -> tuple[Gradients, float, DifferentiableLoss | None]:
        """The gradient of the loss, its value, and the problem of the first piece; None where there is no piece.

        With keep_graph, and one piece alone, the gradient can be differentiated again; else those that go to ``sums``
        hold nothing here. With ``outputs`` the problem
        holds its gradients in the layers' outputs, too, as far as they cost no backward pass of their own.
        """
        values: dict[str, Tensor | None] = {}
        failed: dict[str, str] = {}
        trusted: dict[str, str] = {}
        problem = None
        loss = 0.0
        self.in_use = self.largest(pieces)
        if self.sums is not None:
            self.sums.clear()
        # The first piece comes last, since its graph is kept.
        for piece in reversed(pieces):
            problem = self.problem(piece)
            kept = keep_graph and len(pieces) == 1
            with nullcontext() if self.sums is None or kept else self.sums.taking(piece.weight):
                part = problem.gradients(keep_graph=kept, outputs=outputs and piece is pieces[0])
            self.casts |= problem.trace.casts
            loss += piece.weight * problem.loss
            failed |= part.failed
            trusted |= part.trusted
            for name, value in part.values.items():
                gone = self.sums is not None and id(self.parameters[name]) in self.sums.taken
                values[name] = value if gone else _sum(values.get(name), value, piece.weight)
        return Gradients(values, failed, trusted), loss, problem

    def curvatures(
        self,
        method: Curvature,
        pieces: Sequence[MicroBatch],
        directions: Mapping[str, SingularTriplets],
        expected: tuple[str, Tensor] | None = None,
    ) -> Curvatures:
        """The curvature of the loss: the weighted sum over the pieces, of which one at a time is in memory.

        Args:
            method: measures each piece.
            pieces: of all batches.
            directions: layer name -> triplets.
            expected: a layer and the gradient of the loss in it, to hold the pieces against.

        Raises:
            NoSumError: if the pieces' gradients do not add up to that gradient.
        """
        parts, gradient = [], None
        self.in_use = self.largest(pieces)
        for piece in pieces:
            problem = self.problem(piece)
            parts.append(method(problem, directions))
            if expected is not None:
                gradient = _sum(gradient, problem.gradient(expected[0]), piece.weight)
        if expected is not None:
            difference = expected[1] if gradient is None else gradient - expected[1]
            error = float(difference.norm() / expected[1].norm())
            if not error <= SAME_GRADIENT[self._precision(self.casts)]:
                raise NoSumError(
                    f"the gradients of the pieces add up to another one in {expected[0]} (relative error {error:.2g})"
                )
        return joined(parts, [piece.weight for piece in pieces])

    def eps(self, name: str) -> float:
        """Machine epsilon of a layer's gradient: of its type, or of float32 where the network goes down to that.

        Half precision's own would leave no direction of a wide layer; that it is used is told in the notes instead.
        """
        dtypes = [self.parameters[name].dtype, *([torch.float32] if self.casts else [])]
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The matrices of these layers themselves, as they were before any call of the loss."""
        self.beginning.restore()
        return {name: self.layers[name].to_matrix(self.parameters[name].detach()) for name in names}

    def notes(self) -> list[str]:
        """What limits the precision of the measurement."""
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.casts))
        return (
            [f"the network casts to {names} by itself, and nothing measured is more precise than that"] if names else []
        )

    def _repeatable(self, piece: MicroBatch) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            batch = self.batches[piece.batch]
            if piece.stop is not None:
                batch = take_samples(batch, piece.stop, piece.start, option="micro_batch_size")
            return self.loss(batch)

        return repeatable(evaluate, self.beginning, self._values[piece.batch, piece.start, piece.stop])

    def _weights(self, batch: int, parts: Sequence[tuple[int, int]]) -> list[float]:
        """w_i with L = sum_i w_i L_i."""
        if not self._values[batch, 0, None]:
            with torch.no_grad():
                self._repeatable(MicroBatch(batch, 1.0))()
        if not self._values[batch, 0, None]:
            raise NoSumError("micro_batch_size: the loss of the batch is no scalar; reduce it with .mean()")
        whole = self._values[batch, 0, None][0]
        if not math.isfinite(whole):
            raise MeasurementError(f"the loss is {whole}, so its gradient and curvature mean nothing")
        found = [self._part(MicroBatch(batch, 1.0, start, stop)) for start, stop in parts]
        counts = [part.normalizer for part in found]
        losses = [0.0 if part.normalizer == 0 else part.value for part in found]
        tolerance = ADDS_UP[self._precision({dtype for part in found for dtype in (part.dtype, *part.casts)})]
        size = parts[-1][1]
        apart = max(losses) - min(losses) >= SPREAD * max(abs(loss) for loss in losses)
        candidates = [[1.0] * len(parts)]
        if apart:
            candidates.append([(stop - start) / size for start, stop in parts])
        known = [count for count in counts if count is not None]
        if len(known) == len(counts) and sum(known) > 0:
            candidates.insert(0, [count / sum(known) for count in known])
        for weights in candidates:
            terms = torch.tensor([w * x for w, x in zip(weights, losses, strict=True)], dtype=torch.float64)
            if abs(float(terms.sum()) - whole) <= tolerance * max(abs(whole), float(terms.abs().sum())):
                return weights
        if not apart:
            raise NoSumError(
                f"micro_batch_size: the losses of the pieces are equal ({losses[0]:.6g}), so that their weights cannot "
                "be told; measure the batch in one piece, or fewer samples of it (max_samples)"
            )
        raise NoSumError(
            f"micro_batch_size: the loss of the batch, {whole:.6g}, is neither a mean nor the sum of those of its "
            f"pieces ({', '.join(f'{loss:.6g}' for loss in losses[:4])}), so its samples depend on each other "
            "(BatchNorm or dropout in train mode, a loss across the batch); measure the batch in one piece, "
            "or fewer samples of it (max_samples)"
        )

    def _precision(self, others: set[torch.dtype]) -> torch.dtype:
        """float64 if all weights, buffers and these others are, else float32."""
        return torch.float64 if self.beginning.dtypes | others == {torch.float64} else torch.float32

    def _part(self, piece: MicroBatch) -> LossValue:
        try:
            return loss_value(self._repeatable(piece))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise NoSumError(
                f"micro_batch_size: the loss fails on samples {piece.start} to {piece.stop} of the batch alone "
                f"({type(error).__name__}: {error}); measure the batch in one piece"
            ) from error


def joined(parts: Sequence[Curvatures], weights: Sequence[float]) -> Curvatures:
    """The curvatures of a weighted sum of losses."""
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


def _sum(total: Tensor | None, value: Tensor | None, weight: float) -> Tensor | None:
    if value is None:
        return total
    value = value if weight == 1 else weight * value
    return value if total is None else total + value
