"""Names of layers: as in the network inside its wrappers, and as tables and figures show them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_spectral._torch_private import COMPILED, WRAPPED


def brief(name: str) -> str:
    """Return a layer's name without ".weight", also before the part of a fused projection.

    >>> brief("blocks.0.conv1.weight"), brief("blocks.0.qkv.weight.q")
    ('blocks.0.conv1', 'blocks.0.qkv.q')
    """
    return re.sub(r"\.weight(?=(\.[qkv])?$)", "", name)


def shortened(name: str, length: int) -> str:
    """Return a brief name of at most so many characters.

    Where it is long its parts from the left shrink to a letter, numbers stay; what is still too long has an ellipsis
    in its middle.

    >>> shortened("blocks.0.conv1.weight", 25), shortened("model.decoder.layers.11.self_attn.q_proj.weight", 25)
    ('blocks.0.conv1', 'm.d.l.11.self_attn.q_proj')
    >>> shortened("a_module_with_a_long_name.weight", 12)
    'a_modu\u2026_name'
    """
    parts = brief(name).split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > length and not part.isdigit():
            parts[i] = part[:1]
    name = ".".join(parts)
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"


OF_CLASS: dict[str, tuple[type[nn.Module], ...]] = {
    "module": (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
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
