"""Where the matrices of a network stand: the layer each belongs to, under which names, in which modules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lightning_spectral.layers.usual_names import ADAPTER, WRAPPER

Path = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A linear layer, or a parameter that may be used as one.

    Attributes:
        name: of the parameter.
        path: of the layer among the modules, without wrappers; that of a parameter of its own ends with its name.
        outs, ins: of the matrix; of a parameter of its own the order is not known.
        trained: whether it is.
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
    return path, model.get_submodule(path)


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
    parameter = getattr(model.get_submodule(".".join(parts[:first])), "parameter_name", None)
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
