"""Reproduce the paper's experiments, all or those named, and write RESULTS.md, with a table and a figure of each.

    python examples/paper/run.py [architectures dynamics ...] [--config full --data FOLDER] [--seeds 2]

Networks are trained once for all experiments and kept in the output folder; a second run reads them. cpu.yaml has
small networks on data that is at hand, full.yaml the paper's own; its archives lie in --data or are downloaded there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.paper.archives import FOLDER_VARIABLE, ArchiveError  # noqa: E402
from examples.paper.experiments import EXPERIMENTS  # noqa: E402
from examples.paper.finding import Finding  # noqa: E402
from examples.paper.outcome import OldOutcomeError, Outcome, Training, outcome  # noqa: E402
from examples.paper.page import write  # noqa: E402


@dataclass(frozen=True)
class Plan:
    """A config file.

    Attributes:
        name: of the file.
        seeds: of the runs.
        trainings: by name.
        experiments: name -> names of the trainings it looks at.
    """

    name: str
    seeds: tuple[int, ...]
    trainings: Mapping[str, Training]
    experiments: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, path: Path, chosen: Sequence[str] = (), n_seeds: int | None = None) -> Plan:
        """Those experiments of a file, all where none are named, with its first so many seeds.

        Raises:
            ValueError: for an experiment or training that there is not, or an option that a training has not.
        """
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        trainings = {name: Training.from_config(name, given) for name, given in values["trainings"].items()}
        experiments = values["experiments"]
        for name in (*experiments, *chosen):
            if name not in EXPERIMENTS or name not in experiments:
                raise ValueError(f"{name!r} is no experiment of {path.name}, which has {', '.join(experiments)}")
        experiments = {name: experiments[name] for name in EXPERIMENTS if name in (chosen or experiments)}
        for name, used in experiments.items():
            if unknown := sorted(set(used) - set(trainings)):
                raise ValueError(f"{path.name}: experiment {name} names no training by {', '.join(unknown)}")
        return cls(path.stem, tuple(values["seeds"])[:n_seeds], trainings, experiments)

    @property
    def runs(self) -> list[tuple[Training, int]]:
        """Every training that is used, with every seed."""
        used = dict.fromkeys(name for names in self.experiments.values() for name in names)
        return [(self.trainings[name], seed) for name in used for seed in self.seeds]


def _train(training: Training, seed: int, folder: Path) -> Outcome:
    import torch

    torch.set_num_threads(1)
    return outcome(training, seed, folder)


def train_all(runs: Sequence[tuple[Training, int]], folder: Path, jobs: int) -> Iterator[Outcome]:
    """Outcomes in the order of the runs, so many of them at a time, a thread each; with one job, all threads."""
    if jobs == 1:
        for training, seed in runs:
            yield outcome(training, seed, folder)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_train, *run, folder) for run in runs]
        for future in futures:
            yield future.result()


def all_outcomes(plan: Plan, folder: Path, jobs: int = 1) -> dict[str, list[Outcome]]:
    """Train what is not trained yet: the name of each training -> what came of it, one per seed."""
    outcomes: dict[str, list[Outcome]] = {}
    for i, found in enumerate(train_all(plan.runs, folder, jobs), 1):
        outcomes.setdefault(found.training, []).append(found)
        tested = ", ".join(f"{name} {value:.3f}" for name, value in found.test.items())
        print(f"{i}/{len(plan.runs)} {found.training} seed {found.seed}: {tested}, {found.seconds:.0f} s", flush=True)
    return outcomes


def findings(plan: Plan, outcomes: Mapping[str, list[Outcome]]) -> dict[str, Finding]:
    """Every experiment on its trainings."""
    return {
        name: EXPERIMENTS[name]({used: outcomes[used] for used in names}) for name, names in plan.experiments.items()
    }


def write_page(plan: Plan, found: Mapping[str, Finding], folder: Path, command: str, seconds: float) -> Path:
    """RESULTS.md, figures/ and results/ in the folder."""
    import torch

    figures, results = folder / "figures", folder / "results"
    for made in (figures, results):
        made.mkdir(parents=True, exist_ok=True)
    for name, finding in found.items():
        finding.figure.savefig(figures / f"{name}.png", dpi=110)
        if finding.records:
            text = "[\n" + ",\n".join(map(json.dumps, finding.records)) + "\n]\n"
            (results / f"{name}.json").write_text(text, encoding="utf-8")
    where = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    where += f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", CPU"
    record = {
        "command": command,
        "seeds": len(plan.seeds),
        "where": where,
        "minutes": round(seconds / 60),
        "trainings": _trainings(plan),
        "experiments": {name: finding.record() for name, finding in found.items()},
    }
    (results / "experiments.json").write_text(encoded(record), encoding="utf-8")
    return write(folder)


def encoded(record: Mapping[str, Any]) -> str:
    """JSON with a row of a table per line."""
    return json.dumps(record, ensure_ascii=False).replace(', ["', ',\n["').replace('}, "', '},\n"') + "\n"


def _trainings(plan: Plan) -> list[list[str]]:
    rows = []
    for training in dict.fromkeys(training.name for training, _ in plan.runs):
        made = plan.trainings[training]
        rate = f"{made.lr:g}" + ("" if made.cosine else ", constant")
        cells = [_named(made.data), _named(made.network), str(made.steps), str(made.batch_size), rate]
        gradients = made.gradient_samples
        more = f", gradients of {min(gradients)} to {max(gradients)}" if gradients else ""
        rows.append([made.name, *cells, f"{made.samples} samples{more}"])
    return rows


def _named(chosen: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in chosen.items() if key != "name")
    return f"{chosen['name']} ({options})" if options else str(chosen["name"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiments", nargs="*", help=f"any of {', '.join(EXPERIMENTS)} (all)")
    parser.add_argument("--config", default="cpu", help="cpu, full or the path of a config file (%(default)s)")
    parser.add_argument("--data", type=Path, help=f"folder of archives, for downloads too (${FOLDER_VARIABLE})")
    parser.add_argument("--output", type=Path, default=Path("paper-runs"), help="folder of the runs (%(default)s)")
    parser.add_argument("--page", type=Path, help="folder of RESULTS.md and its figures (the output)")
    parser.add_argument("--seeds", type=int, help="how many of the config's seeds (all)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (%(default)s)")
    options = parser.parse_args(argv)
    if options.data is not None:
        os.environ[FOLDER_VARIABLE] = str(options.data)
    config = HERE / f"{options.config}.yaml" if options.config in ("cpu", "full") else Path(options.config)
    if not config.is_file():
        parser.error(f"--config: {config} is no file; take cpu, full or the path of one")
    try:
        plan = Plan.read(config, options.experiments, options.seeds)
    except ValueError as error:
        parser.error(str(error))
    try:
        outcomes = all_outcomes(plan, options.output, options.jobs)
    except (ArchiveError, ImportError, OldOutcomeError) as error:
        parser.exit(1, f"{error}\n")
    seconds = sum(outcome.seconds for of_training in outcomes.values() for outcome in of_training)
    found = findings(plan, outcomes)
    page = write_page(plan, found, options.page or options.output, _command(options), seconds)
    print(f"{len(found)} experiments in {page}")
    return 0


def _command(options: argparse.Namespace) -> str:
    """What gives the same page, wherever it is written."""
    words = ["python examples/paper/run.py", *options.experiments]
    if options.config != "cpu":
        words += ["--config", options.config]
    if options.seeds is not None:
        words += ["--seeds", str(options.seeds)]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
