"""Which linear layers are an attention's projections, by tree and names, and which enclose the activation of an MLP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lightning_spectral.layers.matrix_places import (
    ATTENTION,
    ATTENTION_CLASS,
    DOWN,
    EMBEDDER,
    INNER_FUSED,
    MLP,
    OUT,
    ROUTER,
    UP,
    WITHIN,
    Path,
    Place,
    parts_of,
)

BLOCK_LEVELS = 2
"""How many numbered levels above attention are blocks: T5 keeps attention and MLP in two items of a block's list."""


@dataclass
class Attentions:
    """Attention projections found in a network.

    Attributes:
        inputs: names of the parameters of projections to query, key and value.
        outputs: names of those that mix the heads.
        scopes: paths of the modules that hold them.
        named_scopes: of these, the modules that are attention and nothing else by their name or class.
    """

    inputs: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)
    scopes: set[Path] = field(default_factory=set)
    named_scopes: set[Path] = field(default_factory=set)

    @property
    def blocks(self) -> set[Path]:
        """Paths of the modules that hold an attention and what stands beside it."""
        found: set[Path] = set()
        for scope in self.scopes:
            numbered = [scope[:end] for end in range(len(scope), 0, -1) if scope[end - 1].isdigit()]
            found |= set(numbered[:BLOCK_LEVELS]) or {scope[:-1] or scope}
        return found

    def holds(self, place: Place) -> bool:
        """Return whether a layer is inside an attention, as that of a bias by position is."""
        depths = range(len(place.path) - 1, 0, -1)
        return any(place.path[:depth] in self.named_scopes for depth in depths)


def find_attentions(places: Sequence[Place], modules: Mapping[Path, nn.Module], scopes: Iterable[Path]) -> Attentions:
    """Return the attention projections among linear layers.

    Args:
        places: linear layers.
        scopes: paths of the modules known to be attention (`nn.MultiheadAttention`).
    """
    found = Attentions(scopes=set(scopes))
    of_scope: dict[Path, list[Place]] = {}
    of_parent: dict[Path, list[Place]] = {}
    for place in places:
        if (scope := attention_around(place, modules)) is not None:
            of_scope.setdefault(scope, []).append(place)
        of_parent.setdefault(place.parent, []).append(place)
    for parent, members in of_parent.items():
        _add_inputs(found, parent, [p for p in members if not _is_chain(p, members, modules)])
    for scope, members in of_scope.items():
        _add_scope(found, scope, members)
    for parent, members in of_parent.items():
        if parent in found.scopes and parent not in of_scope:
            found.outputs |= {p.name for p in members if _is_output(p, members, found)}
    return found


def _add_inputs(found: Attentions, parent: Path, members: Sequence[Place]) -> None:
    """Add projections that stand beside each other: a fused one, or two of query, key and value with one input."""
    parts = {place.name: parts_of(place.leaf) for place in members}
    fused = {name for name, letters in parts.items() if len(letters) > 1}
    singles = [place for place in members if len(parts[place.name]) == 1]
    # One `value` alone may be a critic's head. A value that reads the key is an MLP, as in RWKV.
    pairs = any(
        parts[a.name] != parts[b.name]
        and (a.ins == b.ins or a.outs == b.outs)
        and (a.outs == a.ins or (a.outs, a.ins) != (b.ins, b.outs))
        for a in singles
        for b in singles
    )
    if fused or pairs:
        found.inputs |= fused | {place.name for place in singles}
        found.scopes.add(parent)


def _add_scope(found: Attentions, scope: Path, members: Sequence[Place]) -> None:
    """Add the layers of a module that its name or class calls attention."""
    rest = [p for p in members if p.name not in found.inputs and not _is_of_mlp(p.leaf)]
    named = [p for p in rest if parts_of(p.leaf) or INNER_FUSED.fullmatch(p.leaf) or WITHIN & set(p.leaf.split("_"))]
    below = any(inner[: len(scope)] == scope for inner in found.scopes)
    if not named and not below and not _is_unnamed_attention(rest):
        return
    rest = [p for p in rest if p not in named]
    output = next((p for p in reversed(rest) if OUT.fullmatch(p.leaf)), rest[-1] if rest else None)
    inputs = named + [p for p in members if p.name in found.inputs]
    widths = {p.ins for p in inputs} or {p.ins for p in rest}
    found.scopes.add(scope)
    if not any(_is_of_mlp(p.leaf) for p in members):
        found.named_scopes.add(scope)
    found.inputs |= {p.name for p in named}
    if output is not None:
        found.outputs |= {p.name for p in rest if p is output or _is_named_output(p)}
        found.inputs |= {p.name for p in rest if p.name not in found.outputs and p.ins in widths and p.outs > 2}


def _is_of_mlp(name: str) -> bool:
    return bool(UP.fullmatch(name) or DOWN.fullmatch(name))


def _is_named_output(place: Place) -> bool:
    """Return whether a layer or what holds it alone is called an output."""
    return OUT.fullmatch(place.leaf) is not None and any("out" in name.lower() for name in place.named_path[-2:])


def _is_unnamed_attention(members: Sequence[Place]) -> bool:
    """Return whether three layers with one input, or one of three times its width, and the output are all there is."""
    inputs, outputs = members[:-1], members[-1:]
    if not members or members[-1].outs != members[0].ins:
        return False
    fused = [p.outs for p in inputs] == [3 * p.ins for p in outputs]
    return fused or (len(inputs) == 3 and len({p.ins for p in inputs}) == 1)


def _is_output(place: Place, members: Sequence[Place], found: Attentions) -> bool:
    """Return whether a layer beside projections mixes their heads, and is not the end of an MLP."""
    others = [p for p in members if p.name not in found.inputs]
    paired = any(p.outs != p.ins and (p.outs, p.ins) == (place.ins, place.outs) for p in others)
    return place in others and OUT.fullmatch(place.leaf) is not None and not paired


def _is_chain(place: Place, members: Sequence[Place], modules: Mapping[Path, nn.Module]) -> bool:
    """Return whether the layer is one of several in a row, as of a critic's `q_net.0`, `q_net.2`."""
    container = modules.get(place.named_path)
    row = [p for p in members if p.named_path == place.named_path]
    return isinstance(container, nn.Sequential) and len(row) > 1


def attention_around(place: Place, modules: Mapping[Path, nn.Module]) -> Path | None:
    """Return the outermost module around a layer, within its block, that its name or class calls attention."""
    scope, path = None, place.parent
    while path and not path[-1].isdigit():
        kind = type(modules.get(path)).__name__.lower()
        if ATTENTION.fullmatch(path[-1].lower()) or ATTENTION_CLASS.fullmatch(kind):
            scope = path
        path = path[:-1]
    return scope


STATE_SPACE = "A_log"
"""A parameter of Mamba's layers, which widen and narrow as an MLP's do."""

MlpKind = Literal["mlp_up", "mlp_down"]


def find_mlps(places: Sequence[Place], modules: Mapping[Path, nn.Module], blocks: Set[Path]) -> dict[str, MlpKind]:
    """Return parameter name -> kind of the layers into and out of hidden activations.

    In a block with attention a name tells them, or that they lead to a width and back. In any other block of several
    (a mixer, a ConvNeXt) both must.

    Args:
        places: linear layers that have no kind yet.
        blocks: paths of the blocks with attention.
    """
    kinds: dict[str, MlpKind] = {}
    groups: dict[tuple[Path, bool], list[Place]] = {}
    for place in places:
        if _is_router(place, modules) or hasattr(modules.get(place.parent), STATE_SPACE):
            continue
        block, has_attention = _block_of(place, blocks)
        if block is not None and not any(EMBEDDER.fullmatch(part.lower()) for part in place.path[len(block) : -1]):
            groups.setdefault((block, has_attention), []).append(place)
    for (_, has_attention), members in groups.items():
        parts: dict[Path | None, list[Place]] = {}
        for place in members:
            parts.setdefault(_mlp_around(place, modules), []).append(place)
        for module, layers in parts.items():
            by_place = _pairs(layers) if module is None else _enclosing(layers)
            by_name = _named(layers)
            if has_attention:
                kinds |= by_place | by_name
            elif module is not None or by_name:
                kinds |= {name: by_name.get(name, kind) for name, kind in by_place.items()}
                kinds |= by_name if {"mlp_up", "mlp_down"} <= set(by_name.values()) and module is not None else {}
    return kinds


def _named(layers: Sequence[Place]) -> dict[str, MlpKind]:
    kinds: dict[str, MlpKind] = {}
    for place in layers:
        # BERT has `intermediate.dense` and `output.dense`.
        name = "_".join(place.named_path[-2:]).lower() if place.leaf == "dense" else place.leaf
        if UP.fullmatch(name):
            kinds[place.name] = "mlp_up"
        elif DOWN.fullmatch(name):
            kinds[place.name] = "mlp_down"
    return kinds


def _pairs(layers: Sequence[Place]) -> dict[str, MlpKind]:
    """Return the kinds of layers that follow each other, to a width (as often as it is gated) and back."""
    kinds: dict[str, MlpKind] = {}
    for i, up in enumerate(layers):
        j = next((j for j in range(i + 1, len(layers)) if _shape(layers[j]) != _shape(up)), None)
        if j is not None and up.name not in kinds and up.outs != up.ins and _leads_back(up, layers[j]):
            kinds |= dict.fromkeys((p.name for p in layers[i:j]), "mlp_up")
            kinds[layers[j].name] = "mlp_down"
    return kinds


def _enclosing(layers: Sequence[Place]) -> dict[str, MlpKind]:
    """Return the kinds of the layers of an MLP: the last leads back to the width that others start from."""
    for down in reversed(layers[1:]):
        ups = [p for p in layers[: layers.index(down)] if _leads_back(p, down)]
        if ups:
            return {**{p.name: "mlp_up" for p in ups}, down.name: "mlp_down"}
    return {}


def _leads_back(up: Place, down: Place) -> bool:
    """Return whether one layer goes back to where the other came from; a fused gate is twice as wide."""
    return down.outs == up.ins and down.ins in (up.outs, up.outs / 2)


def _shape(place: Place) -> tuple[int, int]:
    return place.outs, place.ins


def _is_router(place: Place, modules: Mapping[Path, nn.Module]) -> bool:
    """Return whether a layer chooses among experts beside it."""
    return ROUTER.fullmatch(place.leaf) is not None and (
        (*place.parent, "experts") in modules or any("router" in part.lower() for part in place.path[:-1])
    )


def _block_of(place: Place, blocks: Set[Path]) -> tuple[Path | None, bool]:
    """Return the innermost block around a layer, and whether it has attention; else the innermost of a list."""
    ends = range(len(place.path) - 1, 0, -1)
    around = [place.path[:end] for end in ends]
    with_attention = next((path for path in around if path in blocks), None)
    if with_attention is not None:
        return with_attention, True
    return next((path for path in around if path[-1].isdigit()), None), False


def _mlp_around(place: Place, modules: Mapping[Path, nn.Module]) -> Path | None:
    """Return the innermost module around a layer that its name or class calls an MLP, with an expert's number."""
    path = place.path[:-1]
    while path:
        above = path[:-1] if path[-1].isdigit() else path
        kind = type(modules.get(path)).__name__.lower()
        if (above and MLP.fullmatch(above[-1].lower())) or MLP.fullmatch(kind):
            return path
        path = path[:-1]
    return None
