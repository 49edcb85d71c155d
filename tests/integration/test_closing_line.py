"""The line that says at the end of training what a probe's run holds."""

import logging
import os
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_module
from reports import layer, report
from rich.console import Console
from stand_ins import Clock
from tiny import Repeated, Tiny, batch_of, fit_tiny
from torch.utils.data import DataLoader

from lightning_spectral import SpectralProbe
from lightning_spectral.callbacks import report_writer
from lightning_spectral.callbacks.terminal import closing_line
from lightning_spectral.callbacks.time_budget import TimeBudget
from lightning_spectral.report import read_run

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


def budget_of(probes, seconds, wall):
    clock = Clock()
    budget = TimeBudget(0.05, 8, clock)
    budget.start(0)
    for _ in range(probes):
        budget.record_probe(0, seconds)
    budget.record_step(10)
    clock.now += wall
    return budget


@pytest.fixture
def lines(monkeypatch):
    told = []
    monkeypatch.setattr(report_writer, "log_above_bar", lambda trainer, text: told.append(text))
    return told


@pytest.mark.usefixtures("trusting")
def test_a_line_has_probes_time_alpha_and_the_command():
    measured = report(layer("a"), layer("b"))
    line = closing_line("spectral", budget_of(9, 0.282, 62.0), 0, measured, Path("logs/version 0/spectra.jsonl"))
    alpha = measured.medians()["alpha_median"]
    assert line == (
        f"SpectralProbe: 9 probes, 4.1 % of 62 s; median alpha {alpha:.2f}, trusted in 2 of 2 layers; "
        "lightning-spectral report 'logs/version 0' makes its page"
    )


def test_a_line_of_less():
    one = budget_of(1, 60.0, 600.0)
    assert closing_line("spectral", one, 0, None, None) == (
        "SpectralProbe: 1 probe, 10.0 % of 10 minutes; nothing was measured"
    )
    assert closing_line("held", one, 0, None, None).startswith("SpectralProbe, held: 1 probe, ")
    noisy = report(layer("a", noise=3.0))
    assert closing_line("held", one, 0, noisy, None).endswith("; no alpha to trust in 1 layer at the last probe")
    assert closing_line("spectral", one, 30, None, None).startswith(
        "SpectralProbe: 1 probe, the last at step 0 of 30, "
    )
    above = Path(os.path.abspath(os.sep)) / "runs" / "spectra.jsonl"
    assert closing_line("held", one, 0, None, above).endswith(
        f"; lightning-spectral report {above.parent} makes its page"
    )


def test_a_folder_on_another_drive_is_shown_whole(monkeypatch):
    def fails(path):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", fails)
    line = closing_line("held", budget_of(1, 60.0, 600.0), 0, None, Path("runs/spectra.jsonl"))
    assert line.endswith("; lightning-spectral report runs makes its page")


def test_a_run_logs_it_once_with_the_folder_that_the_command_takes(lines, tmp_path):
    logger = CSVLogger(tmp_path)
    fit_tiny(SpectralProbe(every_n_steps=2, top_k=3, min_probes=8), steps=5, logger=logger)
    (line,) = lines
    assert line.startswith("SpectralProbe: 4 probes, ")
    (folder,) = re.findall("lightning-spectral report (.*) makes its page$", line)
    assert Path(folder).resolve() == Path(logger.log_dir).resolve()
    assert (Path(folder) / "spectra.jsonl").is_file()


def test_of_several_probes_each_line_names_its_file(lines, tmp_path):
    probes = [SpectralProbe(every_n_steps=2, top_k=3, prefix=prefix) for prefix in ("spectral", "b")]
    logger = CSVLogger(tmp_path)
    trainer = pl.Trainer(
        max_steps=2, callbacks=probes, logger=logger, accelerator="cpu", enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(Repeated(batch_of()), batch_size=None))
    named = [re.findall("lightning-spectral report (.*) makes its page$", line)[0] for line in lines]
    assert [Path(file).name for file in named] == ["spectra.jsonl", "spectra-b.jsonl"]
    for file in named:
        assert read_run([file]).steps


def test_lightning_logs_it_as_its_own(caplog):
    texts = []
    caplog.set_level(logging.INFO, rank_zero_module.log.name)

    class Kept(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    kept = Kept()
    rank_zero_module.log.addHandler(kept)
    fit_tiny(SpectralProbe(every_n_steps=2, top_k=3), steps=2)
    rank_zero_module.log.removeHandler(kept)
    assert texts[-2] == "`Trainer.fit` stopped: `max_steps=2` reached."
    assert texts[-1].startswith("SpectralProbe: 1 probe, ")


@pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
def test_a_bar_of_rich_has_it_above_if_lightning_may_speak(monkeypatch, level):
    bar, texts = RichProgressBar(), []
    print_above = Console.print
    monkeypatch.setattr(
        Console, "print", lambda self, *args, **kw: (texts.extend(map(str, args)), print_above(self, *args, **kw))
    )
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    before = logger.level
    logger.setLevel(level)
    try:
        probe = SpectralProbe(every_n_steps=2, top_k=3, print_end=False)
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[probe, bar], logger=False, accelerator="cpu", enable_checkpointing=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Tiny(), DataLoader(Repeated(batch_of()), batch_size=None))
    finally:
        logger.setLevel(before)
    told = [text for text in texts if text.startswith("SpectralProbe: 6 probes, ")]
    assert len(told) == (level == logging.INFO)


def test_no_file_no_command_and_no_probe_no_line(lines):
    fit_tiny(SpectralProbe(every_n_steps=2, top_k=3, keep_reports=False), steps=2)
    fit_tiny(SpectralProbe(n_batches=9, top_k=3), steps=2)

    class Manual(Tiny):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().step()

    fit_tiny(SpectralProbe(top_k=3), Manual(), steps=2)
    assert len(lines) == 1
    assert "lightning-spectral report" not in lines[0]
