"""Losses of `torch.nn.functional` by name, as losses (model, batch) -> scalar that can be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_spectral.errors import MeasurementError
from lightning_spectral.measurement.loss import LossFunction

Loss = Callable[[Tensor, Tensor], Tensor]

OF_CLASSES: dict[str, Loss] = {name: getattr(F, name) for name in ("cross_entropy", "nll_loss")}
"""Losses of scores per class and the numbers of classes."""

OF_VALUES: dict[str, Loss] = {
    name: getattr(F, name)
    for name in (
        *("binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "l1_loss", "mse_loss"),
        *("poisson_nll_loss", "smooth_l1_loss", "soft_margin_loss"),
    )
}
"""Losses of values and targets of the same shape."""

FUNCTIONAL_LOSSES = (*OF_CLASSES, *OF_VALUES)

TARGETS = ("labels", "label", "targets", "target", "y")
"""Keys of the targets in a batch that is a mapping."""

INPUTS = ("inputs", "input", "x")
"""Keys of a single input in such a batch, which the model then takes by position."""


def functional_loss(name: str) -> LossFunction:
    """Return the mean loss of a model on a batch, by the name of the loss in `torch.nn.functional`.

    A batch is a pair (inputs, targets), of which the model is given the inputs; or a mapping with targets as one of
    `TARGETS`, of which the model is given one of `INPUTS` by position, or all the rest by keyword. What the model
    returns is a tensor, or holds it as ``logits``.

    For ``cross_entropy`` and ``nll_loss`` with targets (N, T) the classes may be the last dimension of the output,
    (N, T, V), as of language models, or the second, (N, V, T), as torch has it. A batch of nothing but
    whole numbers (N, T) is text: each of its tokens is predicted from those before it, model(batch[:, :-1]) against
    batch[:, 1:]. Tokens with the target -100 count in neither the sum nor the mean, as in torch.

    Raises:
        ValueError: for a name that is none of `FUNCTIONAL_LOSSES`.
        MeasurementError: when called, for a batch or an output that is none of these.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> x, y = torch.ones(4, 3), torch.zeros(4)
    >>> bool(functional_loss("mse_loss")(model, (x, y)) == model(x).square().mean())
    True
    """
    if name not in FUNCTIONAL_LOSSES:
        raise ValueError(f"loss must be one of {', '.join(FUNCTIONAL_LOSSES)}, got {name!r}")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if name in OF_CLASSES and isinstance(batch, Tensor):
            batch = _next_tokens(batch)
        output, targets = _output_and_targets(name, model, batch)
        if name in OF_CLASSES:
            return OF_CLASSES[name](*_by_class(name, output, targets))
        return OF_VALUES[name](*_by_value(name, output, targets))

    return loss


def _next_tokens(batch: Tensor) -> tuple[Tensor, Tensor]:
    if batch.ndim != 2 or batch.is_floating_point() or batch.shape[1] < 2:
        raise MeasurementError(
            f"a batch that is one tensor must be tokens (N, T), whole numbers with T of at least 2, got "
            f"{batch.dtype} {tuple(batch.shape)}; give pairs (inputs, targets)"
        )
    return batch[:, :-1], batch[:, 1:]


def _output_and_targets(name: str, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        output, targets = _of_mapping(name, model, batch)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        output, targets = model(batch[0]), batch[1]
    else:
        of = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise MeasurementError(
            f"{name} needs batches (inputs, targets), got a {type(batch).__name__}{of}; "
            "give a loss_fn(model, batch) of your own"
        )
    output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    return _tensor(name, "the model's output", output), _tensor(name, "what the batch has as targets", targets)


def _tensor(name: str, what: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise MeasurementError(
            f"{name} needs tensors, and {what} is a {type(value).__name__}; give a loss_fn(model, batch) of your own"
        )
    return value


def _of_mapping(name: str, model: nn.Module, batch: Mapping[Any, Any]) -> tuple[Any, Any]:
    targets = [key for key in TARGETS if key in batch]
    if len(targets) != 1:
        raise MeasurementError(
            f"{name} needs targets as one of {', '.join(TARGETS)} in a batch that is a mapping, which has "
            f"{', '.join(map(str, batch))}; give a loss_fn(model, batch) of your own"
        )
    inputs = {key: value for key, value in batch.items() if key != targets[0]}
    single = len(inputs) == 1 and next(iter(inputs)) in INPUTS
    return model(*inputs.values()) if single else model(**inputs), batch[targets[0]]


def _by_class(name: str, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores and targets as torch takes them, with the classes in the second dimension."""
    # One number per class and sample: probabilities of classes, which torch knows.
    if output.shape == targets.shape and targets.is_floating_point():
        return output, targets
    if targets.is_floating_point():
        raise MeasurementError(f"{name} needs whole numbers of classes as targets, got {targets.dtype}")
    second = output.ndim > 1 and (output.shape[0], *output.shape[2:]) == tuple(targets.shape)
    last = output.ndim > 1 and output.shape[:-1] == targets.shape
    if second and last and output.ndim > 2:
        raise MeasurementError(
            f"{name}: of an output {tuple(output.shape)} against targets {tuple(targets.shape)} the classes may be the "
            "second or the last dimension; give a loss_fn(model, batch) that says which, or samples of another length"
        )
    if last:
        return output.flatten(0, -2), targets.flatten().long()
    if second:
        return output, targets.long()
    raise MeasurementError(
        f"{name} needs an output (N, classes), (N, T, classes) or (N, classes, ...) for targets (N,), (N, T) or "
        f"(N, ...), got {tuple(output.shape)} and {tuple(targets.shape)}"
    )


def _by_value(name: str, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and targets of one shape: broadcasting (N, 1) with (N,) would compare all samples with all."""
    if output.shape == (*targets.shape, 1):
        output = output.squeeze(-1)
    if output.shape != targets.shape:
        raise MeasurementError(
            f"{name} needs an output of the targets' shape, got {tuple(output.shape)} and {tuple(targets.shape)}"
        )
    return output, targets if targets.is_floating_point() else targets.to(output.dtype)
