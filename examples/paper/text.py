"""Text in three parts: Python's standard library, a text file by bytes or GPT-2's tokens, or a file of tokens.

Python's source is there wherever Python is. Other text is a file of the user's, named by its path.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.paper.archives import CHUNK, ArchiveError
from examples.paper.data import Parts
from lightning_spectral.demo.networks import CHARACTERS, PythonSource

Tokenizer = Literal["bytes", "gpt2"]
GPT2_VOCABULARY = 50257
HELD_OUT = 0.05
"""Share of the text that is kept for validation, and for test."""


class Windows(Dataset[Tensor]):
    """Windows of length + 1 tokens that overlap in one, so that each token is predicted once.

    Args:
        tokens: (n,), whole numbers of any type.
        length: tokens a network sees at once.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """A batch (n, length + 1), which DataLoader takes where it is offered."""
        starts = [int(i) * self.length for i in indices]
        return torch.stack([self.tokens[start : start + self.length + 1] for start in starts]).long()


def text_parts(name: str, tokens: Tensor, length: int, vocabulary: int) -> Parts:
    """The first 90 % of a text to train on, then 5 % each for validation and test: neighbours in it are alike.

    Raises:
        ValueError: if a part has not one window.
    """
    n = len(tokens)
    cuts = [0, n - 2 * int(HELD_OUT * n), n - int(HELD_OUT * n), n]
    train, val, test = (Windows(tokens[a:b], length) for a, b in pairwise(cuts))
    if not (len(train) and len(val) and len(test)):
        raise ValueError(
            f"length: of the {n} tokens of {name}, {len(val.tokens)} are for validation, which is no window of "
            f"{length} + 1; take shorter windows or more text"
        )
    return Parts(name, train, val, test, vocabulary, train)


def python_source(length: int, limit: int = 2_000_000) -> Parts:
    """Characters of the standard library's modules, 96 different ones."""
    return text_parts("python_source", PythonSource(length, limit).text, length, len(CHARACTERS))


def text_file(path: str | Path, length: int, *, tokenizer: Tokenizer = "bytes") -> Parts:
    """A text file, by its bytes or by GPT-2's tokens.

    GPT-2's need tiktoken, which downloads its table on first use, or finds it where TIKTOKEN_CACHE_DIR says.

    Raises:
        ArchiveError: if the file is absent or empty.
        ValueError: for another tokenizer, or too little text.
        ImportError: without tiktoken, if it is needed.
    """
    if tokenizer not in ("bytes", "gpt2"):
        raise ValueError(f"tokenizer must be 'bytes' or 'gpt2', got {tokenizer!r}")
    data = _file(path).read_bytes()
    if tokenizer == "bytes":
        return text_parts(Path(path).name, torch.frombuffer(bytearray(data), dtype=torch.uint8), length, 256)
    try:
        import tiktoken  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("tokenizer='gpt2' needs tiktoken: pip install tiktoken; or take 'bytes'") from error
    tokens = tiktoken.get_encoding("gpt2").encode_ordinary(data.decode("utf-8", errors="replace"))
    return text_parts(Path(path).name, torch.tensor(tokens, dtype=torch.int32), length, GPT2_VOCABULARY)


def token_file(path: str | Path, length: int, *, vocabulary: int = GPT2_VOCABULARY) -> Parts:
    """A file of 16-bit unsigned tokens in the byte order of this machine, as nanoGPT writes; read as it is needed.

    Raises:
        ArchiveError: if the file is absent or empty, is not of whole tokens, or has one outside the vocabulary.
        ValueError: if it is too short.
    """
    size = _file(path).stat().st_size
    if size % 2:
        raise ArchiveError(f"{path} must hold tokens of two bytes each, found {size} bytes")
    tokens = torch.from_file(str(path), shared=False, size=size // 2, dtype=torch.uint16)
    largest = max(int(part.int().max()) for part in torch.split(tokens, CHUNK))
    if largest >= vocabulary:
        raise ArchiveError(f"{path} holds the token {largest}, outside a vocabulary of {vocabulary}; give a larger one")
    return text_parts(Path(path).name, tokens, length, vocabulary)


def _file(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ArchiveError(f"{path} is no file; name the text to train on by its path")
    if Path(path).stat().st_size == 0:
        raise ArchiveError(f"{path} is empty; name the text to train on by its path")
    return Path(path)
