"""Several inputs as one run: they are of one network, and of each step there is one measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from lightning_spectral.report.runs.run import Probe, Reading, RunError

SAME = 1e-5
"""Relative difference up to which two figures are one: TensorBoard keeps float32."""


Shapes = dict[str, tuple[int, int] | None]


def check_networks(readings: Sequence[Reading]) -> None:
    """Refuse inputs of different networks.

    Layers may come and go in a training, and a log holds some of them: what two inputs hold is of one network where
    most of the smaller one's layers are in both, with the same shapes as far as they are known.

    Raises:
        RunError: naming two inputs that are not.
    """
    shapes = [(reading.name, found) for reading in readings if (found := _shapes(reading.probes))]
    for (a, before), (b, after) in pairwise(shapes):
        both = [name for name in before if name in after]
        same = sum(None in (before[name], after[name]) or before[name] == after[name] for name in both)
        fewer = min(len(before), len(after))
        if 2 * same < fewer:
            raise RunError(
                f"{a} and {b} are of different networks: of {fewer} layers, {same} are in both with the same shape; "
                "make a page of each"
            )


def in_order(readings: Sequence[Reading]) -> tuple[Probe, ...]:
    """The probes of all inputs in the order of training, those outside training first.

    A whole report counts before a log's scalars of the same step, and of one input's rows the last.

    Raises:
        RunError: if two inputs hold different measurements of one step.
    """
    outside: list[Probe] = []
    by_step: dict[int, tuple[str, Probe]] = {}
    for reading in readings:
        for probe in reading.probes:
            if probe.step is None:
                outside.append(probe)
            else:
                given = (reading.name, probe)
                by_step[probe.step] = _one_of(by_step[probe.step], given) if probe.step in by_step else given
    return (*outside, *(by_step[step][1] for step in sorted(by_step)))


def _shapes(probes: Sequence[Probe]) -> Shapes:
    """The shapes of an input's layers, frozen ones included; None where they are not told."""
    shapes: Shapes = {}
    for probe in probes:
        shapes |= {name: None for name in (() if probe.report is None else probe.report.skipped) if name not in shapes}
        for name in probe.layers:
            shapes[name] = probe.facts[name].shape if name in probe.facts else shapes.get(name)
    return shapes


def _one_of(first: tuple[str, Probe], second: tuple[str, Probe]) -> tuple[str, Probe]:
    """Of two measurements of one step, the one that holds more."""
    (a, x), (b, y) = first, second
    if a != b and not _agree(x, y):
        raise RunError(
            f"{a} and {b} hold different measurements of step {x.step}: they are of two runs, or were measured in two "
            "ways; make a page of each"
        )
    if (x.report is None) != (y.report is None):
        return first if y.report is None else second
    return first if a != b and _size(x) > _size(y) else second


def _agree(x: Probe, y: Probe) -> bool:
    """Whether what both hold is the same. A log has no infinity, and what it lacks contradicts nothing."""
    if x.report is not None and y.report is not None:
        return x.report.to_dict() == y.report.to_dict()
    pairs = [(x.loss, y.loss)]
    for name in x.layers.keys() & y.layers.keys():
        pairs += [(value, y.layers[name][key]) for key, value in x.layers[name].items() if key in y.layers[name]]
    return all(
        math.isclose(p, q, rel_tol=SAME, abs_tol=1e-12) for p, q in pairs if math.isfinite(p) and math.isfinite(q)
    )


def _size(probe: Probe) -> int:
    return sum(map(len, probe.layers.values()))
