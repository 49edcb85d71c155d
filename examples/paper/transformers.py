"""What decides a small GPT's alpha and PR_h: a designed set of runs, a path to the paper's figures, and checks.

    python examples/paper/transformers.py [--jobs 2] [--quick] [--group path] [--output transformer-runs]

Every run is one JSON file in the output folder, and a run whose file is there is not repeated. With all of them the
script writes results/transformers.json, its tables beside it and the figures of TRANSFORMERS.md, and prints that page's
tables; with some of them it does so in the output folder. --quick runs one seed of the path, with 20 steps, into its
own folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# This folder must not be searched: a module named transformers in it would be taken for Hugging Face's.
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (HERE, ROOT))]

from examples.paper.small_gpt import Batch, Setting, Tokens, all_positions, last_position, train  # noqa: E402
from examples.paper.transformers_design import BASE, design_matrix, setting_of  # noqa: E402
from examples.paper.transformers_figures import plot_path, plot_spectra, save  # noqa: E402
from examples.paper.transformers_results import collect, encoded  # noqa: E402
from examples.paper.transformers_tables import page_tables, tables  # noqa: E402
from lightning_spectral import (  # noqa: E402
    LayerSpectrum,
    MeasurementError,
    SpectralReport,
    fit_power_law,
    measure_spectra,
    top_singular_triplets,
)

SMALL = replace(BASE, batch=16)
"""The README's GPT at a quarter of its batch, for time."""

PAPER_LIKE = replace(SMALL, data="uniform", vocabulary=1000, memorise=True)
"""Random tokens, learned by heart and measured on."""

PATH: dict[str, Setting] = {
    "README's GPT": BASE,
    "+ batch 16": SMALL,
    "+ uniform tokens": replace(SMALL, data="uniform"),
    "+ 1000 of them": replace(SMALL, data="uniform", vocabulary=1000),
    "+ learned by heart: paper-like": PAPER_LIKE,
}
"""From the README's network to the paper's figures, one change at a time."""

TICKS = dict(
    zip(PATH, ("README's\nGPT", "batch\n16", "uniform\ntokens", "1000 of\nthem", "learned\nby heart"), strict=True)
)

BACK: dict[str, Setting] = {
    "paper-like, 200 steps": replace(PAPER_LIKE, steps=200),
    "paper-like, 100 steps": replace(PAPER_LIKE, steps=100),
    "paper-like, 96 tokens": replace(PAPER_LIKE, vocabulary=96),
    "paper-like, text": replace(PAPER_LIKE, data="text"),
    "paper-like, text of 96 tokens": replace(PAPER_LIKE, data="text", vocabulary=96),
    "paper-like, 800 steps": replace(PAPER_LIKE, steps=800),
}
"""One factor of the paper-like setting taken back."""


@dataclass(frozen=True)
class Job:
    """One trained and measured network."""

    group: str
    label: str
    setting: Setting
    seed: int
    curvature: str = "auto"

    @property
    def file(self) -> str:
        """Named after everything that the result depends on."""
        digest = hashlib.sha256(repr((self.setting, self.seed, self.curvature)).encode()).hexdigest()[:16]
        return f"{digest}.json"

    @property
    def training(self) -> Setting:
        """What of the setting the trained network depends on."""
        measured = {} if self.setting.memorise else {"sequences": 0}
        return replace(self.setting, positions="all", labels="data", **measured)  # type: ignore[arg-type]


def plan() -> list[Job]:
    """All runs; those that share a trained network follow one another."""
    jobs = [Job("path", label, setting, seed) for seed in range(3) for label, setting in (PATH | BACK).items()]
    rows = design_matrix().tolist()
    jobs += [Job("design", str(i), setting_of(levels), seed) for seed in range(2) for i, levels in enumerate(rows)]
    jobs += others(0)
    jobs += [Job("path", label, setting, seed) for seed in (3, 4) for label, setting in PATH.items()]
    return jobs + others(1)


def others(seed: int) -> list[Job]:
    """One seed of the groups beside the path and the design."""
    jobs = []
    for sequences, labels in product((16, 64, 256, 512), ("data", "model")):
        jobs.append(Job("tokens", labels, replace(SMALL, sequences=sequences, labels=labels), seed))
    for data, memorise, steps in product(("text", "uniform"), (False, True), (0, 100, 200, 400)):
        setting = replace(PAPER_LIKE, data=data, memorise=memorise, steps=steps)
        jobs.append(Job("steps", f"{data}, {'by heart' if memorise else 'endless'}", setting, seed))
    for name, change in ONE_BY_ONE.items():
        jobs.append(Job("one by one", name, replace(SMALL, **change), seed))  # type: ignore[arg-type]
    return jobs + [Job("exact", label, PATH[label], seed, "exact") for label in EXACT]


EXACT = ("+ batch 16", "+ 1000 of them", "+ learned by heart: paper-like")
"""Of the path: measured by exact products, too."""

ONE_BY_ONE: dict[str, dict[str, object]] = {
    "none": {},
    "tokens in random order": {"data": "shuffled"},
    "LayerNorm after": {"norm": "post"},
    "no LayerNorm": {"norm": "none"},
    "SGD": {"optimizer": "sgd", "lr": 0.2},
    "initialisation": {"steps": 0},
    "last position": {"positions": "last", "sequences": 512},
}
"""Changes of the README's setting that the design does not hold, or holds at other levels."""


def run(job: Job) -> dict[str, Any]:
    """Train, measure, and say how much of each direction's gradient another batch confirms."""
    torch.set_num_threads(1)
    model, losses, batch = _trained(job.training, job.seed)
    model.train(job.setting.dropout > 0)
    loss = all_positions if job.setting.positions == "all" else last_position
    fresh = Tokens(job.setting, 9000 + job.seed, held_out=True).draw(job.setting.sequences)
    if not job.setting.memorise:
        batch = Tokens(job.setting, 5000 + job.seed, held_out=True).draw(job.setting.sequences)
    if job.setting.labels == "model":
        generator = torch.Generator().manual_seed(job.seed)
        batch, fresh = (predicted(model, tokens, generator) for tokens, _ in (batch, fresh))
    result: dict[str, Any] = asdict(job) | {"train_loss": losses[-20:]}
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mode = "train" if job.setting.dropout else "eval"
            report = measure_spectra(model, batch, loss, curvature=job.curvature, mode=mode)  # type: ignore[arg-type]
        except MeasurementError as error:
            return result | {"failed": str(error), "layers": []}
    confirmed = signal(model, report, batch, fresh, loss)
    return result | {
        "loss": report.loss,
        "seconds": time.perf_counter() - started,
        "layers": [row(layer, confirmed[name]) for name, layer in report.layers.items()],
    }


@lru_cache(maxsize=1)
def _trained(setting: Setting, seed: int) -> tuple[nn.Module, list[float], Batch]:
    return train(setting, seed)


@torch.no_grad()
def predicted(model: nn.Module, tokens: Tensor, generator: torch.Generator) -> Batch:
    """The tokens with labels drawn from the network's own predictions: no gradient is expected on them."""
    p = model(tokens).softmax(-1)
    return tokens, torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(tokens.shape)


def signal(model: nn.Module, report: SpectralReport, batch: Batch, fresh: Batch, loss: Any) -> dict[str, Tensor]:
    """Layer -> (K,) u_k^T G' v_k / sigma_k, G' the gradient on fresh data: 1 is signal, 0 is noise of the sample."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    chosen = [weights[name] for name in report.layers]
    found = {}
    gradients = torch.autograd.grad(loss(model, batch), chosen)
    again = torch.autograd.grad(loss(model, fresh), chosen)
    for name, gradient, other in zip(report.layers, gradients, again, strict=True):
        triplets = top_singular_triplets(gradient, len(report.layers[name].sigma))
        found[name] = (triplets.u * (other @ triplets.v)).sum(0) / triplets.sigma
    return found


def row(layer: LayerSpectrum, confirmed: Tensor) -> dict[str, Any]:
    """What is kept of a layer: fits with and without k = 1, ratios of the spectrum, both spectra."""
    sigma, h = layer.sigma, layer.h
    rest = fit_power_law(sigma[1:], h[1:])
    energy = sigma.square() / sigma.square().sum()
    values = {
        "alpha": layer.alpha.exponent,
        "alpha_stderr": layer.alpha.stderr,
        "r2": layer.alpha.r2,
        "alpha_without_first": rest.exponent,
        "r2_without_first": rest.r2,
        "pr": layer.pr_curvature,
        "negative": layer.n_negative,
        "sigma_1_2": float(sigma[0] / sigma[1]),
        "sigma_2_K": float(sigma[1] / sigma[-1]),
        "signal": float(confirmed.double() @ energy),
        "signal_median": float(confirmed.median()),
    }
    kept = {key: [float(f"{x:.4g}") for x in tensor.tolist()] for key, tensor in (("sigma", sigma), ("h", h))}
    models = {"rank_model": layer.rank_models.winner}
    return {"name": layer.name, "kind": layer.kind} | {k: float(f"{v:.5g}") for k, v in values.items()} | models | kept


def batches(jobs: list[Job]) -> Iterator[list[Job]]:
    """Jobs that share a trained network, together."""
    for _, group in groupby(jobs, lambda job: (job.training, job.seed)):
        yield list(group)


def work(jobs: list[Job], folder: str) -> list[str]:
    """Run those without a file; a file appears whole or not at all."""
    lines = []
    for job in jobs:
        path = Path(folder) / job.file
        if not path.exists():
            result = run(job)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(result), encoding="utf-8")
            part.replace(path)
            lines.append(f"{job.group} {job.label} seed {job.seed}: {result.get('loss', result.get('failed'))}")
    return lines


def finished(folder: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The results of the jobs that are done, each under its own group and label: jobs may share a file."""
    done = [job for job in jobs if (folder / job.file).exists()]
    return [
        json.loads((folder / job.file).read_text(encoding="utf-8")) | {"group": job.group, "label": job.label}
        for job in done
    ]


def write(folder: Path, results: Path, jobs: Sequence[Job], paper: str | None) -> None:
    """The record of all runs that are done, its figures and its tables."""
    record = collect(finished(folder, jobs), paper)
    results.mkdir(parents=True, exist_ok=True)
    (results / "transformers.json").write_text(encoded(record), encoding="utf-8")
    if all(f"{label}/blocks.1.down.weight" in record["spectra"] for label in PATH):
        save(plot_spectra(record), results / "transformers_spectra.png")
        save(plot_path(record, TICKS), results / "transformers_path.png")
    (results / "transformers.md").write_text(tables(record), encoding="utf-8")
    print(*page_tables(record), sep="\n\n")


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="one seed of the path, 20 steps, into the output folder")
    parser.add_argument("--group", action="append", help="run this group alone; may be repeated")
    parser.add_argument("--output", default="transformer-runs", help="folder of the runs")
    parser.add_argument("--paper", help="folder of the paper's frozen measurements, to refit them")
    options = parser.parse_args()
    folder, results, jobs = Path(options.output), HERE / "results", plan()
    if options.quick:
        folder = results = folder / "quick"
        jobs = [replace(job, setting=replace(job.setting, steps=20)) for job in jobs[: len(PATH)]]
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [job for job in jobs if not options.group or job.group in options.group]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(work, group, str(folder)) for group in batches(chosen)]
        for done, future in enumerate(as_completed(waiting), 1):
            for line in future.result():
                print(f"{done}/{len(waiting)} {line}", flush=True)
    # What is committed is replaced by a complete set alone.
    complete = all((folder / job.file).exists() for job in jobs)
    write(folder, results if complete else folder, jobs, options.paper)


if __name__ == "__main__":
    main()
