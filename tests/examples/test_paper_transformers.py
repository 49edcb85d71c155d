"""The designed set on small GPTs: its design, its effects, one small run, its tables."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.paper import transformers as script  # noqa: E402
from examples.paper.small_gpt import Setting, SmallGPT, Tokens, all_positions, last_position, text, train  # noqa: E402
from examples.paper.transformers_design import FACTORS, analyse, design_matrix, setting_of  # noqa: E402
from examples.paper.transformers_results import BLOCK, collect, condensed, encoded, median  # noqa: E402
from examples.paper.transformers_tables import page_tables, tables  # noqa: E402

TINY = Setting(data="uniform", vocabulary=12, depth=1, width=16, steps=3, batch=4, length=8, sequences=8)


def test_design_is_balanced_and_main_effects_are_clear_of_two_factor_interactions():
    matrix = design_matrix()
    assert matrix.shape == (32, len(FACTORS))
    assert torch.equal(matrix.T @ matrix, 32 * torch.eye(16, dtype=matrix.dtype))
    assert matrix.sum(0).abs().max() == 0
    for i in range(16):
        for j in range(i):
            assert (matrix.T @ (matrix[:, i] * matrix[:, j])).abs().max() == 0


def test_every_factor_changes_the_setting_and_nothing_else():
    low, rows = setting_of([-1] * 16), design_matrix().tolist()
    for i in range(16):
        levels = [-1] * 16
        levels[i] = 1
        assert setting_of(levels) != low
    assert len({setting_of(row) for row in rows}) == 32


def test_effects_are_recovered_from_synthetic_responses():
    matrix = design_matrix().double()
    generator = torch.Generator().manual_seed(0)
    truth = torch.linspace(-1, 1, 16, dtype=torch.float64)
    clean = 3 + matrix @ truth / 2 + 0.7 * matrix[:, 0] * matrix[:, 1]
    noise = 0.1 * torch.randn(32, 4, generator=generator, dtype=torch.float64)
    columns = dict(zip(FACTORS, matrix.T.tolist(), strict=True))
    found = analyse(columns, (clean[:, None] + noise).tolist())
    assert found.mean == pytest.approx(3, abs=0.05)
    assert found.seed_deviation == pytest.approx(0.1, rel=0.2)
    for (name, effect), expected in zip(found.effects.items(), truth, strict=True):
        # The interaction is in the error, not in the effects.
        assert effect.estimate == pytest.approx(float(expected), abs=0.1), name
        assert effect.stderr > 0.2
    exact = analyse(columns, (3 + matrix @ truth / 2)[:, None].tolist())
    assert exact.r2 == pytest.approx(1)
    assert sum(effect.share for effect in exact.effects.values()) == pytest.approx(1)
    missing = clean[:, None].tolist()
    missing[5] = [math.nan]
    assert analyse(columns, missing).n == 31
    with pytest.raises(ValueError, match="need more than 17 runs with a response"):
        analyse(columns, [[1.0]] * 17 + [[math.nan]] * 15)


def test_settings_do_what_they_say():
    tokens, targets = Tokens(TINY, 0).draw(5)
    assert tokens.shape == targets.shape == (5, 8)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    torch.manual_seed(0)
    model = SmallGPT(replace(TINY, tied=True, norm="post", init="gpt2"))
    assert model.tokens.weight is model.head.weight
    assert float(model.blocks[0].down.weight.detach().std()) == pytest.approx(0.02 / math.sqrt(2), rel=0.1)
    assert all_positions(model, (tokens, targets)) != last_position(model, (tokens, targets))
    with torch.no_grad():
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 12
        assert torch.allclose(model(tokens)[:, :-1], model(changed)[:, :-1], atol=1e-6)
    pairs, characters = text(128), text(96)
    assert len(characters) > len(pairs) > len(characters) // 2
    assert pairs.max() < 128
    shuffled = Tokens(Setting(data="shuffled"), 0).codes
    assert not torch.equal(shuffled, Tokens(Setting(), 0).codes)


def test_memorising_trains_on_what_is_measured():
    setting = replace(TINY, memorise=True, steps=150, sequences=4, lr=1e-2)
    model, losses, batch = train(setting, 0)
    assert losses[-1] < 0.7 * losses[0]
    assert float(all_positions(model, batch).detach()) < 0.7 * losses[0]


def test_a_network_predicts_labels_without_expected_gradient():
    model, _, (tokens, _) = train(replace(TINY, sequences=2000, steps=0), 0)
    logits = model(tokens)
    _, labels = script.predicted(model, tokens, torch.Generator().manual_seed(0))
    difference = torch.nn.functional.one_hot(labels, 12).double().mean((0, 1)) - logits.softmax(-1).double().mean(
        (0, 1)
    )
    assert difference.abs().max() < 4 * math.sqrt(1 / 12 / labels.numel())


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_runs_are_kept_and_read_back(tmp_path):
    jobs = [
        script.Job("path", label, replace(TINY, optimizer=optimizer, lr=0.01), seed)
        for label, optimizer in (("a", "adamw"), ("b", "sgd"))
        for seed in range(2)
    ]
    jobs.append(script.Job("design", "0", TINY, 0))
    jobs.append(replace(jobs[0], group="exact", curvature="exact"))
    jobs.append(
        replace(jobs[0], group="tokens", label="model", setting=replace(TINY, labels="model", positions="last"))
    )
    lines = [line for group in script.batches(jobs) for line in script.work(group, str(tmp_path))]
    assert len(lines) == len(jobs)
    assert script.work(jobs, str(tmp_path)) == []
    runs = script.finished(tmp_path, jobs)
    assert [run["label"] for run in runs] == [job.label for job in jobs]
    layers = runs[0]["layers"]
    assert [layer["kind"] for layer in layers if layer["name"] != "head.weight"] == list(BLOCK)
    short = condensed(runs[0])
    assert short["kinds"]["mlp_up"]["alpha"] == pytest.approx(layers[2]["alpha"], rel=1e-3)
    record = collect(runs)
    assert record["effects"]["alpha, head"] is None
    assert "a, 0" in tables(record)
    assert json.loads(encoded(record))["runs"][0]["label"] == "a"


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_a_part_of_the_runs_gives_a_record_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    jobs = [script.Job("path", label, replace(TINY, depth=2, width=32), 0) for label in script.PATH]
    script.work(jobs, str(tmp_path))
    script.write(tmp_path, tmp_path, jobs, None)
    for name in ("transformers_spectra.png", "transformers_path.png"):
        assert 5_000 < (tmp_path / name).stat().st_size < 100_000
    assert "learned by heart: paper-like" in capsys.readouterr().out


def test_a_run_that_cannot_be_measured_says_so(tmp_path):
    job = script.Job("path", "a", replace(TINY, optimizer="sgd", lr=1e20, norm="none"), 0)
    result = script.run(job)
    assert "the loss is nan" in result["failed"]
    assert math.isnan(condensed(result)["kinds"]["head"]["alpha"])


def test_plan_has_every_group_and_shares_networks():
    jobs = script.plan()
    assert {job.group for job in jobs} == {"path", "steps", "tokens", "one by one", "exact", "design"}
    tokens = [job for job in jobs if job.group == "tokens" and job.seed == 0]
    assert len({job.training for job in tokens}) == 1
    assert len({job.file for job in tokens}) == len(tokens)


def nan_for_none(value):
    """What was written with None for NaN."""
    if isinstance(value, dict):
        return {key: nan_for_none(part) for key, part in value.items()}
    if isinstance(value, list):
        return [nan_for_none(part) for part in value]
    return math.nan if value is None else value


def test_committed_results_are_those_of_the_plan():
    record = json.loads((ROOT / "examples" / "paper" / "results" / "transformers.json").read_text())
    planned = {(job.group, job.label, job.seed) for job in script.plan()}
    assert {(run["group"], run["label"], run["seed"]) for run in record["runs"]} <= planned
    known = nan_for_none(record)
    page = (ROOT / "examples" / "paper" / "TRANSFORMERS.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("|")]
    assert shown == "\n".join(page_tables(known)).splitlines()
    assert (ROOT / "examples" / "paper" / "results" / "transformers.md").read_text() == tables(known)
    assert median([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(median([math.nan]))
