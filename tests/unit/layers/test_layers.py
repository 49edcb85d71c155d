"""Which parameters are matrices, under which names and kinds, and their view and back."""

import pytest
import torch
from cases import Attention, TiedLM, grouped
from fits import fit_numbers
from torch import nn
from trees import Conv1D, Tree, kinds_of
from twins import matrix_entries

from lightning_spectral.layers.kinds import infer_kinds
from lightning_spectral.layers.matrices import MatrixLayer, NoMatrixError, find_layers


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
    found = find_layers(nn.Sequential(Tree({"attn": {"qkv": (16, 8)}})), fused_qkv={"*qkv": [8, 4, 4]})
    assert {name: layer.shape for name, layer in found.layers.items()} == {
        "0.attn.qkv.weight.q": (8, 8),
        "0.attn.qkv.weight.k": (4, 8),
        "0.attn.qkv.weight.v": (4, 8),
    }
    assert isinstance(found.layers["0.attn.qkv.weight.v"], MatrixLayer)
    assert found.layers["0.attn.qkv.weight.v"].rows == (12, 16)


def test_grouped_noise_floor_is_that_of_a_group():
    sigma = torch.tensor([1.0, 0.5, 0.25])
    floors = [fit_numbers(sigma, sigma, name="w", shape=(64, 9), groups=g).noise_floor for g in (1, 16)]
    assert floors[0] == pytest.approx(64 / 9 * floors[1])
