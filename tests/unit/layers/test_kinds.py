"""Kinds of layers, by module types, places in the tree, shapes and names."""

import pytest
import torch
from cases import Block
from torch import nn
from trees import Conv1D, Tree, kinds_of, linear

from lightning_spectral.layers.kinds import infer_kinds
from lightning_spectral.layers.matrices import find_layers

D = 8
LLAMA = {
    "layers": {"0": {
        "self_attn": {"q_proj": (D, D), "k_proj": (4, D), "v_proj": (4, D), "o_proj": (D, D)},
        "mlp": {"gate_proj": (24, D), "up_proj": (24, D), "down_proj": (D, 24)},
    }},
    "lm_head": (50, D),
}  # fmt: skip
BERT = {
    "layer": {"0": {
        "attention": {"self": {"query": (D, D), "key": (D, D), "value": (D, D)}, "output": {"dense": (D, D)}},
        "intermediate": {"dense": (32, D)},
        "output": {"dense": (D, 32)},
    }},
    "pooler": {"dense": (D, D)},
    "classifier": (3, D),
}  # fmt: skip
GPT2 = {
    "h": {"0": {"attn": {"c_attn": (3 * D, D), "c_proj": (D, D)}, "mlp": {"c_fc": (32, D), "c_proj": (D, 32)}}},
    "lm_head": (50, D),
}
T5 = {
    "block": {"0": {"layer": {
        "0": {"SelfAttention": {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D)}},
        "1": {"DenseReluDense": {"wi": (32, D), "wo": (D, 32)}},
    }}},
    "lm_head": (50, D),
}  # fmt: skip
CRITIC = {"body": (16, 4), "policy": (3, 16), "value": (1, 16)}

ATTENTION = ["attention_qkv", "attention_qkv", "attention_qkv", "attention_out"]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (LLAMA, [*ATTENTION, "mlp_up", "mlp_up", "mlp_down", "head"]),
        (BERT, [*ATTENTION, "mlp_up", "mlp_down", "dense", "head"]),
        (GPT2, ["attention_qkv", "attention_out", "mlp_up", "mlp_down", "head"]),
        (T5, [*ATTENTION, "mlp_up", "mlp_down", "head"]),
        (CRITIC, ["dense", "head", "head"]),
        ({"0": (8, 4), "2": (16, 8), "4": (8, 16), "6": (3, 8)}, ["dense", "dense", "dense", "head"]),
        ({"classifier": {"0": (8, 8), "3": (8, 8), "6": (3, 8)}}, ["dense", "dense", "head"]),
        ({"aux_head": (3, 8), "neck": (8, 8), "head": (3, 8)}, ["head", "dense", "head"]),
    ],
    ids=["llama", "bert", "gpt2", "t5", "critic", "mlp", "vgg", "two_heads"],
)
def test_kinds_of_common_networks(tree, expected):
    assert list(kinds_of(Tree(tree)).values()) == expected


def test_kinds_where_weights_are_stored_transposed():
    model = Tree({"h": {"0": GPT2["h"]["0"]}}, Conv1D)
    assert list(kinds_of(model).values()) == ["attention_qkv", "attention_out", "mlp_up", "mlp_down"]
    assert find_layers(model).layers["h.0.mlp.c_fc.weight"].shape == (32, D)


def test_kinds_of_torch_modules():
    model = nn.Sequential(
        nn.Embedding(10, 8),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32, batch_first=True), 1),
        nn.Linear(8, 10),
    )
    assert kinds_of(model) == {
        "1.layers.0.self_attn.in_proj_weight.q": "attention_qkv",
        "1.layers.0.self_attn.in_proj_weight.k": "attention_qkv",
        "1.layers.0.self_attn.in_proj_weight.v": "attention_qkv",
        "1.layers.0.self_attn.out_proj.weight": "attention_out",
        "1.layers.0.linear1.weight": "mlp_up",
        "1.layers.0.linear2.weight": "mlp_down",
        "2.weight": "head",
    }
    assert kinds_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)))["0.weight"] == "conv"


def test_kinds_of_a_block_that_holds_attention_and_mlp_itself():
    model = nn.Sequential(nn.Embedding(5, 8), Block(8), nn.Linear(8, 5))
    assert list(kinds_of(model).values()) == ["attention_qkv", "attention_out", "mlp_up", "mlp_down", "head"]


LORA = {"q_proj": {"base_layer": (D, D), "lora_A": {"default": (2, D)}, "lora_B": {"default": (D, 2)}}}


@pytest.mark.parametrize(
    ("tree", "frozen", "expected"),
    [
        ({"fc": (5, 8), "ema": {"fc": (5, 8)}}, ["ema"], {"fc.weight": "head"}),
        (
            {"head": (5, 8), "l1": (8, 8), "l2": (8, 8)},
            [],
            {"head.weight": "head", "l1.weight": "dense", "l2.weight": "dense"},
        ),
        (
            {"0": {"attn": LORA | {"k_proj": (D, D), "o_proj": (D, D)}, "up_proj": (32, D), "down_proj": (D, 32)}},
            ["0.attn.q_proj.base_layer"],
            {
                "0.attn.q_proj.lora_A.default.weight": "attention_qkv",
                "0.attn.q_proj.lora_B.default.weight": "attention_qkv",
                "0.attn.k_proj.weight": "attention_qkv",
                "0.attn.o_proj.weight": "attention_out",
                "0.up_proj.weight": "mlp_up",
                "0.down_proj.weight": "mlp_down",
            },
        ),
    ],
    ids=["ema", "named_head_first", "lora"],
)
def test_kinds_of_fine_tuned_networks(tree, frozen, expected):
    model = Tree(tree)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    assert kinds_of(model) == expected


def shapes(text, **sizes):
    """Return {name: (outs, ins)} of "q:d,d up:f,d"."""
    parts = [part.split(":") for part in text.split()]
    return {name: tuple(sizes.get(size, 0) or int(size) for size in shape.split(",")) for name, shape in parts}


def block(attention, mlp, *, attn="self_attn", feed_forward="mlp", f=24):
    sizes = {"d": D, "f": f, "g": 2 * f, "r": 3, "k": 4, "h": 12}
    return {"layers": {"0": {attn: shapes(attention, **sizes), feed_forward: shapes(mlp, **sizes)}}, "lm_head": (50, D)}


QKV = ["attention_qkv"] * 3 + ["attention_out"]
GATED = ["mlp_up", "mlp_up", "mlp_down"]
UP_DOWN = ["mlp_up", "mlp_down"]
GATED_MLP, PLAIN_MLP = "gate_proj:f,d up_proj:f,d down_proj:d,f", "fc1:f,d fc2:d,f"


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (block("W_Q:d,d W_K:d,d W_V:d,d to_out:d,d", PLAIN_MLP), [*QKV, *UP_DOWN]),
        (block("w_q:d,d w_k:d,d w_v:d,d w_o:d,d", PLAIN_MLP), [*QKV, *UP_DOWN]),
        (block("q_layer:d,d k_layer:d,d v_layer:d,d w_h:d,d", PLAIN_MLP), [*QKV, *UP_DOWN]),
        (block("query_projection:d,d key_projection:d,d value_projection:d,d out_projection:d,d", PLAIN_MLP),
         [*QKV, *UP_DOWN]),
        (block("to_q:d,d to_k:d,d to_v:d,d to_out:d,d", PLAIN_MLP, attn="attn1"), [*QKV, *UP_DOWN]),
        (block("a:d,d b:k,d c:k,d e:d,d", PLAIN_MLP, attn="attention"), [*QKV, *UP_DOWN]),
        (block("first:f,d second:d,d", PLAIN_MLP, attn="attn"), ["attention_qkv", "attention_out", *UP_DOWN]),
        (block("first:f,d second:f,d", PLAIN_MLP, attn="attn"), ["dense", "dense", *UP_DOWN]),
        (block("gate:d,d", PLAIN_MLP, attn="attn"), ["dense", *UP_DOWN]),
        (block("q_proj:h,d k_proj:k,d v_proj:k,d o_proj:d,h", GATED_MLP), [*QKV, *GATED]),
        (block("linear_q:d,d linear_k:d,d linear_v:d,d linear_out:d,d linear_pos:d,d",
               "intermediate_dense:f,d output_dense:d,f", feed_forward="ffn1"),
         [*QKV, "attention_qkv", *UP_DOWN]),
        (block("q_a_proj:r,d q_b_proj:h,r kv_a_proj_with_mqa:k,d kv_b_proj:g,r o_proj:d,h", GATED_MLP),
         ["attention_qkv", *QKV, *GATED]),
        (block("query_key_value:f,d dense:d,d", "dense_h_to_4h:f,d dense_4h_to_h:d,f"),
         ["attention_qkv", "attention_out", *UP_DOWN]),
        (block("Wqkv:f,d Wo:d,d", "Wi:g,d Wo:d,f"), ["attention_qkv", "attention_out", *UP_DOWN]),
        (block("in_proj_qkvz:f,d in_proj_ba:k,d out_proj:d,h", GATED_MLP, attn="linear_attn"),
         ["attention_qkv", "attention_qkv", "attention_out", *GATED]),
        (block("key:d,d value:d,d receptance:d,d output:d,d", "key:f,d receptance:d,d value:d,f", attn="attention",
               feed_forward="feed_forward"), [*QKV, "mlp_up", "dense", "mlp_down"]),
        (block("q_proj:d,d k_proj:d,d v_proj:d,d o_proj:d,d", GATED_MLP, f=D), [*QKV, *GATED]),
        (block("q_proj:d,d k_proj:d,d v_proj:d,d o_proj:d,d", GATED_MLP, f=4), [*QKV, *GATED]),
        (block("q_proj:d,d k_proj:d,d v_proj:d,d o_proj:d,d", "0:f,d 3:d,f", f=4), [*QKV, *UP_DOWN]),
        (block("q_proj:d,d k_proj:d,d v_proj:d,d o_proj:d,d cpb:5,2", PLAIN_MLP), [*QKV, "dense", *UP_DOWN]),
    ],
)  # fmt: skip
def test_projections_that_meet_in_attention_and_layers_around_an_activation(tree, expected):
    assert list(kinds_of(Tree(tree)).values()) == [*expected, "head"]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"blocks": {"0": {"mlp_tokens": {"fc1": (16, 6), "fc2": (6, 16)}}}, "head": (5, 8)}, UP_DOWN),
        ({"stages": {"0": {"pwconv1": (32, D), "pwconv2": (D, 32)}}, "head": (5, 8)}, UP_DOWN),
        ({"layer": {"0": {"intermediate": {"dense": (32, D)}, "output": {"dense": (D, 32)}}}, "head": (5, 8)}, UP_DOWN),
        ({"layers": {"0": {"feed_forward": shapes("gate_proj:8,8 up_proj:8,8 down_proj:8,8")}}, "head": (5, 8)}, GATED),
        ({"convs": {"0": {"nn": shapes("0:16,8 2:8,16")}}, "head": (5, 8)}, ["dense", "dense"]),
        ({"q_net": shapes("0:16,8 2:1,16"), "v_net": shapes("0:16,8 2:1,16"), "head": (5, 8)}, ["dense"] * 4),
    ],
    ids=["mixer", "convnext", "fnet", "hybrid", "graph", "critics"],
)
def test_mlps_without_attention(tree, expected):
    assert list(kinds_of(Tree(tree)).values()) == [*expected, "head"]


def test_a_router_and_a_state_space_are_no_part_of_an_mlp():
    tree = block("q_proj:d,d k_proj:d,d v_proj:d,d o_proj:d,d", "gate:4,d", f=16)
    tree["layers"]["0"]["mlp"]["experts"] = {"0": shapes("w1:16,8 w2:8,16 w3:16,8")}
    tree["layers"]["0"]["mamba"] = shapes("in_proj:32,8 out_proj:8,16")
    model = Tree(tree)
    model.layers.get_submodule("0.mamba").A_log = nn.Parameter(torch.zeros(16, 4))
    experts = ["mlp_up", "mlp_down", "mlp_up"]
    assert list(kinds_of(model).values()) == [*QKV, "dense", *experts, "dense", "dense", "head"]
    assert find_layers(model).skipped["layers.0.mamba.A_log"] == "by its name it acts entry by entry, not as a matrix"


def test_stacks_of_experts_have_the_kinds_of_their_layers():
    model = Tree(block("q_proj:d,d k_proj:d,d v_proj:d,d o_proj:d,d", ""))
    model.layers.get_submodule("0.mlp").experts = experts = nn.Module()
    experts.gate_up_proj, experts.down_proj = nn.Parameter(torch.zeros(3, 24, D)), nn.Parameter(torch.zeros(3, D, 12))
    assert list(kinds_of(model).values()) == [*QKV, "mlp_up", "mlp_down", "head"]


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_a", "lora_b"), ("hada_w1_a", "hada_w1_b")])
@pytest.mark.parametrize("wrapped", ["base_layer", "linear"])
def test_an_adapter_has_the_kind_of_the_layer_that_it_adapts(names, wrapped):
    plain = block("q_proj:d,d k_proj:k,d v_proj:k,d o_proj:d,d", GATED_MLP)

    def adapt(tree):
        if isinstance(tree, dict):
            return {name: adapt(part) for name, part in tree.items()}
        outs, ins = tree
        return {wrapped: tree, names[0]: {"default": (2, ins)}, names[1]: {"default": (outs, 2)}}

    expected = kinds_of(Tree(plain))
    for name, kind in kinds_of(Tree(adapt(plain))).items():
        layer = next(prefix for prefix in (n.removesuffix(".weight") for n in expected) if name.startswith(prefix))
        assert kind == expected[f"{layer}.weight"], name


def test_adapters_of_stacks_of_experts_and_of_a_head_without_a_name():
    """One module per parameter that is adapted, the second around the first; all that is adapted is frozen."""
    model = Tree({"body": (8, 6), "experts": {}, "out": {"base_layer": (5, 8), **shapes("lora_A:2,8 lora_B:5,2")}})
    experts = nn.Module()
    experts.up_proj, experts.down_proj = nn.Parameter(torch.zeros(3, 24, 8)), nn.Parameter(torch.zeros(3, 8, 24))
    for parameter in ("up_proj", "down_proj"):
        adapter = Tree(shapes("lora_A:6,8 lora_B:24,6"))
        adapter.parameter_name, adapter.base_layer = parameter, experts
        experts = adapter
    model.experts = nn.ModuleDict({"0": nn.ModuleDict({"experts": experts})})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    kinds = infer_kinds(model)
    down, up = (f"experts.0.experts.{name}lora_A.weight" for name in ("", "base_layer."))
    assert (kinds[up], kinds[down]) == ("mlp_up", "mlp_down")
    assert {kinds[f"out.{name}.weight"] for name in ("base_layer", "lora_A", "lora_B")} == {"head"}


def test_what_embeds_a_time_step_in_a_block_is_no_mlp():
    tree = block("q_proj:d,d k_proj:d,d v_proj:d,d o_proj:d,d", PLAIN_MLP)
    tree["layers"]["0"]["norm"] = {"timestep_embedder": shapes("linear_1:8,16 linear_2:8,8")}
    assert list(kinds_of(Tree(tree)).values()) == [*QKV, *UP_DOWN, "dense", "dense", "head"]


def test_adapters_held_as_parameters():
    model = Tree({"layers": {"0": {"attn": shapes("q_proj:8,8 k_proj:8,8 v_proj:8,8 o_proj:8,8")}}, "head": (5, 8)})
    layer = model.layers.get_submodule("0.attn.o_proj")
    layer.lora_A, layer.lora_B = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(8, 2))
    kinds = kinds_of(model)
    assert kinds["layers.0.attn.o_proj.lora_A"] == kinds["layers.0.attn.o_proj.lora_B"] == "attention_out"


class Convolved(nn.Module):
    """A UNet: a step's embedding is projected in every block, and a convolution comes last."""

    def __init__(self):
        super().__init__()
        self.embed = Tree({"linear_1": (16, 8), "linear_2": (16, 16)})
        self.blocks = nn.ModuleList(Tree({"emb_proj": (8, 16)}) for _ in range(2))
        for part in self.blocks:
            part.conv = nn.Conv2d(8, 8, 3)
        self.out = nn.Conv2d(8, 3, 3)


def heads(model):
    return [name.removesuffix(".weight") for name, kind in infer_kinds(model).items() if kind == "head"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Convolved(), []),
        (Tree({"projection": (8, 6), "layers": {"0": shapes("q_proj:8,8 k_proj:8,8 v_proj:8,8 out_proj:8,8")}}), []),
        (Tree({"text_projection": (4, 8), "visual_projection": (4, 6)}), ["text_projection", "visual_projection"]),
        (Tree({"convs": {"0": {"lin": (8, 6)}, "1": {"lin": (5, 8)}}}), ["convs.1.lin"]),
        (Tree({"convs": {"0": shapes("lin_l:8,6 lin_r:8,6"), "1": shapes("lin_l:5,8 lin_r:5,8")}}),
         ["convs.1.lin_l", "convs.1.lin_r"]),
        (Tree({"body": (8, 6), "box_predictor": {"layers": shapes("0:8,8 1:4,8")}, "class_classifier": (3, 8)}),
         ["box_predictor.layers.1", "class_classifier"]),
        (Tree({"body": (8, 6), "head": {"dense": (8, 8)}, "decoder": (30, 8)}), ["decoder"]),
        (Tree({"lm_head": {"dense": (8, 8), "decoder": (30, 8)}}), ["lm_head.decoder"]),
        (Tree({"body": (8, 6), "pooler": {"dense": (8, 8)}}), []),
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)), ["2"]),
        (nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4))), ["1.2"]),
        (nn.ModuleDict({"body": nn.Linear(6, 8), "heads": nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 2)])}),
         ["heads.0", "heads.1"]),
        (nn.ModuleDict({"fc": nn.Linear(8, 3), "conv": nn.Conv1d(6, 8, 3)}), ["fc"]),
        (Tree({"body": (8, 6), "shift_and_scale": (16, 8), "out": (4, 8)}), ["out"]),
        (Tree({"body": (8, 6), "head1": (8, 8), "head_aux": (3, 8)}), ["head1", "head_aux"]),
    ],
)  # fmt: skip
def test_a_head_is_what_no_other_layer_takes(model, expected):
    assert heads(model) == expected


class InChannels(nn.Module):
    """A linear layer of a type of its own, as graph libraries have."""

    def __init__(self, ins, outs):
        super().__init__()
        self.in_channels, self.out_channels, self.weight = ins, outs, nn.Parameter(torch.zeros(outs, ins))


def test_linear_layers_of_other_types():
    assert kinds_of(nn.Sequential(InChannels(6, 8), InChannels(8, 5))) == {"0.weight": "dense", "1.weight": "head"}
    names = ("lin_query", "lin_key", "lin_value")
    model = nn.ModuleDict({"convs": nn.ModuleList([nn.ModuleDict({n: InChannels(6, 8) for n in names})]),
                           "lin": InChannels(8, 5)})  # fmt: skip
    assert list(kinds_of(model).values()) == ["attention_qkv"] * 3 + ["head"]


def test_names_of_wrappers_do_not_count():
    plain = Tree(block("q_proj:d,d k_proj:d,d v_proj:d,d o_proj:d,d", GATED_MLP))
    expected = list(kinds_of(plain).values())
    plain.layers.get_submodule("0").mlp = nn.ModuleDict({"_orig_mod": plain.layers.get_submodule("0.mlp")})
    saved = nn.ModuleDict(
        {"original_module": plain.lm_head, "modules_to_save": nn.ModuleDict({"default": linear(50, D)})}
    )
    plain.lm_head = saved
    assert list(kinds_of(plain).values()) == [*expected, "head"]
    nn.utils.parametrizations.weight_norm(plain.layers.get_submodule("0.self_attn.o_proj"))
    kinds = infer_kinds(plain)
    assert {kinds[name] for name in kinds if "o_proj" in name} == {"attention_out"}
