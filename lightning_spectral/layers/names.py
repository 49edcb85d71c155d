"""Names of layers: as in the network inside its wrappers, as tables show them, and selected by glob patterns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

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
    check_module(model)
    return next((module for _, module in reversed(list(inside(model)))), model)


def check_module(model: Any) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


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


NAMES_SHOWN = 8
"""Number of layers that an error names."""

QKV = ("q", "k", "v")
"""Suffixes of the parts of a fused projection."""

T = TypeVar("T")


def check_selection(option: str, patterns: Any, *, only_patterns: bool = False) -> None:
    """Raise ValueError unless this is a pattern or several of them, or, where they may be, None or a callable."""
    several = isinstance(patterns, (Sequence, Mapping)) and all(isinstance(pattern, str) for pattern in patterns)
    if not (several or (not only_patterns and (patterns is None or callable(patterns)))):
        raise ValueError(f"{option} takes glob patterns, got {patterns!r}")


def as_patterns(selection: str | Iterable[str]) -> list[str]:
    """Return the patterns as a list, also where one alone is given."""
    return [selection] if isinstance(selection, str) else list(selection)


def parameter_names(parameter: str) -> set[str]:
    """Return the names that select a parameter: its own and its module's."""
    return {parameter, parameter.rpartition(".")[0]}


def layer_names(name: str) -> set[str]:
    """Return the names that select a layer of a report: its own, its parameter's and its module's.

    >>> sorted(layer_names("b.fc.weight")), sorted(layer_names("b.qkv.weight.q"))
    (['b.fc', 'b.fc.weight'], ['b.qkv', 'b.qkv.weight', 'b.qkv.weight.q'])
    """
    owner, _, part = name.rpartition(".")
    return parameter_names(name) | (parameter_names(owner) if part in QKV else set())


def match_pattern(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """Return the first pattern that matches one of the names of a layer; None where none does."""
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def select(
    layers: Mapping[str, T], patterns: str | Iterable[str], names_of: Callable[[T], Collection[str]]
) -> dict[str, T]:
    """Return the layers with a name, of those that ``names_of`` gives, that a pattern matches, in their order."""
    patterns = as_patterns(patterns)
    return {key: layer for key, layer in layers.items() if match_pattern(names_of(layer), patterns) is not None}


def check_matches(
    option: str,
    patterns: str | Iterable[str],
    layers: Mapping[str, T],
    names_of: Callable[[T], Collection[str]],
    *,
    skipped: Iterable[str] = (),
) -> None:
    """Raise ValueError for patterns that match no layer.

    One that matches a parameter of ``skipped`` is no mistake: a frozen layer may thaw later.
    """
    names = {name for layer in layers.values() for name in names_of(layer)}
    names |= {name for parameter in skipped for name in parameter_names(parameter)}
    if missing := [pattern for pattern in as_patterns(patterns) if match_pattern(names, [pattern]) is None]:
        shown = ", ".join(list(layers)[:NAMES_SHOWN])
        more = f", ... ({len(layers)} in all)" if len(layers) > NAMES_SHOWN else ""
        raise ValueError(
            f"{option}: {', '.join(map(repr, sorted(missing)))} matches no layer; the layers are {shown}{more}"
        )
