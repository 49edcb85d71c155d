"""Which linear layers enclose the activation of an MLP in a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Literal

from torch import nn

from lightning_spectral.layers.matrix_places import DOWN, EMBEDDER, MLP, ROUTER, UP, Path, Place

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
