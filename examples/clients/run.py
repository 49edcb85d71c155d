"""Other people's programs, trained through their own Trainers with the probe and without, in environments of their own.

    python examples/clients/run.py [--only scvi ...] [--environments clients] [--output examples/clients/clients.md]

An environment holds what a program needs beside what is installed here, in other versions where it must be, but for
torch and Lightning; pip makes it when it is first needed. The table tells which layers the probe measured and how, what
that costs in training steps, whether the trained weights are the same to the bit, and what it warned of. Programs and
data are those of examples/benchmarks.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import time
import venv
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

EVERY = 25
KEPT = ("torch", "lightning", "pytorch-lightning")

CLIENTS: dict[str, list[str]] = {
    **{f"transformers_{name}": ["transformers"] for name in ("gpt2", "llama", "mixtral", "falcon", "bert", "albert")},
    "geometric_gcn": ["torch_geometric"],
    "chemprop_regression": ["chemprop"],
    "scvi": ["scvi-tools"],
    "gluonts_deepar": ["gluonts[torch]"],
    "neuralforecast_patchtst": ["neuralforecast"],
    "pytorch_forecasting_tft": ["pytorch-forecasting"],
    "darts_tcn": ["u8darts[torch]"],
    "lightly_simclr": ["--no-deps", "lightly", "lightly-utils", "aenum", "hydra-core", "omegaconf"],
}
"""Name of a program in examples/benchmarks/programs.py -> what it is installed by."""

HEADER = (
    "| program | parameters | layers measured | method | a probe, in steps | weights | said |\n"
    "|---|---|---|---|---|---|---|\n"
)


def environment(folder: Path, requirements: list[str]) -> Path:
    """Return the interpreter of an environment with these packages, and make it if it is not there."""
    name = next(word for word in requirements if not word.startswith("-")).partition("[")[0]
    python = folder / name / "bin" / "python"
    done = folder / name / "installed"
    if done.exists():
        return python
    venv.create(folder / name, with_pip=True, clear=True)
    (site,) = (folder / name).glob("lib/python*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    constraints = folder / name / "constraints.txt"
    kept = [package for package in metadata.distributions() if package.metadata["Name"] in KEPT]
    constraints.write_text("".join(f"{package.metadata['Name']}=={package.version}\n" for package in kept))
    command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *requirements]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done.touch()
    return python


def train(name: str) -> dict[str, Any]:
    """Train a program with the probe and without; return what the table shows."""
    import numpy as np
    import torch

    from examples.benchmarks import program_training
    from examples.benchmarks.programs import PROGRAMS
    from lightning_spectral import SpectralProbe, SpectralWarning

    probe = SpectralProbe(every_n_steps=EVERY, print_end=False)
    trained, seconds = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The one without comes second: what it imports, and loads for the first time, is no part of a step.
        for callbacks in ([probe], []):
            program_training.CALLBACKS[:] = callbacks
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            started = time.perf_counter()
            module, _ = PROGRAMS[name]()
            seconds.append(time.perf_counter() - started)
            trained.append({key: value.clone() for key, value in module.state_dict().items()})
    probed, plain = trained
    report = probe.last_report
    if report is None:
        raise RuntimeError("the probe measured nothing")
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "layers": [len(report.layers) - len(report.failed), len(report.layers)],
        "methods": dict(Counter(layer.method for layer in report.layers.values())),
        "steps": float(np.median([r.seconds for r in probe.history])) / seconds[1] * program_training.STEPS,
        "same": plain.keys() == probed.keys() and all(torch.equal(plain[key], probed[key]) for key in plain),
        "said": [str(w.message) for w in caught if issubclass(w.category, SpectralWarning)],
    }


def row(name: str, found: dict[str, Any]) -> str:
    """Return a line of the table."""
    measured, layers = found["layers"]
    methods = ", ".join(f"{method} ({count})" for method, count in found["methods"].items())
    weights = "the same" if found["same"] else "**differ**"
    said = "; ".join(text.replace("|", "/") for text in found["said"]) or "nothing"
    cells = [
        name,
        f"{found['parameters']:,}",
        f"{measured} of {layers}",
        methods,
        f"{found['steps']:.0f}",
        weights,
        said,
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Run all, each in a process of its own environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=list(CLIENTS), metavar="NAME")
    parser.add_argument("--environments", type=Path, default=Path("clients"), metavar="FOLDER")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--train", choices=CLIENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(options.train)))
        return
    table = HEADER
    for name in options.only:
        try:
            python = environment(options.environments.absolute(), CLIENTS[name])
            command = [str(python), __file__, "--train", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            line = row(name, json.loads(done.stdout.splitlines()[-1]))
        except subprocess.CalledProcessError as error:
            line = f"{name} failed: {(error.stderr or str(error)).strip().splitlines()[-1]}\n"
            print(line, end="", file=sys.stderr, flush=True)
            continue
        table += line
        print(line, end="", flush=True)
        if options.output:
            options.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
