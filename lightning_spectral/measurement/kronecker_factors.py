"""The Kronecker factors of every layer that is applied once, from one more backward pass to the layers' outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral.curvature import (
    TRANSPOSED,
    DifferentiableLoss,
    LayerCall,
    Recorder,
    Tap,
    accumulation_dtype,
    cause_of,
    groups_of,
    single_uses,
)
from lightning_spectral.distributed.process_group import SingleProcess, assign_owners
from lightning_spectral.errors import is_out_of_memory
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.objective import MicroBatch, Objective
from lightning_spectral.numerics.conv_patches import Patches
from lightning_spectral.numerics.power_law import entropy_rank
from lightning_spectral.numerics.second_moment import LARGE, Eigenvalues, SecondMoment
from lightning_spectral.numerics.svd import SingularTriplets
from lightning_spectral.records.alignment import KroneckerFactors

SOME_SAMPLES = 8
"""In each of two parts of a batch, to see from their losses whether samples are summed or averaged."""

CACHED = 2**18
"""Entries of gradients in outputs that are brought into rows at a time."""


@dataclass(frozen=True, eq=False)
class KroneckerResult:
    """The factors of the layers that have them.

    Attributes:
        factors: layer name -> its factors.
        notes: layer name -> why it has none.
        per_sample: what the curvature of the measured loss is multiplied by to be that of the mean of the samples'
            losses: 1, or for a loss that sums over samples one over their number.
    """

    factors: dict[str, KroneckerFactors]
    notes: dict[str, str]
    per_sample: float = 1.0


def kronecker_factors(
    losses: Objective,
    pieces: Sequence[MicroBatch],
    problem: DifferentiableLoss | None,
    directions: Mapping[str, SingularTriplets],
    processes: SingleProcess,
) -> KroneckerResult:
    """Factors of the loss; where memory runs out, nothing but the reason.

    With L = sum_b l_b / B the loss of B samples, delta = B dL / dz is the gradient of one sample's loss l_b; for a loss
    that is the sum of the l_b, it is dL / dz. Which of them holds is seen from the values of the loss.

    Args:
        losses: what to measure.
        pieces: of it, to take one at a time.
        problem: of the first piece; if its graph is there, it is used, and kept.
        directions: layer name -> triplets u_k, v_k.
        processes: each of which has its part of the loss.
    """
    if losses.samples is None:
        why = "the batch does not tell how many samples it holds, so the gradient of one sample's loss is not known"
        return KroneckerResult({}, dict.fromkeys(directions, why))
    try:
        return _factors(losses, pieces, problem, directions, processes)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return KroneckerResult({}, dict.fromkeys(directions, f"{type(error).__name__}: {str(error)[:200]}"))


def _factors(
    losses: Objective,
    pieces: Sequence[MicroBatch],
    problem: DifferentiableLoss | None,
    directions: Mapping[str, SingularTriplets],
    processes: SingleProcess,
) -> KroneckerResult:
    votes = processes.all_gather_object(
        processes.call_everywhere(lambda: sums_over_samples(losses) if pieces else None)
    )
    summed = any(votes)
    samples = losses.samples or 1
    sums = _empty(losses.layers, directions)
    notes: dict[str, str] = {}

    def here() -> dict[str, KroneckerFactors]:
        found: dict[str, KroneckerFactors] = {}
        parts = [*pieces, *_left_out(losses, pieces)]
        for piece in parts:
            own = problem if problem is not None and piece is pieces[0] else losses.problem(piece)
            # A sum counts each sample once, whatever the share of its batch in all of them.
            scale = piece.weight * samples / (losses.sizes[piece.batch] or 1 if summed else 1)
            found |= _added(own, piece, scale, sums, notes, last=processes.size == 1 and piece is parts[-1])
            if len(pieces) > 1:
                own.release()
        return found

    factors = processes.call_everywhere(here)
    if processes.size > 1:
        notes = {name: why for of_process in processes.all_gather_object(notes) for name, why in of_process.items()}
        factors = _joint(sums, [name for name in directions if name not in notes], losses, processes)
    while sums:
        name, mine = sums.popitem()
        factors[name] = mine.factors()
    per_sample = samples / sum((size or 0) ** 2 for size in losses.all_sizes) if summed else 1.0
    return KroneckerResult(factors, notes, per_sample)


def _joint(
    sums: dict[str, _Sums], names: Sequence[str], losses: Objective, processes: SingleProcess
) -> dict[str, KroneckerFactors]:
    """The factors of the sums over all processes, each layer's taken by one of them; nothing is left in ``sums``."""
    costs = {name: float(sum(side**3 for side in losses.layers[name].shape)) for name in names}
    mine = {}
    for name, owner in assign_owners(costs, processes.size).items():
        # Layer by layer, so that no more than one layer's matrices of all processes are in one of them.
        parts = processes.gather_object(processes.call_everywhere(sums[name].told), owner)
        joined = processes.call_everywhere(partial(sums[name].joined, parts or (), losses.parameters[name].device))
        if parts is not None:
            mine[name] = joined
    sums.clear()
    found = processes.all_gather_object(
        processes.call_everywhere(lambda: {name: own.factors() for name, own in mine.items()})
    )
    return {name: factors for of_process in found for name, factors in of_process.items()}


def _empty(layers: Mapping[str, MatrixLayer], directions: Mapping[str, SingularTriplets]) -> dict[str, _Sums]:
    """Sums of nothing for each layer; those alone hold the inputs that parts of a fused projection share."""
    inputs: dict[str, _Inputs] = {}
    sums = {}
    for name, triplets in directions.items():
        mine = inputs.setdefault(layers[name].parameter, _Inputs(len(triplets)))
        mine.moment.k = max(mine.moment.k, len(triplets))
        sums[name] = _Sums(layers[name], triplets, mine)
    return sums


def _added(
    problem: DifferentiableLoss,
    piece: MicroBatch,
    scale: float,
    sums: dict[str, _Sums],
    notes: dict[str, str],
    *,
    last: bool,
) -> dict[str, KroneckerFactors]:
    """Add one piece to the sums, and keep nothing of its graph.

    In the last one a layer's factors are taken as soon as it is added, and its sums, with up to n x n numbers for each
    factor, let go before those of the next.
    """
    factors = {}
    for name, use, delta in _seen(problem, piece, list(sums), notes):
        # Of a piece without weight a layer may come more than once.
        whole = last and piece.weight > 0
        mine = sums.pop(name) if whole else sums[name]
        try:
            mine.add(use, delta, scale, problem.parameters[name].shape)
            if whole:
                factors[name] = mine.factors()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            notes[name] = f"{type(error).__name__}: {str(error)[:200]}"
    for name in sums.keys() & notes.keys():
        del sums[name]
    for rest in sums.values():
        rest.inputs.last = None
    return factors


def sums_over_samples(losses: Objective) -> bool:
    """Whether the loss of a batch grows as the number of its samples, as a sum does, and a mean does not.

    Seen from the loss of a few samples and of as many others, alone and together. A batch that cannot be cut, and a
    loss that cannot be computed of few samples, count as a mean.
    """
    batch, size = max(enumerate(losses.sizes), key=lambda item: item[1] or 0)
    n = min((size or 0) // 2, SOME_SAMPLES)
    if not losses.divisible or n == 0:
        return False
    parts = [MicroBatch(batch, 1.0, 0, n), MicroBatch(batch, 1.0, n, 2 * n), MicroBatch(batch, 1.0, 0, 2 * n)]
    try:
        with torch.no_grad():
            first, second, both = (float(losses.problem(part).evaluate()) for part in parts)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    # Either ratio may be off where samples depend on each other, or a penalty on the weights is added.
    return abs(both - (first + second)) < abs(both - (first + second) / 2)


def _left_out(losses: Objective, pieces: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
    """The samples that are in none of the pieces, since nothing of the loss is in them; their inputs count."""
    ends: dict[int, int] = defaultdict(int)
    for piece in sorted((p for p in pieces if p.stop is not None), key=lambda p: (p.batch, p.start)):
        if piece.start > ends[piece.batch]:
            yield MicroBatch(piece.batch, 0.0, ends[piece.batch], piece.start)
        ends[piece.batch] = piece.stop or 0
    for batch, end in ends.items():
        if end < (losses.sizes[batch] or 0):
            yield MicroBatch(batch, 0.0, end, losses.sizes[batch])


def _seen(
    problem: DifferentiableLoss, piece: MicroBatch, names: Sequence[str], notes: dict[str, str]
) -> Iterator[tuple[str, LayerCall, Tensor]]:
    """Each layer's product and the gradient of the loss in its output, and in ``notes`` why a layer has none."""
    if not piece.weight:
        with torch.no_grad(), Recorder({id(leaf) for leaf in problem.parameters.values()}) as recorder:
            problem.evaluate()
        for name in names:
            for use in recorder.trace.uses.get(id(problem.parameters[name]), []):
                yield name, use, torch.zeros_like(use.output)
        return
    problem.run()
    uses, rest = single_uses(problem, names)
    notes |= rest
    deltas = _output_gradients(problem, uses, notes)
    last = {id(use): name for name, use in uses.items()}
    for name, use in uses.items():
        # Parts of a fused projection share one output; after the last of them it is let go.
        delta = deltas.pop(id(use), None) if last[id(use)] == name else deltas.get(id(use))
        if delta is not None:
            yield name, use, delta
        elif name not in notes:
            notes[name] = "the loss does not depend on its output"


def _output_gradients(
    problem: DifferentiableLoss, uses: Mapping[str, LayerCall], notes: dict[str, str]
) -> dict[int, Tensor | None]:
    """The gradients in these outputs; one at a time where all together fail, and then in ``notes`` why."""
    try:
        return problem.output_gradients(uses.values())
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
    found: dict[int, Tensor | None] = {}
    for name, use in uses.items():
        try:
            found |= problem.output_gradients([use])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            notes[name] = cause_of(error)
    return found


class _Inputs:
    """The second moment of one parameter's inputs, which parts of a fused projection share."""

    def __init__(self, k: int) -> None:
        self.moment = SecondMoment(k)
        self.last: LayerCall | None = None  # within a piece: its output holds the piece's graph
        self._eigenvalues: Eigenvalues | None = None

    def add(self, use: LayerCall, tap: Tap) -> None:
        """Add the inputs of one product, once."""
        if use is self.last:
            return
        self.last = use
        if use.function is F.linear:
            self.moment.add(tap.use.input.reshape(1, -1, tap.use.input.shape[-1]))
            return
        patches = Patches.of(
            tap.use.input, tap.shape[2:], use.options, groups=tap.layer.groups,
            transposed=use.function in TRANSPOSED,
        )  # fmt: skip
        if patches.length <= LARGE and patches.rows > patches.length and patches.correlates():
            self.moment.add_gram(patches.correlation(), patches.rows)
        else:
            for rows in patches.unfolded():
                self.moment.add(rows)

    def eigenvalues(self) -> Eigenvalues:
        """Of C_A."""
        if self._eigenvalues is None:
            self._eigenvalues = self.moment.eigenvalues()
        return self._eigenvalues


class _Sums:
    """Sums over samples and positions for one layer."""

    def __init__(self, layer: MatrixLayer, triplets: SingularTriplets, inputs: _Inputs) -> None:
        self.layer, self.triplets, self.inputs = layer, triplets, inputs
        self.groups = groups_of(layer, triplets)
        self.outputs = SecondMoment(len(triplets))
        self.delta, self.a, self.both = (torch.zeros(len(triplets), dtype=torch.float64) for _ in range(3))

    def add(self, use: LayerCall, delta: Tensor, scale: float, shape: torch.Size) -> None:
        """Add one product and the gradient in its output, times ``scale``."""
        linear = use.function is F.linear
        if not linear and use.input.ndim != len(shape):
            raise ValueError("a convolution without a dimension for samples")
        delta = _at_least_float32(delta) * scale
        # Which rows are of which sample does not matter here.
        raised = replace(use, input=_at_least_float32(use.input), time_first=None)
        tap = Tap(self.layer, raised, 1 if linear else delta.shape[0], shape)
        left = tap.left(delta, self.triplets.u).square_()
        right = tap.right(self.triplets.v, self.groups).square_()
        wide = accumulation_dtype(left)
        self.delta += left.sum(2).sum(0, dtype=wide).cpu()
        self.a += right.sum(2).sum(0, dtype=wide).cpu()
        self.both += left.mul_(right).sum(2).sum(0, dtype=wide).cpu()
        del left, right
        self.inputs.add(use, tap)
        rows_bmp, g = tap.rows(delta), self.layer.groups
        _, m, p = rows_bmp.shape
        # Some samples at a time, whose copy stays in a CPU's cache, but enough that n x n sums are few.
        for part in torch.split(rows_bmp, max(1, max(CACHED // m, 4 * m) // p)):
            self.outputs.add(part.reshape(len(part), g, m // g, p).permute(1, 0, 3, 2).reshape(g, -1, m // g))

    def told(self) -> tuple[tuple[Tensor, ...], SecondMoment, SecondMoment]:
        """The sums, on the CPU, for another process."""
        return (self.delta, self.a, self.both), self.outputs.to("cpu"), self.inputs.moment.to("cpu")

    def joined(
        self, parts: Sequence[tuple[tuple[Tensor, ...], SecondMoment, SecondMoment]], device: torch.device
    ) -> _Sums:
        """The sums of these, which were `told`."""
        whole = _Sums(self.layer, self.triplets, _Inputs(self.inputs.moment.k))
        for (delta, a, both), outputs, inputs in parts:
            whole.delta += delta
            whole.a += a
            whole.both += both
            whole.outputs.add_moment(outputs.to(device))
            whole.inputs.moment.add_moment(inputs.to(device))
        return whole

    def factors(self) -> KroneckerFactors:
        """Means and eigenvalues."""
        delta, a = self.outputs.eigenvalues(), self.inputs.eigenvalues()
        n = self.outputs.count
        incomplete = [name for name, found in (("C_delta", delta), ("C_A", a)) if not found.complete]
        return KroneckerFactors(
            energy_delta=self.delta / n,
            energy_a=self.a / n,
            joint=self.both / n,
            lambda_delta=self._of_directions(delta.values),
            lambda_a=self._of_directions(a.values),
            effective_rank_delta=_effective_rank(delta),
            effective_rank_a=_effective_rank(a),
            rows=n,
            note=f"only leading eigenvalues of {' and '.join(incomplete)} (over {LARGE} dimensions), so no effective "
            "rank; of several pieces they are lower bounds"
            if incomplete
            else "",
        )

    def _of_directions(self, values_gr: Tensor) -> Tensor:
        """For each direction, the eigenvalue of its group with the rank that it has there."""
        found, seen = [], [0] * len(values_gr)
        for group in self.groups.tolist():
            rank = seen[group]
            seen[group] += 1
            found.append(float(values_gr[group, rank]) if rank < values_gr.shape[1] else float("nan"))
        return torch.tensor(found, dtype=torch.float64)


def _effective_rank(found: Eigenvalues) -> float:
    if not found.complete:
        return float("nan")
    ranks = torch.tensor([entropy_rank(values) for values in found.values], dtype=torch.float64)
    return float(ranks.nanmean())


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
