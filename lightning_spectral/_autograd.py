"""The nodes of autograd's graph: what is behind a loss, and which operation each stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

from torch.autograd.graph import Node


def reachable(roots: Iterable[Node | None]) -> Iterator[Node]:
    """Yield these nodes and all behind them, each once."""
    stack, visited = [root for root in roots if root is not None], set()
    while stack:
        node = stack.pop()
        if node not in visited:
            visited.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions if following is not None)


def operation(node: Node) -> str:
    """Return the operation of a node: ReluBackward0 is Relu."""
    return _operation(node.name())


@cache
def _operation(name: str) -> str:
    return name.rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")
