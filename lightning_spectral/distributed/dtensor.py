"""Networks whose parameters are shards over ranks (DTensor): FSDP2 and tensor parallelism."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_spectral._torch_private import is_composable_state
from lightning_spectral.distributed.process_group import Group

COMMUNICATION = ("torch.distributed", "torch._C._distributed_c10d")
"""Where the classes live that hold a network's ranks together."""


def shards_of(model: nn.Module, group: Group) -> list[Any]:
    """Return the parameters and buffers that are shards, in the model's order, resharded."""
    for module in model.modules():
        if is_fully_sharded(type(module)):
            # After a validation the outermost weights are still gathered, in the precision of the forward pass.
            module.reshard()  # type: ignore[operator]
    tensors = (*model.named_parameters(), *model.named_buffers())
    shards: dict[str, Any] = {name: tensor for name, tensor in tensors if is_dtensor(tensor)}
    for name, shard in shards.items():
        holders = set(shard.device_mesh.mesh.flatten().tolist())
        if len(holders) > 1 and group.size == 1:
            raise ValueError(
                f"process_group: {name} and {len(shards) - 1} more parameters are shards over several ranks "
                "(DTensor), which must measure together; give their group"
            )
        if len(holders) > 1 and (missing := sorted(holders - set(group.members))):
            raise ValueError(
                f"process_group: it lacks the ranks {', '.join(map(str, missing))}, which hold shards of {name}; "
                "give one of all that do"
            )
    return list(shards.values())


def gathered_together(model: nn.Module) -> dict[str, list[int]]:
    """Return name of a submodule -> ids of the sharded parameters that its forward pass is to find whole.

    Of FSDP2, those that it gathers for that submodule; of others, the submodule's own.
    """
    wrapped = [name for name, module in model.named_modules() if is_fully_sharded(type(module))]
    groups: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        holders = [outer for outer in wrapped if is_within(name, outer)]
        holder = max(holders, key=len, default=name)
        groups.setdefault(holder, []).extend(id(p) for p in module.parameters(recurse=False) if is_dtensor(p))
    return {name: ids for name, ids in groups.items() if ids}


def is_within(name: str, outer: str) -> bool:
    """Return whether a submodule is another, or in it.

    >>> is_within("blocks.1.mlp", "blocks.1"), is_within("blocks.10", "blocks.1"), is_within("head", "")
    (True, False, True)
    """
    return not outer or name == outer or name.startswith(f"{outer}.")


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, by name: the class moves between versions, and its import takes long."""
    return type(tensor).__name__ == "DTensor"


def is_fully_sharded(kind: type) -> bool:
    """Return whether `fully_shard` made this class of a module's."""
    return any(base.__name__ == "FSDPModule" and is_communication(base) for base in kind.__mro__)


def is_communication(kind: type) -> bool:
    """Return whether objects of a class communicate: groups, meshes, and what shards parameters over them."""
    return kind.__module__.startswith(COMMUNICATION)


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a module before `fully_shard`."""
    if not is_fully_sharded(kind):
        return kind
    return next(base for base in kind.__bases__ if not is_communication(base))


def without_communication(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's state without the hooks and records of its sharding, for a copy with full parameters."""

    def communicates(hook: Any) -> bool:
        function = hook.__func__ if isinstance(hook, types.MethodType) else hook
        return str(getattr(function, "__module__", "")).startswith(COMMUNICATION)

    return {
        name: type(value)((key, hook) for key, hook in value.items() if not communicates(hook))
        if name.endswith("_hooks") and isinstance(value, dict)
        else value
        for name, value in state.items()
        if not is_composable_state(name)
    }
