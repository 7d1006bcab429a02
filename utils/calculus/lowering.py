"""Which nodes an operator of the graph becomes: the one table to add a line to for a new kind of
node.

Each function takes the chain under construction and an fx node, and adds the steps that compute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from utils.calculus.nodes import elementwise
from utils.calculus.nodes.base import Node
from utils.calculus.nodes.elementwise import Elementwise
from utils.calculus.nodes.general import LinearOperator, Operator
from utils.calculus.nodes.linear import Linear
from utils.calculus.nodes.products import Matmul, Product
from utils.calculus.nodes.rows import Normalisation, Softmax
from utils.calculus.nodes.shape import (
    Combination,
    Concatenation,
    Expand,
    Lookup,
    Mask,
    Patches,
    Permute,
    Reshape,
    Select,
    Sum,
)
from utils.calculus.rewrite import FUNCTIONS, Composite
from utils.calculus.trace import Trace, operator_name, place, shape_of, swapped_axes

Kinds = dict[str, Callable[[fx.Node], Node]]  # nodes by the operator's name


@dataclass(frozen=True)
class Step:
    """output = node(inputs), values by name; `place` is the operator and its module, for
    messages."""

    node: Node
    inputs: tuple[str, ...]
    output: str
    place: str


@dataclass
class Lowering:
    """Steps as they are made, with the constants that they read beside parameters and buffers."""

    trace: Trace
    kinds: Kinds
    steps: list[Step] = field(default_factory=list)
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def name(self, value: fx.Node | str | float) -> str:
        """The name of a value in the chain: a parameter's own, "%" and the fx node's for all
        else."""
        if isinstance(value, str):
            return value
        if isinstance(value, fx.Node):
            named = self.trace.parameters | self.trace.buffers
            return named.get(value.name, f"%{value.name}")
        name = f"number {value}"
        self.numbers[name] = torch.as_tensor(value)
        return name

    def add(
        self, node: Node, inputs: list, source: fx.Node, output: fx.Node | str | None = None
    ) -> str:
        """Append the step output = node(inputs), values by name, fx node or number; returns the
        name of its output, by default that of the fx node `source` that it comes from."""
        name = self.name(source if output is None else output)
        names = tuple(self.name(value) for value in inputs)
        self.steps.append(Step(node, names, name, place(source)))
        return name

    def lower(self, node: fx.Node) -> None:
        """Append the steps of one operator, an fx node."""
        name = operator_name(node)
        if name in self.kinds:
            self.add(self.kinds[name](node), node.all_input_nodes, node)
        elif name in OPERATORS and OPERATORS[name](self, node):
            pass
        elif isinstance(node.target, Composite) or name in FUNCTIONS | {"div"}:
            _elementwise(self, node)
        else:
            _operator(self, node)


# Each returns whether it could: an operator with arguments that it does not know goes to
# `_operator`.


def _arguments(node: fx.Node, *defaults: Any) -> list:
    """The arguments of an operator, one for each of the defaults."""
    return [*node.args, *defaults[len(node.args) :]][: len(defaults)]


def _is_real(node: fx.Node) -> bool:
    return node.meta["val"].is_floating_point()


def _reshape(chain: Lowering, node: fx.Node) -> bool:
    x = node.args[0]
    if not (_is_real(node) and _is_real(x)):
        return False  # a change of type, perhaps
    chain.add(Reshape(shape_of(x), shape_of(node)), [x], node)
    return True


def _transpose(chain: Lowering, node: fx.Node) -> bool:
    chain.add(Permute(swapped_axes(node)), [node.args[0]], node)
    return True


def _permute(chain: Lowering, node: fx.Node) -> bool:
    order = [axis % len(shape_of(node)) for axis in node.args[1]]
    chain.add(Permute(order), [node.args[0]], node)
    return True


def _turned(chain: Lowering, node: fx.Node) -> bool:
    chain.add(Permute(range(len(shape_of(node)))[::-1]), [node.args[0]], node)
    return True


def _expand(chain: Lowering, node: fx.Node) -> bool:
    chain.add(Expand(shape_of(node.args[0]), shape_of(node)), [node.args[0]], node)
    return True


def _select(chain: Lowering, node: fx.Node) -> bool:
    x, axis, index = node.args
    inner = shape_of(x)
    chain.add(Select(inner, axis % len(inner), index), [x], node)
    return True


def _narrow(chain: Lowering, node: fx.Node) -> bool:
    x, axis, start, end, step = _arguments(node, None, 0, None, None, 1)
    inner = shape_of(x)
    if shape_of(node) == inner:
        chain.add(Reshape(inner, inner), [x], node)
    else:
        chain.add(Select(inner, axis % len(inner), slice(start, end, step)), [x], node)
    return True


def _concatenation(chain: Lowering, node: fx.Node) -> bool:
    parts, axis = _arguments(node, (), 0)
    parts = [part for part in parts if shape_of(part) != (0,)]  # torch lets an empty part be flat
    shapes = [shape_of(part) for part in parts]
    if len(parts) == 1:
        chain.add(Reshape(shapes[0], shapes[0]), parts, node)
        return True
    chain.add(Concatenation(axis % len(shape_of(node)), shapes), list(parts), node)
    return True


def _part_of(chain: Lowering, node: fx.Node) -> bool:
    """One of several outputs: of split, chunk and unbind a selection, otherwise the operator for
    this output."""
    whole, i = node.args
    x = whole.args[0]
    inner = shape_of(x)
    name = operator_name(whole)
    if name == "unbind":
        axis = (*whole.args[1:], whole.kwargs.get("dim", 0))[0] % len(inner)
        chain.add(Select(inner, axis, i), [x], node)
    elif name in ("split", "split_with_sizes", "chunk"):
        axis = (*whole.args[2:], whole.kwargs.get("dim", 0))[0] % len(inner)
        start = sum(value.shape[axis] for value in whole.meta["val"][:i])
        chosen = slice(start, start + shape_of(node)[axis])
        chain.add(Select(inner, axis, chosen), [x], node)
    else:
        function = _of_tensors(whole)
        output = Operator(lambda *t: function(*t)[i], place(whole))
        chain.add(output, whole.all_input_nodes, whole, node)
    return True


def _total(chain: Lowering, node: fx.Node) -> bool:
    x, axes, keepdim = _arguments(node, None, None, False)
    inner = shape_of(x)
    axes = [axis % len(inner) for axis in axes or []] or list(range(len(inner)))
    if not _is_real(x):
        return False
    count = math.prod(inner[axis] for axis in axes)
    scale = 1 / count if operator_name(node) == "mean" else 1.0
    chain.add(Sum(inner, axes, keepdim, scale), [x], node)
    return True


def _combination(chain: Lowering, node: fx.Node) -> bool:
    """add, sub, neg, and multiplication or division by a number."""
    name = operator_name(node)
    shape = shape_of(node)
    if not _is_real(node):
        return False
    if name == "neg":
        terms, factors = [node.args[0]], [-1.0]
    elif name in ("add", "sub"):
        alpha = node.kwargs.get("alpha", 1)
        terms, factors = list(node.args[:2]), [1.0, alpha if name == "add" else -alpha]
    elif name == "mul":
        numbers = [a for a in node.args if not isinstance(a, fx.Node)]
        if not numbers:
            shapes = [shape_of(a) for a in node.args]
            chain.add(Product(shape, shapes), list(node.args), node)
            return True
        terms, factors = node.all_input_nodes, numbers
    else:  # div
        if isinstance(node.args[1], fx.Node) or node.kwargs.get("rounding_mode"):
            return False
        terms, factors = [node.args[0]], [1 / node.args[1]]
    shapes = [shape_of(term) for term in terms]
    chain.add(Combination(shape, shapes, factors), terms, node)
    return True


def _linear(chain: Lowering, node: fx.Node) -> bool:
    shapes = [shape_of(a) for a in node.args]
    if len(shapes[0]) < 2 or len(shapes[1]) != 2 or shapes[2:] not in ([], [shapes[1][:1]]):
        return False
    chain.add(Linear(shape_of(node), shapes), list(node.args), node)
    return True


def _addmm(chain: Lowering, node: fx.Node) -> bool:
    bias, x, W = node.args
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return False
    inputs = [x, W, bias]
    shapes = [shape_of(a) for a in inputs]
    if shapes[2] != shapes[1][1:]:
        return False
    chain.add(Linear(shape_of(node), shapes, turned=True), inputs, node)
    return True


def _matmul(chain: Lowering, node: fx.Node) -> bool:
    shapes = [shape_of(a) for a in node.args]
    if min(map(len, shapes)) < 2:
        return False
    kind = (
        Linear(shape_of(node), shapes, turned=True)
        if len(shapes[1]) == 2
        else Matmul(shape_of(node), shapes)
    )
    chain.add(kind, list(node.args), node)
    return True


def _convolution(chain: Lowering, node: fx.Node) -> bool:
    """The patches that the kernel reads, then `Linear` on every place."""
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    x, W, bias, stride, padding, dilation, groups = _arguments(node, *defaults)
    if groups != 1 or isinstance(padding, str) or len(shape_of(x)) != 4 or shape_of(x)[0] != 1:
        return False
    shape = shape_of(node)
    channels, *kernel = shape_of(W)
    size = math.prod(kernel)
    places = math.prod(shape[2:])
    name = chain.name(node)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    patches = chain.add(Patches(shape_of(x), kernel[1:], **options), [x], node, f"{name}.patches")
    weight = chain.add(Reshape(shape_of(W), (channels, size)), [W], node, f"{name}.weight")
    inputs = [patches, weight] + ([bias] if bias is not None else [])
    shapes = [(1, places, size), (channels, size), (channels,)][: len(inputs)]
    out = chain.add(Linear((1, places, channels), shapes), inputs, node, f"{name}.linear")
    out = chain.add(Permute((0, 2, 1)), [out], node, f"{name}.turned")
    chain.add(Reshape((1, channels, places), shape), [out], node)
    return True


def _embedding(chain: Lowering, node: fx.Node) -> bool:
    W, index, padding = _arguments(node, None, None, -1)
    if node.args[4:5] == (True,) or len(shape_of(index)) == 0:
        return False
    chain.add(Lookup(shape_of(W)[0], padding), [W, index], node)
    return True


def _softmax(chain: Lowering, node: fx.Node) -> bool:
    chain.add(Softmax(node.args[1]), [node.args[0]], node)
    return True


def _layer_norm(chain: Lowering, node: fx.Node) -> bool:
    x, axes, gain, bias, eps = _arguments(node, None, (), None, None, 1e-5)
    _normalisation(chain, node, x, Normalisation(eps, len(axes)), gain, bias)
    return True


def _rms_norm(chain: Lowering, node: fx.Node) -> bool:
    x, axes, gain, eps = _arguments(node, None, (), None, None)
    if eps is None:
        return False
    _normalisation(chain, node, x, Normalisation(eps, len(axes), centred=False), gain, None)
    return True


def _normalisation(
    chain: Lowering, node: fx.Node, x: fx.Node, kind: Node, gain: Any, bias: Any
) -> None:
    shape = shape_of(node)
    if gain is None and bias is None:
        chain.add(kind, [x], node)
        return
    n = chain.add(kind, [x], node, f"{chain.name(node)}.n")
    if gain is None:
        shapes = [shape, shape_of(bias)]
        chain.add(Combination(shape, shapes, (1.0, 1.0)), [n, bias], node)
        return
    inputs = [n, gain] + ([bias] if bias is not None else [])
    shapes = [shape] + [shape_of(a) for a in inputs[1:]]
    chain.add(Product(shape, shapes), inputs, node)


def _group_norm(chain: Lowering, node: fx.Node) -> bool:
    x, groups, gain, bias, eps = _arguments(node, None, 1, None, None, 1e-5)
    shape = shape_of(x)
    name = chain.name(node)
    rows = (shape[0], groups, math.prod(shape[1:]) // groups)
    if gain is None and bias is not None:
        return False
    split = chain.add(Reshape(shape, rows), [x], node, f"{name}.rows")
    n = chain.add(Normalisation(eps), [split], node, f"{name}.n")
    if gain is None:
        chain.add(Reshape(rows, shape), [n], node)
        return True
    joined = chain.add(Reshape(rows, shape), [n], node, f"{name}.joined")
    column = (shape[1], *[1] * (len(shape) - 2))
    inputs = [joined]
    for label, parameter in (("gain", gain), ("bias", bias)):
        if parameter is not None:
            inputs.append(
                chain.add(
                    Reshape(shape_of(parameter), column), [parameter], node, f"{name}.{label}"
                )
            )
    chain.add(Product(shape, [shape, column, column][: len(inputs)]), inputs, node)
    return True


def _masked_fill(chain: Lowering, node: fx.Node) -> bool:
    x, mask, value = node.args
    if isinstance(value, fx.Node):
        return False
    chain.add(Mask(shape_of(node), float(value), keep=False), [x, mask], node)
    return True


def _attention(chain: Lowering, node: fx.Node) -> bool:
    """Scores, mask, softmax, mixing."""
    q, k, v, mask, dropout, causal = _arguments(node, None, None, None, None, 0.0, False)
    mask = node.kwargs.get("attn_mask", mask)
    causal = node.kwargs.get("is_causal", causal)
    if dropout or node.kwargs.get("dropout_p") or node.kwargs.get("enable_gqa"):
        return False
    name = chain.name(node)
    of_q, of_k, of_v = (shape_of(t) for t in (q, k, v))
    scale = node.kwargs.get("scale")
    scale = 1 / math.sqrt(of_q[-1]) if scale is None else scale
    rank = len(of_k)
    keys = (*of_k[:-2], of_k[-1], of_k[-2])
    scores = (*shape_of(node)[:-1], of_k[-2])
    k = chain.add(Permute((*range(rank - 2), rank - 1, rank - 2)), [k], node, f"{name}.keys")
    q = chain.add(Combination(of_q, [of_q], [scale]), [q], node, f"{name}.queries")
    T = chain.add(Matmul(scores, [of_q, keys]), [q, k], node, f"{name}.scores")
    if causal:
        mask = f"{name}.causal"
        chain.numbers[mask] = torch.ones(scores[-2:], dtype=torch.bool).tril()
    if causal or (mask is not None and not _is_real(mask)):
        T = chain.add(Mask(scores, -math.inf), [T, mask], node, f"{name}.masked")
    elif mask is not None:
        both = Combination(scores, [scores, shape_of(mask)], [1.0, 1.0])
        T = chain.add(both, [T, mask], node, f"{name}.masked")
    A = chain.add(Softmax(-1), [T], node, f"{name}.rows")
    chain.add(Matmul(shape_of(node), [scores, of_v]), [A, v], node)
    return True


OPERATORS: dict[str, Callable[[Lowering, fx.Node], bool]] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        _reshape,
    ),
    **dict.fromkeys(
        ("contiguous", "clone", "alias", "lift_fresh_copy", "to", "_to_copy", "dropout"), _reshape
    ),
    **dict.fromkeys(("view_as", "type_as", "_reshape_copy"), _reshape),
    "transpose": _transpose,
    "permute": _permute,
    "t": _turned,
    "expand": _expand,
    "select": _select,
    "slice": _narrow,
    "cat": _concatenation,
    "getitem": _part_of,
    "mean": _total,
    "sum": _total,
    **dict.fromkeys(("add", "sub", "neg", "mul", "div"), _combination),
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "conv2d": _convolution,
    "embedding": _embedding,
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "masked_fill": _masked_fill,
    "scaled_dot_product_attention": _attention,
}


DERIVATIVES = {
    "gelu": elementwise.gelu,
    "gelu_tanh": elementwise.gelu_tanh,
    "relu": elementwise.relu,
}


LINEAR = frozenset(
    """
    index gather index_select repeat roll flip constant_pad_nd pad cumsum diagonal tril triu
    repeat_interleave select_scatter slice_scatter avg_pool2d movedim unfold im2col
    """.split()
)


def _elementwise(chain: Lowering, node: fx.Node) -> None:
    """A function entry by entry; of GELU and ReLU the derivatives are known."""
    inputs = node.all_input_nodes
    if any(a.meta["val"].is_complex() for a in (node, *inputs)):
        _operator(chain, node)
        return
    name = operator_name(node)
    if node.kwargs.get("approximate") == "tanh":
        name = "gelu_tanh"
    shapes = [shape_of(a) for a in inputs]
    derivatives = DERIVATIVES.get(name)
    slopes = elementwise.SLOPES.get(name)
    function = _of_tensors(node)
    kind = Elementwise(function, shape_of(node), shapes, derivatives, slopes, place(node))
    chain.add(kind, inputs, node)


def _operator(chain: Lowering, node: fx.Node) -> None:
    """Anything else; of one real tensor and constant indices, perhaps a linear map."""
    inputs = node.all_input_nodes
    real = [a for a in inputs if _is_real(a)]
    linear = operator_name(node) in LINEAR and len(real) == 1
    kind = LinearOperator if linear else Operator
    chain.add(kind(_of_tensors(node), place(node)), inputs, node)


def _of_tensors(node: fx.Node) -> Callable[..., Tensor]:
    """The operator of an fx node as a function of its tensor arguments alone."""
    leaves, spec = tree_flatten((node.args, node.kwargs))
    inputs = node.all_input_nodes
    places = [(i, inputs.index(a)) for i, a in enumerate(leaves) if isinstance(a, fx.Node)]
    target = node.target

    def call(*tensors: Tensor) -> Tensor:
        full = list(leaves)
        for i, j in places:
            full[i] = tensors[j]
        args, kwargs = tree_unflatten(full, spec)
        return target(*args, **kwargs)

    return call
