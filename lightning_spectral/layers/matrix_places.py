"""Where the matrices of a network stand: the layer each belongs to, under which names, in which modules."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn


def _pattern(before: str, core: str, after: str) -> re.Pattern[str]:
    """Return what matches a core with any of the words before and after it, joined by an underscore or by nothing."""
    return re.compile(rf"(?:(?:{before})_?)*(?P<core>{core})(?:_?(?:{after}))*")


SUFFIXES = "proj|projection|lin|linear|layers?|dense|fc|weights?"

ROLE = _pattern(
    "w|to|lin|linear|proj|in_proj|c|add|pos|self|cross",
    "qkv|q_?kv|kvq|kv|qk|q|k|v|query_?key_?value|quer(?:y|ies)|keys?|values?",
    SUFFIXES + "|heads?|a|b|ba|z|attn|with_mqa",
)
"""Projections to query, key and value, alone or fused, in two steps (DeepSeek's `q_a_proj`), of positions too."""

FUSED = re.compile(r"c_attn|w_?pack")
INNER_FUSED = re.compile(r"in_proj(_\w+)?")
"""A fused projection's name that says so only within attention."""

OUT = _pattern("c|to|w|lin|linear|fc|add|attn", "out|o|h|proj|output|dense|projection", SUFFIXES)

UP = _pattern(
    "linear|dense|ffn?",
    "gate_up|up_gate|gate|up|c_fc|fc_?1|fc_in|w_?1|w_?3|w_?12|lin_?1|linear_?1|dense_?1|wi(?:_\\d)?|dense_h_to_4h"
    "|intermediate_dense|pwconv1|input_linear",
    "proj|projection|layer|linear",
)
DOWN = _pattern(
    "linear|dense|ffn?",
    "down|fc_?2|fc_out|w_?2|lin_?2|linear_?2|dense_?2|dense_4h_to_h|output_dense|pwconv2|output_linear",
    "proj|projection|layer|linear",
)
ROUTER = re.compile(r"gate|gating|w_?g|classifier|router|\w+_gate")

HEAD = re.compile(
    r"(\w+_)?(head|classifier)s?(_?\d+|_aux|_dist)?|score|(to_)?logits|embed_out|qa_outputs|seq_relationship|vocab_proj(ector)?|readout"
)
LAST = re.compile(r"(output|final)_(layer|projection)")
"""A head, unless other layers follow."""

HEAD_PART = re.compile(r"(\w+_)?(head|classifier|predictor)s?|cls|predictions|score")
"""A module whose last layer is a head."""

TOWER_HEAD = re.compile(r"(text|visual|vision|image|audio)_proj(ection)?")
"""The end of one of two networks whose outputs are compared, as CLIP's are."""

POOLER = re.compile(r"\w*pooler")

ATTENTION = re.compile(r"(\w+_)?(self|cross|encdec)?(attn|attention|mha)\d*")
ATTENTION_CLASS = re.compile(r"\w*(attention|attn|mha)")
MLP = re.compile(r"\w*(mlp|ffn|ffwd|feed_?forward|dense_?relu_?dense|experts?|channel_?mix|token_?mix)\w*|ff\d*")

EMBEDDER = re.compile(r"(\w+_)?emb(ed(d(ing|er))?)?s?")
"""What makes a vector of a position, a time step or a class, by layers of its own."""

ADAPTER = re.compile(r"(lora|dora|vera|hada|lokr|oft|boft|ia3)(_\w+)?")
WRAPPER = re.compile(r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module")

LOOKED_UP = re.compile(r"(.*_)?pos(ition)?(s|al)?(_.*)?|.*emb(ed)?(ding)?s?|wpe|wte|(.*_)?(tokens?|latents|registers?)")
"""Parameters of their own, not of a layer, that are added or looked up: positions, learned tokens."""

ELEMENTWISE = re.compile(
    r"a_log|d|a_(real|imag)|(\w+_)?(log_)?(scale|decay|gamma|dt)s?|log_\w+|time_(first|maa_\w+|mix_\w+|faaaa)"
)
"""Parameters of their own that act entry by entry: the dynamics of state-space models, scales."""

WITHIN = {"q", "k", "v", "qkv", "kv", "query", "key", "value"}
"""Words that tell a projection within attention, whatever stands beside them."""


def parts_of(name: str) -> str:
    """Return the letters of query, key and value that a projection's name holds; nothing for other names.

    >>> parts_of("W_Q"), parts_of("kv_a_proj_with_mqa"), parts_of("query_key_value"), parts_of("quantizer")
    ('q', 'kv', 'qkv', '')
    """
    if FUSED.fullmatch(name.lower()):
        return "qkv"
    match = ROLE.fullmatch(name.lower())
    if match is None:
        return ""
    core = match["core"].replace("_", "")
    core = core.replace("query", "q").replace("queries", "q").replace("keys", "k").replace("key", "k")
    core = core.replace("values", "v").replace("value", "v")
    return "".join(sorted(set(core), key="qkv".index))


Path = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A linear layer, or a parameter that may be used as one.

    Attributes:
        name: of the parameter.
        path: of the layer among the modules, without wrappers; that of a parameter of its own ends with its name.
        outs, ins: of the matrix; of a parameter of its own the order is not known.
        adapted: whether it has an adapter.
    """

    name: str
    path: Path
    outs: int
    ins: int
    trained: bool
    adapted: bool = False

    @property
    def own_name(self) -> str:
        """Name of the layer, a number where it is one of a container."""
        return self.path[-1].lower() if self.path else ""

    @property
    def named_path(self) -> Path:
        """Path up to the last name that is not a number: ``("attn", "to_out")`` of ``attn.to_out.0``."""
        path = self.path
        while path and path[-1].isdigit():
            path = path[:-1]
        return path

    @property
    def leaf(self) -> str:
        """Last name that is not a number."""
        return self.named_path[-1].lower() if self.named_path else ""

    @property
    def parent(self) -> Path:
        """Path of what holds the layer, or the container that it is a member of."""
        return self.named_path[:-1]


def owner_of(model: nn.Module, parameter: str) -> tuple[str, nn.Module]:
    """Return (qualified name, module) of the owner; for a parametrized weight, of the module whose weight it makes."""
    path = parameter.rpartition(".")[0].partition(".parametrizations.")[0]
    path = "" if path.startswith("parametrizations.") else path
    return path, nn.Module.get_submodule(model, path)


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether this is a Conv1D of transformers, a linear layer stored as (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def adapted_path(name: str) -> Path | None:
    """Return the path of the layer that an adapter's parameter adapts; None for other parameters.

    >>> adapted_path("attn.q_proj.lora_A.default.weight"), adapted_path("attn.q_proj.weight")
    (('attn', 'q_proj'), None)
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if i and ADAPTER.fullmatch(part)), None)
    return None if first is None else without_wrappers(parts[:first])


def adapted_parameter(model: nn.Module, name: str) -> Path:
    """Return the name of what an adapter's parameter adapts, where that is no layer's weight but a stack of experts."""
    parts = name.split(".")
    first = next(i for i, part in enumerate(parts) if i and ADAPTER.fullmatch(part))
    parameter = getattr(nn.Module.get_submodule(model, ".".join(parts[:first])), "parameter_name", None)
    return (parameter,) if isinstance(parameter, str) and parameter != "weight" else ()


def without_wrappers(parts: list[str]) -> Path:
    """Return a path without the modules that compile, shard, adapt or copy what they wrap."""
    path: list[str] = []
    for part in parts:
        if path and path[-1] == "modules_to_save":
            path[-1:] = []
        elif not WRAPPER.fullmatch(part):
            path.append(part)
    return tuple(path)


def place_of(name: str, parameter: Tensor, path: Path, owner: nn.Module, adapted: bool = False) -> Place:
    """Return the place of a parameter of two or more dimensions."""
    outs, ins = parameter.shape[-2:]
    if isinstance(owner, nn.Linear):
        # Of a parametrized weight the parameters have other shapes.
        outs, ins = owner.out_features, owner.in_features
    elif is_transposed_linear(owner):
        outs, ins = ins, outs
    return Place(name, path, outs, ins, parameter.requires_grad, adapted)
