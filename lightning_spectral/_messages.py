"""Text for messages: names joined, reasons grouped, bytes as people write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NAMES_SHOWN = 6
"""How many layers a message names."""


def group_by_reason(failed: Mapping[str, str]) -> list[str]:
    """Return a line per cause that names the layers it struck.

    >>> group_by_reason({"a": "frozen", "b": "dead", "c": "frozen"})
    ['a, c: frozen', 'b: dead']
    """
    layers: dict[str, list[str]] = {}
    for name, why in failed.items():
        layers.setdefault(why, []).append(name)
    return [f"{join_names(names)}: {why}" for why, names in layers.items()]


def join_names(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are.

    >>> join_names(list("abcdefgh"))
    'a, b, c, d, e, f and 2 more'
    """
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def size_of(count: float) -> str:
    """Return bytes as people write them.

    >>> size_of(3_500_000), size_of(12)
    ('3.5 MB', '12 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
