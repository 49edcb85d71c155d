"""Programs for cells, molecules, graphs and pictures without labels, trained on synthetic data."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.benchmarks.other_networks import cnn
from examples.benchmarks.other_pairs import two_views
from examples.benchmarks.program_training import Trained, answering, plain, through

CELLS, GENES = 1024, 100


def _counts() -> Any:
    """Draw counts of genes in cells of three kinds."""
    from anndata import AnnData

    random = np.random.default_rng(0)
    kind = random.integers(0, 3, CELLS)
    rates = random.gamma(1.0, 2.0, (3, GENES))[kind] * random.gamma(5.0, 0.2, (CELLS, 1))
    data = AnnData(random.poisson(rates).astype(np.float32))
    data.obs["kind"] = [f"kind {i}" for i in kind]
    return data


def _scvi(model: Callable[..., Any], data: Any, **own: Any) -> Trained:
    def train(options: dict[str, Any]) -> None:
        model(data, **own).train(batch_size=128, train_size=1.0, **options)

    return answering(through(train, max_steps=None, max_epochs=7), use_sync_dist=False)


def scvi() -> Trained:
    """Train SCVI: a variational autoencoder of counts."""
    from scvi.model import SCVI

    data = _counts()
    SCVI.setup_anndata(data)
    return _scvi(SCVI, data)


def linear_scvi() -> Trained:
    """Train SCVI with a linear decoder."""
    from scvi.model import LinearSCVI

    data = _counts()
    LinearSCVI.setup_anndata(data)
    return _scvi(LinearSCVI, data)


def scanvi() -> Trained:
    """Train SCANVI, with the kinds of cells known."""
    from scvi.model import SCANVI

    data = _counts()
    SCANVI.setup_anndata(data, labels_key="kind", unlabeled_category="unknown")
    return _scvi(SCANVI, data)


def _molecules() -> list[str]:
    """Return chains of random atoms with a ring or a branch here and there."""
    random = np.random.default_rng(0)
    return ["".join(random.choice(["C", "O", "N", "CC", "C(C)", "C(=O)"], random.integers(3, 9))) for _ in range(512)]


def _chemprop(classify: bool) -> Trained:
    import lightning.pytorch
    from chemprop import data, models
    from chemprop import nn as parts

    smiles = _molecules()
    amounts = [[text.count("O") - text.count("N") + 0.3 * text.count("(")] for text in smiles]
    targets = [[float(amount > 0)] if classify else [amount] for (amount,) in amounts]
    points = [
        data.MoleculeDatapoint.from_smi(text, np.array(target)) for text, target in zip(smiles, targets, strict=True)
    ]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=64, num_workers=0)
    predictor = (parts.BinaryClassificationFFN if classify else parts.RegressionFFN)(input_dim=64, hidden_dim=64)
    model = models.MPNN(parts.BondMessagePassing(d_h=64), parts.MeanAggregation(), predictor)
    return through(lambda options: lightning.pytorch.Trainer(**options).fit(model, loader), max_epochs=-1)


def chemprop_regression() -> Trained:
    """Train a message-passing network on a number per molecule."""
    return _chemprop(classify=False)


def chemprop_classification() -> Trained:
    """Train a message-passing network on a label per molecule."""
    return _chemprop(classify=True)


class _Stub(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


class _StubFinder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Let lightly be imported: its losses and heads need nothing of torchvision."""
    finder = _StubFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def lightly_simclr() -> Trained:
    """Train SimCLR with the loss and head of lightly."""
    with _without_torchvision():
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

    contrast = NTXentLoss()

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return contrast(model(batch[0]), model(batch[1]))  # type: ignore[no-any-return]

    return plain(nn.Sequential(cnn(1, 64), SimCLRProjectionHead(64, 64, 32)), loss, _pairs())


def lightly_barlow_twins() -> Trained:
    """Train Barlow Twins with the loss and head of lightly."""
    with _without_torchvision():
        from lightly.loss import BarlowTwinsLoss
        from lightly.models.modules.heads import BarlowTwinsProjectionHead

    twins = BarlowTwinsLoss()

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return twins(model(batch[0]), model(batch[1]))  # type: ignore[no-any-return]

    return plain(nn.Sequential(cnn(1, 64), BarlowTwinsProjectionHead(64, 96, 48)), loss, _pairs())


def _pairs() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*two_views()), 128, shuffle=True, drop_last=True)


def geometric_gcn() -> Trained:
    """Train a graph convolutional network of torch_geometric on random graphs, to find the densest of three kinds."""
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = GCNConv(16, 64), GCNConv(64, 64), nn.Linear(64, 3)

        def forward(self, data: Any) -> Tensor:
            x = torch.relu(self.first(data.x, data.edge_index))
            x = torch.relu(self.second(x, data.edge_index))
            return self.head(global_mean_pool(x, data.batch))  # type: ignore[no-any-return]

    def graph(label: int) -> Any:
        edges = torch.randint(0, 16, (2, 16 * (label + 1)))
        return Data(x=torch.randn(16, 16) + 0.5 * label, edge_index=edges, y=torch.tensor([label]))

    loader = GraphLoader([graph(i % 3) for i in range(512)], batch_size=64, shuffle=True)
    return plain(Graphs(), lambda model, batch: nn.functional.cross_entropy(model(batch), batch.y), loader)


PROGRAMS: dict[str, Callable[[], Trained]] = {
    function.__name__: function
    for function in (
        scvi,
        linear_scvi,
        scanvi,
        chemprop_regression,
        chemprop_classification,
        lightly_simclr,
        lightly_barlow_twins,
        geometric_gcn,
    )
}
