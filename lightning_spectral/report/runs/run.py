"""A run as a page shows it: its probes, and what is known of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_spectral.analysis import Exponents
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.report import SpectralReport, median


class RunError(ValueError):
    """A run that cannot be read; the message says what was found and what would do."""


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a layer beside its logged quantities.

    Attributes:
        kind: of the layer.
        shape: (m, n) of its matrix.
        groups: how many blocks of rows are matrices of their own; a log does not tell.
        note: why something is NaN.
        quarters: alpha of each quarter of the directions.
        rank_model: which fits the gradient spectrum best; empty where none does.
    """

    kind: str
    shape: tuple[int, int]
    groups: int = 1
    note: str = ""
    quarters: tuple[float, ...] = ()
    rank_model: str = ""

    @classmethod
    def of(cls, layer: LayerSpectrum) -> LayerFacts:
        """Of a layer's spectrum."""
        quarters = tuple(fit.exponent for fit in layer.alpha_quartiles)
        winner = layer.rank_models.winner or ""
        return cls(layer.kind, layer.shape, layer.groups, layer.note, quarters, winner)


@dataclass(frozen=True, eq=False)
class Probe:
    """One measurement: the scalars that a log holds, and the whole report where there is one.

    Attributes:
        step: optimizer steps before it; None outside training.
        label: what to call it, "step 60" or a file's name.
        loss: the loss measured.
        layers: layer -> logged quantity -> value.
        report: all of it; None where it comes from a log.
        n_layers: layers of the network measured, of which a log may hold some.
        facts: layer -> what else is known of it; of a log, where it has a table of layers beside it.
        kinds: kind of layer -> median alpha, as a log holds it; it may know of layers that it does not hold.
    """

    step: int | None
    label: str
    loss: float
    layers: Mapping[str, Mapping[str, float]]
    report: SpectralReport | None
    n_layers: int
    facts: Mapping[str, LayerFacts] = field(default_factory=dict)
    kinds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, report: SpectralReport, label: str = "report") -> Probe:
        """A whole report as one of a run's probes; ``label`` is its name outside training."""
        layers = {name: layer.scalars() for name, layer in report.layers.items()}
        facts = {name: LayerFacts.of(layer) for name, layer in report.layers.items()}
        named = label if report.step is None else f"step {report.step}"
        return cls(report.step, named, report.loss, layers, report, len(layers), facts)

    def exponents(self) -> list[Exponents]:
        """What the fits of its layers say."""
        known = [(name, values, self.facts.get(name)) for name, values in self.layers.items()]
        return [
            Exponents.logged(name, values, kind=facts.kind, note=facts.note)
            if facts
            else Exponents.logged(name, values)
            for name, values, facts in known
        ]

    def kind_alphas(self) -> dict[str, float]:
        """The median alpha of each kind of layer: as logged, or of the layers whose kinds are known."""
        if self.kinds:
            return dict(self.kinds)
        alphas: dict[str, list[float]] = {}
        for layer in self.exponents():
            if layer.kind:
                alphas.setdefault(layer.kind, []).append(layer.alpha)
        return {kind: median(values) for kind, values in alphas.items()}


@dataclass(frozen=True, eq=False)
class Reading:
    """What one input holds.

    Attributes:
        name: of the file or folder.
        probes: in its order.
        left_out: what of it could not be read, and why.
    """

    name: str
    probes: Sequence[Probe]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Run:
    """The probes of one run in the order of training, where they are from, and what there was not read."""

    name: str
    sources: tuple[str, ...]
    probes: tuple[Probe, ...]
    left_out: tuple[str, ...] = ()
