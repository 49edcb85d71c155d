"""A forward pass with a leaf of zeros added to each layer's output, to differentiate in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_spectral.curvature.forward_recorder import Recorder
from lightning_spectral.curvature.layer_taps import Tap
from lightning_spectral.curvature.problem import DifferentiableLoss
from lightning_spectral.errors import MeasurementError


def add_output_perturbations(
    problem: DifferentiableLoss, taps: Mapping[str, Tap]
) -> tuple[dict[str, Tap], list[Tensor], list[Tensor]]:
    """Run another forward pass with zeros added to the layers' outputs; return taps, zeros, gradients in them."""
    leaves = {id(problem.parameters[name]) for name in taps}
    # Only the zeros are differentiated in; without weights in its graph a product costs a quarter less. What is
    # checkpointed is computed again in each product, with weights that require a gradient, and must save the same.
    weights = [leaf for leaf in problem.parameters.values() if leaf.requires_grad and not problem.trace.hooked]
    for leaf in weights:
        leaf.requires_grad_(False)
    try:
        with Recorder(leaves, add_zeros=True, cheap=not problem.trace.hooked) as recorder:
            loss = problem.evaluate()
    finally:
        for leaf in weights:
            leaf.requires_grad_(True)
    calls = recorder.trace.calls
    if any(len(of_leaf) != 1 for of_leaf in calls.values()) or len(calls) != len(leaves):
        raise MeasurementError("the loss does not compute the same at each call; use curvature='exact'")
    new = {n: Tap(t.layer, calls[id(problem.parameters[n])][0], t.samples, t.shape) for n, t in taps.items()}
    zeros = [tap.call.zero for tap in new.values() if tap.call.zero is not None]
    gradients = {}
    for zero, gradient in zip(zeros, torch.autograd.grad(loss, zeros, create_graph=True), strict=True):
        gradients[id(zero)] = gradient
    return new, zeros, [gradients[id(zero)] for zero in zeros]
