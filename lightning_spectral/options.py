"""Options of a measurement, each declared once: name, type, default, check and help text.

Reading the declarations loads no torch, so that the command line can show its help at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from lightning_spectral._validation import flag, one_of, optional_positive_int, positive_int

if TYPE_CHECKING:
    from lightning_spectral.layers.kinds import Kind
    from lightning_spectral.layers.matrices import LayerSelection

METHODS = ("auto", "exact", "ggn", "sketch")
Mode = Literal["eval", "train"]
Precision = Literal["float32", "float64"]

OptionsT = TypeVar("OptionsT")

MIN_TOP_K = 3
"""Points that a fit needs, `numerics.power_law.MIN_POINTS`, whose import loads torch."""

OPTION_OF_PART = {
    "weights": "weight_spectra",
    "intervals": "bootstrap",
    "fraction": "curvature_fraction",
    "alignment": "alignment",
}
"""Part of a `LayerSpectrum` that is measured on request -> the option that asks for it."""


def _option(
    default: Any, text: str, *, metavar: str | None = None, choices: Sequence[str] | None = None, by_rank: bool = False
) -> Any:
    """Return the field of an option.

    Args:
        text: of the docstrings and of the command line's help.
        metavar: of the value on the command line.
        choices: all values that are allowed.
        by_rank: ranks that measure together may differ in it.
    """
    about = {"help": text, "metavar": metavar, "choices": choices, "by_rank": by_rank}
    return field(default=default, metadata=about)


def from_arguments(options_class: type[OptionsT], arguments: Mapping[str, Any]) -> OptionsT:
    """Return a dataclass of options, each the argument of its name, if there is one, else its default."""
    names = (option.name for option in fields(options_class))  # type: ignore[arg-type]
    return options_class(**{name: arguments[name] for name in names if name in arguments})


@dataclass(frozen=True)
class Options:
    """The options that `measure_spectra`, `SpectralProbe`, `plan_spectra` and the command line have in common.

    Raises:
        ValueError: for an option out of range, with its name and what it may be.
    """

    top_k: int = _option(20, "directions per layer, K, 3 or more.", metavar="K")
    curvature: str = _option(
        "auto",
        '"exact", double backward, a product per layer and direction; "ggn", Gauss-Newton of all layers at once; '
        '"sketch", products for all layers and several directions of each, with standard errors; "auto", the '
        "fastest of them that gives the Hessian's curvature.",
        choices=METHODS,
    )
    layers: LayerSelection = _option(
        None,
        "glob patterns on names, or a callable (`MatrixLayer` -> bool); None: all matrices but embeddings.",
        metavar="GLOB",
        by_rank=True,
    )
    kinds: Mapping[str, Kind] | None = _option(
        None, "glob pattern -> kind of layer, where the inferred one is wrong.", metavar="GLOB=KIND", by_rank=True
    )
    fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] = _option(
        (),
        "glob patterns of projections that hold query, key and value in equal blocks of rows, to be measured "
        "apart; or pattern -> their three numbers of rows. `nn.MultiheadAttention` is split by itself.",
        metavar="GLOB[=ROWS,ROWS,ROWS]",
        by_rank=True,
    )
    mode: Mode = _option(
        "eval", '"eval" or "train": BatchNorm\'s statistics and dropout in the measurement.', choices=get_args(Mode)
    )
    max_samples: int | None = _option(
        None,
        "measure on the first so many samples of each batch; None: on all, or with gradient_samples on 64 where "
        "the loss is a mean or sum of parts. A sketch of fewer than 32 takes more passes the fewer there are.",
        metavar="N",
        by_rank=True,
    )
    gradient_samples: int | Literal["auto"] | None = _option(
        None,
        "samples whose mean gradient gives sigma, u and v, of which curvature is measured on the first "
        'max_samples; "auto": as many as leave 5 % of sampling noise in the squared gradient of the median layer; '
        "None: the same for both.",
        metavar="N",
    )
    gradient_samples_max: int = _option(4096, 'most samples that gradient_samples="auto" takes.', metavar="N")
    micro_batch_size: int | None = _option(
        None,
        "samples whose graph is in memory at once; None: as many as keep the peak within about three times a "
        "training step's, if a batch's loss is a mean or sum of parts. Out of memory it is halved, twice.",
        metavar="N",
        by_rank=True,
    )
    precision: Precision = _option(
        "float32",
        '"float32" or "float64", the lowest precision to compute in, whatever the weights\' or the Trainer\'s.',
        choices=get_args(Precision),
    )
    spectrum_top_k: int | None = _option(
        None, "singular values that the rank models are fitted to; None: top_k. They cost no curvature.", metavar="K"
    )
    weight_spectra: bool = _option(False, "take the singular values of each weight matrix, too (`WeightSpectrum`).")
    bootstrap: int | None = _option(
        None, "draws for 95 % intervals of alpha, gamma and s (`Intervals`); None or 0: none.", metavar="N"
    )
    curvature_fraction: int | None = _option(
        None,
        'draws for the trace of each layer\'s Hessian block, with curvature="ggn" too, and its fraction along the '
        "directions (`CurvatureFraction`), a Hessian-vector product each; None or 0: none.",
        metavar="N",
    )
    alignment: bool = _option(
        False, "also take the Kronecker factors of each layer, and split alpha by them (`LayerAlignment`)."
    )

    def __post_init__(self) -> None:
        positive_int("top_k", self.top_k, MIN_TOP_K, reason="the points that a fit needs")
        one_of("curvature", self.curvature, METHODS)
        one_of("mode", self.mode, get_args(Mode))
        one_of("precision", self.precision, get_args(Precision))
        for option in ("max_samples", "micro_batch_size"):
            optional_positive_int(option, getattr(self, option))
        if self.gradient_samples != "auto":
            optional_positive_int("gradient_samples", self.gradient_samples, reason="or 'auto'")
        positive_int("gradient_samples_max", self.gradient_samples_max)
        optional_positive_int("spectrum_top_k", self.spectrum_top_k, self.top_k, reason="which is top_k")
        for option in ("weight_spectra", "alignment"):
            flag(option, getattr(self, option))
        # The spread of a single draw is unknown.
        for option in ("bootstrap", "curvature_fraction"):
            optional_positive_int(option, getattr(self, option) or None, 2, reason="random draws, or 0 for none")
        self._check_patterns()

    def _check_patterns(self) -> None:
        # Loads torch.
        from lightning_spectral.layers.matrices import check_kinds
        from lightning_spectral.layers.names import check_selection

        check_selection("layers", self.layers)
        check_selection("fused_qkv", self.fused_qkv, only_patterns=True)
        check_kinds(self.kinds or {})

    @property
    def settings(self) -> dict[str, Any]:
        """Options that ranks which measure together must have in common, beside the layers."""
        return {option.name: getattr(self, option.name) for option in fields(self) if not option.metadata["by_rank"]}

    @property
    def parts(self) -> frozenset[str]:
        """Parts of a `LayerSpectrum` that are measured on request, and were asked for."""
        return frozenset(part for part, option in OPTION_OF_PART.items() if getattr(self, option))
