"""Small networks of sequences as other people write them: transformers, mixtures of experts and recurrences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.other_networks import ROWS, Batch, Network, cross_entropy, digit_images, fitted, teacher
from lightning_spectral.demo.networks import CHARACTERS, CharacterGPT, GPTBlock, PythonSource

LENGTH, WIDTH, HEADS = 32, 64, 4
MASK = len(CHARACTERS)
"""Token of a hidden character."""


def text(rows: int = 1024, length: int = LENGTH) -> Batch:
    """Return windows of Python's source, and the same a character later."""
    source = PythonSource(length, limit=(rows + 1) * (length + 1))
    windows = torch.stack([source[i] for i in range(rows)])
    windows = windows[torch.randperm(rows)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Attend with heads split from the width (N, T, C); keys and values of one head serve all."""
    split = [part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (q, k, v)]
    split[1:] = [part.expand_as(split[0]) for part in split[1:]]
    return F.scaled_dot_product_attention(*split, is_causal=causal).transpose(1, 2).flatten(2)


class Language(nn.Module):
    """Tokens and positions through blocks to the logits of the next token, with the token table as head."""

    def __init__(self, blocks: list[nn.Module], tied: bool = True, applied: int = 1) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(MASK + 1, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.wte.weight, std=0.1)
        self.blocks, self.norm, self.applied = nn.ModuleList(blocks), nn.LayerNorm(WIDTH), applied
        self.head = nn.Linear(WIDTH, MASK + 1, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for _ in range(self.applied):
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Conv1D(nn.Module):
    """A linear layer with its weight stored (in, out)."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out) * 0.05), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Return x W + b by addmm."""
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.weight.shape[1])


class GPT2Block(nn.Module):
    """Attention and MLP, each after a norm, of `Conv1D`."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.c_fc, self.c_out = Conv1D(4 * WIDTH, WIDTH), Conv1D(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream."""
        x = x + self.c_proj(attention(*self.c_attn(self.ln_1(x)).split(WIDTH, dim=2)))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))  # type: ignore[no-any-return]


class TransposedLinear(nn.Linear):
    """A linear layer as a product with the transposed weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        return x @ self.weight.T


class FalconBlock(nn.Module):
    """Attention with one head of keys and values, and an MLP beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query_key_value = TransposedLinear(WIDTH, WIDTH + 2 * WIDTH // HEADS, bias=False)
        self.dense = TransposedLinear(WIDTH, WIDTH, bias=False)
        self.up, self.down = TransposedLinear(WIDTH, 4 * WIDTH, False), TransposedLinear(4 * WIDTH, WIDTH, False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream."""
        y = self.norm(x)
        parts = self.query_key_value(y).split([WIDTH, WIDTH // HEADS, WIDTH // HEADS], dim=-1)
        return x + self.dense(attention(*parts)) + self.down(F.gelu(self.up(y)))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """The two best of four MLPs per token, whose weights are stacks (E, m, n)."""

    def __init__(self, width: int, hidden: int, by: str, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.by, self.activation = by, activation
        self.router = nn.Linear(width, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(4, hidden, width) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the experts' outputs, by their gates."""
        flat = x.flatten(0, -2)
        best = self.router(flat).topk(2, dim=-1)
        gates = torch.zeros(len(flat), 4).scatter(1, best.indices, best.values.softmax(-1))
        if self.by == "bmm":
            every = flat.expand(4, *flat.shape)
            out = torch.bmm(self.activation(torch.bmm(every, self.up)), self.down)
            return (out * gates.T[:, :, None]).sum(0).view_as(x)
        hidden = self.activation(torch.einsum("nd,edh->neh", flat, self.up))
        return torch.einsum("neh,ehd,ne->nd", hidden, self.down, gates).view_as(x)


class ExpertBlock(nn.Module):
    """A GPT block with experts for an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = Experts(WIDTH, 2 * WIDTH, "bmm", F.silu)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream."""
        x = x + self.proj(attention(*self.qkv(self.norm1(x)).chunk(3, dim=-1)))
        return x + self.experts(self.norm2(x))  # type: ignore[no-any-return]


def gpt(sequences: int) -> Network:
    """Train a GPT of three blocks with GELU on the next character."""
    model = CharacterGPT(len(CHARACTERS), LENGTH, WIDTH, HEADS, depth=3)
    return fitted(model, text(), cross_entropy, sequences, steps=60)


def gpt2() -> Network:
    """Train GPT-2 with a tied head."""
    return fitted(Language([GPT2Block(), GPT2Block()]), text(), cross_entropy, 64, steps=60)


def falcon() -> Network:
    """Train a network of products with transposed weights."""
    return fitted(Language([FalconBlock(), FalconBlock()], tied=False), text(), cross_entropy, 64, steps=60)


def albert() -> Network:
    """Train one block, applied four times, on hidden characters."""
    tokens, _ = text()
    hidden = torch.rand(tokens.shape) < 0.15
    masked, labels = tokens.masked_fill(hidden, MASK), tokens.masked_fill(~hidden, -100)
    model = Language([GPTBlock(WIDTH, HEADS, causal=False)], applied=4)
    return fitted(model, (masked, labels), cross_entropy, 64, steps=60)


def moe_bmm() -> Network:
    """Train a GPT with stacked experts applied by bmm."""
    return fitted(Language([ExpertBlock(), ExpertBlock()], tied=False), text(), cross_entropy, 64, steps=60)


def moe_einsum() -> Network:
    """Train ReLU experts applied by einsum between two linear layers."""
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), Experts(48, 64, "einsum", F.relu), nn.Linear(48, 12))
    return fitted(model, teacher(32, 12), lambda m, b: F.mse_loss(m(b[0]), b[1]), ROWS)


class EncoderDecoder(nn.Module):
    """torch's own transformer, with the sequence in the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(MASK + 1, 48), nn.Parameter(torch.randn(24, 1, 48) * 0.1)
        self.transformer = nn.Transformer(48, 4, 2, 2, 96, dropout=0.1)
        self.head = nn.Linear(48, MASK + 1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits (T, N, V) for tokens (N, T)."""
        x, y = (self.tokens(part.T) + self.positions[: part.shape[1]] for part in (source, target))
        mask = self.transformer.generate_square_subsequent_mask(len(y))
        return self.head(self.transformer(x, y, tgt_mask=mask, tgt_is_causal=True))  # type: ignore[no-any-return]


def encoder_decoder() -> Network:
    """Train an encoder and decoder with cross-attention to write a line backwards."""
    source, _ = text(length=16)
    backwards = source.flip(1)
    shifted = F.pad(backwards[:, :-1], (1, 0), value=MASK)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0], batch[1]).flatten(0, 1), batch[2].T.flatten())

    return fitted(EncoderDecoder(), (source, shifted, backwards), loss, 64, steps=60)


class Recurrence(nn.Module):
    """A recurrence unrolled by hand, read at every step or at the last."""

    def __init__(self, n_in: int, n_out: int, activation: Callable[[Tensor], Tensor], every: bool) -> None:
        super().__init__()
        self.activation, self.every = activation, every
        self.into, self.state, self.out = nn.Linear(n_in, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (N, T, V), or (N, V) of the last."""
        hidden, found = x.new_zeros(len(x), WIDTH), []
        for t in range(x.shape[1]):
            hidden = self.activation(self.into(x[:, t]) + self.state(hidden))
            found.append(hidden)
        return self.out(torch.stack(found, 1) if self.every else hidden)  # type: ignore[no-any-return]


def rnn_relu() -> Network:
    """Train a ReLU recurrence that reads a digit row by row."""
    x, labels = digit_images()
    return fitted(Recurrence(8, 10, F.relu, every=False), (x.squeeze(1), labels), cross_entropy, 512, steps=60)


def rnn_tanh() -> Network:
    """Train a tanh recurrence on the next character."""
    tokens, following = text(length=24)
    model = Recurrence(MASK + 1, MASK + 1, torch.tanh, every=True)
    return fitted(model, (F.one_hot(tokens, MASK + 1).float(), following), cross_entropy, 64, steps=60)


class ViT(nn.Module):
    """Patches of 2 x 2 pixels, a token for the class, and three blocks."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.cls, self.positions = (nn.Parameter(torch.randn(1, n, WIDTH) * 0.02) for n in (1, 17))
        self.blocks = nn.Sequential(*[GPTBlock(WIDTH, HEADS, causal=False) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


def vit() -> Network:
    """Train a vision transformer on the digits."""
    return fitted(ViT(), digit_images(), cross_entropy, 64, steps=60)


NETWORKS: dict[str, Callable[[], Network]] = {
    function.__name__: function
    for function in (albert, gpt2, falcon, encoder_decoder, moe_bmm, moe_einsum, rnn_relu, rnn_tanh, vit)
} | {f"gpt_{sequences}": partial(gpt, sequences) for sequences in (8, 32, 128)}
