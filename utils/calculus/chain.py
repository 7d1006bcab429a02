"""A network's chain of nodes, read off any module by tracing it: what every derivative and bound is
a walk over.

>>> import torch
>>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
>>> [step.place for step in read_chain(model, torch.randn(5, 4)).steps]
['linear of 0', 'tanh of 1', 'linear of 2']
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from utils.calculus.lowering import Kinds, Lowering, Step
from utils.calculus.rewrite import fuse_elementwise, fuse_rms_norm, push_selections
from utils.calculus.trace import export, place, trace

MOST = 64  # chains kept


@dataclass(frozen=True, eq=False)
class Chain:
    """A network as steps from its input to its output, both named.

    steps       in the order of computation; an input that no step makes is a parameter or buffer of
                the module by its own name, a constant, or the network's input
    input       name of the input (n, ...)
    output      name of the output
    constants   tensors by name (1, ...), that belong to the graph alone
    parameters  names of the parameters that the output depends on
    casts       operators that name a floating-point type: they compute in the type of the weights
                instead
    """

    steps: tuple[Step, ...]
    input: str
    output: str
    constants: dict[str, Tensor]
    parameters: frozenset[str]
    casts: tuple[str, ...]

    def constants_like(self, like: Tensor) -> dict[str, Tensor]:
        """The constants on the device of `like`, those that are real in its dtype."""
        real = {
            name
            for name, t in self.constants.items()
            if t.is_floating_point() or (name.startswith("number ") and t.dtype != torch.bool)
        }
        constants = self.constants.items()
        return {name: t.to(like if name in real else like.device) for name, t in constants}


class _OneTensor(nn.Module):
    """The module with its output as one tensor: it, or its `.logits`."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out if isinstance(out, Tensor) else out.logits


def read_chain(model: nn.Module, x: Tensor, kinds: Kinds | None = None) -> Chain:
    """The chain of a module for inputs like x.

    model  in evaluation mode, returns a tensor or an object with `.logits`; it is left as it is
    x      (n, ...), inputs, of which the first is traced
    kinds  nodes of your own, by the operator's name ("sin" for aten.sin): functions from the fx
           node, whose `meta["val"].shape` is the shape of one example's value, to the node

    Chains are kept. A network of torch's layers or of this repository's is known again by them; any
    other is run by torch.export each time, and known by what that noted. Raises Untraceable, in one
    sentence.

    >>> read_chain(nn.Linear(4, 3), torch.ones(5, 4)).parameters == {"weight", "bias"}
    True
    """
    if kinds:
        return _read(model, export(_OneTensor(model), x), kinds)
    key = _signature(model, x)
    if key is None or key not in _kept:
        exported = export(_OneTensor(model), x)
        key = key or _operators(model, exported)
        if key is None:
            return _read(model, exported, {})
        if key not in _kept:
            _kept[key] = _read(model, exported, {})
    _kept.move_to_end(key)
    while len(_kept) > MOST:
        _kept.popitem(last=False)
    return _kept[key]


def _read(model: nn.Module, exported: ExportedProgram, kinds: Kinds) -> Chain:
    traced = trace(_OneTensor(model), exported)
    prefix = "net."
    traced.parameters = {
        place: name.removeprefix(prefix) for place, name in traced.parameters.items()
    }
    traced.buffers = {place: name.removeprefix(prefix) for place, name in traced.buffers.items()}
    if not kinds:
        fuse_rms_norm(traced.graph)
        fuse_elementwise(traced.graph)
        push_selections(traced.graph)
    lowering = Lowering(traced, kinds)
    for node in traced.graph.nodes:
        if node.op == "call_function" and not _opened(node):
            lowering.lower(node)
    numbers = {name: t[None] for name, t in lowering.numbers.items()}
    constants = {f"%{place}": t[None] for place, t in traced.constants.items()}
    read = {name for step in lowering.steps for name in step.inputs}
    return Chain(
        steps=tuple(lowering.steps),
        input=f"%{traced.input}",
        output=lowering.name(traced.output),
        constants=numbers | constants,
        parameters=frozenset(read & set(traced.parameters.values())),
        casts=tuple(traced.casts),
    )


def _opened(node: fx.Node) -> bool:
    """An operator with several outputs: each is lowered where it is read."""
    return isinstance(node.meta["val"], tuple | list)


def forget(chain: Chain) -> None:
    """Read the chain anew next time: it was not the network's."""
    for key in [key for key, value in _kept.items() if value is chain]:
        del _kept[key]


# --- chains that were read before -----------------------------------------------------------------

_kept: OrderedDict[tuple, Chain] = OrderedDict()
_OURS = ("torch.", "utils.networks.")  # whose forward reads nothing but the module's attributes
_BOOKKEEPING = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def _signature(model: nn.Module, x: Tensor) -> tuple | None:
    """What a chain depends on but for the values of parameters and buffers, told from the module's
    layers; None where a layer is not one of ours, or has an attribute without a description."""
    parts: list = [
        tuple(x.shape[1:]),
        x.dtype.is_floating_point,
        x.dtype if not x.is_floating_point() else None,
    ]
    seen: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not type(module).__module__.startswith(_OURS):
            return None
        own = {
            k: v
            for k, v in vars(module).items()
            if k not in _BOOKKEEPING or k == "training" or k.endswith("_hooks")
        }
        plain = []
        for key, value in sorted(own.items()):
            described = _described(value)
            if described is None:
                return None
            plain.append((key, described))
        tensors = [*module._parameters.items(), *module._buffers.items()]
        shapes = tuple(
            (k, t if t is None else (tuple(t.shape), kind(t), seen.setdefault(id(t), len(seen))))
            for k, t in tensors
        )
        parts.append((name, type(module), type(module).forward, tuple(plain), shapes))
    return tuple(parts)


def _operators(model: nn.Module, exported: ExportedProgram) -> tuple | None:
    """The same, told from what torch.export noted: operators with their arguments and modules,
    types, names, and the values of constants; None where it calls another graph or has a constant
    that is no tensor."""
    nodes = list(exported.graph.nodes)
    if any(n.op == "get_attr" for n in nodes):
        return None
    if not all(isinstance(t, Tensor) for t in exported.constants.values()):
        return None
    operators = [(n.format_node(), place(n) if n.op == "call_function" else "") for n in nodes]
    tensors = [n.meta.get("val") for n in nodes]
    kinds = [(tuple(t.shape), kind(t)) for t in tensors if isinstance(t, Tensor)]
    names = [
        (spec.kind.name, str(spec.arg), spec.target)
        for spec in exported.graph_signature.input_specs
    ]
    tied = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    first = [tied[id(p)] for _, p in model.named_parameters(remove_duplicate=False)]
    constants = [
        (name, t.dtype, sha256(t.detach().cpu().reshape(-1).view(torch.uint8).numpy()).digest())
        for name, t in exported.constants.items()
    ]
    return tuple(operators), tuple(kinds), tuple(names), tuple(first), tuple(constants)


def kind(t: Tensor) -> str:
    """What a chain depends on of a tensor's type: real of any precision, or exactly which."""
    return "real" if t.is_floating_point() else str(t.dtype)


def _described(value: object) -> tuple | None:
    """A hashable description of an attribute, or None where it has none that is sure."""
    if isinstance(value, _PLAIN):
        return (type(value).__name__, value)
    if isinstance(value, tuple | list):
        parts = [_described(v) for v in value]
        return None if None in parts else (type(value).__name__, tuple(parts))
    if isinstance(value, dict):
        pairs = [_described(part) for pair in value.items() for part in pair]
        return None if None in pairs else ("dict", tuple(pairs))
    frozen = getattr(type(value), "__dataclass_params__", None)
    if frozen is not None and frozen.frozen:
        fields = [(name, _described(v)) for name, v in vars(value).items()]
        return None if any(v is None for _, v in fields) else (type(value), tuple(fields))
    if callable(value) and getattr(value, "__module__", "").startswith("torch"):
        return ("torch", value.__qualname__) if hasattr(value, "__qualname__") else None
    return None
