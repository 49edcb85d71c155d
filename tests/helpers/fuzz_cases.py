"""What the fuzz test measures: a network of genes, a loss, a batch and options, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_blocks import ACTIVATIONS, IMAGE, SEQUENCE, VECTOR, WRAPS, Gene, block
from hypothesis import strategies as st
from torch import nn

VOCABULARY = 7
FRONTS = {"vector": VECTOR, "sequence": SEQUENCE, "tokens": SEQUENCE, "image1": IMAGE, "image2": IMAGE, "image3": IMAGE}
SIZES = {"image1": (6,), "image2": (4, 4), "image3": (3, 3, 3)}
DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """Of the network's output z (N, C, ...) and targets.

    Attributes:
        kind: of `criterion`.
        total: sum instead of mean.
        choice: of what the kind has to choose from.
        scale: what it is multiplied by.
        decay: a term of the head's weights beside.
    """

    kind: str
    total: bool = False
    choice: int = 0
    scale: float = 1.0
    decay: bool = False


@dataclass(frozen=True)
class Case:
    """A network, its loss and its data."""

    front: str
    genes: tuple[Gene, ...]
    back: tuple[Gene, ...]
    pooled: bool
    tied: bool
    classes: int
    samples: int
    loss: Loss
    dtype: str = "float32"
    nan_sample: bool = False
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[Net, tuple[torch.Tensor, ...]]:
        """The network and one batch for it."""
        torch.manual_seed(self.seed)
        x = self._inputs()
        net = Net(self, x)
        with torch.no_grad():
            z = net.eval()(x)
        dtype = DTYPES[self.dtype]
        net.train().to(dtype)
        for part in net.modules():
            if getattr(part, "how", "") in ("wide", "half"):
                part.inner.to({"wide": torch.float64, "half": torch.bfloat16}[part.how])
        if self.nan_sample and x.is_floating_point():
            x[-1] = torch.nan
        x = x.to(dtype) if x.is_floating_point() else x
        return net, (x, torch.randint(0, self.classes, (z.shape[0], *z.shape[2:])), torch.rand(z.shape).to(dtype))

    @property
    def casts(self) -> bool:
        """Whether the network goes down to bfloat16 by itself, so that nothing measured is precise."""
        return any(gene.wrap == "cast" for gene in (*self.genes, *self.back))

    @property
    def adds_up(self) -> bool:
        """Whether the loss is a mean or sum over samples."""
        mixing = any(
            g.wrap == "dropout" or g.kind in ("norm", "image_norm", "encoder") for g in (*self.genes, *self.back)
        )
        if self.loss.kind in ("across", "per_sample") or (mixing and self.options["mode"] == "train"):
            return False
        return not (self.loss.decay and (self.loss.total or self.loss.kind == "linear"))

    def _inputs(self) -> torch.Tensor:
        n = self.samples
        if self.front == "tokens":
            return torch.randint(0, VOCABULARY, (n, 4))
        shape = {"vector": (5,), "sequence": (3, 4)}.get(self.front) or (2, *SIZES[self.front])
        return torch.randn(n, *shape)


class Net(nn.Module):
    """Blocks, and a head on top of their output, of one position or of each."""

    def __init__(self, case: Case, x: torch.Tensor) -> None:
        super().__init__()
        self.case = case
        self.tokens = nn.Embedding(VOCABULARY, 4) if case.front == "tokens" else None
        self.front, self.back = nn.ModuleList(), nn.ModuleList()
        with torch.no_grad():
            x = x if self.tokens is None else self.tokens(x)
            for gene in case.genes:
                self.front.append(block(gene, x).eval())
                x = self.front[-1](x)
            x = self._vectors(x)
            for gene in case.back:
                self.back.append(block(gene, x).eval())
                x = self.back[-1](x)
        outs = VOCABULARY if self._ties(x) else case.classes
        self.head = nn.Linear(x.shape[-1], outs)
        if self._ties(x):
            self.head.weight = self.tokens.weight

    def _ties(self, x: torch.Tensor) -> bool:
        return self.case.tied and self.tokens is not None and x.shape[-1] == 4

    def _vectors(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D), or (N, positions, D) where each position has an output."""
        if x.ndim == 2:
            return x
        x = x.transpose(1, 2) if self.case.front in ("sequence", "tokens") else x.flatten(2)
        if not self.case.pooled:
            return x.transpose(1, 2)
        return x.mean(2) if self.case.seed % 2 else x.flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.tokens is None else self.tokens(x)
        for part in self.front:
            x = part(x)
        x = self._vectors(x)
        for part in self.back:
            x = part(x)
        z = self.head(x)[..., : self.case.classes]
        return z.movedim(-1, 1)


def loss_of(net: Net, batch: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """The case's loss of a batch."""
    loss = criterion(net.case.loss, net(batch[0]), batch[1], batch[2])
    if net.case.loss.decay and loss is not None:
        loss = loss + 0.1 * net.head.weight.square().sum()
    return loss


def criterion(loss: Loss, z: torch.Tensor, y: torch.Tensor, soft: torch.Tensor) -> torch.Tensor | None:
    """Its value. z and soft: (N, C, ...); y: (N, ...) classes."""
    if loss.kind == "none":
        return None
    return loss.scale * CRITERIA[loss.kind](loss, z, y, soft)


def _reduced(loss: Loss) -> dict[str, str]:
    return {"reduction": "sum" if loss.total else "mean"}


def _cross_entropy(loss, z, y, soft):
    weight = torch.linspace(0.2, 2.0, z.shape[1], dtype=z.dtype) if loss.choice % 2 else None
    ignored = 0 if loss.choice % 3 == 0 else -100
    smoothing = 0.1 if loss.choice % 5 == 0 else 0.0
    return F.cross_entropy(z, y, weight=weight, ignore_index=ignored, label_smoothing=smoothing, **_reduced(loss))


def _bce_logits(loss, z, y, soft):
    positive = torch.tensor(2.0, dtype=z.dtype) if loss.choice % 2 else None
    return F.binary_cross_entropy_with_logits(z, soft, pos_weight=positive, **_reduced(loss))


def _per_sample(loss, z, y, soft):
    each = F.cross_entropy(z, y, reduction="none").flatten(1) if y.ndim > 1 else F.cross_entropy(z, y, reduction="none")
    weights = torch.linspace(0.0, 1.0, len(z), dtype=z.dtype)
    return (each.reshape(len(z), -1).mean(1) * weights).sum() / (1.0 if loss.total else len(z))


def _margin(loss, z, y, soft):
    flat = z.movedim(1, -1).reshape(-1, z.shape[1])
    return F.multi_margin_loss(flat, y.flatten(), **_reduced(loss))


def _ctc(loss, z, y, soft):
    log_p = z.reshape(len(z), z.shape[1], -1).permute(2, 0, 1).log_softmax(-1).contiguous()
    ones = torch.ones(len(z), dtype=torch.long)
    targets = torch.full((len(z), 1), z.shape[1] - 1)
    return F.ctc_loss(log_p, targets, ones * len(log_p), ones, zero_infinity=True, **_reduced(loss))


CRITERIA = {
    "cross_entropy": _cross_entropy,
    "per_sample": _per_sample,
    "soft": lambda loss, z, y, soft: F.cross_entropy(z, soft.softmax(1), **_reduced(loss)),
    "mse": lambda loss, z, y, soft: F.mse_loss(z, soft, **_reduced(loss)),
    "bce_logits": _bce_logits,
    "bce": lambda loss, z, y, soft: F.binary_cross_entropy(z.sigmoid(), soft, **_reduced(loss)),
    "huber": lambda loss, z, y, soft: F.huber_loss(z, soft, delta=0.5, **_reduced(loss)),
    "smooth_l1": lambda loss, z, y, soft: F.smooth_l1_loss(z, soft, **_reduced(loss)),
    "l1": lambda loss, z, y, soft: F.l1_loss(z, soft, **_reduced(loss)),
    "margin": _margin,
    "soft_margin": lambda loss, z, y, soft: F.soft_margin_loss(z, soft.round() * 2 - 1, **_reduced(loss)),
    "nll": lambda loss, z, y, soft: F.nll_loss(z.log_softmax(1), y, **_reduced(loss)),
    "ctc": _ctc,
    "quartic": lambda loss, z, y, soft: z.pow(4).sum() if loss.total else z.pow(4).mean(),
    "linear": lambda loss, z, y, soft: (z * soft).sum(),
    "negative": lambda loss, z, y, soft: -F.mse_loss(z, soft, **_reduced(loss)),
    "two": lambda loss, z, y, soft: _cross_entropy(loss, z, y, soft) + 0.5 * F.mse_loss(z, soft, **_reduced(loss)),
    "across": lambda loss, z, y, soft: (z - z.mean(0)).square().mean() + F.mse_loss(z, soft),
    "zero": lambda loss, z, y, soft: 0 * z.sum(),
    "constant": lambda loss, z, y, soft: torch.ones(()),
    "nan": lambda loss, z, y, soft: z.sum() * torch.nan,
    "infinite": lambda loss, z, y, soft: z.exp().sum() / 0.0,
    "detached": lambda loss, z, y, soft: z.detach().sum(),
    "vector": lambda loss, z, y, soft: z.square().flatten(1).sum(1),
}
HOPELESS = ("zero", "constant", "nan", "infinite", "detached", "vector", "none")
KNOWN = ("cross_entropy", "soft", "mse", "bce_logits")
LOSSES = (*KNOWN, *KNOWN, *(kind for kind in CRITERIA if kind not in (*KNOWN, *HOPELESS)))

small = st.integers(0, 11)


def genes(kinds: tuple[str, ...]) -> st.SearchStrategy[Gene]:
    return st.builds(
        Gene,
        kind=st.sampled_from(kinds),
        width=st.integers(1, 6),
        a=small,
        b=small,
        wrap=st.just("none") | st.sampled_from(WRAPS),
        activation=st.sampled_from(tuple(ACTIVATIONS)),
    )


losses = st.builds(
    Loss,
    kind=st.integers(0, 15).flatmap(lambda i: st.sampled_from(HOPELESS if i == 15 else LOSSES)),
    total=st.booleans(),
    choice=small,
    scale=st.just(1.0) | st.sampled_from([1e-6, 1e6]),
    decay=st.integers(0, 9).map(lambda i: i == 9),
)

options = st.fixed_dictionaries(
    {
        "curvature": st.sampled_from(["auto", "exact", "ggn", "sketch"]),
        "mode": st.sampled_from(["eval", "eval", "train"]),
        "precision": st.sampled_from(["float32", "float64"]),
        "top_k": st.integers(3, 6),
    },
    optional={
        "max_samples": st.integers(1, 12),
        "n_batches": st.just(2),
        "micro_batch_size": st.integers(1, 12),
        "alignment": st.booleans(),
        "bootstrap": st.just(10),
        "curvature_fraction": st.just(2),
        "weight_spectra": st.booleans(),
        "spectrum_top_k": st.integers(6, 9),
    },
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases of all kinds; the smaller, the earlier in the shrinking."""
    front = draw(st.sampled_from(tuple(FRONTS)))
    return Case(
        front=front,
        genes=tuple(draw(st.lists(genes(FRONTS[front]), max_size=3))),
        back=tuple(draw(st.lists(genes(VECTOR), max_size=2))),
        pooled=draw(st.booleans()),
        tied=draw(st.booleans()),
        classes=draw(st.integers(1, 5)),
        samples=draw(st.sampled_from([8, 1, 2, 3, 5, 33])),
        loss=draw(losses),
        dtype=draw(st.sampled_from(["float32", "float32", *DTYPES])),
        nan_sample=draw(st.integers(0, 19)) == 19,
        seed=draw(st.integers(0, 10**6)),
        options=draw(options),
    )
