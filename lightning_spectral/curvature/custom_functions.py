"""Find custom autograd functions whose backward pass cannot be differentiated, which autograd itself does not tell.

A `torch.autograd.Function` whose backward runs outside autograd (a fused kernel, `once_differentiable`) cuts the graph
of the gradient. A second derivative then misses the terms behind the cut, or is zero, without an error: the engine
raises one only where it passes the cut, and on the way to a parameter it never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from lightning_spectral._autograd import reachable


@dataclass(frozen=True, eq=False)
class CustomFunctions:
    """The custom autograd functions behind a loss.

    Attributes:
        cut: node -> name, of those found to cut the graph of the gradient.
        trusted: node -> name, of the others: their second derivative is that of their backward as it is written, which
            is wrong where that uses a value saved as a constant, and nothing in the graph tells.
    """

    cut: dict[Node, str] = field(default_factory=dict)
    trusted: dict[Node, str] = field(default_factory=dict)


@contextmanager
def watch_custom_functions(loss: Tensor) -> Iterator[CustomFunctions]:
    """Yield a record that a backward pass with create_graph fills."""
    functions = CustomFunctions()
    handles = [node.register_hook(_watcher(node, functions)) for node in _custom_nodes(loss)]
    try:
        yield functions
    finally:
        for handle in handles:
            handle.remove()


def custom_functions(loss: Tensor) -> list[str]:
    """Return the names of the custom autograd functions behind a loss."""
    return sorted({_name_of(node) for node in _custom_nodes(loss)})


def _custom_nodes(loss: Tensor) -> list[Any]:
    return [node for node in reachable([loss.grad_fn]) if isinstance(node, BackwardCFunction)]


def _name_of(node: Node) -> str:
    return type(node).__name__.removesuffix("Backward")


def leaves_behind(node: Node) -> set[int]:
    """Return ids of the leaves whose gradient passes through a node."""
    return {id(found.variable) for found in reachable([node]) if hasattr(found, "variable")}


def _watcher(node: Node, functions: CustomFunctions) -> Any:
    def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
        inputs = [grad for grad in grad_inputs if grad is not None]
        outputs = [grad for grad in grad_outputs if grad is not None]
        # A node of that name is what once_differentiable hangs into the graph of the gradient.
        delayed = any(grad.grad_fn is not None and grad.grad_fn.name().endswith("Error") for grad in inputs)
        is_cut = delayed or any(not grad.requires_grad and not _scales(grad, outputs) for grad in inputs)
        (functions.cut if is_cut else functions.trusted)[node] = _name_of(node)

    return hook


def _scales(grad: Tensor, outputs: list[Tensor]) -> bool:
    """Return whether a gradient that depends on nothing is right: zero, or a constant times that of the output.

    A fused loss brings its gradient along from the forward pass, and a kernel works outside autograd; but the gradient
    of a function that scales its input depends on nothing where that of its output does not.
    """
    if not bool(grad.any()):
        return True
    same = [output for output in outputs if output.shape == grad.shape and not output.requires_grad]
    return any(torch.equal(grad * output.flatten()[0], grad.flatten()[0] * output) for output in same)


def unverified(function: str) -> str:
    """Return what is not known of a second derivative that passes a custom function."""
    return (
        f"its curvature passes the custom autograd function {function} and holds only if that function's backward can "
        "itself be differentiated, which was not checked"
    )
