"""Exact Hessian curvature in expectation: one Hessian-vector product serves all layers and several directions of each.

A channel is a layer l and one of its directions k. Each layer's output is moved along the sum of its channels' moves
e_lkb u_k (v_k^T a_b), with a random sign for each channel and sample b, and h_lk = sum_b sign_lkb (H e)_lkb is read
back. Terms between channels carry the product of two signs, whose mean is zero; within one channel samples do not
interact, so its own terms are complete. What keeps the rest small:

- Which directions of the layers meet in a product is drawn anew for each draw: those of one rank k in all layers
  belong to the same feature of the data and have larger terms with each other than others.
- Signs are rows of a Hadamard matrix over randomly ordered samples, of each group of at most as many channels as
  samples: the products of two channels' signs add up to zero exactly, so the part of their cross terms that all samples
  share cancels, and only its scatter over samples remains.
- A channel's amplitude squared is w_k / h_k, with a first estimate of h, the sum of the samples' squared gradients, and
  the weight w_k that an error of log h_k has in the slope of log h on log sigma. Errors of h_i through h_j then have
  variance proportional to h_i^2 w_j / w_i, and these amplitudes have the smallest sum of w_i^2 var(log h_i), the
  variance of alpha.
- With z the network's output and g the loss's gradient in it, the Hessian is J^T (d2L / dz2) J + sum_z g_z d2z. Along
  gradients the first part is the larger one, the more so the better the network is trained. Of few outputs it comes
  from a backward pass each, without noise, and products are of the second part alone: of <g, z> with g held. The same
  split serves a loss that couples samples: the coupling is all in the first part.
- Standard errors come from what the draws differ by. Where there are so few channels that a product for each of them
  costs no more, or fewer than 4 samples, there is one: the few signs would often agree by chance, and the error not
  show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.curvature.custom_functions import custom_functions
from lightning_spectral.curvature.draws import Draw, is_precise, mean_and_error
from lightning_spectral.curvature.exact import measured_exactly, with_unseen
from lightning_spectral.curvature.gauss_newton import by_all_outputs, refuse_dear_coupling
from lightning_spectral.curvature.head import Head
from lightning_spectral.curvature.ports import REMEDY
from lightning_spectral.curvature.problem import Curvatures, DifferentiableLoss, SampleRange
from lightning_spectral.curvature.sample_search import MovedNetwork, move_network
from lightning_spectral.curvature.seen_layers import see_layers
from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.svd import SingularTriplets

DRAWS = 6
"""Up to how often all directions are measured; twice as often where columns take a part, within `PRODUCTS`."""

PRODUCTS = 12
"""Products after which no other draw is made; of B < 32 samples, sqrt(32 / B) times as many."""

COLUMNS, COLUMN = 10, 0.4
"""Up to how many outputs per sample backward passes take their part, and the time of one, in that of a product."""

TARGET_ERROR = 0.04
"""Standard error of alpha, from that of h, below which no further draw is worth its time.

A tenth of what the sampling noise of a batch gives alpha anyway; half of all errors are then below 0.027.
"""

LEAST_RANKS, RANKS, RANKS_OF_REST = 2, 10, 20
"""How many directions of a layer share a product: with 10 of 20 a draw is two products, with all of them one."""

FEWEST_SAMPLES = 4
"""Below it the signs of samples agree too often to tell channels apart."""

CHANNELS_PER_SAMPLE = 3
"""The noise of a product grows with its channels, and falls with the samples."""

WEIGHT_FLOOR = 0.3
"""Of the mean weight, what a direction in the middle of the fit, where it has none, still gets."""


def columns_for(outputs: int, *, nested: bool) -> int:
    """Return how many backward passes take the Gauss-Newton part of h, which leaves products the rest; 0: no split.

    Args:
        outputs: per sample.
        nested: whether the loss depends on what is inside the network, beside its output.
    """
    return outputs if outputs <= COLUMNS and not nested else 0


def ranks_for(n_layers: int, samples: int, columns: int = 0) -> int:
    """Return how many directions of each layer share a product: three channels for each sample, within bounds."""
    most = RANKS_OF_REST if columns else RANKS
    return min(max(CHANNELS_PER_SAMPLE * samples // max(n_layers, 1), LEAST_RANKS), most)


def draws_for(windows: Sequence[int], samples: int, ranks: int, draws: int, columns: int = 0) -> int:
    """Return how many draws at most: as many as `PRODUCTS` allows beside the columns, and no fewer than 2."""
    of_draw = max(math.ceil(max(windows, default=0) / ranks), 1)
    products = PRODUCTS * math.sqrt(max(1.0, 32 / max(samples, 1))) - COLUMN * columns
    return min(2 * draws if columns else draws, max(2, int(products / of_draw)))


def sketch_products(windows: Sequence[int], samples: int | None, columns: int = 0) -> tuple[int, int]:
    """Return the joint products of a sketch, at least and at most; of unknown samples those of many.

    >>> sketch_products([20, 10], 256), sketch_products([20, 10], 256, columns=10)
    ((4, 12), (2, 8))
    """
    samples = samples or 256
    ranks = ranks_for(len(windows), samples, columns)
    of_draw = math.ceil(max(windows, default=0) / ranks)
    return 2 * of_draw, draws_for(windows, samples, ranks, DRAWS, columns) * of_draw


@dataclass(frozen=True)
class SketchCurvature:
    """h_k of all layers and several k with one product, unbiased, with standard errors.

    Layers that cannot be moved at their outputs are measured by double backward.

    Args:
        draws: up to how often to measure each direction, at least 2, twice that where columns take a part of h; the
            noise falls with the square root.
        target_error: stop before that, once the standard error that h gives alpha is below it in the median layer.
        ranks: directions of a layer that share one product; None: so many that a product has three channels for
            each sample, from 2 to 10, or 20. With twice as many a draw costs half, and its noise is 1.4 times as large.
        seed: of the signs.
        cheap: refuse a loss that couples samples over as many outputs as there are directions, or more.

    Raises:
        ValueError: for an option out of range.
        MeasurementError: when called, if samples depend on each other or the batch does not tell their number.
        SecondDerivativeError: when called, if an operation after some layer has no second derivative.
    """

    draws: int = DRAWS
    target_error: float = TARGET_ERROR
    ranks: int | None = None
    seed: int = 0
    cheap: bool = False
    name: str = "sketch"
    differentiates_gradients: bool = False
    memory: float = 7.5

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise ValueError(f"draws must be at least 2, whose difference gives the standard errors, got {self.draws}")
        if not self.target_error >= 0:
            raise ValueError(f"target_error must not be negative, got {self.target_error}")
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"ranks must be None or at least 1, got {self.ranks}")

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure all layers that can be moved together, and the others one by one."""
        problem.run()
        seen = see_layers(problem, directions)
        if not seen.calls:
            return measured_exactly(problem, directions, seen.unseen)
        if names := custom_functions(problem.value):
            raise MeasurementError(f"the network holds custom autograd functions ({', '.join(names)}); {REMEDY}")
        moved = move_network(problem, seen, directions)
        return with_unseen(problem, directions, moved.unseen, self.name, lambda: self._measure(moved, problem))

    def _measure(self, moved: MovedNetwork, problem: DifferentiableLoss) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draw as often as it takes."""
        head = moved.head
        apart, splits = head.keeps_samples_apart(), not (head.is_flat or head.is_complex or head.cut.is_nested)
        if not apart and not splits:
            why = "of complex outputs" if head.is_complex else "and is no function of the outputs alone"
            raise MeasurementError(f"the loss couples samples, {why}; {REMEDY}")
        if self.cheap and not apart:
            refuse_dear_coupling(moved.graph, head)
        # Of <g, z> with g held, samples are apart whatever the loss couples. Such columns take the largest share of
        # the budget of products.
        columns = columns_for(head.outputs, nested=not splits) if apart else COLUMNS
        by_columns = by_all_outputs(moved, apart) if columns else {}
        if columns and moved.is_exact:
            return by_columns, {}
        place = problem.place or SampleRange(0, moved.graph.samples)
        products = _Products(moved, place, self.seed, head if columns else None)
        windows = [len(t) for t in products.triplets.values()]
        ranks = self.ranks or ranks_for(len(windows), place.total, columns)
        n_draws = draws_for(windows, place.total, ranks, self.draws, columns)
        few = place.total < FEWEST_SAMPLES or products.directions <= 3 * products.of_draw(ranks)
        if few:
            return _sum(products.one_by_one(), by_columns), {}
        # Other micro-batches of the batch average this one's error with theirs.
        share = products.samples / place.total
        draws: list[Draw] = []
        for _ in range(n_draws):
            draws.append(products.draw(ranks))
            if len(draws) > 1:
                mean, stderr = mean_and_error(draws)
                h = _sum(mean, by_columns)
                if is_precise(products.triplets, h, stderr, self.target_error, share):
                    break
        return h, stderr


class _Products:
    """Hessian-vector products with the amplitudes of all directions, on one retained graph.

    Args:
        head: leave out the part of the Hessian that bends in this head; None: of the whole loss.
    """

    def __init__(self, moved: MovedNetwork, place: SampleRange, seed: int, head: Head | None = None) -> None:
        graph = self.graph = moved.graph
        self.samples, self.place, self.generator = graph.samples, place, torch.Generator().manual_seed(seed)
        self.triplets, self.e = graph.triplets, list(graph.e.values())
        ends = [graph.loss] if head is None else list(head.edges)
        held = None if head is None else [g.detach() for g in head.gradients]
        gradients = torch.autograd.grad(ends, self.e, held, create_graph=True, allow_unused=True)
        self.bent = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        self.amplitude = {name: torch.ones(len(t), dtype=torch.float64) for name, t in self.triplets.items()}
        for (name, triplets), g in zip(self.triplets.items(), gradients, strict=True):
            largest = 0.0 if g is None or not g.numel() else float(g.detach().abs().max())
            if g is None or not 0 < largest < math.inf:
                continue
            # The square of a small gradient underflows, and its amplitude would be infinite, and NaN in all layers.
            size = (g.detach() / largest).square().sum(0).cpu().double()
            size = size.clamp(min=float(size.max()) * torch.finfo(torch.float32).eps)
            amplitude = (_weight(triplets.sigma) / size).sqrt() / largest
            self.amplitude[name] = amplitude.clamp(max=math.sqrt(torch.finfo(g.dtype).max))

    @property
    def directions(self) -> int:
        """Directions of all layers."""
        return sum(len(t) for t in self.triplets.values())

    def of_draw(self, ranks: int) -> int:
        """Return the number of products of a draw."""
        return math.ceil(max(len(t) for t in self.triplets.values()) / ranks)

    def one_by_one(self) -> dict[str, Tensor]:
        """Measure every direction in a product of its own, which has no cross terms."""
        h = {}
        for name, t in self.triplets.items():
            none = dict.fromkeys(self.triplets, torch.zeros(0, dtype=torch.long))
            alone = [self._readings(none | {name: torch.tensor([k])})[name] for k in range(len(t))]
            h[name] = torch.cat(alone).sum(1)
        return h

    def draw(self, ranks: int) -> Draw:
        """Measure every direction once, ``ranks`` of each layer in a product."""
        products = self.of_draw(ranks)
        parts = {
            name: torch.randperm(len(t), generator=self.generator).tensor_split(products)
            for name, t in self.triplets.items()
        }
        h = {name: torch.zeros(len(t), dtype=torch.float64) for name, t in self.triplets.items()}
        energy = {name: torch.zeros_like(value) for name, value in h.items()}
        for i in range(products):
            indices = {name: part[i] for name, part in parts.items()}
            for name, y_kb in self._readings(indices).items():
                h[name][indices[name]] = y_kb.sum(1)
                energy[name][indices[name]] = y_kb.square().sum(1)
        return Draw(h, energy)

    def _readings(self, indices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return per layer, for its directions in ``indices``, the samples' parts (k, B) of the estimates of h."""
        signs = torch.split(self._signs(sum(map(len, indices.values()))), [len(k) for k in indices.values()])
        seeds = []
        for (name, k), e, signs_kb in zip(indices.items(), self.e, signs, strict=True):
            seed = torch.zeros(e.shape, dtype=torch.float64)
            seed[:, k] = (signs_kb * self.amplitude[name][k, None]).T
            seeds.append(seed.to(e))
        product: list[Tensor | None] = [None] * len(self.e)
        if self.bent:
            with self.graph.only(indices):
                product = list(
                    torch.autograd.grad(
                        [g for _, g in self.bent],
                        self.e,
                        [seeds[i] for i, _ in self.bent],
                        retain_graph=True,
                        allow_unused=True,
                    )
                )
        readings = {}
        for (name, k), p_bk, signs_kb in zip(indices.items(), product, signs, strict=True):
            p_kb = torch.zeros(len(k), self.samples) if p_bk is None else p_bk[:, k.to(p_bk.device)].T.cpu()
            readings[name] = p_kb.double() * signs_kb / self.amplitude[name][k, None]
        return readings

    def _signs(self, channels: int) -> Tensor:
        """Return (channels, B) signs, orthogonal between channels of a group on every full block of samples.

        They are drawn for all samples measured, of which these may be a micro-batch: all of them share blocks. A group
        has as many channels as a block has samples, at most; its block comes with random signs of its own.
        """
        total = self.place.total
        size = min(1 << (channels - 1).bit_length(), 1 << (total.bit_length() - 1))
        blocked = total // size * size
        signs = torch.randint(0, 2, (channels, total), generator=self.generator) * 2 - 1
        for group in torch.split(signs, size):
            rows = torch.randperm(size, generator=self.generator)[: len(group)]
            group[:, :blocked] = group[0, :blocked] * _hadamard(size)[rows].repeat(1, blocked // size)
        order = torch.randperm(total, generator=self.generator)
        return signs[:, order[self.place.first : self.place.first + self.samples]]


def _sum(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: h + other[name] if name in other else h for name, h in one.items()}


def _weight(sigma: Tensor) -> Tensor:
    """Return (K,) how much an error of log h_k moves the slope of log h on log sigma, around 1."""
    log_sigma = sigma.detach().cpu().double().log()
    distance = (log_sigma - log_sigma.mean()).abs()
    # Directions may come without values: then all weigh the same.
    return WEIGHT_FLOOR + (distance / distance.mean()).nan_to_num(1.0)


def _hadamard(size: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.long)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
