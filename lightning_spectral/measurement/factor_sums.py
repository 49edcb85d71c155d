"""Sums over samples and positions from which the Kronecker factors of one layer are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral.curvature import TRANSPOSED, LayerCall, Tap, accumulation_dtype, groups_of
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.numerics.conv_patches import Patches
from lightning_spectral.numerics.participation import entropy_rank
from lightning_spectral.numerics.second_moment import MAX_DENSE, Eigenvalues, SecondMoment
from lightning_spectral.numerics.svd import SingularTriplets
from lightning_spectral.records.alignment import KroneckerFactors

CACHED = 2**18
"""Entries of gradients in outputs that are brought into rows at a time."""


class InputMoment:
    """Second moment of one parameter's inputs, which parts of a fused projection share."""

    def __init__(self, k: int) -> None:
        self.moment = SecondMoment(k)
        self._last: LayerCall | None = None
        self._eigenvalues: Eigenvalues | None = None

    def release(self) -> None:
        """Let go of the last call, whose output holds the graph of its micro-batch."""
        self._last = None

    def add(self, call: LayerCall, tap: Tap) -> None:
        """Add the inputs of one call, once."""
        if call is self._last:
            return
        self._last = call
        if call.function is F.linear:
            self.moment.add(tap.call.input.reshape(1, -1, tap.call.input.shape[-1]))
            return
        patches = Patches.of(
            tap.call.input, tap.shape[2:], call.options, groups=tap.layer.groups,
            transposed=call.function in TRANSPOSED,
        )  # fmt: skip
        if patches.length <= MAX_DENSE and patches.rows > patches.length and patches.correlates():
            self.moment.add_gram(patches.correlation(), patches.rows)
        else:
            for rows in patches.unfolded():
                self.moment.add(rows)

    def eigenvalues(self) -> Eigenvalues:
        """Return the eigenvalues of C_A."""
        if self._eigenvalues is None:
            self._eigenvalues = self.moment.eigenvalues()
        return self._eigenvalues


class FactorSums:
    """Sums over samples and positions for one layer."""

    def __init__(self, layer: MatrixLayer, triplets: SingularTriplets, inputs: InputMoment) -> None:
        self.layer, self.triplets, self.inputs = layer, triplets, inputs
        self.groups = groups_of(layer, triplets)
        self.outputs = SecondMoment(len(triplets))
        self.delta, self.a, self.both = (torch.zeros(len(triplets), dtype=torch.float64) for _ in range(3))

    def add(self, call: LayerCall, delta: Tensor, scale: float, shape: torch.Size) -> None:
        """Add one call and the gradient in its output, times ``scale``."""
        linear = call.function is F.linear
        if not linear and call.input.ndim != len(shape):
            raise ValueError("a convolution without a dimension for samples")
        delta = _at_least_float32(delta) * scale
        # Which rows are of which sample does not matter here.
        raised = replace(call, input=_at_least_float32(call.input), time_first=None)
        tap = Tap(self.layer, raised, 1 if linear else delta.shape[0], shape)
        left = tap.left(delta, self.triplets.u).square_()
        right = tap.right(self.triplets.v, self.groups).square_()
        wide = accumulation_dtype(left)
        self.delta += left.sum(2).sum(0, dtype=wide).cpu()
        self.a += right.sum(2).sum(0, dtype=wide).cpu()
        self.both += left.mul_(right).sum(2).sum(0, dtype=wide).cpu()
        del left, right
        self.inputs.add(call, tap)
        rows_bmp, g = tap.rows(delta), self.layer.groups
        _, m, p = rows_bmp.shape
        # Some samples at a time, whose copy stays in a CPU's cache, but enough that n x n sums are few.
        for part in torch.split(rows_bmp, max(1, max(CACHED // m, 4 * m) // p)):
            self.outputs.add(part.reshape(len(part), g, m // g, p).permute(1, 0, 3, 2).reshape(g, -1, m // g))

    def to_cpu(self) -> tuple[tuple[Tensor, ...], SecondMoment, SecondMoment]:
        """Return the sums on the CPU, for another rank."""
        return (self.delta, self.a, self.both), self.outputs.to("cpu"), self.inputs.moment.to("cpu")

    def merged(
        self, parts: Sequence[tuple[tuple[Tensor, ...], SecondMoment, SecondMoment]], device: torch.device
    ) -> FactorSums:
        """Return the total of the sums of all ranks, as `to_cpu` gives them."""
        total = FactorSums(self.layer, self.triplets, InputMoment(self.inputs.moment.k))
        for (delta, a, both), outputs, inputs in parts:
            total.delta += delta
            total.a += a
            total.both += both
            total.outputs.add_moment(outputs.to(device))
            total.inputs.moment.add_moment(inputs.to(device))
        return total

    def factors(self) -> KroneckerFactors:
        """Return means and eigenvalues."""
        delta, a = self.outputs.eigenvalues(), self.inputs.eigenvalues()
        n = self.outputs.count
        incomplete = [name for name, values in (("C_delta", delta), ("C_A", a)) if not values.complete]
        return KroneckerFactors(
            energy_delta=self.delta / n,
            energy_a=self.a / n,
            joint=self.both / n,
            lambda_delta=self._of_directions(delta.values),
            lambda_a=self._of_directions(a.values),
            effective_rank_delta=_effective_rank(delta),
            effective_rank_a=_effective_rank(a),
            rows=n,
            note=f"only leading eigenvalues of {' and '.join(incomplete)} (over {MAX_DENSE} dimensions), so no "
            "effective rank; of several micro-batches they are lower bounds"
            if incomplete
            else "",
        )

    def _of_directions(self, values_gr: Tensor) -> Tensor:
        """Return for each direction the eigenvalue of its group with the rank that it has there."""
        values, next_rank = [], [0] * len(values_gr)
        for group in self.groups.tolist():
            rank = next_rank[group]
            next_rank[group] += 1
            values.append(float(values_gr[group, rank]) if rank < values_gr.shape[1] else float("nan"))
        return torch.tensor(values, dtype=torch.float64)


def _effective_rank(eigenvalues: Eigenvalues) -> float:
    if not eigenvalues.complete:
        return float("nan")
    ranks = torch.tensor([entropy_rank(values) for values in eigenvalues.values], dtype=torch.float64)
    return float(ranks.nanmean())


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
