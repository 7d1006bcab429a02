"""Every node of the calculus, and whole networks, against automatic differentiation in float64.

References: forward mode for tangents, reverse mode for adjoints, forward over reverse for the second-order forms, all
through `forward` alone; double backward through the modules of `utils.models` for whole networks.
"""

import itertools

import pytest
import torch
from refusal import refused
from test_curvature import randomised as random_weights
from test_curvature import reference, samples, vit
from torch.func import jvp, vjp

from utils import calculus
from utils.calculus import Tape, agreement, data_of, known, steps_of
from utils.curvature import Losses, SampleHessians
from utils.models import ViT, build_model

F64 = torch.float64
n, N, d, H, K = 3, 4, 6, 2, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


LABELS = torch.tensor([0, 4, 2])
NETWORKS_FOR_MAJORANT = ["pre-cls-gelu-depth3-heads1-mse", "post-cls-gelu_tanh-depth2-heads4-cross_entropy"]
NETWORKS_FOR_MAJORANT += ["pre-mean-relu-depth2-heads2-cross_entropy"]
# name -> (node, shapes of the inputs, number of parameters at their end)
NODES = {
    "linear": (calculus.Linear(), [(n, N, d), (K, d), (K,)], 2),
    "linear-no-bias": (calculus.Linear(), [(n, N, d), (K, d)], 1),
    "add": (calculus.Add(), [(n, N, d), (n, N, d)], 0),
    "score": (calculus.Score(H), [(n, N, d), (n, N, d)], 0),
    "score-one-query": (calculus.Score(H), [(n, 1, d), (n, N, d)], 0),
    "softmax": (calculus.Softmax(), [(n, H, N, N)], 0),
    "mixing": (calculus.Mixing(H), [(n, H, N, N), (n, N, d)], 0),
    "mixing-one-query": (calculus.Mixing(H), [(n, H, 1, N), (n, N, d)], 0),
    "gelu": (calculus.Activation("gelu"), [(n, N, d)], 0),
    "gelu-tanh": (calculus.Activation("gelu_tanh"), [(n, N, d)], 0),
    "relu": (calculus.Activation("relu"), [(n, N, d)], 0),
    "normalisation": (calculus.Normalisation(1e-5), [(n, N, d)], 0),
    "normalisation-large-eps": (calculus.Normalisation(0.3), [(n, N, d)], 0),
    "affine": (calculus.Affine(), [(n, N, d), (d,), (d,)], 2),
    "embedding": (calculus.Embedding(), [(n, N, d), (N, d)], 1),
    "embedding-cls": (calculus.Embedding(), [(n, N, d), (N + 1, d), (d,)], 2),
    "pool-cls": (calculus.Pool("cls"), [(n, N, d)], 0),
    "pool-mean": (calculus.Pool("mean"), [(n, N, d)], 0),
    "cross-entropy": (calculus.CrossEntropy(LABELS), [(n, 1, K)], 0),
    "squared-error": (calculus.SquaredError(LABELS), [(n, 1, K)], 0),
    "squared-distance": (calculus.SquaredError(normal(n, N, d, seed=9)), [(n, N, d)], 0),
}


def at(name):
    """Node, inputs z, tangents dz (one row a sample for the parameters), adjoint lam, map of the inputs alone."""
    node, shapes, parameters = NODES[name]
    z = tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes))
    first = len(shapes) - parameters
    dz = tuple(normal(*(shape if i < first else (n, *shape)), seed=10 + i) for i, shape in enumerate(shapes))

    def phi(*inputs):
        return node.forward(*inputs)[0]

    out, saved = node.forward(*z)
    return node, z, dz, normal(*out.shape, seed=20), saved, phi, first


def one_by_one(name, call):
    """`call(phi, z, dz, lam)` for each sample alone, with the parameters' tangents of that sample; results stacked."""
    node, z, dz, lam, _, _, first = at(name)
    rows = []
    for i in range(n):
        own = NODES[name][0]
        if hasattr(node, "y"):
            own = type(node)(
                LABELS[i : i + 1] if node.y.ndim < 3 or not node.y.is_floating_point() else node.y[i : i + 1]
            )
        zi = tuple(t[i : i + 1] if j < first else t for j, t in enumerate(z))
        di = tuple(t[i : i + 1] if j < first else t[i] for j, t in enumerate(dz))
        rows.append(call(lambda *inputs, own=own: own.forward(*inputs)[0], zi, di, lam[i : i + 1]))
    return rows


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    scale = b.norm()
    assert (a - b).norm() <= tolerance * scale or (scale == 0 and not a.any()), ((a - b).norm() / scale).item()


@pytest.mark.parametrize("name", NODES)
def test_tangent_is_the_jacobian_times_a_vector(name):
    node, _, dz, _, saved, _, _ = at(name)
    expected = torch.cat(one_by_one(name, lambda phi, z, dz, lam: jvp(phi, z, dz)[1]))
    close(node.tangent(saved, dz), expected)


@pytest.mark.parametrize("name", NODES)
def test_whole_jacobian_column_by_column(name):
    """The tangents of all unit vectors of sample 0 make its Jacobian, that of reverse mode."""
    node, _, dz, _, saved, _, _ = at(name)
    columns, zeros = [], [torch.zeros_like(t) for t in dz]
    for j, t in enumerate(dz):
        for e in torch.eye(t[0].numel(), dtype=F64):
            unit = torch.zeros_like(t)
            unit[0] = e.reshape(t.shape[1:])
            columns.append(node.tangent(saved, (*zeros[:j], unit, *zeros[j + 1 :])))
    ours = torch.stack([c[0].reshape(-1) for c in columns], 1)
    assert not torch.stack([c[1:] for c in columns]).any()  # no other sample moves

    def reverse(phi, z, dz, lam):
        rows = torch.autograd.functional.jacobian(phi, z)
        return torch.cat([r.reshape(lam.numel(), -1) for r in rows], 1)

    close(ours, one_by_one(name, reverse)[0])


@pytest.mark.parametrize("name", NODES)
def test_adjoint_is_the_transposed_jacobian(name):
    node, _, _, lam, saved, _, _ = at(name)
    found = node.adjoint(saved, lam)
    expected = one_by_one(name, lambda phi, z, dz, lam: vjp(phi, *z)[1](lam))
    for j, part in enumerate(found):
        close(part.clone(), torch.stack([e[j].reshape(part.shape[1:]) for e in expected]))


@pytest.mark.parametrize("name", NODES)
def test_second_order_form_is_the_derivative_of_the_adjoint(name):
    node, _, dz, lam, saved, _, _ = at(name)

    def derivative(phi, z, dz, lam):
        return jvp(lambda *inputs: vjp(phi, *inputs)[1](lam), z, dz)[1]

    expected = one_by_one(name, derivative)
    found = (
        (None,) * len(dz) if node.second_order is None else node.second_order(saved, lam)(dz, node.tangent(saved, dz))
    )
    for j, part in enumerate(found):
        whole = torch.stack([e[j] for e in expected]).reshape(n, -1)
        close(torch.zeros_like(whole) if part is None else part.reshape(n, -1), whole)


@pytest.mark.parametrize("name", NODES)
def test_second_order_form_is_symmetric(name):
    """<lam, D^2 phi[u, v]> = <lam, D^2 phi[v, u]>."""
    node, _, u, lam, saved, _, _ = at(name)
    if node.second_order is None:
        assert name in ("add", "embedding", "embedding-cls", "pool-cls", "pool-mean")
        return
    v = tuple(normal(*t.shape, seed=30 + i) for i, t in enumerate(u))
    form = node.second_order(saved, lam)

    def pair(a, b):
        return sum((x * y).sum() for x, y in zip(form(a, node.tangent(saved, a)), b) if x is not None)

    uv, vu = pair(u, v), pair(v, u)
    size = sum(t.norm() for t in u) * sum(t.norm() for t in v)
    assert abs(uv - vu) <= 1e-12 * size
    assert name == "relu" or abs(uv) > 1e-6 * size


def dense_forms(name):
    """M and its majorant of sample 0 on all its inputs together, as matrices, and whether the node is bilinear."""
    node, _, dz, lam, saved, _, _ = at(name)
    forms, out = (node.second_order(saved, lam), node.majorant(saved, lam)), []
    for form in forms:
        columns = []
        for j, t in enumerate(dz):
            for e in torch.eye(t[0].numel(), dtype=F64):
                unit = [torch.zeros_like(u) for u in dz]
                unit[j][0] = e.reshape(t.shape[1:])
                parts = form(tuple(unit), node.tangent(saved, tuple(unit)))
                columns.append(torch.cat([torch.zeros(u[0].numel(), dtype=F64) if q is None else q[0].reshape(-1)
                                          for q, u in zip(parts, dz)]))  # fmt: skip
        out.append(torch.stack(columns, 1))
    return *out, isinstance(node, calculus.BILINEAR)


@pytest.mark.parametrize("name", [name for name, (node, _, _) in NODES.items() if node.second_order is not None])
def test_majorant_of_a_node(name):
    """Symmetric, at least M and -M; of a node with one input exactly |M|, of a coupling its two halves."""
    M, majorant, bilinear = dense_forms(name)
    scale = torch.linalg.matrix_norm(M, 2)
    close(majorant, majorant.T)
    assert torch.linalg.eigvalsh(majorant - M)[0] >= -1e-12 * scale
    assert torch.linalg.eigvalsh(majorant + M)[0] >= -1e-12 * scale
    values, vectors = torch.linalg.eigh((M + M.T) / 2)  # |[[0, C], [C^T, 0]]| has the halves |C^T| and |C|
    close(majorant, vectors @ (values.abs()[:, None] * vectors.T), 1e-9)
    assert name == "relu" or scale > 0
    assert bilinear == (len(NODES[name][1]) > 1)


@pytest.mark.parametrize("size", [1e-200, 1e-310])
@pytest.mark.parametrize("name", [name for name, (node, _, _) in NODES.items() if node.second_order is not None])
def test_majorant_of_a_saturated_node(name, size):
    """Adjoints whose squares underflow give a majorant of their size, not infinity."""
    node, _, dz, lam, saved, _, _ = at(name)
    parts = node.majorant(saved, size * lam)(dz, node.tangent(saved, dz))
    whole = node.majorant(saved, lam)(dz, node.tangent(saved, dz))
    for part, expected in zip(parts, whole):
        if expected is not None:
            assert part.isfinite().all() and part.abs().max() <= 1.001 * size * expected.abs().max() + 1e-300


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("name", NETWORKS_FOR_MAJORANT)
def test_majorant_of_a_network(name, balanced):
    """-Q <= h_i <= Q for every sample, for sigma = 1 and for balanced couplings, which lower the norm of Q."""
    model, x, y, loss = network(name)
    losses, rows = Losses(model, x, y, loss), torch.arange(len(x))
    operator, exact = SampleHessians(losses, rows, "majorant"), SampleHessians(losses, rows)

    def dense(of):
        units = torch.eye(losses.P, dtype=F64)[:, None].expand(-1, len(x), -1)
        return torch.stack([of(e.contiguous()) for e in units], 2)

    H, Q = dense(exact), dense(operator)
    if balanced:
        plain, v = torch.linalg.eigvalsh(Q)[:, -1], operator.gradients()
        for _ in range(6):
            v = v / v.norm(dim=1, keepdim=True)
            operator.balance(v)
            v = operator(v)
        Q = dense(operator)
        assert (torch.linalg.eigvalsh(Q)[:, -1] < plain * (1 + 1e-9)).all()
        some = SampleHessians(losses, rows, "majorant")  # a part of the samples keeps its own sigma
        some.sigma = operator.sigma
        close(some(v[[3, 1]], torch.tensor([3, 1])), operator(v)[[3, 1]])
    close(Q, Q.mT)
    norms = torch.linalg.matrix_norm(H, 2)
    for difference in (Q - H, Q + H):
        assert (torch.linalg.eigvalsh((difference + difference.mT) / 2)[:, 0] >= -1e-12 * norms).all()


@pytest.mark.parametrize("name", NODES)
def test_none_stands_for_zero(name):
    node, _, dz, lam, saved, _, _ = at(name)
    form = node.second_order and node.second_order(saved, lam)
    for gone in itertools.product([False, True], repeat=len(dz)):
        nones = tuple(None if g else t for g, t in zip(gone, dz))
        zeros = tuple(torch.zeros_like(t) if g else t for g, t in zip(gone, dz))
        expected, found = node.tangent(saved, zeros), node.tangent(saved, nones)
        close(torch.zeros_like(expected) if found is None else found, expected, 1e-14)
        for a, b in zip(form(nones, found), form(zeros, expected)) if form else ():
            if b is not None:
                close(torch.zeros_like(b) if a is None else a, b, 1e-14)


@pytest.mark.parametrize("name", [name for name, (_, _, parameters) in NODES.items() if parameters])
def test_shared_direction_and_sums(name):
    """One direction for all samples is that direction in every row; `sums` adds the parameters' parts up."""
    node, _, dz, lam, saved, _, first = at(name)
    shared = tuple(t if j < first else t[0] for j, t in enumerate(dz))
    repeated = tuple(t if j < first else t[:1].expand_as(t) for j, t in enumerate(dz))
    close(node.tangent(saved, shared), node.tangent(saved, repeated))
    pairs = [(node.adjoint(saved, lam, sums=True), node.adjoint(saved, lam))]
    if node.second_order is not None:
        pairs.append(
            (node.second_order(saved, lam, sums=True)(shared, None), node.second_order(saved, lam)(repeated, None))
        )
    for summed, rows in pairs:
        for j, (a, b) in enumerate(zip(summed, rows)):
            if b is not None:
                close(a, b if j < first else b.sum(0))


# --- whole networks -----------------------------------------------------------------------------------

NETWORKS = {
    f"{norm}-{pool}-{activation}-depth{depth}-heads{heads}-{loss}": (
        dict(norm=norm, pool=pool, activation=activation, depth=depth, n_heads=heads),
        loss,
    )
    for (norm, pool), activation, (depth, heads, loss) in zip(
        [("pre", "cls"), ("post", "cls"), ("pre", "mean"), ("post", "mean"), ("pre", "cls"), ("post", "cls")],
        ["gelu", "gelu_tanh", "relu", "gelu", "gelu_tanh", "relu"],
        [
            (3, 1, "mse"),
            (2, 4, "cross_entropy"),
            (2, 2, "cross_entropy"),
            (1, 2, "mse"),
            (0, 1, "cross_entropy"),
            (1, 1, "mse"),
        ],
    )
}


def network(name):
    sizes, loss = NETWORKS[name]
    return random_weights(vit(**sizes), 4), *samples(4), loss


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_and_hessian_of_a_network(name):
    model, x, y, loss = network(name)
    value, g, hessian = reference(model, x, y, loss)
    losses = Losses(model, x, y, loss)
    tape = losses._tape(losses.point, torch.arange(len(x)), torch.ones(len(x), dtype=torch.float64))
    close(tape.losses.mean(), value, 1e-10)
    close(losses.flatten(tape.gradient()) / len(x), g, 1e-10)
    product = losses.hessian()
    close(torch.stack([product(e) for e in torch.eye(losses.P, dtype=F64)]), hessian, 1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_values_on_the_way_are_those_of_the_modules(name):
    """The chain's last value before the head is what the network's own modules compute."""
    model, x, y, loss = network(name)
    seen = {}
    model.head.register_forward_hook(lambda module, inputs, out: seen.update(v=inputs[0], f=out))
    model(x)
    values = Tape(steps_of(model), dict(model.named_parameters()), data_of(model, x), y, loss).values
    close(values["f"][:, 0].detach(), seen["f"].detach())
    head = next(s for s in steps_of(model) if s.output == "f")
    close(values[head.inputs[0]][:, 0].detach(), seen["v"].detach())


@pytest.mark.parametrize("part", ["gauss_newton", "functional"])
@pytest.mark.parametrize("name", [*list(NETWORKS)[:4], "mlp"])
def test_parts_of_the_hessian(name, part):
    if name == "mlp":
        model = random_weights(build_model("mlp", d_in=16, width=4, depth=1, n_classes=3, activation="gelu"), 4)
        x, y, loss = *samples(4), "cross_entropy"
    else:
        model, x, y, loss = network(name)
    losses = Losses(model, x, y, loss)
    f, J = model(x), []
    for row in f.flatten():
        g = torch.autograd.grad(row, list(model.parameters()), retain_graph=True, materialize_grads=True)
        J.append(torch.cat([t.reshape(-1) for t in g]))
    J = torch.stack(J).reshape(len(x), f.shape[1], -1)
    p = f.softmax(-1).detach()
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None] if loss == "cross_entropy" else torch.eye(3, dtype=F64) * 2 / 3
    gauss_newton = (J.mT @ S @ J).mean(0)
    whole = reference(model, x, y, loss)[2]
    product = losses.hessian(part=part)
    ours = torch.stack([product(e) for e in torch.eye(losses.P, dtype=F64)])
    close(ours, gauss_newton if part == "gauss_newton" else whole - gauss_newton, 1e-9)
    V = normal(len(x), losses.P, seed=6)
    close(
        losses.sample_products(V, part=part).sum(0), sum(_one(model, x, y, loss, i, part)(V[i]) for i in range(len(x)))
    )


def _one(model, x, y, loss, i, part):
    return Losses(model, x[i : i + 1], y[i : i + 1], loss).hessian(part=part)


@pytest.mark.parametrize(
    "patterns", [["head.*"], ["blocks.0.attention.query.*"], ["*.bias"], ["cls"], ["pos", "norm.*"]]
)
def test_subset_is_a_block_of_the_whole(patterns):
    model = random_weights(vit(depth=2), 5)
    x, y = samples(5)
    some, whole = Losses(model, x, y, parameters=patterns), Losses(model, x, y)
    V = normal(len(x), some.P, seed=8)
    inside = whole.flatten({name: torch.full_like(t, name in some.point) for name, t in whole.point.items()}).bool()
    padded = torch.zeros(len(x), whole.P, dtype=F64)
    padded[:, inside] = V
    close(some.sample_products(V), whole.sample_products(padded)[:, inside])
    close(some.product(V[0]), whole.product(padded[0])[inside])
    close(some.sample_gradients(), whole.sample_gradients()[:, inside])


def test_walk_does_not_compute_what_no_moving_parameter_reaches():
    model = random_weights(vit(depth=2), 5)
    x, y = samples(5)
    losses = Losses(model, x, y, parameters=["head.*"])
    tape = losses._tape(losses.point, torch.arange(len(x)))
    assert set(tape.adjoints) == {"loss", "f", "head.weight", "head.bias"}
    assert set(tape.tangents({n: torch.ones_like(t) for n, t in losses.point.items()})) == {
        "f",
        "head.weight",
        "head.bias",
    }


def test_agreement_is_rounding_in_both_precisions():
    double, single = agreement(F64), agreement(torch.float32)
    assert list(double) == list(single) and len(double) == 9
    assert max(double.values()) < 1e-14
    assert 1e-9 < max(single.values()) < 5e-6


def test_agreement_sees_an_error_in_every_expression(monkeypatch):
    """The control: tangents that are wrong by 1e-6 move each distance that far, also one that rounding leaves at 0."""

    class Wrong(calculus.Tape):
        def tangents(self, *given, **options):
            return {name: t * (1 + 1e-6) for name, t in super().tangents(*given, **options).items()}

    monkeypatch.setattr(calculus, "Tape", Wrong)
    wrong = agreement(F64)
    assert len(wrong) == 9 and all(1e-7 < value < 1e-5 for value in wrong.values())


def test_confident_sample_in_single_precision():
    """p_y - 1 and the centred tangents do not cancel: the float32 gradient and product keep six digits."""
    model = random_weights(vit(), 3, scale=0.3)
    x, y = samples(3, n=1)
    with torch.no_grad():
        model.head.bias[y[0]] += 14.0
    double, single = Losses(model, x, y), Losses(model, x, y, dtype=torch.float32)
    assert double.values()[0] < 1e-5
    V = normal(1, double.P)
    close(single.sample_gradients().double(), double.sample_gradients(), 2e-6)
    close(single.sample_products(V.float()).double(), double.sample_products(V), 2e-5)


@pytest.mark.parametrize("right", [True, False])
def test_saturated_softmax_keeps_a_symmetric_hessian(right):
    """One class has probability 1 - 1e-10, the label or another: S = p_1 p_2 [[1, -1], [-1, 1]] to rounding."""
    node = calculus.CrossEntropy(torch.tensor([0 if right else 1]))
    f = torch.tensor([[[23.0, 0.0]]], dtype=F64)
    _, saved = node.forward(f)
    form = node.second_order(saved, torch.ones(1, dtype=F64))
    S = torch.stack([form((e[None, None],), None)[0][0, 0] for e in torch.eye(2, dtype=F64)])
    small = 1 / (1 + torch.exp(f[0, 0, 0]))
    expected = small * (1 - small) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64)
    close(S, expected, 1e-15)


def test_only_exact_types_are_known():
    class Mine(ViT):
        pass

    model = vit()
    assert known(model) and known(build_model("mlp", d_in=4, width=3, depth=0, n_classes=2))
    assert not known(Mine(model.config)) and not known(torch.nn.Linear(2, 2))


def test_unknown_part_is_refused():
    x, y = samples()
    refused(lambda: Losses(vit(), x, y).hessian(part="half"), "part is 'half'")
