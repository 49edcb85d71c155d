"""Kinds of the layers of PyTorch Geometric, whose linear layers are a type of its own."""

import pytest
from torch import nn

from lightning_spectral.layers.kinds import infer_kinds

graphs = pytest.importorskip("torch_geometric.nn", reason="the layers are those of torch_geometric")

DENSE, QKV, OUT, UP, DOWN, HEAD = "dense", "attention_qkv", "attention_out", "mlp_up", "mlp_down", "head"


def mlp(ins, outs):
    return nn.Sequential(nn.Linear(ins, 64), nn.ReLU(), nn.Linear(64, outs))


def network(*convolutions, lin=None):
    return nn.ModuleDict({"convs": nn.ModuleList(convolutions), **({} if lin is None else {"lin": lin})})


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: network(graphs.GCNConv(16, 64), graphs.GCNConv(64, 5)), [DENSE, HEAD]),
        (lambda: network(graphs.GATConv(16, 8, 4), graphs.GATConv(32, 5, 1)), [DENSE, HEAD]),
        (lambda: network(graphs.GATv2Conv(16, 8, 4), graphs.GATv2Conv(32, 5, 1)), [DENSE, DENSE, HEAD, HEAD]),
        (lambda: network(graphs.SAGEConv(16, 32), graphs.SAGEConv(32, 5)), [DENSE, DENSE, HEAD, HEAD]),
        (lambda: network(graphs.GINConv(mlp(16, 32)), graphs.GINConv(mlp(32, 32)), lin=nn.Linear(32, 4)),
         [DENSE, DENSE, DENSE, DENSE, HEAD]),
        (lambda: network(graphs.TransformerConv(16, 8, 4), lin=graphs.Linear(32, 4)), [QKV, QKV, QKV, DENSE, HEAD]),
        (lambda: network(graphs.ChebConv(16, 32, 2), graphs.ChebConv(32, 5, 2)), [DENSE, DENSE, HEAD, HEAD]),
        (lambda: network(graphs.GPSConv(32, None, heads=4), lin=nn.Linear(32, 4)), [QKV, OUT, UP, DOWN, HEAD]),
        (lambda: graphs.MLP([16, 32, 32, 4]), [DENSE, DENSE, HEAD]),
    ],
    ids=["gcn", "gat", "gatv2", "sage", "gin", "transformer", "chebyshev", "gps", "mlp"],
)  # fmt: skip
def test_kinds_of_graph_convolutions(make, expected):
    kinds = {name: kind for name, kind in infer_kinds(make()).items() if not name.rpartition(".")[2].startswith("att")}
    assert list(kinds.values()) == expected
