"""The command `lightning-spectral`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_spectral._version import __version__
from lightning_spectral.cli.parser import Parser, in_options

LIGHTNING_COMMANDS = {
    "fit": "train a LightningModule from a configuration (a LightningCLI with this package's parts)",
    "validate": "validate a LightningModule, likewise",
    "test": "test a LightningModule, likewise",
    "predict": "predict with a LightningModule, likewise",
}

METHODS = ("auto", "exact", "ggn", "sketch")
"""Of `curvature.METHODS`, whose import takes seconds."""

LOSSES_TOLD = "cross_entropy, nll_loss, mse_loss, binary_cross_entropy_with_logits"
"""Of `functional.FUNCTIONAL_LOSSES`, likewise."""

MEASURE_EPILOG = """\
examples:
  lightning-spectral measure --model nets:resnet --data data:loader --loss cross_entropy --checkpoint last.pt
  lightning-spectral measure --model nets:LitGPT --data data:DataModule --checkpoint last.ckpt

The first names functions without arguments in nets.py and data.py of the current folder. The second names a
LightningModule, which gets the checkpoint's hyper_parameters and whose training_step is the loss.

--data may be a DataLoader, a LightningDataModule (its training data), an iterator of batches, or one batch, or
return one of these. With a loss of torch.nn.functional a batch is (inputs, targets), or a mapping with its
targets under labels, target or y. For cross_entropy of sequences, logits are (N, T, classes) and targets
(N, T); a batch of tokens (N, T) alone is text, each of whose tokens is predicted from those before it.

Checkpoints are read with weights_only=True: nothing in them is executed. --model, --data and --loss are
imported, which executes their modules.
"""


PLAN_EPILOG = """\
examples:
  lightning-spectral plan --model nets:resnet --data data:loader --loss cross_entropy
  lightning-spectral plan --model nets:gpt2_xl --batch-shape 64x1024:int64 --loss cross_entropy --world-size 8

A function makes the model; a module that stands in nets.py has its weights already. Without --data or --batch-shape
the layers, the products and the memory that does not depend on the batch are told. --prefix, --no-strict, --seed,
--device, --bootstrap and --weight-spectra change nothing here.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = Parser("lightning-spectral", description="Curvature exponents of a network in training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train two small networks with a probe and show what it sees",
        description="Train a ResNet on digits and a GPT on Python's source, each with a probe, in about a minute; "
        "print what the probes saw, and write a W&B run, a CSV log and an HTML page of each.",
    )
    demo.add_argument("--output", default="demo-runs", metavar="FOLDER", help="where the logs go (%(default)s)")
    _add_measure(commands)
    _add_plan(commands)
    _add_report(commands)
    for name, help_text in LIGHTNING_COMMANDS.items():
        commands.add_parser(name, help=help_text)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in LIGHTNING_COMMANDS:
        return _lightning(given, from_command_line=arguments is None)
    options = parser.parse_args(given)
    run = {"demo": _demo, "measure": _measure, "plan": _plan, "report": _report}[options.command]
    return run(options)


def _add_measure(commands: Any) -> None:
    measure = commands.add_parser(
        "measure",
        help="measure a checkpoint without training: table, JSON and HTML page",
        description="Measure a network once, without training: the exponents of every layer as a table, and as\n"
        "spectra.json and spectra.html in a folder.",
        epilog=MEASURE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_sources(measure.add_argument_group("what is measured (NAME is an import path, pkg.module:name)"))
    _add_options(measure.add_argument_group("how it is measured"))
    where = measure.add_argument_group("where it goes")
    where.add_argument("--output", default="spectra", metavar="FOLDER", help="of the files (%(default)s)")
    where.add_argument("--no-page", dest="page", action="store_false", help="write no HTML page, which needs plotly")
    where.add_argument("--traceback", action="store_true", help="of an error, show all instead of one line")


def _add_sources(add: Any, *, batch: bool = True) -> None:
    add.add_argument("--model", required=True, metavar="NAME", help="a module, or a class or function that makes one")
    add.add_argument("--data", required=batch, metavar="NAME", help="a DataLoader or a batch, or what returns one")
    add.add_argument(
        "--loss",
        metavar="NAME",
        help=f"of torch.nn.functional ({LOSSES_TOLD}, ...), or a function of (model, batch); without it, the module's "
        "own spectral_loss(batch) or training_step",
    )
    add.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="of a Lightning Trainer, or a state dict; without it, the model is measured as it is made",
    )
    add.add_argument("--prefix", default="", help="what the checkpoint's names begin with and the model's do not")
    add.add_argument("--no-strict", dest="strict", action="store_false", help="load the names that are in both")
    add.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")


def _add_options(add: Any) -> None:
    add.add_argument("--layers", nargs="+", metavar="GLOB", help="patterns of names (all but embeddings)")
    add.add_argument("--kinds", nargs="+", metavar="GLOB=KIND", help="kinds of layers, where the inferred one is wrong")
    add.add_argument(
        "--fused-qkv",
        nargs="+",
        metavar="GLOB",
        help="projections that hold query, key and value, to be measured apart; GLOB=ROWS,ROWS,ROWS where their rows "
        "are not equal in number",
    )
    add.add_argument("--top-k", type=int, default=20, metavar="K", help="directions per layer, 3 or more (%(default)s)")
    add.add_argument("--curvature", choices=METHODS, default="auto", help="the method (%(default)s)")
    add.add_argument("--n-batches", type=int, default=1, metavar="N", help="batches averaged over (%(default)s)")
    few = "of each batch, measure the first so many (all); below 32 there is no sketch, which is fast"
    add.add_argument("--max-samples", type=int, metavar="N", help=few)
    add.add_argument("--micro-batch-size", type=int, metavar="N", help="samples in memory at once (by itself)")
    add.add_argument("--mode", choices=("eval", "train"), default="eval", help="of the network (%(default)s)")
    add.add_argument("--precision", choices=("float32", "float64"), default="float32", help="at least (%(default)s)")
    add.add_argument("--alignment", action="store_true", help="split alpha by the layer's Kronecker factors")
    add.add_argument("--spectrum-top-k", type=int, metavar="K", help="singular values for the rank models (top-k)")
    add.add_argument("--curvature-fraction", type=int, metavar="N", help="draws for the trace of the Hessian (none)")
    add.add_argument("--weight-spectra", action="store_true", help="take the weights' singular values, too")
    add.add_argument("--bootstrap", type=int, metavar="N", help="draws for intervals of the exponents (none)")
    add.add_argument("--device", default="auto", help="such as cpu or cuda:0 (cuda where there is one)")


OPTIONS = (
    "top_k", "curvature", "layers", "mode", "max_samples", "micro_batch_size", "precision", "spectrum_top_k",
    "weight_spectra", "bootstrap", "curvature_fraction", "alignment",
)  # fmt: skip
"""Of `options.Options`, those that the command takes as they are."""

PYTHON_NAMES = (*OPTIONS, "kinds", "fused_qkv", "n_batches", "world_size", "sharded")
"""What messages call the options."""


def _kinds(given: Sequence[str]) -> dict[str, str]:
    """Pattern -> kind."""
    pairs = [text.rpartition("=") for text in given]
    if wrong := [kind for pattern, _, kind in pairs if not pattern]:
        raise ValueError(f"--kinds takes GLOB=KIND, such as '*.c_proj=attention_out', got {wrong[0]!r}")
    return {pattern: kind for pattern, _, kind in pairs}


def _fused(given: Sequence[str]) -> dict[str, list[int]]:
    """Pattern -> numbers of rows of query, key and value; none where they are equal."""
    fused = {}
    for text in given:
        pattern, _, rows = text.partition("=")
        try:
            fused[pattern] = [int(number) for number in rows.split(",")] if rows else []
        except ValueError:
            raise ValueError(f"--fused-qkv takes GLOB or GLOB=ROWS,ROWS,ROWS, got {text!r}") from None
    return fused


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `options.Options`."""
    taken = {name: getattr(options, name) for name in OPTIONS}
    return taken | {"kinds": _kinds(options.kinds or ()), "fused_qkv": _fused(options.fused_qkv or ())}


def _measure(options: argparse.Namespace) -> int:
    _import_from_here()
    from lightning_spectral.cli.measure_command import check_folder, check_page, measure_checkpoint, write_report
    from lightning_spectral.options import Options
    from lightning_spectral.report import print_report

    try:
        chosen = Options(**_chosen(options))
        if options.page:
            check_page()
        check_folder(options.output)
        report, left_out = measure_checkpoint(
            options.model,
            options.data,
            loss=options.loss,
            checkpoint=options.checkpoint,
            prefix=options.prefix,
            strict=options.strict,
            n_batches=options.n_batches,
            device=options.device,
            seed=options.seed,
            options=chosen,
        )
        if left_out:
            print(f"lightning-spectral measure: of {options.checkpoint}, {left_out}", file=sys.stderr)
        name = options.model if options.checkpoint is None else Path(options.checkpoint).name
        print_report(report, name)
        if report.chosen:
            print(f"curvature by {report.chosen}")
        print(*write_report(report, options.output, name=name, page=options.page), sep="\n")
    except Exception as error:
        return _failed(options, error)
    return 0


def _failed(options: argparse.Namespace, error: Exception) -> int:
    """Say in one line what went wrong: the model, the data and the loss are anyone's code, and raise anything."""
    from lightning_spectral._messages import first_line

    if options.traceback:
        raise error
    own = isinstance(error, ValueError) or type(error).__module__.startswith("lightning_spectral")
    said = " ".join(str(error).split()) if own else f"{first_line(error)} (--traceback shows where)"
    told = in_options(said, PYTHON_NAMES) if own else said
    print(f"lightning-spectral {options.command}: {told}", file=sys.stderr)
    return 2


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what measure would do and cost, without doing it",
        description="Say which layers measure would take, by which method, and what time and memory that costs,\n"
        "without memory for the model or a pass over it. Takes what measure takes; weights are not read.",
        epilog=PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = plan.add_argument_group("what would be measured (NAME is an import path, pkg.module:name)")
    _add_sources(what, batch=False)
    shape = "of a batch in place of --data: 64x3x32x32, or 64x1024:int64; several make a tuple"
    what.add_argument("--batch-shape", nargs="+", default=(), metavar="SHAPE", help=shape)
    how = plan.add_argument_group("how it would be measured")
    _add_options(how)
    how.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="processes that share a batch (%(default)s)"
    )
    how.add_argument("--sharded", action="store_true", help="parameters are shards over them, as in FSDP2")
    where = plan.add_argument_group("where it goes")
    where.add_argument("--all", action="store_true", help="a row per layer, not per kind and shape")
    where.add_argument("--json", metavar="FILE", help="write the plan there, too")
    where.add_argument("--traceback", action="store_true", help="of an error, show all instead of one line")


def _plan(options: argparse.Namespace) -> int:
    _import_from_here()
    from lightning_spectral.cli.measure_command import plan_model
    from lightning_spectral.options import Options
    from lightning_spectral.report.terminal.plan_tables import print_plan

    try:
        plan = plan_model(
            options.model,
            options.data,
            shapes=options.batch_shape,
            loss=options.loss,
            checkpoint=options.checkpoint,
            options=Options(**_chosen(options)),
            n_batches=options.n_batches,
            world_size=options.world_size,
            sharded=options.sharded,
        )
        print_plan(plan, every_layer=options.all)
        if options.json:
            print(plan.to_json(options.json))
    except Exception as error:
        return _failed(options, error)
    return 0


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write one HTML page of a run: summary, table, interactive plots",
        description="Write one self-contained HTML page of a run, which needs no network.",
        epilog="A log's scalars are not read: the page is made of the reports in spectra.jsonl, which a SpectralProbe "
        "writes into its run's folder. Of several runs below a folder the newest is shown.",
    )
    report.add_argument(
        "run",
        nargs="+",
        metavar="RUN",
        help="a run's folder (a Lightning log's, a W&B run's, or default_root_dir) or the spectra.jsonl in it; a "
        "checkpoint of a Trainer with a SpectralProbe; JSON files of SpectralReport.to_json, or a folder of them. "
        "Several are shown as one run, of one network",
    )
    report.add_argument(
        "--output",
        metavar="FILE",
        help="where the page goes (report.html in RUN, or RUN's name.html; of several, report.html in the folder they "
        "have in common); a page that is there is replaced",
    )
    report.add_argument("--force", action="store_true", help="replace any other file that is there, too")
    report.add_argument("--title", help="of the page (RUN's name)")
    report.add_argument("--prefix", help="of the probe's keys, where a run or checkpoint holds several probes'")


def _report(options: argparse.Namespace) -> int:
    from lightning_spectral.cli.page_path import check_target, default_target
    from lightning_spectral.report.page.build import is_page, write_page
    from lightning_spectral.report.runs.read import read_run
    from lightning_spectral.report.runs.run import RunError

    inputs = [Path(path) for path in options.run]
    target = default_target(inputs) if options.output is None else Path(options.output)
    there = target.is_file()
    try:
        if options.output is not None:
            check_target(target)
        if there and not options.force and not is_page(target):
            raise RunError(f"{target} is there and no page of this command; give another --output, or --force")
        run = read_run(inputs, prefix=options.prefix)
        print(write_page(run, target, title=options.title))
        # What lay in a folder is for the reader to know: others may have put more there.
        said = [f"read {source}" for source in run.sources if any(path.is_dir() for path in inputs)]
        for line in [*said, *(f"left out: {what}" for what in run.omissions)]:
            print(f"lightning-spectral report: {line}", file=sys.stderr)
        if there:
            print(f"lightning-spectral report: {target} was there and is replaced", file=sys.stderr)
    except (RunError, ImportError) as error:
        print(f"lightning-spectral report: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        Path(options.output).mkdir(parents=True, exist_ok=True)
        # Loading Lightning takes seconds, which --help should not.
        from lightning_spectral.demo.run import run

        run(options.output)
    except (ImportError, OSError) as error:
        print(f"lightning-spectral demo: {error}", file=sys.stderr)
        return 2
    return 0


def _import_from_here() -> None:
    """As with `python train.py`, models and data beside which the command is run can be imported."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _lightning(arguments: Sequence[str], *, from_command_line: bool) -> int:
    _import_from_here()
    from lightning_spectral.callbacks._lightning import jsonargparse_missing

    if missing := jsonargparse_missing():
        print(f"lightning-spectral {arguments[0]}: {missing}", file=sys.stderr)
        return 2
    from lightning_spectral.cli.checkpoints import SourceError
    from lightning_spectral.cli.lightning import run

    try:
        run(arguments, from_command_line=from_command_line)
    except SourceError as error:
        print(f"lightning-spectral {arguments[0]}: {error}", file=sys.stderr)
        return 2
    return 0
