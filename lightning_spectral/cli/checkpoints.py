"""Checkpoints: weights and hyper-parameters read without executing anything, and models built with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_spectral._messages import join_names
from lightning_spectral.cli.import_paths import SourceError, import_object
from lightning_spectral.errors import first_line
from lightning_spectral.report.runs.read import load_plain

STATES = ("state_dict", "model_state_dict", "model")
"""Keys under which a checkpoint that holds more than weights keeps them."""


def load_option(path: Path, option: str, remedy: str) -> Any:
    """Return the content of a checkpoint's file, as `load_plain` does; the error of another ends in the remedy."""
    try:
        return load_plain(path)
    except ValueError as error:
        raise SourceError(f"{option} {path}: {error}; {remedy}") from error


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Content of a checkpoint's file.

    Attributes:
        key: under which it holds the weights; None where it is a plain state dict.
    """

    path: Path
    content: dict[str, Any]
    key: str | None

    @property
    def state(self) -> dict[str, Any]:
        """Weights by name."""
        state: dict[str, Any] = self.content if self.key is None else self.content[self.key]
        return state

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Arguments that the module's `save_hyperparameters` kept."""
        saved = self.content.get("hyper_parameters")
        return {str(k): v for k, v in saved.items()} if isinstance(saved, Mapping) else {}

    @property
    def position(self) -> dict[str, int]:
        """Step and epoch at which it was saved, if it holds both."""
        step, epoch = self.content.get("global_step"), self.content.get("epoch")
        return {"step": step, "epoch": epoch} if isinstance(step, int) and isinstance(epoch, int) else {}

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint:
        """Read a Lightning checkpoint or a state dict with ``weights_only=True``: nothing in it is executed."""
        path = Path(path)
        if not path.is_file():
            folder = "; of a sharded checkpoint, make one file first" if path.is_dir() else ""
            raise SourceError(f"--checkpoint {path}: no such file{folder}")
        content = load_option(path, "--checkpoint", "a file of torch.save(model.state_dict()) does")
        if not isinstance(content, Mapping):
            raise SourceError(f"--checkpoint {path}: a {type(content).__name__}, and no state dict or checkpoint")
        key = next((key for key in STATES if _is_state(content.get(key))), None)
        if key is None and not _is_state(content):
            raise SourceError(
                f"--checkpoint {path}: no weights under {', '.join(STATES)}; it has "
                f"{join_names([str(key) for key in content]) or 'nothing'}"
            )
        return cls(path, dict(content), key)

    def load_into(self, model: nn.Module, *, prefix: str = "", strict: bool = True) -> str:
        """Load the weights into a model.

        Args:
            model: a LightningModule's ``on_load_checkpoint`` is called first, as Lightning does.
            prefix: what the checkpoint's names begin with and the model's do not; other names are left out.
            strict: whether every name has to be in both.

        Returns:
            Description of the names left out; empty if there are none.
        """
        if self.key is not None and callable(hook := getattr(model, "on_load_checkpoint", None)):
            hook(self.content)
        state = {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
        if prefix and not state:
            raise SourceError(
                f"--prefix {prefix}: no name in {self.path} begins so; it has {join_names([*self.state])}"
            )
        try:
            # A method of the user's may return nothing.
            missing, unexpected = model.load_state_dict(state, strict=False) or ([], [])
        except RuntimeError as error:
            # torch's first line says that there are errors, each of the others names one; a hook's is all there is.
            head, *lines = str(error).splitlines()
            wrong = join_names([line.strip(" \t.") for line in lines or [head]])
            raise SourceError(f"--checkpoint {self.path}: {wrong}; is the model of the same size?") from error
        parts: dict[str, list[str]] = {"it lacks": missing, "the model lacks": unexpected}
        what = ", and ".join(f"{who} {join_names(names)}" for who, names in parts.items() if names)
        if what and (strict or len(unexpected) == len(state)):
            raise SourceError(f"--checkpoint {self.path}: {what}; {_remedy([*model.state_dict()], [*self.state])}")
        return what


def _remedy(own: Sequence[str], saved: Sequence[str]) -> str:
    """Return the remedy for the model's own names and those of a checkpoint, which differ."""
    if prefix := _prefix(own, saved):
        return f"with --prefix {prefix} all of the model's names are found"
    if prefix := _prefix(saved, own):
        return f"its names are those of the model's {prefix.removesuffix('.')}: give that module as --model"
    if not {*own} & {*saved}:
        return "no name is in both: is it another network's?"
    return "--no-strict loads what is in both"


def _prefix(names: Sequence[str], longer: Sequence[str]) -> str:
    """Return what stands before all of the names in the longer ones, an empty text if nothing does."""
    ends = (long.removesuffix(names[0]) for long in longer if names and long.endswith(f".{names[0]}"))
    return next((prefix for prefix in ends if {prefix + name for name in names} <= {*longer}), "")


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and any(isinstance(x, Tensor) for x in value.values())


def build_model(path: str, checkpoint: Checkpoint | None = None) -> nn.Module:
    """Return the model that an import path names: a module, or a class or function that makes one.

    A class is given the checkpoint's hyper-parameters that it takes, as Lightning's ``load_from_checkpoint`` does;
    anything else is called without arguments. A LightningModule's ``configure_model`` is called.
    """
    made = import_object(path, "--model")
    arguments: dict[str, Any] = {}
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise SourceError(f"--model {path} is a {type(made).__name__}, and no module nor anything that makes one")
        arguments = _arguments(made, checkpoint) if isinstance(made, type) else {}
        try:
            made = made(**arguments)
        except Exception as error:
            arguments_shown = f"hyper_parameters {', '.join(arguments)}" if arguments else "no arguments"
            raise SourceError(
                f"--model {path}: calling it with {arguments_shown} failed ({first_line(error)})"
            ) from error
    if not isinstance(made, nn.Module):
        raise SourceError(f"--model {path} gave a {type(made).__name__}, and should give a torch.nn.Module")
    if callable(configure := getattr(made, "configure_model", None)):
        configure()
    return made


def _arguments(model_class: type, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return the hyper-parameters that a class takes."""
    if checkpoint is None:
        return {}
    parameters = inspect.signature(model_class).parameters
    # Where the class takes all of them as one argument, Lightning keeps its name.
    mapping_name = str(checkpoint.content.get("hparams_name"))
    if mapping_name in parameters and parameters[mapping_name].kind is not inspect.Parameter.VAR_KEYWORD:
        return {mapping_name: checkpoint.hyper_parameters}
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # LightningCLI keeps notes of its own beside them.
    saved = {k: v for k, v in checkpoint.hyper_parameters.items() if not k.startswith("_")}
    return {k: v for k, v in saved.items() if every or k in parameters}
