"""The smallest modules to train, and batches for them."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from modules import fit
from torch import nn
from torch.utils.data import Dataset, TensorDataset


class Repeated(Dataset):
    """One and the same batch, 12 times."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return self.batch


class Tiny(pl.LightningModule):
    def __init__(self, net=None):
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def batch_of(n=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def fit_tiny(probe, module=None, batch=None, **options):
    return fit(module or Tiny(), [probe], data=Repeated(batch or batch_of()), batch_size=None, **options)


class Small(pl.LightningModule):
    """Everything that a measurement could leave changed: statistics, dropout, flags, gradients."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def small_data(n=24):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randint(0, 5, (n,), generator=generator))


def fit_small(module, *callbacks, **options):
    pl.seed_everything(1, verbose=False)
    return fit(module, callbacks, **{"data": small_data(), "batch_size": 6, **options})
