"""Directional curvatures h_k = vec(u_k v_k^T)^T H vec(u_k v_k^T), H the Hessian block of one layer."""

from lightning_spectral.curvature.hutchinson import HutchinsonTrace
from lightning_spectral.curvature.output_hessian import loss_normalizer
from lightning_spectral.curvature.problem import Curvature, Curvatures, Gradients, Place, Problem
from lightning_spectral.curvature.select import METHODS, check_method, measure_by

__all__ = [
    "METHODS",
    "Curvature",
    "Curvatures",
    "Gradients",
    "HutchinsonTrace",
    "Place",
    "Problem",
    "check_method",
    "loss_normalizer",
    "measure_by",
]
