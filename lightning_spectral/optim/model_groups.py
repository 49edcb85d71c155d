"""Which parameters get the matrix update, with which exponent and damping, and how a network falls into groups."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_spectral.errors import SpectralWarning
from lightning_spectral.layers.kinds import Kind, infer_kinds
from lightning_spectral.layers.matrices import MatrixLayer, NoMatrixError, find_layers
from lightning_spectral.layers.names import check_module, plain_names
from lightning_spectral.optim.placement import STACK, Layout

ALPHA_BY_KIND: dict[str, float] = {
    "conv": 2.0,
    "dense": 2.0,
    "attention_qkv": 1.0,
    "attention_out": 1.0,
    "mlp_up": 1.0,
    "mlp_down": 1.0,
}
"""alpha="auto": 2 for convolutions and MLPs, about 1 for transformer blocks (arXiv 2606.02596, Spectral Newton;
measured there 1.94 to 2.17, 2.18, and 0.84 to 1.43). Embeddings and heads have none, they get AdamW."""

DAMPING_BY_KIND: dict[str, float] = {"attention_qkv": 0.03, "attention_out": 0.03, "mlp_up": 0.03, "mlp_down": 0.03}
"""damping="auto" for transformer blocks: the best of 0.01 to 1 on a small character GPT with alpha = 2 at its best rate
(examples/benchmarks/train.py --study), and better than by the noise on the validation parts of three of four small
transformers, no worse on the fourth (small_tasks.py)."""

DAMPING = 0.1
"""damping="auto" of every other matrix where the step's size is fixed, and nothing knows the noise: the paper's value;
on a small ResNet and an MLP, 0.03 to 0.3 do about as well (the same study)."""

ADAMW_KINDS = ("embedding", "head")

ADAMW_NAMES: tuple[str, ...] = (
    "*embed*", "*emb", "wte", "wpe", "tok", "tokens", "pos", "pos_*", "positions", "head", "*_head", "classifier",
)  # fmt: skip
"""Names of embeddings and heads in common code bases."""

MANY_ROWS, ROWS_PER_COLUMN = 100, 4
"""Rows, and rows per column, above which a matrix looks like an embedding: an MLP's has 4 per column."""

FUSED_IN_THIRDS = re.compile(r"(.*\.)?((w|to_?)?qkv(_proj|_lin)?|c_attn)\.weight")
"""Projections that stack query, key and value. `query_key_value` (NeoX, Bloom) interleaves them by head instead."""


def is_matrix(parameter: Tensor) -> bool:
    """Return whether it has a row and a column dimension of more than one entry each."""
    return parameter.ndim >= 2 and 1 < parameter.shape[0] < parameter.numel()


def look_ups_by_shape(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the shapes of the first and last matrix that look like an embedding's or a head's.

    An embedding and a language model's head have many more rows than columns, a classifier's head many fewer.

    >>> import torch
    >>> look_ups_by_shape([torch.zeros(5000, 64), torch.zeros(64, 64), torch.zeros(10, 64)])
    [(5000, 64), (10, 64)]
    """
    shapes = [tuple(p.shape) for p in parameters if is_matrix(p)]
    if len(shapes) < 2:
        return []
    ends = [shape for shape in (shapes[0], shapes[-1]) if len(shape) == 2]
    look_ups = [(m, n) for m, n in ends if m >= MANY_ROWS and m > ROWS_PER_COLUMN * n]
    heads = [(m, n) for m, n in (shapes[-1:] if len(shapes[-1]) == 2 else []) if ROWS_PER_COLUMN * m < n]
    return [*look_ups, *heads]


def warn_of_look_ups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn if parameters without names or kinds look as if embeddings and heads were among them."""
    unnamed = [g for g in groups if g["update"] == "spectral" and not {"param_names", "kind"} & g.keys()]
    shapes = look_ups_by_shape([parameter for group in unnamed for parameter in group["params"]])
    if shapes:
        warnings.warn(
            f"matrices of shape {', '.join(map(str, shapes))} look like embeddings or heads, for which AdamW is "
            "meant, and get the matrix update, since parameters without names do not tell them apart; pass "
            "SpectralNewton.groups(model) as params",
            SpectralWarning,
            stacklevel=3,
        )


def has_adamw_name(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern with a dot matches the name, or one without one of its last two parts.

    These are the module's own name and the parameter's: a container's name says nothing about its layers.
    """
    return any(
        fnmatchcase(text, pattern)
        for pattern in patterns
        for text in ([name] if "." in pattern else name.split(".")[-2:])
    )


def model_groups(
    model: nn.Module,
    *,
    kinds: Mapping[str, Kind] | None = None,
    fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Return named groups by kind of layer; see `SpectralNewton.groups`."""
    check_module(model)
    matrices: dict[str, list[MatrixLayer]] = {}
    for layer in _layers(model, kinds, fused_qkv):
        matrices.setdefault(layer.parameter, []).append(layer)
    groups: dict[str, dict[str, Any]] = {}
    adamw = _no_group("adamw", "adamw")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = plain_names(model, trained)
    for name, parameter in trained.items():
        layers = matrices.get(name, [])
        layout = _layout(layers, parameter)
        group = adamw
        if layout is not None:
            kind = layers[0].kind
            group = groups.setdefault(kind, {**_no_group(kind, "spectral"), "layouts": [], "kind": kind})
            group["layouts"].append(layout)
        group["params"].append(parameter)
        group["param_names"].append(plain[name])
    return [group for group in (*groups.values(), adamw) if group["params"]]


def _no_group(name: str, update: str) -> dict[str, Any]:
    return {"params": [], "param_names": [], "name": name, "update": update}


def _layers(
    model: nn.Module, kinds: Mapping[str, Kind] | None, fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] | None
) -> list[MatrixLayer]:
    """Return the matrices that are neither embeddings nor heads, under the first of the names of a tied parameter."""
    find = partial(find_layers, model, layers=lambda layer: layer.kind != "embedding", kinds=kinds)
    try:
        whole = find().layers
    except NoMatrixError:
        if kinds is not None:
            raise
        return []
    if fused_qkv is None:
        fused_qkv = [layer.name for layer in whole.values() if _in_thirds(layer)]
    by_name = infer_kinds(model)
    return [
        layer
        for layer in (find(fused_qkv=fused_qkv).layers.values() if whole else ())
        if layer.kind not in ADAMW_KINDS and not any(by_name.get(alias) in ADAMW_KINDS for alias in layer.aliases)
    ]


def _in_thirds(layer: MatrixLayer) -> bool:
    m, n = layer.shape
    return layer.kind == "attention_qkv" and m == 3 * n and FUSED_IN_THIRDS.fullmatch(layer.name) is not None


def _layout(layers: Sequence[MatrixLayer], parameter: Tensor) -> Layout | None:
    """Return where the matrices of a parameter lie; None if none has more than one row and column."""
    if not layers:
        return None
    first = layers[0]
    rows = [layer.shape[0] for layer in layers]
    if first.stack:
        return Layout(input_first=STACK, rows=[])
    if first.groups > 1:
        rows = [first.shape[0] // first.groups] * first.groups
        fan_in = parameter.shape[0] // first.groups if first.transposed else parameter.shape[1]
        if fan_in == 1:
            return None  # depthwise: each filter by itself, with no matrix structure
    if min(rows) < 2 or first.shape[1] < 2:
        return None
    return Layout(input_first=first.groups if first.transposed else 0, rows=rows if len(rows) > 1 else [])
