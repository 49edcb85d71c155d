"""A copy of the network on which the user's code may run, and the objective that is computed on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_spectral.distributed.dtensor import shards_of
from lightning_spectral.distributed.process_group import Group
from lightning_spectral.errors import MeasurementError
from lightning_spectral.isolation.batch_tree import FirstSamples
from lightning_spectral.isolation.held_state import HeldState
from lightning_spectral.isolation.module_copy import Copier
from lightning_spectral.isolation.muting import schedules_of, silence_logging, silent_trainers
from lightning_spectral.isolation.replay import InitialState
from lightning_spectral.isolation.sandbox import copy_batch, isolated
from lightning_spectral.layers.matrices import LayerSet, MatrixLayer, find_layers
from lightning_spectral.layers.names import inside, unwrapped
from lightning_spectral.measurement.loss import LossFunction, NamedLoss
from lightning_spectral.measurement.objective import Objective, batch_sizes
from lightning_spectral.numerics.matmul_precision import PRECISIONS
from lightning_spectral.options import Mode, Options, Precision

if TYPE_CHECKING:
    from lightning_spectral.measurement.sharded.on_demand_weights import OnDemandWeights

NO_SAMPLE = "there is no sample to measure: the batch is empty"


@dataclass(frozen=True, eq=False)
class NetworkCopy:
    """Copy of a network that may be run and written to.

    Attributes:
        precision: lowest precision to compute in.
        initial_state: of the copy, to begin each call of the loss with.
        notes: what of the network could not be copied, on any rank.
        sharded: weights that lie in shards, and are put together when they are read; None where there are none.
    """

    original: nn.Module
    module: nn.Module
    precision: Precision
    initial_state: InitialState
    notes: tuple[str, ...]
    sharded: OnDemandWeights | None
    copier: Copier

    def own(self, loss: NamedLoss) -> NamedLoss:
        """Return a loss function that is a module, or a method of one, as a copy, since it has weights and may count.

        Another stays as it is, with what it closes over.
        """
        if not isinstance(getattr(loss.function, "__self__", loss.function), nn.Module):
            return loss
        before = len(self.copier.held)
        copied = replace(loss, function=self.copier.copy(loss.function, loss.name))
        self.initial_state.held.add(self.copier.held[before:])
        return copied

    def leaves(self, layers: Mapping[str, MatrixLayer]) -> dict[str, Tensor]:
        """Return layer name -> the copy's parameter that holds its matrix."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        return {name: parameters[layer.parameter] for name, layer in layers.items()}


@contextmanager
def isolated_copy(model: nn.Module, mode: Mode, precision: Precision, group: Group) -> Iterator[NetworkCopy]:
    """Yield a copy of a model, the same on all ranks; all traces of what happens on it are gone at the end."""
    original = unwrapped(model)
    with ExitStack() as stack:
        sharded = stack.enter_context(_sharded_weights(original, PRECISIONS[precision], group))
        with group.step() as step:
            trainers = silent_trainers(original)
            substitutes = trainers if sharded is None else trainers | sharded.stand_ins
            copy = stack.enter_context(isolated(original, mode=mode, precision=precision, stand_ins=substitutes))
            kept = [*copy.copier.kept, *schedules_of(trainers.values())]
            stack.callback(HeldState(kept).restore)
            if sharded is not None:
                sharded.hold_together(copy.module)
            silence_logging(copy.module, original, trainers)
            for attribute in ("module", *(name for name, _ in inside(model))) if original is not model else ():
                # A loss may ask a wrapper for the network inside.
                if not hasattr(copy.module, attribute):
                    copy.module.__dict__[attribute] = copy.module
            step.send(
                [
                    *(
                        f"{path} cannot be copied and is shared with the probe ({why})"
                        for path, why in copy.shared.items()
                    ),
                    *_compiled_by_jit(original),
                ]
            )
        notes = tuple(dict.fromkeys(note for of_rank in step.received for note in of_rank))
        shared = first_buffers(copy.module, dict(copy.module.named_buffers()), group)
        with group.step():
            buffers = dict(copy.module.named_buffers())
            for name, value in shared.items():
                buffers[name].data.copy_(value)
            changed = {id(buffers[name]) for name in shared}
            originals = {key: value for key, value in copy.originals.items() if key not in changed}
            state = InitialState(
                copy.module,
                originals,
                sharded.restore if sharded else None,
                (*copy.held, *kept),
                _dtypes_of(original) - _dtypes_of(copy.module),
            )
        yield NetworkCopy(original, copy.module, precision, state, notes, sharded, copy.copier)


def _compiled_by_jit(model: nn.Module) -> list[str]:
    """Return what a reader should know of a module whose second derivatives nothing can replace."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return [
                f"{name or 'the network'} is compiled by torch.jit, whose second derivatives are wrong, without an "
                "error, where a BatchNorm stands before other operations: measure it as it was before compilation"
            ]
    return []


def _dtypes_of(module: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in (*module.parameters(), *module.buffers())}


@contextmanager
def _sharded_weights(model: nn.Module, dtype: torch.dtype, group: Group) -> Iterator[OnDemandWeights | None]:
    with group.step() as step:
        shards = shards_of(model, group)
        step.send([(tuple(shard.shape), str(shard.dtype)) for shard in shards])
    for rank, of_rank in enumerate(step.received):
        if of_rank != step.received[0]:
            raise ValueError(
                f"process_group: rank {rank} holds {len(of_rank)} parameters and buffers as shards (DTensor), and "
                f"rank 0 holds {len(step.received[0])}, or others; all must hold the same network, sharded alike"
            )
    if not shards:
        yield None
        return
    # What serves shards alone is not loaded without them.
    from lightning_spectral.measurement.sharded.on_demand_weights import on_demand_weights

    with on_demand_weights(model, shards, group, dtype) as weights:
        yield weights


def first_buffers(module: nn.Module, buffers: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Return the first rank's buffers: DDP gives them to all ranks with the next step, and until then they differ.

    Buffers of other shapes on other ranks, such as a cache that grows with the sequences seen, are left out.
    """
    if group.size == 1:
        return {}
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    alike = {
        name: buffer
        for name, buffer in buffers.items()
        if not isinstance(buffer, nn.UninitializedBuffer) and buffer.layout is torch.strided and buffer.device == device
    }
    return group.broadcast_first(alike)


def select_layers(model: nn.Module, options: Options) -> LayerSet:
    """Return the layers to measure, and those left out."""
    layers = find_layers(model, layers=options.layers, kinds=options.kinds, fused_qkv=options.fused_qkv)
    if not layers.layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(layers.skipped.items())[:4])
        raise ValueError(f"layers: no layer is left to measure ({reasons})")
    return layers


def set_up_objective(
    copy: NetworkCopy,
    loss: LossFunction,
    batches: Sequence[Any],
    layers: Mapping[str, MatrixLayer],
    options: Options,
    group: Group,
    parameters: Mapping[str, Tensor] | None = None,
) -> Objective:
    """Return the objective over the batches of all ranks.

    Args:
        layers: to measure, the same on all ranks.
        options: settings that all ranks must have in common.
        parameters: name -> leaf of the copy to differentiate in; None: those of the layers.
    """
    with group.step() as step:
        if options.max_samples is not None and options.gradient_samples is None:
            batches = FirstSamples(batches, options.max_samples)
        leaves = copy.leaves(layers) if parameters is None else parameters
        named = copy.own(loss if isinstance(loss, NamedLoss) else NamedLoss(loss))
        step.send((list(leaves), options.settings, batch_sizes(batches)))
    names, settings, sizes = zip(*step.received, strict=True)
    _require_equal(names, settings)
    if not any(size != 0 for of_rank in sizes for size in of_rank):
        raise MeasurementError(NO_SAMPLE)
    with group.step():
        reducer = None if copy.sharded is None else copy.sharded.gradient_reducer(_decomposition_costs(layers, leaves))
        return Objective(
            partial(named, copy.module),
            batches,
            layers,
            leaves,
            copy.initial_state,
            copy_batch=partial(copy_batch, precision=copy.precision),
            group=group,
            sizes=sizes,
            reducer=reducer,
            unreached=named.unreached,
        )


def _require_equal(names: Sequence[Sequence[str]], settings: Sequence[Mapping[str, Any]]) -> None:
    """Raise, on all ranks alike, if they are not to measure the same."""
    for rank, (own_names, own_settings) in enumerate(zip(names, settings, strict=True)):
        if own_names != names[0]:
            apart = ", ".join(sorted(set(names[0]) ^ set(own_names))[:4]) or "in another order"
            raise MeasurementError(
                f"rank {rank} measures other layers than rank 0 ({apart}); all must hold the same network and options"
            )
        for option, value in settings[0].items():
            if own_settings[option] != value:
                raise MeasurementError(
                    f"{option}: rank {rank} has {own_settings[option]!r}, and rank 0 has {value!r}; all must "
                    "have the same"
                )


def _decomposition_costs(layers: Mapping[str, MatrixLayer], leaves: Mapping[str, Tensor]) -> dict[int, float]:
    """Return id of a leaf -> cost of the spectra of the layers whose matrix it holds."""
    costs: dict[int, float] = {}
    for name, layer in layers.items():
        costs[id(leaves[name])] = costs.get(id(leaves[name]), 0.0) + layer.decomposition_cost
    return costs
