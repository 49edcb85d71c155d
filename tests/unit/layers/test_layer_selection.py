"""One pattern selects the same layers wherever patterns are taken: to measure, to log and to draw."""

import pytest
import torch
from reports import layer, report
from torch import nn

from lightning_spectral.callbacks.log_selection import LogSelection
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.layers.names import check_matches, layer_names, match_pattern, select
from lightning_spectral.report.figures.panels import choose_layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.fc, self.attn = nn.Linear(4, 12), nn.Linear(4, 4), nn.MultiheadAttention(4, 1)
        self.fused = nn.Parameter(torch.ones(9, 4))


MODEL, FUSED = nn.ModuleDict({"b": Block(), "c": nn.Linear(4, 4)}), ["b.qkv", "b.fused"]
QKV = ["b.qkv.weight.q", "b.qkv.weight.k", "b.qkv.weight.v"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("b.qkv", QKV),
        (["b.qkv"], QKV),
        (["b.qkv.weight"], QKV),
        ("b.qkv.weight.k", QKV[1:2]),
        ("*.v", ["b.fused.v", "b.qkv.weight.v", "b.attn.in_proj_weight.v"]),
        ("b.attn", ["b.attn.in_proj_weight.q", "b.attn.in_proj_weight.k", "b.attn.in_proj_weight.v"]),
        ("b", ["b.fused.q", "b.fused.k", "b.fused.v"]),
        (["c", "b.fc*"], ["b.fc.weight", "c.weight"]),
        ("?", ["b.fused.q", "b.fused.k", "b.fused.v", "c.weight"]),
    ],
)
def test_a_pattern_selects_the_same_to_measure_to_log_and_to_draw(patterns, expected):
    names = list(find_layers(MODEL, fused_qkv=FUSED).layers)
    of_all = report(*map(layer, names))
    assert list(find_layers(MODEL, fused_qkv=FUSED, layers=patterns).layers) == expected
    assert LogSelection(patterns, "auto", (), pytest.fail).layers(names) == expected
    assert [x.name for x in choose_layers(of_all, patterns)[0]] == expected


def test_a_pattern_without_a_match_raises_the_same_text_everywhere():
    names = list(find_layers(MODEL, fused_qkv=FUSED).layers)
    of_all = report(*map(layer, names))
    text = r": 'x\*' matches no layer; the layers are b.fused.q, .*, \.\.\. \(12 in all\)$"
    with pytest.raises(ValueError, match=f"^layers{text}"):
        find_layers(MODEL, fused_qkv=FUSED, layers=["c", "x*"])
    with pytest.raises(ValueError, match=f"^layers{text}"):
        choose_layers(of_all, ["c", "x*"])
    with pytest.raises(ValueError, match=f"^log_layers{text}"):
        LogSelection(["x*"], "auto", (), pytest.fail).check(names)
    LogSelection(["c", "x*"], "auto", (), pytest.fail).check(names)


def test_the_first_pattern_counts_and_layers_keep_their_order():
    names = {name: name for name in ("a.weight", "b.weight.q", "c.weight")}
    assert match_pattern(layer_names("b.weight.q"), ["x", "*.q", "b"]) == "*.q"
    assert list(select(names, ["c", "a"], layer_names)) == ["a.weight", "c.weight"]
    check_matches("layers", ["frozen"], names, layer_names, skipped=["frozen.weight"])
    with pytest.raises(ValueError, match=r"'frozen', 'thawed' matches no layer; the layers are a.weight, b.weight.q"):
        check_matches("layers", ["thawed", "frozen"], names, layer_names)
