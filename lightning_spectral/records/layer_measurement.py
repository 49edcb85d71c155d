"""Raw result of measuring one layer: all that its fits are made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.numerics.gradient_noise import UNKNOWN_NOISE, GradientNoise


@dataclass(frozen=True, eq=False)
class LayerMeasurement:
    """Singular values of one layer's gradient and the curvatures along them, in float64 on the CPU.

    Attributes:
        name, kind, shape, groups: as in `LayerSpectrum`.
        sigma: (K,) leading singular values of the gradient, decreasing and not negative.
        h: (K,) curvatures, in the order of sigma.
        noise_floor: largest singular value that is rounding noise.
        method: name of the method that measured h.
        h_stderr: (K,) standard errors of h; None: zeros.
        spectrum: (K',) singular values for the rank models, the first K of them sigma; None: sigma.
        gradient_noise: signal and sampling noise of the gradient.
        note: reason for a missing h; empty where there is none.
        alignment_note: reason for a missing alignment that was asked for.

    Raises:
        ValueError: if sigma, h and h_stderr are not of one length.
    """

    name: str
    shape: tuple[int, int]
    sigma: Tensor
    h: Tensor
    noise_floor: float
    kind: str = "dense"
    groups: int = 1
    method: str = "exact"
    h_stderr: Tensor | None = None
    spectrum: Tensor | None = None
    gradient_noise: GradientNoise = UNKNOWN_NOISE
    note: str = ""
    alignment_note: str = ""

    def __post_init__(self) -> None:
        """Fill in the defaults and convert all tensors."""
        if self.sigma.shape != self.h.shape or self.sigma.ndim != 1:
            raise ValueError(f"sigma and h must be (K,), got {tuple(self.sigma.shape)} and {tuple(self.h.shape)}")
        if self.h_stderr is not None and self.h_stderr.shape != self.h.shape:
            raise ValueError(f"h_stderr must be (K,) as h, got {tuple(self.h_stderr.shape)}")
        tensors = {
            "sigma": self.sigma,
            "h": self.h,
            "h_stderr": torch.zeros_like(self.h) if self.h_stderr is None else self.h_stderr,
            "spectrum": self.sigma if self.spectrum is None else self.spectrum,
        }
        for name, tensor in tensors.items():
            object.__setattr__(self, name, tensor.detach().to("cpu", torch.float64))
