"""Curvature methods by name, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from lightning_spectral.curvature.exact import ExactCurvature
from lightning_spectral.curvature.ggn import EXACT_COLUMNS, GGNCurvature, not_piecewise_linear, output_hessians
from lightning_spectral.curvature.problem import Curvature, Curvatures, Problem
from lightning_spectral.curvature.sketch import SketchCurvature
from lightning_spectral.curvature.taps import tapped
from lightning_spectral.errors import MeasurementError
from lightning_spectral.svd import SingularTriplets

FEW_LAYERS = 3
"""Up to how many layers the loop over them costs no more than a sketch."""

FEW_SAMPLES = 32
"""Below it the sketch's cross terms, which fall as 1 / sqrt(samples), drown its curvatures."""

CHECK_TOLERANCE = 1e-2
"""Relative difference of Gauss-Newton to an exact product from which on it is not believed."""


@dataclass(frozen=True)
class AutoCurvature:
    """Gauss-Newton where it equals the Hessian, else a sketch where samples do not interact, else double backward.

    Gauss-Newton is checked against one exact product at every measurement; where it fails, the next of them takes over.
    """

    name: str = "auto"
    differentiates_gradients: bool = False

    def __call__(self, problem: Problem, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Choose, measure, and say why."""
        problem.gradients(keep_graph=False)
        taps, _ = tapped(problem, directions)
        obstacle = _obstacle(problem, taps)
        if not obstacle:
            try:
                return self._gauss_newton(problem, directions)
            except MeasurementError as error:
                obstacle = str(error)
        if len(taps) <= FEW_LAYERS:
            why = f"exact: {obstacle}, and a sketch does not pay for {len(taps)} layers"
        elif (problem.samples or 0) < FEW_SAMPLES:
            why = f"exact: {obstacle}, and {problem.samples or 'an unknown number of'} samples are too few for a sketch"
        else:
            try:
                return replace(SketchCurvature()(problem, directions), chosen=f"sketch: {obstacle}")
            except MeasurementError as error:
                why = f"exact: {obstacle}, and no sketch: {error}"
        again = Problem(problem.evaluate, problem.layers, problem.parameters, problem.samples)
        return replace(ExactCurvature()(again, directions), chosen=why)

    def _gauss_newton(self, problem: Problem, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        found = GGNCurvature()(problem, directions)
        error = _check(problem, directions, found)
        if not error <= CHECK_TOLERANCE:
            raise MeasurementError(
                f"Gauss-Newton failed its check against an exact product (relative error {error:.2g})"
            )
        why = "ggn: every operation after the layers is piecewise linear, so that Gauss-Newton is the Hessian"
        return replace(found, chosen=why, check_error=error)


METHODS: dict[str, Callable[[], Curvature]] = {
    "auto": lambda: AutoCurvature(),
    "exact": lambda: ExactCurvature(),
    "ggn": lambda: GGNCurvature(),
    "sketch": lambda: SketchCurvature(),
}


def curvature_method(name: str) -> Curvature:
    """The method of that name; ValueError if there is none."""
    if name not in METHODS:
        raise ValueError(f"curvature must be one of {', '.join(map(repr, METHODS))}, got {name!r}")
    return METHODS[name]()


def _obstacle(problem: Problem, names: Iterable[str]) -> str:
    """Why Gauss-Newton is not the Hessian, or cannot be had exactly; empty if it is."""
    try:
        outputs = output_hessians(problem)
    except MeasurementError as error:
        return str(error)
    if operations := not_piecewise_linear(problem, outputs, names):
        return f"{operations} is not piecewise linear"
    most = max(output.columns for output in outputs)
    return f"the network has {most} outputs per sample, over {EXACT_COLUMNS}" if most > EXACT_COLUMNS else ""


def _check(problem: Problem, directions: Mapping[str, SingularTriplets], found: Curvatures) -> float:
    """Relative difference to one exact product: the first direction of the layer in the middle of the network."""
    names = [name for name in directions if name not in found.methods and name not in found.failed]
    if not names:
        return 0.0
    name = names[len(names) // 2]
    layers, parameters = {name: problem.layers[name]}, {name: problem.parameters[name]}
    alone = Problem(problem.evaluate, layers, parameters, problem.samples)
    exact = ExactCurvature()(alone, {name: directions[name].first(1)}).h[name][0]
    return float((found.h[name][0] - exact).abs() / exact.abs())
