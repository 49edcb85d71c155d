"""Sums over samples and positions from which the Kronecker factors of one layer are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_spectral.curvature import TRANSPOSED, LayerCall
from lightning_spectral.curvature.ports import Port, SampleLayout, groups_of
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.numerics.conv_patches import Patches
from lightning_spectral.numerics.matmul_precision import accumulation_dtype
from lightning_spectral.numerics.second_moment import MAX_DENSE, SecondMoment
from lightning_spectral.numerics.statistics import entropy_rank
from lightning_spectral.numerics.svd import SingularTriplets
from lightning_spectral.records.alignment import KroneckerFactors

CACHED = 2**18
"""Entries of gradients in outputs that are brought into rows at a time."""


class InputMoment:
    """Second moment of one parameter's inputs, which parts of a fused projection share."""

    def __init__(self, k: int) -> None:
        self.moment = SecondMoment(k)
        self._added: list[LayerCall] = []

    def release(self) -> None:
        """Let go of the calls, whose outputs hold the graph of their micro-batch."""
        self._added = []

    def add(self, call: LayerCall, a: Tensor, kernel: torch.Size, groups: int) -> None:
        """Add the inputs a of one call, once."""
        if any(call is added for added in self._added):
            return
        self._added.append(call)
        if not call.is_convolution:
            self.moment.add(a.reshape(1, -1, a.shape[-1]))
            return
        patches = Patches.of(a, kernel, call.options, groups=groups, transposed=call.function in TRANSPOSED)
        if patches.length <= MAX_DENSE and patches.rows > patches.length and patches.correlates():
            self.moment.add_gram(patches.correlation(), patches.rows)
        else:
            for rows in patches.unfolded():
                self.moment.add(rows)

    @cached_property
    def eigenvalues(self) -> tuple[Tensor, bool]:
        """Eigenvalues of C_A, and whether all others are zero."""
        return self.moment.eigenvalues()


class FactorSums:
    """Sums over samples and positions for one layer."""

    def __init__(self, layer: MatrixLayer, triplets: SingularTriplets, inputs: InputMoment) -> None:
        self.layer, self.triplets, self.inputs = layer, triplets, inputs
        self.groups = groups_of(layer, triplets)
        self.outputs = SecondMoment(len(triplets))
        self.delta, self.a, self.both = (torch.zeros(len(triplets), dtype=torch.float64) for _ in range(3))

    def add(self, call: LayerCall, delta: Tensor, scale: float, shape: torch.Size) -> None:
        """Add one call and the gradient in its output, times ``scale``."""
        delta = _at_least_float32(delta) * (scale * call.scale)
        # Which rows are of which sample does not matter here.
        raised = replace(call, input=_at_least_float32(call.input), scale=1.0)
        left, right = Port(self.layer, raised, shape, self.triplets, SampleLayout((1, 1, 1))).sides(delta)
        left, right = left.square_(), right.square_()
        wide, over = accumulation_dtype(left), (0, 2) if call.is_convolution else tuple(range(left.ndim - 1))
        self.delta += left.sum(over, dtype=wide).cpu()
        self.a += right.sum(over, dtype=wide).cpu()
        self.both += left.mul_(right).sum(over, dtype=wide).cpu()
        del left, right
        self.inputs.add(call, raised.input, shape[2:], self.layer.groups)
        rows_bmp, g = call.to_rows(delta), self.layer.groups
        rows_bmp = rows_bmp.flatten(2) if call.is_convolution else rows_bmp.reshape(1, -1, call.width).mT
        rows_bmp = rows_bmp if self.layer.rows is None else rows_bmp[:, slice(*self.layer.rows)]
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
        (delta, all_delta), (a, all_a) = self.outputs.eigenvalues(), self.inputs.eigenvalues
        n = self.outputs.count
        incomplete = [name for name, complete in (("C_delta", all_delta), ("C_A", all_a)) if not complete]
        return KroneckerFactors(
            energy_delta=self.delta / n,
            energy_a=self.a / n,
            joint=self.both / n,
            lambda_delta=self._of_directions(delta),
            lambda_a=self._of_directions(a),
            effective_rank_delta=_effective_rank(delta) if all_delta else float("nan"),
            effective_rank_a=_effective_rank(a) if all_a else float("nan"),
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


def _effective_rank(values_gr: Tensor) -> float:
    return float(torch.tensor([entropy_rank(values) for values in values_gr], dtype=torch.float64).nanmean())


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
