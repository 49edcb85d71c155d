"""Gradients of an objective and of disjoint parts of its samples, which differ by sampling noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lightning_spectral.curvature import DifferentiableLoss, LossValue, graph_kinds, not_matrices
from lightning_spectral.curvature.ports import CallRows
from lightning_spectral.curvature.seen_layers import see_layers
from lightning_spectral.errors import first_line, is_out_of_memory
from lightning_spectral.isolation.devices import are_equal
from lightning_spectral.isolation.interrupts import interruption
from lightning_spectral.layers.kinds import Kind
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.estimation import SAME_GRADIENT
from lightning_spectral.measurement.micro_batches import MicroBatch, NoSumError, add_weighted, cut_evenly, infer_weights
from lightning_spectral.measurement.objective import PARTS, Objective, part_size
from lightning_spectral.numerics.matmul_precision import accumulation_dtype
from lightning_spectral.options import Options


@dataclass(frozen=True)
class SquaredNorms:
    """Share of all samples that a part is of, and |c|^2 of its term of the gradient, by layer."""

    share: float
    of_layers: Mapping[str, float]


class PartNorms:
    """Squared norms of the gradients of one micro-batch, left on their device until all are computed.

    Args:
        share: of all samples that the micro-batch holds.
    """

    def __init__(self, share: float, layers: Mapping[str, MatrixLayer], parameters: Mapping[str, Tensor]) -> None:
        self._share, self._layers, self._parameters = share, layers, parameters
        self._norms: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor | None, weight: float = 1.0) -> None:
        """Take weight times a layer's gradient, in its parameter's shape; None is zero."""
        if gradient is not None:
            matrix = self._layers[name].to_matrix(gradient)
            self._norms[name] = weight * torch.linalg.vector_norm(matrix, dtype=accumulation_dtype(matrix))

    def add_leaf(self, leaf: Tensor, gradient: Tensor) -> None:
        """Take the gradient in a leaf, of every layer that it holds."""
        for name, parameter in self._parameters.items():
            if parameter is leaf:
                self.add(name, gradient)

    def squared_norms(self, weight: float = 1.0) -> SquaredNorms:
        """Return the squared norms of weight times the gradients."""
        norms = list(self._norms.values())
        values = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []
        squares = {name: (weight * norm) ** 2 for name, norm in zip(self._norms, values, strict=True)}
        return SquaredNorms(self._share, {name: squares.get(name, 0.0) for name in self._layers})


@dataclass(frozen=True, eq=False)
class ObjectiveGradients:
    """Gradients of an objective on this rank, and what all ranks know of them.

    Attributes:
        values: layer name -> gradient in the parameter's shape, of this rank's samples.
        unreduced: names of the layers whose gradient some rank holds in ``values``.
        reduced: names of the layers whose gradient some rank has reduced to its owner already.
        failed: layer name -> why it has no gradient on any rank.
        loss: value of the objective, over all ranks.
        narrow_dtypes: half-precision types that the network casts to by itself, on any rank.
        first: loss of this rank's first micro-batch, with its graph; None on a rank without samples.
        has_graph: whether the gradients of ``first`` can be differentiated again.
        not_matrices: layer name -> how it is used on some rank, of those that are never multiplied as a matrix.
        kinds: layer name -> its kind by the graph on some rank, of those that nothing else tells.
        keeps_outputs: whether ``first`` is to go on holding its gradients in the layers' outputs.
        smallest: layer with the smallest tensor among ``values`` that is not zero, and that tensor.
        parts: squared norms of the micro-batches' gradients, of all ranks.
        notes: what a reader of the report should know of how they were computed.
    """

    values: dict[str, Tensor]
    unreduced: frozenset[str]
    reduced: frozenset[str]
    failed: dict[str, str]
    loss: float
    narrow_dtypes: frozenset[torch.dtype]
    first: DifferentiableLoss | None
    has_graph: bool
    keeps_outputs: bool
    smallest: tuple[str, Tensor] | None
    not_matrices: dict[str, str]
    kinds: dict[str, Kind]
    parts: Sequence[SquaredNorms]
    notes: tuple[str, ...]

    def skipped(self, options: Options) -> dict[str, str]:
        """Return the layers not to measure, with the reason: what a user names is measured, whatever it is."""
        return self.not_matrices if options.layers is None else {}


def sum_gradients(
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    *,
    keep_graph: bool = False,
    outputs: bool = False,
    norms: bool = True,
) -> ObjectiveGradients:
    """Return the gradients of an objective, summed over this rank's micro-batches.

    Args:
        keep_graph: keep them differentiable, if there is one micro-batch alone.
        outputs: have the first loss hold its gradients in the layers' outputs, where that costs no backward pass.
        norms: take those of each micro-batch, for ``parts``, and kinds; the parameters must be those of layers.
    """
    reducer = objective.reducer

    def is_reduced(name: str) -> bool:
        return reducer is not None and id(objective.parameters[name]) in reducer.reduced_ids

    keep_graph = keep_graph and len(micro_batches) == 1
    # Those of a single batch tell the noise of its gradient, too.
    wants_outputs = outputs or (norms and reducer is None and len(objective.all_sizes) == len(micro_batches) == 1)
    sums: dict[str, Tensor | None] = {}
    failed: dict[str, str] = {}
    narrow: set[torch.dtype] = set()
    parts: list[PartNorms] = []
    first, total = None, 0.0
    with objective.group.step(watched=True) as step:
        if reducer is not None:
            reducer.clear()
        # The first comes last, since its graph is kept.
        for micro_batch, first in objective.losses(micro_batches[::-1]):
            part_norms = PartNorms(objective.share_of(micro_batch), objective.layers, objective.parameters)
            observe = part_norms.add_leaf
            with nullcontext() if reducer is None or keep_graph else reducer.reducing(micro_batch.weight, observe):
                part = first.gradients(keep_graph=keep_graph, outputs=wants_outputs and micro_batch is micro_batches[0])
            narrow |= first.trace.casts
            total += micro_batch.weight * first.loss
            failed |= part.failed
            for name, value in part.values.items():
                value = None if value is None else value.detach()
                if is_reduced(name):
                    sums[name] = value
                    continue
                if norms:
                    part_norms.add(name, value, micro_batch.weight)
                sums[name] = add_weighted(sums.get(name), value, micro_batch.weight)
            parts.append(part_norms)
        values = {name: value for name, value in sums.items() if value is not None}
        reduced = {name for name in values if is_reduced(name)}
        nonzero = {name: value for name, value in values.items() if name not in reduced and value.any()}
        unfit = {} if first is None else not_matrices(first)
        kinds = {} if first is None or not norms else graph_kinds(first)
        squared = [part.squared_norms() for part in parts] if norms else []
        notes = tuple(objective.notes)
        step.send((values.keys() - reduced, reduced, failed, narrow, total, unfit, kinds, squared, notes))
    unreduced, all_reduced, failures, dtypes, losses, unfit_of_ranks, kinds_of_ranks, squared_norms, notes_of_ranks = (
        zip(*step.received, strict=True)
    )
    return ObjectiveGradients(
        values={name: value for name, value in values.items() if name not in reduced},
        unreduced=frozenset().union(*unreduced),
        reduced=frozenset().union(*all_reduced),
        failed={
            name: why
            for own, gone, reasons in zip(unreduced, all_reduced, failures, strict=True)
            for name, why in reasons.items()
            if name not in own | gone
        },
        loss=sum(losses),
        narrow_dtypes=frozenset().union(*dtypes),
        first=first,
        has_graph=keep_graph,
        keeps_outputs=outputs,
        smallest=min(nonzero.items(), key=lambda item: item[1].numel(), default=None),
        not_matrices={name: why for of_rank in unfit_of_ranks for name, why in of_rank.items()},
        kinds={name: kind for of_rank in kinds_of_ranks for name, kind in of_rank.items()},
        parts=[of_part for of_rank in squared_norms for of_part in of_rank],
        notes=tuple(dict.fromkeys(note for of_rank in notes_of_ranks for note in of_rank)),
    )


def cut_for_gradient(objective: Objective, few: Objective, max_size: int | None) -> list[MicroBatch]:
    """Return the micro-batches that the gradient is summed over.

    A single batch that holds more samples than curvature is measured on is cut, so that the gradient takes no more
    memory than the curvature, and its micro-batches tell its noise.

    Args:
        few: what curvature is measured on.
        max_size: samples of the largest micro-batch; None: as memory asks for.
    """
    # By numbers that all ranks have, one without a batch too, since they cut together.
    is_single = few is not objective and len(objective.all_sizes) == 1
    if max_size is None and is_single and objective.samples and few.samples:
        with suppress(NoSumError):
            return objective.cut(part_size(objective.samples, few.samples))
    return objective.cut(max_size)


def gradient_parts(
    objective: Objective, gradients: ObjectiveGradients, micro_batches: Sequence[MicroBatch], options: Options
) -> tuple[Sequence[SquaredNorms], str]:
    """Return the norms of the parts that the gradients were summed from, of all ranks, or why there are none.

    Those of a single one are taken out of it.
    """
    if len(gradients.parts) > 1:
        return gradients.parts, ""
    with objective.group.step(watched=True) as step:
        step.send(_cut(objective, gradients, micro_batches[0], options) if micro_batches else None)
    of_ranks: list[tuple[Sequence[SquaredNorms], str]] = [parts for parts in step.received if parts is not None]
    return of_ranks[0]


def _cut(
    objective: Objective, gradients: ObjectiveGradients, full: MicroBatch, options: Options
) -> tuple[Sequence[SquaredNorms], str]:
    """Return the parts of a batch that is all there is: by the rows of its one pass, else by a pass of each."""
    size = objective.samples_of(full)
    if not objective.has_tensors(full):
        # A loss of the weights alone has no sampling noise.
        return [], ""
    if objective.reducer is not None or not objective.divisible or size is None or size < 2:
        return [], "the gradient is that of one batch, which cannot be cut"
    # Where the loss draws as many numbers of a part as of the batch, none of them is a sample's.
    after_whole = objective.random_states()
    micro_batches = cut_evenly(full.batch, size, min(size, PARTS))
    gradients_of_parts: list[PartNorms] = []
    losses: list[LossValue] = []
    for micro_batch in micro_batches:
        loss = objective.differentiable(micro_batch, once=True)
        try:
            values = loss.gradients(keep_graph=False).values
        except Exception as error:
            if is_out_of_memory(error) or interruption(error):
                raise
            return [], f"the loss fails on a part of the batch alone ({first_line(error)})"
        losses.append(LossValue.of(loss.value, loss.trace))
        loss.release()
        if micro_batch is micro_batches[0]:
            names = [name for name in gradients.values if name not in gradients.skipped(options)]
            by_rows = _norms_by_rows(objective, gradients, micro_batches, names, values, losses[0])
            if by_rows or not are_equal(objective.random_states(), after_whole):
                return by_rows, "" if by_rows else "the loss draws other random numbers for a part than for the batch"
        norms = PartNorms(objective.share_of(micro_batch), objective.layers, objective.parameters)
        for name, value in values.items():
            norms.add(name, value)
        gradients_of_parts.append(norms)
    dtypes = {dtype for loss in losses for dtype in (loss.dtype, *loss.casts)}
    try:
        weights = infer_weights(gradients.loss, micro_batches, losses, objective.compute_dtype(dtypes))
    except NoSumError:
        return [], "the loss of the batch is no sum of those of its parts"
    return [part.squared_norms(w) for part, w in zip(gradients_of_parts, weights, strict=True)], ""


def _norms_by_rows(
    objective: Objective,
    gradients: ObjectiveGradients,
    parts: Sequence[MicroBatch],
    names: Sequence[str],
    values: Mapping[str, Tensor | None],
    loss: LossValue,
) -> list[SquaredNorms]:
    """Return the norms of the parts of a batch from what its one pass left at the layers' calls.

    A part's term is sum r a^T over the rows of its samples, of inputs a and gradients r in the outputs. That of the
    first must be its own gradient times its weight in the loss; else the rows lie elsewhere, or samples depend on each
    other, and nothing is returned. Nor is it where a layer is used in another way than multiplied.

    Args:
        names: of the layers that are asked for.
        values, loss: of the first part alone.
    """
    problem, samples = gradients.first, parts[-1].stop
    assert problem is not None
    assert samples is not None
    seen = see_layers(problem, names)
    calls_of_all = [call for of_layer in seen.calls.values() for call in of_layer]
    try:
        deltas = problem.output_gradients(calls_of_all, keep=gradients.keeps_outputs)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return []
    if seen.unseen:
        return []
    whole = LossValue.of(problem.value, problem.trace)
    tolerance = SAME_GRADIENT[objective.compute_dtype({loss.dtype, *loss.casts})]
    weights = [1.0, objective.share_of(parts[0])]
    if loss.normalizer is not None and whole.normalizer:
        weights.append(loss.normalizer / whole.normalizer)
    norms = [PartNorms(objective.share_of(part), objective.layers, objective.parameters) for part in parts]
    for name in {id(objective.parameters[name]): name for name in names}.values():
        calls, leaf, own = seen.calls[name], objective.parameters[name], values[name]
        rows = CallRows(calls, [deltas.pop(id(call)) for call in calls], leaf.shape)
        for layouts in rows.layouts(samples):
            terms = (rows.gradient(layouts, part.start, part.stop or 0) for part in parts)
            term = next(terms)
            close = [w for w in weights if own is not None and (term - w * own).norm() <= tolerance * term.norm()]
            if close:
                break
        else:
            return []
        weights = close
        for of_part, gradient in zip(norms, chain([term], terms), strict=True):
            of_part.add_leaf(leaf, gradient)
    return [part.squared_norms() for part in norms]
