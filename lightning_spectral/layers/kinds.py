"""Kind of each matrix of a network, from module types, places in the tree, shapes and usual names."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from lightning_spectral.layers.attention import find_attentions
from lightning_spectral.layers.head import find_heads, is_named_head
from lightning_spectral.layers.matrix_places import (
    Path,
    Place,
    adapted_parameter,
    adapted_path,
    owner_of,
    place_of,
    without_wrappers,
)
from lightning_spectral.layers.mlp import find_mlps
from lightning_spectral.layers.usual_names import LOOKED_UP

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
            above = model.get_submodule(owner_name.rpartition(".")[0])
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
