"""Result of measuring a network, its logged names, and its way to dicts, JSON and DataFrames."""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_spectral._messages import group_by_reason, join_names
from lightning_spectral._serialization import decode, to_jsonable
from lightning_spectral.layers.names import brief, shortened
from lightning_spectral.numerics.power_law import RankModel
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.layer_spectrum import LayerSpectrum
from lightning_spectral.records.log_keys import LAYER_KEYS, RANK_MODELS, layer_key, median_key

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


VIEWS = {
    "summary": "lightning_spectral.summary:summary",
    "html": "lightning_spectral.report.notebook:report_html",
    "figure": "lightning_spectral.report.notebook:report_figure",
}
"""Name of a view -> module and function of a report."""


def view(name: str) -> Any:
    """Return the function of one of `VIEWS`."""
    module, _, function = VIEWS[name].partition(":")
    return getattr(importlib.import_module(module), function)


FORMAT, FORMAT_VERSION = "lightning-spectral-report", 3


class LayerSpectra(dict[str, LayerSpectrum]):
    """Spectra of layers by name. A lookup takes the short name that tables show, too, where it is that of one layer.

    >>> layers = LayerSpectra({"net.4.weight": "a spectrum"})
    >>> layers["net.4"], "net.4" in layers
    ('a spectrum', False)
    """

    def __missing__(self, name: str) -> LayerSpectrum:
        """Return the layer of a short name.

        Raises:
            KeyError: naming layers with similar names, or those that share the short name.
        """
        matches = [full for full in self if isinstance(name, str) and shortened(full, len(name)) == name]
        if len(matches) == 1:
            return self[matches[0]]
        if matches:
            raise KeyError(f"{name!r} is short for several layers: {join_names(matches)}")
        short_names = {brief(full): full for full in self}
        near = difflib.get_close_matches(str(name), [*self, *short_names])
        near = list(dict.fromkeys(short_names.get(match, match) for match in near))
        raise KeyError(f"no layer {name!r}; " + (f"similar: {join_names(near)}" if near else f"there are {len(self)}"))


@dataclass(frozen=True, eq=False)
class SpectralReport:
    """One measurement of a network.

    Attributes:
        layers: parameter name -> spectrum, in the order of the network; ``layers["net.4"]`` is that of
            "net.4.weight".
        skipped: matrix parameters that were not measured -> reason (frozen, not selected, ...).
        loss: value of the loss measured.
        n_samples: samples that the gradient and the loss are of; None where a batch does not tell.
        curvature_samples: the first of them, that the curvature is of; None where a batch does not tell.
        n_batches: number of batches they came in.
        micro_batch_size: largest number of samples whose curvature was measured at once; None where a batch does not
            tell.
        curvature: the method asked for.
        chosen: the method that "auto" chose, and why; empty for the others.
        check_error: relative difference of one curvature to an exact product; NaN where none was checked.
        mode: "eval" or "train", of the network while it was measured.
        precision: the precision asked for.
        top_k: directions asked for per layer.
        spectrum_top_k: singular values asked for per layer.
        seconds: wall time of the measurement.
        gradient_seconds: of it, that of the gradients.
        warnings: notes on what was shared or left out beside single layers.
        step: optimizer steps taken before the measurement; None outside training.
        epoch: epochs finished before the measurement; None outside training.
    """

    layers: dict[str, LayerSpectrum]
    skipped: dict[str, str]
    loss: float
    n_samples: int | None
    curvature: str
    mode: str
    precision: str
    top_k: int
    seconds: float
    n_batches: int = 1
    micro_batch_size: int | None = None
    warnings: tuple[str, ...] = ()
    chosen: str = ""
    check_error: float = float("nan")
    step: int | None = None
    epoch: int | None = None
    spectrum_top_k: int | None = None
    curvature_samples: int | None = None
    gradient_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Let layers be found by their short names."""
        object.__setattr__(self, "layers", LayerSpectra(self.layers))

    @property
    def failed(self) -> dict[str, str]:
        """Layers without an alpha -> reason."""
        return {name: layer.note for name, layer in self.layers.items() if math.isnan(layer.alpha.exponent)}

    def problems(self) -> list[str]:
        """Return what could not be measured or copied, a line each."""
        return [*group_by_reason(self.failed), *self.warnings]

    def by_kind(self) -> dict[str, list[LayerSpectrum]]:
        """Return the layers of each kind."""
        kinds: dict[str, list[LayerSpectrum]] = {}
        for layer in self.layers.values():
            kinds.setdefault(layer.kind, []).append(layer)
        return kinds

    def rank_model_shares(self) -> dict[RankModel, float]:
        """Return the share of the layers that each model of the gradient spectrum wins, of those where one does."""
        winners = [layer.rank_models.winner for layer in self.layers.values() if layer.rank_models.winner]
        return {model: winners.count(model) / len(winners) if winners else float("nan") for model in RANK_MODELS}

    @property
    def trusted(self) -> list[str]:
        """Names of the layers with an alpha to trust."""
        return [name for name, layer in self.layers.items() if layer.fit_quality.trusted]

    def medians(self) -> dict[str, float]:
        """Return medians by name: ``<quantity>_median`` and ``<quantity>/median_<kind>``, NaN left out.

        Those of quantities that tell whether to trust a fit are over all layers, the others over fits to trust;
        ``<quantity>_median_all`` and ``<quantity>/median_all_<kind>`` are over all layers.
        """
        out = _medians(self.layers.values())
        for kind, layers in self.by_kind().items():
            out |= _medians(layers, kind)
        return out

    def scalars(self, layers: list[str] | None = None) -> dict[str, float]:
        """Return the logged quantities by name, without a prefix: of the report, and of these layers (None: all)."""
        out = self.medians()
        out["loss"] = self.loss
        out["layers_measured"] = float(len(self.layers) - len(self.failed))
        out["layers_failed"] = float(len(self.failed))
        out["layers_trusted"] = float(len(self.trusted))
        out["gradient_samples"] = _number(self.n_samples)
        out["curvature_samples"] = _number(self.curvature_samples)
        out["check_error"] = self.check_error
        out |= {f"rank_model/{model}": share for model, share in self.rank_model_shares().items()}
        out["negative_curvature_sum"] = float(sum(layer.n_negative for layer in self.layers.values()))
        out["zeta_unbounded"] = float(sum(math.isinf(layer.zeta_bound) for layer in self.layers.values()))
        for name in self.layers if layers is None else layers:
            out |= {layer_key(key, name): value for key, value in self.layers[name].scalars().items()}
        return out

    def at(self, *, step: int, epoch: int) -> SpectralReport:
        """Return the report, placed in training."""
        return replace(self, step=step, epoch=epoch)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values: NaN as None, infinity as "inf"."""
        return {"format": FORMAT, "version": FORMAT_VERSION, **to_jsonable(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpectralReport:
        """Invert `to_dict`.

        Raises:
            ValueError: if the data is no report, or one of another version, older or newer; of data that only looks
                like one, any of `_serialization.UNREADABLE`.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            got = f"the format {data.get('format')!r}" if isinstance(data, Mapping) else f"a {type(data).__name__}"
            raise ValueError(f"expected a {FORMAT} of version {FORMAT_VERSION}, got {got}")
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"expected a {FORMAT} of version {FORMAT_VERSION}, got one of version {data.get('version')!r}: "
                "measure again, or read it with the release that wrote it"
            )
        return decode(cls, data)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return standard JSON text, and write it to a file if a path is given."""
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> SpectralReport:
        """Invert `to_json`, of JSON text or of the path of a file with it; a ValueError if it is no report."""
        is_text = isinstance(source, str) and source.lstrip().startswith(("{", "["))
        return cls.from_dict(json.loads(str(source) if is_text else Path(source).read_text(encoding="utf-8")))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per layer: name, kind, shape, every logged quantity, alpha by quarter, rank model and note."""
        return [_row(layer) for layer in self.layers.values()]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame with a row per layer, indexed by its name. Needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas; to_dict() needs nothing") from error
        rows = self.rows()
        columns = list(rows[0]) if rows else ["layer"]
        frame: pandas.DataFrame = pandas.DataFrame(rows, columns=columns).set_index("layer")
        return frame

    def summary(self) -> str:
        """Return what was measured in sentences, one to a line: fits to trust, exponents, layers that deviate."""
        return "\n".join(view("summary")(self))

    def plot(self, figure: str = "power_law", **options: Any) -> Figure:
        """Draw the report; a notebook shows what is returned. Needs matplotlib.

        Args:
            figure: name of a function of `lightning_spectral.report.figures` without ``plot_``, of those that draw one
                report: power_law, alpha_by_depth, rank_profiles, spectrum_heatmap, transfer_functions,
                transfer_identity or participation_ratio.
            **options: of that function.

        Raises:
            ValueError: if there is no such figure, or the report holds no layers.
            ImportError: without matplotlib.
        """
        return view("figure")(self, figure, **options)  # type: ignore[no-any-return]

    def _repr_html_(self) -> str:
        """Return table and summary, as notebooks ask for them."""
        return view("html")(self)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        alpha = self.medians()["alpha_median"]
        where = "" if self.step is None else f" at step {self.step}"
        return f"SpectralReport({len(self.layers)} layers{where}, loss {self.loss:.4g}, median alpha {alpha:.3g})"


def check_report(report: object) -> None:
    """Raise TypeError for what is no report, such as `probe.last_report` of a probe that has not measured."""
    if report is None:
        raise TypeError("there is no report: the probe has not measured, and its warnings say why")
    if not isinstance(report, SpectralReport):
        raise TypeError(f"need one SpectralReport, such as probe.last_report, got {type(report).__name__}")


def _row(layer: LayerSpectrum) -> dict[str, Any]:
    quartiles = {f"alpha_q{i}": fit.exponent for i, fit in enumerate(layer.alpha_quartiles, 1)}
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "m": layer.shape[0],
        "n": layer.shape[1],
        **layer.scalars(),
        **quartiles,
        "rank_model": layer.rank_models.winner,
        "note": layer.note,
    }


def _medians(layers: Iterable[LayerSpectrum], kind: str = "") -> dict[str, float]:
    layers = list(layers)
    trusted = [layer for layer in layers if layer.fit_quality.trusted]
    out: dict[str, float] = {}
    for key in LAYER_KEYS:
        # Of a part that was asked for, a layer holds it or says why not.
        if key.median and all(not key.part or key.part in layer.parts for layer in layers):
            of_all = median([key.value(layer) for layer in layers])
            if key.of_fit:
                out[median_key(key.name, kind)] = median([key.value(layer) for layer in trusted])
                out[median_key(key.name, kind, of_all=True)] = of_all
            else:
                out[median_key(key.name, kind)] = of_all
    return out


def _number(count: int | None) -> float:
    return float("nan") if count is None else float(count)
