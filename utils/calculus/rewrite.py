"""Passes over a traced graph: one node for what is one function, and no work whose result is thrown
away.

fuse_elementwise   x * sigmoid(x), tanh-GELU and the like become one function of x
fuse_rms_norm      x rsqrt(mean(x^2) + eps) becomes one normalisation
push_selections    where only some tokens are read in the end, only their rows are computed
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch.utils._pytree import tree_map

from utils.calculus.trace import operator_name, shape_of, swapped_axes

aten = torch.ops.aten
ARITHMETIC = {"add", "sub", "mul", "div", "neg", "rsub"}
FUNCTIONS = frozenset(
    """
    gelu relu tanh silu sigmoid pow rsqrt sqrt square exp log sin cos erf softplus elu
    leaky_relu hardswish mish reciprocal abs clamp clamp_min clamp_max log_sigmoid log1p relu6
    hardtanh hardsigmoid selu celu softsign atan sinh cosh expm1 logit maximum minimum where
    atan2
    """.split()
)
POINTWISE = ARITHMETIC | FUNCTIONS


class Composite:
    """Several elementwise operators as one function of one tensor; `__name__` stands for them in
    messages."""

    def __init__(self, nodes: list[fx.Node], root: fx.Node):
        self.root = root
        self.calls = [(node, node.target, node.args, node.kwargs) for node in nodes]
        self.__name__ = "+".join(operator_name(node) for node in nodes)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        values = {self.root: z}
        for node, target, args, kwargs in self.calls:
            args, kwargs = fx.node.map_arg((args, kwargs), values.__getitem__)
            values[node] = target(*args, **kwargs)
        return values[node]


def fuse_elementwise(graph: fx.Graph) -> None:
    """Replace every group of elementwise operators of a graph that is a nonlinear function of one
    tensor of its shape."""
    for last in reversed(list(graph.nodes)):
        group, roots = _elementwise_group(last)
        if (
            len(group) < 2
            or len(roots) != 1
            or not any(operator_name(n) in FUNCTIONS for n in group)
        ):
            continue
        root = roots.pop()
        if any(shape_of(n) != shape_of(root) for n in group):
            continue
        function = Composite(group, root)
        with graph.inserting_before(last):
            if is_tanh_gelu(function):
                fused = graph.call_function(aten.gelu.default, (root,), {"approximate": "tanh"})
            else:
                fused = graph.call_function(function, (root,))
        fused.meta = dict(last.meta)
        last.replace_all_uses_with(fused)
        graph.eliminate_dead_code()


def is_tanh_gelu(function: Composite) -> bool:
    """Whether a function of sums, products and powers around one tanh is GELU's approximation: by
    its values, which only that polynomial in its argument and in front of it gives."""
    names = function.__name__.split("+")
    if names.count("tanh") != 1 or not set(names) <= {"tanh", "add", "mul", "pow", "div"}:
        return False
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = torch.nn.functional.gelu(z, approximate="tanh")
    return torch.allclose(function(z), expected, rtol=1e-12, atol=1e-14)


def _elementwise_group(last: fx.Node) -> tuple[list[fx.Node], set[fx.Node]]:
    """The elementwise operators, in order, of which only `last` is read outside, and the tensors
    that they read."""
    if not _is(last, *POINTWISE):
        return [], set()
    group = {last}
    grown = True
    while grown:
        grown = False
        for node in [a for member in group for a in member.all_input_nodes if a not in group]:
            if _is(node, *POINTWISE) and all(user in group for user in node.users):
                group.add(node)
                grown = True
    roots = {a for member in group for a in member.all_input_nodes if a not in group}
    return [n for n in last.graph.nodes if n in group], roots


def fuse_rms_norm(graph: fx.Graph) -> None:
    """Replace x * rsqrt(mean(x^2, -1, keepdim) + eps) in a graph by aten.rms_norm, no gain."""
    for node in list(graph.nodes):
        if (
            node.op != "call_function"
            or operator_name(node) != "mul"
            or len(node.all_input_nodes) != 2
        ):
            continue
        for x, scale in (node.args, reversed(node.args)):
            eps = _rms_eps(x, scale)
            if eps is None:
                continue
            with graph.inserting_before(node):
                fused = graph.call_function(
                    aten.rms_norm.default, (x, [shape_of(x)[-1]], None, eps)
                )
            fused.meta = dict(node.meta)
            node.replace_all_uses_with(fused)
            graph.eliminate_dead_code()
            break


def _is(node: object, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and operator_name(node) in names


def _rms_eps(x: fx.Node, scale: fx.Node) -> float | None:
    """eps if scale is rsqrt(mean(x^2, -1, keepdim=True) + eps) of this x."""
    if not _is(scale, "rsqrt") or not _is(scale.args[0], "add"):
        return None
    mean, eps = scale.args[0].args
    if not _is(mean, "mean") or mean.args[1:] != ([-1], True) or not isinstance(eps, float | int):
        return None
    square = mean.args[0]
    if not _is(square, "pow", "square") or square.args[0] is not x:
        return None
    return float(eps) if operator_name(square) == "square" or square.args[1] == 2 else None


# --- selections -----------------------------------------------------------------------------------


def push_selections(graph: fx.Graph) -> None:
    """Move every selection of a graph along an axis towards the input, past operators that only it
    reads.

    The axis is kept with length one on the way, so that no rank changes.
    """
    for node in list(graph.nodes):
        if _is(node, "select"):
            _keep_axis(graph, node)
    pushing = True
    while pushing:
        pushing = any(_pushed(graph, node) for node in list(graph.nodes) if _is_narrow(node))
    graph.eliminate_dead_code()


def _keep_axis(graph: fx.Graph, node: fx.Node) -> None:
    """select(x, axis, i) as a slice of length one, then select(., axis, 0)."""
    x, axis, index = node.args
    axis %= len(shape_of(x))
    index %= shape_of(x)[axis]
    if shape_of(x)[axis] == 1:
        return
    with graph.inserting_before(node):
        narrow = _call(graph, aten.slice.Tensor, (x, axis, index, index + 1), node)
    node.args = (narrow, axis, 0)


def _is_narrow(node: fx.Node) -> bool:
    return _is(node, "slice") and len(node.args) >= 4 and shape_of(node)[node.args[1]] == 1


def _call(graph: fx.Graph, target: Callable, args: tuple, like: fx.Node) -> fx.Node:
    """A new fx node with its value's shape worked out."""
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    values = tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, args)
    with like.meta["val"].fake_mode:
        node.meta["val"] = target(*values)
    return node


def _pushed(graph: fx.Graph, narrow: fx.Node) -> bool:
    """Replace narrow(op(...)) by op(narrow(...)) if that is possible."""
    source, axis, start, *_ = narrow.args
    axis %= len(shape_of(source))
    start %= shape_of(source)[axis]
    same = [user for user in source.users if _is_narrow(user) and user.args[:4] == narrow.args[:4]]
    if len(same) > 1:  # equal selections are one
        narrow = min(same, key=list(graph.nodes).index)
        for other in same:
            if other is not narrow:
                other.replace_all_uses_with(narrow)
                graph.erase_node(other)
        return True
    if len(source.users) > 1 or source.op != "call_function":
        return False
    axes = _input_axes(source, axis)
    if axes is None:
        return False
    args = list(source.args)
    with graph.inserting_before(narrow):
        for place, inner in axes.items():
            args[place] = _call(
                graph, aten.slice.Tensor, (args[place], inner, start, start + 1), source
            )
        if operator_name(source) in ("view", "_unsafe_view", "reshape"):
            size = list(source.args[1])
            size[axis] = 1
            args[1] = size
        new = _call(graph, source.target, tuple(args), source)
    new.kwargs = source.kwargs
    narrow.replace_all_uses_with(new)
    graph.erase_node(narrow)
    graph.erase_node(source)
    return True


def _input_axes(node: fx.Node, axis: int) -> dict[int, int] | None:
    """Which axis of which argument a selection along `axis` of the output selects; None where it is
    no selection."""
    name = operator_name(node)
    shape = shape_of(node)
    rank = len(shape)
    if (
        isinstance(node.target, Composite)
        or name in FUNCTIONS | ARITHMETIC
        or name in ("clone", "contiguous")
    ):
        return _broadcast_axes(node, axis, shape)
    if name in ("layer_norm", "rms_norm"):
        return {0: axis} if axis < rank - len(node.args[1]) else None
    if name in ("softmax", "_softmax"):
        return {0: axis} if axis != node.args[1] % rank else None
    if name == "linear":
        return {0: axis} if axis < rank - 1 else None
    if name == "matmul" and min(len(shape_of(a)) for a in node.args) >= 2:
        return _matmul_axes(node, axis, rank)
    if name == "transpose":
        return {0: swapped_axes(node)[axis]}
    if name == "permute":
        return {0: node.args[1][axis] % rank}
    if name in ("view", "_unsafe_view", "reshape"):
        return _view_axes(shape_of(node.args[0]), shape, axis)
    if name == "scaled_dot_product_attention" and axis == rank - 2:
        masked = len(node.args) > 3 or "attn_mask" in node.kwargs or "is_causal" in node.kwargs
        return None if masked else {0: axis}
    return None


def _broadcast_axes(node: fx.Node, axis: int, shape: tuple[int, ...]) -> dict[int, int]:
    axes = {}
    for place, a in enumerate(node.args):
        inner = axis - (len(shape) - len(shape_of(a)))
        if isinstance(a, fx.Node) and inner >= 0 and shape_of(a)[inner] > 1:
            axes[place] = inner
    return axes


def _matmul_axes(node: fx.Node, axis: int, rank: int) -> dict[int, int] | None:
    if axis == rank - 1:
        return None
    axes = {}
    for place, a in enumerate(node.args):
        inner = axis - (rank - len(shape_of(a)))
        rows = axis == rank - 2
        if rows and place == 1:
            continue
        if inner >= 0 and shape_of(a)[inner] > 1:
            axes[place] = inner
    return axes


def _view_axes(inner: tuple[int, ...], outer: tuple[int, ...], axis: int) -> dict[int, int] | None:
    """The axis of the input with the same length and as many numbers before it."""
    before = torch.Size(outer[:axis]).numel()
    for i, size in enumerate(inner):
        if size == outer[axis] and torch.Size(inner[:i]).numel() == before:
            return {0: i}
    return None
