"""Attention by the kernel that has a second derivative, also where a network asks for another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


class MathAttention(TorchFunctionMode):
    """Run functions as they are, attention with the mathematical kernel alone."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function as it is, attention with the mathematical kernel alone."""
        with sdpa_kernel([SDPBackend.MATH]) if func in ATTENTION else nullcontext():
            return func(*args, **(kwargs or {}))
