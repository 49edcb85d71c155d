"""Arguments that `measure` and `plan` have in common, and errors in the words of the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any, NoReturn

from lightning_spectral.options import Options

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


def print_note(command: str, text: object) -> None:
    """Print a line of a command to standard error."""
    print(f"lightning-spectral {command}: {text}", file=sys.stderr)


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


LOSS_EXAMPLES = "cross_entropy, nll_loss, mse_loss, binary_cross_entropy_with_logits"
"""Some of `functional.FUNCTIONAL_LOSSES`, whose import loads torch."""

PYTHON_ONLY = {
    r", or a callable \(.*?\)": "",
    r" \(`\w+`\)": "",
    r"`": "",
    r"\bNone( or 0)?: ": "without it, ",
    r"\btop_k\b": "--top-k",
    r"%": "%%",
}
"""Parts of an option's help, as patterns, that its command line has not, and what stands in their place."""

OPTION_NAMES = (*(option.name for option in fields(Options)), "n_batches", "world_size", "sharded")
"""Names by which messages call the options."""


def add_sources(group: Any, *, batch: bool = True) -> None:
    """Add the arguments that name a model, its weights, its data and its loss."""
    group.add_argument("--model", required=True, metavar="NAME", help="a module, or a class or function that makes one")
    group.add_argument("--data", required=batch, metavar="NAME", help="a DataLoader or a batch, or what returns one")
    group.add_argument(
        "--loss",
        metavar="NAME",
        help=f"of torch.nn.functional ({LOSS_EXAMPLES}, ...), or a function of (model, batch); without it, the "
        "module's own spectral_loss(batch) or training_step",
    )
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="of a Lightning Trainer, or a state dict; without it, the model is measured as it is made",
    )
    group.add_argument("--prefix", default="", help="what the checkpoint's names begin with and the model's do not")
    group.add_argument("--no-strict", dest="strict", action="store_false", help="load the names that are in both")
    group.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")


def add_options(group: Any) -> None:
    """Add an argument for each field of `Options`, and those for batches and device."""
    for option in fields(Options):
        group.add_argument(f"--{option.name.replace('_', '-')}", help=_help(option), **_value(option))
    group.add_argument("--n-batches", type=int, default=1, metavar="N", help="batches averaged over (%(default)s)")
    group.add_argument("--device", default="auto", help="such as cpu or cuda:0 (cuda where there is one)")


def _value(option: Field[Any]) -> dict[str, Any]:
    """Return what argparse takes for the value of an option."""
    if option.type == "bool":
        return {"action": "store_true"}
    if choices := option.metadata["choices"]:
        return {"choices": choices, "default": option.default}
    kind: dict[str, Any] = {"type": int} if str(option.type).startswith("int") else {"nargs": "+"}
    if "auto" in str(option.type):
        kind["type"] = int_or_auto
    return {"metavar": option.metadata["metavar"], "default": option.default, **kind}


def int_or_auto(text: str) -> int | str:
    """Return "auto" or a whole number; an error names this function."""
    return text if text == "auto" else int(text)


def _help(option: Field[Any]) -> str:
    text = option.metadata["help"].removesuffix(".")
    for pattern, words in PYTHON_ONLY.items():
        text = re.sub(pattern, words, text)
    return in_options(text, OPTION_NAMES) + (" (%(default)s)" if option.default else "")


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the options that a command line gives."""
    values = {option.name: getattr(arguments, option.name) for option in fields(Options)}
    kinds, fused_qkv = _kinds(values.pop("kinds") or ()), _fused_qkv(values.pop("fused_qkv"))
    return Options(**values, kinds=kinds, fused_qkv=fused_qkv)


def _kinds(texts: Sequence[str]) -> dict[str, Any]:
    """Return pattern -> kind."""
    pairs = [text.rpartition("=") for text in texts]
    if wrong := [kind for pattern, _, kind in pairs if not pattern]:
        raise ValueError(f"--kinds takes GLOB=KIND, such as '*.c_proj=attention_out', got {wrong[0]!r}")
    return {pattern: kind for pattern, _, kind in pairs}


def _fused_qkv(texts: Sequence[str]) -> dict[str, list[int]]:
    """Return pattern -> numbers of rows of query, key and value; none where they are equal."""
    fused = {}
    for text in texts:
        pattern, _, rows = text.partition("=")
        try:
            fused[pattern] = [int(number) for number in rows.split(",")] if rows else []
        except ValueError:
            raise ValueError(f"--fused-qkv takes GLOB or GLOB=ROWS,ROWS,ROWS, got {text!r}") from None
    return fused
