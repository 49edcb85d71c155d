"""Networks to measure, each with its loss, batch and options: the case table of the curvature tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        model = self.model().to(dtype)
        batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in self.batch())
        return model, batch


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def token_loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


class Block(nn.Module):
    def __init__(self, d=8, heads=2):
        super().__init__()
        self.heads = heads
        self.n1, self.qkv, self.proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.n2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class TiedLM(nn.Module):
    def __init__(self, vocabulary=11, d=8):
        super().__init__()
        self.tokens, self.block, self.head = nn.Embedding(vocabulary, d), Block(d), nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(self.block(self.tokens(tokens)))


class Attention(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(d, 2, batch_first=True), nn.Linear(d, 5)

    def forward(self, x):
        return self.head(self.attn(x, x, x, need_weights=False)[0].mean(1))


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = cnn().to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.net(x.to(memory_format=torch.channels_last))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.GELU(),
        nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def grouped():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.GELU(), nn.Conv2d(8, 8, 3, groups=8), nn.GELU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, 5),
    )  # fmt: skip


class Frames(nn.Module):
    """A convolution of several images per sample."""

    def __init__(self, activation):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, groups=2), nn.Linear(3 * 4 * 4, 5)
        self.up, self.activation = nn.ConvTranspose2d(4, 4, 2, groups=2), activation

    def forward(self, x):
        y = self.activation(self.conv(x.flatten(0, 1)))
        y = F.avg_pool2d(self.activation(self.up(y)), 2)
        return self.head(y.reshape(len(x), -1))


def frames(samples=12):
    return lambda: (torch.randn(samples, 3, 2, 5, 5), torch.randint(0, 5, (samples,)))


def signals():
    return nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.GELU(), nn.ConvTranspose1d(5, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(21, 5)
    )


def volumes():
    return nn.Sequential(
        nn.Conv3d(1, 4, 2), nn.GELU(), nn.ConvTranspose3d(4, 2, 2), nn.GELU(), nn.Flatten(), nn.Linear(54, 5)
    )


def vectors():
    return torch.randn(24, 6), torch.randint(0, 5, (24,))


def images(channels=2, size=6):
    return lambda: (torch.randn(12, channels, size, size), torch.randint(0, 5, (12,)))


def sequences():
    return torch.randint(0, 11, (6, 7)), torch.randint(0, 11, (6, 7))


CASES = [
    Case("mlp_cross_entropy", mlp, vectors, cross_entropy),
    Case("mlp_mse", mlp, lambda: (torch.randn(24, 6), torch.randn(24, 5)), mse),
    Case("cnn_batchnorm_eval", cnn, images(), cross_entropy),
    Case("cnn_batchnorm_train", cnn, images(), cross_entropy, {"mode": "train"}),
    Case("cnn_channels_last", ChannelsLast, images(), cross_entropy),
    Case("grouped_depthwise_transposed", grouped, images(4, 5), cross_entropy),
    Case("frames", lambda: Frames(nn.GELU()), frames(), cross_entropy),
    Case("conv1d", signals, lambda: (torch.randn(12, 2, 8), torch.randint(0, 5, (12,))), cross_entropy),
    Case("conv3d", volumes, lambda: (torch.randn(8, 1, 3, 3, 3), torch.randint(0, 5, (8,))), cross_entropy),
    Case("gpt_block_tied", TiedLM, sequences, token_loss),
    Case("gpt_block_fused_qkv", TiedLM, sequences, token_loss, {"fused_qkv": ["*.qkv"]}),
    Case("multihead_attention", Attention, lambda: (torch.randn(8, 4, 8), torch.randint(0, 5, (8,))), cross_entropy),
]
