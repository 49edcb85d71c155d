"""Products of a parameter with an activation, as a program may write them: z = a M, M a block of the parameter.

What a call has in common with others, whatever its function: rows of an input that are contracted with the parameter
(tokens, samples, slots of an expert), and as many rows of an output. Convolutions keep their own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_spectral.numerics.conv_patches import convolution_gradient

Function = Callable[..., Any]

LINEAR: Function = F.linear
"""`torch.nn.functional.linear` itself, which is another while attention is looked into."""

CONVOLUTIONS: tuple[Function, ...] = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED: tuple[Function, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
MATMULS: frozenset[Function] = frozenset(
    [torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm]
)
ADDED_MATMULS: frozenset[Function] = frozenset([torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm])

_STRIDE = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OUTPUT_STRIDE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
ARGUMENTS: dict[Function, tuple[str, ...]] = {
    LINEAR: ("input", "weight", "bias"),
    **dict.fromkeys(CONVOLUTIONS, _STRIDE),
    **dict.fromkeys(TRANSPOSED, _OUTPUT_STRIDE),
    **dict.fromkeys(MATMULS, ("input", "mat2")),
    **dict.fromkeys(ADDED_MATMULS, ("input", "mat1", "mat2")),
    F.embedding: ("input", "weight"),
}
"""Functions that multiply -> names of their arguments in order. `torch.einsum` has a form of its own."""


@dataclass(frozen=True)
class Block:
    """Block of a parameter's matrix P (or of a stack of them) that takes part in a product.

    Attributes:
        rows, columns: first and last-plus-one of P.
        transposed: the factor is P[rows, columns]^T.
        expert: index of the one matrix of a stack; None for a matrix that is no stack, or for the whole stack.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    transposed: bool
    expert: int | None = None

    def flipped(self) -> Block:
        """Return the same block, transposed."""
        return replace(self, transposed=not self.transposed)


@dataclass(frozen=True, eq=False)
class Product:
    """A product of a parameter with an activation, z = a M, before z is known.

    Attributes:
        function: F.linear, a convolution, F.embedding, torch.matmul for all other products.
        input: a; of a product of matrices (..., n), with the contracted dimension last; indices of a look-up.
        options: stride, padding and the like of a convolution.
        block: the part of the parameter that takes part; None: all of it, as a convolution or a linear layer.
        to_rows: z -> (..., m), its rows in the order of a's.
        from_rows: the inverse.
        scale: factor of the product, of `torch.addmm`.
    """

    parameter: Tensor
    function: Function
    input: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    block: Block | None = None
    to_rows: Callable[[Tensor], Tensor] = lambda z: z
    from_rows: Callable[[Tensor], Tensor] = lambda rows: rows
    scale: float = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerCall(Product):
    """A product whose output is known; its input is detached.

    Attributes:
        output: z, for its shape: what comes after may have written over its entries.
        edge: z in the graph, to differentiate in; None where it has none.
        attached: the input with its graph; kept for the moment of the call alone.
        source: the node of the graph that gave a; None where it depends on no parameter.
        time_first: how many samples there are where rows run over time first, as inside `nn.MultiheadAttention`;
            None where they run over samples first.
    """

    output: Tensor
    edge: GradientEdge | None = None
    attached: Tensor | None = None
    source: Node | None = None
    time_first: int | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether it has a convolution's layout, (N, channels, ...)."""
        return self.function in CONVOLUTIONS or self.function in TRANSPOSED

    @property
    def width(self) -> int:
        """Length m of the rows of z."""
        return self.output.shape[1] if self.is_convolution else self.to_rows(self.output).shape[-1]

    @property
    def lead(self) -> torch.Size:
        """Shape of the rows; of a convolution, of its images."""
        if self.is_convolution:
            return self.output.shape[:1]
        return self.input.shape if self.function is F.embedding else self.input.shape[:-1]

    @property
    def matrices(self) -> int:
        """How many matrices of a stack the rows fall to, one after the other."""
        return len(self.parameter) if self.block is not None and _is_stack(self.parameter, self.block) else 1

    def rows(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (rows, n), of a look-up (rows,), and a gradient in the output (rows, m); or images."""
        if self.is_convolution:
            return self.input, gradient
        r, lead = self.to_rows(gradient), self.lead
        r = r.reshape(lead.numel(), r.shape[-1])
        return self.input.reshape(
            lead.numel(), *self.input.shape[len(lead) :]
        ), r if self.scale == 1 else r * self.scale

    def weight_gradient(self, a: Tensor, r: Tensor, shape: torch.Size) -> Tensor:
        """Return the gradient in the parameter, of this shape, that some of the `rows` give."""
        if self.is_convolution:
            return convolution_gradient(a, r, shape, self.options, transposed=self.function in TRANSPOSED)
        block = self.block or Block((0, shape[0]), (0, shape[1]), transposed=True)
        if self.function is F.embedding:
            padding = self.options.get("padding")
            product = r.new_zeros(block.rows[1] - block.rows[0], r.shape[1])
            product.index_add_(0, a, r if padding is None else r * (a != padding)[:, None])
        else:
            if self.matrices > 1:
                a, r = (side.reshape(self.matrices, -1, side.shape[1]) for side in (a, r))
            product = r.mT @ a.to(r.dtype) if block.transposed else a.to(r.dtype).mT @ r
        if product.shape == shape:
            return product
        total = r.new_zeros(shape)
        matrix = total.flatten(1) if len(shape) > 3 else total
        matrix = matrix if block.expert is None else matrix[block.expert]
        matrix[..., slice(*block.rows), slice(*block.columns)] = product
        return total


def as_product(
    func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], parameters: set[int]
) -> Product | None:
    """Return what a call multiplies, if one factor is one of the parameters, or a view of a block of it."""
    if func is torch.einsum:
        return _einsum(args, parameters)
    if func not in ARGUMENTS:
        return None
    options = dict(zip(ARGUMENTS[func], args, strict=False)) | dict(kwargs)
    if func in CONVOLUTIONS or func in TRANSPOSED:
        weight = options.pop("weight", None)
        if id(weight) not in parameters:
            return None
        options.pop("bias", None)
        return Product(weight, func, options.pop("input"), options)
    if func is LINEAR:
        return _of_factors(LINEAR, options["input"], options["weight"], parameters, linear=True)
    if func is F.embedding:
        found = _parameter_of(options["weight"], parameters)
        special = options.get("max_norm") is not None or options.get("scale_grad_by_freq", False)
        if found is None or special or found[1].expert is not None or found[1].transposed:
            return None
        return Product(found[0], F.embedding, options["input"], {"padding": options.get("padding_idx")}, found[1])
    names = ("mat1", "mat2") if func in ADDED_MATMULS else ("input", "mat2")
    left, right = options.get(names[0]), options.get(names[1], options.get("other"))
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    return _of_factors(torch.matmul, left, right, parameters, scale=float(options.get("alpha", 1)))


def multiplies_parameter(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call multiplies with a matrix, or more, that is a parameter or a view of one."""
    if func is not torch.einsum and func not in ARGUMENTS:
        return False
    operands = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
    tensors = [x for x in operands if isinstance(x, Tensor) and x.ndim > 1]
    return any(isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter) for x in tensors)


def _of_factors(
    function: Function, left: Tensor, right: Tensor, parameters: set[int], *, linear: bool = False, scale: float = 1.0
) -> Product | None:
    """Return left @ right, or left @ right^T of a linear layer, where one of them is a parameter's."""
    found = _parameter_of(right, parameters)
    if found is not None:
        parameter, block = found
        if linear:
            block = block.flipped()
            whole = right is parameter
            return Product(parameter, LINEAR, left, block=None if whole else block)
        if left.ndim < 2 or (_is_stack(parameter, block) and left.ndim != 3):
            return None
        return Product(parameter, function, left, block=block, scale=scale)
    found = None if linear else _parameter_of(left, parameters)
    if found is None or right.ndim < 2:
        return None
    parameter, block = found
    if _is_stack(parameter, block) and right.ndim != 3:
        return None
    block = block.flipped()
    return Product(parameter, function, right.mT, {}, block, lambda z: z.mT, lambda rows: rows.mT, scale)


def _is_stack(parameter: Tensor, block: Block) -> bool:
    return parameter.ndim == 3 and block.expert is None


def _einsum(args: tuple[Any, ...], parameters: set[int]) -> Product | None:
    """Return an einsum of two factors as rows times a matrix, or a stack of them."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not args or not isinstance(args[0], str) or len(operands) != 2 or "->" not in args[0] or "." in args[0]:
        return None
    inputs, out = args[0].replace(" ", "").split("->")
    terms = inputs.split(",")
    for i in (1, 0):
        found = _parameter_of(operands[i], parameters)
        if found is not None:
            return _contraction(found, operands[1 - i], terms[i], terms[1 - i], out)
    return None


def _contraction(found: tuple[Tensor, Block], a: Tensor, own: str, of_a: str, out: str) -> Product | None:
    """Return the einsum "own, of_a -> out" of a block and an activation."""
    parameter, block = found
    stack = own[:-2] if _is_stack(parameter, block) else ""
    contracted = [letter for letter in own[-2:] if letter in of_a and letter not in out]
    produced = [letter for letter in own[-2:] if letter not in of_a and letter in out]
    rows = [letter for letter in of_a if letter in out and letter not in stack]
    is_plain = all(len(set(term)) == len(term) for term in (own, of_a, out)) and set(stack) <= set(out)
    if stack and stack not in of_a:
        # Every matrix of the stack is applied to the same rows.
        of_a, a = stack + of_a, a.expand(parameter.shape[0], *a.shape)
    if not is_plain or len(own) != len(stack) + 2 or len(contracted) != 1 or len(produced) != 1:
        return None
    if len(of_a) != len(rows) + len(stack) + 1 or len(out) != len(rows) + len(stack) + 1:
        return None
    if own[-1] == contracted[0]:
        block = block.flipped()
    a_order = [of_a.index(letter) for letter in (*stack, *rows, *contracted)]
    z_order = [out.index(letter) for letter in (*stack, *rows, *produced)]
    back = [z_order.index(i) for i in range(len(out))]
    return Product(
        parameter, torch.matmul, a.permute(a_order), {}, block, lambda z: z.permute(z_order), lambda z: z.permute(back)
    )


def _parameter_of(tensor: Any, parameters: set[int]) -> tuple[Tensor, Block] | None:
    """Return which of the parameters a factor is a view of, and of which block of it."""
    if not isinstance(tensor, Tensor):
        return None
    parameter = tensor if id(tensor) in parameters else tensor._base
    if parameter is None or id(parameter) not in parameters or parameter.ndim < 2:
        return None
    block = _block(tensor, parameter)
    return None if block is None else (parameter, block)


def _block(view: Tensor, parameter: Tensor) -> Block | None:
    """Return the block of a parameter that a view of it shows, from offset and strides; None if it is none."""
    if parameter.ndim > 3:
        # A convolution's filters as a matrix.
        if not parameter.is_contiguous():
            return None
        shape, strides = [len(parameter), parameter[0].numel()], [parameter[0].numel(), 1]
    else:
        shape, strides = list(parameter.shape[-2:]), list(parameter.stride()[-2:])
    if view is parameter and parameter.ndim < 4:
        return Block((0, shape[0]), (0, shape[1]), transposed=False)
    is_stack = parameter.ndim == view.ndim == 3 and view.shape[0] == parameter.shape[0]
    if is_stack and view.stride(0) != parameter.stride(0):
        return None
    # A dimension that was put in front, or expanded, repeats the matrix.
    sides = zip(view.shape[is_stack:], view.stride()[is_stack:], strict=True)
    kept = [(int(n), int(step)) for n, step in sides if n != 1 and step]
    sizes, steps = [n for n, _ in kept], [step for _, step in kept]
    if len(sizes) != 2 or min(strides) < 1 or strides[0] == strides[1] or sorted(steps) != sorted(strides):
        return None
    offset, expert = int(view.storage_offset()) - int(parameter.storage_offset()), None
    if parameter.ndim == 3 and not is_stack:
        expert, offset = divmod(offset, int(parameter.stride(0)))
    transposed = list(steps) != strides
    n_rows, n_columns = reversed(sizes) if transposed else sizes
    major = 0 if strides[0] > strides[1] else 1
    first, remainder = divmod(offset, strides[major])
    start = [first, remainder // strides[1 - major]] if major == 0 else [remainder // strides[0], first]
    if start[0] + n_rows > shape[0] or start[1] + n_columns > shape[1]:
        return None
    return Block((start[0], start[0] + n_rows), (start[1], start[1] + n_columns), transposed, expert)
