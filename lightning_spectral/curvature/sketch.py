"""Exact Hessian curvature in expectation: one Hessian-vector product per direction index serves all layers.

Each layer's output is moved in the direction eps_lb u_k (v_k^T a_b), with a random sign for each layer l and sample b,
and h_lk = sum_b eps_lb <u_k (v_k^T a_b), (H D)_lb> is read back. Terms between layers carry eps_lb eps_l'b, whose mean
is zero; within one layer samples do not interact, so its own terms are complete. K products measure all layers.

Signs are rows of a Hadamard matrix over randomly ordered samples: the products of two layers' signs add up to zero
exactly, so the part of the cross terms that all samples share cancels, and only its scatter over samples remains.
Directions are scaled by 1 / sqrt(h), from a first product that gives every sample another direction index, so that no
stiff layer drowns a soft one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.curvature.ggn import half_alone, output_hessians
from lightning_spectral.curvature.opaque import custom_functions
from lightning_spectral.curvature.problem import Curvatures, Problem, accumulation_dtype, cause_of
from lightning_spectral.curvature.taps import (
    REMEDY,
    Tap,
    check_samples_apart,
    groups_of,
    half_of,
    measured_exactly,
    tapped,
)
from lightning_spectral.curvature.trace import Recorder
from lightning_spectral.errors import MeasurementError, SecondDerivativeError
from lightning_spectral.fits import fit_power_law
from lightning_spectral.svd import SingularTriplets

CALIBRATION = 2
"""Direction indices that get a second product, from which the standard errors of all come."""


@dataclass(frozen=True)
class SketchCurvature:
    """h_k with one product for all layers at once, unbiased, with standard errors.

    Layers that are not applied exactly once as a linear layer or convolution are measured by double backward.

    Args:
        draws: how many times to repeat it with other signs; the noise falls with the square root.
        calibration: direction indices that get a second product.
        seed: of the signs.

    Raises:
        MeasurementError: when called, if samples depend on each other or the batch does not tell their number.
        SecondDerivativeError: when called, if an operation after some layer has no second derivative.
    """

    draws: int = 1
    calibration: int = CALIBRATION
    seed: int = 0
    name: str = "sketch"
    differentiates_gradients: bool = False
    memory: float = 6.5

    def __call__(self, problem: Problem, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure all layers that can be tapped together, and the rest one by one."""
        problem.gradients(keep_graph=False)
        taps, rest = tapped(problem, directions)
        others = measured_exactly(problem, directions, rest)
        if not taps:
            return others
        if names := custom_functions(problem.value):
            raise MeasurementError(f"the network holds custom autograd functions ({', '.join(names)}); {REMEDY}")
        try:
            h, stderr = self._measure(problem, taps, directions)
        except (MeasurementError, torch.cuda.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise SecondDerivativeError(cause_of(error)) from error
        return Curvatures(h | others.h, self.name, others.failed, stderr, others.methods, others.notes)

    def _measure(
        self, problem: Problem, taps: dict[str, Tap], directions: Mapping[str, SingularTriplets]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        products = _Products(problem, taps, directions, torch.Generator().manual_seed(self.seed))
        try:
            outputs = output_hessians(problem)
        except MeasurementError:
            check_samples_apart(products.taps, products.half_alone())
        else:
            for output in outputs:
                check_samples_apart(taps, half_alone(output, taps))
        return products.measure(self.draws, self.calibration)


class _Products:
    """Hessian-vector products with moves of the layers' outputs, on one retained graph."""

    def __init__(
        self,
        problem: Problem,
        taps: Mapping[str, Tap],
        directions: Mapping[str, SingularTriplets],
        generator: torch.Generator,
    ) -> None:
        assert problem.samples is not None
        self.samples, self.generator = problem.samples, generator
        self.taps, self.zeros, self.gradients = _perturbed(problem, taps)
        self.triplets = {name: directions[name] for name in taps}
        self.right = {
            n: t.right(self.triplets[n].v, groups_of(t.layer, self.triplets[n])) for n, t in self.taps.items()
        }
        self.scale = {name: torch.ones(len(self.triplets[name])) for name in taps}
        self.k = max(len(t) for t in self.triplets.values())

    def half_alone(self) -> dict[str, Tensor]:
        """H D for a D that moves half of the samples."""
        rank = torch.where(half_of(self.samples), 0, -1)
        return self._product(self._moves(rank, self._signs()))

    def measure(self, draws: int, calibration: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self._set_scale()
        h = {name: torch.zeros(len(t), dtype=torch.float64) for name, t in self.triplets.items()}
        energy = {name: torch.zeros_like(value) for name, value in h.items()}
        noise = {name: torch.zeros(2, dtype=torch.float64) for name in h}
        calibrated = set(torch.linspace(0, self.k - 1, min(calibration, self.k)).round().int().tolist())
        for draw in range(draws):
            for k in range(self.k):
                signs = self._signs()
                y = self._curvatures(k, signs)
                for name, y_b in y.items():
                    h[name][k] += y_b.sum() / draws
                    energy[name][k] += y_b.square().sum() / draws**2
                if draw == 0 and k in calibrated:
                    self._calibrate(k, signs, y, noise)
        stderr = {n: (energy[n] * noise[n][0] / noise[n][1]).sqrt() for n in h}
        return h, stderr

    def _calibrate(self, k: int, signs: Tensor, y: Mapping[str, Tensor], noise: dict[str, Tensor]) -> None:
        """Add the cross terms' energy and the readings' energy of one index.

        Half of the layers change sign: what changes in a reading are its cross terms with the other half, whose energy
        is, over the choice of halves, half of the whole.
        """
        flips = torch.ones(len(self.taps))
        flips[torch.randperm(len(self.taps), generator=self.generator)[: len(self.taps) // 2]] = -1
        again = self._curvatures(k, signs * flips[:, None])
        layers = len(self.taps)
        others = {name: (layers // 2 if flips[i] > 0 else layers - layers // 2) for i, name in enumerate(self.taps)}
        for name, y_b in y.items():
            cross = ((y_b - again[name]) / 2).square().sum()
            noise[name] += torch.stack([cross * (layers - 1) / max(others[name], 1), y_b.square().sum()])

    def _curvatures(self, k: int, signs: Tensor) -> dict[str, Tensor]:
        """Per layer that has a direction k, the readings (B,) whose sum estimates its h_k."""
        moves = self._moves(torch.full((self.samples,), k), signs)
        products = self._product(moves)
        return {
            name: self._reading(name, moves[name], products[name]) / float(self.scale[name][k]) ** 2
            for name in self.taps
            if k < len(self.triplets[name])
        }

    def _reading(self, name: str, move: Tensor, product: Tensor) -> Tensor:
        inner = self.taps[name].by_sample(move) * self.taps[name].by_sample(product)
        return inner.sum((1, 2), dtype=accumulation_dtype(inner)).cpu().double()

    def _set_scale(self) -> None:
        """1 / sqrt(h) along a power law in sigma through a first estimate, each index on some of the samples."""
        order = torch.randperm(self.samples, generator=self.generator)
        rank = torch.empty(self.samples, dtype=torch.long)
        rank[order] = torch.arange(self.samples) % self.k
        moves = self._moves(rank, self._signs())
        products = self._product(moves)
        counts = torch.bincount(rank, minlength=self.k).double()
        for name, triplets in self.triplets.items():
            y_b = self._reading(name, moves[name], products[name])
            h = torch.zeros(self.k, dtype=torch.float64).index_add_(0, rank, y_b) * self.samples / counts.clamp(min=1)
            sigma = triplets.sigma.detach().double().cpu()
            fit = fit_power_law(sigma, h[: len(triplets)].abs())
            level = (fit.intercept + fit.exponent * sigma.log()).exp()
            if not bool(level.isfinite().all()):
                level = h[: len(triplets)].abs().mean().clamp(min=torch.finfo(torch.float64).tiny).expand(len(triplets))
            self.scale[name] = level.rsqrt()

    def _moves(self, rank: Tensor, signs: Tensor) -> dict[str, Tensor]:
        """eps_lb scale_k u_k (v_k^T a_b) with k = rank_b; zero where the layer has no such direction."""
        moves = {}
        for i, (name, tap) in enumerate(self.taps.items()):
            triplets = self.triplets[name]
            right = self.right[name]
            there = (rank >= 0) & (rank < len(triplets))
            k = rank.clamp(0, len(triplets) - 1)
            factor = (signs[i] * there * self.scale[name][k]).to(right)
            device_k = k.to(right.device)
            v_bp = right[torch.arange(self.samples, device=right.device), device_k] * factor[:, None]
            moves[name] = tap.moved(triplets.u.T.to(right)[device_k], v_bp)
        return moves

    def _product(self, moves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        products = torch.autograd.grad(
            self.gradients, self.zeros, list(moves.values()), retain_graph=True, allow_unused=True
        )
        return {
            name: torch.zeros_like(zero) if product is None else product
            for name, zero, product in zip(self.taps, self.zeros, products, strict=True)
        }

    def _signs(self) -> Tensor:
        """(layers, B) signs, orthogonal between layers on every full block of samples."""
        size = 1 << (len(self.taps) - 1).bit_length()
        rows = torch.randperm(size, generator=self.generator)[: len(self.taps)]
        blocks = self.samples // size
        signs = torch.randint(0, 2, (len(self.taps), self.samples), generator=self.generator) * 2 - 1
        if blocks:
            signs[:, : blocks * size] = _hadamard(size)[rows].repeat(1, blocks)
        return signs[:, torch.randperm(self.samples, generator=self.generator)]


def _perturbed(problem: Problem, taps: Mapping[str, Tap]) -> tuple[dict[str, Tap], list[Tensor], list[Tensor]]:
    """Another forward pass with zeros added to the layers' outputs: taps on it, the zeros, the gradients in them."""
    leaves = {id(problem.parameters[name]) for name in taps}
    # Only the zeros are differentiated in; without weights in its graph a product costs a quarter less. What is
    # checkpointed is computed again in each product, with weights that require a gradient, and must save the same.
    weights = [leaf for leaf in problem.parameters.values() if leaf.requires_grad and not problem.trace.hooked]
    for leaf in weights:
        leaf.requires_grad_(False)
    try:
        with Recorder(leaves, add_zeros=True) as recorder:
            loss = problem.evaluate()
    finally:
        for leaf in weights:
            leaf.requires_grad_(True)
    uses = recorder.trace.uses
    if any(len(found) != 1 for found in uses.values()) or len(uses) != len(leaves):
        raise MeasurementError("the loss does not compute the same at each call; use curvature='exact'")
    new = {n: Tap(t.layer, uses[id(problem.parameters[n])][0], t.samples, t.shape) for n, t in taps.items()}
    zeros = [tap.use.zero for tap in new.values() if tap.use.zero is not None]
    gradients = {}
    for zero, gradient in zip(zeros, torch.autograd.grad(loss, zeros, create_graph=True), strict=True):
        gradients[id(zero)] = gradient
    return new, zeros, [gradients[id(zero)] for zero in zeros]


def _hadamard(size: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.long)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
