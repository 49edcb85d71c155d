"""What gets which update: groups of a network, flat parameters, names, options, layouts."""

import math
import warnings

import numpy as np
import pytest
import torch
from cases import Attention, TiedLM, grouped, mlp, signals
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_spectral import SpectralNewton, SpectralWarning
from lightning_spectral.layers.matrices import matrix_parameters
from lightning_spectral.layers.names import unwrapped
from lightning_spectral.optim.model_groups import ADAMW_KINDS, ALPHA_BY_KIND
from lightning_spectral.optim.placement import Layout, blocks


def by_name(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


def names_of(groups):
    return {group["name"]: group["param_names"] for group in groups}


class GPT2Projection(nn.Module):
    """A fused projection that stores (in, out), as Hugging Face's GPT-2 does."""

    def __init__(self):
        super().__init__()
        self.c_attn = type("Conv1D", (nn.Module,), {"nf": 12})()
        self.c_attn.weight = nn.Parameter(torch.randn(4, 12))
        self.c_proj = type("Conv1D", (nn.Module,), {"nf": 4})()
        self.c_proj.weight = nn.Parameter(torch.randn(4, 4))


def test_a_transformer_falls_into_groups_by_kind():
    groups = SpectralNewton.groups(TiedLM())
    assert {name: names for name, names in names_of(groups).items() if name != "adamw"} == {
        "attention_qkv": ["block.qkv.weight"],
        "attention_out": ["block.proj.weight"],
        "mlp_up": ["block.up.weight"],
        "mlp_down": ["block.down.weight"],
    }
    rest = names_of(groups)["adamw"]
    assert rest[0] == "tokens.weight"  # tied to the head
    assert all("bias" in name or ".n1." in name or ".n2." in name for name in rest[1:])
    assert groups[0]["layouts"] == [{"input_first": 0, "rows": [8, 8, 8]}]


WRAPPERS = {
    "data_parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged_parallel": lambda model: AveragedModel(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_network_has_the_names_of_the_network(name):
    model = TiedLM()
    wrapped = WRAPPERS[name](model)
    groups = SpectralNewton.groups(wrapped)
    assert names_of(groups) == names_of(SpectralNewton.groups(model))
    parameters = dict(unwrapped(wrapped).named_parameters())
    for group in groups:
        assert all(parameters[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
    assert "block.up.weight" in names_of(SpectralNewton.groups(wrapped, kinds={"block.up": "head"}))["adamw"]


def test_a_wrapped_part_has_the_names_of_the_part():
    model = nn.ModuleDict({"module": nn.DataParallel(mlp()), "last": nn.Linear(3, 3)})
    named = [name for names in names_of(SpectralNewton.groups(model)).values() for name in names]
    assert sorted(named) == sorted(["last.weight", "last.bias", *(f"module.{name}" for name in mlp().state_dict())])


def test_every_trained_parameter_is_in_one_group():
    for model in (TiedLM(), grouped(), Attention(), nn.BatchNorm1d(3), nn.Embedding(4, 3)):
        groups = SpectralNewton.groups(model)
        parameters = [p for group in groups for p in group["params"]]
        assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))
        SpectralNewton(groups)


def test_frozen_parameters_are_left_out():
    model = mlp()
    model[0].requires_grad_(False)
    assert names_of(SpectralNewton.groups(model)) == {
        "dense": ["2.weight"],
        "adamw": ["2.bias", "4.weight", "4.bias"],
    }


def test_grouped_and_depthwise_convolutions():
    groups = SpectralNewton.groups(grouped())
    assert names_of(groups)["conv"] == ["0.weight", "4.weight"]
    assert groups[0]["layouts"] == [{"input_first": 0, "rows": [4, 4]}, {"input_first": 2, "rows": [3, 3]}]
    assert "2.weight" in names_of(groups)["adamw"]


def test_fused_projections():
    layouts = {"attn.in_proj_weight": Layout(input_first=0, rows=[8, 8, 8])}
    (qkv, *_) = SpectralNewton.groups(Attention())
    assert dict(zip(qkv["param_names"], qkv["layouts"], strict=True)) == layouts
    (qkv, *_) = SpectralNewton.groups(TiedLM(), fused_qkv={"*.qkv": [4, 8, 12]})
    assert qkv["layouts"] == [{"input_first": 0, "rows": [4, 8, 12]}]
    (qkv, *_) = SpectralNewton.groups(TiedLM(), fused_qkv=[])
    assert qkv["layouts"] == [{"input_first": 0, "rows": []}]
    model = GPT2Projection()
    (qkv, *_) = SpectralNewton.groups(model)
    assert qkv["layouts"] == [{"input_first": 1, "rows": [4, 4, 4]}]
    q, k, v = blocks(model.c_attn.weight, qkv["layouts"][0])
    assert torch.equal(torch.cat([q, k, v]), model.c_attn.weight.T)
    with pytest.raises(ValueError, match="fused_qkv: 'nothing' matches no layer"):
        SpectralNewton.groups(TiedLM(), fused_qkv=["nothing"])


def test_kinds_can_be_given():
    groups = SpectralNewton.groups(mlp(), kinds={"0": "conv", "2": "head", "4": "dense"})
    assert names_of(groups) == {
        "conv": ["0.weight"],
        "dense": ["4.weight"],
        "adamw": ["0.bias", "2.weight", "2.bias", "4.bias"],
    }


@pytest.mark.parametrize("make", [grouped, signals, TiedLM, Attention])
def test_blocks_are_views_of_the_measured_matrices(make):
    model = make().double()
    measured, _ = matrix_parameters(model)
    for group in SpectralNewton.groups(model)[:-1]:
        for name, parameter, layout in zip(group["param_names"], group["params"], group["layouts"], strict=True):
            parts = blocks(parameter.detach(), layout)
            matrix = torch.cat([part.flatten(1) for part in parts])
            assert torch.equal(matrix, measured[name].to_matrix(parameter))
            parts[-1].zero_()
            assert (parameter == 0).sum() == parts[-1].numel()


def test_each_group_of_a_convolution_is_a_matrix_of_its_own():
    whole = nn.Conv2d(4, 8, 3, groups=2)
    parts = [nn.Parameter(part.detach().clone()) for part in whole.weight.chunk(2)]
    optimizers = [SpectralNewton(SpectralNewton.groups(nn.Sequential(whole))), SpectralNewton(parts)]
    whole.weight.grad = torch.randn_like(whole.weight)
    for part, grad in zip(parts, whole.weight.grad.chunk(2), strict=True):
        part.grad = grad
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(whole.weight, torch.cat(parts))


def test_flat_parameters_split_by_shape():
    model = TiedLM()
    groups = by_name(SpectralNewton(model.parameters(), lr=0.1, adamw_lr=0.01))
    assert list(groups) == ["spectral", "adamw"]
    assert all(p.ndim == 2 for p in groups["spectral"]["params"])
    assert any(p is model.tokens.weight for p in groups["spectral"]["params"])
    assert all(p.ndim == 1 for p in groups["adamw"]["params"])
    assert (groups["spectral"]["lr"], groups["adamw"]["lr"]) == (0.1, 0.01)
    rows = [nn.Parameter(torch.ones(1, 5)), nn.Parameter(torch.ones(5, 1, 1)), nn.Parameter(torch.ones(()))]
    assert list(by_name(SpectralNewton(rows))) == ["adamw"]


def test_names_keep_embeddings_and_heads_out():
    model = TiedLM()
    groups = by_name(SpectralNewton(model.named_parameters()))
    assert groups["spectral"]["param_names"] == [f"block.{n}.weight" for n in ("qkv", "proj", "up", "down")]
    assert groups["adamw"]["param_names"][0] == "tokens.weight"
    groups = by_name(SpectralNewton(model.named_parameters(), adamw_names=["block.up.*", "down"]))
    assert groups["spectral"]["param_names"] == ["tokens.weight", "block.qkv.weight", "block.proj.weight"]
    with pytest.raises(ValueError, match=r"adamw_names needs names: pass model.named_parameters\(\)"):
        SpectralNewton(model.parameters(), adamw_names=["head"])
    vision = ["patch_embed.proj.weight", "classifier.0.weight", "multihead_attn.weight"]
    text = ["model.embed_tokens.weight", "lm_head.weight", "pos_embed", "transformer.wte.weight", "classifier.weight"]
    named = [(name, nn.Parameter(torch.ones(3, 4))) for name in (*vision, *text)]
    groups = by_name(SpectralNewton(named))
    assert groups["spectral"]["param_names"] == vision
    assert groups["adamw"]["param_names"] == text


def test_exponents_and_dampings_by_kind():
    groups = by_name(SpectralNewton(SpectralNewton.groups(TiedLM()), alpha="auto"))
    assert {(g["alpha"], g["damping"]) for g in groups.values() if g["update"] == "spectral"} == {(1.0, 0.03)}
    groups = by_name(SpectralNewton(SpectralNewton.groups(grouped()), alpha="auto"))
    assert (groups["conv"]["alpha"], groups["conv"]["damping"]) == (2.0, "noise")
    for options, damping in (({}, "noise"), ({"update_rms": 0.2}, 0.1), ({"damping": 0.3}, 0.3)):
        groups = by_name(SpectralNewton(mlp().parameters(), **options))
        assert (groups["spectral"]["alpha"], groups["spectral"]["damping"]) == (2.0, damping)
    assert not set(ALPHA_BY_KIND) & set(ADAMW_KINDS)
    with pytest.raises(ValueError, match=r"alpha='auto' needs the kind of each layer.*has none.*SpectralNewton.groups"):
        SpectralNewton(mlp().parameters(), alpha="auto")
    with pytest.raises(ValueError, match="this group has 'head'"):
        SpectralNewton([{"params": mlp()[0].weight, "kind": "head", "update": "spectral"}], alpha="auto")


def test_groups_hold_their_own_options_and_no_others():
    first, second = mlp(), mlp()
    optimizer = SpectralNewton(
        [
            {"params": first.parameters(), "lr": 0.5, "adamw_lr": 0.25, "name": "first"},
            {"params": [second[0].weight], "update": "adamw", "lr": 0.125, "betas": (0.5, 0.5)},
            {"params": [second[2].weight], "alpha": 1.0},
        ],
        lr=1.0,
        adamw_betas=(0.7, 0.8),
    )
    groups = by_name(optimizer)
    assert list(groups) == ["first/spectral", "first/adamw", "adamw", "spectral"]
    assert [group["lr"] for group in groups.values()] == [0.5, 0.25, 0.125, 1.0]
    assert [groups[name]["betas"] for name in ("first/adamw", "adamw")] == [(0.7, 0.8), (0.5, 0.5)]
    assert groups["spectral"]["alpha"] == 1.0
    shared = {"params", "name", "update", "lr", "weight_decay"}
    own = {"alpha", "damping", "momentum", "nesterov", "update_rms", "max_gain", "tolerance", "layouts"}
    assert set(groups["spectral"]) == shared | own
    assert set(groups["adamw"]) == shared | {"betas", "eps"}


@pytest.mark.parametrize("cycles", [True, False])
def test_a_cycle_of_momentum_is_that_of_the_matrices_and_can_be_left_out(cycles):
    net = mlp()
    optimizer = SpectralNewton(SpectralNewton.groups(net), lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10, cycle_momentum=cycles)
    by_update = {group["update"]: group for group in optimizer.param_groups}
    assert by_update["spectral"]["momentum"] == (0.95 if cycles else 0.9)
    assert by_update["adamw"]["betas"] == (0.9, 0.999)


def test_parameters_can_be_added():
    model, more = mlp(), mlp()
    optimizer = SpectralNewton(model.parameters())
    optimizer.add_param_group({"params": more.parameters(), "lr": 0.5})
    assert list(by_name(optimizer)) == ["spectral", "adamw", "spectral_2", "adamw_2"]
    for parameter in (*model.parameters(), *more.parameters()):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert len(optimizer.state) == 12
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": more[0].weight})
    with pytest.raises(ValueError, match="adamw_lr must be at least 0, got -1"):
        optimizer.add_param_group({"params": mlp().parameters(), "adamw_lr": -1})
    assert len(optimizer.param_groups) == 4


def flattened(mark):
    parameter = nn.Parameter(torch.ones(9))
    setattr(parameter, mark, True)
    return parameter


MATRIX = nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        ([MATRIX], {"lr": -1.0}, ValueError, "lr must be at least 0, got -1.0"),
        ([MATRIX], {"lr": "1e-3"}, ValueError, "lr must be at least 0, got '1e-3'"),
        ([MATRIX], {"lr": None}, ValueError, "lr must be at least 0, got None"),
        ([MATRIX], {"lr": math.nan}, ValueError, "lr must be at least 0, got nan"),
        ([MATRIX], {"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor without dimensions, got"),
        ([MATRIX], {"nesterov": "yes"}, ValueError, "nesterov must be True or False, got 'yes'"),
        ([MATRIX], {"alpha": "probe", "alpha_range": "ab"}, ValueError, "alpha_range must be two exponents"),
        ([MATRIX], {"alpha": "probe", "alpha_momentum": 1}, ValueError, r"alpha_momentum must lie in \[0, 1\), got 1"),
        ([MATRIX], {"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0"),
        ([MATRIX], {"alpha": -1.0}, ValueError, "alpha must be a finite number of at least 0, got -1.0"),
        ([MATRIX], {"alpha": "newton"}, ValueError, "alpha must be a number, 'auto' or 'probe', got 'newton'"),
        ([MATRIX], {"damping": 0.0}, ValueError, "damping must be a finite number above 0"),
        ([MATRIX], {"damping": "none"}, ValueError, "damping must be a number, 'noise' or 'auto', got 'none'"),
        ([MATRIX], {"momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\), got 1.0"),
        ([MATRIX], {"update_rms": 0.0}, ValueError, "update_rms must be 'adam', a number above 0, or None"),
        ([MATRIX], {"max_gain": 0.5}, ValueError, "max_gain must be at least 1, got 0.5"),
        ([MATRIX], {"tolerance": 0.0}, ValueError, "tolerance must lie in"),
        ([nn.Parameter(torch.ones(3))], {"adamw_lr": -1.0}, ValueError, "adamw_lr must be at least 0"),
        ([nn.Parameter(torch.ones(3))], {"adamw_weight_decay": -1.0}, ValueError, "adamw_weight_decay must be"),
        ([nn.Parameter(torch.ones(3))], {"adamw_eps": -1.0}, ValueError, "adamw_eps must be at least 0"),
        ([nn.Parameter(torch.ones(3))], {"adamw_betas": (0.9, 1.0)}, ValueError, "adamw_betas must be two numbers"),
        (
            [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))],
            {},
            ValueError,
            "parameter number 0 is torch.complex64",
        ),
        ([nn.UninitializedParameter()], {}, ValueError, "is not initialised; run one batch"),
        ([flattened("_fsdp_flattened")], {}, ValueError, "was flattened by FSDP1 or DeepSpeed, and Spectral Newton"),
        ([flattened("ds_id")], {}, ValueError, "was flattened by FSDP1 or DeepSpeed, and Spectral Newton"),
        ([("a", MATRIX), nn.Parameter(torch.ones(3, 3))], {}, ValueError, "all of a group's parameters have names"),
        ([{"params": {MATRIX}}], {}, TypeError, "params is a set"),
        (nn.Linear(2, 2), {}, TypeError, r"params is a module; pass SpectralNewton.groups\(model\)"),
        ([{"params": [3]}], {}, TypeError, "parameter number 0 is a int, not a tensor"),
        ([{"params": [MATRIX], "update": "muon"}], {}, ValueError, "update must be 'spectral' or 'adamw', got 'muon'"),
        (
            [{"params": [nn.Parameter(torch.ones(3))], "update": "spectral"}],
            {},
            ValueError,
            r"update='spectral' needs matrices, got a parameter of shape \(3,\)",
        ),
        (
            [{"params": [MATRIX, nn.Parameter(torch.ones(3))], "layouts": []}],
            {},
            ValueError,
            "a group with layouts needs update='spectral'",
        ),
    ],
)
def test_bad_options(params, options, error, message):
    with pytest.raises(error, match=message):
        SpectralNewton(params, **options)


@pytest.mark.parametrize(
    ("group", "option", "value", "message"),
    [
        (0, "lr", "x", "lr must be at least 0, got 'x'"),
        (0, "lr", math.nan, "lr must be at least 0, got nan"),
        (0, "weight_decay", -0.1, "weight_decay must be at least 0, got -0.1"),
        (0, "alpha", -1, "alpha must be a finite number of at least 0, got -1"),
        (0, "alpha", "auto", "alpha must be a number here, got 'auto'"),
        (0, "alpha", "probe", "there is no 'alphas', which is set when a group is added"),
        (0, "damping", 0, "damping must be a finite number above 0, got 0"),
        (0, "momentum", 2, r"momentum must lie in \[0, 1\), got 2"),
        (0, "nesterov", None, "nesterov must be True or False, got None"),
        (0, "update_rms", "adamw", "update_rms must be 'adam', a number above 0, or None"),
        (0, "max_gain", 0.5, "max_gain must be at least 1, got 0.5"),
        (0, "tolerance", None, r"tolerance must lie in \[1e-7, 0.1\], got None"),
        (0, "update", "adamw", "there is no 'betas', which is set when a group is added"),
        (0, "update", "sgd", "update must be one of 'spectral', 'adamw', got 'sgd'"),
        (0, "params", [], "params were edited; add_param_group adds parameters"),
        (1, "lr", torch.ones(1), r"lr must be a number or a tensor without dimensions, got tensor\(\[1"),
        (1, "lr", -1.0, "lr must be at least 0, got -1.0"),
        (1, "betas", (0.9,), r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
        (1, "eps", "x", "eps must be at least 0, got 'x'"),
    ],
)
def test_an_option_that_was_edited_out_of_range_is_told_at_the_next_step_which_changes_nothing(
    group, option, value, message
):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = SpectralNewton(SpectralNewton.groups(model))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    edited = optimizer.param_groups[group]
    edited[option] = value
    with pytest.raises(ValueError, match=f"group '{edited['name']}': {message}"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_option_that_was_edited_within_its_range_counts():
    weights = [nn.Parameter(torch.eye(4)) for _ in range(2)]
    for weight, lr in zip(weights, (0.1, np.float32(0.1)), strict=True):
        optimizer = SpectralNewton([weight], lr=1.0)
        optimizer.param_groups[0] |= {"lr": lr, "alpha": np.float64(1.5), "damping": 1}
        weight.grad = torch.ones(4, 4)
        optimizer.step()
    torch.testing.assert_close(*weights)


def test_a_group_is_a_dict():
    with pytest.raises(TypeError, match="a param group must be a dict, got list"):
        SpectralNewton([MATRIX]).add_param_group([MATRIX])


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (nn.Sequential(nn.Embedding(500, 16), nn.Linear(16, 16)), r"\(500, 16\)"),
        (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 500)), r"\(500, 16\)"),
        (nn.Sequential(nn.Conv2d(3, 64, 3), nn.Linear(64, 10)), r"\(10, 64\)"),
        (nn.Sequential(nn.Embedding(500, 16), nn.Linear(16, 16), nn.Linear(16, 500)), r"\(500, 16\), \(500, 16\)"),
    ],
)
def test_parameters_without_names_that_look_like_look_ups_are_warned_about(model, shapes):
    warning = rf"shape {shapes} look like embeddings or heads.*SpectralNewton.groups"
    with pytest.warns(SpectralWarning, match=warning) as told:
        SpectralNewton(model.parameters())
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpectralNewton(SpectralNewton.groups(model))
        SpectralNewton(model.named_parameters())
        SpectralNewton(nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 6), nn.Conv2d(3, 500, 3)).parameters())
