"""Every benchmark, one after the other, each in a process of its own.

    python examples/benchmarks/run.py [--only probe noise ...] [--runs benchmark-runs] [--results FOLDER]

Each writes its figures and picture to the runs' folder; when it has ended well they are copied to the results that the
manual takes its numbers from. One that fails is told at the end, and the others run all the same. `train` and
`small_tasks` go on from the runs that they find in that folder: remove it to begin anew. `gpu` needs an accelerator.
What `programs` is not installed for is left out, and so are peers of `optimizer_step` and `probe`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent


class Benchmark(NamedTuple):
    """A script (from this folder), its arguments, and about how many minutes two cores without other work take."""

    script: str
    minutes: int
    arguments: tuple[str, ...] = ()
    figure: bool = False
    folder: bool = False

    def command(self, name: str, runs: Path) -> list[str]:
        """Return what to run.

        ``figure``: the script draws only where it is told to; ``folder``: it writes more than NAME.json, to a folder.
        """
        drawn = [f"--figure={runs / f'{name}.png'}"] if self.figure else []
        output = runs if self.folder else runs / f"{name}.json"
        return [sys.executable, str(HERE / self.script), *self.arguments, f"--output={output}", *drawn]


BENCHMARKS: dict[str, Benchmark] = {
    "optimizer_step_no_bfloat16_cpu": Benchmark("optimizer_step.py", 2, ("--no-bfloat16", "--only", "spectral_newton")),
    "overhead_cpu": Benchmark("overhead.py", 2),
    "shared_step_cpu": Benchmark("shared_step.py", 3),
    "optimizer_step_cpu": Benchmark("optimizer_step.py", 5),
    "programs_cpu": Benchmark("programs.py", 5),
    "shards_cpu": Benchmark("shards.py", 5),
    "gpu": Benchmark("gpu.py", 8),
    "others_cpu": Benchmark("others.py", 10),
    "probe_cpu": Benchmark("probe.py", 15),
    "scaling_cpu": Benchmark("scaling.py", 15),
    "ablation_cpu": Benchmark("../ablation/run.py", 20, folder=True),
    "noise_cpu": Benchmark("noise.py", 22, figure=True),
    "long_run_cpu": Benchmark("long_run.py", 25, figure=True),
    "small_tasks_cpu": Benchmark("small_tasks.py", 50),
    "train_cpu": Benchmark("train.py", 120, ("--study", "--long")),
}
"""Name of the results -> what makes them, the shortest first. Minutes of `gpu` are an accelerator's."""


def run(name: str, runs: Path, results: Path) -> str:
    """Run one and copy what it wrote; return what went wrong, if anything did."""
    made = subprocess.run(BENCHMARKS[name].command(name, runs), check=False)
    if made.returncode:
        return f"exit status {made.returncode}"
    written = sorted(runs.glob(f"{name}.*"))
    for path in written:
        shutil.copy(path, results)
    return "" if written else "it wrote nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, tell how long each took, and return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name.removesuffix("_cpu") for name in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--runs", type=Path, default=Path("benchmark-runs"), help="(%(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="(%(default)s)")
    options = parser.parse_args(argv)
    for folder in (options.runs, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, str] = {}
    failed = 0
    for name in (name for name in BENCHMARKS if name.removesuffix("_cpu") in options.only):
        if name == "gpu" and not torch.accelerator.is_available():
            told[name] = "left out: PyTorch finds no accelerator"
            continue
        print(f"== {name}, about {BENCHMARKS[name].minutes} minutes", flush=True)
        started = time.perf_counter()
        wrong = run(name, options.runs, options.results)
        failed += bool(wrong)
        told[name] = f"{(time.perf_counter() - started) / 60:.1f} minutes" + (f", FAILED: {wrong}" if wrong else "")
        print(f"== {name}: {told[name]}", flush=True)
    print(*(f"{name:20s} {text}" for name, text in told.items()), sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
