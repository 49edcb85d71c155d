"""Wrappers around networks and their parts, looked through: layers are called as in the network that is inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_spectral._torch_private import COMPILED, WRAPPED

OF_CLASS: dict[str, tuple[type[nn.Module], ...]] = {
    "module": (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel),
}
"""Attribute that holds a network -> the classes whose it is. Others have attributes of that name, too."""

FABRIC = "_forward_module"
"""Attribute of a module that Lightning's Fabric has set up."""

OF_PEFT = ("base_model", "model", "base_layer")
"""Attributes of PEFT's models, of its methods and of its layers."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel, torch.compile, Fabric or AveragedModel."""
    return next((module for _, module in reversed(list(inside(model)))), model)


def inside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what wrappers hold that do nothing to a loss, from the outermost to the network: (attribute, module)."""
    while attribute := next((name for name in (COMPILED, FABRIC, *OF_CLASS) if _holds(model, name)), None):
        model = model.get_submodule(attribute)
        yield attribute, model


def plain_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return qualified name of a parameter -> the same without its wrappers; itself where two would have the same."""
    plain = {name: _plain_name(model, name) for name in names}
    counts = Counter(plain.values())
    return {name: short if counts[short] == 1 else name for name, short in plain.items()}


def _plain_name(model: nn.Module, name: str) -> str:
    module: nn.Module | None = model
    parts = []
    for part in name.split("."):
        if module is None or not _holds(module, part):
            parts.append(part)
        module = None if module is None else dict(module.named_children()).get(part)
    return ".".join(parts)


def _holds(module: nn.Module, attribute: str) -> bool:
    """Return whether a module is a wrapper around what an attribute of it holds."""
    if attribute in (FABRIC, *WRAPPED):
        return isinstance(getattr(module, attribute, None), nn.Module)
    if attribute in OF_PEFT and any(base.__module__.startswith("peft.") for base in type(module).__mro__):
        return True
    return isinstance(module, OF_CLASS.get(attribute, ()))
