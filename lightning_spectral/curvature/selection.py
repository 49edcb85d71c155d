"""Curvature methods by name, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_spectral._validation import one_of
from lightning_spectral.curvature.exact import ExactCurvature
from lightning_spectral.curvature.gauss_newton import EXACT_COLUMNS, GGNCurvature, not_piecewise_linear, output_hessians
from lightning_spectral.curvature.layer_taps import tapped
from lightning_spectral.curvature.problem import Curvature, Curvatures, DifferentiableLoss
from lightning_spectral.curvature.sketch import SketchCurvature
from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.svd import SingularTriplets

FEW_LAYERS = 3
"""Up to how many layers the loop over them costs no more than a sketch."""

FEW_SAMPLES = 32
"""Below it the sketch's cross terms, which fall as 1 / sqrt(samples), drown its curvatures."""

CHECK_TOLERANCE = 1e-2
"""Relative difference of Gauss-Newton to an exact product from which on it is not believed."""


METHODS: dict[str, Callable[[], Curvature] | None] = {
    "auto": None,
    "exact": ExactCurvature,
    "ggn": GGNCurvature,
    "sketch": SketchCurvature,
}
"""Curvature methods by name; "auto" is a choice among the others."""


def check_method(name: str) -> Curvature | None:
    """Return the method of that name, None for "auto"; ValueError if there is none."""
    make = METHODS[one_of("curvature", name, METHODS)]
    return make() if make is not None else None


@dataclass(frozen=True)
class LossProperties:
    """Properties of a loss that "auto" decides by.

    Attributes:
        obstacle: why Gauss-Newton is not the Hessian, or cannot be had exactly; empty if it is.
        taps: how many layers can be measured together.
        samples: in all; None where the batch does not tell.
    """

    obstacle: str
    taps: int
    samples: int | None

    @classmethod
    def of(cls, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> LossProperties:
        """Return the properties of a loss, of which this may be a micro-batch."""
        problem.run()
        taps, _ = tapped(problem, directions)
        samples = problem.samples if problem.place is None else problem.place.total
        return cls(_obstacle(problem, taps), len(taps), samples)


def fallback_method(obstacle: str, n_taps: int, samples: int | None) -> tuple[str, str]:
    """Return what "auto" takes in place of Gauss-Newton: the method's name, and the choice with its reasons.

    Args:
        obstacle: to Gauss-Newton.
        n_taps: how many layers a sketch would serve.
        samples: in all.
    """
    if (samples or 0) < FEW_SAMPLES:
        few = f"{samples or 'an unknown number of'} samples are too few for a sketch"
        faster = f", which with at least {FEW_SAMPLES} would be faster" if n_taps > FEW_LAYERS else ""
        return "exact", f"exact: {obstacle}, and {few}{faster}"
    if n_taps <= FEW_LAYERS:
        return "exact", f"exact: {obstacle}, and a sketch does not pay for {n_taps} of the layers"
    return "sketch", f"sketch: {obstacle}"


@dataclass(frozen=True)
class CheckedGGN(GGNCurvature):
    """Gauss-Newton, checked against one exact product.

    Raises:
        MeasurementError: when called, if it fails its check, or as in `GGNCurvature`.
    """

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure, and check."""
        curvatures = super().__call__(problem, directions)
        error = _check(problem, directions, curvatures)
        if not error <= CHECK_TOLERANCE:
            raise MeasurementError(
                f"Gauss-Newton failed its check against an exact product (relative error {error:.2g})"
            )
        return replace(curvatures, chosen=explain_gauss_newton(len(curvatures.methods)), check_error=error)


def explain_gauss_newton(n_exact: int) -> str:
    """Return the choice of Gauss-Newton and its reasons, with how many layers it cannot see."""
    why = "ggn: every operation after the layers is piecewise linear, so that Gauss-Newton is the Hessian"
    also = f"; double backward for {n_exact} that are not applied once, as a linear layer or convolution"
    return why + (also if n_exact else "")


def _obstacle(problem: DifferentiableLoss, names: Iterable[str]) -> str:
    """Return why Gauss-Newton is not the Hessian, or cannot be had exactly; empty if it is."""
    try:
        outputs = output_hessians(problem)
    except MeasurementError as error:
        return str(error)
    return obstacle_to_gauss_newton(problem, [(output.output, output.columns) for output in outputs], names)


def obstacle_to_gauss_newton(
    problem: DifferentiableLoss, outputs: Sequence[tuple[Tensor, int]], names: Iterable[str]
) -> str:
    """Return why Gauss-Newton of these outputs is not the Hessian, or cannot be had exactly; empty if it is.

    Args:
        problem: whose graph is read.
        outputs: each with the columns per sample of its Hessian.
        names: of the layers.
    """
    if operations := not_piecewise_linear(problem, [output for output, _ in outputs], names):
        return f"{operations} is not piecewise linear"
    n_columns = max(columns for _, columns in outputs)
    return f"the network has {n_columns} outputs per sample, over {EXACT_COLUMNS}" if n_columns > EXACT_COLUMNS else ""


def _check(problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets], curvatures: Curvatures) -> float:
    """Return the relative difference to one exact product: the first direction of the layer in the middle."""
    names = [name for name in directions if name not in curvatures.methods and name not in curvatures.failed]
    if not names:
        return 0.0
    name = names[len(names) // 2]
    layers, parameters = {name: problem.layers[name]}, {name: problem.parameters[name]}
    alone = DifferentiableLoss(problem.evaluate, layers, parameters, problem.samples)
    alone.run()
    exact = ExactCurvature()(alone, {name: directions[name].first(1)}).h[name][0]
    difference = float((curvatures.h[name][0] - exact).abs())
    return difference / float(exact.abs()) if difference else 0.0
