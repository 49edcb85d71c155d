"""A loss on a shadow of the network, ready to be differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.distributed.process_group import SingleProcess
from lightning_spectral.isolation.batch_tree import FirstSamples
from lightning_spectral.isolation.sandbox import InitialState, copy_batch, quiet
from lightning_spectral.layers.matrices import LayerSet, MatrixLayer, find_layers
from lightning_spectral.measurement.loss import LossFunction, mute, resolve_loss, stand_ins
from lightning_spectral.measurement.objective import Objective
from lightning_spectral.measurement.sharded.on_demand_weights import OnDemandWeights
from lightning_spectral.options import Mode, Options, Precision


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel or DataParallel wrapper."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, wrappers) else model


@dataclass(frozen=True, eq=False)
class Prepared:
    """A loss that is ready to be measured.

    Attributes:
        losses: the loss.
        module: the shadow it is computed on.
        found: the layers to measure, and those left out.
        notes: what to tell of it.
    """

    losses: Objective
    module: nn.Module
    found: LayerSet
    notes: list[str]

    def take(self, buffers: Mapping[str, Tensor]) -> None:
        """Begin each call of the loss with these values of some buffers."""
        self.losses.beginning.take(self.module, buffers)


@contextmanager
def prepared(
    model: nn.Module,
    batches: Sequence[Any],
    options: Options,
    loss_fn: LossFunction | None,
    batch_idx: int,
    whole: OnDemandWeights | None,
) -> Iterator[Prepared]:
    """The loss of batches on a shadow of the model; all traces are gone at the end.

    Args:
        model: what is measured.
        batches: see `Objective`.
        options: which layers, and how.
        loss_fn, batch_idx: see `resolve_loss`.
        whole: stand-ins for parameters in shards.

    Raises:
        ValueError: if there is no layer or no loss.
    """
    found = find_layers(model, layers=options.layers, kinds=options.kinds, fused_qkv=options.fused_qkv)
    if not found.layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.skipped.items())[:4])
        raise ValueError(f"layers: no layer is left to measure ({reasons})")
    if options.max_samples is not None:
        batches = FirstSamples(batches, options.max_samples)
    with losses_of(model, batches, loss_fn, found.layers, options.mode, options.precision, batch_idx, whole) as (
        losses,
        module,
        notes,
    ):
        yield Prepared(losses, module, found, notes)


def first_buffers(module: nn.Module, processes: SingleProcess) -> dict[str, Tensor]:
    """The first process's buffers: DDP gives them to all with the next step, and until then they differ.

    But for those of other shapes in other processes, such as a cache that grows with the sequences seen.
    """
    if processes.size == 1:
        return {}
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    own = {
        name: buffer
        for name, buffer in module.named_buffers()
        if not isinstance(buffer, nn.UninitializedBuffer) and buffer.layout is torch.strided and buffer.device == device
    }
    layouts = processes.all_gather_object({name: (buffer.shape, buffer.dtype) for name, buffer in own.items()})
    alike = [name for name in layouts[0] if all(one.get(name) == layouts[0][name] for one in layouts)]
    found = processes.broadcast_from_owners(
        {n: [own[n]] for n in alike} if processes.rank == 0 else {}, dict.fromkeys(alike, 0)
    )
    return {name: tensors[0] for name, tensors in found.items()}


@contextmanager
def losses_of(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction | None,
    layers: Mapping[str, MatrixLayer],
    mode: Mode,
    precision: Precision,
    batch_idx: int = 0,
    whole: OnDemandWeights | None = None,
) -> Iterator[tuple[Objective, nn.Module, list[str]]]:
    """As `prepared`, of layers that are known."""
    loss = resolve_loss(model, loss_fn, batch_idx)
    replaced = stand_ins(model)
    given = replaced if whole is None else replaced | whole.stand_ins
    with quiet(model, mode=mode, precision=precision, stand_ins=given) as shadow:
        if whole is not None:
            whole.hold_together(shadow.module)
        mute(shadow.module, model, replaced)
        parameters = dict(shadow.module.named_parameters(remove_duplicate=False))
        leaves = {name: parameters[layer.parameter] for name, layer in layers.items()}
        notes = [f"{path} cannot be copied and is shared with the probe ({why})" for path, why in shadow.shared.items()]
        yield (
            Objective(
                lambda batch: loss(shadow.module, copy_batch(batch, precision)),
                batches,
                layers,
                leaves,
                InitialState(shadow.module, shadow.originals, whole.restore if whole else None),
                whole.sums(_costs(layers, leaves)) if whole else None,
            ),
            shadow.module,
            notes,
        )


def _costs(layers: Mapping[str, MatrixLayer], leaves: Mapping[str, Tensor]) -> dict[int, float]:
    """id of a leaf -> what the spectra cost of the layers whose matrix it holds."""
    found: dict[int, float] = {}
    for name, layer in layers.items():
        found[id(leaves[name])] = found.get(id(leaves[name]), 0.0) + layer.decomposition_cost
    return found
