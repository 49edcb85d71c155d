"""Kinds of layers by what a loss does with their outputs, where modules, shapes and names do not tell.

A walk from the parameters to the loss says of each tensor what it is made of: outputs of products, as they are (moved,
scaled, normalized, rotated), or behind an activation. An attention call is a product of two activations, a softmax, and
a product with its weights. An MLP is an activation between two matrices within a residual branch, or behind attention
and back to the width it came from.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from torch.autograd.graph import Node

from lightning_spectral._autograd import operation
from lightning_spectral.curvature.autograd_graph import BATCH_NORM, VIEWS
from lightning_spectral.curvature.problem import DifferentiableLoss
from lightning_spectral.layers.kinds import Kind

KEPT = VIEWS | BATCH_NORM | frozenset([
    "ConstantPadNd", "Flip", "FusedRmsNorm", "Gather", "Index", "IndexSelect", "MaskedFill", "NativeDropout",
    "NativeGroupNorm", "NativeLayerNorm", "Neg", "Repeat", "Roll", "ToCopy", "ViewAsComplex", "ViewAsReal",
])  # fmt: skip
"""Operations that leave their first input what it is."""

JOINED = frozenset(["Cat", "CopySlices", "Stack"])
SUMS = frozenset(["Add", "IndexAdd", "Sub", "Where"])
MATRIX_PRODUCTS = frozenset(["Addmm", "Baddbmm", "Bmm", "Mm"])
SOFTMAX = frozenset(["SafeSoftmax", "Softmax"])
STATISTICS = frozenset(["Amax", "LinalgVectorNorm", "Logsumexp", "Max", "Mean", "Norm", "Std", "Sum", "Var", "VarMean"])
ACTIVATIONS = frozenset([
    "Abs", "Celu", "Clamp", "ClampMax", "ClampMin", "Cos", "Elu", "Erf", "Exp", "Gelu", "Glu", "Hardsigmoid",
    "Hardswish", "Hardtanh", "LeakyRelu", "LogSigmoid", "Mish", "Pow", "PreluKernel", "Reciprocal", "Relu", "Rsqrt",
    "Sigmoid", "Silu", "Sin", "Softplus", "Sqrt", "Tanh", "Threshold",
])  # fmt: skip

UPS = ("dense", "mlp_up", "head")
TERMS = 64
"""Terms that are looked at of a sum: a residual stream is one of all branches before."""


class Form(Enum):
    """What was done with the outputs of products that a tensor is made of."""

    CONSTANT = "no activation is in it"
    PLAIN = "moved, scaled, normalized"
    ACTIVATED = "behind an activation, and what it gates"
    STATISTIC = "summed, or a share of a whole"
    WEIGHTS = "an attention's weights"


class Made(NamedTuple):
    """A form, and the nodes whose outputs have it: products, sums of different tensors, whatever is not known."""

    form: Form
    origins: frozenset[Node]


CONSTANT = Made(Form.CONSTANT, frozenset())


def graph_kinds(problem: DifferentiableLoss) -> dict[str, Kind]:
    """Return layer name -> kind, of the dense layers that the graph of a loss that was run shows to have another.

    What attention or an MLP goes on from is no head either, as it seems to be where no layer takes its width.
    """
    kinds = {name: layer.kind for name, layer in problem.layers.items()}
    if "dense" not in kinds.values():
        return {}
    walk = _GraphKinds(problem, kinds)
    walk.add_attention()
    walk.add_mlps()
    return {name: kind for name, kind in walk.kinds.items() if kind != kinds[name]}


class _GraphKinds:
    """One walk, in which attention calls and sums are noted."""

    def __init__(self, problem: DifferentiableLoss, kinds: dict[str, Kind]) -> None:
        self.layers, self.kinds = problem.layers, dict(kinds)
        self.made: dict[Node, Made] = {}
        self.sums: dict[Node, list[Made]] = {}
        self.scores: dict[Node, list[Made]] = {}
        self.attentions: dict[Node, list[Made]] = {}
        self.products = set(problem.trace.products)
        calls_of = problem.trace.calls
        recorded = [(name, call) for name in kinds for call in calls_of.get(id(problem.parameters[name]), [])]
        for root in (problem.value.grad_fn, *(call.source for _, call in recorded)):
            self._walk(root)
        calls = [(n, c.edge.node, c.source) for n, c in recorded if c.edge is not None and c.edge.node in self.made]
        self.calls = [(n, node, CONSTANT if source is None else self.made[source]) for n, node, source in calls]
        self.layer_of = {node: name for name, node, _ in self.calls}
        self.read = {node: made for _, node, made in self.calls}

    def add_attention(self) -> None:
        """Refine the kinds of layers that attention reads, or that read it."""
        # What another layer reads, or a sum, is a stream that attention reads without a projection.
        streams = {node for _, _, made in self.calls if made.form is Form.PLAIN for node in made.origins}
        streams |= {node for terms in self.sums.values() for made in terms for node in made.origins}
        # A head may end in an attention that is a part of the loss: no layer goes on from that.
        read = [term for made in self.read.values() for term in self._terms(made._replace(form=Form.PLAIN))]
        mixed = {node for made in read for node in made.origins}
        for attention, factors in self.attentions.items():
            projected = {node for made in factors if made.form is Form.PLAIN for node in made.origins}
            for name in {self.layer_of[node] for node in (projected - streams) & self.layer_of.keys()}:
                if attention in mixed or self.kinds[name] != "head":
                    self._refine(name, "attention_qkv")
        for name, _, made in self.calls:
            if made.form is Form.PLAIN and made.origins <= self.attentions.keys():
                self._refine(name, "attention_out")

    def add_mlps(self) -> None:
        """Refine the kinds of layers with an activation between them."""
        branches = {node: ups for name, node, made in self.calls if (ups := self._ups(name, made))}
        residual = set[Node]()
        for node in self.sums:
            terms = self._terms(Made(Form.PLAIN, frozenset([node])))
            added = {node for made in terms if made.form is Form.PLAIN for node in made.origins} & branches.keys()
            residual |= {down for down in added if self.read[branches[down][0]] in terms}
        mixed = self.attentions.keys() | {n for n, name in self.layer_of.items() if self.kinds[name] == "attention_out"}
        for down, ups in branches.items():
            is_behind = any(term.origins & mixed for term in self._terms(self.read[ups[0]]))
            if down in residual or (self._leads_back(ups[0], down) and is_behind):
                self._refine(self.layer_of[down], "mlp_down")
                for up in ups:
                    self._refine(self.layer_of[up], "mlp_up")

    def _refine(self, name: str, kind: Kind) -> None:
        if self.kinds[name] == "dense" or (self.kinds[name] == "head" and kind in ("attention_qkv", "mlp_up")):
            self.kinds[name] = kind

    def _ups(self, down: str, made: Made) -> list[Node]:
        """Return the products that a layer reads through one activation, if they may be those of an MLP."""
        if made.form is not Form.ACTIVATED or self.kinds[down] not in ("dense", "mlp_down"):
            return []
        ups = [node for node in made.origins if self.kinds.get(self.layer_of.get(node, "")) in UPS]
        return ups if len(ups) == len(made.origins) and len({self.read[node] for node in ups}) == 1 else []

    def _leads_back(self, up: Node, down: Node) -> bool:
        (middle, start), (end, width) = (self._shape(node) for node in (up, down))
        return end == start != middle and width in (middle, middle / 2)

    def _shape(self, node: Node) -> tuple[int, int]:
        layer = self.layers[self.layer_of[node]]
        return layer.shape[0] // layer.groups, layer.shape[1]

    def _terms(self, made: Made) -> dict[Made, None]:
        """Return a tensor, and the terms of the sum that it is, the outermost first."""
        terms, queue = {made: None}, [made]
        for term in queue:
            if term.form is Form.PLAIN and len(terms) < TERMS:
                added = [t for node in term.origins for t in self.sums.get(node, ()) if t not in terms]
                terms |= dict.fromkeys(added)
                queue += added
        return terms

    def _walk(self, root: Node | None) -> None:
        stack = [] if root is None else [root]
        while stack:
            node = stack[-1]
            missing = [n for n, _ in node.next_functions if n is not None and n not in self.made]
            if node in self.made or not missing:
                stack.pop()
                if node not in self.made:
                    self.made[node] = self._make(node)
            stack.extend(missing)

    def _make(self, node: Node) -> Made:
        inputs = [CONSTANT if n is None else self.made[n] for n, _ in node.next_functions]
        name, own = operation(node), Made(Form.PLAIN, frozenset([node]))
        varying = [made for made in inputs if made.form is not Form.CONSTANT]
        if node in self.products:
            return own
        if name in MATRIX_PRODUCTS:
            return self._multiply_matrices(node, inputs[-2:], own)
        if not varying:
            return CONSTANT
        if name in KEPT:
            return inputs[0]
        if name in JOINED:
            origins = frozenset().union(*(made.origins for made in varying))
            return Made(varying[0].form, origins) if len({made.form for made in varying}) == 1 else own
        if name in STATISTICS:
            return Made(Form.STATISTIC, inputs[0].origins)
        if name in SOFTMAX:
            scores = {n for made in self._terms(inputs[0]) for n in made.origins} & self.scores.keys()
            return Made(Form.WEIGHTS, frozenset(scores)) if scores else Made(Form.STATISTIC, inputs[0].origins)
        if name in ACTIVATIONS and len(varying) == 1 and varying[0].form is not Form.WEIGHTS:
            return varying[0] if varying[0].form is Form.STATISTIC else Made(Form.ACTIVATED, varying[0].origins)
        if name in SUMS:
            return self._add(node, varying, own)
        return self._multiply(name, varying, own) if name in ("Div", "Mul") else own

    def _multiply_matrices(self, node: Node, factors: list[Made], own: Made) -> Made:
        """Note scores, or an attention call, whose origins are then the factors of its scores and its values."""
        for weights, values in (factors, factors[::-1]):
            if weights.form is Form.WEIGHTS:
                self.attentions[node] = [values, *(made for score in weights.origins for made in self.scores[score])]
                return own
        if all(made.form is Form.CONSTANT for made in factors):
            return CONSTANT
        if not any(made.form is Form.CONSTANT for made in factors):
            self.scores[node] = factors
        return own

    def _add(self, node: Node, varying: list[Made], own: Made) -> Made:
        tensors = [made for made in varying if made.form is not Form.STATISTIC] or varying[:1]
        forms, origins = {made.form for made in tensors}, {made.origins for made in tensors}
        if len(origins) == 1:
            return next((made for made in tensors if made.form is not Form.PLAIN), tensors[0])
        if forms == {Form.WEIGHTS}:
            return Made(Form.WEIGHTS, frozenset().union(*origins))
        self.sums[node] = tensors
        return own

    def _multiply(self, name: str, varying: list[Made], own: Made) -> Made:
        tensors = [made for made in varying if made.form is not Form.STATISTIC] or varying[:1]
        first, last = tensors[0], tensors[-1]
        if len(tensors) == 1:
            # exp(s) / sum(exp(s))
            is_softmax = name == "Div" and first.form is Form.ACTIVATED and first.origins <= self.scores.keys()
            shares = is_softmax and len(varying) == 2 and varying[1].origins == first.origins
            return Made(Form.WEIGHTS, first.origins) if shares else first
        attended = [made for made in tensors if made.form is Form.PLAIN and made.origins <= self.attentions.keys()]
        if len(attended) == 1:
            return attended[0]
        if Form.WEIGHTS in (first.form, last.form):
            return own
        is_gated = Form.ACTIVATED in (first.form, last.form)
        return Made(Form.ACTIVATED, first.origins | last.origins) if is_gated or first.origins == last.origins else own
