"""Torch's functions as a measurement runs them: with second derivatives, and on whatever precision they are given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_spectral._torch_private import grouped_products, in_forward_mode, recomputed_inside
from lightning_spectral.errors import is_out_of_memory
from lightning_spectral.isolation.batch_tree import leaves, map_leaves
from lightning_spectral.isolation.compositions import (
    RIGHT_SECOND,
    RIGHT_THIRD,
    WRITTEN_OUT,
    takes_statistics,
    wrong_twice,
)
from lightning_spectral.isolation.interrupts import function_mode

ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
GROUPED = grouped_products()
# They take two precisions, and their backward pass does not.
ONE_PRECISION_BACKWARD = (F.huber_loss,)


DIFFERENTIATE = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class MeasuredOperations(TorchFunctionMode):
    """Run functions as they are, but for those that a measurement would make fail, or get a wrong derivative of.

    Attention runs with the mathematical kernel alone, and products of groups one by one. A function that refuses
    tensors of several precisions, because a measurement has raised some of them and cannot reach others (globals,
    closures, constants), is given all in the highest. Compositions take the place of operations whose second
    derivative is wrong, and once `compose_for` has met a loss that needs their third, of those that have a wrong one.

    Attributes:
        composed: whether operations with a wrong third derivative are composed.
        notes: what a reader of the measurement should know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.composed = False
        self.notes: dict[str, None] = {}

    def run(self, loss: Callable[[Any], Any], batch: Any) -> Any:
        """Compute a loss, the user's code, with these operations; so are activations that are recomputed later."""
        with function_mode(self), recomputed_inside(lambda: function_mode(self)):
            return loss(batch)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DIFFERENTIATE and not self.composed:
            self._note_differentiated(args, kwargs)
        if func in RIGHT_THIRD and in_forward_mode() and takes_statistics(func, args, kwargs):
            self._note_wrong_in_training([func.__name__])
            func = RIGHT_THIRD[func]
        func = REPLACED.get(func, RIGHT_THIRD.get(func, func) if self.composed else func)
        if func in ONE_PRECISION_BACKWARD:
            args, kwargs = in_one_precision(func, args, kwargs) or (args, kwargs)
        with sdpa_kernel([SDPBackend.MATH]) if func in ATTENTION else nullcontext():
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                raised = None if is_out_of_memory(error) else in_one_precision(func, args, kwargs)
                if raised is None:
                    raise
            return func(*raised[0], **raised[1])

    def compose_for(self, loss: Any) -> bool:
        """Return whether a loss is to be computed again, since only compositions have the derivatives it needs."""
        wrong = wrong_twice([loss]) if isinstance(loss, Tensor) else []
        if wrong and self.composed:
            self.notes[
                f"curvature of this loss passes a derivative of {' and '.join(wrong)} that torch computes wrongly, "
                "where it cannot be replaced (in torch.jit.script, or called as torch.native_...): call it as "
                "torch.nn.functional has it, or write it with elementary operations"
            ] = None
        before, self.composed = self.composed, self.composed or bool(wrong)
        return self.composed and not before

    def _note_differentiated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note where the loss itself takes a second derivative that cannot be differentiated again."""
        outputs = leaves((args[:1], kwargs.get("outputs")))
        if wrong := wrong_twice(output for output in outputs if isinstance(output, Tensor)):
            self._note_wrong_in_training(wrong)

    def _note_wrong_in_training(self, names: list[str]) -> None:
        self.notes[
            f"the loss takes derivatives of {' and '.join(names)} that torch differentiates wrongly: what is measured "
            "is right, and the gradient that training uses is not; write it with elementary operations"
        ] = None


def in_one_precision(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return arguments whose tensors have the precision of the highest; None where all have the same.

    Of a function that writes to its first argument, or to ``out``, they have the precision of that.
    """
    found = [_precision(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    precisions = [precision for precision in found if precision is not None]
    if len(set(precisions)) < 2:
        return None
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    written = kwargs.get("out", args[0] if args and in_place else None)
    precision = _precision(written) if isinstance(written, Tensor) else None
    target = precision or reduce(torch.promote_types, precisions)

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf is written or _precision(leaf) in (None, target):
            return leaf
        return leaf.to(target.to_complex() if leaf.is_complex() else target)

    args, kwargs = map_leaves((args, kwargs), cast)
    return args, kwargs


def _precision(tensor: Tensor) -> torch.dtype | None:
    """Return the type of a tensor's real numbers; None for whole numbers, and for those of a byte, with no products."""
    dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else None


def grouped_product(
    a: Tensor,
    b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the products of groups of rows or columns, as `torch.nn.functional.grouped_mm` does, one after another.

    Torch's own takes a second derivative in half precision alone.

    Args:
        a: (M, K), or (G, M, K).
        b: (K, N), or (G, K, N).
        offs: (G,), where each group ends in the dimension that is not the same for all: rows of ``a`` beside a stack
            ``b``, columns of ``b`` beside a stack ``a``, the inner dimension of two matrices. None: of two stacks.
        bias: added to the result.
        out_dtype: of the result, where it is higher.
    """
    if offs is None:
        product = a @ b
    else:
        ends = offs.tolist()
        groups = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        if a.ndim == b.ndim == 2:
            product = torch.stack([a[:, group] @ b[group] for group in groups])
        elif a.ndim == 2:
            rest = a.new_zeros(a.shape[0] - ends[-1], b.shape[2])
            product = torch.cat([*(a[group] @ b[i] for i, group in enumerate(groups)), rest])
        else:
            rest = a.new_zeros(a.shape[1], b.shape[1] - ends[-1])
            product = torch.cat([*(a[i] @ b[:, group] for i, group in enumerate(groups)), rest], dim=1)
    product = product if bias is None else product + bias
    return product if out_dtype is None else product.to(torch.promote_types(product.dtype, out_dtype))


def dense_embedding(*args: Any, sparse: bool = False, **kwargs: Any) -> Tensor:
    """Return what `torch.nn.functional.embedding` does; of a gradient that is sparse there is no norm."""
    return F.embedding(*args[:6], **kwargs)


REPLACED: dict[Any, Callable[..., Any]] = {
    **RIGHT_SECOND,
    **WRITTEN_OUT,
    **dict.fromkeys(GROUPED, grouped_product),
    F.embedding: dense_embedding,
}
"""Function of torch -> what takes its place in every measurement."""
