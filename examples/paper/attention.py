"""The paper's transformers in plain PyTorch: a vision transformer and GPT-2, of any width and depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_spectral.demo.networks import GPTBlock


class ViT(nn.Module):
    """A vision transformer with a class token, of arXiv 2010.11929; the defaults are ViT-Tiny for CIFAR.

    Args:
        classes: how many.
        image_size: height and width of the images.
        patch: height and width of a patch.
        width: of the residual stream.
        heads: of each attention layer.
        depth: number of blocks.
        channels: of the images.

    Raises:
        ValueError: if patches do not cover the image, or heads do not divide the width.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        image_size: int = 32,
        patch: int = 4,
        width: int = 192,
        heads: int = 3,
        depth: int = 12,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patch must divide image_size, got {patch} and {image_size}")
        _check_heads(width, heads)
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros((image_size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(GPTBlock(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        _initialise_transformer(self)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, image_size, image_size) -> logits (N, classes)."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """GPT-2 with learned positions and no dropout; the defaults are GPT-2 small, 124,439,808 parameters.

    Args:
        vocabulary: number of tokens.
        length: tokens it sees at once.
        width: of the residual stream.
        heads: of each attention layer.
        depth: number of blocks.
        tied: whether the head is the table of tokens.

    Raises:
        ValueError: if heads do not divide the width.
    """

    def __init__(
        self,
        vocabulary: int = 50257,
        *,
        length: int = 1024,
        width: int = 768,
        heads: int = 12,
        depth: int = 12,
        tied: bool = True,
    ) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        _initialise_transformer(self)
        for name, parameter in self.blocks.named_parameters():
            # GPT-2's report, section 2.3: what is added to the residual stream is scaled by its number of layers.
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T), T up to ``length`` -> logits (N, T, vocabulary)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"heads must divide width, got {heads} and {width}")


def _initialise_transformer(model: nn.Module) -> None:
    """Normal weights of standard deviation 0.02 and no biases, as in GPT-2 and BERT."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def paper_gpt(vocabulary: int = 1000, *, length: int = 128, depth: int = 6) -> GPT:
    """The paper's small GPT-2, as far as its files tell: width 384, 6 blocks, an untied head of 1,000 tokens.

    They do not tell the length nor the heads, here 64 wide as in GPT-2.
    """
    return GPT(vocabulary, length=length, width=384, heads=6, depth=depth, tied=False)
