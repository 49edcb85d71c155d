"""The loss of one or more batches as a weighted sum over micro-batches, of which one graph at a time is in memory."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_spectral.curvature import DifferentiableLoss, LossValue, SampleRange, loss_value
from lightning_spectral.distributed.process_group import SINGLE_PROCESS, Group
from lightning_spectral.errors import MeasurementError, first_line, is_out_of_memory
from lightning_spectral.isolation.batch_tree import FirstSamples, batch_size, divisible, has_tensors, take_samples
from lightning_spectral.isolation.replay import InitialState, ReplayedLoss
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.micro_batches import MicroBatch, NoSumError, cut_evenly, infer_weights, largest_size

if TYPE_CHECKING:
    from lightning_spectral.measurement.sharded.gradient_reduction import GradientReducer


CURVATURE_SAMPLES = 64
"""Samples of each batch that curvature is measured on where the gradient is that of more.

With the directions of 2,048 samples, the curvature of 32 to 64 gave alpha within 0.03.
"""

PARTS = 8
"""Number of parts that a single batch is cut into for the noise of its gradient, at least."""


Loss = Callable[[Any], Any]
"""Function of a batch."""


class Objective:
    """Mean, weighted by samples, of the losses of the batches of all ranks.

    Args:
        loss: batch -> its loss; it is given a copy of the batch.
        parameters: layer name -> the leaf that holds its matrix.
        initial_state: restored before each call of the loss.
        sizes: samples of each batch of each rank; None: those of this rank alone.
        reducer: sums gradients of weights in shards over the ranks as they are computed; None where there are none.
        unreached: why a layer has no gradient on any rank.
    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Any],
        layers: Mapping[str, MatrixLayer],
        parameters: Mapping[str, Tensor],
        initial_state: InitialState,
        *,
        copy_batch: Callable[[Any], Any] = lambda batch: batch,
        group: Group = SINGLE_PROCESS,
        sizes: Sequence[Sequence[int | None]] | None = None,
        reducer: GradientReducer | None = None,
        unreached: str = "the loss does not depend on it",
    ) -> None:
        self.layers, self.parameters, self.group, self.reducer = layers, parameters, group, reducer
        self._loss, self._copy_batch, self._initial_state, self.unreached = loss, copy_batch, initial_state, unreached
        # One of this objective and of that of its first samples.
        self._in_use: list[int | None] = [None]
        self._take(batches, [batch_sizes(batches)] if sizes is None else sizes)

    def _take(self, batches: Sequence[Any], sizes: Sequence[Sequence[int | None]]) -> None:
        self._batches, self._sizes_by_rank, self.sizes = batches, sizes, sizes[self.group.rank]
        self.divisible = all(divisible(batch) for batch, size in zip(batches, self.sizes, strict=True) if size != 0)
        self.all_sizes = [size for of_rank in sizes for size in of_rank]
        counts = [size for size in self.all_sizes if size is not None]
        self.samples = sum(counts) if len(counts) == len(self.all_sizes) else None
        self._first_sample = sum(size or 0 for of_rank in sizes[: self.group.rank] for size in of_rank)
        self._values: dict[MicroBatch, list[float]] = defaultdict(list)
        self._parts: dict[MicroBatch, LossValue] = {}

    def first(self, n_batches: int | None, max_samples: int | None) -> Objective:
        """Return the objective of the first batches alone, each cut; this one where that is all of it.

        Args:
            n_batches: of each rank; None: all.
            max_samples: of each batch; None: `CURVATURE_SAMPLES` of a loss that is a sum over them, else all.
        """
        if max_samples is None:
            with self.group.step() as step:
                step.send(self._is_sum())
            max_samples = CURVATURE_SAMPLES if all(answer is not False for answer in step.received) else None
        sizes = [
            [size if size is None or max_samples is None else min(size, max_samples) for size in of_rank[:n_batches]]
            for of_rank in self._sizes_by_rank
        ]
        if sizes == [list(of_rank) for of_rank in self._sizes_by_rank]:
            return self
        first = copy.copy(self)
        first._take(FirstSamples(self._batches, max_samples, n_batches), sizes)
        return first

    def _is_sum(self) -> bool | None:
        """Return whether the loss of the first batch is a sum over samples; None where there are few samples."""
        size = self.sizes[0] if self.sizes else 0
        if size is not None and size <= CURVATURE_SAMPLES:
            return None
        if size is None or not self.divisible:
            return False
        try:
            self._weights(cut_evenly(0, size, math.ceil(size / part_size(size, CURVATURE_SAMPLES))))
        except NoSumError:
            return False
        return True

    def full_batches(self) -> list[MicroBatch]:
        """Return a micro-batch per batch, but for those without a sample."""
        filled = sum(size != 0 for size in self.all_sizes)
        return [
            MicroBatch(i, 1 / filled if self.samples is None or size is None else size / self.samples)
            for i, size in enumerate(self.sizes)
            if size != 0
        ]

    def cut(self, max_size: int | None) -> list[MicroBatch]:
        """Return micro-batches of at most so many samples, None: full batches; raise on all ranks if on one."""
        full_batches = self.full_batches()
        self._in_use[0] = self.largest(full_batches) if max_size is None else max_size
        with self.group.step(watched=True):
            return full_batches if max_size is None else self.micro_batches(max_size)

    def micro_batches(self, max_size: int) -> list[MicroBatch]:
        """Return micro-batches of nearly equal size, of at most so many samples.

        Raises:
            MeasurementError: if a batch cannot be cut.
            NoSumError: if its loss is no weighted sum of those of its micro-batches, or that cannot be told.
        """
        micro_batches: list[MicroBatch] = []
        for full in self.full_batches():
            size = self.sizes[full.batch]
            if size is None:
                take_samples(self._batches[full.batch], max_size, option="micro_batch_size")
            if size is None or size <= max_size:
                micro_batches.append(full)
                continue
            parts = cut_evenly(full.batch, size, math.ceil(size / max_size))
            for part, weight in zip(parts, self._weights(parts), strict=True):
                if weight:
                    micro_batches.append(MicroBatch(full.batch, full.weight * weight, part.start, part.stop))
        return micro_batches

    def split(self, parts: int) -> list[MicroBatch]:
        """Return micro-batches of so many parts of the largest batch; none where the loss is no sum of theirs."""
        if parts == 1 or not self.divisible:
            return []
        try:
            smaller = self.micro_batches(math.ceil(max(size or 1 for size in self.sizes) / parts))
        except NoSumError:
            return []
        return smaller if len(smaller) > len(self.sizes) else []

    def largest(self, micro_batches: Sequence[MicroBatch]) -> int | None:
        """Return the samples of the largest of these; None where a batch does not tell."""
        return largest_size([self.samples_of(micro_batch) for micro_batch in micro_batches]) if micro_batches else None

    def samples_of(self, micro_batch: MicroBatch) -> int | None:
        """Return how many samples a micro-batch holds; None where its batch does not tell."""
        return self.sizes[micro_batch.batch] if micro_batch.stop is None else micro_batch.stop - micro_batch.start

    def has_tensors(self, micro_batch: MicroBatch) -> bool:
        """Return whether there is anything in the batch of a micro-batch that could be samples."""
        return has_tensors(self._batches[micro_batch.batch])

    def random_states(self) -> list[Any]:
        """Return the states of the random generators after the loss that was computed last."""
        return self._initial_state.random_states()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know of the operations that the loss was computed with."""
        return tuple(self._initial_state.operations.notes)

    @property
    def size_in_use(self) -> int | None:
        """Samples of the largest micro-batch that is, or was last, in memory."""
        return self._in_use[0]

    def differentiable(self, micro_batch: MicroBatch, *, once: bool = False) -> DifferentiableLoss:
        """Return the loss of one micro-batch, to be differentiated; once, by operations that may be wrong twice."""
        place = None
        if self.samples is not None:
            before = sum(size or 0 for size in self.sizes[: micro_batch.batch])
            place = SampleRange(self._first_sample + before + micro_batch.start, self.samples)
        loss = self._replayed(micro_batch)
        samples = self.samples_of(micro_batch)
        again = {} if once else {"again": loss.again}
        limit = self._batches.n if isinstance(self._batches, FirstSamples) else None
        first = limit if self.sizes[micro_batch.batch] == limit else None
        return DifferentiableLoss(loss, self.layers, self.parameters, samples, place, first=first, **again)

    def losses(
        self, micro_batches: Sequence[MicroBatch], first: DifferentiableLoss | None = None
    ) -> Iterator[tuple[MicroBatch, DifferentiableLoss]]:
        """Yield each micro-batch with its loss, to be differentiated before the next.

        Args:
            first: loss of the first of them, where its graph is there.
        """
        self._in_use[0] = self.largest(micro_batches)
        for micro_batch in micro_batches:
            yield micro_batch, first or self.differentiable(micro_batch)
            first = None

    def share_of(self, micro_batch: MicroBatch) -> float:
        """Return the share of all samples that a micro-batch holds; of the loss where they cannot be counted."""
        size = self.samples_of(micro_batch)
        return micro_batch.weight if self.samples is None or size is None else size / self.samples

    def eps(self, name: str, narrow_dtypes: frozenset[torch.dtype]) -> float:
        """Return the machine epsilon of a layer's gradient.

        Half precision's epsilon would put every direction of a wide layer below the noise floor, so float32's is used
        where the network casts to it, and a note of the report says so.
        """
        dtypes = [self.parameters[name].dtype, *([torch.float32] if narrow_dtypes else [])]
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def weight_matrices(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the matrices of these layers themselves, as they were before any call of the loss."""
        self._initial_state.restore()
        return {name: self.layers[name].to_matrix(self.parameters[name].detach()) for name in names}

    def compute_dtype(self, dtypes: set[torch.dtype] | frozenset[torch.dtype]) -> torch.dtype:
        """Return float64 if all weights, buffers and these dtypes are, else float32."""
        return torch.float64 if self._initial_state.dtypes | dtypes == {torch.float64} else torch.float32

    def known_value(self, micro_batch: MicroBatch) -> float | None:
        """Return the loss of a micro-batch, without its weight; None where it was not computed as a whole."""
        return next(iter(self._values[_place(micro_batch)]), None)

    def value_of(self, micro_batch: MicroBatch, wrapped: Callable[[Loss], Loss]) -> float:
        """Return the loss of a micro-batch as ``wrapped`` computes it."""
        return float(ReplayedLoss(wrapped(self._loss), partial(self._samples, micro_batch), self._initial_state, [])())

    def _replayed(self, micro_batch: MicroBatch) -> ReplayedLoss:
        values = self._values[_place(micro_batch)]
        return ReplayedLoss(self._loss, partial(self._samples, micro_batch), self._initial_state, values)

    def _samples(self, micro_batch: MicroBatch) -> Any:
        batch = self._batches[micro_batch.batch]
        if micro_batch.stop is not None:
            batch = take_samples(batch, micro_batch.stop, micro_batch.start, option="micro_batch_size")
        return self._copy_batch(batch)

    def _weights(self, parts: Sequence[MicroBatch]) -> list[float]:
        full = MicroBatch(parts[0].batch, 1.0)
        if not self._values[full]:
            self._replayed(full).value()
        total = self._values[full][0]
        if not math.isfinite(total):
            raise MeasurementError(f"the loss is {total}, so its gradient and curvature mean nothing")
        for part in parts:
            try:
                if part not in self._parts:
                    replayed = self._replayed(part)
                    self._parts[part] = loss_value(replayed, replayed.again)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise NoSumError(
                    f"micro_batch_size: the loss fails on samples {part.start} to {part.stop} of the batch alone "
                    f"({first_line(error)}); measure the batch whole"
                ) from error
        losses = [self._parts[part] for part in parts]
        dtypes = {dtype for loss in losses for dtype in (loss.dtype, *loss.casts)}
        return infer_weights(total, parts, losses, self.compute_dtype(dtypes))


def part_size(samples: int, largest: int) -> int:
    """Return how many samples a part of a single batch holds: of so many at most, and of `PARTS` parts at least."""
    return min(largest, math.ceil(samples / PARTS))


def _place(micro_batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch by which its values are kept."""
    return MicroBatch(micro_batch.batch, 1.0, micro_batch.start, micro_batch.stop)


def batch_sizes(batches: Sequence[Any]) -> list[int | None]:
    """Return the samples of each batch, None for one that does not tell."""
    return [batch_size(batch) for batch in batches]
