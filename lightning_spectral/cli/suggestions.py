"""What was meant by a name that LightningCLI does not know."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lightning_spectral._messages import did_you_mean

CLASS = re.compile(r"(?:Expected a dot import path string: |Problem with given class_path ')([\w.]+)")
OPTION = re.compile(r"Option '(\w+)' is not accepted")
BASE = re.compile(r"<?class '?([\w.]+\.[A-Z]\w*)|\b((?:[a-z_]\w*\.)+[A-Z]\w*)")


def suggestion(message: str) -> str:
    """Return a line with the names closest to the one that a message of LightningCLI refuses; else nothing.

    Classes are named in short, of those that are imported, or by a path; options of a class by its own names.
    """
    found = CLASS.search(message)
    if found is None:
        return ""
    module, _, name = found[1].rpartition(".")
    candidates: Iterable[str]
    if option := OPTION.search(message):
        name, candidates = option[1], _options(_named(found[1]))
    elif module:
        candidates = dir(_module(module))
    else:
        subtypes = message.partition("Subtypes:")[2].partition("\n")[0]
        bases = [_named(path) for match in BASE.findall(subtypes) for path in match if path]
        candidates = {cls.__name__ for base in bases if isinstance(base, type) for cls in _subclasses(base)}
    hint = did_you_mean(name, sorted(candidates), 2)
    return f"\n{hint}" if hint else ""


def _module(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ImportError:
        return None


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(_module(module), name, None)


def _options(cls: Any) -> list[str]:
    return list(inspect.signature(cls).parameters) if callable(cls) else []


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
