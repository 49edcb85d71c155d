"""Directional curvatures h_k = vec(u_k v_k^T)^T H vec(u_k v_k^T), H the Hessian block of one layer."""

from lightning_spectral.curvature.exact import LOSS, STEP, StepProducts
from lightning_spectral.curvature.forward_recorder import LossValue, Recorder, loss_value
from lightning_spectral.curvature.graph_kinds import graph_kinds
from lightning_spectral.curvature.hessian_trace import HutchinsonTrace
from lightning_spectral.curvature.problem import (
    Curvature,
    Curvatures,
    DifferentiableLoss,
    Gradients,
    SampleRange,
    together_or_alone,
)
from lightning_spectral.curvature.products import TRANSPOSED, LayerCall
from lightning_spectral.curvature.seen_layers import not_matrices
from lightning_spectral.curvature.selection import METHODS, LossProperties, check_method
from lightning_spectral.curvature.static_analysis import FakeLoss, Structure, structure

__all__ = [
    "LOSS", "METHODS", "STEP", "TRANSPOSED", "Curvature", "Curvatures", "DifferentiableLoss", "FakeLoss", "Gradients",
    "HutchinsonTrace", "LayerCall", "LossProperties", "LossValue", "Recorder", "SampleRange", "StepProducts",
    "Structure", "check_method", "graph_kinds", "loss_value", "not_matrices", "structure",
    "together_or_alone",
]  # fmt: skip
