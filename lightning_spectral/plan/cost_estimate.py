"""The cost of a measurement by each method, put together from the formulas of `lightning_spectral.plan.cost_model`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lightning_spectral.curvature import METHODS
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement.sharded.on_demand_weights import SMALL, whole_at_a_time
from lightning_spectral.numerics.matmul_precision import PRECISIONS
from lightning_spectral.options import Options
from lightning_spectral.plan.cost_model import (
    TRACE_GRAPH,
    USUAL,
    Memory,
    Pass,
    Sort,
    curvature_passes,
    directions_of,
    factor_bytes,
    factor_flops,
    gradient_passes,
    graph_of,
    parts_of,
    steps_at,
    svd_bytes,
    svd_flops,
    trace_passes,
    values_flops,
)
from lightning_spectral.plan.fake_run import Traced

WITHOUT_BATCH = (
    "which method 'auto' falls on: whether the network is piecewise linear shows in the graph of its loss on a batch",
    "how much memory the graphs take, and what singular triplets cost beside a training step, without a batch",
)
IN_VALUES = (
    "what shows in values alone: whether samples interact, whether Gauss-Newton passes its check, whether the loss is "
    "a mean or a sum over samples, and how many draws a sketch takes"
)


@dataclass(frozen=True)
class Cost:
    """What a measurement by one method costs.

    Attributes:
        method: of the curvature.
        parts: pieces per batch, whose graphs are in memory one at a time.
        passes: over the samples measured, in order.
        share: samples measured, of all batches, by those of a training step.
        extra: training steps for singular triplets and Kronecker factors, which do not grow with the samples; 0 where
            the FLOPs of a training step are not known.
        memory: in bytes, on each process.
        known: whether the graphs are part of it, which takes a batch.
    """

    method: str
    parts: int
    passes: tuple[Pass, ...]
    share: float
    extra: float
    memory: Memory
    known: bool

    @property
    def steps(self) -> tuple[float, float]:
        """Training steps' time, at least and at most: share * sum of (count * steps of one) + extra."""
        least = sum(one.least * one.steps for one in self.passes)
        most = sum(one.most * one.steps for one in self.passes)
        return self.share * least + self.extra, self.share * most + self.extra

    @property
    def products(self) -> tuple[int, int]:
        """Hessian-vector products, at least and at most, each over all samples measured."""
        return self._count("product")

    @property
    def columns(self) -> tuple[int, int]:
        """Backward passes of columns of the output's Hessian, likewise."""
        return self._count("column")

    def _count(self, sort: Sort) -> tuple[int, int]:
        found = [one for one in self.passes if one.sort == sort]
        return sum(one.least for one in found), sum(one.most for one in found)

    def to_dict(self) -> dict[str, Any]:
        """Plain, with what follows from the attributes."""
        derived = {"steps": self.steps, "products": self.products, "columns": self.columns}
        return asdict(self) | derived | {"peak_bytes": self.memory.peak}


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is known of a measurement before it is run.

    Attributes:
        model: without wrappers.
        layers: to be measured.
        seen: of its loss on a batch; None without a batch.
        options, n_batches, world_size, sharded: as in `lightning_spectral.plan.planner.plan_spectra`.
    """

    model: nn.Module
    layers: Mapping[str, MatrixLayer]
    seen: Traced | None
    options: Options
    n_batches: int
    world_size: int
    sharded: bool = False

    @property
    def local(self) -> int | None:
        """Samples measured of one process's part of a batch."""
        if self.seen is None or self.seen.samples is None:
            return None
        part = math.ceil(self.seen.samples / self.world_size)
        return min(part, self.options.max_samples or part)

    @property
    def samples(self) -> int | None:
        """Those of all processes."""
        if self.local is None or self.seen is None or self.seen.samples is None:
            return None
        return min(self.seen.samples, self.local * self.world_size)

    @property
    def directions(self) -> dict[str, int]:
        """Layer name -> how many directions at most, for those that the loss depends on."""
        structure = None if self.seen is None else self.seen.structure
        out = () if structure is None else structure.unreached
        return {
            name: directions_of(layer, self.options.top_k, self._rows(name) or None)
            for name, layer in self.layers.items()
            if name not in out
        }

    @property
    def obstacle(self) -> str:
        """Why Gauss-Newton is not the Hessian; empty if it is, or nothing is known."""
        return "" if self.seen is None else self.seen.structure.obstacle

    @property
    def sent(self) -> int:
        """(w - 1) / w of gradients and directions, whose layers w processes share out, and w - 1 times the curvatures.

        Those are of float64, with their errors. Of shards, also (w - 1) / w of the weights each time that they are
        read, as far as the method is known.
        """
        w, itemsize = self.world_size, self._itemsize(torch.float32)
        triplets = itemsize * sum(k * sum(self.layers[name].shape) for name, k in self.directions.items())
        curvatures = 2 * 8 * sum(self.directions.values())
        shared = self._gradients() + triplets
        if self.sharded and (method := self.choice()[0]):
            cost = self.cost(method)
            reads = sum(one.most * one.reads for one in cost.passes) * cost.parts * self.n_batches
            shared += reads * sum(p.numel() * p.element_size() for p in self.model.parameters())
        return round((w - 1) / w * shared + (w - 1) * curvatures)

    def choice(self) -> tuple[str, str, tuple[str, ...]]:
        """The method, the choice and its reasons, and what cannot be told. The method is empty where that is it."""
        asked = self.options.curvature
        if self.seen is None:
            return ("", "", WITHOUT_BATCH) if asked == "auto" else (asked, f"{asked}: as asked for", WITHOUT_BATCH[1:])
        if asked == "auto":
            total = None if self.samples is None else self.samples * self.n_batches
            return (*self.seen.structure.choice(total), self._unseen)
        refusal = "" if self.possible(asked) else f", but would fail: {self._refusal(asked)}"
        return asked, f"{asked}: as asked for{refusal}", self._unseen

    @property
    def _unseen(self) -> tuple[str, ...]:
        if self.seen is None or not self.seen.read:
            return (IN_VALUES,)
        return IN_VALUES, f"what the loss does with {self.seen.read} values that it reads, here as zero"

    def possible(self, method: str) -> bool:
        """Whether a method is known not to refuse the loss; "auto" is none."""
        return METHODS.get(method) is not None and not self._refusal(method)

    def _refusal(self, method: str) -> str:
        structure = None if self.seen is None else self.seen.structure
        if structure is None or method == "exact":
            return ""
        if method == "sketch" and structure.custom:
            return f"the network holds custom autograd functions ({', '.join(structure.custom)})"
        return structure.refusal if method == "ggn" else ""

    def at_once(self, parts: int) -> int:
        """Samples of one piece; 0 where the batch does not tell."""
        return 0 if self.local is None else math.ceil(self.local / parts)

    def cost(self, method: str) -> Cost:
        """What the measurement costs by one method."""
        structure = None if self.seen is None else self.seen.structure
        fixed, parts = self.options.micro_batch_size is not None, self._parts(graph_of(method))
        keeps = method != "exact" or fixed or not self._divisible
        passes = gradient_passes(method, parts, self._steps, fixed=fixed, reused=self.n_batches == parts == 1 and keeps)
        total = None if self.samples is None else self.samples * self.n_batches
        checked = self.options.curvature == "auto" and self.choice()[0] == "ggn"
        passes += curvature_passes(method, self.directions, structure, total, self._steps, checked=checked)
        if self.options.curvature_fraction:
            passes += trace_passes(self.options.curvature_fraction, self._parts(TRACE_GRAPH), self._steps)
        known = self.seen is not None and self.samples is not None
        share = self.n_batches * (self.samples or 1) / ((self.seen.samples if self.seen else None) or 1)
        return Cost(method, parts, tuple(passes), share, self._extra(), self._memory(method, parts), known)

    @property
    def _steps(self) -> dict[str, float]:
        known = self.seen is not None and self.seen.step_flops
        return steps_at(self.seen.activations / self.seen.step_flops if self.seen is not None and known else USUAL)

    @property
    def _divisible(self) -> bool:
        return self.seen is None or self.seen.divisible

    def _parts(self, memory: float) -> int:
        return parts_of(memory, self.local, self.options.micro_batch_size, self._divisible)

    def _rows(self, name: str) -> int:
        """Of a layer's output, of all samples measured; 0 where they are not known."""
        if self.seen is None or self.seen.samples is None or name not in self.seen.structure.rows:
            return 0
        return self.n_batches * self.seen.structure.rows[name] * (self.samples or 1) // self.seen.samples

    def _extra(self) -> float:
        """Training steps for what is done once per layer."""
        flops = 0.0
        for name, layer in self.layers.items():
            flops += svd_flops(layer, self.options.top_k)
            if (self.options.spectrum_top_k or 0) > self.options.top_k:
                flops += values_flops(layer)
            if self.options.alignment:
                flops += factor_flops(layer, self._rows(name))
        # The layers are shared out among processes, as the samples of a step are.
        return flops / self.seen.step_flops if self.seen is not None and self.seen.step_flops else 0.0

    def _itemsize(self, dtype: torch.dtype) -> int:
        return torch.promote_types(dtype, PRECISIONS[self.options.precision]).itemsize

    def _gradients(self) -> int:
        return sum(self._gradient_sizes())

    def _gradient_sizes(self) -> list[int]:
        """In bytes, the smallest first."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found = {layer.parameter: parameters[layer.parameter] for layer in self.layers.values()}
        return sorted(p.numel() * self._itemsize(p.dtype) for p in found.values())

    def _memory(self, method: str, parts: int) -> Memory:
        options, fixed = self.options, self.options.micro_batch_size is not None
        tensors = [t for t in (*self.model.parameters(), *self.model.buffers()) if t.is_floating_point()]
        itemsize = self._itemsize(torch.float32)
        triplets = sum(k * sum(self.layers[name].shape) for name, k in self.directions.items())
        of_batch = self.seen.activations if self.seen is not None else 0
        per_sample = of_batch / ((self.seen.samples if self.seen is not None else None) or 1)
        graph = graph_of(method) * self.at_once(parts)
        if options.curvature_fraction:
            graph = max(graph, TRACE_GRAPH * self.at_once(self._parts(TRACE_GRAPH)))
        summed = self.n_batches > 1 or (fixed and parts > 1)
        factors = [factor_bytes(layer) for layer in self.layers.values()] if options.alignment else [0]
        weights = [t.numel() * self._itemsize(t.dtype) for t in tensors]
        sizes = self._gradient_sizes()
        # The smallest and those that are small stay where they are taken.
        split = [size for size in sizes[1:] if size >= SMALL] if self.sharded else []
        stay = (sum(sizes) - sum(split)) * (2 if summed else 1)
        return Memory(
            weights=whole_at_a_time(weights) if self.sharded else sum(weights),
            gradients=stay + (math.ceil(sum(split) / self.world_size) + 2 * max(split) if split else 0),
            svd=max(svd_bytes(layer, options.top_k, itemsize) for layer in self.layers.values()),
            directions=itemsize * triplets,
            gradient_graph=round(per_sample * self.at_once(parts if fixed else 1)),
            # Double backward keeps the gradients that it differentiates.
            curvature_graph=round(per_sample * graph) + (sum(split) if method == "exact" else 0),
            factors=sum(factors) if summed else max(factors),
        )
