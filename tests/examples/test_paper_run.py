"""The reproduction: its config files, its runs, what it says of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from manual import PAGES, flat

pytest.importorskip("sklearn", reason="the reproduction's digits are scikit-learn's")
pytest.importorskip("matplotlib", reason="every experiment makes a figure")

from examples.ablation.peers import LayerRateAdamW, permuted, scale_rates
from examples.paper import run as paper
from examples.paper.archives import FOLDER_VARIABLE
from examples.paper.experiments import EXPERIMENTS
from examples.paper.finding import body, correlation, signals, spread
from examples.paper.modules import Trained
from examples.paper.outcome import OldOutcomeError, Outcome, Training, outcome
from examples.paper.page import ASKED, anchor, noise_change, write
from examples.paper.plots import curves
from examples.paper.tasks import DATA, NETWORKS, digit_pairs, python_modules, without_layer_norm
from lightning_spectral.numerics.statistics import median

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.SpectralWarning")

CONFIGS = sorted(paper.HERE.glob("*.yaml"))
PROBE = {"top_k": 6, "spectrum_top_k": 10, "alignment": True}
TINY = {
    "data": {"name": "digits"},
    "network": {"name": "resnet18", "channels": 1, "width": 4, "depths": [1, 1, 1, 1]},
    "steps": 3,
    "batch_size": 32,
    "lr": 1e-3,
    "measure_at": [0, 3],
    "samples": 64,
    "probe": PROBE,
}
MLP = TINY | {"network": {"name": "mlp", "inputs": 64, "width": 16, "depth": 2}}
GPT = TINY | {
    "data": {"name": "python_source", "length": 8, "limit": 20000},
    "network": {"name": "gpt", "length": 8, "width": 16, "heads": 2, "depth": 1, "tied": False},
}


def config(tmp_path: Path, trainings: dict[str, object], experiments: dict[str, list[str]]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"seeds": [0, 1], "trainings": trainings, "experiments": experiments}))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_name_every_experiment_and_only_what_there_is(path: Path) -> None:
    plan = paper.Plan.read(path)
    assert list(plan.experiments) == list(EXPERIMENTS)
    used = {training.name for training, _ in plan.runs}
    assert used == set(plan.trainings)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_networks_of_the_config_files_can_be_built(path: Path) -> None:
    for training in paper.Plan.read(path).trainings.values():
        options = dict(training.network)
        name, norms = options.pop("name"), options.pop("layer_norm", True)
        if name == "pretrained_resnet50":
            continue
        with torch.device("meta"):
            network = NETWORKS[name](10, **options)
        if not norms:
            without_layer_norm(network)
            assert not any(isinstance(module, torch.nn.LayerNorm) for module in network.modules())


def test_all_experiments_end_to_end(tmp_path: Path) -> None:
    trainings = {"resnet": TINY, "mlp": MLP, "gpt": GPT, "scaled": TINY | {"rate_power": 1.0}}
    networks = ["resnet", "mlp", "gpt"]
    experiments = dict.fromkeys(EXPERIMENTS, networks) | {
        "width_scaling": ["mlp"],
        "layer_norm": ["gpt", "scaled"],
        "output_size": ["resnet", "scaled"],
        "task": ["gpt", "scaled"],
        "scalar_control": ["resnet", "scaled"],
    }
    given = ["--config", str(config(tmp_path, trainings, experiments)), "--output", str(tmp_path), "--jobs", "1"]
    assert paper.main(given) == 0
    page, tables = ((tmp_path / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "results/experiments.md"))
    for name in EXPERIMENTS:
        assert f"](../figures/{name}.png)" in tables
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 3000
    assert len(list(tmp_path.glob("*.json"))) == 8
    assert " nan" not in page + tables
    # Every link of the page leads to a heading of the tables.
    headings = {anchor(line[3:]) for line in tables.splitlines() if line.startswith("## ")}
    assert set(re.findall(r"experiments\.md#([\w-]+)", page)) == headings
    assert ASKED.keys() == EXPERIMENTS.keys()


def test_the_committed_pages_are_made_of_the_committed_records(tmp_path: Path) -> None:
    shutil.copytree(paper.HERE / "results", tmp_path / "results")
    (tmp_path / "results" / "experiments.md").unlink()
    assert write(tmp_path) == tmp_path / "RESULTS.md"
    for name in ("RESULTS.md", "results/experiments.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (paper.HERE / name).read_text(encoding="utf-8"), name


def test_the_manual_s_figures_are_the_records_() -> None:
    record = json.loads((paper.HERE / "results" / "experiments.json").read_text(encoding="utf-8"))
    experiments = record["experiments"]
    cells = {name: {cell for row in of["rows"] for cell in row} for name, of in experiments.items()}
    told = {name: " ".join([*of["found"], of["agrees"]]) for name, of in experiments.items()}
    shown = PAGES["paper.md"]
    in_tables = {"architectures": ["2.29 ± 0.05", "1.99 ± 0.10", "1.68 ± 0.07"]}
    in_words = {
        "architectures": ["1.73 ± 0.04", "2.33 ± 0.20"],
        "transfer_identity": ["1.3 %", "187 of 191 layers"],
        "participation": ["8 of 19 layers", "13 of 19"],
        "concentration": ["0.16", "225 layers"],
        "kronecker": ["0.98"],
        "rank_models": ["wins 60"],
    }
    for name, figures in in_tables.items():
        assert all(figure in cells[name] and figure in shown for figure in figures), name
    for name, figures in in_words.items():
        assert all(figure in told[name] and figure in shown for figure in figures), name
    noise = {tuple(row[:3]): [cell.split()[0] for cell in row[3:9]] for row in experiments["sampling_noise"]["rows"]}
    vgg, resnet = noise["vgg", "conv", "30"], noise["resnet", "conv", "300"]
    reading = flat(PAGES["reading.md"])
    assert f"({vgg[0]} with 64 samples, {vgg[-1]} with all)" in reading
    assert f"in a trained ResNet it belongs to the noise ({resnet[0]}, and {resnet[-1]})" in reading


def test_a_run_is_read_back_and_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training.from_config("mlp", MLP)
    first = outcome(training, 0, tmp_path)
    monkeypatch.setattr("examples.paper.outcome._run", lambda *_: pytest.fail("trained again"))
    again = outcome(training, 0, tmp_path)
    assert again.test == first.test
    assert [report.step for report in again.reports] == [0, 3]
    for before, after in zip(first.reports, again.reports, strict=True):
        for name, layer in before.layers.items():
            torch.testing.assert_close(after.layers[name].h, layer.h, rtol=0, atol=0, equal_nan=True)


def test_another_option_or_seed_is_another_run() -> None:
    training = Training.from_config("mlp", MLP)
    others = [Training.from_config("mlp", MLP | {"lr": 2e-3}), Training.from_config("mlp", MLP | {"shuffled": True})]
    digests = {training.digest(0), training.digest(1), *(other.digest(0) for other in others)}
    assert len(digests) == 4
    # The name of an entry is not what a run is of.
    assert Training.from_config("another", MLP).digest(0) == training.digest(0)


def test_measuring_leaves_training_as_it_is(tmp_path: Path) -> None:
    seldom = outcome(Training.from_config("a", MLP | {"measure_at": [3]}), 0, tmp_path)
    often = outcome(Training.from_config("b", MLP | {"measure_at": [0, 1, 2, 3]}), 0, tmp_path)
    assert seldom.test == often.test
    assert [report.step for report in often.reports] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepz": 3}, "stepz is no option"),
        ({"data": {"name": "mnist"}}, "data has no 'mnist'"),
        ({"network": {"name": "lenet"}}, "network has no 'lenet'"),
        ({"measure_at": [4]}, "measure_at holds step 4, and there are 3 steps"),
    ],
)
def test_bad_trainings_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Training.from_config("mlp", MLP | change)
    with pytest.raises(ValueError, match="missing"):
        Training.from_config("mlp", {name: value for name, value in MLP.items() if name != "lr"})


def test_bad_config_files_and_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, {"mlp": MLP}, {"width_scaling": ["resnet"]})
    with pytest.raises(ValueError, match="width_scaling names no training by resnet"):
        paper.Plan.read(path)
    for given in (["nonsense"], ["--config", str(tmp_path / "absent.yaml")]):
        with pytest.raises(SystemExit) as stopped:
            paper.main(given)
        assert stopped.value.code == 2
        assert given[-1] in capsys.readouterr().err


def test_data_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # --data writes it for the runs' processes.
    monkeypatch.setenv(FOLDER_VARIABLE, "elsewhere")
    trainings = {"text": GPT | {"data": {"name": "text_file", "path": "absent.txt", "length": 8}}}
    path = config(tmp_path, trainings, {"dynamics": ["text"]})
    with pytest.raises(SystemExit) as stopped:
        paper.main(["--config", str(path), "--output", str(tmp_path), "--data", str(tmp_path), "--jobs", "1"])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "absent.txt is no file" in said


def test_a_failed_measurement_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no curvature today")

    monkeypatch.setattr("lightning_spectral.callbacks.safe_measurement.run_measurement", fails)
    with pytest.raises(RuntimeError, match="mlp, seed 0: 1 measurements failed"):
        outcome(Training.from_config("mlp", MLP), 0, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_digit_pairs_hold_a_hundred_classes_and_share_no_digit() -> None:
    parts = digit_pairs(500)
    images, labels = next(iter(_all(parts.train)))
    assert images.shape[1:] == (1, 8, 16)
    assert parts.classes == 100
    assert set(labels.tolist()) <= set(range(100))
    halves = {tuple(half.flatten().tolist()) for image in images for half in image.split(8, 2)}
    tested, _ = next(iter(_all(parts.test)))
    assert not halves & {tuple(half.flatten().tolist()) for image in tested for half in image.split(8, 2)}


def test_python_modules_are_windows_of_ten_files() -> None:
    parts = python_modules(32)
    windows, labels = next(iter(_all(parts.plain)))
    assert windows.shape[1:] == (32,)
    assert windows.dtype == torch.long
    assert sorted(set(labels.tolist())) == list(range(10))


def _all(dataset: object) -> object:
    from examples.paper.data import loader

    return loader(dataset, len(dataset))


def test_the_legend_of_curves_shows_the_dash_of_each_network() -> None:
    series = {name: {0.0: [1.0, 2.0], 5.0: [2.0, 2.5]} for name in ("a: conv", "a: head", "b: conv")}
    from matplotlib.lines import Line2D

    figure = curves(series, "t", ("x", "y"), kinds={name: name[3:] for name in series})
    (legend,) = figure.legends
    dashes = [line.get_linestyle() for line in legend.findobj(Line2D) if line.get_linestyle() != "None"]
    assert ([text.get_text() for text in legend.get_texts()], dashes) == (list(series), ["-", "-", "--"])
    # A dash and a gap are 4.7 times a line's width of 1.2 points; the marker hides a third of a short key.
    assert legend.handlelength * legend.prop.get_size() > 20


def test_powers_of_s_and_shuffled_scales() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    )
    optimizer = LayerRateAdamW(LayerRateAdamW.groups(model))
    named = {group["name"]: group for group in optimizer.param_groups}
    decay = {"0.weight": 1.0, "1.weight": 2.0, "2.weight": 4.0}
    scale_rates(optimizer, decay, power=-1.0)
    mean = (1 + 0.5 + 0.25) / 3
    assert [named[name]["scale"] for name in decay] == pytest.approx([1 / mean, 0.5 / mean, 0.25 / mean])
    moved = permuted(decay)
    assert sorted(moved.values()) == [1.0, 2.0, 4.0]
    assert moved != decay
    assert permuted(decay) == moved


def test_correlation_against_torch() -> None:
    x, y = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    assert correlation(x, y) == pytest.approx(float(torch.corrcoef(torch.tensor([x, y]))[0, 1]))
    nan = float("nan")
    assert correlation([1.0, 2.0, nan], [1.0, 2.0, 3.0]) != correlation([1.0, 2.0, nan], [1.0, 2.0, 3.0])
    assert spread([1.0, nan, 3.0]) == "2.00 ± 1.41"


def test_outcomes_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Outcome("mlp", 0, {}, 1.0, [])
    monkeypatch.setattr("json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.save(tmp_path / "run.json")
    assert not (tmp_path / "run.json").exists()


def test_an_outcome_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    training = Training.from_config("mlp", MLP)
    (tmp_path / f"mlp-0-{training.digest(0)}.json").write_text('{"reports": [{"format": "another"}]}')
    with pytest.raises(OldOutcomeError, match="remove it, and it is made anew"):
        outcome(training, 0, tmp_path)


def test_the_papers_data_sets_and_networks_have_names() -> None:
    assert set(DATA) >= {"digits", "python_source", "cifar10", "cifar100", "tiny_imagenet", "imagenet"}
    assert set(NETWORKS) >= {"resnet18", "resnet50", "vgg11", "vit", "mlp", "gpt", "pretrained_resnet50"}


SAMPLES = MLP | {"measure_at": [1, 3], "samples": 32, "gradient_samples": [32, 64, 256], "probe": {"top_k": 6}}


def test_every_number_of_gradient_samples_is_measured_at_every_step(tmp_path: Path) -> None:
    found = outcome(Training.from_config("mlp, samples", SAMPLES), 0, tmp_path)
    measured = [(report.step, report.n_samples, report.curvature_samples) for report in found.reports]
    assert measured == [(step, n, 32) for step in (1, 3) for n in (32, 64, 256)]
    # As a single measurement of the same training gives it, at the same weights.
    alone = outcome(Training.from_config("mlp", SAMPLES | {"gradient_samples": [], "samples": 32}), 0, tmp_path)
    for step, report in zip((1, 3), alone.reports, strict=True):
        (same,) = (x for x in found.reports if (x.step, x.n_samples) == (step, 32))
        for name, layer in report.layers.items():
            torch.testing.assert_close(same.layers[name].h, layer.h)


def test_the_rate_falls_to_nothing_unless_it_is_to_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    configured = Trained.configure_optimizers
    monkeypatch.setattr(Trained, "configure_optimizers", lambda self: made.append(configured(self)) or made[-1])
    for cosine in (True, False):
        outcome(Training.from_config("mlp", MLP | {"cosine": cosine}), 0, tmp_path)
    falling, constant = made
    assert falling["optimizer"].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert constant.param_groups[0]["lr"] == MLP["lr"]


def test_a_probe_of_the_paper_measures_its_fixed_batch_whole(tmp_path: Path) -> None:
    found = outcome(Training.from_config("mlp", MLP | {"samples": 100}), 0, tmp_path)
    assert [(r.step, r.n_samples, r.curvature_samples) for r in found.reports] == [(0, 100, 100), (3, 100, 100)]


def test_sampling_noise_tells_alpha_and_signal_by_samples(tmp_path: Path) -> None:
    chosen = Training.from_config("mlp, samples", SAMPLES)
    seeds = [outcome(chosen, seed, tmp_path) for seed in (0, 1)]
    finding = EXPERIMENTS["sampling_noise"]({"mlp, samples": seeds})
    assert finding.columns == ["network", "kind", "step", "32", "64", "256", "r2, most samples"]
    assert [row[:3] for row in finding.rows] == [
        ["mlp", kind, step] for step in ("1", "3") for kind in ("dense", "head")
    ]
    of_most = [seed.reports[-1].by_kind()["dense"] for seed in seeds]
    signal = median([layer.gradient_noise.signal for layers in of_most for layer in layers])
    alpha = spread([median([layer.alpha.exponent for layer in layers]) for layers in of_most])
    assert finding.rows[2][5] == f"{alpha} ({signal:.2f})"
    assert len(finding.records) == 2 * 2 * 3 * 2
    (record,) = (
        x for x in finding.records if (x["seed"], x["step"], x["gradient_samples"], x["kind"]) == (1, 3, 256, "dense")
    )
    assert record["alpha"] == pytest.approx(median([layer.alpha.exponent for layer in of_most[1]]), abs=1e-4)
    # The verdict is of measurements with little noise alone.
    last = [body(report) for seed in seeds for report in seed.reports if report.n_samples == 256]
    of_steps = [signals(last[i::2]) for i in (0, 1)]
    assert finding.agrees.startswith("where S is at least 0.8" if max(of_steps) >= 0.8 else "no S of at least 0.8")
    # More samples leave less noise.
    few, _, many = (signals([report.layers.values()]) for report in seeds[0].reports[3:])
    assert few < many


def test_noise_is_told_where_a_trained_network_has_signal() -> None:
    def one(samples: int, alpha: float, signal: float, network: str = "a") -> dict[str, object]:
        figures = {"gradient_samples": samples, "alpha": alpha, "signal": signal}
        return {"network": network, "kind": "dense", "step": 3, **figures}

    learned = [one(8, 2.0, 0.1, "b"), one(64, 3.0, -1.0, "b")]
    assert noise_change(learned) == ""
    told = noise_change([*learned, one(8, 2.0, 0.3), one(64, 1.7, 0.9), one(64, 1.5, 0.9)])
    assert "move alpha by -0.40 to -0.40" in told
