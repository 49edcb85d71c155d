"""Names of layers as tables and figures show them."""

from __future__ import annotations

import re


def brief(name: str) -> str:
    """Return a layer's name without ".weight", also before the part of a fused projection.

    >>> brief("blocks.0.conv1.weight"), brief("blocks.0.qkv.weight.q")
    ('blocks.0.conv1', 'blocks.0.qkv.q')
    """
    return re.sub(r"\.weight(?=(\.[qkv])?$)", "", name)


def shortened(name: str, length: int) -> str:
    """Return a brief name of at most so many characters.

    Where it is long its parts from the left shrink to a letter, numbers stay; what is still too long has an ellipsis
    in its middle.

    >>> shortened("blocks.0.conv1.weight", 25), shortened("model.decoder.layers.11.self_attn.q_proj.weight", 25)
    ('blocks.0.conv1', 'm.d.l.11.self_attn.q_proj')
    >>> shortened("a_module_with_a_long_name.weight", 12)
    'a_modu\u2026_name'
    """
    parts = brief(name).split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > length and not part.isdigit():
            parts[i] = part[:1]
    name = ".".join(parts)
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"
