"""Work shared out over ranks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def assign_owners(costs: Mapping[Name, float], size: int) -> dict[Name, int]:
    """Return name -> rank, so that no rank has much more to do than another: the dearest first, to who has the least.

    >>> assign_owners({"a": 3, "b": 1, "c": 2}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    loads = [0.0] * size
    owners: dict[Name, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = loads.index(min(loads))
        loads[rank] += costs[name]
        owners[name] = rank
    return {name: owners[name] for name in costs}
