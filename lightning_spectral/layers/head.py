"""Which linear layers a loss is computed from: by name, or by place where no name tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import nn

from lightning_spectral.layers.matrix_places import Path, Place
from lightning_spectral.layers.usual_names import ATTENTION, HEAD, HEAD_PART, LAST, POOLER, TOWER_HEAD

LISTS = (nn.ModuleList, nn.ModuleDict)


def find_heads(
    unnamed: Sequence[Place], inputs: Sequence[tuple[str, int]], modules: Mapping[Path, nn.Module]
) -> set[str]:
    """Return the names of heads among the linear layers that have no other kind.

    One is known by its own name, by being the last of a module with a head's name, or else, where no such layer is
    trained, as the last one whose output no later layer takes, with those beside it that read the same. Where all are
    frozen, and none has such a name, those with adapters take the place of the trained ones.

    Args:
        unnamed: linear layers without a kind, in the network's order.
        inputs: (parameter name, input width) of every matrix, in the network's order.
        modules: path -> module.
    """
    heads = {p.name for p in unnamed if is_named_head(p, modules)} | _towers(unnamed)
    heads |= {p.name for p in unnamed if LAST.fullmatch(p.own_name) and not _is_taken(p, inputs)}
    heads |= _ends_of_parts(unnamed, heads, inputs)
    trained = [p for p in unnamed if p.trained] or [p for p in unnamed if p.adapted and not heads]
    return heads if any(p.name in heads for p in trained) else heads | _by_place(trained, unnamed, inputs)


def is_named_head(place: Place, modules: Mapping[Path, nn.Module]) -> bool:
    """Return whether a layer has a head's name, by itself or as one of a list; not within attention, nor a router."""
    name = place.own_name
    if name.isdigit() and len(place.path) > 1 and isinstance(modules.get(place.path[:-1]), LISTS):
        name = place.path[-2].lower()
    above = [part.lower() for part in place.path[:-1]]
    return HEAD.fullmatch(name) is not None and not any("router" in part or ATTENTION.fullmatch(part) for part in above)


def _towers(places: Sequence[Place]) -> set[str]:
    towers = [p for p in places if TOWER_HEAD.fullmatch(p.own_name)]
    return {a.name for a in towers for b in towers if a is not b and (a.parent, a.outs) == (b.parent, b.outs)}


def _ends_of_parts(places: Sequence[Place], named: Set[str], inputs: Sequence[tuple[str, int]]) -> set[str]:
    """Return the last layer of each module with a head's name, or the decoder that alone reads it (ModernBERT)."""
    parts: dict[Path, list[Place]] = {}
    for place in places:
        lengths = range(len(place.path) - 1, 0, -1)
        length = next((n for n in lengths if HEAD_PART.fullmatch(place.path[n - 1].lower())), None)
        if length is not None and not _is_repeated(place, places):
            parts.setdefault(place.path[:length], []).append(place)
    ends: dict[Path, Place] = {}
    for part, members in parts.items():
        end = next((p for p in reversed(members) if p.outs not in {o.ins for o in members}), members[-1])
        later = inputs[[name for name, _ in inputs].index(members[-1].name) + 1 :]
        if not any(name.startswith(".".join(part) + ".") for name, _ in later):
            ends[part] = end
    for part, end in ends.items():
        last = places[-1]
        if end is not last and last not in ends.values() and last.name not in named and end.outs == end.ins == last.ins:
            ends[part] = last
    return {end.name for end in ends.values()}


def _by_place(trained: Sequence[Place], places: Sequence[Place], inputs: Sequence[tuple[str, int]]) -> set[str]:
    for last in reversed(trained):
        if any(POOLER.fullmatch(part) for part in last.path) or _is_repeated(last, places):
            continue
        if not _is_taken(last, inputs):
            place = last.parent, last.ins
            beside = [p for p in trained if (p.parent, p.ins) == place and not _is_taken(p, inputs)]
            # What is twice as wide as the head's input is its shift and scale (DiT).
            return {p.name for p in beside if p is last or p.outs != 2 * last.ins}
    return set()


def _is_taken(place: Place, inputs: Sequence[tuple[str, int]]) -> bool:
    """Return whether a later matrix has the width of the layer's output as its input."""
    names = [name for name, _ in inputs]
    return place.outs in {width for _, width in inputs[names.index(place.name) + 1 :]}


def _is_repeated(place: Place, places: Sequence[Place]) -> bool:
    """Return whether the layer is one of several in a block that comes again elsewhere."""
    block = max((end for end in range(1, len(place.path)) if place.path[end - 1].isdigit()), default=0)
    here, pattern = place.path[:block], _pattern(place.path)
    again = any(p.path[:block] != here and p.outs == place.outs and _pattern(p.path) == pattern for p in places)
    return block > 0 and again and sum(p.path[:block] == here for p in places) > 1


def _pattern(path: Path) -> Path:
    return tuple("#" if part.isdigit() else part for part in path)
