"""Nodes that the bounds did not know: right or refused, never false in silence."""

from __future__ import annotations

import math

import pytest
import torch
from bounded import moved
from exact import exact_norms, reference
from networks import flat, randomised, uneven_examples
from torch import Tensor, nn
from torch.func import jvp, vjp

from utils.bounds import RUNGS, hessian_bounds
from utils.calculus.chain import read_chain
from utils.calculus.jets import Jet
from utils.calculus.lemmas import LAYER_NORM_UNIFORM
from utils.calculus.nodes.base import Node, Unknown
from utils.calculus.nodes.known import Known
from utils.calculus.tape import Tape

F64 = torch.float64
OPTIONS = {"majorant": {"confidence": 1 - 1e-9, "max_steps": 400}}


class Between(nn.Module):
    """A function of one or two hidden vectors between linear maps."""

    def __init__(self, inputs: int = 1):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(16, 5) for _ in range(inputs))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(self.function(*(linear(x) for linear in self.maps)))


def between(function, inputs: int = 1) -> nn.Module:
    """Of a class of its own, so that its chain is read once."""
    return type("Between", (Between,), {"function": staticmethod(function)})(inputs)


NEW = {
    "three times": (lambda z: 3 * z, 1),
    "a product": (lambda a, b: a * b, 2),
    "a fast sine": (lambda z: torch.sin(30 * z) / 30, 1),
    "sine": (torch.sin, 1),
    "a gate": (lambda a, b: a * torch.sigmoid(b), 2),
    "root mean square": (lambda z: z * (z.square().mean(-1, keepdim=True) + 0.1).rsqrt(), 1),
    "layer norm by hand": (
        lambda z: (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True) + 0.1).sqrt(),
        1,
    ),
    "softplus": (nn.functional.softplus, 1),
    "the larger": (lambda a, b: torch.logaddexp(a, b), 2),
}


def moved_norms(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Exact norms at random weights of the ball, the largest of a few."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        step = torch.randn(len(flat(model)), generator=generator, dtype=F64)
        found.append(exact_norms(moved(model, radius * step / step.norm()), x, y))
    return torch.stack(found).amax(0)


@pytest.mark.parametrize("name", NEW)
def test_right_or_refused(name):
    """Every rung, at a point and on a ball, is above the exact norm or says which operator it does
    not know."""
    function, inputs = NEW[name]
    model = randomised(between(function, inputs), 3)
    x, y = uneven_examples(2, 3)
    answered = []
    norms = {0.0: exact_norms(model, x, y), 0.3: moved_norms(model, x, y, 0.3)}
    for rung in RUNGS[1:]:
        for radius in (0.0, 0.3) if rung in ("prior", "activations") else (0.0,):
            exact = norms[radius]
            try:
                options = OPTIONS.get(rung, {})
                bound = hessian_bounds(model, x, y, rung=rung, radius=radius, **options).values
            except Unknown as refusal:
                assert " of the " in str(refusal) and "\n" not in str(refusal)
                continue
            assert (bound >= exact * (1 - 1e-9)).all(), (rung, radius)
            answered.append((rung, radius))
    if name in ("three times", "a product", "sine", "a gate", "root mean square"):
        assert len(answered) == 6
    if name == "a fast sine":
        assert ("activations", 0.3) not in answered and ("activations", 0.0) in answered


# --- nodes of one's own ---------------------------------------------------------------------------


class Sine(Node):
    """sin entry by entry, every method written."""

    def forward(self, *z):
        return z[0].sin(), z[0]

    def tangent(self, saved, dz):
        return None if dz[0] is None else saved.cos() * dz[0]

    def adjoint(self, saved, lam, wanted):
        return (saved.cos() * lam,)

    def second_order(self, saved, lam, wanted):
        bend = -saved.sin() * lam
        return lambda dz, dout: (None if dz[0] is None else bend * dz[0],)

    def majorant(self, saved, lam, wanted):
        bend = (saved.sin() * lam).abs()
        return lambda dz, dout: (None if dz[0] is None else bend * dz[0],)

    def norms(self, inputs, saved, at):
        x = inputs[0]
        return Known(x.jet.smooth(1.0, 1.0), moved=x.moved, full=x.full, row=x.row)


class Unbounded(Sine):
    """The same without norms."""

    def norms(self, inputs, saved, at):
        raise Unknown("The sin of the network has no bound: use the certified norm.")


class Incomplete(Node):
    """A kind that lacks methods."""

    def forward(self, *z):
        return z[0], None


class Gate(Node):
    """a * b, written as a class of its own."""

    couples = True

    def forward(self, *z):
        return z[0] * z[1], z

    def tangent(self, saved, dz):
        parts = [d * o for d, o in zip(dz, reversed(saved)) if d is not None]
        return sum(parts) if parts else None

    def adjoint(self, saved, lam, wanted):
        return lam * saved[1], lam * saved[0]

    def second_order(self, saved, lam, wanted):
        def form(dz, dout):
            return tuple(None if d is None else lam * d for d in reversed(dz))

        return form

    def majorant(self, saved, lam, wanted):
        return lambda dz, dout: tuple(lam.abs() * d for d in dz)

    def norms(self, inputs, saved, at):
        a, b = inputs
        of_a, of_b = a.largest(), b.largest()
        jet = Jet.of([a.jet, b.jet], [of_b, of_a], {(0, 1): 1.0})
        return Known(jet, moved=of_a * b.moved + of_b * a.moved, full=of_a * b.full)


class RootMeanSquare(Node):
    """The scale of every row, 1 / sqrt(mean x^2 + 0.1), times the row: in one class, its second
    order by automatic differentiation."""

    @staticmethod
    def phi(z: Tensor) -> Tensor:
        return z * (z.square().mean(-1, keepdim=True) + 0.1).rsqrt()

    def forward(self, *z):
        return self.phi(z[0]), z[0]

    def tangent(self, saved, dz):
        return None if dz[0] is None else jvp(self.phi, (saved,), (dz[0].expand_as(saved),))[1]

    def adjoint(self, saved, lam, wanted):
        return (vjp(self.phi, saved.expand_as(lam))[1](lam)[0],)

    def second_order(self, saved, lam, wanted):
        def form(dz, dout):
            return (jvp(lambda z: vjp(self.phi, z)[1](lam)[0], (saved,), (dz[0],))[1],)

        return form

    def majorant(self, saved, lam, wanted):
        raise Unknown("The root mean square of the network has no majorant.")

    def norms(self, inputs, saved, at):
        x = inputs[0]
        rho = math.sqrt(0.1)
        bend = LAYER_NORM_UNIFORM / (0.1 * math.sqrt(x.shape[-1]))
        row = math.sqrt(x.shape[-1])
        return Known(x.jet.smooth(1 / rho, bend), moved=x.moved / rho, row=row)


def products(model: nn.Module, x: Tensor, y: Tensor, kinds: dict) -> Tensor:
    """The Hessian of one example by the chain's products."""
    chain = read_chain(model, x, kinds)
    point = {name: p.detach() for name, p in model.named_parameters()}
    tape = Tape(chain, point, x, y)
    sizes = {name: t.shape for name, t in point.items()}
    P = sum(t.numel() for t in point.values())
    rows = []
    for unit in torch.eye(P, dtype=F64):
        parts = unit.split([s.numel() for s in sizes.values()])
        along = {name: t.reshape(1, *sizes[name]) for name, t in zip(sizes, parts)}
        found = tape.product(along)
        rows.append(
            torch.cat(
                [
                    torch.zeros(sizes[n].numel(), dtype=F64) if t is None else t.flatten()
                    for n, t in found.items()
                ]
            )
        )
    return torch.stack(rows)


OWN = {
    "sine": (between(torch.sin), {"sin": lambda node: Sine()}),
    "a gate": (between(lambda a, b: a * b, 2), {"mul": lambda node: Gate()}),
    "root mean square": (
        between(lambda z: nn.functional.rms_norm(z, (5,), eps=0.1)),
        {"rms_norm": lambda node: RootMeanSquare()},
    ),
}


@pytest.fixture
def own_kinds(monkeypatch):
    """The bounds with nodes of one's own."""

    def use(kinds):
        chains = {}

        def read(model, x):
            if type(model) not in chains:
                chains[type(model)] = read_chain(model, x, kinds)
            return chains[type(model)]

        monkeypatch.setattr("utils.bounds.subject.read_chain", read)

    return use


@pytest.mark.parametrize("name", OWN)
def test_nodes_of_ones_own(name, own_kinds):
    """Right products against double backward, valid bounds from the norms they give."""
    model, kinds = OWN[name]
    model = randomised(model, 5)
    x, y = uneven_examples(1, 5)
    H = reference(model, x, y)[2]
    torch.testing.assert_close(products(model, x, y, kinds), H, rtol=1e-9, atol=1e-11)
    own_kinds(kinds)
    exact = torch.linalg.matrix_norm(H, 2)
    for rung in RUNGS[1:]:
        if name == "root mean square" and rung in ("tangents", "majorant"):
            with pytest.raises(Unknown, match="root mean square"):
                hessian_bounds(model, x, y, rung=rung)
            continue
        bound = hessian_bounds(model, x, y, rung=rung, **OPTIONS.get(rung, {})).values
        assert bound.isfinite().all() and (bound >= exact * (1 - 1e-9)).all(), rung


def test_a_node_without_norms_is_refused(own_kinds):
    model = randomised(between(torch.sin), 5)
    x, y = uneven_examples(1, 5)
    own_kinds({"sin": lambda node: Unbounded()})
    for rung in ("prior", "activations"):
        with pytest.raises(Unknown, match="sin of the network"):
            hessian_bounds(model, x, y, rung=rung)
    assert hessian_bounds(model, x, y, rung="tangents").values.isfinite().all()


def test_a_class_that_lacks_a_method_cannot_be_created():
    with pytest.raises(TypeError, match="abstract"):
        Incomplete()
