"""Kind of each matrix of a network, from module types, places in the tree, shapes and usual names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from torch import nn

Kind = Literal["conv", "attention_qkv", "attention_out", "mlp_up", "mlp_down", "embedding", "head", "dense"]
KINDS: tuple[Kind, ...] = get_args(Kind)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

# Names as the common code bases write them: GPT-2, Llama, BERT, T5, OPT, NeoX, timm, torchvision, diffusers.
FUSED_NAME = re.compile(r"(w|to_?)?(qkv|q_?kv|kv)(_proj|_lin)?|query_key_value|c_attn|w_?pack")
SINGLE_NAME = re.compile(r"(w|to_?)?[qkv](_proj|_lin)?|query|key|value")
OUT_NAME = re.compile(r"(c_|to_|w)?(out|o|proj|output)(_proj|_lin|jection)?|dense")
UP_NAME = re.compile(r"(up|gate|gate_up)(_proj)?|c_fc|fc1|w1|w3|lin1|linear1|wi(_\d)?|dense_h_to_4h")
DOWN_NAME = re.compile(r"down(_proj)?|fc2|w2|lin2|linear2|dense_4h_to_h")
HEAD_NAME = re.compile(r"(\w+_)?head|classifier|score|(output|final)_(layer|projection)")
POSITION_NAME = re.compile(r"(.*_)?pos(ition)?(s|al)?(_.*)?|.*emb(ed)?(ding)?s?|wpe|wte")

BLOCK_DEPTH = 3
"""Most levels by which an attention layer lies below its block: three in BERT's `attention.self`."""


def infer_kinds(model: nn.Module) -> dict[str, Kind]:
    """Return qualified parameter name -> kind, for every parameter with two or more dimensions.

    Attention is known by `nn.MultiheadAttention` or by the names of its projections. In a block that contains
    attention, two linear layers d -> f and f -> d with f > d are the up and down layers of an MLP. A linear layer
    with a head's name is a head, or else the last one that is trained. The rest is dense.
    """
    return _KindInference(model).kinds


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether this is a Conv1D of transformers, a linear layer stored as (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def owner_of(model: nn.Module, parameter: str) -> tuple[str, nn.Module]:
    """Return (qualified name, module) of the owner; for a parametrized weight, of the module whose weight it makes."""
    path = parameter.rpartition(".")[0].partition(".parametrizations.")[0]
    path = "" if path.startswith("parametrizations.") else path
    return path, model.get_submodule(path)


def _place(parameter: str) -> tuple[str, str]:
    """Return (parent path, layer name) of a parameter's module; a position in a container goes by its name."""
    parts = parameter.partition(".parametrizations.")[0].split(".")
    parts = parts if ".parametrizations." in parameter else parts[:-1]
    for i, part in enumerate(parts):
        # An adapter, and the layer it adapts, go by that layer's name.
        if part == "base_layer" or part.startswith("lora_"):
            parts = parts[:i]
            break
    while parts and (parts[-1].isdigit() or parts[-1] == "_orig_mod"):
        parts.pop()
    return ".".join(parts[:-1]), parts[-1].lower() if parts else ""


class _KindInference:
    """One pass per kind over the linear layers that have none yet."""

    def __init__(self, model: nn.Module) -> None:
        self.kinds: dict[str, Kind] = {}
        self.frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        self.linear: dict[str, tuple[int, int]] = {}
        self.blocks: set[str] = set()
        self._by_type(model)
        self._attention()
        self._mlp()
        self._heads()

    def _by_type(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if isinstance(parameter, nn.UninitializedParameter) or parameter.ndim < 2:
                continue
            leaf = name.rpartition(".")[2]
            owner_name, owner = owner_of(model, name)
            above = model.get_submodule(owner_name.rpartition(".")[0])
            if isinstance(owner, EMBEDDINGS):
                self.kinds[name] = "embedding"
            elif isinstance(owner, CONVOLUTIONS + TRANSPOSED):
                self.kinds[name] = "conv"
            elif isinstance(owner, nn.MultiheadAttention):
                self.kinds[name] = "attention_qkv"
                self._add_blocks(owner_name)
            elif isinstance(above, nn.MultiheadAttention):
                self.kinds[name] = "attention_out"
            elif is_transposed_linear(owner):
                self.linear[name] = (parameter.shape[1], parameter.shape[0])
            elif isinstance(owner, nn.Linear):
                self.linear[name] = (parameter.shape[0], parameter.shape[1])
            else:
                self.kinds[name] = "embedding" if POSITION_NAME.fullmatch(leaf) else "dense"

    def _add_blocks(self, attention: str) -> None:
        parts = attention.split(".")
        self.blocks |= {".".join(parts[: len(parts) - up]) for up in range(min(BLOCK_DEPTH, len(parts)))} - {""}

    def _attention(self) -> None:
        places = {name: _place(name) for name in self.linear}
        singles = [parent for parent, leaf in places.values() if SINGLE_NAME.fullmatch(leaf)]
        parents = set()
        for name, (parent, leaf) in places.items():
            # One `value` alone may be a critic's head; two of query, key and value are attention.
            if FUSED_NAME.fullmatch(leaf) or (SINGLE_NAME.fullmatch(leaf) and singles.count(parent) > 1):
                self.kinds[name] = "attention_qkv"
                parents.add(parent)
                self._add_blocks(parent)
        # BERT keeps its projections in `attention.self` and `attention.output`.
        parents |= {parent.removesuffix("self") + "output" for parent in parents if parent.endswith(".self")}
        for name, (parent, leaf) in places.items():
            paired = any(places[other][0] == parent for other in self._partners(name, self.linear))
            if name not in self.kinds and parent in parents and OUT_NAME.fullmatch(leaf) and not paired:
                self.kinds[name] = "attention_out"

    def _mlp(self) -> None:
        free = {
            name: shape
            for name, shape in self.linear.items()
            if name not in self.kinds and not HEAD_NAME.fullmatch(_place(name)[1])
        }
        for name, (outs, ins) in free.items():
            around = [block for block in self.blocks if name.startswith(f"{block}.")]
            if not around:
                continue
            block, leaf = max(around, key=len), _place(name)[1]
            paired = any(other.startswith(f"{block}.") for other in self._partners(name, free))
            if UP_NAME.fullmatch(leaf) or (paired and outs > ins):
                self.kinds[name] = "mlp_up"
            elif DOWN_NAME.fullmatch(leaf) or (paired and outs < ins):
                self.kinds[name] = "mlp_down"

    def _partners(self, name: str, among: Mapping[str, tuple[int, int]]) -> list[str]:
        """Return the layers f -> d to a layer d -> f, f other than d."""
        outs, ins = self.linear[name]
        return [other for other, shape in among.items() if outs != ins and shape == (ins, outs)]

    def _heads(self) -> None:
        unnamed = [name for name in self.linear if name not in self.kinds]
        for name in unnamed:
            # A name counts for the layer itself, not for a container of several (VGG's `classifier.0`, `.3`, `.6`).
            own = name.split(".")[-2].lower() if "." in name else ""
            self.kinds[name] = "head" if HEAD_NAME.fullmatch(own) else "dense"
        trained = [name for name in unnamed if name not in self.frozen]
        if trained and not any(self.kinds[name] == "head" for name in trained):
            self.kinds[trained[-1]] = "head"
