"""Every kind of node against automatic differentiation of its own `forward`, in float64."""

import itertools

import pytest
import torch
from torch.func import jvp, vjp

from utils.calculus.nodes import elementwise
from utils.calculus.nodes.base import Node, Unknown
from utils.calculus.nodes.elementwise import Elementwise
from utils.calculus.nodes.general import LinearOperator, Operator
from utils.calculus.nodes.linear import Linear
from utils.calculus.nodes.loss import CrossEntropy, SquaredError
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

F64 = torch.float64
n = 3
X = (1, 4, 6)  # one example's tokens
SOME_TOKENS = torch.tensor([[0, 4], [2, -100], [1, 1]])
SCORES = (1, 2, 4, 4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def activation(name, function):
    return Elementwise(function, X, [X], getattr(elementwise, name, None))


def tanh_gelu(z):
    return torch.nn.functional.gelu(z, approximate="tanh")


# name -> (node, shapes of the inputs, how many of the last inputs are parameters, one row for all
# examples)
NODES = {
    "linear": (Linear((1, 4, 5), [X, (5, 6), (5,)]), [X, (5, 6), (5,)], 2),
    "linear-turned": (Linear((1, 4, 5), [X, (6, 5)], turned=True), [X, (6, 5)], 1),
    "linear-of-values": (Linear((1, 4, 5), [X, (5, 6)]), [X, (5, 6)], 0),
    "scores": (Matmul(SCORES, [(1, 2, 4, 3), (1, 2, 3, 4)]), [(1, 2, 4, 3), (1, 2, 3, 4)], 0),
    "one-key-head": (Matmul(SCORES, [(1, 2, 4, 3), (1, 1, 3, 4)]), [(1, 2, 4, 3), (1, 1, 3, 4)], 0),
    "gain": (Product(X, [X, (6,), (6,)]), [X, (6,), (6,)], 2),
    "gate": (Product(X, [X, X]), [X, X], 0),
    "outer": (Product(X, [(1, 4, 1), (6,)]), [(1, 4, 1), (6,)], 1),
    "softmax": (Softmax(-1), [SCORES], 0),
    "softmax-of-columns": (Softmax(2), [SCORES], 0),
    "normalisation": (Normalisation(1e-5), [X], 0),
    "normalisation-large-eps": (Normalisation(0.3), [X], 0),
    "normalisation-two-axes": (Normalisation(1e-5, 2), [X], 0),
    "rms": (Normalisation(1e-5, centred=False), [X], 0),
    "gelu": (activation("gelu", torch.nn.functional.gelu), [X], 0),
    "gelu-tanh": (activation("gelu_tanh", tanh_gelu), [X], 0),
    "relu": (activation("relu", torch.relu), [X], 0),
    "swish": (activation("", lambda z: z * torch.sigmoid(z)), [X], 0),
    "quotient": (Elementwise(lambda a, b: a / (3 + b.square()), X, [X, (6,)]), [X, (6,)], 1),
    "reshape": (Reshape(X, (2, 12)), [X], 0),
    "permute": (Permute((2, 0, 1)), [X], 0),
    "select": (Select(X, 1, 2), [X], 0),
    "slice": (Select(X, 2, slice(1, 5, 2)), [X], 0),
    "expand": (Expand((1, 1, 6), (2, 4, 6)), [(1, 1, 6)], 0),
    "mean": (Sum(X, [1], False, 0.25), [X], 0),
    "sum-keeps-axes": (Sum(X, [0, 2], True, 1.0), [X], 0),
    "patches": (Patches((1, 2, 4, 4), (2, 2), stride=1), [(1, 2, 4, 4)], 0),
    "add": (Combination(X, [X, (4, 1), (6,)], (1.0, -2.0, 0.5)), [X, (4, 1), (6,)], 1),
    "cat": (Concatenation(1, [X, (1, 1, 6)]), [X, (1, 1, 6)], 1),
    "operator": (Operator(lambda a, b: torch.cumsum(a, -1) * b.exp(), "mine"), [X, (6,)], 1),
    "linear-operator": (LinearOperator(lambda a: a.roll(1, -1), "mine"), [X], 0),
    "cross-entropy": (CrossEntropy(torch.tensor([0, 4, 2])), [(1, 5)], 0),
    "cross-entropy-tokens": (CrossEntropy(SOME_TOKENS), [(1, 2, 5)], 0),
    "squared-error": (SquaredError(torch.tensor([0, 4, 2])), [(1, 5)], 0),
    "squared-distance": (SquaredError(normal(n, *X, seed=9)), [X], 0),
}  # fmt: skip
LINEAR = {
    "reshape",
    "permute",
    "select",
    "slice",
    "expand",
    "mean",
    "sum-keeps-axes",
    "patches",
    "add",
    "cat",
}
LINEAR |= {"linear-operator"}
CURVED = [name for name in NODES if name not in LINEAR]
COUPLINGS = {name for name in NODES if NODES[name][0].couples}


class At:
    """A node with inputs, tangents, an adjoint, and itself as a function of the inputs of all
    examples."""

    def __init__(self, name):
        self.node, shapes, parameters = NODES[name]
        first = len(shapes) - parameters
        leads = [n if j < first else 1 for j in range(len(shapes))]
        self.z = tuple(normal(k, *s, seed=j) for j, (k, s) in enumerate(zip(leads, shapes)))
        self.dz = tuple(normal(n, *s, seed=10 + j) for j, s in enumerate(shapes))
        self.wanted = (1,) * len(shapes)
        out, self.saved = self.node.forward(*self.z)
        self.lam = normal(*out.shape, seed=20)
        self.wide = tuple(
            t.expand(n, *t.shape[1:]).clone() for t in self.z
        )  # parameters, a copy for each example

    def phi(self, *z):
        return self.node.forward(*z)[0]


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    scale = b.norm()
    assert (a - b).norm() <= tolerance * scale or (scale == 0 and not a.any()), (
        a - b
    ).norm() / scale


@pytest.mark.parametrize("name", NODES)
def test_tangent_is_the_jacobian_times_a_vector(name):
    at = At(name)
    close(at.node.tangent(at.saved, at.dz), jvp(at.phi, at.wide, at.dz)[1])


@pytest.mark.parametrize("name", NODES)
def test_adjoint_is_the_transposed_jacobian(name):
    at = At(name)
    expected = vjp(at.phi, *at.wide)[1](at.lam)
    for part, other in zip(at.node.adjoint(at.saved, at.lam, at.wanted), expected, strict=True):
        close(part + torch.zeros_like(other), other)


@pytest.mark.parametrize("name", CURVED)
def test_second_order_form_is_the_derivative_of_the_adjoint(name):
    at = At(name)
    expected = jvp(lambda *z: vjp(at.phi, *z)[1](at.lam), at.wide, at.dz)[1]
    form = at.node.second_order(at.saved, at.lam, at.wanted)
    found = (None,) * len(at.dz)
    if form is not None:
        found = form(at.dz, at.node.tangent(at.saved, at.dz))
    else:
        assert name == "relu"
    for part, other in zip(found, expected, strict=True):
        close(torch.zeros_like(other) if part is None else part, other)


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_linear_nodes_have_no_form(name):
    at = At(name)
    assert at.node.second_order(at.saved, at.lam, at.wanted) is None
    assert at.node.majorant(at.saved, at.lam, at.wanted) is None
    assert jvp(lambda *z: vjp(at.phi, *z)[1](at.lam), at.wide, at.dz)[1][0].abs().max() == 0


def dense(at, form):
    """The form of example 0 on all inputs together, as a matrix."""
    columns = []
    for j, t in enumerate(at.dz):
        for e in torch.eye(t[0].numel(), dtype=F64):
            unit = [torch.zeros_like(u) for u in at.dz]
            unit[j][0] = e.reshape(t.shape[1:])
            parts = form(tuple(unit), at.node.tangent(at.saved, tuple(unit)))
            pairs = zip(parts, at.dz, strict=True)
            rows = [torch.zeros_like(u[0]) if part is None else part[0] for part, u in pairs]
            columns.append(torch.cat([row.reshape(-1) for row in rows]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", [name for name in CURVED if name not in ("operator", "relu")])
def test_majorant_is_at_least_the_form_and_its_negative(name):
    """Of one input exactly |M|, of a coupling its halves, unless some operand is broadcast."""
    at = At(name)
    M = dense(at, at.node.second_order(at.saved, at.lam, at.wanted))
    majorant = dense(at, at.node.majorant(at.saved, at.lam, at.wanted))
    scale = torch.linalg.matrix_norm(M, 2)
    assert scale > 0
    close(majorant, majorant.T)
    assert torch.linalg.eigvalsh(majorant - M)[0] >= -1e-12 * scale
    assert torch.linalg.eigvalsh(majorant + M)[0] >= -1e-12 * scale
    if name not in ("one-key-head", "quotient"):
        values, vectors = torch.linalg.eigh((M + M.T) / 2)
        close(majorant, vectors @ (values.abs()[:, None] * vectors.T), 1e-9)


@pytest.mark.parametrize("size", [1e-200, 1e-300])
@pytest.mark.parametrize("name", [name for name in CURVED if name not in ("operator", "relu")])
def test_majorant_of_a_saturated_node(name, size):
    """Adjoints whose squares underflow give a majorant of their size."""
    at = At(name)
    small = at.node.majorant(at.saved, size * at.lam, at.wanted)(at.dz, None)
    whole = at.node.majorant(at.saved, at.lam, at.wanted)(at.dz, None)
    for part, expected in zip(small, whole, strict=True):
        if expected is not None:
            close(part / size, expected, 1e-9)


@pytest.mark.parametrize("name", NODES)
def test_none_stands_for_zero(name):
    at = At(name)
    form = at.node.second_order(at.saved, at.lam, at.wanted)
    for gone in itertools.product([False, True], repeat=len(at.dz)):
        nones = tuple(None if g else t for g, t in zip(gone, at.dz))
        zeros = tuple(torch.zeros_like(t) if g else t for g, t in zip(gone, at.dz))
        expected = at.node.tangent(at.saved, zeros)
        found = at.node.tangent(at.saved, nones)
        close(torch.zeros_like(expected) if found is None else found, expected, 1e-14)
        for part, other in zip(form(nones, found), form(zeros, expected)) if form else ():
            if other is not None:
                close(torch.zeros_like(other) if part is None else part, other, 1e-14)


@pytest.mark.parametrize("name", [name for name in NODES if NODES[name][2]])
def test_sums_over_the_examples(name):
    """With wanted = 2 a part may have one row; it is the sum over the examples."""
    at = At(name)
    first = len(at.dz) - NODES[name][2]
    shared = tuple(t if j < first else t[:1] for j, t in enumerate(at.dz))
    wanted = tuple(1 if j < first else 2 for j in range(len(at.dz)))
    repeated = tuple(t.expand(n, *t.shape[1:]) for t in shared)
    close(at.node.tangent(at.saved, shared), at.node.tangent(at.saved, repeated))
    pairs = [
        (at.node.adjoint(at.saved, at.lam, wanted), at.node.adjoint(at.saved, at.lam, at.wanted))
    ]
    if name in CURVED:
        summed = at.node.second_order(at.saved, at.lam, wanted)
        alone = at.node.second_order(at.saved, at.lam, at.wanted)
        out = at.node.tangent(at.saved, repeated)
        pairs.append((summed(shared, out), alone(repeated, out)))
    for a, b in pairs:
        for j in range(first, len(at.dz)):
            if b[j] is not None:
                close(a[j].sum(0), b[j].sum(0))


def test_rows_of_a_table():
    """A table of embeddings by constant indices, one of them twice, and a row that takes no
    gradient."""
    node = Lookup(5, padding=1)
    table = normal(1, 5, 2)
    index = torch.tensor([[0, 3, 3], [1, 2, 0]])
    out, saved = node.forward(table, index)
    assert torch.equal(out, table[0][index])
    moved = normal(2, 5, 2, seed=1)
    rows = node.tangent(saved, (moved, None))
    keep = (index != 1)[..., None]
    close(rows, torch.stack([moved[i][index[i]] for i in range(2)]) * keep)
    lam = normal(*out.shape, seed=2)
    back = node.adjoint(saved, lam, (1, 0))[0]
    close((back * moved).sum(), (lam * rows).sum())
    close(node.adjoint(saved, lam, (2, 0))[0].sum(0), back.sum(0))


def test_masked_entries_do_not_move():
    node = Mask(SCORES, -torch.inf)
    mask = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    out, saved = node.forward(normal(n, *SCORES), mask)
    assert (out == -torch.inf).sum() == n * 2 * 6
    moved = node.tangent(saved, (normal(n, *SCORES, seed=1), None))
    assert not moved[:, 0, :, ~mask[0]].any() and moved.any()
    lam = normal(n, *SCORES, seed=2)
    close((node.adjoint(saved, lam, (1, 0))[0] * moved).sum(), (lam * moved).sum())


@pytest.mark.parametrize("right", [True, False])
def test_saturated_softmax_keeps_a_symmetric_hessian(right):
    """One class has probability 1 - 1e-10: S = p_1 p_2 [[1, -1], [-1, 1]] to rounding."""
    node = CrossEntropy(torch.tensor([0 if right else 1]))
    f = torch.tensor([[[23.0, 0.0]]], dtype=F64)
    _, saved = node.forward(f)
    form = node.second_order(saved, torch.ones(1, dtype=F64), (1,))
    S = torch.stack([form((e[None, None],), None)[0][0, 0] for e in torch.eye(2, dtype=F64)])
    small = 1 / (1 + torch.exp(f[0, 0, 0]))
    close(S, small * (1 - small) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64), 1e-15)


def test_an_operator_without_a_node_has_no_majorant():
    at = At("operator")
    with pytest.raises(Unknown, match="mine has no bound"):
        at.node.majorant(at.saved, at.lam, at.wanted)


@pytest.mark.parametrize("missing", sorted(Node.__abstractmethods__))
def test_a_kind_that_lacks_a_method_cannot_be_created(missing):
    methods = {
        name: lambda self, *given: None for name in Node.__abstractmethods__ if name != missing
    }
    with pytest.raises(TypeError, match=missing):
        type("Mine", (Node,), methods)()
