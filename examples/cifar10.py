"""Train a ResNet-18 on CIFAR-10 with a SpectralProbe, by AdamW or SpectralNewton.

python examples/cifar10.py --data FOLDER --optimizer spectral-newton --wandb
python examples/cifar10.py --width 16 --epochs 2     # a narrow one, for a CPU

FOLDER holds cifar-10-python.tar.gz; where it does not, the archive (170 MB) is downloaded to it.
"""

import argparse
import hashlib
import pickle
import tarfile
from pathlib import Path
from urllib.request import urlretrieve

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_spectral import SpectralNewton, SpectralProbe

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"


def cifar10(folder):
    """Return training and test data, standardised images (N, 3, 32, 32) and labels (N,), of the official archive."""
    path = Path(folder) / "cifar-10-python.tar.gz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(urlretrieve(URL, f"{path}.part")[0]).rename(path)
    # A pickle can run code: the digest says that these are the published ones.
    if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != SHA256:
        raise SystemExit(f"{path} is not the official archive: its SHA-256 is {digest}; delete it and run again")
    with tarfile.open(path) as tar:
        files = {Path(member.name).name: member for member in tar if "_batch" in member.name}
        batches = {name: pickle.load(tar.extractfile(file), encoding="bytes") for name, file in files.items()}
    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]]).view(2, 3, 1, 1)

    def data(*names):
        images = torch.cat([torch.from_numpy(batches[name][b"data"]) for name in names]).view(-1, 3, 32, 32)
        labels = torch.cat([torch.tensor(batches[name][b"labels"]) for name in names])
        return TensorDataset((images / 255 - mean) / std, labels)

    return data(*(f"data_batch_{i}" for i in range(1, 6))), data("test_batch")


def augmented(samples):
    """Return a batch of images, each flipped or not and all shifted by up to 4 pixels, and their labels."""
    images, labels = default_collate(samples)
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    y, x = torch.randint(9, (2,)).tolist()
    return F.pad(images, (4, 4, 4, 4))[:, :, y : y + 32, x : x + 32], labels


class Block(nn.Module):
    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out)
        self.conv2, self.norm2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False), nn.BatchNorm2d(fan_out)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.skip(x))


class ResNet18(pl.LightningModule):
    def __init__(self, width, lr, optimizer):
        super().__init__()
        self.save_hyperparameters()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        stages = [(width * 2**i, width * 2 ** (i + 1)) for i in range(3)]
        pairs = [part for a, b in stages for part in (Block(a, b, 2), Block(b, b, 1))]
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, width, 1), *pairs)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, images):
        return self.head(self.blocks(F.relu(self.norm(self.stem(images)))).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        if self.hparams.optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        else:
            optimizer = SpectralNewton(SpectralNewton.groups(self), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", metavar="FOLDER")
    parser.add_argument("--optimizer", choices=["adamw", "spectral-newton"], default="adamw")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases; WANDB_MODE=offline, to a folder")
    for name, default in {"lr": 1e-3, "width": 64, "epochs": 30, "batch-size": 128}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    pl.seed_everything(0)
    train, test = cifar10(options.data)
    logger = WandbLogger(project="cifar10") if options.wandb else CSVLogger(".")
    probe = SpectralProbe()
    trainer = pl.Trainer(max_epochs=options.epochs, logger=logger, callbacks=[probe])
    loader = DataLoader(train, options.batch_size, shuffle=True, drop_last=True, collate_fn=augmented)
    trainer.fit(ResNet18(options.width, options.lr, options.optimizer), loader, DataLoader(test, 500))
    print(probe.last_report.summary())


if __name__ == "__main__":
    main()
