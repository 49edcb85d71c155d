"""The head of a loss: the Hessian of all that is above the cut, in the outputs z at the cut.

Shapes: B samples, C outputs per sample, of all tensors at the cut together. The Hessian is taken by double backward
through the head alone, which is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_spectral._autograd import operation
from lightning_spectral._torch_private import log_softmax_result
from lightning_spectral.curvature.autograd_graph import LINEAR, Dependence, GraphCut
from lightning_spectral.curvature.custom_functions import watch_custom_functions
from lightning_spectral.curvature.ports import REMEDY, SampleLayout, sample_layouts
from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.matmul_precision import accumulation_dtype

DENSE = 2**26
"""Up to how many B C^3 the eigenvectors of the head's Hessian are taken for random columns."""

INDEFINITE = 1e-3
"""Share of the largest curvature along signs below which a negative one is taken for rounding."""

APART = 1e-3
"""Share of the largest entry that is no other sample's doing: products in half precision underflow."""

SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative tolerance for two products with the head's Hessian to be the same."""


@dataclass(frozen=True, eq=False)
class Column:
    """Term of the head's Hessian: y^T H y is the sum, or mean, over columns of sum_b sign_b (x_b^T y_b)(x'_b^T y_b).

    Attributes:
        x: in the shapes of z.
        sign: (B,), or None for 1.
        partner: x', where it is not x.
    """

    x: list[Tensor]
    sign: Tensor | None = None
    partner: list[Tensor] | None = None


class Head:
    """Head of a loss, differentiated once.

    Args:
        apart: whether no two tensors at the cut are of the same samples.
    """

    def __init__(self, loss: Tensor, cut: GraphCut, samples: int, *, apart: bool = False) -> None:
        self.loss, self.cut, self.samples, self.apart = loss, cut, samples, apart
        # A loss that is itself a product with a parameter is its own output.
        self.edges: Sequence[GradientEdge] = cut.edges or [get_gradient_edge(loss)]
        with watch_custom_functions(loss) as custom:
            gradients = torch.autograd.grad(loss, list(self.edges), create_graph=True)
        if custom.cut:
            names = ", ".join(sorted(set(custom.cut.values())))
            raise MeasurementError(f"the loss holds custom autograd functions that cut derivatives ({names}); {REMEDY}")
        self.gradients = list(gradients)
        self.shapes = [g.shape for g in gradients]
        of_each = samples // len(self.shapes) if apart else samples
        self._guesses = [list(sample_layouts(shape, of_each)) for shape in self.shapes]
        self.layouts = self.guessed_layouts(0)
        self.outputs = sum(shape.numel() for shape in self.shapes) // samples

    def guessed_layouts(self, number: int) -> list[SampleLayout] | None:
        """Return a guess of where the samples are in each z; None if there is none, or no other than before."""
        if any(not guesses for guesses in self._guesses) or number >= max(map(len, self._guesses)):
            return None
        return [guesses[min(number, len(guesses) - 1)] for guesses in self._guesses]

    @property
    def device(self) -> torch.device:
        """Where the outputs are."""
        return self.gradients[0].device

    @property
    def is_flat(self) -> bool:
        """Whether the head is piecewise linear as well, so that its Hessian is zero."""
        return not any(g.requires_grad for g in self.gradients)

    @property
    def is_complex(self) -> bool:
        """Whether some outputs are complex: H is then no matrix in them."""
        return any(g.is_complex() for g in self.gradients)

    def zeros(self) -> list[Tensor]:
        """Return zeros in the shapes of z."""
        return [torch.zeros_like(g) for g in self.gradients]

    def product(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Return H x."""
        bent = [(g, x_i) for g, x_i in zip(self.gradients, x, strict=True) if g.requires_grad]
        if not bent:
            return self.zeros()
        products = torch.autograd.grad(
            [g for g, _ in bent],
            list(self.edges),
            [x_i.to(g.dtype) for g, x_i in bent],
            retain_graph=True,
            allow_unused=True,
        )
        return [zero if p is None else p.detach() for p, zero in zip(products, self.zeros(), strict=True)]

    def by_sample(self, x: Sequence[Tensor]) -> Tensor:
        """Return (B, C) of tensors in the shapes of z."""
        assert self.layouts is not None
        parts = [
            x_i.reshape(layout.shape).permute(1, 0, 2).reshape(layout.shape[1], -1)
            for x_i, layout in zip(x, self.layouts, strict=True)
        ]
        return torch.cat(parts, 0 if self.apart else 1)

    def as_outputs(self, flat: Tensor) -> list[Tensor]:
        """Return tensors in the shapes of z of (B, C)."""
        assert self.layouts is not None
        sizes = [layout.shape[1] if self.apart else layout.shape[0] * layout.shape[2] for layout in self.layouts]
        parts = torch.split(flat, sizes, 0 if self.apart else 1)
        x = []
        for part, g, layout in zip(parts, self.gradients, self.layouts, strict=True):
            before, samples, after = layout.shape
            x.append(part.reshape(samples, before, after).permute(1, 0, 2).reshape(g.shape).to(g.dtype))
        return x

    def random_signs(self, generator: torch.Generator) -> list[Tensor]:
        """Return random signs in the shapes of z."""
        return [
            (torch.randint(0, 2, g.shape, generator=generator) * 2 - 1).to(g.device, g.dtype) for g in self.gradients
        ]

    def keeps_samples_apart(self) -> bool:
        """Return whether H x scales sample by sample with x."""
        scale = powers_of_two(self.samples).to(self.device)
        x = self.by_sample(self.random_signs(torch.Generator().manual_seed(0)))
        once, scaled = (self.by_sample(self.product(self.as_outputs(x * s))) for s in (torch.ones_like(scale), scale))
        return scales_by_sample(once, scaled, scale)

    def eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Return (B, r) eigenvalues of every sample's Hessian, the largest first, and (B, C, r) eigenvectors.

        r is the largest rank of a sample's: of a softmax one less than it has classes.
        """
        rows = []
        for c in range(self.outputs):
            one = torch.zeros(self.samples, self.outputs, device=self.device)
            one[:, c] = 1
            rows.append(self.by_sample(self.product(self.as_outputs(one))))
        h_bcc = torch.stack(rows, 1)
        eps = torch.finfo(h_bcc.dtype).eps
        h_bcc = h_bcc.to(accumulation_dtype(h_bcc))
        finite = h_bcc.isfinite().flatten(1).all(1)[:, None]
        values, vectors = torch.linalg.eigh(((h_bcc + h_bcc.mT) / 2).where(finite[..., None], 0))
        order = values.abs().argsort(1, descending=True)
        values, vectors = values.gather(1, order), vectors.gather(2, order[:, None].expand_as(vectors))
        floor = values.abs().amax(1, keepdim=True) * self.outputs * eps
        values = values.where(values.abs() > floor, 0).where(finite, float("nan"))
        rank = int((values != 0).sum(1).max())
        return values[:, :rank], vectors[:, :, :rank]

    def is_indefinite(self) -> bool:
        """Return whether some curvature of the head is clearly negative, for some sample, along random signs."""
        x = self.random_signs(torch.Generator().manual_seed(2))
        along = (self.by_sample(self.product(x)) * self.by_sample(x)).sum(1)
        return bool((along < -INDEFINITE * along.abs().max()).any())

    def exact_columns(self) -> list[Column]:
        """Return columns whose sum is the Hessian within every sample: its eigenvectors times sqrt|lambda|."""
        values, vectors = self.eigenvectors()
        signed = bool((values < 0).any())
        return [
            Column(
                self.as_outputs(vectors[:, :, c] * values[:, c, None].abs().sqrt()),
                values[:, c].sign() if signed else None,
            )
            for c in range(values.shape[1])
        ]

    def random_columns(self, generator: torch.Generator) -> Iterator[Column]:
        """Yield random columns without end, whose mean is the Hessian.

        With s random signs: of few outputs, or of a softmax, the square root of the Hessian times s; of a head that
        acts on each output alone, the root of the second derivatives times s; of any other, D^1/2 s and H D^-1/2 s
        with D what is known of its diagonal. The last, and all with negative eigenvalues, take two backward passes in
        place of one.
        """
        if self.samples * self.outputs**3 <= DENSE:
            yield from self._roots(generator)
        if (blocks := self._softmax_blocks()) is not None:
            while True:
                yield Column([block.random(generator) for block in blocks])
        diagonal = self.product([torch.ones_like(g) for g in self.gradients])
        signs = self.random_signs(torch.Generator().manual_seed(1))
        moved = self.product(signs)
        wide = accumulation_dtype(moved[0])
        error = math.fsum(float((m - d * s).norm(dtype=wide)) for m, d, s in zip(moved, diagonal, signs, strict=True))
        size = math.fsum(float(m.norm(dtype=wide)) for m in moved)
        if error <= SAME.get(moved[0].dtype, 1e-2) * size:
            roots = [d.abs().sqrt() for d in diagonal]
            below = any(bool((d < 0).any()) for d in diagonal)
            while True:
                x = [root * s for root, s in zip(roots, self.random_signs(generator), strict=True)]
                yield Column(x, None, [d.sign() * x_i for d, x_i in zip(diagonal, x, strict=True)] if below else None)
        scale = self._diagonal_scale(generator)
        while True:
            signs = self.random_signs(generator)
            inverse = self.product([s / root for s, root in zip(signs, scale, strict=True)])
            yield Column([s * root for s, root in zip(signs, scale, strict=True)], None, inverse)

    def _roots(self, generator: torch.Generator) -> Iterator[Column]:
        values, vectors = self.eigenvectors()
        roots, below = values.abs().sqrt(), bool((values < 0).any())
        while True:
            s = (torch.randint(0, 2, values.shape, generator=generator) * 2 - 1).to(values)
            x = (vectors @ (roots * s)[:, :, None]).squeeze(2)
            partner = (vectors @ (values.sign() * roots * s)[:, :, None]).squeeze(2) if below else None
            yield Column(self.as_outputs(x), None, None if partner is None else self.as_outputs(partner))

    def _diagonal_scale(self, generator: torch.Generator) -> list[Tensor]:
        """Return the root of about |diag H|, by Hutchinson's estimate, away from zero."""
        total = self.zeros()
        for _ in range(4):
            signs = self.random_signs(generator)
            total = [t + s * m for t, s, m in zip(total, signs, self.product(signs), strict=True)]
        scales = []
        for t in total:
            d = t.abs()
            scales.append((d + 0.1 * d.mean() + torch.finfo(d.dtype).tiny).sqrt())
        return scales

    def _softmax_blocks(self) -> list[_Softmax] | None:
        """Return the blocks a (diag(p) - p p^T) of a head that is linear in log_softmax(z); None for any other."""
        softmaxes = {node for node in self.cut.head if operation(node) == "LogSoftmax"}
        inputs = {(n, nr): node for node in softmaxes for n, nr in node.next_functions}
        cut = {(edge.node, edge.output_nr) for edge in self.edges}
        beside = {(n, nr) for node in self.cut.head if node not in softmaxes for n, nr in node.next_functions}
        if not softmaxes or not cut <= inputs.keys() or cut & beside:
            return None
        root = self.loss.grad_fn
        assert root is not None
        dependence = Dependence(root, [], softmaxes)
        if dependence.obstacles(LINEAR):
            return None
        nodes = [inputs[edge.node, edge.output_nr] for edge in self.edges]
        if len(set(nodes)) != len(softmaxes):
            return None
        results = [log_softmax_result(node) for node in nodes]
        if any(result is None for result in results):
            return None
        weights = torch.autograd.grad(self.loss, [GradientEdge(node, 0) for node in nodes], retain_graph=True)
        blocks = []
        for result, weight in zip(results, weights, strict=True):
            assert result is not None
            log_p, dim = result
            a = -weight.sum(dim, keepdim=True)
            if bool((a < 0).any()):
                return None
            blocks.append(_Softmax(log_p.detach().exp(), a, dim))
        return blocks


@dataclass(frozen=True, eq=False)
class _Softmax:
    p: Tensor
    a: Tensor
    dim: int

    def random(self, generator: torch.Generator) -> Tensor:
        """Return sqrt(a) diag(q) (I - q q^T) s, q = sqrt(p), s random signs."""
        s = (torch.randint(0, 2, self.p.shape, generator=generator) * 2 - 1).to(self.p)
        q = self.p.sqrt()
        return self.a.sqrt() * q * (s - q * (q * s).sum(self.dim, keepdim=True))


def parts_of(shapes: Sequence[torch.Size | None], samples: int) -> int:
    """Return how many views of a sample there are outputs of: in tensors of their own, or in one."""
    first = shapes[0] if len(set(shapes)) == 1 else None
    return len(shapes) * max(first[0] // samples, 1) if first else 1


def powers_of_two(samples: int) -> Tensor:
    """Return (B, 1) powers of two, which scale without rounding, in random order: 1 in 16 pairs share one."""
    rank = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    return 2.0 ** (rank * max(16 // samples, 1) % 16 - 8)[:, None]


def scales_by_sample(once: Tensor, scaled: Tensor, scale: Tensor) -> bool:
    """Return whether what depends linearly on values of samples, (B, ...), scales sample by sample with them.

    What is not finite at a sample, as of a norm at zero, is so whatever is done to the others; what overflows when
    scaled, in half precision, counts as not scaling.
    """
    finite = once.isfinite()
    largest = once.where(finite, 0).abs().amax() if once.numel() else 0.0
    return bool(((scaled - once * scale).abs() <= APART * largest * scale)[finite].all())
