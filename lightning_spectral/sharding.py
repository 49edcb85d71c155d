"""Networks whose parameters are shards over processes (DTensor): FSDP2 and tensor parallelism."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.processes import Alone

COMMUNICATION = ("torch.distributed", "torch._C._distributed_c10d")
"""Where the classes live that hold a network's processes together."""


def whole_parameters(model: nn.Module, processes: Alone) -> dict[int, Tensor]:
    """id of each sharded parameter or buffer -> the whole of it, gathered one at a time.

    Neither the backward pass of FSDP2 nor that of a redistributed DTensor can be differentiated again, and the gradient
    of FSDP2's shards is not had from `torch.autograd.grad` at all. So each process measures on whole weights, for the
    time of a measurement: they must fit beside what is in memory, as must the gradients of the layers measured.

    Args:
        model: of which all processes hold their shards.
        processes: that measure together, with all that hold shards among them.

    Raises:
        ValueError: for a sharded model and not all processes that hold shards.
        MemoryError: in all processes, if the whole weights do not fit into the memory of one of them.
    """
    for module in model.modules():
        if is_fully_sharded(type(module)):
            # After a validation the outermost weights are still gathered, in the precision of the forward pass.
            module.reshard()  # type: ignore[operator]
    tensors = (*model.named_parameters(), *model.named_buffers())
    shards: dict[str, Any] = {name: tensor for name, tensor in tensors if is_dtensor(tensor)}
    if not shards:
        return {}
    if processes.size == 1:
        raise ValueError(
            f"process_group: {next(iter(shards))} and {len(shards) - 1} more parameters are shards over several "
            "processes (DTensor), which must measure together; give their group"
        )
    for name, shard in shards.items():
        if missing := sorted(set(shard.device_mesh.mesh.flatten().tolist()) - set(processes.members)):
            raise ValueError(
                f"process_group: it lacks the processes {', '.join(map(str, missing))}, which hold shards of {name}; "
                "give one of all that do"
            )
    with torch.inference_mode(False):
        processes.agreed(lambda: _reserve(list(shards.values())))
        return {id(shard): _whole(shard) for shard in shards.values()}


def is_dtensor(tensor: Any) -> bool:
    """By name: the class has moved between versions of torch, and its import takes long."""
    return type(tensor).__name__ == "DTensor"


def is_fully_sharded(kind: type) -> bool:
    """Whether `fully_shard` made this class of a module's."""
    return any(base.__name__ == "FSDPModule" and is_communication(base) for base in kind.__mro__)


def is_communication(kind: type) -> bool:
    """Whether objects of a class hold processes together: groups, meshes, and what shards parameters over them."""
    return kind.__module__.startswith(COMMUNICATION)


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module before `fully_shard`."""
    if not is_fully_sharded(kind):
        return kind
    return next(base for base in kind.__bases__ if not is_communication(base))


def without_communication(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a module without the hooks and records of its sharding, for a copy that holds whole parameters."""
    return {
        name: type(value)((key, hook) for key, hook in value.items() if not _communicates(hook))
        if name.endswith("_hooks") and isinstance(value, dict)
        else value
        for name, value in state.items()
        if not name.startswith("__composable_api")
    }


def _communicates(hook: Any) -> bool:
    function = hook.__func__ if isinstance(hook, types.MethodType) else hook
    return str(getattr(function, "__module__", "")).startswith(COMMUNICATION)


def _whole(shard: Any) -> Tensor:
    full: Tensor = shard.detach().full_tensor()
    return nn.Parameter(full, requires_grad=shard.requires_grad) if isinstance(shard, nn.Parameter) else full


def _reserve(shards: list[Any]) -> None:
    """Have room for them, and to gather the largest, or MemoryError before any process waits for another."""
    sizes = [shard.numel() * max(shard.element_size(), torch.float32.itemsize) for shard in shards]
    torch.empty(sum(sizes) + 2 * max(sizes), dtype=torch.uint8, device=shards[0].device)
