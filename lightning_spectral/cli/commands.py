"""The command `lightning-spectral`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_spectral._version import __version__
from lightning_spectral.cli.arguments import OPTION_NAMES, Parser, add_options, add_sources, in_options, print_note

LIGHTNING_COMMANDS = {
    "fit": "train a LightningModule from a configuration (a LightningCLI with this package's parts)",
    "validate": "validate a LightningModule from a configuration",
    "test": "test a LightningModule from a configuration",
    "predict": "predict with a LightningModule from a configuration",
}

MEASURE_EPILOG = """\
examples:
  lightning-spectral measure --model nets:resnet --data data:loader --loss cross_entropy --checkpoint last.pt
  lightning-spectral measure --model nets:LitGPT --data data:DataModule --checkpoint last.ckpt

The first names functions without arguments in nets.py and data.py of the current folder. The second names a
LightningModule, which gets the checkpoint's hyper_parameters and whose training_step is the loss.

--data may be a DataLoader, a LightningDataModule (its training data), an iterator of batches, or one batch, or
return one of these. With a loss of torch.nn.functional a batch is (inputs, targets), or a mapping with its
targets under labels, label, targets, target or y. For cross_entropy of sequences, logits are (N, T, classes) and
targets (N, T); a batch of tokens (N, T) alone is text, each of whose tokens is predicted from those before it.

Checkpoints are read with weights_only=True: nothing in them is executed. --model, --data and --loss are
imported, which executes their modules.
"""


PLAN_EPILOG = """\
examples:
  lightning-spectral plan --model nets:resnet --data data:loader --loss cross_entropy
  lightning-spectral plan --model nets:gpt2_xl --batch-shape 64x1024:int64 --loss cross_entropy --world-size 8

--model should name a function or a class: a module that stands in nets.py has its weights in memory already. Without
--data or --batch-shape the plan shows layers, numbers of products, and the memory that does not depend on the batch.
--prefix, --no-strict, --seed, --device, --bootstrap and --weight-spectra change nothing here.
"""


REPORT_EPILOG = """\
examples:
  lightning-spectral report lightning_logs/version_0                         one run
  lightning-spectral report adamw=logs/version_0 muon=logs/version_1         two runs, laid over each other
  lightning-spectral report step-1000/spectra.json step-2000/spectra.json    one run of two measurements

A log's scalars are not read: the page is made of the reports in spectra.jsonl, which a SpectralProbe writes into
its run's folder. Of several runs below one folder the newest is shown; name their folders to see them all.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
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
    _add_workspace(commands)
    for name, help_text in LIGHTNING_COMMANDS.items():
        commands.add_parser(name, help=help_text)
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in LIGHTNING_COMMANDS:
        return _lightning(words, from_command_line=arguments is None)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        # The help of the command, and not of all of them, has its options.
        parser.prog += f" {options.command}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        _run(options)
    except Exception as error:
        if not hasattr(options, "traceback"):
            if not isinstance(error, (ValueError, ImportError, OSError)):
                raise
            return _fail(options.command, error)
        # The user's model, data and loss may raise anything.
        if options.traceback:
            raise
        if isinstance(error, ValueError) or type(error).__module__.startswith("lightning_spectral"):
            return _fail(options.command, in_options(" ".join(str(error).split()), OPTION_NAMES))
        from lightning_spectral.errors import first_line

        return _fail(options.command, f"{first_line(error)} (--traceback shows where)")
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.command == "demo":
        # Loading Lightning takes seconds, which --help should not.
        from lightning_spectral.demo.run import run

        Path(options.output).mkdir(parents=True, exist_ok=True)
        run(options.output)
        return
    if options.command in ("measure", "plan"):
        _import_from_here()
        from lightning_spectral.cli.measure_command import run_measure, run_plan

        (run_measure if options.command == "measure" else run_plan)(options)
        return
    from lightning_spectral.cli import report_command

    (report_command.run if options.command == "report" else report_command.save_workspace)(options)


def _add_measure(commands: Any) -> None:
    measure = commands.add_parser(
        "measure",
        help="measure a checkpoint without training: table, JSON and HTML page",
        description="Measure a network once, without training: the exponents of every layer as a table, and as\n"
        "spectra.json and spectra.html in a folder.",
        epilog=MEASURE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sources(measure.add_argument_group("what is measured (NAME is an import path, pkg.module:name)"))
    add_options(measure.add_argument_group("how it is measured"))
    where = measure.add_argument_group("where it goes")
    where.add_argument("--output", default="spectra", metavar="FOLDER", help="of the files (%(default)s)")
    where.add_argument("--no-page", dest="page", action="store_false", help="write no HTML page, which needs plotly")
    where.add_argument("--traceback", action="store_true", help="of an error, show all instead of one line")


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
    add_sources(what, batch=False)
    shape = "of a batch in place of --data: 64x3x32x32, or 64x1024:int64; several make a tuple"
    what.add_argument("--batch-shape", nargs="+", default=(), metavar="SHAPE", help=shape)
    how = plan.add_argument_group("how it would be measured")
    add_options(how)
    how.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks that share a batch (%(default)s)")
    how.add_argument("--sharded", action="store_true", help="parameters are shards over them, as in FSDP2")
    where = plan.add_argument_group("where it goes")
    where.add_argument("--all", action="store_true", help="a row per layer, not per kind and shape")
    where.add_argument("--json", metavar="FILE", help="write the plan there, too")
    where.add_argument("--traceback", action="store_true", help="of an error, show all instead of one line")


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write one HTML page of a run, or of several side by side: summary, tables, interactive plots",
        description="Write one self-contained HTML page of a run, or of several laid over each other, which needs no\n"
        "network.",
        epilog=REPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument(
        "run",
        nargs="+",
        metavar="RUN",
        help="a run's folder (a Lightning log's, a W&B run's, or default_root_dir) or the spectra.jsonl in it; a "
        "checkpoint of a Trainer with a SpectralProbe; JSON files of SpectralReport.to_json, or a folder of them. Each "
        "folder and each .jsonl file is a run, which NAME=RUN gives a name; checkpoints and JSON files are one run",
    )
    report.add_argument(
        "--output",
        metavar="FILE",
        help="where the page goes (report.html in RUN, or RUN's name.html; of several, report.html in the folder they "
        "have in common); a page that is there is replaced",
    )
    report.add_argument("--force", action="store_true", help="replace any other file that is there, too")
    report.add_argument("--title", help="of the page (the runs' names)")
    report.add_argument("--prefix", help="of the probe's keys, where a run or checkpoint holds several probes'")


def _add_workspace(commands: Any) -> None:
    workspace = commands.add_parser(
        "workspace",
        help="make a saved view of a W&B project's workspace",
        description="Make a saved view of a W&B project's workspace, with panels of what a SpectralProbe logs: medians "
        "by kind of layer, alpha against depth, the optimizer's step, sampling noise. Prints its address. Needs "
        "wandb-workspaces, a login (wandb login) and a network.",
    )
    workspace.add_argument("project", metavar="ENTITY/PROJECT", help="user or team, and its project")
    workspace.add_argument("--name", default="lightning-spectral", help="of the view (%(default)s)")
    workspace.add_argument("--prefix", default="spectral", help="of the probe's keys (%(default)s)")


def _import_from_here() -> None:
    """Make modules of the current folder importable, as `python train.py` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _lightning(arguments: Sequence[str], *, from_command_line: bool) -> int:
    _import_from_here()
    from lightning_spectral.cli.import_paths import SourceError
    from lightning_spectral.cli.lightning import run

    try:
        run(arguments, from_command_line=from_command_line)
    except SourceError as error:
        return _fail(arguments[0], error)
    return 0


def _fail(command: str, error: object) -> int:
    print_note(command, error)
    return 2
