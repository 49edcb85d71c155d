"""Which parameters are matrices, under which names and kinds, and their view and back."""

import pytest
import torch
from cases import Attention, Block, TiedLM, grouped
from fits import fit_numbers
from torch import nn
from twins import matrix_entries

from lightning_spectral.layers.kinds import infer_kinds
from lightning_spectral.layers.matrices import MatrixLayer, NoMatrixError, find_layers


def kinds_of(model, **options):
    """Kinds of all but embeddings, of whatever rank."""
    layers = find_layers(model, layers=lambda layer: layer.kind != "embedding", **options).layers
    return {name: layer.kind for name, layer in layers.items()}


class Conv1D(nn.Module):
    """As Hugging Face's GPT-2 stores its projections."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


class Tree(nn.Module):
    """A network of named linear layers: {"attn": {"q_proj": (out, in)}, ...}."""

    def __init__(self, tree, linear=nn.Linear):
        super().__init__()
        for name, part in tree.items():
            child = Tree(part, linear) if isinstance(part, dict) else linear(*part)
            self.add_module(name, child)


def linear(out, ins):
    return nn.Linear(ins, out)


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
        (CRITIC, ["dense", "dense", "head"]),
        ({"0": (8, 4), "2": (16, 8), "4": (8, 16), "6": (3, 8)}, ["dense", "dense", "dense", "head"]),
        ({"classifier": {"0": (8, 8), "3": (8, 8), "6": (3, 8)}}, ["dense", "dense", "head"]),
        ({"aux_head": (3, 8), "neck": (8, 8), "head": (3, 8)}, ["head", "dense", "head"]),
    ],
    ids=["llama", "bert", "gpt2", "t5", "critic", "mlp", "vgg", "two_heads"],
)
def test_kinds_of_common_networks(tree, expected):
    assert list(kinds_of(Tree(tree, linear)).values()) == expected


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


def test_kinds_can_be_overridden_by_pattern():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert list(kinds_of(model, kinds={"0": "mlp_up", "*.weight": "dense"}).values()) == ["mlp_up", "dense", "dense"]


def test_raw_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.randn(7, 8))
            self.mixing = nn.Parameter(torch.randn(6, 8))
            self.scale = nn.Parameter(torch.randn(8, 1))
            self.experts = nn.Parameter(torch.randn(4, 6, 8))
            self.grid = nn.Parameter(torch.randn(2, 4, 6, 8))
            self.gate_bias = nn.Parameter(torch.randn(4, 8))
            self.phase = nn.Parameter(torch.randn(6, 8, dtype=torch.complex64))

    assert infer_kinds(Model())["pos_embed"] == "embedding"
    found = find_layers(Model())
    assert list(found.layers) == ["mixing", "experts"]
    assert (found.layers["experts"].shape, found.layers["experts"].groups) == ((24, 8), 4)
    assert found.skipped.keys() == {"pos_embed", "scale", "grid", "gate_bias", "phase"}
    assert "4-dimensional" in found.skipped["grid"]
    assert "a bias" in found.skipped["gate_bias"]
    assert "complex64" in found.skipped["phase"]


def test_a_matrix_of_low_rank_is_left_out_unless_it_is_named():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    found = find_layers(model)
    assert list(found.layers) == ["0.weight"]
    assert found.skipped == {"2.weight": "its rank is below 3: no exponent can be fitted to so few values"}
    assert list(find_layers(model, layers="2").layers) == ["2.weight"]


def test_what_is_left_out_is_named_with_its_reason():
    model = TiedLM()
    model.block.qkv.weight.requires_grad_(False)
    model.add_module("lazy", nn.LazyLinear(3))
    found = find_layers(model)
    assert found.skipped["block.qkv.weight"] == "frozen"
    assert found.skipped["lazy.weight"] == "its lazy module has not seen a batch yet"
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    assert find_layers(model).skipped == {"0.weight": "an embedding, left out by default"}


def test_tied_weights_count_once_under_the_name_of_their_layer():
    found = find_layers(TiedLM())
    assert "tokens.weight" not in found.layers
    head = found.layers["head.weight"]
    assert (head.kind, head.aliases) == ("head", ("tokens.weight",))
    assert find_layers(TiedLM(), layers="tokens").layers.keys() == {"head.weight"}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("0", ["0.weight"]),
        ("0.weight", ["0.weight"]),
        (["0", "3*"], ["0.weight", "3.weight"]),
        ("*", ["0.weight", "1.weight", "2.weight", "3.weight"]),
        (lambda layer: layer.kind == "embedding", ["0.weight"]),
        (None, ["1.weight", "2.weight", "3.weight"]),
    ],
)
def test_selection(selection, expected):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    found = find_layers(model, layers=selection)
    assert list(found.layers) == expected
    assert found.layers.keys() | found.skipped.keys() == {f"{i}.weight" for i in range(4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["0", "conv*"]}, r"layers: 'conv\*' matches no layer; the layers are 0.weight, 1.weight"),
        ({"kinds": {"9": "conv"}}, "kinds: '9' matches no layer"),
        ({"kinds": {"0": "convolution"}}, "'convolution' .* is no kind of layer; take one of conv, attention_qkv"),
        ({"fused_qkv": ["9"]}, "fused_qkv: '9' matches no layer"),
        ({"fused_qkv": ["0"]}, r"the 8 rows of 0.weight cannot be split .* \[2, 2, 2\]"),
        ({"fused_qkv": {"0": [4, 2, 1]}}, r"the 8 rows of 0.weight cannot be split .* \[4, 2, 1\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        find_layers(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), **options)


def test_a_pattern_for_a_frozen_layer_is_no_mistake():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    assert find_layers(model, layers="0").layers == {}


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.ReLU(), "no parameters"),
        (nn.LayerNorm(4), "2 parameters, none with two or more dimensions"),
        (nn.Linear(4, 4).requires_grad_(False), "weight: frozen"),
    ],
)
def test_no_matrix_at_all(model, found):
    with pytest.raises(NoMatrixError, match=f"no matrix to measure.*{found}"):
        find_layers(model)


@pytest.mark.parametrize(
    "model",
    [grouped(), Attention(), nn.ConvTranspose3d(4, 6, (1, 2, 3), groups=2), nn.Conv1d(6, 4, 3), Conv1D(12, 4)],
    ids=["grouped", "attention", "transposed", "conv1d", "hugging_face"],
)
def test_matrix_view_and_back(model):
    for layer in find_layers(model).layers.values():
        parameter = model.get_parameter(layer.parameter)
        numbered = torch.arange(parameter.numel()).reshape(parameter.shape)
        matrix = layer.to_matrix(numbered)
        assert matrix.shape == layer.shape
        expected = numbered.T if type(model).__name__ == "Conv1D" else matrix_entries(layer, parameter.shape)
        assert torch.equal(matrix, expected)
        back = layer.to_tensor(matrix, numbered)
        covered = torch.isin(numbered, matrix)
        assert torch.equal(back, torch.where(covered, numbered, 0))


def test_fused_projection_with_fewer_keys_than_queries():
    found = find_layers(nn.Sequential(Tree({"attn": {"qkv": (16, 8)}}, linear)), fused_qkv={"*qkv": [8, 4, 4]})
    assert {name: layer.shape for name, layer in found.layers.items()} == {
        "0.attn.qkv.weight.q": (8, 8),
        "0.attn.qkv.weight.k": (4, 8),
        "0.attn.qkv.weight.v": (4, 8),
    }
    assert isinstance(found.layers["0.attn.qkv.weight.v"], MatrixLayer)
    assert found.layers["0.attn.qkv.weight.v"].rows == (12, 16)


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
    model = Tree(tree, linear)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    assert kinds_of(model) == expected


def test_grouped_noise_floor_is_that_of_a_group():
    sigma = torch.tensor([1.0, 0.5, 0.25])
    floors = [fit_numbers(sigma, sigma, name="w", shape=(64, 9), groups=g).noise_floor for g in (1, 16)]
    assert floors[0] == pytest.approx(64 / 9 * floors[1])
