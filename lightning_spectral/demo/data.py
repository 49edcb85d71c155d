"""Real data that needs no network: scikit-learn's digits, and the source text of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""Vocabulary of `PythonSource`: the newline and printable ASCII. Other characters are dropped."""


def digits() -> TensorDataset:
    """Return 1,797 grey images (1, 8, 8), standardised, and their labels 0 to 9. Needs scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits need scikit-learn: pip install "lightning-spectral[demo]"') from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    return TensorDataset((images - images.mean()) / images.std(), torch.tensor(data.target, dtype=torch.long))


class PythonSource(Dataset[Tensor]):
    """Windows of length + 1 characters of the standard library's top-level modules, as indices (length + 1,)."""

    def __init__(self, length: int, limit: int = 2_000_000) -> None:
        index = {character: i for i, character in enumerate(CHARACTERS)}
        codes: list[int] = []
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            codes.extend(index[character] for character in text if character in index)
            if len(codes) >= limit:
                break
        self.text = torch.tensor(codes[:limit], dtype=torch.long)
        self.length = length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, i: int) -> Tensor:
        return self.text[i * self.length : (i + 1) * self.length + 1]
