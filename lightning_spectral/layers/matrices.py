"""Parameters of a network that are matrices: their names, kinds, and their two-dimensional view and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor, nn

from lightning_spectral.layers.kinds import CONVOLUTIONS, KINDS, TRANSPOSED, Kind, infer_kinds
from lightning_spectral.layers.matrix_places import ELEMENTWISE, is_transposed_linear, owner_of
from lightning_spectral.layers.names import (
    QKV,
    as_patterns,
    check_matches,
    match_pattern,
    parameter_names,
    plain_names,
    select,
)


@dataclass(frozen=True)
class MatrixLayer:
    """One matrix of a network: a parameter, or rows of it, seen as W (m, n).

    A linear layer is (out_features, in_features); a convolution, transposed or not, is
    (out_channels, in_channels / groups * kernel); a stack of E matrices is (E m, n), in groups.

    Attributes:
        name: the parameter's qualified name, without wrappers such as that of torch.compile;
            with ``.q``, ``.k``, ``.v`` appended for a part of a fused projection.
        parameter: the qualified name of the parameter that holds it.
        module: the qualified name of the module that owns the parameter.
        kind: one of `KINDS`.
        shape: (m, n) of the matrix; for a grouped convolution the rows of all groups.
        groups: into how many equal blocks of rows the matrix falls, each a matrix of its own.
        rows: first and last-plus-one row in the parameter's whole matrix.
        transposed: the parameter holds input channels first.
        stack: the parameter is a stack (groups, m / groups, n) of matrices, as of the experts of a mixture.
        aliases: other qualified names of the same tied parameter.
    """

    name: str
    parameter: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    groups: int = 1
    rows: tuple[int, int] | None = None
    transposed: bool = False
    stack: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """Names that select the layer: its own, its module's, its parameter's, and those of the parameter's ties."""
        plain = self.name if self.rows is None else self.name.rpartition(".")[0]
        parameters = (plain, self.parameter, *self.aliases)
        return {self.name, self.module} | {name for parameter in parameters for name in parameter_names(parameter)}

    @property
    def rank(self) -> int:
        """Number of singular values that it can have."""
        m, n = self.shape
        return self.groups * min(m // self.groups, n)

    @property
    def decomposition_cost(self) -> float:
        """Cost of its singular values, up to a factor: m n min(m, n)."""
        m, n = self.shape
        return float(m * n * min(m, n))

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Return the matrix (m, n) within a tensor of the parameter's shape."""
        if self.stack:
            return tensor.flatten(0, 1)
        matrix = self._output_first(tensor).flatten(1) if self.transposed else tensor.flatten(1)
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    def to_tensor(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Invert `to_matrix`: return a tensor of ``like``'s shape, zero outside this layer's rows."""
        if self.rows is not None:
            full = matrix.new_zeros(self._output_first(like).shape[0], matrix.shape[1])
            full[slice(*self.rows)] = matrix
            matrix = full
        if not self.transposed:
            return matrix.reshape(like.shape)
        g, kernel = self.groups, like.shape[2:]
        ins, outs = like.shape[0] // g, like.shape[1]
        return matrix.reshape(g, outs, ins, *kernel).transpose(1, 2).reshape(like.shape)

    def _output_first(self, tensor: Tensor) -> Tensor:
        """Return a transposed convolution's (in, out / groups, ...) as (out, in / groups, ...)."""
        if not self.transposed:
            return tensor
        g, kernel = self.groups, tensor.shape[2:]
        ins, outs = tensor.shape[0] // g, tensor.shape[1]
        return tensor.reshape(g, ins, outs, *kernel).transpose(1, 2).reshape(g * outs, ins, *kernel)


LEAST_RANK = 3
"""Rank below which a matrix can have no exponent, and is not measured unless it is named."""


class NoMatrixError(ValueError):
    """A network without a matrix that is trained."""


LayerSelection = str | Sequence[str] | Callable[[MatrixLayer], bool] | None


@dataclass(frozen=True)
class LayerSet:
    """The matrices to measure, in the order of the network, and those left out with the reason."""

    layers: dict[str, MatrixLayer]
    skipped: dict[str, str]


def find_layers(
    model: nn.Module,
    *,
    layers: LayerSelection = None,
    kinds: Mapping[str, Kind] | None = None,
    fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] = (),
) -> LayerSet:
    """Return the matrix parameters of a network.

    Args:
        model: any module.
        layers: which to take. None: all of rank 3 and more but embeddings. Glob patterns: those whose name, or whose
            parameter's, or module's name one of them matches, embeddings too. A callable: those `MatrixLayer` it
            accepts.
        kinds: glob pattern -> kind, over the kind inferred from the module structure. The first match counts.
        fused_qkv: glob patterns of projections that hold query, key and value in equal blocks of rows, to be
            measured apart; or pattern -> the three numbers of rows. `nn.MultiheadAttention` is split by itself.

    Raises:
        NoMatrixError: if the network has no matrix parameter that is trained.
        ValueError: if a pattern matches nothing, a kind is unknown, or rows of a fused projection do not add up.
    """
    matrices, skipped = matrix_parameters(model)
    if not matrices:
        found = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        count = sum(1 for _ in model.parameters())
        found = found or (f"{count} parameters, none with two or more dimensions" if count else "no parameters")
        raise NoMatrixError(
            f"{type(model).__name__} has no matrix to measure: needed is a Linear, convolution, attention or other "
            f"two-dimensional parameter that is trained; found {found}"
        )
    matrices = _split_fused(matrices, fused_qkv, skipped)
    matrices = _with_kinds(matrices, kinds or {}, skipped)
    return LayerSet(_select(matrices, layers, skipped), skipped)


def matrix_parameters(model: nn.Module) -> tuple[dict[str, MatrixLayer], dict[str, str]]:
    """Return trained parameters that are matrices, fused projections whole; and those that are not, with the reason."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    kinds = infer_kinds(model)
    matrices, skipped = {}, {}
    for parameter, aliases in names.items():
        # A tied weight goes by its use as a layer, not as a look-up table.
        name = min(aliases, key=lambda alias: kinds.get(alias) == "embedding")
        if isinstance(parameter, nn.UninitializedParameter):
            skipped[name] = "its lazy module has not seen a batch yet"
            continue
        if parameter.ndim < 2:
            continue
        ties = tuple(alias for alias in aliases if alias != name)
        layer = _as_matrix(model, name, parameter, kinds.get(name, "dense"), ties)
        if isinstance(layer, str):
            skipped[name] = layer
        elif not parameter.requires_grad:
            skipped[name] = "frozen"
        elif not parameter.is_floating_point():
            skipped[name] = f"its entries are {parameter.dtype}, not real floating point"
        else:
            matrices[name] = layer
    plain = plain_names(model, [*matrices, *skipped])
    return (
        {plain[name]: replace(layer, name=plain[name]) for name, layer in matrices.items()},
        {plain[name]: reason for name, reason in skipped.items()},
    )


def _as_matrix(
    model: nn.Module, name: str, parameter: Tensor, kind: Kind, aliases: tuple[str, ...]
) -> MatrixLayer | str:
    """Return the parameter as a matrix, or the reason why it is none."""
    module, owner = owner_of(model, name)
    if name.rpartition(".")[2] != "weight" and parameter.numel() == max(parameter.shape):
        return f"a vector of {parameter.numel()} entries stored as {tuple(parameter.shape)}"
    if "bias" in name.rpartition(".")[2]:
        return "a bias stored in several dimensions"
    if ELEMENTWISE.fullmatch(name.rpartition(".")[2].lower()):
        return "by its name it acts entry by entry, not as a matrix"
    shape, groups, transposed, stack = parameter.shape, 1, False, False
    if isinstance(owner, TRANSPOSED) and parameter.ndim > 2:
        groups, transposed = owner.groups, True
        matrix = (shape[1] * groups, shape[0] // groups * shape[2:].numel())
    elif isinstance(owner, CONVOLUTIONS) and parameter.ndim > 2:
        groups, matrix = owner.groups, (shape[0], shape[1:].numel())
    elif is_transposed_linear(owner):
        transposed, matrix = True, (shape[1], shape[0])
    elif parameter.ndim == 2:
        matrix = (shape[0], shape[1])
    elif parameter.ndim == 3 and min(shape) > 1:
        stack, groups, matrix = True, shape[0], (shape[0] * shape[1], shape[2])
    else:
        return f"{parameter.ndim}-dimensional parameter of a {type(owner).__name__}, which has no agreed matrix view"
    return MatrixLayer(name, name, module, kind, matrix, groups, None, transposed, stack, aliases)


def _split_fused(
    layers: Mapping[str, MatrixLayer], fused: Sequence[str] | Mapping[str, Sequence[int]], skipped: Mapping[str, str]
) -> dict[str, MatrixLayer]:
    sizes = dict(fused) if isinstance(fused, Mapping) else dict.fromkeys(as_patterns(fused), ())
    out: dict[str, MatrixLayer] = {}
    for name, layer in layers.items():
        pattern = match_pattern(layer.names, sizes)
        if pattern is None and not (layer.kind == "attention_qkv" and name.endswith("in_proj_weight")):
            out[name] = layer
            continue
        rows = () if pattern is None else tuple(sizes[pattern])
        rows = rows or (layer.shape[0] // 3,) * 3
        if len(rows) != 3 or min(rows) < 1 or sum(rows) != layer.shape[0] or layer.groups != 1:
            raise ValueError(
                f"fused_qkv: the {layer.shape[0]} rows of {name} cannot be split into query, key and value of "
                f"{list(rows)} rows; give a mapping from its pattern to their three numbers"
            )
        first = 0
        for part, size in zip(QKV, rows, strict=True):
            out[f"{name}.{part}"] = replace(
                layer,
                name=f"{name}.{part}",
                kind="attention_qkv",
                shape=(size, layer.shape[1]),
                rows=(first, first + size),
            )
            first += size
    check_matches("fused_qkv", sizes, layers, _names_of, skipped=skipped)
    return out


def _with_kinds(
    layers: Mapping[str, MatrixLayer], kinds: Mapping[str, Kind], skipped: Mapping[str, str]
) -> dict[str, MatrixLayer]:
    check_kinds(kinds)
    check_matches("kinds", kinds, layers, _names_of, skipped=skipped)
    patterns = {name: match_pattern(layer.names, kinds) for name, layer in layers.items()}
    return {
        name: layer if (pattern := patterns[name]) is None else replace(layer, kind=kinds[pattern])
        for name, layer in layers.items()
    }


def with_seen_kinds(
    layers: Mapping[str, MatrixLayer], seen: Mapping[str, Kind], given: Mapping[str, Kind] | None
) -> dict[str, MatrixLayer]:
    """Return layers with the kinds that a loss showed them to have, but for those whose kind was given by pattern."""
    own = select(layers, given or {}, _names_of)
    return {**layers, **{name: replace(layers[name], kind=kind) for name, kind in seen.items() if name not in own}}


def check_kinds(kinds: Mapping[str, Kind]) -> None:
    """Raise ValueError for a kind that does not exist."""
    for pattern, kind in kinds.items():
        if kind not in KINDS:
            raise ValueError(f"kinds: {kind!r} (for {pattern!r}) is no kind of layer; take one of {', '.join(KINDS)}")


def _select(
    layers: Mapping[str, MatrixLayer], selection: LayerSelection, skipped: dict[str, str]
) -> dict[str, MatrixLayer]:
    reason = "not selected by layers"
    if selection is None:
        reason = "an embedding, left out by default"
        low = {name for name, layer in layers.items() if layer.rank < LEAST_RANK}
        skipped |= dict.fromkeys(low, f"its rank is below {LEAST_RANK}: no exponent can be fitted to so few values")
        layers = {name: layer for name, layer in layers.items() if name not in low}
        selected = {name: layer for name, layer in layers.items() if layer.kind != "embedding"}
    elif callable(selection):
        selected = {name: layer for name, layer in layers.items() if selection(layer)}
    else:
        check_matches("layers", selection, layers, _names_of, skipped=skipped)
        selected = select(layers, selection, _names_of)
    skipped.update({name: reason for name in layers if name not in selected})
    return selected


_names_of: Callable[[MatrixLayer], set[str]] = attrgetter("names")


def matrix_direction(layer: MatrixLayer, u: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """Return u v^T in the parameter's shape. u: (m,), v: (n,)."""
    return layer.to_tensor(torch.outer(u, v).to(like.dtype), like)
