"""Second moments of vectors that come some at a time: their eigenvalues, without the matrix where that is too large.

Shapes: g groups, each with rows (r, n) of its own and a second moment C = sum x x^T / r of (n, n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.numerics.svd import gram_eigenvalues, top_singular_triplets

LARGE = 8192
"""Dimension n above which the leading eigenvalues alone are computed."""

FEW_ROWS = 1024
"""Up to how many rows all eigenvalues are, whatever n."""

SMALL = 128
"""Up to this n products are summed in float64, which costs little there."""

CHUNK = 2**20
"""Entries of rows that are multiplied at a time; the products of chunks are summed in float64."""


@dataclass(frozen=True, eq=False)
class Eigenvalues:
    """Eigenvalues of C, decreasing.

    Attributes:
        values: (g, r) in float64 on the CPU.
        complete: whether those that are not there are zero.
    """

    values: Tensor
    complete: bool


class SecondMoment:
    """C of rows that are added in parts; up to n rows are kept as they are, and n x n numbers are held at most.

    Beyond `LARGE` dimensions and `FEW_ROWS` rows only the leading k eigenvalues are had, by Lanczos on the rows. What
    is kept of earlier parts then are their 2 k leading directions, so with several parts these are lower bounds.

    Args:
        k: how many leading eigenvalues are needed at least.

    >>> moment = SecondMoment(k=1)
    >>> moment.add(torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]))
    >>> moment.eigenvalues().values
    tensor([[3.0000, 0.6667]], dtype=torch.float64)
    """

    def __init__(self, k: int) -> None:
        self.k, self.count, self.complete = k, 0, True
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None

    def add(self, rows_grn: Tensor) -> None:
        """Add rows (g, r, n)."""
        n, kept = rows_grn.shape[2], sum(rows.shape[1] for rows in self._rows)
        self.count += rows_grn.shape[1]
        if n > LARGE and kept > FEW_ROWS:
            self._compress()
        self._rows.append(rows_grn)
        if self._gram is not None or (n <= LARGE and kept + rows_grn.shape[1] > n):
            for rows in self._rows:
                self._add_gram(gram(rows))
            self._rows.clear()

    def add_gram(self, gram_gnn: Tensor, rows: int) -> None:
        """Add so many rows by the sum of their x x^T."""
        self.count += rows
        self._add_gram(gram_gnn)
        for kept in self._rows:
            self._add_gram(gram(kept))
        self._rows.clear()

    def add_moment(self, other: SecondMoment) -> None:
        """Add the rows that another one was given."""
        count, self.complete = self.count + other.count, self.complete and other.complete
        for rows in other._rows:
            self.add(rows)
        if other._gram is not None:
            self.add_gram(other._gram, 0)
        # Rows that were compressed stand for more than they are.
        self.count = count

    def to(self, device: torch.device | str) -> SecondMoment:
        """The same on a device."""
        moved = SecondMoment(self.k)
        moved.count, moved.complete = self.count, self.complete
        moved._rows = [rows.to(device) for rows in self._rows]
        moved._gram = None if self._gram is None else self._gram.to(device)
        return moved

    def eigenvalues(self) -> Eigenvalues:
        """All that are not zero, or the k leading ones."""
        complete = self.complete
        if self._gram is not None:
            values = gram_eigenvalues(self._gram)
        else:
            rows_grn = torch.cat(self._rows, 1)
            if rows_grn.shape[2] > LARGE and rows_grn.shape[1] > FEW_ROWS:
                values = torch.stack([top_singular_triplets(rows, self.k).sigma for rows in rows_grn]).double().square()
                complete = False
            else:
                values = gram_eigenvalues(
                    gram(rows_grn.mT) if rows_grn.shape[1] < rows_grn.shape[2] else gram(rows_grn)
                )
        return Eigenvalues((values / max(self.count, 1)).cpu().double(), complete)

    def _add_gram(self, gram_gnn: Tensor) -> None:
        self._gram = gram_gnn if self._gram is None else self._gram.add_(gram_gnn)

    def _compress(self) -> None:
        """Keep the leading directions of the rows so far, each as one row."""
        rows_grn, self.complete = torch.cat(self._rows, 1), False
        leading = [top_singular_triplets(rows, 2 * self.k) for rows in rows_grn]
        self._rows = [torch.stack([triplets.sigma[:, None] * triplets.v.T for triplets in leading])]


def gram(rows_grn: Tensor) -> Tensor:
    """sum x x^T over the rows of each group, (g, n, n) in float64 where the device has it."""
    groups, _, n = rows_grn.shape
    wide = torch.float32 if rows_grn.device.type == "mps" else torch.float64
    total = rows_grn.new_zeros(groups, n, n, dtype=wide)
    for rows in torch.split(rows_grn, max(1, CHUNK // max(1, groups * n)), 1):
        rows = rows.to(wide) if n <= SMALL else rows
        total += rows.mT @ rows
    return total
