"""A parameter group's options: split by what gets which update, filled from the defaults, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

from lightning_spectral._torch_private import not_compiled
from lightning_spectral._validation import flag, number, one_of
from lightning_spectral.distributed.dtensor import is_dtensor
from lightning_spectral.optim import measured_alpha as alphas
from lightning_spectral.optim.adam_size import ADAM, NOISE
from lightning_spectral.optim.model_groups import ALPHA_BY_KIND, DAMPING, DAMPING_BY_KIND, has_adamw_name, is_matrix
from lightning_spectral.optim.placement import check_dtensor, whole_layout
from lightning_spectral.optim.transfer import check_tolerance, check_transfer

WORDS = (("alpha", "probe"), ("damping", NOISE))
"""Options that stay words in a group."""

SPECTRAL = ("alpha", "damping", "momentum", "nesterov", "update_rms", "max_gain", "tolerance")
ADAMW = {"lr": "adamw_lr", "betas": "adamw_betas", "eps": "adamw_eps", "weight_decay": "adamw_weight_decay"}
"""An AdamW group's option -> its name among the optimizer's arguments."""


def split_params(params: Any, names: Sequence[str] | None) -> tuple[list[Tensor], list[str] | None]:
    """Return (parameters, names or None) of parameters or of (name, parameter) pairs."""
    if isinstance(params, set):
        raise TypeError("params is a set, whose order changes between runs; pass a list")
    entries = [params] if isinstance(params, Tensor) else list(params)
    if any(isinstance(entry, tuple) for entry in entries):
        if not all(isinstance(entry, tuple) for entry in entries):
            raise ValueError("params: either all of a group's parameters have names or none")
        names, entries = [name for name, _ in entries], [parameter for _, parameter in entries]
    for i, entry in enumerate(entries):
        _check_parameter(entry, names[i] if names else f"number {i}")
    return entries, list(names) if names else None


def _check_parameter(parameter: Any, name: str) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"params: parameter {name} is a {type(parameter).__name__}, not a tensor")
    if isinstance(parameter, nn.UninitializedParameter):
        raise ValueError(f"parameter {name} is not initialised; run one batch through its lazy module first")
    # What FSDP1 marks its parameters with, flat or as they were, and DeepSpeed those that ZeRO-3 took apart.
    if getattr(parameter, "_fsdp_flattened", False) or hasattr(parameter, "ds_id"):
        raise ValueError(
            f"parameter {name} was flattened by FSDP1 or DeepSpeed, and Spectral Newton needs matrices: train with "
            "FSDP2 (fully_shard, Lightning's ModelParallelStrategy), with DDP or on one device"
        )
    if not parameter.is_floating_point():
        raise ValueError(f"parameter {name} is {parameter.dtype}; Spectral Newton takes real floating point only")


def split_group(group: Mapping[str, Any], adamw_names: Sequence[str]) -> list[dict[str, Any]]:
    """Split a group that does not say which update it gets into its matrices and the rest."""
    params, names = split_params(group["params"], group.get("param_names"))
    base = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if "update" in group:
        indices: dict[str, Sequence[int]] = {group["update"]: range(len(params))}
        if group["update"] == "adamw":
            base |= {argument: base.pop(key) for key, argument in ADAMW.items() if key in base}
    else:
        matrices = [
            i for i, p in enumerate(params) if is_matrix(p) and not (names and has_adamw_name(names[i], adamw_names))
        ]
        non_matrices = sorted(set(range(len(params))) - set(matrices))
        indices = {update: of for update, of in (("spectral", matrices), ("adamw", non_matrices)) if of}
    if len(indices) > 1 and "layouts" in group:
        raise ValueError("a group with layouts needs update='spectral', as SpectralNewton.groups(model) gives it")
    parts = []
    for update, of in indices.items():
        part = {**base, "update": update, "params": [params[i] for i in of]}
        if names:
            part["param_names"] = [names[i] for i in of]
        if "name" in base and len(indices) > 1:
            part["name"] = f"{base['name']}/{update}"
        parts.append(part)
    return parts


def fill_group(group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group with every option of its update, resolved and checked."""
    update, params = group["update"], group["params"]
    for key, default in defaults.items():
        value = group.setdefault(key, default)
        if isinstance(value, Tensor):
            # Schedulers write into the rate of each group.
            group[key] = value.detach().clone().squeeze()
    if update == "adamw":
        _fill_adamw(group)
    elif update == "spectral":
        _fill_spectral(group, params)
    else:
        raise ValueError(f"a group's update must be 'spectral' or 'adamw', got {update!r}")
    return group


def drop_foreign(group: dict[str, Any]) -> None:
    """Delete the options of the other update, and the arguments that were resolved into the group's own."""
    foreign = [*ADAMW.values(), "adamw_names"]
    if group["update"] == "adamw":
        foreign += SPECTRAL
    if group.get("alpha") != "probe":
        foreign += alphas.OPTIONS
    for key in foreign:
        group.pop(key, None)


def _fill_adamw(group: dict[str, Any]) -> None:
    for key, argument in ADAMW.items():
        if group[argument] is not None:
            group[key] = group[argument]
    _check_adamw(group, ADAMW)
    group["betas"] = tuple(group["betas"])


def _fill_spectral(group: dict[str, Any], params: Iterable[Tensor]) -> None:
    kind = group.get("kind")
    if group["alpha"] == "auto":
        if kind not in ALPHA_BY_KIND:
            raise ValueError(
                f"alpha='auto' needs the kind of each layer, one of {', '.join(ALPHA_BY_KIND)}, and this group has "
                f"{'none' if kind is None else repr(kind)}; pass SpectralNewton.groups(model) as params, or a number"
            )
        group["alpha"] = ALPHA_BY_KIND[kind]
    if group["damping"] == "auto":
        by_size = NOISE if group["update_rms"] == ADAM else DAMPING
        group["damping"] = DAMPING_BY_KIND.get(kind or "", by_size)
    _check_spectral(group)
    names = group.get("param_names")
    for i, parameter in enumerate(params):
        if not is_matrix(parameter):
            raise ValueError(f"update='spectral' needs matrices, got a parameter of shape {tuple(parameter.shape)}")
        if is_dtensor(parameter):
            check_dtensor(parameter, names[i] if names else f"number {i}")
    group.setdefault("layouts", [whole_layout() for _ in params])
    if group["alpha"] == "probe":
        group["alpha_range"] = tuple(group["alpha_range"])
        group.setdefault("alphas", alphas.unmeasured(params, group["layouts"]))


@not_compiled
def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError, with the group's name, for an option that was edited out of range or deleted since."""
    try:
        update = one_of("update", group.get("update"), ("spectral", "adamw"))
        probe = ("alphas", *alphas.OPTIONS) if group.get("alpha") == "probe" else ()
        own = ("layouts", *SPECTRAL, *probe) if update == "spectral" else ("betas", "eps")
        for key in ("lr", "weight_decay", *own):
            if key not in group:
                raise ValueError(f"there is no {key!r}, which is set when a group is added")
        if update == "spectral" and len(group["layouts"]) != len(group["params"]):
            raise ValueError("params were edited; add_param_group adds parameters")
        if update == "spectral":
            _check_spectral(group)
        else:
            _check_adamw(group, {})
    except ValueError as error:
        raise ValueError(f"group {group.get('name')!r}: {error}") from None


def _check_adamw(group: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for key in ("lr", "weight_decay", "eps"):
        _check_at_least_zero(names.get(key, key), group[key])
    betas = group["betas"]
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(_is_rate(beta) for beta in betas)):
        raise ValueError(f"{names.get('betas', 'betas')} must be two numbers in [0, 1), got {betas!r}")


def _check_spectral(group: Mapping[str, Any]) -> None:
    _check_at_least_zero("lr", group["lr"])
    _check_at_least_zero("weight_decay", group["weight_decay"])
    flag("nesterov", group["nesterov"])
    probe = group["alpha"] == "probe"
    for name, words in {"alpha": ", 'auto' or 'probe'", "damping": ", 'noise' or 'auto'"}.items():
        value = group[name]
        if not isinstance(value, Real) and (name, value) not in WORDS:
            # A group that is complete has the number that it stands for.
            words = " here" if value == "auto" else words
            raise ValueError(f"{name} must be a number{words}, got {value!r}")
    if probe:
        alphas.check_probe_options(group)
    damping = 1.0 if group["damping"] == NOISE else group["damping"]
    check_transfer(alphas.INITIAL_ALPHA if probe else group["alpha"], damping)
    check_tolerance(group["tolerance"])
    number("momentum", group["momentum"], _is_rate, "lie in [0, 1)")
    rms = group["update_rms"]
    if rms not in (None, ADAM):
        number("update_rms", rms, lambda x: x > 0, "be 'adam', a number above 0, or None for no rescaling")
    number("max_gain", group["max_gain"], lambda x: x >= 1, "be at least 1")


def _check_at_least_zero(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        number(name, value, lambda x: 0 <= x < math.inf, "be at least 0")
    elif value.ndim:  # its value is not read: a device would be waited for
        raise ValueError(f"{name} must be a number or a tensor without dimensions, got {value}")


def _is_rate(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < 1
