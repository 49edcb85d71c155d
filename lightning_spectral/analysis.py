"""What a report says beside the paper: kinds of layers against its ranges."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_spectral.record import SpectralReport, median

PAPER_ALPHA: dict[str, str] = {
    "conv": "1.94 to 2.17 (ResNet-18, VGG-11, ResNet-50)",
    "dense": "2.18 (MLP)",
    "head": "1.23 to 1.65 (10 classes), 0.90 (200), 2.83 (1000), 4.53 (small GPT)",
    "attention_qkv": "1.43 (small GPT)",
    "attention_out": "1.17 (small GPT)",
    "mlp_up": "0.84 (small GPT)",
    "mlp_down": "1.15 (small GPT)",
}
"""alpha by kind of layer as arXiv 2606.02596 reports it: means, or the range of means over networks."""

PAPER_RANGES: dict[str, tuple[float, float]] = {
    "conv": (1.94, 2.17), "dense": (2.18, 2.18), "attention_qkv": (1.43, 1.43), "attention_out": (1.17, 1.17),
    "mlp_up": (0.84, 0.84), "mlp_down": (1.15, 1.15),
}  # fmt: skip
"""The same as (lowest, highest), but for heads, whose alpha goes with the number of classes."""


@dataclass(frozen=True)
class KindSummary:
    """Medians over the layers of one kind, NaN left out, and what the paper reports.

    Attributes:
        kind: of the layers.
        layers: how many there are.
        alpha, gamma, s, transfer_error, pr_curvature: medians.
        paper_alpha: the paper's figures in words; empty where it has none.
    """

    kind: str
    layers: int
    alpha: float
    gamma: float
    s: float
    transfer_error: float
    pr_curvature: float
    paper_alpha: str


def compare_kinds(report: SpectralReport) -> list[KindSummary]:
    """The median layer of each kind beside the paper's range, kinds in the order of the network."""
    return [
        KindSummary(
            kind=kind,
            layers=len(layers),
            alpha=median([x.alpha.exponent for x in layers]),
            gamma=median([x.gamma.exponent for x in layers]),
            s=median([x.s.exponent for x in layers]),
            transfer_error=median([x.transfer_error for x in layers]),
            pr_curvature=median([x.pr_curvature for x in layers]),
            paper_alpha=PAPER_ALPHA.get(kind, ""),
        )
        for kind, layers in report.by_kind().items()
    ]
