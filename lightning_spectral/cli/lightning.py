"""`lightning-spectral fit`: a LightningCLI of either Lightning package that gives an optimizer the model's groups."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import yaml

# LightningCLI resolves short names of imported classes alone.
from lightning_spectral.callbacks import SpectralProbe, SwapOptimizer
from lightning_spectral.callbacks._lightning import lightning_cli, package_of
from lightning_spectral.cli.checkpoints import load_option
from lightning_spectral.cli.import_paths import SourceError, import_object
from lightning_spectral.optim.spectral_newton import SpectralNewton

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningCLI as _LightningCLI
else:
    _LightningCLI = object

__all__ = ["NamedGroups", "SpectralNewton", "SpectralProbe", "SwapOptimizer", "spectral_cli"]

logger = logging.getLogger(__name__)

USAGE = "%(prog)s [-c CONFIG] --model CLASS [--optimizer CLASS] [--trainer.OPTION VALUE] ..."
"""Usage without all options, after which an error would be the last line of forty."""

DATA_HOOKS = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}
"""Command -> the method of a module or its data that it asks for batches."""


class NamedGroups(_LightningCLI):
    """Mixin for a LightningCLI: ``--optimizer`` is given ``groups(model)`` if its class has such a function.

    Without it, every optimizer gets the flat list `model.parameters()`, in which nothing tells an embedding from a
    matrix. Optimizer and scheduler are then made by the model's `configure_optimizers`, when the Trainer asks for it,
    and go through the CLI's own `configure_optimizers(module, optimizer, lr_scheduler)`, overridden or not. Other
    optimizers, and one fixed by `add_optimizer_args(SomeClass)`, are LightningCLI's business as ever.

    In a program of your own: ``class MyCLI(NamedGroups, LightningCLI)``.
    """

    def instantiate_classes(self) -> None:
        """Instantiate all but an optimizer that has groups."""
        automatic = self.auto_configure_optimizers
        optimizer = self._of_command(self.config).get("optimizer")
        grouped = automatic and callable(getattr(_named(_class_path(optimizer)), "groups", None))
        self.auto_configure_optimizers = automatic and not grouped
        try:
            super().instantiate_classes()
        finally:
            self.auto_configure_optimizers = automatic
        if grouped:
            self._configure_with_groups()

    def _configure_with_groups(self) -> None:
        options = self._of_command(self.config_init)
        optimizer_options, scheduler_options = options["optimizer"], options.get("lr_scheduler")
        make = _named(optimizer_options["class_path"])

        def configure_optimizers(module: Any) -> Any:
            optimizer = make(make.groups(module), **_init_args(optimizer_options))
            names = [group.get("name", i) for i, group in enumerate(optimizer.param_groups)]
            logger.info("%s of the command line, groups %s", make.__name__, ", ".join(map(str, names)))
            scheduler = None
            if scheduler_options:
                scheduler = _named(scheduler_options["class_path"])(optimizer, **_init_args(scheduler_options))
            return self.configure_optimizers(module, optimizer, scheduler)

        self.model.configure_optimizers = MethodType(configure_optimizers, self.model)

    def _of_command(self, config: Any) -> Any:
        """Return a configuration's part for the command, such as fit, if there are commands."""
        return config if self.subcommand is None else config[self.subcommand]


class _Checked(NamedGroups):
    """Refuse a command without data or optimizer, and a ``--ckpt_path`` that would execute code.

    Lightning 2.4 loads whatever it is given.
    """

    def instantiate_classes(self) -> None:
        """Instantiate all, and see that there is data."""
        super().instantiate_classes()
        hook, model = DATA_HOOKS.get(self.subcommand or ""), type(self.model)
        if hook and self.datamodule is None and _is_lightnings(model, hook):
            raise SourceError(
                f"there is no data to {self.subcommand} on: name a LightningDataModule with --data, or give "
                f"{model.__name__} a method {hook}"
            )
        makes_optimizer = self._of_command(self.config_init).get("optimizer") or not self.auto_configure_optimizers
        if self.subcommand == "fit" and not makes_optimizer and _is_lightnings(model, "configure_optimizers"):
            raise SourceError(
                f"there is no optimizer: name one with --optimizer, or give {model.__name__} a method "
                "configure_optimizers"
            )

    def parse_arguments(self, *args: Any, **kwargs: Any) -> None:
        """Parse, then look into the checkpoint before Lightning does."""
        super().parse_arguments(*args, **kwargs)
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path and Path(path).is_file():
            load_option(
                Path(path), "--ckpt_path", "Trainer.fit(ckpt_path=...) in a program of your own loads one you trust"
            )


def spectral_cli(package: str = "pytorch_lightning") -> type[_LightningCLI]:
    """Return the LightningCLI of a package with `NamedGroups`.

    Raises:
        ImportError: without jsonargparse.
    """
    return type("SpectralCLI", (_Checked, lightning_cli(package)), {})


def run(arguments: Sequence[str], *, from_command_line: bool) -> None:
    """Run ``fit --config ...`` and the like with the LightningCLI of the package that the model is of."""
    path = named_model(arguments)
    # A short name is for LightningCLI to resolve, and so is a file of options.
    by_path = path is not None and "." in path and Path(path).suffix not in (".yaml", ".yml", ".json")
    model = import_object(path, "--model") if path and by_path else None
    try:
        cli = spectral_cli(package_of(model))
    except ImportError as error:
        raise SourceError(str(error)) from error
    # Under `python -m` argparse would take the name of the file that is run.
    program = "lightning-spectral"
    parser_kwargs = {"prog": program, "exit_on_error": False, arguments[0]: {"usage": USAGE, "exit_on_error": False}}
    try:
        # LightningCLI warns of arguments given beside those of the command line.
        cli(args=None if from_command_line else list(arguments), parser_kwargs=parser_kwargs)
    except ValueError as error:
        # Also in training: an optimizer, and what depends on the model, are checked when fitting starts.
        if refusal := _own_refusal(error):
            raise SourceError(refusal) from error
        raise
    except argparse.ArgumentError as error:
        command = f"{program} {arguments[0]}"
        print(
            f"usage: {USAGE % {'prog': command}}\ntip: {command} --help shows all options\n"
            f"error: {error}{suggestion(str(error))}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def named_model(arguments: Sequence[str]) -> str | None:
    """Return the class path of the model in the arguments, else in the last of their configuration files, or None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "--model.class_path")
    parser.add_argument("-c", "--config", action="append", default=[])
    options, _ = parser.parse_known_args(list(arguments))
    paths = [options.model, *(_model_in(config) for config in reversed(options.config))]
    return next((path for path in paths if path), None)


def _own_refusal(error: BaseException) -> str:
    """Return what a part of this package says of its options, in an error that a parser makes of it; else nothing."""
    cause: BaseException | None = error
    while cause is not None:
        frames = list(traceback.walk_tb(cause.__traceback__))
        module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
        if isinstance(cause, ValueError) and module.startswith("lightning_spectral."):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return ""


def _is_lightnings(model: type, method: str) -> bool:
    """Return whether a method of a model is the one of LightningModule, which does nothing."""
    return getattr(model, method).__qualname__ in (f"DataHooks.{method}", f"LightningModule.{method}")


def _model_in(config: str) -> str | None:
    """Return the model's class path in a file, None if it cannot be read: LightningCLI complains of that."""
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return _class_path(content.get("model")) if isinstance(content, Mapping) else None


def _class_path(options: Any) -> str | None:
    """Return the path in ``class_path: ...`` with or without ``init_args``, or a bare path."""
    path = options if isinstance(options, str) or options is None else options.get("class_path")
    return path if isinstance(path, str) else None


def _init_args(options: Any) -> dict[str, Any]:
    return dict((options.get("init_args") or {}).items())


CLASS = re.compile(r"(?:Expected a dot import path string: |Problem with given class_path ')([\w.]+)")
OPTION = re.compile(r"""(?:Option|[Kk]ey) ['"](\w+)['"] (?:is not|to check)""")
BASE = re.compile(r"<?class '?([\w.]+\.[A-Z]\w*)|\b((?:[a-z_]\w*\.)+[A-Z]\w*)")


def suggestion(message: str) -> str:
    """Return a line with the names closest to the one that a message of LightningCLI refuses; else nothing.

    Classes are named in short, of those that are imported, or by a path; options of a class by its own names.
    """
    found = CLASS.search(message)
    if found is None:
        return ""
    module, _, name = found[1].rpartition(".")
    candidates: Collection[str]
    if option := OPTION.search(message):
        cls = _named(found[1])
        name, candidates = option[1], list(inspect.signature(cls).parameters) if callable(cls) else []
    elif module:
        candidates = dir(_module(module))
    else:
        subtypes = message.partition("Subtypes:")[2].partition("\n")[0]
        bases = [_named(path) for match in BASE.findall(subtypes) for path in match if path]
        candidates = {cls.__name__ for base in bases if isinstance(base, type) for cls in _subclasses(base)}
    if name in candidates:
        # What is refused is its value, or another class of the union's.
        return ""
    close = difflib.get_close_matches(name, sorted(candidates), 2)
    return f"\ndid you mean {' or '.join(close)}?" if close else ""


def _module(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ImportError:
        return None


def _named(path: str | None) -> Any:
    """Return the object that an import path names, or None."""
    module, _, name = (path or "").rpartition(".")
    return getattr(_module(module), name, None) if module else None


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
