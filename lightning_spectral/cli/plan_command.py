"""`lightning-spectral plan`: what a measurement would do and cost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_spectral.cli.arguments import options_of
from lightning_spectral.cli.checkpoints import Checkpoint, build_model
from lightning_spectral.cli.import_paths import SourceError, batch_reader, named_loss
from lightning_spectral.options import Options
from lightning_spectral.plan.fake_run import weightless
from lightning_spectral.plan.planner import Plan, plan_quietly
from lightning_spectral.report.terminal.plan_tables import print_plan


def run(arguments: argparse.Namespace) -> None:
    """Print the plan of a measurement, and write it to a file if one is named."""
    plan = plan_model(
        arguments.model,
        arguments.data,
        shapes=arguments.batch_shape,
        loss=arguments.loss,
        checkpoint=arguments.checkpoint,
        options=options_of(arguments),
        n_batches=arguments.n_batches,
        world_size=arguments.world_size,
        sharded=arguments.sharded,
    )
    print_plan(plan, every_layer=arguments.all)
    if arguments.json:
        print(plan.to_json(arguments.json))


def plan_model(
    model: str,
    data: str | None = None,
    *,
    shapes: Sequence[str] = (),
    loss: str | None = None,
    checkpoint: str | Path | None = None,
    options: Options | None = None,
    n_batches: int = 1,
    world_size: int = 1,
    sharded: bool = False,
) -> Plan:
    """Return what the command `measure` would do and cost; the model is made without its weights.

    Args:
        data: import path of batches, of which the shapes of the first one count.
        shapes: of a batch in place of data, see `shaped_batch`.
        checkpoint: file whose hyper-parameters the model is made with.
    """
    if data is not None and shapes:
        raise SourceError("--data and --batch-shape: give one of them")
    loss_fn = named_loss(loss)
    saved = None if checkpoint is None else Checkpoint.read(checkpoint)
    try:
        with weightless():
            network = build_model(model, saved)
    except SourceError as error:
        if not any(words in str(error) for words in ("meta tensor", "meta device")):
            raise
        raise SourceError(
            f"{error}; a plan makes the model without its weights, whose values it seems to read"
        ) from error
    batch = shaped_batch(shapes) if shapes else None if data is None else batch_reader(data, 1, network)(None)[0]
    return plan_quietly(
        network, batch, loss_fn, options or Options(), n_batches=n_batches, world_size=world_size, sharded=sharded
    )


def shaped_batch(shapes: Sequence[str]) -> Any:
    """Return a batch without values: a tensor for one shape, a tuple for several.

    Args:
        shapes: such as ``64x3x32x32``, with a type other than float32 after a colon.

    >>> [(tuple(x.shape), x.dtype) for x in shaped_batch(["8x5", "8:int64"])]
    [((8, 5), torch.float32), ((8,), torch.int64)]
    """
    tensors = []
    for text in shapes:
        sizes, _, kind = text.partition(":")
        dtype = getattr(torch, kind or "float32", None)
        if not all(size.isdecimal() and int(size) for size in sizes.split("x")) or not isinstance(dtype, torch.dtype):
            raise SourceError(f"--batch-shape must be as 64x3x32x32 or 64x128:int64, got {text!r}")
        tensors.append(torch.empty([int(size) for size in sizes.split("x")], dtype=dtype, device="meta"))
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
