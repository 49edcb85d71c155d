"""Kind of each matrix of a network, from module types, places in the tree, shapes and usual names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Literal, get_args

from torch import nn

from lightning_spectral.layers.blocks import find_attentions, find_mlps
from lightning_spectral.layers.matrix_places import (
    ATTENTION,
    HEAD,
    HEAD_PART,
    LAST,
    LOOKED_UP,
    POOLER,
    TOWER_HEAD,
    Path,
    Place,
    adapted_parameter,
    adapted_path,
    owner_of,
    place_of,
    without_wrappers,
)

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
    """
    heads = {p.name for p in unnamed if is_named_head(p, modules)}
    towers = [p for p in unnamed if TOWER_HEAD.fullmatch(p.own_name)]
    heads |= {a.name for a in towers for b in towers if a is not b and (a.parent, a.outs) == (b.parent, b.outs)}
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


Kind = Literal["conv", "attention_qkv", "attention_out", "mlp_up", "mlp_down", "embedding", "head", "dense"]
KINDS: tuple[Kind, ...] = get_args(Kind)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def infer_kinds(model: nn.Module) -> dict[str, Kind]:
    """Return qualified parameter name -> kind, for every parameter with two or more dimensions.

    Attention is `nn.MultiheadAttention`, or a module that its projections' names, its own or its class's call so; what
    mixes its heads is the output, and all else that reads its input belongs to query, key and value. The layers of a
    block beside it that lead to another width and back are an MLP's. A head is known by its name, or else is the last
    layer whose output no other takes. An adapter has the kind of the layer that it adapts. The rest is dense.
    """
    return _KindInference(model).kinds


class _KindInference:
    """One pass per kind over the linear layers that have none yet."""

    def __init__(self, model: nn.Module) -> None:
        self.kinds: dict[str, Kind] = {}
        self.places: list[Place] = []
        self.inputs: list[tuple[str, int]] = []
        self.attention: set[Path] = set()
        self.of_path: dict[Path, str] = {}
        self.followers: dict[str, Path] = {}
        self.modules = {
            without_wrappers(name.split(".") if name else []): module
            for name, module in model.named_modules(remove_duplicate=False)
        }
        self.matrices = [
            (name, parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not isinstance(parameter, nn.UninitializedParameter) and parameter.ndim > 1
        ]
        self._by_type(model)
        self._by_place()
        for name, path in self.followers.items():
            self.kinds[name] = self.kinds[self.of_path[path]] if path in self.of_path else "dense"
        self.kinds = {name: self.kinds[name] for name, _ in self.matrices}

    def _by_type(self, model: nn.Module) -> None:
        adapted = {path for name, _ in self.matrices if (path := adapted_path(name)) is not None}
        for name, parameter in self.matrices:
            if (path := adapted_path(name)) is not None:
                self.followers[name] = path + adapted_parameter(model, name)
                continue
            owner_name, owner = owner_of(model, name)
            above = nn.Module.get_submodule(model, owner_name.rpartition(".")[0])
            path = without_wrappers(owner_name.split(".") if owner_name else [])
            # What is inside an adapted layer goes by that layer's name.
            path = next((path[:end] for end in range(1, len(path) + 1) if path[:end] in adapted), path)
            if isinstance(owner, nn.Linear) and path in self.of_path:
                self.followers[name] = path
                continue
            if isinstance(owner, EMBEDDINGS):
                self.kinds[name] = "embedding"
            elif isinstance(owner, CONVOLUTIONS + TRANSPOSED):
                self.kinds[name] = "conv"
                self.inputs.append((name, owner.in_channels))
            elif isinstance(owner, nn.MultiheadAttention):
                self.kinds[name] = "attention_qkv"
                self.attention.add(path)
                self.inputs.append((name, parameter.shape[-1]))
            elif isinstance(above, nn.MultiheadAttention):
                self.kinds[name] = "attention_out"
            elif isinstance(owner, nn.Linear) or name.endswith("weight"):
                self._add(place_of(name, parameter, path, owner, path in adapted))
            else:
                own_path = (*path, name.rpartition(".")[2])
                self._add_own(place_of(name, parameter, own_path, owner), parameter)
                self.of_path[own_path] = name
            self.of_path.setdefault(path, name)

    def _add_own(self, place: Place, parameter: nn.Parameter) -> None:
        """Add a parameter that no layer of a known type holds."""
        if LOOKED_UP.fullmatch(place.own_name):
            self.kinds[place.name] = "embedding"
        elif parameter.ndim > 3 or min(parameter.shape) < 2 or "bias" in place.own_name:
            self.kinds[place.name] = "dense"
        else:
            self._add(place)

    def _add(self, place: Place) -> None:
        self.places.append(place)
        self.inputs.append((place.name, place.ins))

    def _by_place(self) -> None:
        layers = [place for place in self.places if not is_named_head(place, self.modules)]
        attentions = find_attentions(layers, self.modules, self.attention)
        self.kinds |= dict.fromkeys(attentions.inputs, "attention_qkv")
        self.kinds |= dict.fromkeys(attentions.outputs, "attention_out")
        inside = [place.name for place in layers if place.name not in self.kinds and attentions.holds(place)]
        self.kinds |= dict.fromkeys(inside, "dense")
        layers = [place for place in layers if place.name not in self.kinds]
        self.kinds |= find_mlps(layers, self.modules, attentions.blocks)
        rest = [place for place in self.places if place.name not in self.kinds]
        heads = find_heads(rest, self.inputs, self.modules)
        self.kinds |= {place.name: "head" if place.name in heads else "dense" for place in rest}
