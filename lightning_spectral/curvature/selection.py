"""Curvature methods by name, and the choice among them: the cheapest at an error of alpha that does not count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lightning_spectral._torch_private import output_shape
from lightning_spectral._validation import one_of
from lightning_spectral.curvature.exact import ExactCurvature
from lightning_spectral.curvature.gauss_newton import COUPLED_OUTPUTS, EXACT_COLUMNS, GGNCurvature, is_piecewise_linear
from lightning_spectral.curvature.head import parts_of
from lightning_spectral.curvature.problem import Curvature, Curvatures, DifferentiableLoss
from lightning_spectral.curvature.seen_layers import SeenLayers, see_layers
from lightning_spectral.curvature.sketch import FEWEST_SAMPLES, SketchCurvature, columns_for, sketch_products
from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.svd import SingularTriplets

PRODUCT, JOINT_PRODUCT, COLUMN = 0.6, 1.1, 0.45
"""Time in training steps of a product with one layer's Hessian, one with all layers', and a column for all layers."""

USUAL_COLUMNS = 20
"""Random columns that a target error usually takes."""

NOISE_PER_CHANNEL = 0.1
"""Relative noise of h in one joint product, times sqrt(channels / samples): measured on transformers."""

ALPHA_PER_NOISE = 1.6
"""Standard error of alpha of K curvatures, times sqrt(K) over their relative noise, where log sigma spreads by 0.6."""

REST = 0.5
"""Noise of a product of what columns leave, relative to that of a product of all: a twentieth to once."""

ALPHA_ERROR = 0.03
"""Standard error of alpha, from the noise of h, that a choice is made for."""

FEW_LAYERS = 3
"""Up to how many layers exact products are taken at twice a sketch's time."""

CHECK_TOLERANCE = 1e-2
"""Relative difference of the columns to an exact product from which on they are not believed."""


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
        obstacle: why the columns method does not give the Hessian; empty if it does.
        is_deep: whether most of the network lies behind the layers.
        is_linear: whether the loss is piecewise linear in each layer, so that its Hessian is zero.
        outputs: per sample, at the cut; 0 where they are not known.
        parts: views that these are of.
        windows: directions of each layer that can be moved at its output.
        unseen: directions of all other layers together.
        samples: in all; None where the batch does not tell.
        sketch_columns: backward passes that a sketch takes beside its products.
    """

    obstacle: str
    is_deep: bool
    is_linear: bool
    outputs: int
    parts: int
    windows: tuple[int, ...]
    unseen: int
    samples: int | None
    sketch_columns: int = 0

    @classmethod
    def of(cls, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> LossProperties:
        """Return the properties of a loss, of which this may be a micro-batch."""
        problem.run()
        windows = {name: len(triplets) for name, triplets in directions.items()}
        return cls.seen(see_layers(problem, directions), windows, problem)

    @classmethod
    def seen(cls, seen: SeenLayers, windows: Mapping[str, int], problem: DifferentiableLoss) -> LossProperties:
        """Return the properties of a loss by what its graph shows."""
        samples = problem.samples if problem.place is None else problem.place.total
        cut = seen.cut if len(seen.cut.inside) == len(seen.calls) else seen.outer_cut
        shapes = [output_shape(edge.node, edge.output_nr) for edge in cut.edges]
        known = problem.samples and all(shape is not None for shape in shapes)
        outputs = sum(shape.numel() for shape in shapes if shape is not None) // (problem.samples or 1) if known else 0
        return cls(
            obstacle=_obstacle(seen, problem.samples),
            is_deep=len(seen.cut.head) > seen.n_nodes // 2 and outputs > EXACT_COLUMNS,
            is_linear=is_piecewise_linear(seen),
            outputs=outputs,
            parts=parts_of(shapes, problem.samples or 1),
            windows=tuple(windows[name] for name in seen.calls),
            unseen=sum(windows[name] for name in seen.unseen),
            samples=samples,
            sketch_columns=columns_for(outputs, nested=cut.is_nested) if outputs else 0,
        )

    @property
    def n_directions(self) -> int:
        """Directions of all layers."""
        return sum(self.windows) + self.unseen

    @property
    def column_count(self) -> int:
        """Backward passes that the columns method takes."""
        return self.outputs if self.outputs <= EXACT_COLUMNS else USUAL_COLUMNS

    @property
    def coupled_passes(self) -> int:
        """Backward passes if the loss couples samples, one for all views of a sample; 0: too many outputs for it."""
        outputs = self.outputs // self.parts
        return outputs if outputs <= COUPLED_OUTPUTS else 0

    @property
    def sketch_products(self) -> int:
        """Joint products that a sketch takes for alpha to `ALPHA_ERROR`, two draws at least, all it makes at most.

        Each of P products has a relative noise of `NOISE_PER_CHANNEL` * sqrt(layers * ranks / samples) and reads
        ranks of K directions, so that h's is `NOISE_PER_CHANNEL` * sqrt(layers * K / (samples * P)).
        """
        ratio = NOISE_PER_CHANNEL * ALPHA_PER_NOISE / ALPHA_ERROR * (REST if self.sketch_columns else 1)
        least, largest = sketch_products(self.windows, self.samples, self.sketch_columns)
        least = least if self.sketch_columns else max(least, 4)
        return min(max(least, round(ratio**2 * len(self.windows) / (self.samples or 1))), largest)


def _obstacle(seen: SeenLayers, samples: int | None) -> str:
    if samples is None:
        return "the tensors of the batch share no leading dimension, so samples cannot be told apart"
    if not seen.calls:
        return f"no layer can be moved at its output: {'; '.join(dict.fromkeys(seen.unseen.values()))}"
    if len(seen.cut.inside) < len(seen.calls):
        names = seen.cut.operations or seen.cut.name_head()
        return f"{names} {'are' if ', ' in names else 'is'} not piecewise linear"
    return ""


def choose(properties: LossProperties) -> list[tuple[str, str]]:
    """Return what "auto" tries in turn: the methods' names, each with the choice and its reasons."""
    exact_steps = PRODUCT * properties.n_directions
    exact_why = f"{properties.n_directions} products"
    unseen = f", and {properties.unseen} products for layers that have to be measured one by one"
    unseen = unseen if properties.unseen else ""
    choices: list[tuple[float, str, str]] = [(exact_steps, "exact", f"exact: {exact_why}")]
    rest = PRODUCT * properties.unseen
    if not properties.obstacle:
        n = properties.column_count
        passes = str(n)
        if properties.outputs > EXACT_COLUMNS:
            all_passes = properties.coupled_passes
            passes = f"about {n}{f', or {all_passes} if the loss couples samples,' if all_passes else ''}"
        text = (
            "no pass, the loss is piecewise linear and its Hessian zero"
            if properties.is_linear
            else f"{passes} backward pass{'' if n == 1 else 'es'} for all layers"
        )
        why = f"ggn: every operation after the layers is piecewise linear up to the head, {text}{unseen}"
        of_column = COLUMN + (JOINT_PRODUCT if properties.is_deep else 0)
        choices.append((of_column * n + 1 + rest, "ggn", f"{why}; exact would take {exact_why}"))
    because = properties.obstacle or ("most of the network lies behind the layers" if properties.is_deep else "")
    if because and properties.windows and (properties.samples or 0) >= FEWEST_SAMPLES:
        n, columns = properties.sketch_products, properties.sketch_columns
        passes = f"{columns} backward pass{'' if columns == 1 else 'es'} and " if columns else ""
        all_passes = properties.coupled_passes if not columns else 0
        all_passes = all_passes if all_passes < properties.n_directions else 0
        beside = f", and {all_passes} backward passes if the loss couples samples" if all_passes else ""
        why = f"sketch: {because}; {passes}about {n} joint products{beside}{unseen}; exact would take {exact_why}"
        # Of few layers, what has no noise is worth twice the time.
        worth = 2 if len(properties.windows) <= FEW_LAYERS else 1
        choices.append((worth * (JOINT_PRODUCT * n + COLUMN * columns + 2 + rest), "sketch", why))
    choices.sort(key=lambda choice: choice[0])
    if choices[0][1] == "exact":
        reason = _why_exact(properties, [(steps, name) for steps, name, _ in choices[1:]])
        return [("exact", f"exact: {exact_why}, {reason}")]
    return [(name, why) for _, name, why in choices]


def _why_exact(properties: LossProperties, dearer: list[tuple[float, str]]) -> str:
    if dearer:
        return f"since {dearer[0][1]} would take as long for so few layers or samples"
    if properties.obstacle and properties.windows:
        few = f"{properties.samples or 'an unknown number of'} samples are too few for a sketch"
        return f"since {properties.obstacle}, and {few}"
    return f"since {properties.obstacle}"


@dataclass(frozen=True)
class CheckedGGN(GGNCurvature):
    """The columns method, checked against one exact product.

    Raises:
        MeasurementError: when called, if it fails its check, or as in `GGNCurvature`.
    """

    as_hessian: bool = True
    cheap: bool = True

    def __call__(self, problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets]) -> Curvatures:
        """Measure, and check."""
        curvatures = super().__call__(problem, directions)
        error = _check(problem, directions, curvatures)
        if error > CHECK_TOLERANCE:
            raise MeasurementError(f"the columns failed their check against an exact product (error {error:.2g})")
        return replace(curvatures, check_error=error)


def _check(problem: DifferentiableLoss, directions: Mapping[str, SingularTriplets], curvatures: Curvatures) -> float:
    """Return the relative difference to one exact product: the first direction of the layer in the middle.

    Of a sampled h, what exceeds four standard errors. NaN where no layer was measured by columns, or h is not finite.
    """
    names = [name for name in directions if name not in curvatures.methods and name not in curvatures.failed]
    if not names:
        return float("nan")
    name = names[len(names) // 2]
    checked = ExactCurvature()(problem.of([name]), {name: directions[name].first(1)})
    if name in checked.failed:
        raise MeasurementError(f"the columns cannot be checked: {checked.failed[name]}")
    exact = checked.h[name][0]
    difference = float((curvatures.h[name][0] - exact).abs())
    if name in curvatures.stderr:
        difference = max(0.0, difference - 4 * float(curvatures.stderr[name][0]))
    return difference / float(exact.abs()) if difference else 0.0
