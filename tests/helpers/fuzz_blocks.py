"""Random small networks for the fuzz test: blocks, and what can be wrapped around each of them.

A `Gene` is plain numbers that any input's shape can be given to, so that whatever is drawn is a network, and shrinks to
a smaller one. Blocks that hide their second derivative from autograd do without the hiding where `plain` is set, which
is how the slow twin sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {
    "none": nn.Identity, "relu": nn.ReLU, "relu_": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU, "silu_": lambda: nn.SiLU(inplace=True), "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid, "leaky_relu_": lambda: nn.LeakyReLU(0.2, inplace=True), "elu": nn.ELU,
    "softplus": nn.Softplus, "hardtanh": nn.Hardtanh, "mish": nn.Mish, "prelu": nn.PReLU, "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish, "softmax": lambda: nn.Softmax(1),
}  # fmt: skip

VECTOR = ("linear", "linear", "product", "experts", "norm", "lora", "square", "fused")
SEQUENCE = (*VECTOR, "attention", "sdpa", "encoder", "recurrent")
IMAGE = ("conv", "conv", "transposed", "image_norm", "pool", "square")
WAYS = ("matmul", "transposed", "einsum", "block", "addmm", "views")
WRAPS = (
    "none", "residual", "cat", "twice", "checkpoint", "reentrant", "frozen", "weight_norm", "spectral_norm", "dropout",
    "wide", "half", "cast", "zero", "dead", "unused", "detached", "in_place", "no_grad",
)  # fmt: skip


@dataclass(frozen=True)
class Gene:
    """What one block is made of; a and b choose among what its kind allows."""

    kind: str
    width: int
    a: int = 0
    b: int = 0
    wrap: str = "none"
    activation: str = "none"


class Square(torch.autograd.Function):
    """x^2 with a backward that can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Fused(torch.autograd.Function):
    """tanh with a backward as of a fused kernel, which autograd does not see."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Custom(nn.Module):
    plain = False

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "square":
            return x * x if self.plain else Square.apply(x)
        # A copy, since what comes after may work in place.
        return x.tanh().clone() if self.plain else Fused.apply(x)


class Lora(nn.Module):
    """A frozen matrix and a trained product of two thin ones."""

    def __init__(self, ins, outs, rank):
        super().__init__()
        self.base = nn.Linear(ins, outs).requires_grad_(False)
        self.down, self.up = nn.Linear(ins, rank, bias=False), nn.Parameter(0.3 * torch.randn(outs, rank))

    def forward(self, x):
        return self.base(x) + self.down(x) @ self.up.T


class Product(nn.Module):
    """A parameter that is multiplied with the input, in one of the ways that there are."""

    def __init__(self, ins, outs, way):
        super().__init__()
        self.way = way
        # Of two blocks of columns the second is applied.
        shape = {"transposed": (outs, ins), "einsum": (outs, ins), "block": (ins, 2 * outs)}.get(way, (ins, outs))
        self.matrix = nn.Parameter(torch.randn(shape) / ins**0.5)

    def forward(self, x):
        match self.way:
            case "transposed":
                return x @ self.matrix.T
            case "einsum":
                return torch.einsum("...i,oi->...o", x, self.matrix)
            case "block":
                return x @ self.matrix[:, self.matrix.shape[1] // 2 :]
            case "addmm":
                return torch.addmm(x.new_ones(()), x.flatten(0, -2), self.matrix).unflatten(0, x.shape[:-1])
            case "views":
                return x @ self.matrix + (x + 1) @ self.matrix
        return x @ self.matrix


class Experts(nn.Module):
    """A stack of two matrices, each applied to all of the input."""

    def __init__(self, ins, outs, *, by_einsum):
        super().__init__()
        self.by_einsum, self.stack = by_einsum, nn.Parameter(torch.randn(2, ins, outs) / ins**0.5)

    def forward(self, x):
        rows = x.flatten(0, -2)
        if self.by_einsum:
            y = torch.einsum("ri,eio->ero", rows, self.stack)
        else:
            y = torch.bmm(rows.expand(2, *rows.shape), self.stack)
        return (y[0].tanh() + y[1]).unflatten(0, x.shape[:-1])


class Attention(nn.Module):
    def __init__(self, width, heads, *, batch_first, causal):
        super().__init__()
        self.causal, self.batch_first = causal, batch_first
        self.attention = nn.MultiheadAttention(width, heads, batch_first=batch_first, dropout=0.0)

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        t = x.shape[1 if self.batch_first else 0]
        mask = torch.ones(t, t, dtype=torch.bool).triu(1) if self.causal else None
        y = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)


class Sdpa(nn.Module):
    """Attention by hand, on one fused projection."""

    def __init__(self, ins, width, *, causal):
        super().__init__()
        self.qkv, self.causal = nn.Linear(ins, 3 * width), causal

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=self.causal)


class Recurrent(nn.Module):
    def __init__(self, kind, ins, width, *, bidirectional):
        super().__init__()
        self.recurrent = kind(ins, width, batch_first=True, bidirectional=bidirectional)

    def forward(self, x):
        return self.recurrent(x)[0]


class Wrapped(nn.Module):
    """A block, and what is done around it."""

    plain = False

    def __init__(self, inner, how, activation):
        super().__init__()
        self.inner, self.how, self.activation = inner, how, ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(0.3)
        if how == "frozen":
            inner.requires_grad_(False)
        if how in ("wide", "half"):
            inner.to({"wide": torch.float64, "half": torch.bfloat16}[how])

    def forward(self, x):
        y = getattr(self, f"_{self.how}", self._none)(x)
        return self.activation(y)

    def _none(self, x):
        return self.inner(x)

    def _residual(self, x):
        y = self.inner(x)
        return x + y if x.shape == y.shape else y

    def _cat(self, x):
        y = self.inner(x)
        same = x.ndim == y.ndim and x.shape[:1] + x.shape[2:] == y.shape[:1] + y.shape[2:]
        return torch.cat([x, y], 1) if same and x.ndim != 3 else y

    def _twice(self, x):
        y = self.inner(x)
        return self.inner(y) if x.shape == y.shape else y

    def _checkpoint(self, x):
        return self.inner(x) if self.plain else checkpoint(self.inner, x, use_reentrant=False)

    def _reentrant(self, x):
        return self.inner(x) if self.plain else checkpoint(self.inner, x, use_reentrant=True)

    def _dropout(self, x):
        return self.dropout(self.inner(x))

    def _weights_dtype(self, x):
        dtype = next((p.dtype for p in self.inner.parameters()), x.dtype)
        return self.inner(x.to(dtype)).to(x.dtype)

    _wide = _half = _weights_dtype

    def _cast(self, x):
        return self.inner(x).bfloat16().to(x.dtype)

    def _zero(self, x):
        y = self.inner(x)
        return 0 * y + (x if x.shape == y.shape else 1)

    def _dead(self, x):
        return F.relu(self.inner(x) - 1e4)

    def _unused(self, x):
        return x

    def _detached(self, x):
        y = self.inner(x)
        return y.detach() + x if x.shape == y.shape else y

    def _in_place(self, x):
        return self.inner(x).mul_(1.5).add_(0.1)

    def _no_grad(self, x):
        with torch.no_grad():
            y = self.inner(x)
        return x + y if x.shape == y.shape else y


def divisor(number: int, choice: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return divisors[choice % len(divisors)]


def block(gene: Gene, x: torch.Tensor) -> nn.Module:
    """The block that a gene makes for an input like x."""
    inner = _IMAGE[gene.kind](gene, x) if gene.kind in _IMAGE else _LAST[gene.kind](gene, x)
    weight = getattr(inner, "weight", None)
    how = gene.wrap
    if how in ("weight_norm", "spectral_norm"):
        if isinstance(inner, (nn.Linear, nn.modules.conv._ConvNd)) and weight.numel() > 1:
            getattr(parametrizations, how)(inner)
        how = "none"
    return Wrapped(inner, how, gene.activation)


def _last_norm(gene, x):
    d = x.shape[-1]
    norms = [nn.LayerNorm(d), nn.RMSNorm(d), nn.LayerNorm(d, elementwise_affine=False)]
    if x.ndim == 2:
        norms += [nn.BatchNorm1d(d), nn.GroupNorm(divisor(d, gene.b), d)]
    return norms[gene.a % len(norms)]


def _recurrent(gene, x):
    kind = (nn.RNN, nn.GRU, nn.LSTM)[gene.a % 3]
    return Recurrent(kind, x.shape[-1], min(gene.width, 3), bidirectional=gene.b % 3 == 0)


def _encoder(gene, x):
    d = x.shape[-1]
    return nn.TransformerEncoderLayer(
        d, divisor(d, gene.a), gene.width, dropout=0.1 * (gene.b % 2), batch_first=True, norm_first=gene.a % 2 == 0,
        activation=F.relu if gene.b % 3 else F.gelu,
    )  # fmt: skip


_LAST = {
    "linear": lambda g, x: nn.Linear(x.shape[-1], g.width, bias=g.a % 2 == 0),
    "product": lambda g, x: Product(x.shape[-1], g.width, WAYS[g.a % len(WAYS)]),
    "experts": lambda g, x: Experts(x.shape[-1], g.width, by_einsum=g.a % 2 == 0),
    "norm": _last_norm,
    "lora": lambda g, x: Lora(x.shape[-1], g.width, 1 + g.a % 2),
    "square": lambda g, x: Custom("square"),
    "fused": lambda g, x: Custom("fused"),
    "attention": lambda g, x: Attention(
        x.shape[-1], divisor(x.shape[-1], g.a), batch_first=g.b % 2 == 0, causal=g.b % 3 == 0
    ),
    "sdpa": lambda g, x: Sdpa(x.shape[-1], g.width, causal=g.a % 2 == 0),
    "encoder": _encoder,
    "recurrent": _recurrent,
}


def _conv(gene, x):
    n, ins, size = x.ndim - 2, x.shape[1], min(x.shape[2:])
    kernel = 1 + gene.a % min(size, 3)
    dilation = 1 + gene.b % 2 if (kernel - 1) * 2 < size else 1
    groups = divisor(ins, gene.a)
    padding, mode = [(0, "zeros"), (kernel // 2, "zeros"), ("same", "zeros"), (kernel // 2, "circular")][gene.b % 4]
    stride = 1 if padding == "same" else 1 + gene.a % 2
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    return kind(
        ins, groups * max(1, gene.width // groups), kernel, stride=stride, dilation=dilation, padding=padding,
        groups=groups, padding_mode=mode, bias=gene.b % 3 != 0,
    )  # fmt: skip


def _transposed(gene, x):
    n, ins = x.ndim - 2, x.shape[1]
    groups, stride = divisor(ins, gene.a), 1 + gene.a % 2
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    return kind(
        ins, groups * max(1, min(gene.width, 4) // groups), 1 + gene.b % 2, stride=stride, groups=groups,
        output_padding=gene.b % stride, dilation=1 + gene.b % 2, bias=gene.b % 3 != 0,
    )  # fmt: skip


def _image_norm(gene, x):
    n, channels = x.ndim - 3, x.shape[1]
    norms = [
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n](channels),
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[n](channels, affine=gene.b % 2 == 0),
        nn.GroupNorm(divisor(channels, gene.b), channels),
    ]
    return norms[gene.a % 3]


def _pool(gene, x):
    n, size = x.ndim - 3, min(x.shape[2:])
    if size < 2:
        return nn.Identity()
    kinds = [
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[n](2),
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[n](2),
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[n](2),
    ]
    return kinds[gene.a % 3]


_IMAGE = {"conv": _conv, "transposed": _transposed, "image_norm": _image_norm, "pool": _pool}
