"""Train a GPT on the characters of Python's standard library with a SpectralProbe, by AdamW or SpectralNewton.

python examples/gpt.py --optimizer spectral-newton --wandb
python examples/gpt.py --width 64 --depth 2 --steps 400     # a small one: a minute on a CPU
"""

import argparse
import sysconfig
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_spectral import SpectralNewton, SpectralProbe

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


class Windows(Dataset):
    """Windows of length + 1 characters, as indices; each character is predicted once."""

    def __init__(self, text, length):
        index = {character: i for i, character in enumerate(CHARACTERS)}
        self.codes, self.length = torch.tensor([index[c] for c in text if c in index]), length

    def __len__(self):
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, i):
        return self.codes[i * self.length : (i + 1) * self.length + 1]


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(pl.LightningModule):
    def __init__(self, width, depth, length, lr, optimizer):
        super().__init__()
        self.save_hyperparameters()
        self.tokens, self.positions = nn.Embedding(len(CHARACTERS), width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads=max(1, width // 32)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS), bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, batch):
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self):
        if self.hparams.optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        else:
            optimizer = SpectralNewton(SpectralNewton.groups(self), lr=self.hparams.lr)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=sysconfig.get_paths()["stdlib"], metavar="FOLDER", help="of *.py files")
    parser.add_argument("--optimizer", choices=["adamw", "spectral-newton"], default="adamw")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases; WANDB_MODE=offline, to a folder")
    for name, default in {"lr": 3e-3, "width": 256, "depth": 6, "length": 128, "batch-size": 64, "steps": 5000}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    pl.seed_everything(0)
    text = "".join(path.read_text("utf-8", errors="replace") for path in sorted(Path(options.text).glob("*.py")))
    cut = len(text) * 95 // 100
    train, held_out = Windows(text[:cut], options.length), Windows(text[cut:], options.length)
    logger = WandbLogger(project="gpt-python") if options.wandb else CSVLogger(".")
    # Query, key and value are measured apart.
    probe = SpectralProbe(fused_qkv=["*.qkv"])
    trainer = pl.Trainer(max_steps=options.steps, logger=logger, callbacks=[probe])
    loader = DataLoader(train, options.batch_size, shuffle=True, drop_last=True)
    model = GPT(options.width, options.depth, options.length, options.lr, options.optimizer)
    trainer.fit(model, loader, DataLoader(held_out, options.batch_size))
    print(probe.last_report.summary())


if __name__ == "__main__":
    main()
