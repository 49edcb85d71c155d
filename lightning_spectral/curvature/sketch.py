"""Exact Hessian curvature in expectation: one Hessian-vector product serves all layers and several directions of each.

A channel is a layer l and one of its directions k. Each layer's output is moved along the sum of its channels' moves
eps_lkb u_k (v_k^T a_b), with a random sign for each channel and sample b, and h_lk = sum_b eps_lkb <u_k (v_k^T a_b),
(H D)_lb> is read back. Terms between channels carry the product of two signs, whose mean is zero; within one channel
samples do not interact, so its own terms are complete. What keeps the rest small:

- Which directions of the layers meet in a product is drawn anew for each draw: those of one rank k in all layers
  belong to the same feature of the data and have larger terms with each other than others.
- Signs are rows of a Hadamard matrix over randomly ordered samples: the products of two channels' signs add up to zero
  exactly, so the part of the cross terms that all samples share cancels, and only its scatter over samples remains.
- A channel's amplitude squared is w_k / h_k, with a first estimate of h and the weight w_k that an error of log h_k has
  in the slope of log h on log sigma. Errors of h_i through h_j then have variance proportional to h_i^2 w_j / w_i, and
  these amplitudes have the smallest sum of w_i^2 var(log h_i), the variance of alpha.
- Standard errors come from what the draws differ by. Where there are so few channels that a product for each of them
  costs no more, there is one: the few signs of few samples would often agree by chance, and the error not show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.curvature.custom_functions import custom_functions
from lightning_spectral.curvature.draws import Draw, alpha_error, mean_and_error
from lightning_spectral.curvature.gauss_newton import output_hessians
from lightning_spectral.curvature.layer_taps import (
    REMEDY,
    Tap,
    check_samples_apart,
    groups_of,
    half_of,
    measured_exactly,
    tapped,
)
from lightning_spectral.curvature.output_hessian import OutputHessian
from lightning_spectral.curvature.output_perturbations import add_output_perturbations
from lightning_spectral.curvature.problem import (
    Curvatures,
    DifferentiableLoss,
    SampleRange,
    accumulation_dtype,
    cause_of,
)
from lightning_spectral.errors import MeasurementError, SecondDerivativeError, is_out_of_memory
from lightning_spectral.numerics.svd import SingularTriplets

DRAWS = 3
"""Up to how often all directions are measured: 12 products for 20 directions, 5 in a product."""

TARGET_ERROR = 0.01
"""Standard error of alpha, from that of h, below which no further draw is worth its time."""

RANKS = 5
"""Up to how many directions of a layer share a product; with more of them, little of the time goes into products."""

SAMPLES_PER_RANK = 16
"""The noise of h falls with the samples and grows with the channels, so a smaller batch bears fewer of them."""

WEIGHT_FLOOR = 0.3
"""Of the mean weight, what a direction in the middle of the fit, where it has none, still gets."""


@dataclass(frozen=True)
class SketchCurvature:
    """h_k of all layers and several k with one product, unbiased, with standard errors.

    Layers that are not applied exactly once as a linear layer or convolution are measured by double backward.

    Args:
        draws: up to how often to measure each direction, at least 2; the noise falls with the square root.
        target_error: stop before that, once the standard error that h gives alpha in the median layer is this small.
        ranks: directions of a layer that share one product; None: one per 16 samples, at most 5. With twice as many
            a draw costs half, and its noise is 1.4 times as large.
        seed: of the signs.

    Raises:
        ValueError: for an option out of range.
        MeasurementError: when called, if samples depend on each other or the batch does not tell their number.
        SecondDerivativeError: when called, if an operation after some layer has no second derivative.
    """

    draws: int = DRAWS
    target_error: float = TARGET_ERROR
    ranks: int | None = None
    seed: int = 0
    name: str = "sketch"
    differentiates_gradients: bool = False
    memory: float = 7.5

    def __post_init__(self) -> None:
        """Check the options."""
        if self.draws < 2:
            raise ValueError(f"draws must be at least 2, whose difference gives the standard errors, got {self.draws}")
        if not self.target_error >= 0:
            raise ValueError(f"target_error must not be negative, got {self.target_error}")
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"ranks must be None or at least 1, got {self.ranks}")

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure all layers that can be tapped together, and the rest one by one."""
        problem.run()
        taps, apart = tapped(problem, directions)
        exact = measured_exactly(problem, directions, apart)
        if not taps:
            return exact
        if names := custom_functions(problem.value):
            raise MeasurementError(f"the network holds custom autograd functions ({', '.join(names)}); {REMEDY}")
        try:
            h, stderr = self._measure(problem, taps, directions)
        except MeasurementError:
            raise
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise SecondDerivativeError(cause_of(error)) from error
        return Curvatures(h | exact.h, self.name, exact.failed, stderr, exact.methods, exact.notes)

    def _measure(
        self, problem: DifferentiableLoss, taps: dict[str, Tap], directions: Mapping[str, SingularTriplets]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        products = _Products(problem, taps, directions, self.seed)
        try:
            outputs = output_hessians(problem)
        except MeasurementError:
            check_samples_apart(products.taps, products.half_alone())
            # Without the output's Hessian, the squared gradients of the samples have to do.
            products.set_amplitudes(dict(zip(taps, products.gradients, strict=True)))
        else:
            columns = _random_columns(outputs, taps, self.seed)
            check_samples_apart(taps, columns)
            products.set_amplitudes(columns)
        return self._draw_until_precise(products)

    def _draw_until_precise(self, products: _Products) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draw as often as it takes."""
        ranks = self.ranks or min(max(products.place.total // SAMPLES_PER_RANK, 1), RANKS)
        if products.directions <= DRAWS * products.of_draw(ranks):
            return products.one_by_one(), {}
        # Other micro-batches of the batch average this one's error with theirs.
        target = self.target_error * math.sqrt(products.place.total / products.samples)
        draws: list[Draw] = []
        for _ in range(self.draws):
            draws.append(products.draw(ranks))
            if len(draws) > 1:
                h, stderr = mean_and_error(draws)
                if alpha_error(products.triplets, h, stderr) <= target:
                    break
        return h, stderr


class _Products:
    """Hessian-vector products with moves of the layers' outputs, on one retained graph."""

    def __init__(
        self,
        problem: DifferentiableLoss,
        taps: Mapping[str, Tap],
        directions: Mapping[str, SingularTriplets],
        seed: int,
    ) -> None:
        assert problem.samples is not None
        self.samples, self.generator = problem.samples, torch.Generator().manual_seed(seed)
        self.place = problem.place or SampleRange(0, problem.samples)
        self.taps, self.zeros, self.gradients = add_output_perturbations(problem, taps)
        self.triplets = {name: directions[name] for name in taps}
        self.right = {
            n: t.right(self.triplets[n].v, groups_of(t.layer, self.triplets[n])) for n, t in self.taps.items()
        }
        self.amplitude = {name: torch.ones(len(t), dtype=torch.float64) for name, t in self.triplets.items()}

    def half_alone(self) -> dict[str, Tensor]:
        """Return H D for a D that moves half of the samples."""
        signs = half_of(self.samples).double().expand(len(self.taps), -1)
        return self._product({name: torch.zeros(1, dtype=torch.long) for name in self.taps}, signs)

    def set_amplitudes(self, columns: Mapping[str, Tensor | None]) -> None:
        """Return sqrt(w / h), h_k = sum_b (sum_p (u_k^T r_bp)(v_k^T a_bp))^2 for tensors r like the layers' outputs."""
        for name, triplets in self.triplets.items():
            r = columns[name]
            if r is None:
                continue
            h = self._inner(name, torch.arange(len(triplets)), r.detach()).square().sum(1)
            h = h.clamp(min=float(h.max()) * torch.finfo(torch.float32).eps)
            self.amplitude[name] = (_weight(triplets.sigma) / h.where(h > 0, 1)).sqrt()

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
        signs = self._signs(sum(len(k) for k in indices.values()))
        product = self._product(indices, signs)
        readings = {}
        for (name, k), signs_kb in zip(indices.items(), self._by_layer(indices, signs), strict=True):
            readings[name] = self._inner(name, k, product[name]) * signs_kb / self.amplitude[name][k, None]
        return readings

    def _inner(self, name: str, k: Tensor, r: Tensor) -> Tensor:
        """Return (k, B) of sum_p (u_k^T r_bp)(v_k^T a_bp)."""
        left_bkp = self.taps[name].left(r, self.triplets[name].u[:, k])
        inner = (left_bkp * self.right[name][:, k]).sum(2, dtype=accumulation_dtype(r))
        return inner.T.cpu().double()

    def _product(self, indices: Mapping[str, Tensor], signs: Tensor) -> dict[str, Tensor]:
        """Return H D with D the sum over the channels of signs_b amplitude_k u_k (v_k^T a_b)."""
        moves = []
        for (name, k), signs_kb in zip(indices.items(), self._by_layer(indices, signs), strict=True):
            right = self.right[name]
            factor = (signs_kb * self.amplitude[name][k, None]).T.to(right)
            moves.append(self.taps[name].moved(self.triplets[name].u[:, k], right[:, k] * factor[:, :, None]))
        products = torch.autograd.grad(self.gradients, self.zeros, moves, retain_graph=True, allow_unused=True)
        return {
            name: torch.zeros_like(zero) if product is None else product
            for name, zero, product in zip(self.taps, self.zeros, products, strict=True)
        }

    @staticmethod
    def _by_layer(indices: Mapping[str, Tensor], signs: Tensor) -> tuple[Tensor, ...]:
        return torch.split(signs, [len(k) for k in indices.values()])

    def _signs(self, channels: int) -> Tensor:
        """Return (channels, B) signs, orthogonal between channels on every full block of samples.

        They are drawn for all samples measured, of which these may be a micro-batch: all of them share blocks.
        """
        size, total = 1 << (channels - 1).bit_length(), self.place.total
        rows = torch.randperm(size, generator=self.generator)[:channels]
        blocks = total // size
        signs = torch.randint(0, 2, (channels, total), generator=self.generator) * 2 - 1
        if blocks:
            signs[:, : blocks * size] = _hadamard(size)[rows].repeat(1, blocks)
        order = torch.randperm(total, generator=self.generator)
        return signs[:, order[self.place.first : self.place.first + self.samples]]


def _random_columns(outputs: list[OutputHessian], taps: Mapping[str, Tap], seed: int) -> dict[str, Tensor | None]:
    """Return per layer the backward pass of a random column of the root of half of the samples' output Hessian."""
    generator = torch.Generator().manual_seed(seed)
    columns = [output.random(generator) for output in outputs]
    for output, column in zip(outputs, columns, strict=True):
        rows = half_of(output.samples).repeat_interleave(column.shape[0] // output.samples)
        column[~rows.to(column.device)] = 0
    z = [tap.edge for tap in taps.values()]
    passed_back = torch.autograd.grad(
        [output.output for output in outputs], z, columns, retain_graph=True, allow_unused=True
    )
    return dict(zip(taps, passed_back, strict=True))


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
