"""A small GPT with every choice an option, and the tokens it learns: text, text in random order, or random tokens."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_spectral.demo.networks import CHARACTERS, PythonSource

Batch = tuple[Tensor, Tensor]
"""Tokens (B, T) and the tokens that follow them (B, T)."""

WARMUP = 50
"""Steps over which the learning rate rises, as in the demo."""


@dataclass(frozen=True)
class Setting:
    """What is trained, how, and what is measured. The defaults are the demo's GPT on Python's source.

    Attributes:
        data: "text", Python's source; "shuffled", its tokens in random order; "uniform", independent tokens, all alike.
        vocabulary: 96, characters; above that, so many tokens, of which those of text beyond 96 are frequent pairs.
        depth: blocks.
        width: of the residual stream; a head per 16 channels.
        steps: optimizer steps.
        batch: sequences per step.
        length: tokens per sequence.
        dropout: share dropped in training, and in the measurement, which then is in train mode.
        norm: "pre", "post" or "none", where LayerNorm stands.
        tied: the head is the embedding's matrix.
        init: "torch", its modules' own; "gpt2", normal with 0.02, output projections divided by sqrt(2 depth).
        activation: "gelu" or "relu".
        optimizer: "adamw" or "sgd" with momentum 0.9.
        lr: its learning rate.
        sequences: measured on.
        memorise: train on those sequences alone, over and over; else on new ones every step, measured on held-out ones.
        positions: "all" or "last", those whose loss is measured.
        labels: "data", or "model": drawn from the network's own predictions, so that no gradient is expected.
    """

    data: str = "text"
    vocabulary: int = 96
    depth: int = 2
    width: int = 64
    steps: int = 400
    batch: int = 64
    length: int = 64
    dropout: float = 0.0
    norm: str = "pre"
    tied: bool = False
    init: str = "torch"
    activation: str = "gelu"
    optimizer: str = "adamw"
    lr: float = 3e-3
    sequences: int = 64
    memorise: bool = False
    positions: str = "all"
    labels: str = "data"


class Block(nn.Module):
    """Causal self-attention with one fused qkv projection, and an MLP of four times the width."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width = setting.width
        self.heads, self.place = width // 16, setting.norm
        self.act = F.gelu if setting.activation == "gelu" else F.relu
        norms = [nn.Identity() if setting.norm == "none" else nn.LayerNorm(width) for _ in range(2)]
        self.norm1, self.norm2 = norms
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(setting.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        if self.place == "post":
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.mlp(x))  # type: ignore[no-any-return]
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        """Attention and its output projection."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.proj(y.transpose(1, 2).reshape(b, t, d)))  # type: ignore[no-any-return]

    def mlp(self, x: Tensor) -> Tensor:
        """Up, activation, down."""
        return self.drop(self.down(self.act(self.up(x))))  # type: ignore[no-any-return]


class SmallGPT(nn.Module):
    """Token and position embeddings, blocks, a norm where there are any, a head without bias."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.tokens = nn.Embedding(setting.vocabulary, setting.width)
        self.positions = nn.Embedding(setting.length, setting.width)
        self.drop = nn.Dropout(setting.dropout)
        self.blocks = nn.ModuleList([Block(setting) for _ in range(setting.depth)])
        self.norm = nn.LayerNorm(setting.width) if setting.norm == "pre" else nn.Identity()
        self.head = nn.Linear(setting.width, setting.vocabulary, bias=False)
        if setting.init == "gpt2":
            self._gpt2_init(setting.depth)
        if setting.tied:
            self.tokens.weight = self.head.weight

    def _gpt2_init(self, depth: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                out = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * depth) if out else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> logits (B, T, vocabulary)."""
        x = self.drop(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def all_positions(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over all tokens."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def last_position(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the last token of each sequence."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens)[:, -1], targets[:, -1])


@cache
def text(vocabulary: int) -> Tensor:
    """Python's source as tokens: characters and, beyond 96, the most frequent pairs of them, taken greedily."""
    codes = PythonSource(1).text
    if vocabulary == len(CHARACTERS):
        return codes
    base = len(CHARACTERS)
    pairs = Counter((codes[:-1] * base + codes[1:]).tolist())
    index = {pair: base + i for i, (pair, _) in enumerate(pairs.most_common(vocabulary - base))}
    found, i, plain = [], 0, codes.tolist()
    while i < len(plain) - 1:
        token = index.get(plain[i] * base + plain[i + 1])
        found.append(plain[i] if token is None else token)
        i += 1 if token is None else 2
    return torch.tensor(found)


class Tokens:
    """Draws sequences of a setting's data; the last tenth of the text is held out from training.

    Args:
        setting: names the data.
        seed: of the draws.
        held_out: draw from the held-out part.
    """

    def __init__(self, setting: Setting, seed: int, *, held_out: bool = False) -> None:
        self.setting = setting
        self.generator = torch.Generator().manual_seed(seed)
        if setting.data != "uniform":
            codes = text(setting.vocabulary)
            if setting.data == "shuffled":
                codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
            cut = len(codes) * 9 // 10
            self.codes = codes[cut:] if held_out else codes[:cut]

    def draw(self, n: int) -> Batch:
        """So many sequences."""
        length = self.setting.length
        if self.setting.data == "uniform":
            window = torch.randint(self.setting.vocabulary, (n, length + 1), generator=self.generator)
        else:
            start = torch.randint(len(self.codes) - length, (n, 1), generator=self.generator)
            window = self.codes[start + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:]


def train(setting: Setting, seed: int) -> tuple[SmallGPT, list[float], Batch]:
    """Train a network; with its loss at every step and the batch to measure on, whose labels are the data's."""
    torch.manual_seed(seed)
    model = SmallGPT(setting)
    data = Tokens(setting, 1000 + seed)
    tokens, targets = (data if setting.memorise else Tokens(setting, 5000 + seed, held_out=True)).draw(
        setting.sequences
    )
    if setting.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), setting.lr, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), setting.lr, momentum=0.9)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=WARMUP)
    losses = []
    for _ in range(setting.steps):
        if setting.memorise:
            chosen = torch.randint(setting.sequences, (setting.batch,), generator=data.generator)
            batch = tokens[chosen], targets[chosen]
        else:
            batch = data.draw(setting.batch)
        optimizer.zero_grad()
        loss = all_positions(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        warmup.step()
        losses.append(float(loss.detach()))
    return model, losses, (tokens, targets)
