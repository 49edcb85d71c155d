"""What every curvature method is given, and what it gives back."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_spectral.curvature.custom_functions import CustomFunctions, leaves_behind, watch_custom_functions
from lightning_spectral.curvature.forward_recorder import Recorder, Trace
from lightning_spectral.curvature.products import LayerCall
from lightning_spectral.errors import MeasurementError, SecondDerivativeError, is_out_of_memory
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.numerics.svd import SingularTriplets


def checked_loss(value: Any, first: int | None = None) -> Tensor:
    """Return the loss, if curvature can be measured of it; ``first`` is how many samples a batch was cut to.

    Raises:
        MeasurementError: if it is no scalar tensor, is NaN or infinite, or does not depend on any parameter.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not bool(torch.isfinite(value)):
        of = f" of a batch's first {first} samples" if first else ""
        remedy = "; raise max_samples if others have the targets" if first else ""
        raise MeasurementError(f"the loss{of} is {value.item()}, so its gradient and curvature mean nothing{remedy}")
    return scalar_loss(value)


def scalar_loss(value: Any) -> Tensor:
    """Return the loss, if it is a scalar with a gradient, whatever its value."""
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise MeasurementError(f"the loss must be a scalar tensor with a gradient, got {found}")
    return value.reshape(())


T = TypeVar("T")
Name = TypeVar("Name")
Key = TypeVar("Key")

REMEDY = "measure layers whose gradient does not pass it (layers=...), or give a loss_fn without it"


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one loss.

    Attributes:
        values: layer name -> gradient in the parameter's shape; None where the loss does not depend on it, and where
            ``failed``.
        failed: layer name -> why its gradient, or the derivative of that, cannot be had.
        trusted: layer name -> the custom autograd function that the derivative of its gradient relies on.
    """

    values: dict[str, Tensor | None]
    failed: dict[str, str]
    trusted: dict[str, str]


@dataclass(frozen=True)
class SampleRange:
    """Range of a loss's samples among all samples measured: the first, and the number of all."""

    first: int
    total: int


class DifferentiableLoss:
    """One loss of one network on one batch, differentiated at most once.

    Attributes:
        seen: names of layers, and what the graph shows of them; None where that was not asked.

    Args:
        evaluate: computes the loss.
        parameters: layer name -> the leaf that holds its matrix; parts of a fused projection share one.
        samples: samples in the batch; None where the batch does not tell.
        place: where they stand if the batch is a part of what is measured; None if it is all.
        again: whether a loss that was computed must be so again, by operations that have the derivatives it needs.
        first: samples that max_samples has cut the batch to; None where it has not.
    """

    def __init__(
        self,
        evaluate: Callable[[], Tensor],
        layers: Mapping[str, MatrixLayer],
        parameters: Mapping[str, Tensor],
        samples: int | None = None,
        place: SampleRange | None = None,
        again: Callable[[Tensor], bool] = lambda loss: False,
        first: int | None = None,
    ) -> None:
        self.evaluate, self.again, self._first = evaluate, again, first
        self.layers = layers
        self.parameters = parameters
        self.samples = samples
        self.place = place
        self._trace: Trace | None = None
        self._value: Tensor | None = None
        self._gradients: Gradients | None = None
        self._loss: Tensor | None = None
        self._outputs: dict[int, Tensor | None] = {}
        self.seen: tuple[Sequence[str], Any] | None = None

    def checked(self, value: Any) -> Tensor:
        """Return what was computed as the loss, or raise MeasurementError."""
        return checked_loss(value, self._first)

    def gradients(self, *, keep_graph: bool, outputs: bool = False) -> Gradients:
        """Return the gradient in every layer's parameter; with keep_graph it can be differentiated again.

        With ``outputs``, and without keep_graph, those in the layers' outputs are kept for `output_gradients`.
        """
        if self._gradients is None:
            leaves = {id(leaf): leaf for leaf in self.parameters.values()}
            self.run()
            with watch_custom_functions(self.value) if keep_graph else nullcontext(CustomFunctions()) as custom:
                values, failed = self._differentiate(leaves, keep_graph, outputs and not keep_graph)
            trusted: dict[int, str] = {}
            for node, function in custom.cut.items():
                for leaf in leaves_behind(node) & leaves.keys():
                    why = f"the custom autograd function {function} has no second derivative; {REMEDY}"
                    failed.setdefault(leaf, why)
            for node, function in custom.trusted.items():
                trusted |= dict.fromkeys(leaves_behind(node) & leaves.keys() - failed.keys(), function)
            names = {name: id(leaf) for name, leaf in self.parameters.items()}
            gradients = Gradients(
                {name: values.get(leaf) for name, leaf in names.items()},
                {name: failed[leaf] for name, leaf in names.items() if leaf in failed},
                {name: trusted[leaf] for name, leaf in names.items() if leaf in trusted},
            )
            if not keep_graph:
                return gradients
            self._gradients = gradients
        return self._gradients

    def of(self, names: Iterable[str]) -> DifferentiableLoss:
        """Return the loss as one of these layers alone, on the same graph if there is one."""
        alone = copy.copy(self)
        alone.layers = {name: self.layers[name] for name in names}
        alone.parameters = {name: self.parameters[name] for name in alone.layers}
        alone._gradients, alone._outputs, alone.seen = None, {}, None
        return alone

    def gradient(self, name: str) -> Tensor | None:
        """Return the gradient in one layer's parameter alone, without a graph."""
        if self._gradients is not None:
            value = self._gradients.values[name]
            return None if value is None else value.detach()
        return torch.autograd.grad(self.value, self.parameters[name], retain_graph=True, allow_unused=True)[0]

    def output_gradients(self, calls: Iterable[LayerCall], *, keep: bool = False) -> dict[int, Tensor | None]:
        """Return id of a call -> gradient of the loss in its output, None if it has none; given once, unless kept."""
        edges = {id(call): call.edge for call in calls if call.edge is not None}
        missing = {key: edge for key, edge in edges.items() if key not in self._outputs}
        found = {key: self._outputs[key] for key in edges.keys() - missing.keys()}
        if missing:
            computed = torch.autograd.grad(self.value, list(missing.values()), retain_graph=True, allow_unused=True)
            found |= zip(missing, computed, strict=True)
        self._outputs = dict(found) if keep else {}
        return found

    def run(self) -> None:
        """Compute the loss, if it is not known with its graph."""
        if self._value is None:
            with Recorder({id(leaf) for leaf in self.parameters.values()}) as recorder:
                loss = self.checked(self.evaluate())
            if self.again(loss):
                self.run()
                return
            self._trace, self._value, self._loss = recorder.trace, loss, loss.detach()

    def _differentiate(
        self, leaves: Mapping[int, Tensor], keep_graph: bool, outputs: bool
    ) -> tuple[dict[int, Tensor | None], dict[int, str]]:
        calls = [call for of_leaf in self.trace.calls.values() for call in of_leaf] if outputs else []
        edges = {id(call): call.edge for call in calls if call.edge is not None}
        options: dict[str, Any] = {"create_graph": keep_graph, "retain_graph": True, "allow_unused": True}

        def differentiate(keys: Sequence[int]) -> dict[int, Tensor | None]:
            beside = edges if len(keys) == len(leaves) else {}
            places: Any = [*(leaves[key] for key in keys), *beside.values()]
            values = torch.autograd.grad(self.value, places, **options)
            self._outputs = dict(zip(beside, values[len(keys) :], strict=True))
            return dict(zip(keys, values, strict=False))

        return together_or_alone(leaves, differentiate)

    def release(self) -> None:
        """Let go of all graphs; the value of the loss stays known."""
        self._trace = self._value = self._gradients = self.seen = None
        self._outputs = {}

    @property
    def trace(self) -> Trace:
        """Record of the forward pass."""
        return _known(self._trace)

    @property
    def traced_bytes(self) -> int:
        """Bytes of the layers' outputs; twice as much and more is in memory. 0 where the record is gone."""
        calls = [] if self._trace is None else [call for of_leaf in self._trace.calls.values() for call in of_leaf]
        return sum(call.output.numel() * call.output.element_size() for call in calls)

    @property
    def value(self) -> Tensor:
        """The loss with its graph."""
        return _known(self._value)

    @property
    def loss(self) -> float:
        """The value of the loss."""
        return float(_known(self._loss))


@dataclass(frozen=True, eq=False)
class Curvatures:
    """Result of a curvature method.

    Attributes:
        h: layer name -> (K,) curvatures in float64 on the CPU, NaN where ``failed``.
        method: what measured them.
        failed: layer name -> why it could not be measured.
        stderr: layer name -> (K,) standard errors of h; a layer that is not there was measured without sampling.
        methods: layer name -> the method that gave it, where that is another.
        notes: what a reader of the report should know.
        check_error: relative difference of one curvature to its exact value; NaN where none was checked.
        chosen: which method a choice fell on, and why; empty where there was none.
    """

    h: dict[str, Tensor]
    method: str
    failed: dict[str, str] = field(default_factory=dict)
    stderr: dict[str, Tensor] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    check_error: float = float("nan")
    chosen: str = ""


class Curvature(Protocol):
    """A way to the curvatures of all layers along given directions."""

    @property
    def name(self) -> str:
        """Name that users call it by."""
        ...

    @property
    def differentiates_gradients(self) -> bool:
        """True if `DifferentiableLoss.gradients` must keep its graph."""
        ...

    @property
    def memory(self) -> float:
        """Peak memory of a measurement, in that of a training step on the same samples: what was measured."""
        ...

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure h_k for each layer in ``directions``, for each of its triplets."""
        ...


def _known(value: T | None) -> T:
    if value is None:
        raise MeasurementError("this is known once the gradients are")
    return value


def together_or_alone(
    names: Iterable[Name], compute: Callable[[Sequence[Name]], dict[Key, T]]
) -> tuple[dict[Key, T], dict[Name, str]]:
    """Return what is computed for all names together or, where that fails, for each alone, and why that fails for some.

    So what stands in the way of some layers does not stop the others.
    """
    names = list(names)
    try:
        return compute(names), {}
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
    results: dict[Key, T] = {}
    failed: dict[Name, str] = {}
    for name in names:
        try:
            results |= compute([name])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            failed[name] = cause_of(error)
    return results, failed


def cause_of(error: RuntimeError) -> str:
    """Return what stopped a backward pass, the operation's name first, and what to do about it."""
    text = " ".join(str(error).split())
    if "checkpoint" in text.lower():
        return "reentrant checkpointing works with .backward() alone; use torch.utils.checkpoint(use_reentrant=False)"
    if "nested" in text.lower():
        return "nested tensors have no second derivative; pad them first (torch.nested.to_padded_tensor)"
    match = re.search(r"derivative for '?(?:aten::)?(\w+)'?", text)
    if not match:
        return f"its backward pass failed: {text[:200]}"
    return f"{match.group(1).removesuffix('_backward').lstrip('_')} has no second derivative ({text[:120]}); {REMEDY}"


@contextmanager
def naming_what_stops_it() -> Iterator[None]:
    """Turn an error of a backward pass into one that names the operation without a second derivative.

    Raises:
        SecondDerivativeError: in its place, unless memory ran out.
    """
    try:
        yield
    except MeasurementError:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise SecondDerivativeError(cause_of(error)) from error
