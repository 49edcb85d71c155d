"""Formulas of what a measurement costs: passes in units of a training step, floating-point operations, bytes.

A training step is a forward and a backward pass in float32 on the samples measured, without the optimizer.
Micro-batches are parts of a batch: 12 products on each of three thirds of the samples are 12 products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_spectral.curvature import METHODS, HutchinsonTrace, Structure
from lightning_spectral.curvature.gauss_newton import EXACT_COLUMNS, LEAST_COLUMNS, RANDOM_COLUMNS
from lightning_spectral.curvature.sketch import sketch_products
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.estimation import MEMORY
from lightning_spectral.numerics.second_moment import MAX_DENSE
from lightning_spectral.numerics.svd import is_large

STEP_FLOPS = {"gradient": 1.0, "forward": 1 / 3, "column": 1 / 3, "product": 1 / 2, "joint product": 2 / 3}
"""FLOPs of a pass in those of a training step, counted in products with a matrix.

gradient: a forward and a backward pass; column: a backward pass of one column of the output's Hessian; product: with
the Hessian of one layer, of a layer in the middle; joint product: with all layers' outputs.
"""

OVERHEAD = 1.4
"""Time per FLOP of all passes but a gradient's, in that of a training step: their other operations take longer."""

FACTOR = 3.0
"""Factor within which the time of a probe is planned; for networks of width 96 and more the benchmark found 2."""

SAMPLE_COLUMNS = 2
"""Columns that tell whether samples interact."""

Count = tuple[int, int]
"""Number of passes, at least and at most; the values of the loss decide."""


@dataclass(frozen=True)
class Memory:
    """Bytes beside the network itself, its optimizer and its batch.

    Attributes:
        weights: the copy that is measured on; of shards, those that are whole at a time.
        gradients: of the layers' parameters; two of each where they are summed over micro-batches; of shards, the sums
            that fall to one rank, and the largest.
        svd: workspace of the largest layer's.
        directions: U (m, K) and V (n, K) of every layer.
        gradient_graph, curvature_graph: of the samples whose gradient and curvature are taken at once.
        factors: C_A and C_delta of the alignment that are held at once.
    """

    weights: int
    gradients: int
    svd: int
    directions: int
    gradient_graph: int
    curvature_graph: int
    factors: int = 0

    @property
    def peak(self) -> int:
        """Peak, in bytes: gradients and their triplets come first, the curvature after they are let go."""
        first = self.gradients + self.svd + self.gradient_graph
        return self.weights + self.directions + max(first, self.curvature_graph, self.factors + self.gradient_graph)


@dataclass(frozen=True)
class Cost:
    """Cost of a measurement by one method.

    Attributes:
        method: of the curvature.
        parts: micro-batches per batch, whose graphs are in memory one at a time.
        passes: kind of pass, of `STEP_FLOPS` -> how many over the samples measured.
        share: samples measured, of all batches, by those of a training step.
        extra: training steps for singular triplets and Kronecker factors, which do not grow with the samples, as far
            as the FLOPs of a training step are known, and for a gradient of other samples than the curvature's.
        memory: in bytes, on each rank.
        has_graph: whether the graphs are part of it, which takes a batch.
    """

    method: str
    parts: int
    passes: Mapping[str, Count]
    share: float
    extra: float
    memory: Memory
    has_graph: bool

    @property
    def steps(self) -> tuple[float, float]:
        """Time in training steps, at least and at most: share * (gradients + OVERHEAD * FLOPs of the rest) + extra."""
        least, most = (
            sum(
                STEP_FLOPS[kind] * (1.0 if kind == "gradient" else OVERHEAD) * count[end]
                for kind, count in self.passes.items()
            )
            for end in (0, 1)
        )
        return self.share * least + self.extra, self.share * most + self.extra

    @property
    def products(self) -> Count:
        """Hessian-vector products, at least and at most, each over all samples measured."""
        return _add(self.passes.get("product", (0, 0)), self.passes.get("joint product", (0, 0)))

    @property
    def columns(self) -> Count:
        """Backward passes of columns of the output's Hessian, at least and at most."""
        return self.passes.get("column", (0, 0))

    @property
    def reads(self) -> int:
        """Number of times that each weight is read, at most: once by a forward or backward pass alone, else twice."""
        return sum(most * (1 if kind in ("forward", "column") else 2) for kind, (_, most) in self.passes.items())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with what follows from the attributes."""
        derived = {"steps": self.steps, "products": self.products, "columns": self.columns}
        return asdict(self) | derived | {"peak_bytes": self.memory.peak}


def _add(one: Count, other: Count) -> Count:
    return one[0] + other[0], one[1] + other[1]


def direction_count(layer: MatrixLayer, k: int, rows: int | None = None) -> int:
    """Return how many singular directions a gradient (m, n) has at most: K, its rank, and the rows it is a sum over.

    >>> direction_count(MatrixLayer("w", "w", "", "dense", (64, 27)), 20, rows=16)
    16
    """
    m, n = layer.shape
    rank = min(m // layer.groups, n, n if rows is None else rows)
    return min(k, layer.groups * rank)


def part_count(memory: float, samples: int | None, micro_batch_size: int | None, divisible: bool) -> int:
    """Return into how many micro-batches a batch is cut that takes ``memory`` times a training step's memory whole.

    ceil(samples / micro_batch_size), or without that as many as keep the peak near three training steps'.
    """
    if not divisible:
        return 1
    if samples is None:
        return math.ceil(memory / MEMORY)
    if micro_batch_size is not None:
        return math.ceil(samples / micro_batch_size)
    largest = math.ceil(samples / math.ceil(memory / MEMORY))
    return math.ceil(samples / largest)


def count_passes(
    method: str,
    directions: Mapping[str, int],
    structure: Structure | None,
    samples: int | None,
    parts: int,
    *,
    micro_batches_given: bool = False,
    reuses_graph: bool = False,
    checked: bool = False,
) -> dict[str, Count]:
    """Count the passes of gradient and curvature by kind.

    Args:
        directions: layer name -> K, for those that the loss depends on.
        structure: of the loss; None: not known, and taken as that of layers that are all seen through their outputs.
        parts: micro-batches per batch, whose weights take a forward pass.
        micro_batches_given: whether ``micro_batch_size`` is set; then the loss of the whole batch takes one, too.
        reuses_graph: whether the curvature is taken on the graph of the gradient.
        checked: whether "auto" chose, which holds Gauss-Newton against an exact product.
    """
    apart = list(directions) if method == "exact" else [n for n in directions if structure and n in structure.apart]
    tapped = [directions[name] for name in directions if name not in apart]
    gradients, products = 1 + (not reuses_graph), sum(directions[name] for name in apart)
    columns, joint, moved = (0, 0), (0, 0), bool(tapped) and method != "exact"
    if method == "ggn" and tapped:
        n = structure.loss.outputs if structure is not None else RANDOM_COLUMNS
        exact = (n if structure is not None else 1, n)
        of_head = (LEAST_COLUMNS, RANDOM_COLUMNS) if structure and n > EXACT_COLUMNS else exact
        columns = _add(of_head, (SAMPLE_COLUMNS,) * 2)
        gradients += checked
        products += checked
    elif moved:
        of_output = structure.loss.sketch_columns if structure is not None else 0
        columns = (SAMPLE_COLUMNS, SAMPLE_COLUMNS + of_output)
        # Columns leave nothing of a piecewise-linear network to products.
        alone = structure is not None and of_output and not structure.loss.obstacle
        joint = (0, 0) if alone else sketch_products(tapped, samples, of_output)
        gradients += 1
    gradients += bool(apart) and method != "exact"
    forwards = moved + (1 + micro_batches_given) * (parts > 1)
    passes = {
        "gradient": (gradients, gradients),
        "forward": (forwards, forwards),
        "column": columns,
        "product": (products, products),
        "joint product": joint,
    }
    return {kind: count for kind, count in passes.items() if count[1]}


def add_trace(passes: Mapping[str, Count], draws: int, parts: int) -> dict[str, Count]:
    """Add the passes of ``curvature_fraction``: a product per draw, and two that tell whether samples interact."""
    extra = {"gradient": 2, "forward": int(parts > 1), "joint product": draws + 2}
    return {kind: _add(passes.get(kind, (0, 0)), (extra.get(kind, 0),) * 2) for kind in {**passes, **extra}}


def graph_memory(method: str) -> float:
    """Return the peak memory of a curvature method, in that of a training step on the same samples."""
    make = METHODS[method]
    assert make is not None
    return make().memory


TRACE_GRAPH = HutchinsonTrace.memory


def layer_flops(layer: MatrixLayer, k: int, *, all_values: bool = False, factor_rows: int | None = None) -> float:
    """Return the FLOPs of what is done once per layer, as many as matrix products of float32 do in its time.

    Leading triplets: 2 * 10 * 4 m n (K + 4) for ten blocks of Lanczos in float64, at half the speed, or
    4 (4 m n r + 13 r^3), r = min(m, n), for a full SVD, at a quarter; each times the groups. All singular values, by
    the Gram matrix in float64: 4 m n r + 16 r^3. Kronecker factors of so many rows: 2 rows (m^2 + n^2) +
    3 (m^3 + n^3).
    """
    m, n = layer.shape[0] // layer.groups, layer.shape[1]
    r = min(m, n)
    flops = 80.0 * m * n * (k + 4) if is_large((m, n), k) else 4 * (4.0 * m * n * r + 13.0 * r**3)
    if all_values:
        flops += 4.0 * m * n * r + 16.0 * r**3
    if factor_rows is not None:
        flops += 2.0 * factor_rows * (m**2 + n**2) + 3.0 * (m**3 + n**3)
    return layer.groups * flops


def svd_bytes(layer: MatrixLayer, k: int, itemsize: int = 4) -> int:
    """Return the workspace of the triplets: 11 r^2 bytes of Lanczos basis, or what a full SVD takes."""
    m, n = layer.shape[0] // layer.groups, layer.shape[1]
    r = min(m, n)
    if is_large((m, n), k):
        return 11 * r * r
    return layer.groups * itemsize * (m * n + (m + n) * r + 4 * r * r)


def factor_bytes(layer: MatrixLayer) -> int:
    """Return (m^2 + n^2) entries of float32, m and n up to the 8192 above which no matrix is held."""
    m, n = (side if side <= MAX_DENSE else 0 for side in (layer.shape[0] // layer.groups, layer.shape[1]))
    return 4 * layer.groups * (m * m + n * n)
