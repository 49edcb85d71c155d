"""What a measurement costs before it is run: passes in units of a training step, floating-point operations, bytes.

A training step is a forward and a backward pass in float32 on the samples measured, without the optimizer. Pieces of a
batch are parts of it: 12 products on each of three thirds of the samples are 12 products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_spectral.curvature import METHODS, HutchinsonTrace, Structure
from lightning_spectral.curvature.gauss_newton import EXACT_COLUMNS
from lightning_spectral.curvature.sketch import DRAWS, RANKS, SAMPLES_PER_RANK
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.estimation import MEMORY
from lightning_spectral.numerics.second_moment import MAX_DENSE
from lightning_spectral.numerics.svd import is_large

WORK = {
    "forward": (1 / 3, 1 / 3),
    "step": (1.0, 1.0),
    "exact": (0.5, 1.3),
    "column": (1 / 3, 1.5),
    "sketch": (2 / 3, 5.0),
    "zeros": (2 / 3, 2.0),
}
"""What a pass takes of matrix products and of all the rest, each in that of a training step on the same samples.

exact: a product with one layer's Hessian, of a layer in the middle; column: a backward pass of the output, read at
every layer; sketch: a product with all layers' outputs, likewise; zeros: the two passes that such products start from.
The first are counts of products with a matrix; the second, and BALANCE, were fitted to times on one CPU thread, and
`examples/benchmarks/scaling.py` holds both against others.
"""

BALANCE = 40.0
"""FLOPs of matrix products in the time that a training step takes per byte that its graph keeps for all the rest."""

USUAL = 0.005
"""Bytes that a graph keeps per FLOP, where they are not known: those of a GPT of width 200."""

FACTOR = 2.0
"""Within which the time of a probe is planned; of those that the benchmark measured, the farthest was off by 1.35."""

Sort = Literal["pass", "forward", "column", "product"]


def steps_at(intensity: float) -> dict[str, float]:
    """Sort of pass -> training steps, for a network whose graph keeps so many bytes per FLOP of a training step.

    (w + e b x) / (1 + b x), with w and e of `WORK`, b of `BALANCE` and x the intensity: wide networks spend their time
    in matrix products, narrow ones in the rest, of which products with a Hessian have more.

    >>> steps_at(0.0)["sketch"] < steps_at(0.02)["sketch"]
    True
    """
    rest = BALANCE * intensity
    return {sort: (matrices + other * rest) / (1 + rest) for sort, (matrices, other) in WORK.items()}


@dataclass(frozen=True)
class Pass:
    """One sort of pass over all samples measured.

    Attributes:
        what: it is.
        sort: "product" with a Hessian, "column" of the output passed back, "forward" alone, or another "pass".
        least, most: how many, of which the values of the loss decide.
        steps: of one, in training steps.
    """

    what: str
    sort: Sort
    least: int
    most: int
    steps: float

    @property
    def reads(self) -> int:
        """How often one of them reads each weight, at most."""
        return 1 if self.sort in ("column", "forward") else 2


@dataclass(frozen=True)
class Memory:
    """Bytes beside the network itself, its optimizer and its batch.

    Attributes:
        weights: the copy that is measured on; of shards, those that are whole at a time.
        gradients: of the layers' parameters; two of each where they are summed over pieces; of shards, the sums that
            fall to one process, and the largest.
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
        """Gradients and their triplets come first, the curvature after they are let go."""
        first = self.gradients + self.svd + self.gradient_graph
        return self.weights + self.directions + max(first, self.curvature_graph, self.factors + self.gradient_graph)


def directions_of(layer: MatrixLayer, k: int, rows: int | None = None) -> int:
    """How many singular directions a gradient (m, n) has at most: K, its rank, and the rows it is a sum over.

    >>> directions_of(MatrixLayer("w", "w", "", "dense", (64, 27)), 20, rows=16)
    16
    """
    m, n = layer.shape
    rank = min(m // layer.groups, n, n if rows is None else rows)
    return min(k, layer.groups * rank)


def parts_of(memory: float, samples: int | None, micro_batch_size: int | None, divisible: bool) -> int:
    """Into how many pieces a batch is cut for a method that needs ``memory`` training steps' for it whole.

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


def sketch_products(directions: Iterable[int], samples: int | None) -> tuple[int, int]:
    """Products of a sketch, at least and at most: two or three draws of ceil(K / ranks) each.

    ranks = samples / 16, from 1 to 5; 5 where the samples are not known.

    >>> sketch_products([20, 10], 256)
    (8, 12)
    """
    ranks = RANKS if samples is None else min(max(samples // SAMPLES_PER_RANK, 1), RANKS)
    draw = math.ceil(max(directions, default=0) / ranks)
    return 2 * draw, DRAWS * draw


def gradient_passes(
    method: str, parts: int, steps: Mapping[str, float], *, fixed: bool = False, reused: bool = False
) -> list[Pass]:
    """The gradient, the weights of the pieces, and once more gradients, piece by piece, to take the curvature of.

    Args:
        method: of the curvature.
        parts: pieces per batch.
        steps: of `steps_at`.
        fixed: whether ``micro_batch_size`` says how large they are; then the loss of the whole batch is not yet known.
        reused: whether the curvature is taken on the graph of the gradient.
    """
    found = [Pass("forward and backward pass for the gradient", "pass", 1, 1, steps["step"])]
    if parts > 1:
        n = 2 if fixed else 1
        found.append(Pass("forward passes for the weights of the pieces", "forward", n, n, steps["forward"]))
    if not reused:
        found.append(Pass(f"forward and backward pass for {method}", "pass", 1, 1, steps["step"]))
    return found


def curvature_passes(
    method: str,
    directions: Mapping[str, int],
    structure: Structure | None,
    samples: int | None,
    steps: Mapping[str, float],
    *,
    checked: bool = False,
) -> list[Pass]:
    """The passes of a curvature method beyond those of `gradient_passes`.

    Args:
        method: "exact", "ggn" or "sketch".
        directions: layer name -> K, for those that the loss depends on.
        structure: of the loss; None: not known, and taken as that of layers that are all seen through their outputs.
        samples: in all.
        steps: of `steps_at`.
        checked: whether "auto" chose, which holds Gauss-Newton against an exact product.
    """
    apart = list(directions) if method == "exact" else [n for n in directions if structure and n in structure.apart]
    tapped = [directions[name] for name in directions if name not in apart]
    found = []
    if method == "ggn" and tapped:
        # One more tells whether samples interact.
        least, most = (1, EXACT_COLUMNS) if structure is None else (structure.passes, structure.passes)
        found.append(Pass("backward passes of output columns", "column", 1 + least, 1 + most, steps["column"]))
        if checked:
            found.append(Pass("forward and backward pass for the check", "pass", 1, 1, steps["step"]))
            found.append(Pass("Hessian-vector product for the check", "product", 1, 1, steps["exact"]))
    elif tapped:
        least, most = sketch_products(tapped, samples)
        # Without a known loss in it, a product takes the place of a column of the output.
        unknown = int(structure is not None and bool(structure.refusal))
        found.append(Pass("forward and backward pass from the layers' outputs", "pass", 1, 1, steps["zeros"]))
        found.append(Pass("backward pass of an output column", "column", 1 - unknown, 1 - unknown, steps["column"]))
        what = "Hessian-vector products for all layers at once"
        found.append(Pass(what, "product", least + unknown, most + unknown, steps["sketch"]))
    if apart:
        n = sum(directions[name] for name in apart)
        if method != "exact":
            found.append(Pass("forward and backward pass for layers apart", "pass", 1, 1, steps["step"]))
        found.append(Pass("Hessian-vector products, one per layer and direction", "product", n, n, steps["exact"]))
    return [one for one in found if one.most]


def trace_passes(draws: int, parts: int, steps: Mapping[str, float]) -> list[Pass]:
    """Those of ``curvature_fraction``: a product for each draw, and one that tells whether samples interact."""
    first = gradient_passes("the trace", parts, steps)[1:]
    return [
        *first,
        Pass("forward and backward pass from the layers' outputs", "pass", 1, 1, steps["zeros"]),
        Pass("Hessian-vector products for the trace", "product", draws + 1, draws + 1, steps["sketch"]),
    ]


def graph_of(method: str) -> float:
    """Peak memory of a curvature method, in that of a training step on the same samples."""
    make = METHODS[method]
    assert make is not None
    return make().memory


TRACE_GRAPH = HutchinsonTrace.memory


def svd_flops(layer: MatrixLayer, k: int) -> float:
    """Of the leading triplets, as many as matrix products of float32 do in its time.

    2 * 10 * 4 m n (K + 4) for ten blocks of Lanczos in float64, at half the speed; 4 (4 m n r + 13 r^3), r = min(m, n),
    for a full SVD, at a quarter; each times the groups.
    """
    m, n = layer.shape[0] // layer.groups, layer.shape[1]
    if is_large((m, n), k):
        return layer.groups * 80.0 * m * n * (k + 4)
    r = min(m, n)
    return 4 * layer.groups * (4.0 * m * n * r + 13.0 * r**3)


def svd_bytes(layer: MatrixLayer, k: int, itemsize: int = 4) -> int:
    """Workspace of the same: 11 r^2 bytes of Lanczos basis, or copy, U, V and 4 r^2 entries of a full SVD."""
    m, n = layer.shape[0] // layer.groups, layer.shape[1]
    r = min(m, n)
    if is_large((m, n), k):
        return 11 * r * r
    return layer.groups * itemsize * (m * n + (m + n) * r + 4 * r * r)


def values_flops(layer: MatrixLayer) -> float:
    """Of all singular values, by the Gram matrix in float64: 2 (2 m n r) and 4 r^3 for its eigenvalues."""
    m, n = layer.shape[0] // layer.groups, layer.shape[1]
    r = min(m, n)
    return layer.groups * (4.0 * m * n * r + 16.0 * r**3)


def factor_flops(layer: MatrixLayer, rows: int) -> float:
    """Of C_A (n, n) and C_delta (m, m) of so many rows, and their eigenvalues: 2 rows (m^2 + n^2) + 3 (m^3 + n^3)."""
    m, n = layer.shape[0] // layer.groups, layer.shape[1]
    return layer.groups * (2.0 * rows * (m**2 + n**2) + 3.0 * (m**3 + n**3))


def factor_bytes(layer: MatrixLayer) -> int:
    """(m^2 + n^2) entries of float32, m and n up to the 8192 above which no matrix is held."""
    m, n = (side if side <= MAX_DENSE else 0 for side in (layer.shape[0] // layer.groups, layer.shape[1]))
    return 4 * layer.groups * (m * m + n * n)
