"""Train each task with each optimizer over some seeds, and print and plot one table of their losses.

    python examples/ablation/run.py [--output ablation-runs] [--seed 0 --seed 1] [--task digits] [--optimizer muon]
    python examples/ablation/run.py --seed 0 --probe.max_samples 64 --probe.curvature sketch   # options of the probe

A run is `lightning-spectral fit` with base.yaml, a task's file and an optimizer's, at the learning rate that rates.yaml
gives the two; a file laid into optimizers/ with rates in rates.yaml takes part. The folder receives ablation_cpu.json,
table.txt, ablation.png, a CSV log per run, and per task a page of the first seed's runs laid over each other, each of
which a SpectralProbe measures.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.ablation.results import Result, Run, report  # noqa: E402

SEEDS = (0, 1, 2)
PROBES = ("SpectralProbe", "ScaleRates")
PROBE = {"every_n_steps": "50", "max_samples": "32"}
"""Options of a probe as those that optimizers/ have."""
PROJECT = "lightning-spectral-ablation"
"""Of W&B."""


def rates() -> dict[str, dict[str, float]]:
    """Task -> optimizer -> learning rate, in the order of the table."""
    return yaml.safe_load((HERE / "rates.yaml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def plan(
    tasks: Sequence[str] | None = None,
    optimizers: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    lr_factors: Sequence[float] = (1.0,),
) -> list[Run]:
    """The runs of the tasks, optimizers and seeds, all where none are named.

    Raises:
        ValueError: for a task or an optimizer without a learning rate in rates.yaml.
    """
    known = rates()
    runs = []
    for task in tasks or known:
        if task not in known:
            raise ValueError(f"task {task!r} is not in rates.yaml, which has {', '.join(known)}")
        for optimizer in optimizers or known[task]:
            if optimizer not in known[task]:
                raise ValueError(f"optimizer {optimizer!r} has no rate for {task} in rates.yaml; give it one")
            lr = known[task][optimizer]
            choices = product(lr_factors, seeds or SEEDS)
            runs += [Run(task, optimizer, seed, lr * factor, factor) for factor, seed in choices]
    return runs


def arguments(run: Run, output: Path, *, wandb: bool = False, probe: Mapping[str, str] | None = None) -> list[str]:
    """What a run gives the command line; ``probe``: options of a SpectralProbe, added where its optimizer has none."""
    folder = str(run.folder(output))
    here = {"save_dir": folder, "name": "", "version": ""}
    loggers: list[dict[str, Any]] = [{"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": here}]
    if wandb:
        named = {"project": PROJECT, "name": f"{run.task}-{run.optimizer}-{run.seed}", "save_dir": folder}
        loggers.append({"class_path": "pytorch_lightning.loggers.WandbLogger", "init_args": named})
    configs = (HERE / "base.yaml", HERE / f"{run.task}.yaml", HERE / "optimizers" / f"{run.optimizer}.yaml")
    return [
        *(f"--config={config}" for config in configs),
        f"--seed_everything={run.seed}",
        f"--optimizer.lr={run.lr:g}",
        f"--trainer.logger={json.dumps(loggers)}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false",
        *(probe_arguments(probe) if probe and not has_probe(run.optimizer) else []),
    ]


def probe_arguments(options: Mapping[str, str]) -> list[str]:
    """What the command line takes for one more probe."""
    chosen = (f"--trainer.callbacks.{name}={value}" for name, value in options.items())
    return ["--trainer.callbacks+=lightning_spectral.SpectralProbe", *chosen]


def has_probe(optimizer: str) -> bool:
    """Whether an optimizer's file comes with a probe, which leaves its reports in the run's folder."""
    config = yaml.safe_load((HERE / "optimizers" / f"{optimizer}.yaml").read_text(encoding="utf-8"))
    return any(callback["class_path"].endswith(PROBES) for callback in config.get("trainer", {}).get("callbacks", []))


def train(
    run: Run,
    output: Path,
    *,
    wandb: bool = False,
    probe: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
) -> Result:
    """Train, validate and test.

    Args:
        run: what to train.
        output: folder of all runs.
        wandb: log to Weights & Biases too.
        probe: measure the run for its page, with these options of a probe.
        extra: more arguments of the command line.
    """
    import torch

    from lightning_spectral.lightning_cli import spectral_cli

    torch.set_num_threads(1)
    hush()
    run.folder(output).mkdir(parents=True, exist_ok=True)
    cli = spectral_cli()(
        args=[*arguments(run, output, wandb=wandb, probe=probe), *extra],
        run=False,
        save_config_kwargs={"overwrite": True},
    )
    started = time.perf_counter()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = time.perf_counter() - started
    val_loss = float(cli.trainer.callback_metrics["val_loss"])
    (tested,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    if wandb:
        cli.trainer.loggers[-1].experiment.finish()
    return Result(run, val_loss, tested["test_loss"], seconds, curve(run.folder(output)))


def curve(folder: Path) -> list[float]:
    """Validation losses in a run's CSV log."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]


def hush() -> None:
    """Leave nothing of Lightning's notes on hardware, workers and arguments."""
    for package in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        for name in ("utilities.rank_zero", "utilities.seed", "callbacks.model_summary"):
            logging.getLogger(f"{package}.{name}").setLevel(logging.ERROR)
    for message in (
        "does not have many workers", "smaller than the logging interval", "LeafSpec", "LightningCLI's args",
        "configure_optimizers` will be overridden", "experiment logs directory", "Experiment logs directory",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def train_all(
    runs: Sequence[Run], output: Path, *, jobs: int, wandb: bool = False, probe: Mapping[str, str] = PROBE
) -> Iterator[Result]:
    """Results in the order of the runs, so many of them at a time, a thread each; probes are in the first seed's."""
    options: list[dict[str, Any]] = [
        {"wandb": wandb, "probe": probe if run.seed == runs[0].seed else None} for run in runs
    ]
    if jobs == 1 or len(runs) == 1:
        for run, of_run in zip(runs, options, strict=True):
            yield train(run, output, **of_run)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train, run, output, **of_run) for run, of_run in zip(runs, options, strict=True)]
        for future in futures:
            yield future.result()


def probe_options(words: Sequence[str]) -> dict[str, str]:
    """Options of a probe, of ``--probe.NAME=VALUE`` or ``--probe.NAME VALUE``.

    Raises:
        ValueError: for a word that is neither.
    """
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--probe.") else [word])]
    names, values = parts[::2], parts[1::2]
    for name in names:
        if not name.startswith("--probe.") or len(names) != len(values):
            raise ValueError(f"unrecognized argument {name}; of a probe it is --probe.NAME VALUE")
    return dict(zip((name.removeprefix("--probe.") for name in names), values, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ablation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("ablation-runs"), help="folder (%(default)s)")
    parser.add_argument("--task", action="append", help="one of rates.yaml; may be given several times (all)")
    parser.add_argument("--optimizer", action="append", help="likewise (all)")
    parser.add_argument("--seed", action="append", type=int, help=f"likewise ({', '.join(map(str, SEEDS))})")
    parser.add_argument(
        "--lr-factors", nargs="+", type=float, default=[1.0], help="train at these multiples of each rate, a row each"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (%(default)s)")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    parser.add_argument_group("--probe.NAME VALUE", "an option of the probe beside optimizers that bring none")
    options, further = parser.parse_known_args(argv)
    try:
        probe = PROBE | probe_options(further)
        runs = plan(options.task, options.optimizer, options.seed, options.lr_factors)
    except ValueError as error:
        parser.error(str(error))
    results = []
    trained = train_all(runs, options.output, jobs=options.jobs, wandb=options.wandb, probe=probe)
    for i, result in enumerate(trained, 1):
        run = result.run
        print(
            f"{i}/{len(runs)} {run.task} {run.optimizer} lr {run.lr:g} seed {run.seed}: "
            f"validation {result.val_loss:.4f}, test {result.test_loss:.4f}, {result.seconds:.0f} s",
            flush=True,
        )
        results.append(result)
    report(results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
