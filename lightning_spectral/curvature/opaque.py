"""Find custom autograd functions whose backward pass cannot be differentiated, which autograd itself does not tell.

A `torch.autograd.Function` whose backward runs outside autograd (a fused kernel, `once_differentiable`) cuts the graph
of the gradient. A second derivative then misses the terms behind the cut, or is zero, without an error: the engine
raises one only where it passes the cut, and on the way to a parameter it never does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


@contextmanager
def watch_custom_functions(loss: Tensor) -> Iterator[dict[Node, str]]:
    """Yield a dict that a backward pass with create_graph fills: node of an opaque function -> the function's name."""
    opaque: dict[Node, str] = {}
    custom = [node for node in _reachable([loss.grad_fn]) if isinstance(node, BackwardCFunction)]
    handles = [node.register_hook(_watcher(node, opaque)) for node in custom]
    try:
        yield opaque
    finally:
        for handle in handles:
            handle.remove()


def leaves_behind(node: Node) -> set[int]:
    """Ids of the leaves whose gradient passes through a node."""
    return {id(found.variable) for found in _reachable([node]) if hasattr(found, "variable")}


def _watcher(node: Node, opaque: dict[Node, str]) -> Any:
    def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
        inputs = [grad for grad in grad_inputs if grad is not None]
        outputs = [grad for grad in grad_outputs if grad is not None]
        curved = any(grad.requires_grad for grad in outputs)
        # A fused loss brings its gradient along from the forward pass. Where the shape stays, as in a function that
        # scales its input, a gradient that depends on nothing is what a linear function has.
        cut = any(
            not grad.requires_grad and bool(grad.any()) and (curved or all(grad.shape != o.shape for o in outputs))
            for grad in inputs
        )
        # What once_differentiable hangs into the graph of the gradient.
        delayed = any(grad.grad_fn is not None and grad.grad_fn.name().endswith("Error") for grad in inputs)
        if cut or delayed:
            opaque[node] = type(node).__name__.removesuffix("Backward")

    return hook


def _reachable(roots: Iterable[Node | None]) -> Iterator[Node]:
    stack, seen = [root for root in roots if root is not None], set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions if following is not None)
