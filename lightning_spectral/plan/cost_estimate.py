"""Cost of a measurement by each method, put together from the formulas of `lightning_spectral.plan.cost_model`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lightning_spectral.curvature import METHODS
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement import estimation
from lightning_spectral.measurement.objective import CURVATURE_SAMPLES
from lightning_spectral.numerics.matmul_precision import PRECISIONS
from lightning_spectral.options import Options
from lightning_spectral.plan.cost_model import (
    TRACE_GRAPH,
    Cost,
    Memory,
    add_trace,
    count_passes,
    direction_count,
    factor_bytes,
    graph_memory,
    layer_flops,
    part_count,
    svd_bytes,
)
from lightning_spectral.plan.fake_run import Traced

WITHOUT_BATCH = (
    "which method 'auto' falls on: whether the network is piecewise linear shows in the graph of its loss on a batch",
    "how much memory the graphs take, and what singular triplets cost beside a training step, without a batch",
)
IN_VALUES = (
    "what shows in values alone: whether samples interact or are coupled by the loss, whether Gauss-Newton passes its "
    "check, whether the loss is a mean or a sum over samples, and how many draws a sketch takes"
)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A measurement before it is run, as far as it is known.

    Attributes:
        trace: of its loss on a batch; None without a batch.
        options, n_batches, world_size, sharded: as in `plan_spectra`.
    """

    model: nn.Module
    layers: Mapping[str, MatrixLayer]
    trace: Traced | None
    options: Options
    n_batches: int
    world_size: int
    sharded: bool = False

    @property
    def local_samples(self) -> int | None:
        """Samples measured of one rank's part of a batch."""
        if self.trace is None or self.trace.samples is None:
            return None
        part = math.ceil(self.trace.samples / self.world_size)
        of_gradient = self.options.gradient_samples is None or not self.trace.divisible
        return min(part, self.options.max_samples or (part if of_gradient else CURVATURE_SAMPLES))

    @property
    def samples(self) -> int | None:
        """Samples measured of a batch, over all ranks."""
        if self.local_samples is None or self.trace is None or self.trace.samples is None:
            return None
        return min(self.trace.samples, self.local_samples * self.world_size)

    @property
    def all_samples(self) -> int | None:
        """Samples measured, of all batches."""
        return None if self.samples is None else self.samples * self.n_batches

    @property
    def directions(self) -> dict[str, int]:
        """Layer name -> number of directions at most, for those that the loss depends on."""
        unreached = () if self.trace is None else self.trace.structure.unreached
        return {
            name: direction_count(layer, self.options.top_k, self._rows(name) or None)
            for name, layer in self.layers.items()
            if name not in unreached
        }

    @property
    def bytes_sent(self) -> int:
        """Bytes sent by each rank.

        (w - 1) / w of gradients and directions, whose layers w ranks share out, and w - 1 times the curvatures, which
        are of float64, with their errors. Of shards, also (w - 1) / w of the weights each time that they are read, as
        far as the method is known.
        """
        w, itemsize = self.world_size, self._itemsize(torch.float32)
        triplets = itemsize * sum(k * sum(self.layers[name].shape) for name, k in self.directions.items())
        curvatures = 2 * 8 * sum(self.directions.values())
        shared = sum(self._gradient_sizes()) + triplets
        if self.sharded and (method := self.choice()[0]):
            cost = self.cost(method)
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            shared += cost.reads * cost.parts * self.n_batches * weights
        return round((w - 1) / w * shared + (w - 1) * curvatures)

    def choice(self) -> tuple[str, str, tuple[str, ...]]:
        """Return the method, the choice and its reasons, and what cannot be told; no method where that is it."""
        asked = self.options.curvature
        if self.trace is None:
            return ("", "", WITHOUT_BATCH) if asked == "auto" else (asked, f"{asked}: as asked for", WITHOUT_BATCH[1:])
        n = self.trace.values_read
        unknown = (IN_VALUES, f"what the loss does with {n} values that it reads, here as zero")[: 2 if n else 1]
        if self.options.gradient_samples == "auto":
            unknown += (f"how many samples the gradient takes: at most {self.options.gradient_samples_max}",)
        if asked == "auto":
            return (*self.trace.structure.choice(self.directions, self.all_samples), unknown)
        refusal = "" if self.is_possible(asked) else f", but would fail: {self._refusal(asked)}"
        return asked, f"{asked}: as asked for{refusal}", unknown

    def is_possible(self, method: str) -> bool:
        """Return whether nothing is known for which a method would refuse the loss; "auto" is no method."""
        return METHODS.get(method) is not None and not self._refusal(method)

    def _refusal(self, method: str) -> str:
        if self.trace is None or method == "exact":
            return ""
        structure = self.trace.structure
        if method == "sketch" and structure.custom:
            return f"the network holds custom autograd functions ({', '.join(structure.custom)})"
        return structure.loss.obstacle if structure.loss.samples is None else ""

    def samples_at_once(self, parts: int) -> int:
        """Return the samples of one micro-batch; 0 where the batch does not tell."""
        return 0 if self.local_samples is None else math.ceil(self.local_samples / parts)

    def cost(self, method: str) -> Cost:
        """Return the cost of the measurement by one method."""
        size_given, parts = self.options.micro_batch_size is not None, self._parts(graph_memory(method))
        divisible = self.trace is None or self.trace.divisible
        passes = count_passes(
            method,
            self.directions,
            None if self.trace is None else self.trace.structure,
            self.all_samples,
            parts,
            micro_batches_given=size_given,
            reuses_graph=self.n_batches == parts == 1 and (method != "exact" or size_given or not divisible),
            checked=self.options.curvature == "auto" and self.choice()[0] == "ggn",
        )
        if self.options.curvature_fraction:
            passes = add_trace(passes, self.options.curvature_fraction, self._parts(TRACE_GRAPH))
        batch_samples = None if self.trace is None else self.trace.samples
        share = self.n_batches * (self.samples or 1) / (batch_samples or 1)
        extra = self._extra() + self._gradient_steps()
        return Cost(method, parts, passes, share, extra, self._memory(method, parts), batch_samples is not None)

    def _gradient_steps(self) -> float:
        """Return the training steps of a gradient of other samples than the curvature's: of the batches, at least."""
        asked, batch = self.options.gradient_samples, None if self.trace is None else self.trace.samples
        if asked is None or not batch:
            return 0.0
        return max(float(self.n_batches), asked / batch if isinstance(asked, int) else 0.0)

    def _parts(self, memory: float) -> int:
        divisible = self.trace is None or self.trace.divisible
        if self.trace is not None and self.options.micro_batch_size is None and self.trace.samples:
            share = (self.local_samples or 0) / self.trace.samples
            divisible &= self.trace.structure.traced_bytes * share * memory >= estimation.SMALL_BYTES
        return part_count(memory, self.local_samples, self.options.micro_batch_size, divisible)

    def _rows(self, name: str) -> int:
        """Return the rows of a layer's output, of all samples measured; 0 where they are not known."""
        if self.trace is None or self.trace.samples is None or name not in self.trace.structure.rows:
            return 0
        return self.n_batches * self.trace.structure.rows[name] * (self.samples or 1) // self.trace.samples

    def _extra(self) -> float:
        """Return training steps for what is done once per layer; ranks share the layers out as they do the samples."""
        if self.trace is None or not self.trace.step_flops:
            return 0.0
        k, longest = self.options.top_k, self.options.spectrum_top_k or 0
        flops = sum(
            layer_flops(
                layer, k, all_values=longest > k, factor_rows=self._rows(name) if self.options.alignment else None
            )
            for name, layer in self.layers.items()
        )
        return flops / self.trace.step_flops

    def _itemsize(self, dtype: torch.dtype) -> int:
        return torch.promote_types(dtype, PRECISIONS[self.options.precision]).itemsize

    def _gradient_sizes(self) -> list[int]:
        """Return bytes of the gradients, the smallest first."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        measured = {layer.parameter: parameters[layer.parameter] for layer in self.layers.values()}
        return sorted(p.numel() * self._itemsize(p.dtype) for p in measured.values())

    def _memory(self, method: str, parts: int) -> Memory:
        options, size_given = self.options, self.options.micro_batch_size is not None
        per_sample = 0.0 if self.trace is None else self.trace.activations / (self.trace.samples or 1)
        graph = graph_memory(method) * self.samples_at_once(parts)
        if options.curvature_fraction:
            graph = max(graph, TRACE_GRAPH * self.samples_at_once(self._parts(TRACE_GRAPH)))
        summed = self.n_batches > 1 or (size_given and parts > 1)
        factors = [factor_bytes(layer) for layer in self.layers.values()] if options.alignment else [0]
        tensors = [t for t in (*self.model.parameters(), *self.model.buffers()) if t.is_floating_point()]
        weights = [t.numel() * self._itemsize(t.dtype) for t in tensors]
        sizes, itemsize, split, resident = self._gradient_sizes(), self._itemsize(torch.float32), [0], sum(weights)
        if self.sharded:
            # What serves shards alone is not loaded without them.
            from lightning_spectral.measurement.sharded.on_demand_weights import SMALL, whole_at_a_time

            # The smallest and those that are small stay where they are taken.
            split = [size for size in sizes[1:] if size >= SMALL] or [0]
            resident = whole_at_a_time(weights)
        stay = (sum(sizes) - sum(split)) * (2 if summed else 1)
        return Memory(
            weights=resident,
            gradients=stay + math.ceil(sum(split) / self.world_size) + 2 * max(split),
            svd=max(svd_bytes(layer, options.top_k, itemsize) for layer in self.layers.values()),
            directions=itemsize * sum(k * sum(self.layers[name].shape) for name, k in self.directions.items()),
            gradient_graph=round(per_sample * self.samples_at_once(parts if size_given else 1)),
            # Double backward keeps the gradients that it differentiates.
            curvature_graph=round(per_sample * graph) + (sum(split) if method == "exact" else 0),
            factors=sum(factors) if summed else max(factors),
        )
