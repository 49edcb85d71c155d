"""What users see of a probe in Weights & Biases, read back from offline runs."""

import inspect
import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from logged import FIGURES, deep, equal_tables, offline_run, probe_rows, same, step_rows
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger
from tiny import Tiny, batch_of, fit_tiny
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import SpectralProbe, __version__
from lightning_spectral.callbacks import report_writer
from lightning_spectral.callbacks.alerts import Alerts
from lightning_spectral.callbacks.log_selection import SUMMARIZED
from lightning_spectral.records.log_keys import PROBE_KEYS, STEP_KEYS
from lightning_spectral.report import read_run
from lightning_spectral.report.page.build import is_page
from lightning_spectral.report.trackers import Row, tracker_of

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


def test_wandb_with_nothing_configured(tmp_path):
    probe = SpectralProbe(every_n_steps=2, top_k=4)
    records, files = offline_run(tmp_path, probe, deep())
    rows = probe_rows(records)
    assert [row["trainer/global_step"] for row in rows] == [0, 2, 4]
    assert len({row["_step"] for row in rows}) == 3
    for row, measured in zip(rows, probe.history, strict=True):
        truth = measured.scalars()
        logged = {key.removeprefix("spectral/"): row[key] for key in row if key.startswith("spectral/")}
        assert sum(key.startswith("alpha/net.") for key in logged) == 24
        assert set(logged) - set(truth) == set(PROBE_KEYS)
        assert all(same(value, truth[key]) for key, value in logged.items() if key in truth)
    defined = [record["metric"] for record in records if record.get("type") == "metric"]
    hidden = {metric["name"] for metric in defined if metric["options"].get("hidden")}
    assert all(m["step_metric"] == "trainer/global_step" for m in defined if m.get("name") in hidden)
    steps = step_rows(records)
    assert [row["trainer/global_step"] for row in steps] == [0, 2, 4]
    # W&B's own steps: each row of a step comes after that of its probe.
    assert [row["_step"] for pair in zip(rows, steps, strict=True) for row in pair] == [0, 1, 2, 3, 4, 5]
    of_steps = {key for key in steps[0] if key.startswith("spectral/")}
    assert of_steps >= {f"spectral/{key}" for key in STEP_KEYS}
    assert sum(key.startswith("spectral/step_curvature/") for key in of_steps) == 24
    # What is NaN in all rows and has a minimum is in none.
    of_rows = {key for key in (*rows[0], *steps[0], *(f"spectral/{key}" for key in SUMMARIZED)) if "spectral/" in key}
    visible = of_rows - hidden
    assert len(visible) == 40
    assert "spectral/step/scale" in visible
    assert {"spectral/alpha_median", "spectral/zeta_bound/median_dense", "spectral/alpha/net.0.weight"} <= visible
    assert not [key for key in rows[0] if "table" in key.lower() or "figures" in key]
    assert not (files / "media").exists()


def test_wandb_figures_tables_and_the_chart_of_alpha_by_depth(tmp_path):
    probe = SpectralProbe(every_n_steps=2, log_figures_every=2, log_tables=True, prefix="my/probe")
    records, files = offline_run(tmp_path, probe)
    rows = probe_rows(records, "my/probe")
    assert [row["trainer/global_step"] for row in rows] == [0, 2, 4]
    for i, (row, measured) in enumerate(zip(rows, probe.history, strict=True)):
        assert same(row["my/probe/loss"], measured.loss)
        shown = {key.split("/")[3].split(".")[0] for key in row if key.startswith("my/probe/figures/")}
        assert shown == (set() if i == 1 else set(FIGURES))
        for name in shown:
            pixels = numpy.asarray(Image.open(files / row[f"my/probe/figures/{name}.path"]).convert("L"))
            assert pixels.std() > 5
            assert pixels.shape[1] >= 800
        table = json.loads((files / row["my/probe/layers.path"]).read_text())
        equal_tables(table["columns"], table["data"], measured)
        lines = json.loads((files / row["Custom Chart Tables/my/probe/alpha_by_depth_table.path"]).read_text())
        assert lines["columns"] == ["step", "lineKey", "lineVal"]
        expected = [
            [place, f"step {earlier.step}", x.alpha.exponent]
            for earlier in probe.history[: i + 1]
            for place, x in enumerate(earlier.layers.values(), 1)
            if not math.isnan(x.alpha.exponent)
        ]
        assert [line[:2] for line in lines["data"]] == [line[:2] for line in expected]
        assert all(same(a[2], b[2]) for a, b in zip(lines["data"], expected, strict=True))
    charted = [r["config"] for r in records if "alpha_by_depth" in json.dumps(r.get("config", ""))]
    assert "wandb/lineseries/v0" in json.dumps(charted)


def test_wandb_run_is_read_back_as_a_run(tmp_path):
    probe = SpectralProbe(every_n_steps=2, prefix="my/probe")
    _, files = offline_run(tmp_path, probe)
    assert [file.name for file in files.glob("*.jsonl")] == ["spectra-my%2Fprobe.jsonl"]
    for path in (files, files.parent):
        run = read_run([path])
        assert [read.report.to_dict() for read in run.steps] == [report.to_dict() for report in probe.history]


def test_wandb_hides_nothing_where_all_charts_are_wanted(tmp_path):
    records, _ = offline_run(tmp_path, SpectralProbe(wandb_charts=None, top_k=3), deep(), steps=1)
    assert not [r for r in records if r.get("metric", {}).get("options", {}).get("hidden")]


def config_of(records):
    """The configuration as a run's records leave it."""
    config = {}
    for record in records:
        config |= record.get("config", {}).get("update", {})
    return config


def kept_files(records):
    """Files with the time at which they are uploaded, in the order of the records."""
    files = [file for record in records for file in record.get("files", {}).get("files", [])]
    return [(file["path"], file.get("policy", "NOW")) for file in files if file["path"].startswith("spectra")]


@pytest.mark.usefixtures("trusting")
def test_wandb_has_the_options_the_summaries_and_the_files_of_the_run(tmp_path):
    probe = SpectralProbe(
        every_n_steps=2, layers=["net.*"], batch=DataLoader(TensorDataset(*batch_of()), 16), wandb_artifact=True
    )
    records, files = offline_run(tmp_path, probe)
    config = config_of(records)["spectral"]
    names = set(inspect.signature(SpectralProbe).parameters)
    assert set(config) == names | {"version", "method"}
    assert (config["layers"], config["every_n_steps"], config["kinds"]) == (["net.*"], 2, None)
    assert config["batch"] == "DataLoader, batch_size=16"
    assert config["version"] == __version__
    assert probe.last_report.chosen.startswith(f"{config['method']}:")

    summary = {}
    for record in records:
        summary |= record.get("summary", {}).get("update", {})
    rows = probe_rows(records)
    assert summary["spectral/r2_alpha_median"] == rows[-1]["spectral/r2_alpha_median"]
    for key, of in (("spectral/alpha_median", rows), ("spectral/step/scale", step_rows(records))):
        values = [row[key] for row in of]
        assert summary[key] == {"last": values[-1], "min": min(values), "max": max(values)}
        assert len(values) == 3
    for row, report in zip(rows, probe.history, strict=True):
        assert (row["spectral/gradient_samples"], row["spectral/curvature_samples"]) == (
            report.n_samples,
            report.curvature_samples,
        )

    assert kept_files(records) == [("spectra.jsonl", "END"), ("spectra.jsonl", "NOW"), ("spectra.html", "NOW")]
    assert is_page(files / "spectra.html")
    (artifact,) = [record["artifact"] for record in records if record.get("type") == "artifact"]
    assert (artifact["type"], artifact["name"].partition("-")[0]) == ("spectra", "spectral")
    assert {entry["path"] for entry in artifact["manifest"]["contents"]} == {"spectra.jsonl", "spectra.html"}


def test_a_quantity_that_could_not_be_measured_spoils_no_summary():
    run = Run()
    tracker = tracker_of(WandbLogger(run), pytest.fail)
    for step, alpha in enumerate((2.0, math.nan, 1.0)):
        scalars = {"spectral/alpha_median": alpha, "spectral/loss": alpha}
        tracker.write(Row("spectral", step, scalars, summarized=["spectral/alpha_median"]))
    assert [sorted(row) for row in run.rows] == [
        ["spectral/alpha_median", "spectral/loss"], ["spectral/loss"], ["spectral/alpha_median", "spectral/loss"],
    ]  # fmt: skip
    assert [(name, options.get("summary")) for name, options in run.defined] == [
        ("spectral/alpha_median", "last,min,max"), ("spectral/loss", None),
    ]  # fmt: skip


class Run:
    """A W&B run as far as a tracker uses it: what it was given."""

    id = "abc"

    def __init__(self, folder=None):
        self.dir, self.config = str(folder), {}
        self.rows, self.defined, self.alerts, self.saved = [], [], [], []

    def define_metric(self, name, **options):
        self.defined.append((name, options))

    def alert(self, title, text, level):
        self.alerts.append((title, text, level))

    def save(self, path, base_path, policy):
        self.saved.append((Path(path).relative_to(base_path), policy))


class WandbLogger(DummyLogger):
    """A logger that W&B's is told by."""

    _prefix = ""

    def __init__(self, run):
        super().__init__()
        self.run = run

    @property
    def experiment(self):
        return self.run

    def log_metrics(self, metrics, step=None):
        self.run.rows.append(metrics)


def test_alerts_tell_failed_probes_and_steps_that_are_too_long_once_each():
    alerts = Alerts("spectral")

    def titles(**scalars):
        row = Row("spectral", 7, {f"spectral/{key.replace('__', '/')}": value for key, value in scalars.items()})
        return [title for title, _ in alerts.of(row)]

    nan = math.nan
    assert [titles(layers_measured=n) for n in (3.0, nan, nan, 3.0, nan)] == [
        [], ["spectral: a probe failed"], [], [], ["spectral: a probe failed"],
    ]  # fmt: skip
    long = ["spectral: steps are too long"]
    scales = (0.4, 0.4, nan, 0.6, 0.4, nan, 0.4, 0.4, 0.4, 0.6, 0.1, 0.1, 0.1)
    assert [titles(step__scale=scale) for scale in scales] == [[]] * 7 + [long] + [[]] * 4 + [long]


@pytest.mark.parametrize(("asked", "titles"), [(True, ["spectral: steps are too long"]), (False, [])])
def test_alerts_are_sent_where_they_are_asked_for(asked, titles, tmp_path):
    class Leaps(Tiny):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=100.0)

    run = Run(tmp_path)
    probe = SpectralProbe(every_n_steps=1, wandb_alerts=asked, keep_reports=False)
    fit_tiny(probe, Leaps(), steps=4, logger=[WandbLogger(run)])
    assert [(title, level) for title, _, level in run.alerts] == [(title, "WARN") for title in titles]


def test_files_that_lie_elsewhere_are_copied_into_the_run(tmp_path):
    (tmp_path / "files").mkdir()
    run, csv_logger = Run(tmp_path / "files"), CSVLogger(tmp_path)
    probe = SpectralProbe(every_n_steps=1, prefix="my/probe")
    fit_tiny(probe, steps=2, logger=[csv_logger, WandbLogger(run)])
    names = ["spectra-my%2Fprobe.jsonl", "spectra-my%2Fprobe.html"]
    assert run.saved == [(Path(name), "now") for name in names]
    for name in names:
        assert (tmp_path / "files" / name).read_bytes() == (Path(csv_logger.log_dir) / name).read_bytes()


def test_a_page_that_needs_plotly_is_left_out_with_a_note(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report_writer, "find_spec", lambda name: None)
    run = Run(tmp_path)
    with caplog.at_level("INFO"):
        fit_tiny(SpectralProbe(every_n_steps=1), steps=1, logger=[WandbLogger(run)])
    assert run.saved == [(Path("spectra.jsonl"), "end"), (Path("spectra.jsonl"), "now")]
    assert [r.getMessage() for r in caplog.records if "needs plotly:" in r.getMessage()] == [
        'the page of a run needs plotly: pip install "lightning-spectral[report]"'
    ]


def test_an_artifact_needs_reports():
    with pytest.raises(ValueError, match="wandb_artifact holds the reports that keep_reports=False does not keep"):
        SpectralProbe(wandb_artifact=True, keep_reports=False)
