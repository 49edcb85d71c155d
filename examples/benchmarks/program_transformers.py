"""Models of transformers with random weights and small sizes, trained on the characters of Python's source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.benchmarks.other_networks import digit_images
from examples.benchmarks.other_sequences import MASK, text
from examples.benchmarks.program_training import Trained, plain

WIDTH, HEADS, LAYERS, SEQUENCES = 64, 4, 2, 32
SIZES = {
    "vocab_size": MASK + 1,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 64,
}


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss that the model computes of its labels."""
    return model(**batch).loss  # type: ignore[no-any-return]


def _batches(columns: dict[str, Tensor]) -> DataLoader[Any]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return DataLoader(rows, SEQUENCES, shuffle=True)  # type: ignore[arg-type]


def _causal(model: nn.Module) -> Trained:
    tokens, _ = text(rows=2048)
    return plain(model, own_loss, _batches({"input_ids": tokens, "labels": tokens}))


def gpt2() -> Trained:
    """Train GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _causal(
        GPT2LMHeadModel(GPT2Config(vocab_size=MASK + 1, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS))
    )


def llama() -> Trained:
    """Train Llama with grouped heads of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _causal(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)))


def mixtral() -> Trained:
    """Train Mixtral with four experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return _causal(MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)))


def falcon() -> Trained:
    """Train Falcon."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=MASK + 1, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    return _causal(FalconForCausalLM(config))


def bert() -> Trained:
    """Train BERT on hidden characters."""
    from transformers import BertConfig, BertForMaskedLM

    tokens, _ = text(rows=2048)
    hidden = torch.rand(tokens.shape) < 0.15
    columns = {"input_ids": tokens.masked_fill(hidden, MASK), "labels": tokens.masked_fill(~hidden, -100)}
    return plain(BertForMaskedLM(BertConfig(**SIZES)), own_loss, _batches(columns))


def albert() -> Trained:
    """Train ALBERT, whose layers share their weights, on hidden characters."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    tokens, _ = text(rows=2048)
    hidden = torch.rand(tokens.shape) < 0.15
    columns = {"input_ids": tokens.masked_fill(hidden, MASK), "labels": tokens.masked_fill(~hidden, -100)}
    model = AlbertForMaskedLM(AlbertConfig(**(SIZES | {"num_hidden_layers": 4}), embedding_size=64))
    return plain(model, own_loss, _batches(columns))


def vit() -> Trained:
    """Train a vision transformer on the digits."""
    from transformers import ViTConfig, ViTForImageClassification

    images, labels = digit_images()
    sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "max_position_embeddings")}
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10)
    return plain(ViTForImageClassification(config), own_loss, _batches({"pixel_values": images, "labels": labels}))


def clip() -> Trained:
    """Train CLIP on digits and their labels, each followed by how bright its quarters are."""
    from transformers import CLIPConfig, CLIPModel

    images, labels = digit_images()
    bright = nn.functional.avg_pool2d(images, 4).flatten(1).mul(4).add(16).long().clamp(10, 39)
    end = torch.full_like(labels, 40)
    tokens = torch.stack([labels, *bright.unbind(1), end], 1)
    sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "max_position_embeddings")}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 41, "max_position_embeddings": 8, "eos_token_id": 40, "projection_dim": 64},
        vision_config=sizes | {"image_size": 8, "patch_size": 2, "num_channels": 1, "projection_dim": 64},
        projection_dim=64,
    )
    columns = {"input_ids": tokens, "pixel_values": images}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, return_loss=True).loss  # type: ignore[no-any-return]

    return plain(CLIPModel(config), loss, _batches(columns))


PROGRAMS: dict[str, Callable[[], Trained]] = {
    f"transformers_{function.__name__}": function
    for function in (gpt2, llama, mixtral, falcon, bert, albert, vit, clip)
}
