"""Batches that wait in the CPU's memory for their measurement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_spectral.isolation.batch_tree import map_leaves
from lightning_spectral.isolation.module_copy import Copier


class CpuBatches(Sequence[Any]):
    """Copies of batches in the CPU's memory, each given back on the devices it came from.

    Objects of classes that are no containers are copied where they are.

    Args:
        batches: of any nesting of tensors.
        device: where to give them back; None: where each tensor was.
    """

    def __init__(self, batches: Iterable[Any] = (), device: torch.device | None = None) -> None:
        self._copies: list[tuple[Any, list[torch.device]]] = []
        self.device = device
        for batch in batches:
            self.append(batch)

    def append(self, batch: Any) -> None:
        """Keep a copy of one more batch."""
        devices: list[torch.device] = []
        copier = Copier()

        def hold(leaf: Any) -> Any:
            if isinstance(leaf, PackedSequence):
                # Its batch_sizes stay on the CPU, which only its own `to` knows.
                devices.append(leaf.data.device)
                packed = leaf.to("cpu")  # type: ignore[arg-type]
                return PackedSequence(packed.data.clone(), *packed[1:])
            if not isinstance(leaf, Tensor):
                return copier.copy(leaf, "batch")
            devices.append(leaf.device)
            return leaf.detach().to("cpu", copy=True)

        self._copies.append((map_leaves(batch, hold, whole=PackedSequence), devices))

    def __getitem__(self, index: Any) -> Any:
        batch, devices = self._copies[index]
        left = iter(devices)

        def give(leaf: Any) -> Any:
            if not isinstance(leaf, (Tensor, PackedSequence)):
                return leaf
            device: Any = self.device or next(left)
            return leaf.to(device)

        return map_leaves(batch, give, whole=PackedSequence)

    def __len__(self) -> int:
        return len(self._copies)
