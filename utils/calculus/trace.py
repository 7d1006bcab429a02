"""The operators of a module for one example, by torch.export: a graph whose shapes are all
constants.

Traced at batch size one; in-place operators and dropout in evaluation are gone, linear, layer_norm
and attention whole.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

NARROW = {torch.float32, torch.float16, torch.bfloat16, torch.float64}


class Untraceable(ValueError):
    """The module cannot be read as a chain of nodes; the message says why."""


@dataclass
class Trace:
    """The graph of a module and what its placeholders stand for.

    graph       fx nodes; the last one is the output
    parameters  placeholder -> the parameter's name; a tied parameter has one name, the first
    buffers     placeholder -> the buffer's name in the module, likewise
    constants   placeholder -> a tensor that the graph holds itself
    input       placeholder of the input (1, ...)
    casts       where the module names a floating-point type: computed in the type of the weights
                instead
    """

    graph: fx.Graph
    parameters: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Tensor]
    input: str
    casts: list[str]

    @property
    def output(self) -> fx.Node:
        """The fx node of the output."""
        return next(n for n in self.graph.nodes if n.op == "output").args[0][0]


def operator_name(node: fx.Node) -> str:
    """The operator of an fx node without its overload: "softmax" for aten.softmax.int."""
    target = getattr(node.target, "overloadpacket", node.target)
    return target.__name__.removesuffix("_")


def place(node: fx.Node) -> str:
    """The operator of an fx node and its module, for people: "softmax of blocks.0.attention"."""
    stack = node.meta.get("nn_module_stack")
    owner = list(stack.values())[-1][0] if stack else ""
    owner = owner.removeprefix("net.").removeprefix("net")
    return f"{operator_name(node)} of {owner}" if owner else f"{operator_name(node)} of the network"


def shape_of(value: object) -> tuple[int, ...]:
    """The constant shape of the value of an fx node; () for a number."""
    return tuple(value.meta["val"].shape) if isinstance(value, fx.Node) else ()


def swapped_axes(node: fx.Node) -> list[int]:
    """The order of the axes after a transposition, an fx node."""
    order = list(range(len(shape_of(node))))
    i, j = (axis % len(order) for axis in node.args[1:])
    order[i], order[j] = order[j], order[i]
    return order


def export(model: nn.Module, x: Tensor) -> ExportedProgram:
    """Run a module in evaluation mode at its first example and note every operator.

    model  returns one tensor; left as it is
    x      (n, ...), inputs, of which the first is used

    Raises Untraceable where the graph depends on values or torch.export does not know something.
    """
    try:
        with _silence():
            return torch.export.export(model, (x[:1],), strict=False)
    except Exception as error:  # torch.export raises many kinds
        kind = type(error).__name__
        reason = f"{kind}: {' '.join(str(error).split('. ')[0].split())[:200]}"
        if kind == "GuardOnDataDependentSymNode":
            reason = "its forward pass branches on values"
        raise Untraceable(f"The network cannot be traced ({reason}).") from None


def trace(model: nn.Module, exported: ExportedProgram) -> Trace:
    """The graph of an exported module without in-place operators.

    Raises Untraceable where it changes buffers or its input, or draws random numbers.
    """
    with _silence():
        exported = exported.run_decompositions({})
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = ", ".join(signature.buffers_to_mutate.values()) or "its input"
        raise Untraceable(f"The forward pass changes {changed}.")
    first_name: dict[int, str] = {}
    canonical = {}
    named = model.named_parameters, model.named_buffers
    for name, tensor in (pair for all_of in named for pair in all_of(remove_duplicate=False)):
        canonical[name] = first_name.setdefault(id(tensor), name)
    found = Trace(exported.graph, {}, {}, {}, "", [])
    for spec in signature.input_specs:
        kind = spec.kind.name
        name = spec.arg.name
        if kind == "PARAMETER":
            found.parameters[name] = canonical[spec.target]
        elif kind == "BUFFER":
            found.buffers[name] = canonical[spec.target]
        elif kind == "CONSTANT_TENSOR":
            found.constants[name] = exported.constants[spec.target].detach()
        elif kind == "USER_INPUT":
            found.input = name
        else:
            raise Untraceable(f"The graph reads a {kind.lower()} input.")
    for node in list(found.graph.nodes):
        if node.op == "call_function":
            _clean(found, node)
    found.graph.eliminate_dead_code()
    return found


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what torch.export writes about a network that it then refuses."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _clean(found: Trace, node: fx.Node) -> None:
    """Refuse what is random or makes a number of a tensor; drop assertions; forget named
    floating-point types."""
    if "_assert" in str(node.target):
        found.graph.erase_node(node)
        return
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if random and not _quiet(node):
        raise Untraceable(
            f"The {place(node)} is random: call .eval() first, or build it without dropout."
        )
    if isinstance(node.meta["val"], torch.SymInt | torch.SymFloat | torch.SymBool):
        raise Untraceable(f"The {place(node)} makes a number of a tensor.")
    named = [*node.args, *node.kwargs.values()]
    if any(isinstance(a, torch.dtype) and a in NARROW for a in named):
        found.casts.append(place(node))


def _quiet(node: fx.Node) -> bool:
    """Whether an operator that could draw random numbers draws none, such as attention with dropout
    0."""
    arguments = {a.name: a.default_value for a in node.target._schema.arguments}
    arguments |= dict(zip(arguments, node.args)) | node.kwargs
    no_dropout = arguments.get("dropout_p", arguments.get("dropout", 1)) == 0
    return no_dropout or arguments.get("train") is False
