"""What a measurement would do and cost, without doing it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader

from lightning_spectral._messages import size_of
from lightning_spectral._validation import positive_int
from lightning_spectral.curvature import METHODS
from lightning_spectral.layers.kinds import Kind
from lightning_spectral.layers.matrices import LayerSelection, MatrixLayer, with_seen_kinds
from lightning_spectral.layers.names import unwrapped
from lightning_spectral.measurement.loader_batches import first_batches
from lightning_spectral.measurement.loss import LossFunction
from lightning_spectral.measurement.setup import select_layers
from lightning_spectral.options import Mode, Options, Precision, from_arguments
from lightning_spectral.plan.cost_estimate import Estimate
from lightning_spectral.plan.cost_model import FACTOR, Cost
from lightning_spectral.plan.fake_run import NeedsValuesError, trace_loss

FEWER_SAMPLES, FEWER_DIRECTIONS = 32, 10
"""What is suggested for ``max_samples``, of all ranks, and ``top_k``: a sketch of fewer samples takes more passes."""


@dataclass(frozen=True)
class Saving:
    """A change of options, and the cost of a measurement with it."""

    option: str
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """A measurement that was not run: its layers, its method and its cost.

    Attributes:
        model: its class.
        parameters: entries of all of them.
        layers: those to be measured.
        directions: layer name -> how many at most; fewer where singular values lie below the noise floor, as of the
            head of a softmax, whose gradient has one rank less than classes.
        skipped: layer name -> why it is left out.
        unreached: layers that the loss does not depend on, which would fail.
        method: of the curvature; empty where it cannot be told.
        why: the choice and its reasons.
        unknown: what cannot be told.
        samples: measured of each batch, over all processes; None without a batch, or where it does not tell.
        batch_samples: of the batch given, which a training step takes over all processes.
        n_batches, world_size, sharded: as given.
        costs: method -> what it costs, for the one that is planned and those that could take its place.
        activations: bytes that the graph of the batch keeps, with attention by its mathematical kernel; None without.
        step_flops: of a training step on the batch, matrix products and convolutions alone; None without.
        sent: bytes that each process sends to others; 0 with one.
        savings: what would be cheaper.
    """

    model: str
    parameters: int
    layers: Mapping[str, MatrixLayer]
    directions: Mapping[str, int]
    skipped: Mapping[str, str]
    unreached: tuple[str, ...]
    method: str
    why: str
    unknown: tuple[str, ...]
    samples: int | None
    batch_samples: int | None
    n_batches: int
    world_size: int
    sharded: bool
    costs: Mapping[str, Cost]
    activations: int | None
    step_flops: int | None
    sent: int
    savings: tuple[Saving, ...]

    def __repr__(self) -> str:
        what = f"{self.model}, {len(self.layers)} matrices"
        if self.method not in self.costs:
            return f"Plan({what}, method unknown)"
        cost = self.costs[self.method]
        steps = " to ".join(dict.fromkeys(f"{x:.2g}" if x < 10 else f"{x:,.0f}" for x in cost.steps))
        return f"Plan({what}, curvature by {self.method}, {steps} training steps, {size_of(cost.memory.peak)})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {
            "costs": {name: cost.to_dict() for name, cost in self.costs.items()},
            "savings": [{"option": x.option, "cost": x.cost.to_dict()} for x in self.savings],
            "factor": FACTOR,
        }

    def to_json(self, path: str | Path) -> Path:
        """Write the plan to a file and return its path."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")
        return Path(path)


def plan_spectra(
    model: nn.Module,
    batch: Any = None,
    loss_fn: LossFunction | None = None,
    *,
    top_k: int = 20,
    curvature: str = "auto",
    layers: LayerSelection = None,
    kinds: Mapping[str, Kind] | None = None,
    fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] = (),
    mode: Mode = "eval",
    max_samples: int | None = None,
    gradient_samples: int | Literal["auto"] | None = None,
    gradient_samples_max: int = 4096,
    n_batches: int = 1,
    micro_batch_size: int | None = None,
    precision: Precision = "float32",
    spectrum_top_k: int | None = None,
    curvature_fraction: int | None = None,
    alignment: bool = False,
    world_size: int = 1,
    sharded: bool = False,
) -> Plan:
    """Plan what `measure_spectra` with these options would do and cost, without memory for the network.

    Time is in training steps: forward and backward passes in float32 on the batch, without the optimizer. With g
    gradients, c_i other passes of kind i, which take f_i of a step's FLOPs (`STEP_FLOPS`), a share r of the batch's
    samples measured, and F the FLOPs of a step,

        steps = n_batches * r * (g + 1.4 sum_i c_i f_i) + (FLOPs of singular triplets and Kronecker factors) / F.

    Time holds within a factor of three, of networks of width 96 and more within two, and so does memory. Memory is
    beside that of the network:

        peak = weights + directions + max(gradients + SVD + graph of the gradient, graph of the curvature),

    weights = 4 bytes per parameter, directions = 4 sum_l K (m_l + n_l), gradients = 4 bytes per entry of the
    layers, graph of the curvature = the method's factor (exact 4, ggn 2.7, sketch 7.5) times the activations of the
    samples measured at once.

    Over w processes the batch is shared: each measures its own samples, and the triplets of its share of the layers, so
    that a probe of a fixed batch takes 1 / w of the time, as a training step does. Each sends (w - 1) / w of the
    gradients and of the directions, and its K curvatures per layer to all others.

    Of a network whose parameters are shards (FSDP2), weights are whole only while they are read: max(256 MiB, two of
    the largest) stay, or if it is more, what training keeps whole in a forward pass, which is not known here; and two
    more of the largest while it is gathered. Of the gradients each process holds 1 / w, and two of the largest while
    they are summed, but all of them with curvature="exact". Each process sends (w - 1) / w of its shards whenever they
    are read, up to twice per pass and micro-batch.

    Args:
        model: on any device, the meta device included. Nothing of it is read but names, shapes and types.
        batch: what the loss takes, or a DataLoader, of which shapes and types count alone; None: what follows from the
            network alone.
        loss_fn, n_batches: as in `measure_spectra`.
        top_k, curvature, layers, kinds, fused_qkv, mode: as in `measure_spectra`.
        max_samples, gradient_samples, gradient_samples_max, micro_batch_size: as in `measure_spectra`: of each process,
            while the batch is that of all of them together.
        precision, spectrum_top_k, curvature_fraction, alignment: as in `measure_spectra`.
        world_size: processes.
        sharded: whether parameters are shards over them.

    Raises:
        ValueError: as in `measure_spectra`.
        MeasurementError: if the loss is no scalar or has no gradient.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)).to("meta")
    >>> plan = plan_spectra(model, torch.zeros(64, 8), lambda m, x: torch.nn.functional.mse_loss(m(x), x), top_k=5)
    >>> plan.method, plan.costs["ggn"].columns, plan.costs["exact"].products
    ('ggn', (10, 10), (10, 10))
    """
    options = from_arguments(Options, locals())
    positive_int("n_batches", n_batches)
    positive_int("world_size", world_size)
    if sharded and world_size == 1:
        raise ValueError("sharded: parameters are shards over several processes; set world_size")
    model = unwrapped(model)
    selection = select_layers(model, options)
    trace, hidden = None, list[str]()
    if isinstance(batch, DataLoader):
        batch = first_batches(batch, 1, model)[0]
    if batch is not None:
        try:
            trace = trace_loss(model, batch, loss_fn, selection.layers, mode=options.mode, precision=options.precision)
        except NeedsValuesError as error:
            hidden.append(f"what the graph of the loss tells: {error}")
    estimate = Estimate(model, selection.layers, trace, options, n_batches, world_size, sharded)
    method, why, unknown = estimate.choice()
    return Plan(
        model=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=with_seen_kinds(selection.layers, {} if trace is None else trace.structure.kinds, options.kinds),
        directions=estimate.directions,
        skipped=selection.skipped,
        unreached=() if trace is None else trace.structure.unreached,
        method=method,
        why=why,
        unknown=(*hidden, *unknown),
        samples=estimate.samples,
        batch_samples=None if trace is None else trace.samples,
        n_batches=n_batches,
        world_size=world_size,
        sharded=sharded,
        costs={name: estimate.cost(name) for name in METHODS if estimate.is_possible(name)},
        activations=None if trace is None else trace.activations,
        step_flops=None if trace is None else trace.step_flops,
        sent=estimate.bytes_sent,
        savings=tuple(_savings(estimate, method)) if estimate.is_possible(method) else (),
    )


def _savings(estimate: Estimate, method: str) -> Iterator[Saving]:
    """Yield options that make a measurement cheaper or smaller by a tenth at least, each by itself."""
    cost = estimate.cost(method)
    fewer_samples = math.ceil(FEWER_SAMPLES / estimate.world_size)
    at_once = estimate.samples_at_once(cost.parts)
    changes: list[dict[str, Any]] = []
    if (estimate.local_samples or 0) > fewer_samples:
        changes.append({"max_samples": fewer_samples})
    if at_once > 1:
        changes.append({"micro_batch_size": math.ceil(at_once / 4)})
    if estimate.options.top_k > FEWER_DIRECTIONS:
        changes.append({"top_k": FEWER_DIRECTIONS, "spectrum_top_k": None})
    for change in changes:
        changed = replace(estimate, options=replace(estimate.options, **change)).cost(method)
        if changed.steps[1] <= 0.9 * cost.steps[1] or changed.memory.peak <= 0.9 * cost.memory.peak:
            yield Saving("{}={}".format(*next(iter(change.items()))), changed)
