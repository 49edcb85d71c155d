"""Second moments of vectors added in parts: their eigenvalues, without the matrix where that is too large.

Shapes: g groups, each with rows (r, n) of its own and a second moment C = sum x x^T / r of (n, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.numerics.svd import gram_eigenvalues, top_singular_triplets

MAX_DENSE = 8192
"""Dimension n above which the leading eigenvalues alone are computed."""

FEW_ROWS = 1024
"""Number of rows up to which all eigenvalues are computed, whatever n."""

FLOAT64_DIMENSION = 128
"""Dimension n up to which products are taken in float64, which costs little there."""

PRODUCT_ENTRIES = 2**20
"""Entries of rows that are multiplied at a time; the products of chunks are summed in float64."""


class SecondMoment:
    """Second moment C of rows added in parts; it holds up to n rows as they are, and n x n numbers at most.

    Beyond `MAX_DENSE` dimensions and `FEW_ROWS` rows only the leading k eigenvalues are computed, by Lanczos
    on the rows. Earlier parts then count by their 2 k leading directions, so with several parts these are lower bounds.

    Args:
        k: how many leading eigenvalues are needed at least.

    >>> moment = SecondMoment(k=1)
    >>> moment.add(torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]))
    >>> moment.eigenvalues()[0]
    tensor([[3.0000, 0.6667]], dtype=torch.float64)
    """

    def __init__(self, k: int) -> None:
        self.k, self.count, self.complete = k, 0, True
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None

    def add(self, rows_grn: Tensor) -> None:
        """Add rows (g, r, n)."""
        n, n_held = rows_grn.shape[2], sum(rows.shape[1] for rows in self._rows)
        self.count += rows_grn.shape[1]
        if n > MAX_DENSE and n_held > FEW_ROWS:
            self._compress()
        self._rows.append(rows_grn)
        if self._gram is not None or (n <= MAX_DENSE and n_held + rows_grn.shape[1] > n):
            for rows in self._rows:
                self._add_gram(gram(rows))
            self._rows.clear()

    def add_gram(self, gram_gnn: Tensor, rows: int) -> None:
        """Add so many rows by the sum of their x x^T."""
        self.count += rows
        self._add_gram(gram_gnn)
        for rows_grn in self._rows:
            self._add_gram(gram(rows_grn))
        self._rows.clear()

    def add_moment(self, other: SecondMoment) -> None:
        """Add the rows of another second moment."""
        count, self.complete = self.count + other.count, self.complete and other.complete
        for rows in other._rows:
            self.add(rows)
        if other._gram is not None:
            self.add_gram(other._gram, 0)
        # Rows that were compressed stand for more than they are.
        self.count = count

    def to(self, device: torch.device | str) -> SecondMoment:
        """Return a copy on a device."""
        moved = SecondMoment(self.k)
        moved.count, moved.complete = self.count, self.complete
        moved._rows = [rows.to(device) for rows in self._rows]
        moved._gram = None if self._gram is None else self._gram.to(device)
        return moved

    def eigenvalues(self) -> tuple[Tensor, bool]:
        """Return eigenvalues (g, r), decreasing, in float64 on the CPU, and whether all beyond these are zero.

        They are all that are not zero, or the k leading ones.
        """
        complete = self.complete
        if self._gram is not None:
            values = gram_eigenvalues(self._gram)
        else:
            rows_grn = torch.cat(self._rows, 1)
            if rows_grn.shape[2] > MAX_DENSE and rows_grn.shape[1] > FEW_ROWS:
                values = torch.stack([top_singular_triplets(rows, self.k).sigma for rows in rows_grn]).double().square()
                complete = False
            else:
                values = gram_eigenvalues(
                    gram(rows_grn.mT) if rows_grn.shape[1] < rows_grn.shape[2] else gram(rows_grn)
                )
        return (values / max(self.count, 1)).cpu().double(), complete

    def _add_gram(self, gram_gnn: Tensor) -> None:
        self._gram = gram_gnn if self._gram is None else self._gram.add_(gram_gnn)

    def _compress(self) -> None:
        """Replace the rows so far by their leading directions, a row for each."""
        rows_grn, self.complete = torch.cat(self._rows, 1), False
        leading = [top_singular_triplets(rows, 2 * self.k) for rows in rows_grn]
        self._rows = [torch.stack([triplets.sigma[:, None] * triplets.v.T for triplets in leading])]


def gram(rows_grn: Tensor) -> Tensor:
    """Return sum x x^T over the rows of each group, (g, n, n) in float64 where the device has it."""
    groups, _, n = rows_grn.shape
    wide = torch.float32 if rows_grn.device.type == "mps" else torch.float64
    total = rows_grn.new_zeros(groups, n, n, dtype=wide)
    for rows in torch.split(rows_grn, max(1, PRODUCT_ENTRIES // max(1, groups * n)), 1):
        rows = rows.to(wide) if n <= FLOAT64_DIMENSION else rows
        total += rows.mT @ rows
    return total
