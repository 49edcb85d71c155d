"""Two large networks as they are published, made without their weights, and what a probe of them is planned to cost."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_spectral.demo.networks import GPTBlock
from lightning_spectral.plan import Plan, plan_spectra
from lightning_spectral.plan.fake_run import weightless

GPUS = 8
FEW = {"max_samples": 64 // GPUS, "micro_batch_size": 1}
SETTINGS: dict[str, tuple[dict[str, Any], int | None]] = {
    "as it is": ({}, None),
    "64 sequences": (FEW | {"layers": ["blocks.*"]}, None),
    "64 x 256 tokens": (FEW | {"layers": ["blocks.*"]}, 256),
    "64 x 256 tokens, 3 blocks": (FEW | {"layers": ["blocks.0.*", "blocks.15.*", "blocks.31.*"]}, 256),
}
"""Options of a probe beside the defaults, and to how many tokens its loss cuts the sequences; None: to none."""


class GPT2XL(nn.Module):
    """48 blocks of width 1600 with 25 heads, 1024 tokens, and a head tied to the embedding of 50257 words."""

    length, sequences = 1024, 512

    def __init__(self, width: int = 1600, heads: int = 25, depth: int = 48, words: int = 50257) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(words, width), nn.Embedding(self.length, width)
        self.blocks = nn.ModuleList([GPTBlock(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, T, words)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class LlamaBlock(nn.Module):
    """Attention with rotary positions and a gated MLP, both behind RMSNorm."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """The block's output; ``turn`` holds cosines and sines of the positions."""
        b, t, d = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotated(q, *turn), rotated(k, *turn), v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, t, d))
        y = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))  # type: ignore[no-any-return]


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs of channels turned by the angles of their positions."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


class Llama7B(nn.Module):
    """32 blocks of width 4096 with 32 heads and a hidden width of 11008, 2048 tokens, 32000 words."""

    length, sequences = 2048, 512

    def __init__(
        self, width: int = 4096, hidden: int = 11008, heads: int = 32, depth: int = 32, words: int = 32000
    ) -> None:
        super().__init__()
        self.tokens, self.angles = nn.Embedding(words, width), width // heads
        self.blocks = nn.ModuleList([LlamaBlock(width, hidden, heads) for _ in range(depth)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, T, words)."""
        rates = 10000.0 ** (-torch.arange(0, self.angles, 2, device=tokens.device) / self.angles)
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), rates).repeat(1, 2)
        x, turn = self.tokens(tokens), (angles.cos(), angles.sin())
        for block in self.blocks:
            x = block(x, turn)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def predictions() -> dict[str, Any]:
    """Plans of both for every setting, for one batch of 512 sequences on 8 GPUs."""
    found: dict[str, Any] = {}
    for make in (GPT2XL, Llama7B):
        with weightless():
            model = make()
        whole = None
        for name, (options, cut) in SETTINGS.items():
            tokens = torch.empty(make.sequences, cut or make.length, dtype=torch.long, device="meta")
            plan, split = (
                plan_spectra(model, tokens, next_token, world_size=GPUS, sharded=sharded, **options)
                for sharded in (False, True)
            )
            whole = whole or plan
            of_shards = {"bytes": in_bytes(split), "sent_bytes": split.sent}
            found[f"{make.__name__}, {name}"] = predicted(plan, whole, options, make.length) | {"sharded": of_shards}
            print(make.__name__, name, found[f"{make.__name__}, {name}"], flush=True)
    return found


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def predicted(plan: Plan, whole: Plan, options: dict[str, Any], length: int) -> dict[str, Any]:
    """The figures of a plan, in training steps on the whole batch, and bytes on each GPU.

    A training step takes 6 N FLOPs per token and those of attention; a probe as many times that as it takes steps.
    """
    cost, sequences = plan.costs[plan.method], plan.batch_samples or 1
    of_plan, of_whole = plan.step_flops or 1, whole.step_flops or 1
    return {
        "options": options,
        "method": plan.method,
        "parameters": plan.parameters,
        "layers": len(plan.layers),
        "products": cost.products,
        "steps": [steps * of_plan / of_whole for steps in cost.steps],
        "step_flops": of_whole,
        "flops_per_token_over_6n": of_whole / (6 * plan.parameters * sequences * length),
        "probe_flops_per_gpu": [steps * of_plan / plan.world_size for steps in cost.steps],
        "bytes": in_bytes(plan),
        "sent_bytes": plan.sent,
    }


def in_bytes(plan: Plan) -> dict[str, int]:
    """The memory of the method planned, in its parts and at its peak."""
    memory = plan.costs[plan.method].memory
    return vars(memory) | {"peak": memory.peak}
