"""Reports to dicts, JSON and DataFrames, and back."""

import builtins
import copy
import json
import math
import pickle

import pytest
import reports
import synthetic
import torch
from cases import CASES
from fits import fit_numbers
from torch import nn

from lightning_spectral import LayerSpectrum, SpectralReport, measure_spectra
from lightning_spectral.analysis import compare_kinds
from lightning_spectral.layers.names import shortened
from lightning_spectral.records.layer_spectrum import PARTS
from lightning_spectral.records.log_keys import (
    LAYER_KEYS,
    PROBE_KEYS,
    REPORT_KEYS,
    STEP_CURVATURE,
    STEP_KEYS,
    former_key,
    layer_key,
    median_key,
)

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


@pytest.fixture
def report():
    model, batch = next(c for c in CASES if c.name == "gpt_block_tied").build()
    model.block.up.weight.requires_grad_(False)
    return measure_spectra(model, batch, CASES[-2].loss, top_k=5).at(step=7, epoch=1)


def test_json_round_trip(report, tmp_path):
    assert any(math.isnan(layer.zeta_bound) or math.isinf(layer.zeta_bound) for layer in report.layers.values())
    for back in (SpectralReport.from_json(report.to_json()), SpectralReport.from_dict(report.to_dict())):
        assert back.to_json() == report.to_json()
        for name, layer in report.layers.items():
            assert torch.equal(torch.nan_to_num(back.layers[name].h), torch.nan_to_num(layer.h))
            assert back.layers[name].sigma.dtype is torch.float64
            assert repr(back.layers[name].alpha) == repr(layer.alpha)
            assert repr(back.layers[name].rank_models) == repr(layer.rank_models)
            assert back.layers[name].shape == layer.shape
    path = tmp_path / "report.json"
    report.to_json(path)
    assert SpectralReport.from_json(path).step == SpectralReport.from_json(str(path)).step == 7


@pytest.fixture
def full():
    """A report of everything that is measured on request."""
    case = CASES[0]
    options = {"spectrum_top_k": 8, "weight_spectra": True, "bootstrap": 20, "curvature_fraction": 2, "alignment": True}
    model, batch = case.build()
    return measure_spectra(model, batch, case.loss, top_k=5, curvature="exact", **options)


def test_json_round_trip_of_what_is_measured_on_request(full):
    back = SpectralReport.from_json(full.to_json())
    assert back.to_json() == full.to_json()
    assert back.spectrum_top_k == 8
    for name, layer in full.layers.items():
        found = back.layers[name]
        assert torch.equal(found.spectrum, layer.spectrum)
        assert torch.equal(found.weights.sigma, layer.weights.sigma)
        assert repr(found.weights) == repr(layer.weights)
        assert (found.intervals, found.fraction) == (layer.intervals, layer.fraction)
        assert repr(found.alpha_quartiles) == repr(layer.alpha_quartiles)
        assert found.rank_models.margin == layer.rank_models.margin


def test_what_is_measured_on_request_is_logged_where_it_was_asked_for(full, report):
    for key in LAYER_KEYS:
        assert f"{key.name}/0.weight" in full.scalars()
        assert (f"{key.name}/head.weight" in report.scalars()) == (not key.part)
        assert (f"{key.name}_median" in full.scalars()) == key.median
        assert (f"{key.name}_median" in report.scalars()) == (key.median and not key.part)
    assert {key.part for key in LAYER_KEYS} == {"", *PARTS}


def test_json_is_standard(report):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads(report.to_json(), parse_constant=refuse)


def test_json_of_a_layer_without_a_direction():
    empty = fit_numbers(torch.zeros(0), torch.zeros(0), name="w", shape=(3, 3), note="why")
    assert math.isnan(empty.transfer_error)
    assert LayerSpectrum.from_dict(empty.to_dict()).to_dict() == empty.to_dict()


@pytest.mark.parametrize("data", [{}, {"format": "other", "version": 3}])
def test_data_that_is_no_report(data):
    with pytest.raises(ValueError, match="expected a lightning-spectral-report of version 3, got the format"):
        SpectralReport.from_dict(data)


def test_a_file_that_is_no_report(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    for source in (tmp_path / "list.json", "[1]"):
        with pytest.raises(ValueError, match=r"^expected a lightning-spectral-report .*, got a list$"):
            SpectralReport.from_json(source)


@pytest.mark.parametrize("version", [2, 99, None])
def test_a_report_of_another_version(full, version):
    data = full.to_dict() | {"version": version}
    with pytest.raises(ValueError, match=f"of version 3, got one of version {version}: measure again"):
        SpectralReport.from_dict(data)


def test_pandas(report):
    frame = report.to_pandas()
    assert list(frame.index) == list(report.layers)
    assert frame.loc["head.weight", "alpha"] == report.layers["head.weight"].alpha.exponent
    assert {"kind", "m", "n", "note"} <= set(frame.columns)
    assert frame.loc["head.weight", "rank_model"] == report.layers["head.weight"].rank_models.winner
    assert "s_weight" not in frame.columns


def test_pandas_holds_what_was_asked_for(full):
    frame = full.to_pandas()
    layer = full.layers["0.weight"]
    assert frame.loc["0.weight", "s_weight"] == layer.weights.s.exponent
    assert frame.loc["0.weight", "alpha_low"] == layer.intervals.alpha.low
    assert frame.loc["0.weight", "curvature_fraction"] == layer.fraction.value
    assert frame.loc["0.weight", "n"] == 6
    assert math.isnan(frame.loc["0.weight", "alpha_q1"])


def test_pandas_that_is_not_installed(report, monkeypatch):
    real = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.to_pandas()


def test_scalars_have_one_name_per_quantity(report):
    scalars = report.scalars()
    for key in (key for key in LAYER_KEYS if not key.part):
        assert scalars[f"{key.name}/head.weight"] == pytest.approx(key.value(report.layers["head.weight"]), nan_ok=True)
        if key.median:
            assert f"{key.name}_median" in scalars
            assert f"{key.name}/median_head" in scalars
    assert set(REPORT_KEYS) <= scalars.keys()
    assert not any(key.endswith("/head.weight") for key in report.scalars([]))
    assert scalars["layers_measured"] + scalars["layers_failed"] == len(report.layers)


def test_no_key_is_the_beginning_of_anothers_path(full):
    keys = {*full.scalars(), *PROBE_KEYS, *STEP_KEYS, layer_key(STEP_CURVATURE.name, "0.weight")}
    folders = {key.rpartition("/")[0] for key in keys}
    assert not folders & keys


def test_former_keys_are_those_of_layers_kinds_and_the_sum():
    assert former_key(layer_key("step_curvature", "net/a.weight")) == "net/a.weight/step_curvature"
    assert former_key(median_key("s", "mlp_up", of_all=True)) == "kind/mlp_up/s_median_all"
    assert former_key("negative_curvature_sum") == "negative_curvature"
    unchanged = [median_key("alpha"), *REPORT_KEYS.keys() - {"negative_curvature_sum"}, *PROBE_KEYS, *STEP_KEYS]
    assert [key for key in unchanged if former_key(key) is not None] == []


def test_medians_leave_nan_out():
    k = torch.arange(1, 6, dtype=torch.float64)
    layers = {
        name: fit_numbers(k**-1, k**-slope, name=name, kind=kind, shape=(9, 9))
        for name, slope, kind in (("a", 1.0, "conv"), ("b", 2.0, "conv"), ("c", 4.0, "head"))
    }
    layers["d"] = fit_numbers(torch.zeros(0), torch.zeros(0), name="d", shape=(9, 9), note="dead")
    report = SpectralReport(layers, {}, 1.0, 8, "exact", "eval", "float32", 5, 0.1)
    medians = report.medians()
    assert medians["alpha_median"] == pytest.approx(2.0)
    assert medians["alpha/median_conv"] == pytest.approx(1.5)
    assert math.isnan(medians["alpha/median_dense"])
    assert report.failed == {"d": "dead"}
    assert report.problems() == ["d: dead"]
    summary = {row.kind: row for row in compare_kinds(report)}
    assert summary["conv"].alpha == pytest.approx(1.5)
    assert summary["conv"].layers == 2
    assert "1.94 to 2.17" in summary["conv"].paper_alpha


def test_repr_says_what_is_inside(report):
    assert repr(report).startswith(f"SpectralReport({len(report.layers)} layers at step 7, loss ")


def test_skipped_and_chosen_layers_cover_every_matrix(report):
    assert report.skipped == {"block.up.weight": "frozen"}
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    only = measure_spectra(model, torch.randn(9, 6), lambda m, x: m(x).square().mean(), layers="0")
    assert only.skipped == {"1.weight": "not selected by layers"}


def test_a_layer_by_the_name_that_tables_show(report):
    names = list(report.layers)
    assert "head.weight" in names
    assert report.layers["head"] is report.layers["head.weight"]
    assert "head" not in report.layers
    assert report.layers.get("head") is None
    made = SpectralReport.from_json(synthetic.deep().to_json())
    for name, layer in made.layers.items():
        for length in (60, 40, 30):
            if (shown := shortened(name, length)) not in made.layers and "\u2026" not in shown:
                assert made.layers[shown] is layer
    assert isinstance(report.layers, dict)
    assert json.loads(json.dumps(list(report.to_dict()["layers"]))) == names
    assert copy.deepcopy(report).layers["head"].name == pickle.loads(pickle.dumps(report)).layers["head"].name


def test_a_layer_that_is_not_there_names_those_like_it():
    layers = reports.report(*(reports.layer(f"{block}.{i}.weight") for block in ("net", "not") for i in (4, 14))).layers
    assert list(layers) == ["net.4.weight", "net.14.weight", "not.4.weight", "not.14.weight"]
    assert layers["net.4"].name == "net.4.weight"
    with pytest.raises(KeyError, match=r"'n.4' is short for several layers: net.4.weight, not.4.weight"):
        layers["n.4"]
    with pytest.raises(KeyError, match=r"no layer 'net.5'; similar: net.4.weight"):
        layers["net.5"]
    for unknown in ("something else", "", 4):
        with pytest.raises(KeyError, match=f"no layer {unknown!r}; there are 4"):
            layers[unknown]
