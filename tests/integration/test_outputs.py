"""What users see of a probe: in TensorBoard, MLflow and CSV files, and in the terminal."""

import csv
import math
import pickle
import re
import sys
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from logged import FIGURES, deep, equal_tables
from modules import ProbeRows
from PIL import Image
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger
from reports import layer, report
from rich.console import Console
from stand_ins import Clock
from tiny import Repeated, Tiny, batch_of, fit_tiny

from lightning_spectral import SpectralProbe, SpectralWarning
from lightning_spectral.callbacks import report_writer as outputs
from lightning_spectral.callbacks.log_selection import LogSelection, charts
from lightning_spectral.callbacks.report_writer import alpha_by_depth
from lightning_spectral.records.log_keys import PROBE_KEYS
from lightning_spectral.report.trackers import Row, tracker_of

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["conv"] * 53 + ["head"], 17),
        (["attention_qkv", "attention_out", "mlp_up", "mlp_down"] * 12 + ["head"], 0),
        (["conv"] * 3 + ["head"], 4),
    ],
    ids=["resnet50", "gpt12", "small"],
)
def test_forty_charts_for_any_network(kinds, expected):
    measured = report(*(layer(f"l.{i}.weight", kind=kind) for i, kind in enumerate(kinds)))
    logged = LogSelection("auto", "auto", (), lambda text: None).scalars(measured) | dict.fromkeys(PROBE_KEYS, 0.0)
    # Four of each of 24 layers, and eight medians of each kind.
    assert len(logged) <= 170
    shown = charts(logged, 40)
    assert len(set(shown)) == len(shown) == 40
    curves = [key for key in logged if "/median_" in key and not key.startswith(("signal/", "noise_scale/"))]
    curves += ["alpha_median", "zeta_bound_median"]
    assert set(curves) <= set(shown) <= set(logged)
    layers = [key for key in shown if key.startswith("alpha/l.")]
    assert len(layers) == expected
    if layers:
        assert {layers[0], layers[-1]} == {"alpha/l.0.weight", f"alpha/l.{len(kinds) - 1}.weight"}
    assert charts(logged, None) == list(logged)


def test_infinity_is_logged_as_nan_and_counted():
    flat = report(layer("a", alpha=0.5), layer("b", alpha=0.5), layer("c", alpha=3.0))
    logged = LogSelection("all", "all", (), lambda text: None).scalars(flat)
    assert math.isinf(flat.scalars()["zeta_bound/a"])
    assert math.isnan(logged["zeta_bound/a"])
    assert math.isnan(logged["zeta_bound_median"])
    assert logged["zeta_bound/c"] == flat.layers["c"].zeta_bound
    assert logged["zeta_unbounded"] == 2


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("auto", {"alpha", "r2_alpha", "sigma_max", "h_max"}),
        ("gamma", {"gamma"}),
        (["s", "points"], {"s", "points"}),
        ([], set()),
    ],
)
def test_quantities_of_each_layer(chosen, expected):
    logger = ProbeRows()
    fit_tiny(SpectralProbe(log_quantities=chosen), steps=1, logger=[logger])
    found = {key.split("/")[1] for key in logger.rows[0][1] if key.endswith("/net.0.weight")}
    assert found == expected


def test_quantities_asked_for_are_logged_of_each_layer():
    logger = ProbeRows()
    fit_tiny(SpectralProbe(bootstrap=10, weight_spectra=True), steps=1, logger=[logger])
    keys = logger.rows[0][1]
    assert {"spectral/alpha_low/net.0.weight", "spectral/s_weight/median_dense"} <= set(keys)
    assert "spectral/gamma/net.0.weight" not in keys


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"log_quantities": "beauty"}, "log_quantities must be 'auto', 'all' or names of quantities, got 'beauty'"),
        (
            {"log_quantities": ["alpha", "alpha_low"]},
            "log_quantities: 'alpha_low' is measured on request, and was not asked for with the option bootstrap",
        ),
        ({"log_quantities": "step_curvature", "step": False}, "was not asked for with the option step"),
        ({"log_figures_every": 0}, "log_figures_every must be None or a whole number of at least 1, got 0"),
        ({"print_every": 1.5}, "print_every must be None or a whole number of at least 1, got 1.5"),
        ({"wandb_charts": True}, "wandb_charts must be None or a whole number of at least 1, got True"),
        ({"log_tables": "yes"}, "log_tables must be True or False, got 'yes'"),
        ({"swap_optimizer": "no"}, "swap_optimizer must be True or False, got 'no'"),
        ({"keep_reports": 1}, "keep_reports must be True or False, got 1"),
        ({"print_end": "auto"}, "print_end must be None, True or False, got 'auto'"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        SpectralProbe(**options)


def test_figures_need_matplotlib(monkeypatch):
    monkeypatch.setattr(outputs, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"log_figures_every needs matplotlib: pip install"):
        SpectralProbe(log_figures_every=1)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    probe = SpectralProbe(every_n_steps=2, log_figures_every=2, log_tables=True)
    tracker = TensorBoardLogger(tmp_path)
    fit_tiny(probe, steps=5, logger=[tracker])
    events = EventAccumulator(tracker.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    for key in probe.logged.scalars(probe.last_report):
        found = [(event.step, event.value) for event in events.Scalars(f"spectral/{key}")]
        assert [step for step, _ in found] == [0, 2, 4]
        for (_, value), measured in zip(found, probe.history, strict=True):
            assert value == pytest.approx(probe.logged.scalars(measured)[key], rel=1e-5, nan_ok=True)
    assert set(events.Tags()["images"]) == {f"spectral/figures/{name}" for name in FIGURES}
    assert [event.step for event in events.Images("spectral/figures/power_law")] == [0, 4]
    assert events.Images("spectral/figures/power_law")[0].width == 1200
    texts = events.Tensors("spectral/layers/text_summary")
    assert [event.step for event in texts] == [0, 2, 4]
    assert b"| 0 | net.0.weight | dense | 8 | 6 |" in texts[0].tensor_proto.string_val[0]


def test_csv_is_one_flat_file_with_the_layers_beside_it(tmp_path):
    probe = SpectralProbe(every_n_steps=2, log_tables=True)
    tracker = CSVLogger(tmp_path)
    fit_tiny(probe, steps=3, logger=[tracker])
    with open(Path(tracker.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["spectral/loss"]]
    assert [int(row["step"]) for row in rows] == [0, 2]
    assert len(rows[0]) < 60
    for row, measured in zip(rows, probe.history, strict=True):
        for key, value in probe.logged.scalars(measured).items():
            assert float(row[f"spectral/{key}"]) == pytest.approx(value, rel=1e-9, nan_ok=True)
    with open(Path(tracker.log_dir) / "spectral_layers.csv", newline="") as file:
        heading, *cells = csv.reader(file)
    for i, measured in enumerate(probe.history):
        equal_tables(heading, cells[2 * i : 2 * i + 2], measured)


def rows_of(**columns):
    return Row("spectral", 3, {}, table=[{"step": 3, "layer": "a", **columns}])


def test_csv_with_other_columns_goes_to_a_file_of_its_own(tmp_path):
    def resumed(*rows):
        tracker = tracker_of(CSVLogger(tmp_path, version=0), pytest.fail)
        for row in rows:
            tracker.write_table(row)

    resumed(rows_of(alpha=1.0), rows_of(alpha=2.0))
    resumed(rows_of(alpha=3.0, gamma=4.0))
    resumed(rows_of(s=5.0), rows_of(s=6.0))
    resumed(rows_of(alpha=7.0), rows_of(alpha=8.0, gamma=9.0))
    found = {file.name: file.read_text().split() for file in tmp_path.rglob("*.csv")}
    assert found == {
        "spectral_layers.csv": ["step,layer,alpha", "3,a,1.0", "3,a,2.0", "3,a,7.0"],
        "spectral_layers_1.csv": ["step,layer,alpha,gamma", "3,a,3.0,4.0", "3,a,8.0,9.0"],
        "spectral_layers_2.csv": ["step,layer,s", "3,a,5.0", "3,a,6.0"],
    }


def test_csv_that_was_left_empty_gets_its_heading(tmp_path):
    tracker = CSVLogger(tmp_path, version=0)
    file = Path(tracker.log_dir) / "spectral_layers.csv"
    file.parent.mkdir(parents=True)
    file.touch()
    tracker_of(tracker, pytest.fail).write_table(rows_of(alpha=1.0))
    assert file.read_text().split() == ["step,layer,alpha", "3,a,1.0"]


def test_tensorboard_table_escapes_what_would_end_a_cell(tmp_path):
    tracker, texts = TensorBoardLogger(tmp_path), []
    tracker.experiment.add_text = lambda tag, text, step: texts.append(text)
    row = Row("spectral", 0, {}, table=[{"layer": "a|b", "no|te": "c|d|e", "alpha": 1.5, "gamma": math.nan}])
    tracker_of(tracker, pytest.fail).write_table(row)
    heading, rule, cells = texts[0].splitlines()
    assert heading == r"| layer | no\|te | alpha | gamma |"
    assert rule == "| --- | --- | --- | --- |"
    assert cells == r"| a\|b | c\|d\|e | 1.5 |  |"


class Recorded:
    """The client of MLflow, as far as a logger uses it: what it was given."""

    def __init__(self):
        self.artifacts = {}

    def log_figure(self, run_id, figure, artifact_file):
        assert run_id == "run"
        self.artifacts[artifact_file] = figure

    def log_text(self, run_id, text, artifact_file):
        assert run_id == "run"
        self.artifacts[artifact_file] = text


class MLFlowLogger(ProbeRows):
    """A logger that MLflow's is told by."""

    run_id = "run"

    def __init__(self):
        super().__init__()
        self.client = Recorded()

    @property
    def experiment(self):
        return self.client


def expected_artifacts(figures_at, tables_at):
    figures = {f"spectral/figures/{name}/{step:08d}.png" for name in FIGURES for step in figures_at}
    return figures | {f"spectral/layers/{step:08d}.csv" for step in tables_at}


def test_mlflow_by_its_interface():
    tracker, probe = MLFlowLogger(), SpectralProbe(every_n_steps=2, log_figures_every=2, log_tables=True)
    fit_tiny(probe, steps=5, logger=[tracker])
    artifacts = tracker.client.artifacts
    assert set(artifacts) == expected_artifacts((0, 4), (0, 2, 4))
    columns, *cells = csv.reader(artifacts["spectral/layers/00000004.csv"].splitlines())
    equal_tables(columns, cells, probe.last_report)
    assert [step for step, _ in tracker.rows] == [0, 2, 4]


def test_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from pytorch_lightning.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    probe = SpectralProbe(every_n_steps=2, log_figures_every=2, log_tables=True)
    tracker = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'runs'}")
    fit_tiny(probe, steps=5, logger=[tracker])
    client, run = tracker.experiment, tracker.run_id
    for key in probe.logged.scalars(probe.last_report):
        found = client.get_metric_history(run, f"spectral/{key}")
        assert [metric.step for metric in found] == [0, 2, 4]
        for metric, measured in zip(found, probe.history, strict=True):
            assert metric.value == pytest.approx(probe.logged.scalars(measured)[key], rel=1e-6, nan_ok=True)
    folder = Path(client.download_artifacts(run, "spectral"))
    found = {str(path.relative_to(folder.parent)) for path in folder.rglob("*") if path.is_file()}
    assert found == expected_artifacts((0, 4), (0, 2, 4))
    assert Image.open(folder / "figures" / "power_law" / "00000000.png").size[0] > 300


class FullDisk(MLFlowLogger):
    """A logger that takes scalars alone."""

    def __init__(self):
        super().__init__()
        self.client = FullClient()


class FullClient:
    def log_figure(self, *args):
        raise OSError("disk full")

    log_text = log_figure


def warned(call):
    with pytest.warns(SpectralWarning) as caught:
        call()
    return [str(w.message) for w in caught]


def test_figures_and_tables_that_fail_are_told_once_and_cost_no_scalars():
    broken, healthy = FullDisk(), ProbeRows()
    probe = SpectralProbe(every_n_steps=1, log_figures_every=1, log_tables=True)
    told = warned(lambda: fit_tiny(probe, steps=3, logger=[broken, healthy]))
    assert [text for text in told if "disk" in text] == [
        "FullDisk could not log figures: disk full",
        "FullDisk could not log tables: disk full",
    ]
    assert len(broken.rows) == len(healthy.rows) == 3


def test_wandb_that_takes_no_media_gets_the_scalars(tmp_path, monkeypatch):
    class WandbLogger(ProbeRows):
        experiment = None

        def log_metrics(self, metrics, step=None):
            if "spectral/layers" in metrics:
                raise OSError("disk full")
            super().log_metrics(metrics, step)

    tracker, probe = WandbLogger(), SpectralProbe(every_n_steps=1, log_tables=True, wandb_charts=5)
    told = warned(lambda: fit_tiny(probe, steps=2, logger=[tracker]))
    assert "WandbLogger could not log figures and tables: disk full" in told
    assert [text for text in told if "which keys have charts" in text]
    assert [step for step, _ in tracker.rows] == [0, 1]


def test_a_figure_that_cannot_be_drawn_is_told_once(monkeypatch):
    def fail(report, history):
        raise RuntimeError("no ink")

    monkeypatch.setitem(outputs.FIGURES, "power_law", fail)
    tracker, probe = MLFlowLogger(), SpectralProbe(every_n_steps=1, log_figures_every=1)
    told = warned(lambda: fit_tiny(probe, steps=2, logger=[tracker]))
    assert [text for text in told if "ink" in text] == ["the figure power_law could not be drawn: no ink"]
    assert len(tracker.client.artifacts) == 2 * (len(outputs.FIGURES) - 1)


@pytest.mark.parametrize(
    ("loggers", "says"),
    [
        ([ProbeRows()], "log_figures_every: no logger of the Trainer takes figures (ProbeRows); WandbLogger, "),
        (False, "log_tables: no logger of the Trainer takes tables (it has none); WandbLogger, TensorBoardLogger and "),
    ],
)
def test_loggers_that_take_no_figures_and_tables_are_told(loggers, says):
    probe = SpectralProbe(every_n_steps=1, log_figures_every=1, log_tables=True)
    told = warned(lambda: fit_tiny(probe, steps=2, logger=loggers))
    assert sum(text.startswith(says) for text in told) == 1


def test_probes_that_fail_have_no_figures():
    class Broken(Tiny):
        def spectral_loss(self, batch):
            raise RuntimeError("no loss")

    tracker, probe = (
        MLFlowLogger(),
        SpectralProbe(every_n_steps=1, log_figures_every=1, log_tables=True, print_end=True),
    )
    fit_tiny(probe, Broken(), steps=2, logger=[tracker])
    assert (len(tracker.rows), tracker.client.artifacts) == (2, {})


def test_drawing_counts_as_probing(monkeypatch):
    clock = Clock()

    def slow(report, history):
        clock.now += 0.5

    monkeypatch.setattr(outputs, "FIGURES", {"slow": slow})
    probe = SpectralProbe(every_n_steps=2, log_figures_every=1)
    probe.budget.clock = clock
    fit_tiny(probe, steps=5, logger=[MLFlowLogger()])
    assert probe.budget.probe_seconds == pytest.approx(1.5)


def test_tables_and_lines_are_capped(monkeypatch):
    monkeypatch.setattr(outputs, "MAX_ROWS", 5)
    monkeypatch.setattr(outputs, "MAX_LINES", 3)
    logger = MLFlowLogger()
    probe = SpectralProbe(log_tables=True, top_k=3)
    told = warned(lambda: fit_tiny(probe, deep(8), steps=1, logger=[logger]))
    assert "log_tables: 5 of 9 layers are in the table, evenly over depth" in told
    assert len(logger.client.artifacts["spectral/layers/00000000.csv"].splitlines()) == 6
    many = [report(*(layer(f"{i}", alpha=1 + i) for i in range(9)), step=step) for step in range(7)]
    lines = alpha_by_depth(many)
    assert list(lines) == ["step 0", "step 3", "step 6"]
    assert lines["step 0"][0] == [1, 3, 5, 7, 9]
    assert lines["step 0"][1] == pytest.approx([1, 3, 5, 7, 9])
    assert alpha_by_depth([]) == {}


def printed(capsys, probe, bar, *, steps=3, **options):
    callbacks = [probe] if bar is None else [bar, probe]
    trainer = pl.Trainer(
        max_steps=steps, callbacks=callbacks, accelerator="cpu", enable_model_summary=False,
        enable_checkpointing=False, enable_progress_bar=bar is not None, **{"logger": False, **options},
    )  # fmt: skip
    trainer.fit(Tiny(), torch.utils.data.DataLoader(Repeated(batch_of()), batch_size=None))
    return capsys.readouterr().out


HEADING = re.compile(r"^spectral: step (\d+), loss", re.MULTILINE)


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar, None])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"print_end": True}, [2]),
        ({"print_every": 1}, [0, 1, 2]),
        ({"print_every": 2, "print_end": False}, [0, 2]),
    ],
    ids=["default", "end", "every", "every 2"],
)
def test_tables_stand_above_the_bar(capsys, bar, options, expected):
    out = printed(capsys, SpectralProbe(every_n_steps=1, **options), bar and bar())
    if expected is None:
        expected = [2] if bar else []
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert [int(step) for step in HEADING.findall(out.replace("\r", "\n"))] == expected
    rows = [line for line in re.split(r"[\r\n]", out) if line.lstrip().startswith("net.0 ")]
    assert len(rows) == len(expected)
    # Neither bar nor table runs into the other, and no figure is cut.
    assert all(re.fullmatch(r" net\.0 +dense +8x6 .* \d/\d *", row) for row in rows)
    assert not [line for line in re.split(r"[\r\n]", out) if "Epoch" in line and ("net." in line or "loss" in line)]


def test_a_terminal_s_bars_stay_whole(monkeypatch):
    """Of what a narrow terminal is sent, each line of the table is its own, whatever the bar does around it."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    for bar in (TQDMProgressBar(), RichProgressBar()):
        screen.text.clear()
        trainer = pl.Trainer(
            max_steps=3, callbacks=[SpectralProbe(every_n_steps=1, print_every=1), bar], accelerator="cpu",
            logger=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Tiny(), torch.utils.data.DataLoader(Repeated(batch_of()), batch_size=None))
        out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(screen.text))
        rows = [line for line in re.split(r"[\r\n]", out) if line.lstrip().startswith("net.0 ")]
        assert len(rows) == 3
        assert all(row.rstrip()[-3:] == "6/6" or re.search(r"\d/\d$", row.rstrip()) for row in rows)


class Screen:
    """A terminal that keeps what it is sent."""

    encoding = "utf-8"

    def __init__(self):
        self.text = []

    def write(self, text):
        self.text.append(text)
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True

    def fileno(self):
        raise OSError


def test_nothing_is_printed_beside_a_logger(capsys):
    out = printed(capsys, SpectralProbe(every_n_steps=1), TQDMProgressBar(), logger=ProbeRows())
    assert not HEADING.search(out)


def test_rows_are_those_of_the_layers_logged(capsys):
    out = printed(capsys, SpectralProbe(log_layers=["net.2"], print_end=True), None)
    assert "net.2" in out
    assert "net.0" not in out
    assert "layers not shown: 1 of 2" in out
    out = printed(capsys, SpectralProbe(log_layers="none", print_end=True), None)
    assert "layers not shown: 2 of 2" in out
    assert re.search(r"^ head +\d/1 ", out, re.MULTILINE)


def test_a_bar_of_one_s_own_prints(capsys):
    class Plain(pl.callbacks.ProgressBar):
        def print(self, *args, **kwargs):
            print("bar:", *args, **kwargs)

        def disable(self):
            pass

        def enable(self):
            pass

    assert "bar: \nspectral: step 2" in printed(capsys, SpectralProbe(every_n_steps=1), Plain())


def test_a_terminal_that_fails_is_told(monkeypatch):
    def fail(*args):
        raise OSError("broken pipe")

    monkeypatch.setattr(outputs, "print_above_bar", fail)
    told = warned(lambda: fit_tiny(SpectralProbe(every_n_steps=1, print_every=1), steps=2))
    assert [text for text in told if "pipe" in text] == [
        "the table of the last probe could not be printed: broken pipe"
    ]


def test_only_the_first_process_logs_and_prints(capsys):
    class Rank:
        is_global_zero, loggers, progress_bar_callback, callback_metrics = False, [DummyLogger()], None, {}

    probe = SpectralProbe(print_every=1, print_end=True)
    measured = report(layer("a"), step=0)
    probe.outputs.write(Rank(), 0, [measured], (1, 0), report=measured, alphas={}, later=[])
    probe.outputs.close(Rank(), 0, measured)
    assert not capsys.readouterr().out


def test_console_given_is_used():
    from lightning_spectral.report import print_report

    console = Console(file=(file := Screen()), width=40)
    print_report(report(layer("a"), step=3), "mine", console=console)
    assert "mine: step 3, loss 1.250" in "".join(file.text)


def test_a_disabled_wandb_takes_all_of_it(tmp_path):
    probe = SpectralProbe(every_n_steps=1, log_tables=True, log_figures_every=1, wandb_charts=3, wandb_artifact=True)
    tracker = WandbLogger(project="p", save_dir=tmp_path, mode="disabled")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_tiny(probe, steps=2, logger=[tracker])
    tracker.experiment.finish()
    assert not [w for w in caught if "could not" in str(w.message)]


def test_a_probe_can_be_sent_to_another_process():
    probe = pickle.loads(pickle.dumps(SpectralProbe(log_quantities="all", print_end=True)))
    logger = ProbeRows()
    fit_tiny(probe, steps=1, logger=[logger])
    assert "spectral/gamma/net.0.weight" in logger.rows[0][1]
