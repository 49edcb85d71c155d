"""Small tasks on text, tables and graphs: Python's own source, a held-out network's outputs, a random graph."""

from __future__ import annotations

import copy
import functools
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.other_networks import Batch, LowRank, mlp
from examples.benchmarks.other_sequences import ExpertBlock, Language, text
from examples.benchmarks.small_task_images import Rows, squared_error
from examples.benchmarks.train_runs import Task, classification
from lightning_spectral.demo.networks import CHARACTERS, CharacterGPT, GPTBlock

LENGTH = 32
"""Characters that a network sees at once."""


def source() -> Batch:
    """Return windows of Python's source, and the same a character later."""
    return text(4000, LENGTH)


def encodings() -> Batch:
    """Return the same of the modules of `encodings`, most of which are tables."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "encodings"
    written = "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py")))
    index = {character: i for i, character in enumerate(CHARACTERS)}
    codes = torch.tensor([index[character] for character in written if character in index])
    first = torch.randperm((len(codes) - 1) // LENGTH)[:4000] * LENGTH
    windows = codes[first[:, None] + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def next_character(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy per character, in nats."""
    return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())


def gpt() -> CharacterGPT:
    """Return a GPT of two blocks."""
    return CharacterGPT(len(CHARACTERS), LENGTH, 48)


@functools.cache
def trained_gpt() -> CharacterGPT:
    """Return it after 200 steps on Python's source."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (tokens, following), network = source(), gpt()
        optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
        for _ in range(200):
            rows = torch.randint(len(tokens), (16,))
            optimizer.zero_grad()
            next_character(network, (tokens[rows], following[rows])).backward()
            optimizer.step()
    return network


def adapted() -> nn.Module:
    """Return that GPT, frozen, with low-rank additions in its blocks (arXiv 2106.09685)."""
    network = copy.deepcopy(trained_gpt()).requires_grad_(False)
    for block in network.blocks:
        assert isinstance(block, GPTBlock)
        for name in ("qkv", "proj", "up", "down"):
            setattr(block, name, LowRank(getattr(block, name)))
    return network


class Recurrent(nn.Module):
    """An LSTM from characters to the next ones."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(CHARACTERS), width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, len(CHARACTERS))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.lstm(self.tokens(tokens))[0])  # type: ignore[no-any-return]


def table() -> Batch:
    """Return 16 normal columns, and what a random network makes of them, with noise of a tenth of its variance."""
    x = torch.randn(3000, 16)
    hidden = torch.tanh(x @ torch.randn(16, 32) / 2)
    y = torch.relu(hidden @ torch.randn(32, 32) / 32**0.5) @ torch.randn(32, 1)
    y = (y - y.mean()) / y.std()
    return x, y + 0.1**0.5 * torch.randn_like(y)


NODES, CLASSES = 480, 6


class GraphAttention(nn.Module):
    """Two layers of graph attention (arXiv 1710.10903) on one graph, which a batch names nodes of."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        edges, features, _ = graph()
        self.register_buffer("edges", edges)
        self.register_buffer("features", features)
        self.into, self.out = nn.Linear(features.shape[1], heads * width), nn.Linear(heads * width, heads * width)
        self.sent, self.received = (nn.Parameter(0.2 * torch.randn(2, heads, width)) for _ in range(2))
        self.heads, self.head = heads, nn.Linear(heads * width, CLASSES)

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the logits of nodes (N,)."""
        x = self.features
        for i, layer in enumerate((self.into, self.out)):
            values = layer(x).unflatten(1, (self.heads, -1))
            scores = ((values * part[i]).sum(2).T for part in (self.sent, self.received))
            sent, received = scores
            weights = F.leaky_relu(sent[:, None] + received[:, :, None], 0.2)
            weights = weights.masked_fill(~self.edges, float("-inf")).softmax(2)
            x = F.elu((weights @ values.transpose(0, 1)).transpose(0, 1).flatten(1))
        return self.head(x)[nodes]  # type: ignore[no-any-return]


@functools.cache
def graph() -> tuple[Tensor, Tensor, Tensor]:
    """Return edges (N, N) of a stochastic block model, features (N, 16) in noise, and the nodes' blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labels = torch.randint(CLASSES, (NODES,))
        likely = torch.where(labels[:, None] == labels, 0.03, 0.006)
        upper = torch.triu(torch.rand(NODES, NODES) < likely, diagonal=1)
        edges = upper | upper.T | torch.eye(NODES, dtype=torch.bool)
        features = torch.randn(CLASSES, 16)[labels] * 0.8 + torch.randn(NODES, 16)
    return edges, features, labels


def nodes() -> Batch:
    """Return the nodes' numbers and blocks."""
    return torch.arange(NODES), graph()[2]


TASKS: dict[str, Task] = {
    "language": Task(gpt, lambda: Rows(source, 16), next_character, steps=200),
    "recurrent": Task(Recurrent, lambda: Rows(source, 16), next_character, steps=200),
    "mixture of experts": Task(
        lambda: Language([ExpertBlock()], tied=False), lambda: Rows(source, 16), next_character, steps=150
    ),
    "LoRA": Task(adapted, lambda: Rows(encodings, 16), next_character, steps=120),
    "tabular regression": Task(lambda: mlp(16, 1, width=96), lambda: Rows(table, 64, 700), squared_error, steps=300),
    "graph": Task(GraphAttention, lambda: Rows(nodes, NODES // 2, NODES // 4), classification, steps=80),
}
"""Kind -> task."""
