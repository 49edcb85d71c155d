"""Find where the samples are among the rows of every layer's calls: guessed from shapes, told by values.

What is done to some samples' outputs comes back, in a backward pass, at the rows of these samples and at no other, if
samples do not interact in the network. A layout that shows anything else is wrong, or there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral._torch_private import output_shape
from lightning_spectral.curvature.autograd_graph import GraphCut
from lightning_spectral.curvature.direction_graph import DirectionGraph
from lightning_spectral.curvature.head import Head, parts_of, powers_of_two, scales_by_sample
from lightning_spectral.curvature.ports import REMEDY, SampleLayout, joint_layouts
from lightning_spectral.curvature.problem import DifferentiableLoss
from lightning_spectral.curvature.products import LayerCall
from lightning_spectral.curvature.seen_layers import SeenLayers
from lightning_spectral.errors import MeasurementError
from lightning_spectral.numerics.svd import SingularTriplets

TRIES = 3
"""Guesses from the shape, after which each row is followed from the output."""

INTERACT = (
    "samples depend on each other in the network (BatchNorm in train mode, a graph), or the batch's samples do not "
    f"come first; {REMEDY}"
)

ROWS_UNKNOWN = "the rows of its output cannot be told apart by sample"


@dataclass(frozen=True, eq=False)
class MovedNetwork:
    """A network along whose directions everything is ready to be differentiated.

    Attributes:
        graph: of the layers whose samples are known.
        head: above the cut.
        is_exact: whether the network below the cut is piecewise linear in each layer, so that H = J^T (d2L / dz2) J.
        unseen: the other layers -> why.
    """

    graph: DirectionGraph
    head: Head
    is_exact: bool
    unseen: dict[str, str]


def move_network(
    problem: DifferentiableLoss, seen: SeenLayers, directions: Mapping[str, SingularTriplets], *, nearest: bool = True
) -> MovedNetwork:
    """Return the network with amplitudes at every layer of which the samples can be told apart.

    Args:
        nearest: take the cut nearest to the loss, if the network is piecewise linear below it; else its output, behind
            the last product with a parameter. Lower ones follow where samples are not apart at these.
    """
    if problem.samples is None:
        raise MeasurementError(
            f"the tensors of the batch share no leading dimension, so samples cannot be told apart; {REMEDY}"
        )
    search = _Search(problem, seen, problem.samples)
    is_linear = len(seen.cut.inside) == len(seen.calls)
    for _ in range(TRIES + 1):
        layouts = search.layouts()
        if not layouts:
            break
        graph = DirectionGraph(problem, seen, directions, layouts, search.samples)
        cut = graph.cut() if is_linear else None
        cut = cut if cut is not None and len(cut.inside) == len(layouts) else None
        mixed = graph.names
        for head in _heads(graph, cut, problem.samples, nearest):
            mixed_here = _mixed(graph, head)
            if not mixed_here:
                is_exact = cut is not None and set(cut.head) <= set(head.cut.head)
                return MovedNetwork(graph, head, is_exact, seen.unseen | search.lost)
            mixed = min(mixed, mixed_here, key=len)
        search.reject(mixed)
    raise MeasurementError(INTERACT)


def _heads(graph: DirectionGraph, cut: GraphCut | None, samples: int, nearest: bool) -> Iterator[Head]:
    """Yield the heads to try, above ever lower cuts: what lies between may put samples in another order, or mix them.

    Packed sequences do the one, a mean over the batch the other.
    """
    cuts = [graph.outer_cut, graph.product_cut]
    if cut is not None and cut.edges and (nearest or graph.outer_cut.is_nested):
        cuts = [cut, *cuts]
    seen = []
    for each in cuts:
        edges = {(edge.node, edge.output_nr) for edge in each.edges}
        if edges in seen:
            continue
        seen.append(edges)
        head = Head(graph.loss, each, samples)
        if head.layouts is not None:
            yield head


def split_samples(moved: MovedNetwork, most: int) -> tuple[DirectionGraph, Head] | None:
    """Return a moved network, and its head, in which each view of a sample is a sample: a pass serves all of them.

    None where no cut has views of up to ``most`` outputs, or they share rows of a layer.
    """
    graph = moved.graph
    for kind in ("product_cut", "outer_cut"):
        cut: GraphCut = getattr(graph, kind)
        parts = parts_of([output_shape(edge.node, edge.output_nr) for edge in cut.edges], graph.samples)
        # Between this head and a cut that is not below it may lie what bends, whose part of the Hessian would be left
        # out, or taken twice.
        if parts == 1 or cut.is_nested or not set(moved.head.cut.head) <= set(cut.head):
            continue
        head = Head(graph.loss, cut, parts * graph.samples, apart=True)
        if head.outputs <= most:
            break
    else:
        return None
    layouts = _follow(head, graph.calls)
    if len(layouts) < len(graph.calls):
        return None
    finer = DirectionGraph(graph.problem, graph.seen, graph.triplets, layouts, head.samples)
    finer_head = Head(finer.loss, getattr(finer, kind), head.samples, apart=True)
    return None if finer_head.shapes != head.shapes or _mixed(finer, finer_head) else (finer, finer_head)


class _Search:
    """Guesses of where the samples are, by layer, and which of them is next."""

    def __init__(self, problem: DifferentiableLoss, seen: SeenLayers, samples: int) -> None:
        self.problem, self.seen, self.samples = problem, seen, samples
        self.lost: dict[str, str] = {}
        self.followed: dict[str, list[SampleLayout]] = {}
        self.guesses = {name: joint_layouts(calls, samples) for name, calls in seen.calls.items()}

    def layouts(self) -> dict[str, Sequence[SampleLayout]]:
        """Return the next guess of each layer; where there is none, its rows are followed, or it is lost."""
        left = [name for name, guesses in self.guesses.items() if not guesses and name not in self.followed]
        left = [name for name in left if name not in self.lost]
        if left:
            head = Head(self.problem.value, self.seen.outer_cut, self.samples)
            self.followed |= _follow(head, {name: self.seen.calls[name] for name in left})
            self.lost |= {name: ROWS_UNKNOWN for name in left if name not in self.followed}
        return {
            name: self.followed[name] if name in self.followed else guesses[0]
            for name, guesses in self.guesses.items()
            if name not in self.lost
        }

    def reject(self, names: Sequence[str]) -> None:
        """Strike the last guess of these layers."""
        for name in names:
            if name in self.followed:
                self.lost[name] = ROWS_UNKNOWN
            del self.guesses[name][:1]


def _mixed(graph: DirectionGraph, head: Head) -> list[str]:
    """Return the layers at which a sample's outputs show at another one: what comes back does not scale by sample.

    Of several guesses of where the samples are in the output, that with the fewest of them is kept.
    """
    scale = powers_of_two(graph.samples).to(head.device)
    best, layouts, number = graph.names, head.layouts, 0
    while best and (guess := head.guessed_layouts(number)) is not None:
        head.layouts, number = guess, number + 1
        x = torch.rand(graph.samples, head.outputs, generator=torch.Generator().manual_seed(0)).to(head.device) + 1
        once, scaled = (graph.columns(head.edges, head.as_outputs(seed)) for seed in (x, x * scale))
        mixed = [name for name, t in once.items() if not scales_by_sample(t, scaled[name], scale.to(t))]
        if len(mixed) < len(best):
            best, layouts = mixed, guess
    head.layouts = layouts
    return best


def _follow(head: Head, calls: Mapping[str, Sequence[LayerCall]]) -> dict[str, list[SampleLayout]]:
    """Return the sample of each row of these layers' calls, from two backward passes of the output.

    In the second, the output of sample b is b + 1 times that of the first; so is what comes back at its rows.
    """
    if head.layouts is None:
        return {}
    samples = head.samples
    x = torch.rand(samples, head.outputs, generator=torch.Generator().manual_seed(0)).to(head.device) + 1
    scale = torch.arange(1, samples + 1, dtype=x.dtype, device=x.device)[:, None]
    edges = [call.edge for own in calls.values() for call in own if call.edge is not None]
    passes = [
        torch.autograd.grad(head.edges, edges, head.as_outputs(seed), retain_graph=True, allow_unused=True)
        for seed in (x, x * scale)
    ]
    found = dict(zip(((e.node, e.output_nr) for e in edges), zip(*passes, strict=True), strict=True))
    layouts = {}
    for name, own in calls.items():
        of_calls = []
        for call in own:
            assert call.edge is not None
            once, scaled = found[call.edge.node, call.edge.output_nr]
            index = None if once is None or scaled is None else _sample_of_rows(call, once, scaled, samples)
            if index is None:
                break
            of_calls.append(SampleLayout((1, samples, 1), index))
        else:
            layouts[name] = of_calls
    return layouts


def _sample_of_rows(call: LayerCall, once: Tensor, scaled: Tensor, samples: int) -> Tensor | None:
    """Return (rows,) the sample of each; None where one is of several samples."""
    one, other = (
        r.flatten(1) if call.is_convolution else call.to_rows(r).flatten(0, -2)
        for r in (once.double(), scaled.double())
    )
    if not len(one):
        return torch.zeros(0, dtype=torch.long)
    energy = one.square().sum(1)
    ratio = (one * other).sum(1) / energy.where(energy > 0, 1)
    sample = ratio.round()
    same = (other - sample[:, None] * one).norm(dim=1) <= 1e-3 * other.norm(dim=1)
    # The mean of two samples may be near a third one: not so near, unless rounding is in the way.
    same &= ((ratio - sample).abs() < 0.1) & (sample <= samples)
    if not bool(same.all()):
        return None
    # A row that the output does not depend on may count as anyone's.
    return (sample.long() - 1).clamp(min=0)
