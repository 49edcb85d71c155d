"""What a measurement found: frozen records, their logged names, and their way to dicts, JSON and DataFrames."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_spectral.fits import (
    PowerLawFit,
    RankModel,
    RankModelFit,
    RankModels,
    directions_holding,
    entropy_rank,
    fit_power_law,
    fit_rank_decay,
    fit_rank_models,
    noise_floor,
    participation_ratio,
    zeta_bound,
)

if TYPE_CHECKING:
    import pandas

FORMAT, FORMAT_VERSION = "lightning-spectral-report", 1


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The gradient spectrum of one layer and the curvature along it, with every fit.

    Attributes:
        name: qualified name of the parameter, with ``.q``, ``.k``, ``.v`` for a part of a fused projection.
        kind: conv, attention_qkv, attention_out, mlp_up, mlp_down, embedding, head or dense.
        shape: (m, n) of the matrix.
        groups: how many blocks of rows are matrices of their own (grouped convolution).
        sigma: (K,) leading singular values of the gradient, decreasing; loss per unit of weight.
        h: (K,) curvatures u_k v_k^T H u_k v_k^T; loss per squared unit of weight. Rayleigh quotients, not
            eigenvalues, of the Hessian block H. NaN where sigma is rounding noise or nothing could be measured.
        noise_floor: sigma_1 * max(m, n) * eps(dtype); a sigma_k at or below it is rounding noise.
        alpha: h ~ sigma^alpha over the k with h_k > 0.
        gamma: sigma_k ~ k^-gamma.
        s: the positive h, sorted, ~ rank^-s.
        transfer_error: abs(s - alpha * gamma) / abs(s).
        pr_curvature: participation ratio of the positive h.
        pr_gradient: participation ratio of sigma^2.
        entropy_rank_curvature, entropy_rank_gradient: exp(entropy) of the same.
        directions_95_curvature, directions_99_curvature, directions_95_gradient, directions_99_gradient: how many
            directions hold 95 % and 99 % of the positive h, or of sigma^2, within the window of K.
        zeta_bound: zeta(alpha gamma)^2 / zeta(2 alpha gamma), the bound on pr_curvature; infinite for alpha gamma <= 1.
        zeta_bound_window: the same with sums over the positive h measured, which a window of K directions obeys.
        n_usable: directions above the noise floor.
        n_negative: of them, those with h < 0.
        n_repeated: of them, those whose sigma equals a neighbour's to rounding: u_k, v_k, h_k are not unique.
        rank_models: power law, exponential and log-normal in rank of the usable sigma.
        note: why something is NaN; empty where all is well.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    groups: int
    sigma: Tensor
    h: Tensor
    noise_floor: float
    alpha: PowerLawFit
    gamma: PowerLawFit
    s: PowerLawFit
    transfer_error: float
    pr_curvature: float
    pr_gradient: float
    entropy_rank_curvature: float
    entropy_rank_gradient: float
    directions_95_curvature: int
    directions_99_curvature: int
    directions_95_gradient: int
    directions_99_gradient: int
    zeta_bound: float
    zeta_bound_window: float
    n_usable: int
    n_negative: int
    n_repeated: int
    rank_models: RankModels
    note: str = ""

    @property
    def alpha_gamma(self) -> float:
        """alpha * gamma, which the transfer relation says is s."""
        return self.alpha.exponent * self.gamma.exponent

    @classmethod
    def from_spectrum(
        cls,
        sigma: Tensor,
        h: Tensor,
        *,
        name: str,
        kind: str = "dense",
        shape: tuple[int, int],
        groups: int = 1,
        eps: float = torch.finfo(torch.float32).eps,
        note: str = "",
    ) -> LayerSpectrum:
        """Fit everything there is to fit to singular values (K,) and curvatures (K,).

        Args:
            sigma: decreasing, not negative.
            h: in the order of sigma.
            name, kind, shape, groups, note: as in the attributes.
            eps: machine epsilon of the gradient, for the noise floor.
        """
        sigma, h = (t.detach().to("cpu", torch.float64) for t in (sigma, h))
        if sigma.shape != h.shape or sigma.ndim != 1:
            raise ValueError(f"sigma and h must be (K,), got {tuple(sigma.shape)} and {tuple(h.shape)}")
        floor = noise_floor(sigma, shape, groups, eps)
        usable = sigma > floor
        noise = {"below the noise floor": ~usable}
        positive = h[usable & (h > 0)]
        energy = sigma[usable].square()
        alpha = fit_power_law(sigma, h, exclude=noise)
        gamma = fit_rank_decay(sigma, exclude=noise)
        s = fit_rank_decay(h, exclude=noise)
        product = alpha.exponent * gamma.exponent
        if not note and alpha.n_used < 3:
            directions = int(usable.sum())
            note = f"{directions} directions above the noise floor, {alpha.n_used} points for alpha; a fit needs 3"
        return cls(
            name=name,
            kind=kind,
            shape=shape,
            groups=groups,
            sigma=sigma,
            h=torch.where(usable, h, torch.full_like(h, float("nan"))),
            noise_floor=floor,
            alpha=alpha,
            gamma=gamma,
            s=s,
            transfer_error=abs(s.exponent - product) / abs(s.exponent) if s.exponent else float("nan"),
            pr_curvature=participation_ratio(positive),
            pr_gradient=participation_ratio(energy),
            entropy_rank_curvature=entropy_rank(positive),
            entropy_rank_gradient=entropy_rank(energy),
            directions_95_curvature=directions_holding(positive, 0.95),
            directions_99_curvature=directions_holding(positive, 0.99),
            directions_95_gradient=directions_holding(energy, 0.95),
            directions_99_gradient=directions_holding(energy, 0.99),
            zeta_bound=zeta_bound(product),
            zeta_bound_window=zeta_bound(product, len(positive)),
            n_usable=int(usable.sum()),
            n_negative=int((h[usable] < 0).sum()),
            n_repeated=_repeated(sigma[usable], floor),
            rank_models=fit_rank_models(sigma[usable]),
            note=note,
        )

    def scalars(self) -> dict[str, float]:
        """The logged quantities of `LAYER_KEYS` by name."""
        return {key.name: float(key.value(self)) for key in LAYER_KEYS}

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-able values: NaN as None, infinity as "inf"."""
        return _plain(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerSpectrum:
        """The inverse of `to_dict`."""
        values = {f.name: data[f.name] for f in fields(cls)}
        for name in ("sigma", "h"):
            values[name] = torch.tensor([_number(x) for x in values[name]], dtype=torch.float64)
        for name in ("alpha", "gamma", "s"):
            values[name] = PowerLawFit(**_numbers(values[name], skip=("dropped",)))
        models = values["rank_models"]
        bic: dict[RankModel, float] = {name: _number(models["bic"][name]) for name in models["bic"]}
        coefficients = {k: tuple(_number(x) for x in fit["coefficients"]) for k, fit in models["fits"].items()}
        fits = {k: RankModelFit(c, _number(models["fits"][k]["rss"]), bic[k]) for k, c in coefficients.items()}
        values["rank_models"] = RankModels(models["winner"], bic, fits, models["n_used"], models["n_dropped"])
        values["shape"] = tuple(values["shape"])
        return cls(**_numbers(values, skip=("name", "kind", "note", "shape", "sigma", "h")))


@dataclass(frozen=True)
class LoggedKey:
    """A quantity logged per layer: its name, its meaning, how to read it, and whether its median is logged."""

    name: str
    meaning: str
    value: Callable[[LayerSpectrum], float]
    median: bool = False


LAYER_KEYS: tuple[LoggedKey, ...] = (
    LoggedKey("alpha", "slope of log h on log sigma", lambda x: x.alpha.exponent, median=True),
    LoggedKey("alpha_stderr", "standard error of alpha", lambda x: x.alpha.stderr),
    LoggedKey("r2_alpha", "r2 of the fit of alpha", lambda x: x.alpha.r2, median=True),
    LoggedKey("gamma", "minus the slope of log sigma_k on log k", lambda x: x.gamma.exponent, median=True),
    LoggedKey("s", "minus the slope of log sorted positive h on log rank", lambda x: x.s.exponent, median=True),
    LoggedKey("transfer_error", "abs(s - alpha gamma) / abs(s)", lambda x: x.transfer_error, median=True),
    LoggedKey("pr_curvature", "participation ratio of positive h", lambda x: x.pr_curvature, median=True),
    LoggedKey("pr_gradient", "participation ratio of sigma^2", lambda x: x.pr_gradient, median=True),
    LoggedKey("zeta_bound", "zeta(alpha gamma)^2 / zeta(2 alpha gamma)", lambda x: x.zeta_bound, median=True),
    LoggedKey("zeta_bound_window", "the same over the measured window", lambda x: x.zeta_bound_window, median=True),
    LoggedKey("negative_curvature", "directions with h < 0", lambda x: x.n_negative),
    LoggedKey("points", "points in the fit of alpha", lambda x: x.alpha.n_used),
)

REPORT_KEYS: dict[str, str] = {
    "loss": "the loss the probe measured, on its own batch and mode",
    "layers_measured": "layers with an alpha",
    "layers_failed": "layers chosen but without an alpha; the report's notes say why",
    "negative_curvature": "directions with h < 0, all layers",
}


@dataclass(frozen=True, eq=False)
class SpectralReport:
    """One measurement of a network.

    Attributes:
        layers: parameter name -> spectrum, in the order of the network.
        skipped: matrix parameters that were not measured -> why (frozen, not selected, ...).
        loss: value of the loss measured.
        n_samples: samples in the batch measured; None where the batch does not tell.
        curvature: the method that gave h.
        mode: "eval" or "train", of the network while it was measured.
        precision: the precision asked for.
        top_k: directions asked for per layer.
        seconds: wall time of the measurement.
        warnings: what was shared or left out beside single layers.
        step: optimizer steps taken before the measurement; None outside training.
        epoch: likewise.
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
    warnings: tuple[str, ...] = ()
    step: int | None = None
    epoch: int | None = None

    @property
    def failed(self) -> dict[str, str]:
        """Layers without an alpha -> why."""
        return {name: layer.note for name, layer in self.layers.items() if math.isnan(layer.alpha.exponent)}

    def problems(self) -> list[str]:
        """What could not be measured or copied, a line each."""
        return [f"{name}: {why}" for name, why in self.failed.items()] + list(self.warnings)

    def by_kind(self) -> dict[str, list[LayerSpectrum]]:
        """The layers of each kind."""
        kinds: dict[str, list[LayerSpectrum]] = {}
        for layer in self.layers.values():
            kinds.setdefault(layer.kind, []).append(layer)
        return kinds

    def medians(self) -> dict[str, float]:
        """Medians over all layers, and over those of each kind as ``kind/<kind>/<quantity>_median``; NaN left out."""
        out = _medians(self.layers.values(), "")
        for kind, layers in self.by_kind().items():
            out |= _medians(layers, f"kind/{kind}/")
        return out

    def scalars(self, layers: list[str] | None = None) -> dict[str, float]:
        """Flat logged names, without a prefix, of the aggregates and of the layers named (None: of all)."""
        out = self.medians()
        out["loss"] = self.loss
        out["layers_measured"] = float(len(self.layers) - len(self.failed))
        out["layers_failed"] = float(len(self.failed))
        out["negative_curvature"] = float(sum(layer.n_negative for layer in self.layers.values()))
        for name in self.layers if layers is None else layers:
            out |= {f"{name}/{key}": value for key, value in self.layers[name].scalars().items()}
        return out

    def at(self, *, step: int, epoch: int) -> SpectralReport:
        """The same report, placed in training."""
        return replace(self, step=step, epoch=epoch)

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-able values: NaN as None, infinity as "inf"."""
        return {"format": FORMAT, "version": FORMAT_VERSION, **_plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpectralReport:
        """The inverse of `to_dict`.

        Raises:
            ValueError: if the data is no report, or one of a newer version.
        """
        if data.get("format") != FORMAT or data.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"expected a {FORMAT} of version {FORMAT_VERSION}, got {data.get('format')!r} {data.get('version')!r}"
            )
        values = {f.name: data[f.name] for f in fields(cls)}
        values["layers"] = {name: LayerSpectrum.from_dict(layer) for name, layer in data["layers"].items()}
        values["warnings"] = tuple(data["warnings"])
        values["loss"], values["seconds"] = _number(data["loss"]), _number(data["seconds"])
        return cls(**values)

    def to_json(self, path: str | Path | None = None) -> str:
        """Standard JSON text, also written to a file if a path is given."""
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> SpectralReport:
        """The inverse of `to_json`: JSON text, or the path of a file with it."""
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else None
        return cls.from_dict(json.loads(Path(source).read_text(encoding="utf-8") if text is None else text))

    def to_pandas(self) -> pandas.DataFrame:
        """A row per layer, indexed by its name. Needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas; to_dict() needs nothing") from error
        rows = [
            {"layer": x.name, "kind": x.kind, "m": x.shape[0], "n": x.shape[1], **x.scalars(), "note": x.note}
            for x in self.layers.values()
        ]
        columns = ["layer", "kind", "m", "n", *(key.name for key in LAYER_KEYS), "note"]
        frame: pandas.DataFrame = pandas.DataFrame(rows, columns=columns).set_index("layer")
        return frame

    def __repr__(self) -> str:
        alpha = self.medians()["alpha_median"]
        where = "" if self.step is None else f" at step {self.step}"
        return f"SpectralReport({len(self.layers)} layers{where}, loss {self.loss:.4g}, median alpha {alpha:.3g})"


def median(values: list[float]) -> float:
    """The median of those that are not NaN; NaN where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else float("nan")


def _medians(layers: Any, prefix: str) -> dict[str, float]:
    layers = list(layers)
    return {
        f"{prefix}{key.name}_median": median([key.value(layer) for layer in layers]) for key in LAYER_KEYS if key.median
    }


def _repeated(sigma: Tensor, floor: float) -> int:
    equal = (sigma[:-1] - sigma[1:]) <= floor
    padding = torch.zeros(1, dtype=torch.bool)
    return int((torch.cat([equal, padding]) | torch.cat([padding, equal])).sum()) if len(sigma) > 1 else 0


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _number(value: float | str | None) -> float:
    return float("nan") if value is None else float(value)


def _numbers(values: Mapping[str, Any], skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Undo the encoding of NaN and infinity, in place of a None or a string."""
    return {
        key: _number(value) if key not in skip and (value is None or isinstance(value, str)) else value
        for key, value in values.items()
    }
