"""The page's HTML and data: what is in it, how names are escaped, how long runs are thinned."""

import base64
import gzip
import html.parser
import itertools
import json
import math
import re
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from reports import dead, layer, report

from lightning_spectral.analysis import TRUSTED
from lightning_spectral.numerics.gradient_noise import GradientNoise
from lightning_spectral.records.alignment import KroneckerFactors
from lightning_spectral.records.log_keys import LAYER_KEYS
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.records.step import StepMeasurement
from lightning_spectral.report import RunError, run_of, write_page
from lightning_spectral.report.page.build import PAGE_BYTES, SCRIPTS, is_page, page, plotly_js, runs_page
from lightning_spectral.report.page.data import page_data, script_json
from lightning_spectral.report.runs.run import Run
from lightning_spectral.summary import summary

HOSTILE = [
    "<script>alert(1)</script>", "</script><!--", "]]><b>&amp;", "a\u2028b\u2029c",
    "<!--=data-->/*=page*/", '"\'`${1}\\',
    "<a href='javascript:alert(1)'>x</a>", "\ud800",
]  # fmt: skip


def run(*steps, layers=("a", "b")):
    return run_of([report(*(layer(name) for name in layers), step=step) for step in steps or (0, 5)], "mine")


def scripts(text):
    """The contents of the page's script elements, as an HTML parser finds them."""

    class Parser(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.found, self.tags, self.inside = [], [], False

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, dict(attributes)))
            self.inside = tag == "script"
            if self.inside:
                self.found.append("")

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            if self.inside:
                self.found[-1] += data

    parser = Parser()
    parser.feed(text)
    return parser.found, parser.tags


def embedded(text):
    return json.loads(scripts(text)[0][0])


def test_page_is_one_file_that_loads_nothing():
    text = page(run(), title="A <run> & more")
    found, tags = scripts(text)
    assert len(found) == 3
    assert not any({"src", "srcset"} & attributes.keys() for _, attributes in tags)
    assert [attributes for tag, attributes in tags if tag == "link"] == [{"rel": "icon", "href": "data:,"}]
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert text.count("A &lt;run&gt; &amp; more") == 2
    assert gzip.decompress(base64.b64decode(found[1])).decode() == plotly_js()
    assert len(text.encode()) < PAGE_BYTES


def test_data_is_the_reports():
    steps = [
        report(layer("a", noise=0.1, negative=2, k=8), dead("b"), step=step, skipped={"e": "frozen"}) for step in (0, 7)
    ]
    data = embedded(page(run_of(steps, "mine")))
    assert (data["layers"], data["kinds"], data["shapes"]) == (["a", "b"], ["dense", "dense"], ["64 × 32", "5 × 5"])
    last, expected = data["probes"][-1], steps[-1].layers["a"]
    assert (last["label"], last["step"], last["loss"]) == ("step 7", 7, 1.25)
    for key, value in zip(data["keys"], last["values"][0], strict=True):
        number = expected.scalars()[key]
        assert value == (None if math.isnan(number) else pytest.approx(number, rel=1e-5))
    assert last["values"][1][data["keys"].index("alpha")] is None
    assert last["spectra"][0]["sigma"] == pytest.approx(expected.sigma.tolist(), rel=1e-5)
    assert last["spectra"][0]["h"] == pytest.approx(expected.h.tolist(), rel=1e-5)
    assert last["spectra"][0]["error"] is None
    assert last["spectra"][0]["lines"] == pytest.approx(
        [fit.intercept for fit in (expected.alpha, expected.gamma, expected.s)], rel=1e-5, abs=1e-9
    )
    assert last["summary"][:2] == summary(steps[-1])[:2]
    assert last["summary"][-1].startswith("From step 0 to 7")
    assert last["notes"] == {"b": "nothing flows through it"}
    assert last["problems"] == ["b: nothing flows through it"]
    assert last["skipped"] == ["e: frozen"]
    assert "8 samples, eval mode, float32, curvature by exact" in last["facts"]
    assert "inf" in json.dumps(embedded(page(run_of([report(layer("a", alpha=0.5))], "x"))))


def test_the_summary_has_the_scale_of_the_optimizers_step_up_to_the_probe():
    """Of slopes that make it 2, 0.25 and NaN; no step follows the final weights."""
    steps = run(0, 4, 8, 12).steps
    curvatures = (1.0, 8.0, -1.0)
    updates = [StepMeasurement(-2.0, curvature, {}, 1.0, 0.5) for curvature in curvatures]
    shown = [replace(step, update=update) for step, update in zip(steps, [*updates, None], strict=True)]
    data = embedded(page(replace(run(), steps=tuple(shown))))
    said = (
        "step/scale, the best factor on the optimizer's step, was {}; it was below 1/2, where a step raises the loss "
        "of its batch, at {} probes."
    )
    after = said.format("0.25 at step 4", "1 of 2")
    assert [probe["summary"][-1] for probe in data["probes"]] == [
        said.format("2 at step 0", "0 of 1"),
        after,
        after,
        after,
    ]
    assert not any("step/scale" in text for probe in embedded(page(run()))["probes"] for text in probe["summary"])


def test_layers_that_come_and_go():
    reports = [report(layer("a"), step=0), report(layer("b"), layer("a"), step=1), report(layer("b"), step=2)]
    data = page_data(run_of(reports, "x"))
    assert data["layers"] == ["b", "a"]
    assert [[row is None for row in probe["values"]] for probe in data["probes"]] == [
        [True, False], [False, False], [False, True],
    ]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_names(name, tmp_path):
    ordinary = scripts(page(run(layers=("a",))))
    text = write_page(run(layers=(name,)), tmp_path / "p.html", title=name).read_text(encoding="utf-8")
    found, tags = scripts(text)
    assert json.loads(found[0])["layers"] == [name]
    assert [tag for tag, _ in tags if tag != "li"] == [tag for tag, _ in ordinary[1] if tag != "li"]
    assert found[2] == ordinary[0][2]
    assert not {"<", ">", "&", "\u2028", "\u2029"} & set(found[0])


def test_json_for_a_script_is_the_same_json():
    value = {"</script>": ["<!--", "\u2028", "&", 1.5]}
    assert json.loads(script_json(value)) == value


def long_run(probes, layers):
    names = [f"blocks.{i}.attention.projection.weight" for i in range(layers)]
    made = report(*(layer(name, noise=0.1) for name in names))
    return run_of([made.at(step=10 * i, epoch=0) for i in range(probes)], "long")


def test_long_runs_are_thinned_evenly_and_say_so():
    long = long_run(30, 8)
    size = len(script_json(page_data(long)))
    assert page_data(long)["notes"] == []
    for limit in (size // 2, size // 8, size // 20):
        data = page_data(long, limit=limit)
        assert len(script_json(data)) < 1.2 * limit + 3000
        steps = [probe["step"] for probe in data["probes"]]
        whole = [probe["step"] for probe in data["probes"] if probe["spectra"] is not None]
        assert steps[0] == 0
        assert steps[-1] == 290
        assert len(whole) < 30
        assert any(f"are shown at {len(whole)} of 30 probes" in note for note in data["notes"])
        assert any(f"{len(steps)} of 30 probes are shown" in note for note in data["notes"]) == (len(steps) < 30)
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert max(gaps) - min(gaps) <= 10


def test_a_huge_run_stays_small():
    # Both its probes and their spectra are thinned.
    assert len(page(long_run(50, 200)).encode()) < PAGE_BYTES


def test_a_page_is_known_as_one(tmp_path):
    assert is_page(write_page(run(), tmp_path / "p.html", title="x" * 300))
    (tmp_path / "other.html").write_text("<html>lightning-spectral</html>")
    assert not is_page(tmp_path / "other.html")
    assert not is_page(tmp_path)


def test_rank_models_and_the_split_of_alpha_are_the_reports():
    k = torch.arange(1, 21, dtype=torch.float64)
    factors = KroneckerFactors(3 * k**-0.5, k**-0.5, k**-1, 2 * k**-0.5, k**0, 4.5, 7.25, 64)
    whole = layer("a", noise=0.2, factors=factors, spectrum=torch.arange(1, 41, dtype=torch.float64) ** -1)
    probe = page_data(run_of([report(whole, layer("b"), dead("c"))], "mine"))["probes"][0]
    first, second, none = probe["spectra"]
    assert first["spectrum"] == pytest.approx(whole.spectrum.tolist(), rel=1e-5)
    assert (first["ranked"], second["ranked"], second["spectrum"], second["split"]) == (40, 20, None, None)
    assert (none["models"], none["ranked"]) == ({}, 0)
    for model, fit in whole.rank_models.fits.items():
        assert first["models"][model] == pytest.approx(fit.coefficients, rel=1e-5, abs=1e-9)
    assert probe["winners"] == ["power_law", "power_law", ""]
    assert probe["quarters"][0] == pytest.approx([fit.exponent for fit in whole.alpha_quartiles], rel=1e-5)
    split = {key: (values, intercept) for key, values, intercept in first["split"]}
    alignment = whole.alignment
    assert split["beta"][0] == pytest.approx((alignment.lambda_delta * alignment.lambda_a).tolist(), rel=1e-5)
    assert split["phi"] == (
        pytest.approx(alignment.phi_k.tolist(), rel=1e-5),
        pytest.approx(alignment.phi.intercept, rel=1e-5),
    )
    assert split["chi_slope"][0] == pytest.approx(alignment.chi.tolist(), rel=1e-5)


def test_empty_run(tmp_path):
    with pytest.raises(RunError, match="empty: no probe to show"):
        write_page(Run("empty", (), ()), tmp_path / "p.html")


@pytest.mark.parametrize("reports", [report(layer("a")), [report(layer("a"))]])
def test_reports_are_no_run(reports, tmp_path):
    with pytest.raises(TypeError, match=r"run_of\(reports, name\)"):
        write_page(reports, tmp_path / "page.html")


def test_every_place_in_the_template_is_filled_and_every_element_is_there():
    folder = files("lightning_spectral.report.page") / "assets"
    scripts_there = {file.name for file in folder.iterdir() if file.name.endswith(".js")}
    assert {f"{name}.js" for names in SCRIPTS.values() for name in names} == scripts_there
    for name, text in (("page", page(run())), ("runs", runs_page([run(), replace(run(), name="other")]))):
        template = "".join((folder / f"{part}.html").read_text(encoding="utf-8") for part in ("frame", name))
        script = "".join((folder / f"{part}.js").read_text(encoding="utf-8") for part in ("frame", name))
        wanted = set(re.findall(r'(?:get|list)\(\s*"([\w-]+)"', script))
        assert wanted <= set(re.findall(r' id="([\w-]+)"', template))
        assert "<!--=" not in text.partition('<script type="application/json"')[0]


def test_meanings_cover_the_keys():
    data = page_data(run())
    assert data["keys"] == [key.name for key in LAYER_KEYS if not key.part] == list(data["meanings"])
    asked = page_data(run_of([report(layer("a", bootstrap=10))], "mine"))
    assert set(asked["keys"]) - set(data["keys"]) == {key.name for key in LAYER_KEYS if key.part == "intervals"}
    assert not any(isinstance(value, float) and math.isnan(value) for value in data["probes"][0]["values"][0])
    assert isinstance(run().steps[0].report, SpectralReport)


def noise(signal):
    return {"gradient_noise": GradientNoise(signal, 0.01, 64 * (1 - signal) / signal, 2.0, parts=4)}


def test_medians_of_kinds_are_over_fits_to_trust():
    good = [layer(f"g{i}", alpha=2.0 + i, **noise(0.95)) for i in range(3)]
    doubtful = [layer(f"d{i}", alpha=7.0, **noise(0.3)) for i in range(4)]
    head = layer("h", alpha=1.0, kind="head", **noise(0.3))
    made = report(*good, *doubtful, head)
    data = page_data(run_of([made], "mine"))
    kinds = {
        kind: dict(zip(data["medians"], medians, strict=True)) for kind, medians in data["probes"][0]["kinds"].items()
    }
    assert kinds["dense"]["alpha"] == pytest.approx(3.0)
    assert kinds["head"]["alpha"] is None
    # What tells whether to trust a fit is over all layers.
    assert kinds["dense"]["signal"] == pytest.approx(0.3)
    assert kinds["head"]["h_max"] == pytest.approx(made.layers["h"].h_max, rel=1e-5)
    assert data["medians"] == {key.name: int(key.of_fit) for key in LAYER_KEYS if key.median and not key.part}
    assert data["medians"]["alpha"] == 1
    assert data["medians"]["h_max"] == data["medians"]["sigma_max"] == 0


def test_facts_tell_the_samples_of_gradient_and_curvature_apart():
    for curvature, said in (
        (8, "8 samples, "),
        (None, "8 samples, "),
        (2, "gradient of 8 samples, curvature of 2, "),
    ):
        made = report(layer("a"), curvature_samples=curvature)
        assert page_data(run_of([made], "mine"))["probes"][0]["facts"].startswith(said + "eval mode")


def test_the_page_greys_what_python_does_not_trust():
    late = report(layer("few", negative=17), layer("b"), dead("dead"), layer("noisy", **noise(0.5)), step=9)
    data = page_data(run_of([report(layer("b"), step=0), late], "mine"))
    assert data["layers"] == ["few", "b", "dead", "noisy"]
    assert data["probes"][1]["doubts"] == ["3 points", "", "no fit", "noise"]
    assert data["probes"][0]["doubts"] == [None, "", None, None]
    assert [not doubt for doubt in data["probes"][1]["doubts"]] == [
        late.layers[name].fit_quality.trusted for name in data["layers"]
    ]
    assert "no fit, r2 below 0.9, fewer than 5 points" in page(run())
    assert f"Filled: a fit to trust ({TRUSTED})" in page(run())
