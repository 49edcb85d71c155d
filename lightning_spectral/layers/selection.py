"""Selection of layers by glob pattern: which names a pattern may match, and the errors of one that matches none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

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
