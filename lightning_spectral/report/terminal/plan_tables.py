"""A plan of a measurement for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from lightning_spectral._messages import group_by_reason, join_names, size_of
from lightning_spectral.plan.cost_model import FACTOR, Cost
from lightning_spectral.plan.planner import Plan
from lightning_spectral.report.terminal.formatting import dimensions, literal, new_table

PLAN_WIDTH = 100
"""Width that the tables need."""

PARTS_OF_MEMORY = {
    "weights": "copies of the weights",
    "gradients": "gradients",
    "svd": "SVD workspace",
    "directions": "directions",
    "gradient_graph": "graph of the gradient",
    "curvature_graph": "graph of the curvature",
    "factors": "Kronecker factors",
}


def print_plan(plan: Plan, *, every_layer: bool = False, console: Console | None = None) -> None:
    """Print what would be measured, how, and at what cost.

    Args:
        every_layer: a row per layer in place of one per kind and shape.
        console: where to print; None: the terminal.
    """
    console = Console() if console is None else console
    console.width = max(console.width, PLAN_WIDTH)
    console.print(literal(f"{plan.model}: {plan.parameters:,} parameters, {len(plan.layers)} matrices to measure"))
    console.print(_layers(plan) if every_layer else _groups(plan))
    for text in group_by_reason(plan.skipped):
        console.print(literal(f"left out: {text}"), soft_wrap=True)
    if plan.unreached:
        console.print(literal(f"would fail, as the loss does not depend on it: {join_names(plan.unreached)}"))
    if plan.why:
        console.print(literal(f"curvature by {plan.why}"), soft_wrap=True)
    for text in plan.unknown:
        console.print(literal(f"cannot be told: {text}"), soft_wrap=True)
    console.print(_costs(plan))
    shown = [plan.costs[plan.method]] if plan.method in plan.costs else list(plan.costs.values())
    for text in (*_time(plan), *(_memory(cost) for cost in shown), *_ranks(plan)):
        console.print(text, soft_wrap=True)
    if plan.savings:
        console.print("\ncheaper, one at a time")
        console.print(_savings(plan))


def _table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = new_table()
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _groups(plan: Plan) -> Table:
    table = _table(("kind", "shape"), ("layers", "directions each"))
    groups: dict[tuple[str, str, int], int] = {}
    for name, layer in plan.layers.items():
        key = (layer.kind, dimensions(layer.shape, layer.groups), plan.directions.get(name, 0))
        groups[key] = groups.get(key, 0) + 1
    for (kind, shape, directions), count in groups.items():
        table.add_row(kind, shape, str(count), str(directions))
    return table


def _layers(plan: Plan) -> Table:
    table = _table(("layer", "kind", "shape"), ("directions",))
    for name, layer in plan.layers.items():
        shape = dimensions(layer.shape, layer.groups)
        table.add_row(literal(name), layer.kind, shape, str(plan.directions.get(name, 0)))
    return table


def _costs(plan: Plan) -> Table:
    table = _table(("method",), ("products", "output columns", "micro-batches", "training steps", "memory"))
    for name, cost in plan.costs.items():
        is_planned = name == plan.method
        memory = size_of(cost.memory.peak) + ("" if cost.has_graph else " and graphs")
        row = (_range(*cost.products), _range(*cost.columns), str(cost.parts), _range(*cost.steps), memory)
        table.add_row(f"{name} *" if is_planned else name, *row, style="" if is_planned or not plan.method else "dim")
    return table


def _range(low: float, high: float) -> str:
    shown = [f"{x:,}" if isinstance(x, int) else f"{x:.2g}" if x < 10 else f"{x:,.0f}" for x in (low, high)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"


def _time(plan: Plan) -> Iterator[str]:
    share = next(iter(plan.costs.values())).share
    batches = f", {plan.n_batches} batches" * (plan.n_batches > 1)
    measured = "" if plan.samples is None else f" ({plan.samples} of {plan.batch_samples} samples{batches})"
    yield (
        f"time = {share:.3g}{measured} x passes + singular triplets, in training steps (forward and backward in "
        f"float32; one in half precision is shorter), within a factor of about {FACTOR:g}"
    )
    if plan.step_flops:
        yield f"a training step: {plan.step_flops:.3g} FLOPs in matrix products and convolutions"


def _memory(cost: Cost) -> str:
    parts, peak = vars(cost.memory), size_of(cost.memory.peak)
    parts_shown = ", ".join(f"{what} {size_of(parts[name])}" for name, what in PARTS_OF_MEMORY.items() if parts[name])
    return f"memory beside the network's own, for {cost.method}: {parts_shown}; not all at once, at most {peak}"


def _ranks(plan: Plan) -> Iterator[str]:
    if plan.world_size > 1:
        n = plan.world_size
        yield (
            f"over {n} processes each measures 1/{n} of the samples and takes the singular triplets of 1/{n} of the "
            f"layers, in 1/{n} of the time that one would take, as a training step does; each sends "
            f"{size_of(plan.sent)} of {'weights, ' if plan.sharded else ''}gradients, directions and curvatures"
        )


def _savings(plan: Plan) -> Table:
    table = _table(("option",), ("training steps", "memory"))
    for saving in plan.savings:
        table.add_row(literal(saving.option), _range(*saving.cost.steps), size_of(saving.cost.memory.peak))
    return table
