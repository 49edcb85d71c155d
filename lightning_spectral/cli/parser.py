"""One-line errors and notes of the command line, in the words of its options."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning_spectral._messages import did_you_mean

PYTHON_TO_OPTIONS = {
    r"pass loss_fn\(model, batch\) -> scalar": "pass --loss, cross_entropy or pkg.module:function of (model, batch)",
    r"loss_fn(=\.\.\.|\(model, batch\))( -> scalar)?( of your own)?": "--loss pkg.module:function of (model, batch)",
    r"give a mapping from its pattern to their three numbers": "give --fused-qkv 'GLOB=ROWS,ROWS,ROWS'",
}
"""Advice in messages for Python, as patterns -> the same advice for the command line."""


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, without the usage of all options that argparse puts before them."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse an unknown option here, where the command's options are known, to suggest the closest."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(_unknown(unknown[0], sorted(set(re.findall(r"(?<![\w-])--[\w-]+", self.format_usage())))))
        return parsed, unknown


def print_note(command: str, text: object) -> None:
    """Print a line of a command to standard error."""
    print(f"lightning-spectral {command}: {text}", file=sys.stderr)


def _unknown(word: str, options: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r} is not an argument"
    name = word.partition("=")[0]
    return ", ".join(filter(None, (f"there is no option {name}", did_you_mean(name, options))))


def in_options(text: str, names: Sequence[str]) -> str:
    """Return a message for Python in the words of the command line.

    >>> in_options("top_k must be at least 3, got 1; or measure with mode='train'", ["top_k", "mode"])
    '--top-k must be at least 3, got 1; or measure with --mode train'
    """
    for pattern, words in PYTHON_TO_OPTIONS.items():
        text = re.sub(rf"(\ba )?{pattern}", words, text)

    def option(match: re.Match[str]) -> str:
        name, value = f"--{match[1].replace('_', '-')}", match[3]
        return f"{name} {value}" if value else name

    alternatives = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![\w.-])({alternatives})(?:=(['\"]?)([\w.]+)\2|(?= must\b|:| is a number\b))", option, text)
