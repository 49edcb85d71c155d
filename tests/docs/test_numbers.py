"""Numbers that the manual tells are those of the benchmarks, and its options those of the code."""

import inspect
import math
import re
import statistics

import pytest
from manual import MANUAL, PAGES, README, benchmark, cells_of, flat
from reports import layer, report

from lightning_spectral import SpectralProbe
from lightning_spectral.callbacks.log_selection import HEALTH, LOGGED_LAYERS, LogSelection, charts
from lightning_spectral.callbacks.report_writer import FIGURES
from lightning_spectral.records.log_keys import ALPHA_KEY, LAYER_KEYS, PROBE_KEYS, STEP_CURVATURE, STEP_KEYS, layer_key

METHODS, READING = flat(PAGES["methods.md"]), flat(PAGES["reading.md"])


@pytest.mark.parametrize(
    ("title", "name"),
    [("ReLU ResNet, 16", "resnet"), ("GPT of 3 blocks, 13", "gpt3"), ("GPT of 12 blocks, 49", "gpt12")],
)
def test_the_table_of_costs_is_the_benchmarks(title, name):
    methods = benchmark("probe")["figures"][name]["methods"]
    columns = ("exact", "curvlinops", "ggn", "sketch", "auto")
    shown = ["-" if x not in methods else str(round(methods[x]["steps"])) for x in columns]
    assert cells_of(title, "methods.md") == shown


def test_the_share_of_time_is_the_benchmarks():
    for network, title in {"gpt": "GPT", "resnet": "ResNet"}.items():
        run = benchmark("overhead")["figures"][network]
        assert f"{100 * run['share']:.1f} % ({title}, {run['probes']} probes)" in flat(PAGES["probing.md"])


@pytest.mark.parametrize(
    ("name", "of", "then"),
    [
        (
            "others",
            "On {} networks and losses as other people write them",
            "; on {} of these the error of alpha, compared with `exact`, is also at most 0.03.",
        ),
        ("programs", "{} real programs of", ", and {} also have an error of at most 0.03."),
    ],
)
def test_what_other_networks_and_programs_cost_is_the_benchmarks(name, of, then):
    figures = benchmark(name)["figures"].values()
    steps = [row["steps"] for row in figures]
    assert of.format(len(steps)) in METHODS
    told = f"{statistics.median(steps):.0f} training steps in the median and {max(steps):.0f} at most, "
    told += f"{sum(x <= 25 for x in steps)} of them within 25" + then.format(sum(row["target"] for row in figures))
    assert told in METHODS


@pytest.mark.parametrize(
    ("row", "arm", "figure"),
    [
        ("flops, alpha = 2", "spectral_newton", "flops_of_muon"),
        ("**SpectralNewton, alpha = 2", "spectral_newton", "of_muon"),
        ("the same, where Muon has no bfloat16", "no_bfloat16", "of_muon"),
        ("a step of fixed size", "spectral_newton_fixed_size", "of_muon"),
        ("alpha = 1.5, d = 0.01", "spectral_newton_alpha_1.5", "of_muon"),
        ("alpha = 1, d = 0.03", "spectral_newton_alpha_1", "of_muon"),
        ("alpha = 3, d = 0.03", "spectral_newton_alpha_3", "of_muon"),
        ("AdamW", "adamw", "of_muon"),
        ("SOAP", "soap", "of_muon"),
        ("Shampoo", "shampoo", "of_muon"),
    ],
)
def test_what_an_optimizers_step_costs_is_the_benchmarks(row, arm, figure):
    name, arm = ("optimizer_step_no_bfloat16", "spectral_newton") if arm == "no_bfloat16" else ("optimizer_step", arm)
    sizes = benchmark(name)["figures"].values()
    page = PAGES["optimizer.md"]
    table = page[page.index("## What a step costs") : page.index("## In distributed training")]
    (shown,) = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith(f"| {row}")]
    assert shown[1:] == [f"{size[arm][figure]:.2f}" for size in sizes]


def test_adamws_size_keeps_two_numbers_per_matrix():
    sizes = benchmark("optimizer_step")["figures"].values()
    assert all(size["spectral_newton"]["state_numbers"] == 3 for size in sizes)  # with the count of skipped updates


def test_losses_of_training_are_the_benchmarks():
    page = PAGES["optimizer.md"]
    table = page[page.index("| test loss, mean") :].split("\n\n")[0].splitlines()[2:]
    summary = benchmark("train")["summary"]
    for row, arm in zip(table, dict.fromkeys(row["arm"] for row in summary), strict=True):
        found = {row["task"]: f"{row['test']:.3f} ± {row['std']:.3f}" for row in summary if row["arm"] == arm}
        assert row[2:-2].split(" | ")[1:] == [found[task] for task in ("language", "noisy_pixels", "wrong_labels")], arm


def test_losses_with_a_fixed_damping_are_the_benchmarks():
    found = {(row["task"], row["arm"]): row["validation"] for row in benchmark("train")["summary"]}
    noise, labels = (
        " against ".join(f"{found[task, arm]:.3f}" for arm in ("spectral_newton", "adam_size_d_0.1"))
        for task in ("noisy_pixels", "wrong_labels")
    )
    told = f"the default is higher on pixel noise ({noise}) and lower on wrong labels ({labels})"
    assert told in flat(PAGES["optimizer.md"])


def test_losses_of_the_grid_are_the_benchmarks():
    grid = benchmark("train")["grid"]
    gpt, mlp, resnet = (
        ", ".join(f"{grid[task]['2.0'][d]:.3f}" for d in ("0.01", "0.03", "0.1", "0.3"))
        for task in ("language", "wrong_labels", "noisy_pixels")
    )
    page = flat(PAGES["optimizer.md"])
    assert f"on the GPT gives {gpt} with d" in page
    assert f"on the MLP {mlp}; on the ResNet {resnet}." in page


def test_losses_at_adamws_own_rate_are_the_benchmarks():
    results = benchmark("train")
    rates = {row["task"]: row["lr"] for row in results["summary"] if row["arm"] == "adamw"}
    seeds = results["environment"]["tuning_seeds"]

    def losses(*words):
        found = [
            [r["val"] for r in results["runs"] if r["recipe"] in words and r["task"] == task and r["lr"] == lr
             and r["seed"] in seeds[task]]
            for task, lr in rates.items()
        ]  # fmt: skip
        assert [len(of) for of in found] == [len(of) for of in seeds.values()]
        first, second, third = (f"{statistics.fmean(of):.2f}" for of in found)
        return f"{first}, {second} and {third}"

    own = "SpectralNewton momentum=0.9 update_rms=adam alpha=2.0 damping="
    told = f"validation loss is {losses(own + '0.03', own + 'noise')}, and AdamW's {losses('AdamW weight_decay=0.01')}."
    assert told in flat(PAGES["optimizer.md"])


def test_losses_of_long_runs_are_the_benchmarks():
    results = benchmark("train")
    rows = {(row["task"], row["arm"]): row for row in results["long"]}
    found = {key: f"{row['test']:.3f} ± {row['std']:.3f}" for key, row in rows.items()}
    adamw, muon, ours = (found["language", arm] for arm in ("adamw", "muon_momentum_0.85", "spectral_newton"))
    page = flat(PAGES["optimizer.md"])
    assert f"AdamW reaches {adamw}, Muon with momentum 0.85 {muon}, SpectralNewton {ours}" in page
    short = {row["arm"]: row["test"] for row in results["summary"] if row["task"] == "language"}
    gains = [losses["adamw"] - losses["spectral_newton"] for losses in (
        short, {arm: row["test"] for (task, arm), row in rows.items() if task == "language"}
    )]  # fmt: skip
    assert f"the gain over AdamW shrinks from {gains[0]:.2f} to {gains[1]:.2f}" in page
    adamw, muon, ours = (found["wrong_labels", arm] for arm in ("adamw", "muon_momentum_0.85", "spectral_newton"))
    assert f"the defaults keep {ours}, while AdamW ({adamw}) and Muon" in page
    assert f"momentum 0.85 ({muon}) learn the wrong labels" in page


def test_losses_of_small_tasks_are_the_benchmarks():
    summary = benchmark("small_tasks")["summary"]
    found = {(row["task"], row["arm"]): row for row in summary}
    tasks = list(dict.fromkeys(row["task"] for row in summary))
    arms = ("adamw", "swapped", "swapped_fixed", "spectral_newton")
    for task in tasks:
        rows = [found[task, arm] for arm in arms]
        assert cells_of(task, "optimizer.md") == [f"{row['test']:.3f} ± {row['std']:.3f}" for row in rows]
    over = {arm: [] for arm in arms}
    for task, arm in found:
        adamw, row = found[task, "adamw"], found[task, arm]
        deviation = math.sqrt((adamw["std"] ** 2 + row["std"] ** 2) / 2)
        over[arm].append((row["test"] - adamw["test"]) / deviation)
    not_worse, lower = (sum(x <= most for x in over["swapped"]) for most in (1, -1))
    told = f"not worse on {not_worse} of {len(tasks)}, within one standard deviation, and lower by more than that on"
    assert f"{told} {lower}." in flat(PAGES["optimizer.md"])
    fixed = sum(x <= 1 for x in over["swapped_fixed"])
    assert f"With a fixed damping of 0.1 it is not worse on {fixed} of {len(tasks)}." in flat(PAGES["optimizer.md"])
    assert f"it is not worse than AdamW on {not_worse}." in flat(README)
    factors = [found[task, "spectral_newton"]["lr"] / found[task, "adamw"]["lr"] for task in tasks]
    same, higher, below = factors.count(1), sum(x > 1 for x in factors), sum(x < 1 for x in factors)
    told = f"the same rate on {same} of {len(tasks)}, two to eight times as high on {higher}, and lower on {below}"
    assert told in flat(PAGES["optimizer.md"])


def test_losses_of_optimizers_side_by_side_are_the_benchmarks():
    losses, page = {}, PAGES["ablation.md"]
    for row in benchmark("ablation")["runs"]:
        losses.setdefault(row["run"]["optimizer"], {}).setdefault(row["run"]["task"], []).append(row["test_loss"])
    table = page[page.index("| test loss, mean") :].split("\n\n")[0].splitlines()[2:]
    assert [row[2:-2].split(" | ")[1:] for row in table] == [
        [f"{statistics.fmean(of):.3f} ± {statistics.stdev(of):.3f}" for of in of_tasks.values()]
        for of_tasks in losses.values()
    ]
    muon = losses["muon"]["language"]
    below = [
        sum(loss < other for loss, other in zip(losses[f"spectral_newton_{alpha}"]["language"], muon, strict=True))
        for alpha in ("1.5", "2", "1")
    ]
    told = f"alpha = 1.5 is below Muon on {below[0]} of {len(muon)} seeds, alpha = 2 on {below[1]} and alpha = 1 on"
    assert f"On characters, {told} {below[2]};" in flat(page)
    gains = {
        task: statistics.fmean(adamw) - statistics.fmean(losses["swapped"][task])
        for task, adamw in losses["adamw"].items()
    }
    assert min(gains.values()) > 0
    told = f"by {gains['language']:.2f} on characters and {gains['wrong_labels']:.2f} on wrong labels"
    assert f"Its mean is below AdamW's on all three, {told}," in flat(page)


def test_memory_of_long_runs_is_the_benchmarks():
    grown = {name: run["growth"] for name, run in benchmark("long_run")["figures"].items()}
    csv, wandb, no_csv, no_wandb = (
        f"{grown[name]['memory_mb']:.2f}" for name in ("csv", "wandb", "csv, no probe", "wandb, no probe")
    )
    told = f"grew by {csv} MB with CSVLogger and {wandb} MB with W&B offline, and by {no_csv} and {no_wandb} MB where"
    assert told in flat(PAGES["faults.md"])
    assert all(run["graphs"] == run["files"] == 0 for run in grown.values())


def test_what_noise_does_is_the_benchmarks():
    networks = benchmark("noise")["networks"]
    gpt, cnn = networks["gpt"]["summary"], networks["cnn"]["summary"]
    batch, auto = ([of[arm]["median_error"] for of in (gpt, cnn)] for arm in ("batch", "auto"))
    costs = [of["auto"]["cost"] for of in (gpt, cnn)]
    assert (
        f'off by {batch[0]:.2f} on the GPT and {batch[1]:.2f} on the CNN, that of "auto" by {auto[0]:.2f} and '
        f"{auto[1]:.2f}, at {costs[0]:.1f} and {costs[1]:.1f} times the cost."
    ) in READING
    covered = [networks[name]["coverage"] for name in ("gpt", "cnn")]
    assert f"in {100 * covered[0]:.0f} % of the GPT's fits and {100 * covered[1]:.0f} % of the CNN's." in READING


def test_every_logged_quantity_has_its_formula():
    for key in (*LAYER_KEYS, STEP_CURVATURE):
        assert re.search(rf"^\| .*[`/]{key.name}(/<layer>)?`.* \| .* \|$", PAGES["quantities.md"], re.MULTILINE), (
            key.name
        )
    assert all(f"`spectral/{key}`" in PAGES["quantities.md"] for key in STEP_KEYS)
    assert f"`{ALPHA_KEY}`" in PAGES["optimizer.md"]


def test_options_of_logging_are_named():
    parameters = set(inspect.signature(SpectralProbe).parameters)
    options = {"log_layers", "log_quantities", "wandb_charts", "log_tables", "log_figures_every", "print_every"}
    options |= {"print_end", "keep_reports", "step"}
    assert options <= parameters
    assert all(f"| `{option}` |" in PAGES["trackers.md"] for option in options)
    assert all(f"`plot_{name}" in PAGES["trackers.md"] for name in FIGURES if name != "rank_models")
    assert f"for up to {LOGGED_LAYERS} layers" in flat(PAGES["trackers.md"])


def test_every_option_of_the_probe_is_explained():
    unnamed = {x for x in inspect.signature(SpectralProbe).parameters if not re.search(rf"\b{x}\b", MANUAL)}
    assert unnamed <= {"history_size"}


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ("ResNet-50, 54 layers", ["conv"] * 53 + ["head"]),
        ("GPT of 12 blocks, 49 layers", [*["attention_qkv", "attention_out", "mlp_up", "mlp_down"] * 12, "head"]),
    ],
)
def test_numbers_of_keys_and_charts(row, kinds):
    measured = report(*(layer(f"{i}.weight", kind=kind) for i, kind in enumerate(kinds)))
    selection = LogSelection("auto", "auto", {STEP_CURVATURE.part}, lambda text: None)
    shares = [layer_key(STEP_CURVATURE.name, name) for name in selection.step_layers(list(measured.layers))]
    keys = [*selection.scalars(measured), *PROBE_KEYS, *STEP_KEYS, *shares]
    shown = charts(keys, 40)
    medians = {key for key in shown if "_median" in key or "/median_" in key}
    layers, counts = sum(key.startswith("alpha/") for key in {*shown} - medians), sum(key in HEALTH for key in shown)
    curves = len(medians - {*HEALTH})
    parts = [
        f"{curves} curves",
        "the step's scale",
        f"{counts} counts",
        *([f"alpha of {layers} layers"] * bool(layers)),
    ]
    assert cells_of(row, "trackers.md") == [str(len(keys)), f"{len(shown)}: {', '.join(parts)}"]
