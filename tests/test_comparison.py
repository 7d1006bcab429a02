"""The comparison system: every constant, every rate, every unknown, the integration, and the final numbers.

The bounds are compared with exact norms at random points of the ball and where an ascent of the norm ends.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused
from test_bounds import flat, moved, norm2, samples, small_vit, unflat
from torch.func import functional_call, grad, jacfwd, jvp, vmap

from utils import bounds, calculus, comparison
from utils.comparison import certified_path, comparison_system, hessian_norm_on_ball, integrate
from utils.models import ACTIVATIONS, build_model, loss_from_logits

SETTINGS = settings(derandomize=True, deadline=None, max_examples=6, database=None)
SLACK = 1 + 1e-8

architectures = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["pre", "post"]),
        "pool": st.sampled_from(["cls", "mean"]),
        "depth": st.sampled_from([1, 2]),
        "activation": st.sampled_from(["gelu", "gelu_tanh"]),
        "n_heads": st.sampled_from([1, 2]),
        "eps": st.sampled_from([1e-5, 1e-2]),
    }
)
cases = {
    "seed": st.integers(0, 10**6),
    "scale": st.sampled_from([0.3, 0.8, 1.5]),
    "loss": st.sampled_from(["cross_entropy", "mse"]),
    "sizes": architectures,
}


def selected(model, names):
    """Which coordinates of the flat weights belong to the named parameters."""
    return torch.cat([torch.full((p.numel(),), n in names) for n, p in model.named_parameters()])


def hessian_at(model, x, y, loss, w):
    """The dense Hessian (P, P) of one sample's loss at the flat weights w."""

    def value(w):
        return loss_from_logits(functional_call(model, unflat(model, w), (x[None],)), y[None], loss)[0]

    return jacfwd(grad(value))(w)


def ascent(model, x, y, loss, U, V, R, steps=4):
    """The largest ||V^T H(w_0 + U c) V|| met on an ascent of v^T H v over |c| <= R, v the top eigenvector."""
    w0, c, best = flat(model), torch.zeros(U.shape[1], dtype=torch.float64), 0.0

    def curvature(c, v):
        def value(w):
            return loss_from_logits(functional_call(model, unflat(model, w), (x[None],)), y[None], loss)[0]

        return jvp(lambda w: jvp(value, (w,), (v,))[1], (w0 + U @ c,), (v,))[1]

    for _ in range(steps):
        values, vectors = torch.linalg.eigh(V.T @ hessian_at(model, x, y, loss, w0 + U @ c) @ V)
        top = int(values.abs().argmax())
        best = max(best, float(values[top].abs()))
        slope = values[top].sign() * grad(curvature)(c, V @ vectors[:, top])
        c = R * slope / slope.norm().clamp_min(1e-300)  # the largest value lies on the sphere, or nearly
    return best


def derivative(phi, u):
    return lambda t: jvp(phi, (t,), (u,))[1]


def along(phi, t, u, k):
    """|D^k phi(t) [u, ..., u]|."""
    for _ in range(k):
        phi = derivative(phi, u)
    return phi(t).norm()


def normalised(eps):
    return lambda x: (x - x.mean()) / ((x - x.mean()).square().mean() + eps).sqrt()


# --- constants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bounds.ACTIVATION_THIRD)
def test_the_third_derivative_of_activations(name):
    z = torch.linspace(-9, 9, 360_001, dtype=torch.float64)
    values = vmap(grad(grad(grad(ACTIVATIONS[name]))))(z).abs().max()
    assert values <= bounds.ACTIVATION_THIRD[name] <= values * (1 + 2e-5)


def test_the_third_derivative_of_softmax():
    """Ascent over the row and the direction of the fourth cumulant; 1/2 is attained, 2 ||Ds|| is never passed."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(60, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.05)
    for _ in range(200):
        t, u = z[:, 0], z[:, 1] / z[:, 1].norm(dim=-1, keepdim=True)
        s = t.softmax(-1)
        off = u - (s * u).sum(-1, keepdim=True)
        cumulant = ((s * off**4).sum(-1) - 3 * (s * off**2).sum(-1) ** 2).abs()
        assert cumulant.detach().max() <= comparison.SOFTMAX_THIRD
        assert (cumulant <= 2 * bounds.softmax_first(s.detach()) * SLACK).all()
        optimiser.zero_grad()
        (-cumulant.sum()).backward()
        optimiser.step()
    assert cumulant.detach().max() > 0.99 * comparison.SOFTMAX_THIRD  # the limit: two entries share all
    two = torch.tensor([0.0, 0.0], dtype=torch.float64)
    form = jacfwd(jacfwd(jacfwd(lambda t: t.softmax(-1))))(two)
    u = torch.tensor([math.sqrt(0.5), -math.sqrt(0.5)], dtype=torch.float64)
    attained = float(torch.einsum("abcd,a,b,c,d", form, u, u, u, u).abs())
    assert attained == pytest.approx(comparison.SOFTMAX_THIRD, rel=1e-12)


@pytest.mark.parametrize("d", [3, 6])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_the_third_derivative_of_layer_norm(d, eps):
    """d rho^3 |D^3 n [u, u, u] . u| by ascent over input and direction; 3 is attained across y."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(50, d, generator=generator, dtype=torch.float64)
    x = x * math.sqrt(eps) * torch.logspace(-2, 2, 50, dtype=torch.float64)[:, None]

    def fourth(x, u):
        third = derivative(derivative(derivative(normalised(eps), u), u), u)(x)
        return (third * u).sum() * d * ((x - x.mean()).square().mean() + eps) ** 1.5

    u = torch.randn(50, d, generator=generator, dtype=torch.float64)
    u = u / u.norm(dim=-1, keepdim=True)
    for _ in range(150):
        value, slope = vmap(lambda x, u: (fourth(x, u), grad(lambda u: fourth(x, u).abs() / u.norm() ** 4)(u)))(x, u)
        assert (value.abs() <= comparison.LAYER_NORM_THIRD * SLACK).all()
        u = u + 0.05 * slope / slope.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        u = u / u.norm(dim=-1, keepdim=True)
    assert value.abs().max() > 0.999 * comparison.LAYER_NORM_THIRD


@pytest.mark.parametrize(
    ("node", "phi"),
    [
        (calculus.Softmax(), lambda t: t.softmax(-1)),
        (calculus.CrossEntropy(torch.zeros(1, dtype=torch.long)), lambda t: t.softmax(-1)),
        (calculus.Normalisation(1e-2), normalised(1e-2)),
    ],
)
def test_constants_hold_away_from_the_centre(node, phi):
    """`_constants` within a way of the centre against the node's derivatives at random points of that sphere."""
    generator, d = torch.Generator().manual_seed(3), 5
    orders = (1, 2) if isinstance(node, calculus.CrossEntropy) else (2, 3)  # softmax is the gradient there
    step, closest = calculus.Step(node, ("x",), "z"), 0.0
    for _ in range(200):
        t, move, u = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (1, 1, 100))
        u = (u - u.mean(-1, keepdim=True)) / (u - u.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)
        move = (move - move.mean()) * 10 ** float(torch.empty(1).uniform_(-3, 0.5, generator=generator))
        constants = comparison._constants(step, d, comparison._local(step, 2 * t[None]), move.norm()[None, None])
        for bound, k in zip(constants, orders):
            found = vmap(lambda u, k=k, there=(2 * t + move)[0]: along(phi, there, u, k))(u).max()
            assert found <= float(bound) * SLACK
            closest = max(closest, float(found / bound))
    assert closest > 0.5


@pytest.mark.parametrize(
    ("node", "first", "second", "names"),
    [
        (calculus.Linear(), (4, 3), (5, 3), ("X", "W")),
        (calculus.Score(2), (3, 4), (3, 4), ("Q", "K")),
        (calculus.Mixing(2), (2, 3, 3), (3, 4), ("A", "V")),
    ],
)
def test_products_are_met_by_the_spectral_norm_of_their_parts(node, first, second, names):
    """max of <lam, phi(x', y')> over |x'| = |y'| = 1, from the node's own form, is `_coupling` on `_inputs_of`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    step, q = calculus.Step(node, names, "z"), math.prod(second)
    x, y = draw(1, *first), draw(1, *second) if names[1] != "W" else draw(*second)
    z, saved = node.forward(x, y)
    lam = draw(3, *z.shape[1:])  # the derivatives of an adjoint along three directions
    if names[1] == "K":
        lam = comparison._centred(lam)  # softmax follows, so an adjoint of scores has rows with sum 0
    units = torch.eye(q, dtype=torch.float64).reshape(q, *second)
    sizes = []
    for weights in torch.eye(3, dtype=torch.float64).tolist() + draw(20, 3).tolist():
        weights = torch.tensor(weights, dtype=torch.float64)
        one = torch.tensordot(weights / weights.norm(), lam, 1)[None]
        C = torch.cat([node.second_order(saved, one)((None, e[None]), None)[0].flatten(1) for e in units])
        sizes.append(norm2(C))
        scale = comparison._inputs_of(step, {names[0]: draw(1, *first) * 0 + 1})[0].norm() / math.sqrt(math.prod(first))
        alone = float(comparison._coupling(comparison._matrices_of(step, one)) * scale)
        assert alone == pytest.approx(sizes[-1], rel=1e-9)  # one direction: nothing is lost
    together = float(comparison._coupling(comparison._matrices_of(step, lam)) * scale)
    assert max(sizes) * (1 - 1e-12) <= together <= math.sqrt(3) * max(sizes) * SLACK


def test_columns_of_the_gain():
    """|gamma' o n'| <= |gamma'| max_j |n'_.j|, attained; a push of one column is what `_inputs_of` measures."""
    generator = torch.Generator().manual_seed(1)
    step = calculus.Step(calculus.Affine(), ("n", "gamma", "beta"), "z")
    n, gamma = torch.randn(1, 4, 3, generator=generator).double(), torch.randn(1, 3, generator=generator).double()
    first, second = comparison._inputs_of(step, {"n": n, "gamma": gamma})
    columns = comparison._part_norms(first)
    torch.testing.assert_close(columns, n[0].norm(dim=0))
    assert (n * gamma).norm() <= columns.max() * comparison._part_norms(second).max() * SLACK
    best = torch.nn.functional.one_hot(columns.argmax(), 3)[None].double()
    assert float((n * best).norm()) == pytest.approx(float(columns.max()))


# --- the integration ------------------------------------------------------------------------------------


def test_steps_from_rest():
    """A chain of five unknowns of which the last has rate 0 at first, and a ring of three: both exist for ever."""
    chain, start = torch.diag(torch.ones(4, dtype=torch.float64), -1), torch.zeros(1, 5, dtype=torch.float64)
    start[0, 0] = 1.0
    values, _ = integrate(lambda u: u @ chain.T, start, [0.5, 1.0], at=4)
    exact = torch.tensor([0.5**4, 1.0], dtype=torch.float64) / 24
    assert (exact <= values[0]).all() and (values[0] <= 1.5 * exact + 1e-4).all()
    ring = torch.roll(torch.eye(3, dtype=torch.float64), 1, 0)
    values, _ = integrate(lambda u: u @ ring.T, torch.eye(3, dtype=torch.float64)[:1], [0.5], at=0)
    exact = float(torch.linalg.matrix_exp(0.5 * ring)[0, 0])
    assert exact <= float(values) <= 1.05 * exact


@pytest.mark.parametrize("u0", [0.5, 1.0, 7.0])
def test_a_scalar_equation_that_blows_up(u0):
    """u' = u^2: u_0 / (1 - u_0 r), never passed from below, close to it, inf after the blow-up."""
    u = torch.tensor([[u0]], dtype=torch.float64)
    shares = torch.tensor([0.0, 0.01, 0.3, 0.5, 0.9, 1.0, 1.5], dtype=torch.float64)
    values, reached = integrate(lambda u: u**2, u, shares / u0, factors=(2.0, 10.0, 100.0))
    exact = u0 / (1 - shares[:5])
    assert (values[0, :5] >= exact).all() and (values[0, :4] <= exact[:4] * 1.1).all()
    assert values[0, 0] == u0 and values[0, 5:].isinf().all()
    ends = (1 - 1 / torch.tensor([2.0, 10.0, 100.0], dtype=torch.float64)) / u0
    assert (reached[0] <= ends).all() and (reached[0] >= 0.9 * ends).all()


def test_a_system_and_its_rows():
    """Rows are systems of their own; linear growth is exact, exponential growth is bounded, rest never blows up."""
    u = torch.tensor([[1.0, 3.0], [1.0, 0.0]], dtype=torch.float64)  # u' = (v, 0)
    values, reached = integrate(lambda u: torch.stack([u[:, 1], 0 * u[:, 1]], 1), u, [0.5, 2.0], factors=(4.0,))
    torch.testing.assert_close(values, torch.tensor([[2.5, 7.0], [1.0, 1.0]], dtype=torch.float64), rtol=1e-9, atol=0)
    assert float(reached[0, 0]) == pytest.approx(1.0) and reached[1, 0].isinf()
    u = torch.ones(1, 2, dtype=torch.float64)  # cosh and sinh
    values, _ = integrate(lambda u: u.flip(1), u, [0.1, 1.0, 3.0])
    exact = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64).exp()
    assert (values[0] >= exact).all() and (values[0] <= exact * 1.2).all()


# --- unknowns -------------------------------------------------------------------------------------------


@SETTINGS
@given(**cases)
def test_the_centre_is_exact_and_rates_are_nondecreasing(seed, scale, loss, sizes):
    model = small_vit(seed, scale, **sizes)
    x, y = samples(seed, n=2)
    system = comparison_system(model, x, y, loss)
    norms = [norm2(hessian_at(model, a, b, loss, flat(model))) for a, b in zip(x, y)]
    exact = torch.tensor(norms, dtype=torch.float64)
    torch.testing.assert_close(system.start[:, system.norm_at], exact, rtol=1e-8, atol=1e-13)
    bound = hessian_norm_on_ball(model, x, y, 0.0, loss, factors=())
    torch.testing.assert_close(bound.values[:, 0], exact, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(system.L, system.L.mT, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(seed)
    low = system.start * (1 + torch.rand(system.start.shape, generator=generator, dtype=torch.float64))
    high = low * (1 + 0.5 * torch.rand(low.shape, generator=generator, dtype=torch.float64))
    assert (system.rates(low) <= system.rates(high) * SLACK).all() and (system.rates(low) >= 0).all()


def third_terms(model, x, y, loss, direction):
    """Of each step that bends: (step, tangent of its first input, lambda, <lambda, D^3 phi>, 3 <mu, D^2 phi>)."""
    point = {name: p.detach() for name, p in model.named_parameters()}
    chain = [*calculus.steps_of(model), calculus.Step(calculus.LOSS_NODES[loss](y), ("f",), "loss")]
    walks = comparison._Walks(chain, point, calculus.data_of(model, x), set(point), 1)
    tangents = walks.tangents({name: t[None] for name, t in direction.items()})
    back, terms = walks.adjoint_tangents(tangents), []
    zero, one = torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)
    for step in chain:
        if not comparison._bends(step, walks.alive):
            continue
        values = [walks.values[name] for name in step.inputs]
        moves = [tangents[name] for name in step.inputs]
        if isinstance(step.node, calculus.Affine | calculus.Linear):  # one sample: parameters have no leading axis
            moves[1:] = [m[0] for m in moves[1:]]

        def phi(t, node=step.node, values=values, moves=moves):
            return node.forward(*(v + t * m for v, m in zip(values, moves)))[0]

        second = derivative(derivative(phi, one), one)
        lam = comparison._output_of(step, walks.adjoints[step.output])
        mu = 0 * lam if step.output == "loss" else comparison._output_of(step, back[step.output])
        third = (lam * derivative(second, one)(zero)).sum()
        terms.append((step, moves[0], lam, third, 3 * (mu * second(zero)).sum()))
    return terms


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_identity_for_the_third_derivative(norm, pool, loss):
    """(eq:third-derivative) along one direction, and the rate of ||H|| in it against the sum of the terms' sizes."""
    model = small_vit(3, 0.8, norm=norm, pool=pool, depth=2)
    x, y = samples(3, n=1)
    u = torch.randn(flat(model).shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u = u / u.norm()
    direction = unflat(model, u)

    def value(w):
        return loss_from_logits(functional_call(model, unflat(model, w), (x,)), y, loss)[0]

    exact = derivative(derivative(derivative(value, u), u), u)(flat(model))
    terms = third_terms(model, x, y, loss, direction)
    assert float(sum(a + b for *_, a, b in terms)) == pytest.approx(float(exact), rel=1e-9)
    system = comparison_system(model, x, y, loss, directions={name: t[None] for name, t in direction.items()})
    rate = float(system.named(system.rates(system.start))["L"][0, 0, 0])
    assert float(sum(a.abs() + b.abs() for *_, a, b in terms)) <= rate * SLACK


def test_the_rates_of_a_scalar_network_are_exact():
    """All values are numbers, so no norm loses anything: the rates are sums of sizes, with act''' at its maximum."""
    torch.manual_seed(2)
    model = build_model("mlp", d_in=1, width=1, depth=2, n_classes=1, activation="gelu", bias=True).double()
    x, y = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([0])
    direction = unflat(model, torch.randn(flat(model).shape, dtype=torch.float64))
    system = comparison_system(model, x, y, "mse", directions={name: t[None] for name, t in direction.items()})
    now, rate = system.named(system.start), system.named(system.rates(system.start))
    expected, K = 0.0, []
    for z, (step, move, lam, third, rest) in enumerate(third_terms(model, x, y, "mse", direction)):
        size = float(move.abs().sum())
        if isinstance(step.node, calculus.Activation):
            third = bounds.ACTIVATION_THIRD["gelu"] * lam.abs() * size**3
            K.append(float(system.rows[z][2]) * size**2)
        elif isinstance(step.node, calculus.SquaredError):
            K.append(2 * size**2)
        else:
            K.append(2 * size * float(direction[step.inputs[1]].abs().sum()))
        expected += float(third.abs().sum() + rest.abs())
    assert float(rate["L"][0, 0, 0]) == pytest.approx(expected, rel=1e-8)
    torch.testing.assert_close(rate["adjoint"], now["L"][:, 1:, 0])
    sums = now["F"][0, :, :, 1:] @ torch.tensor(K, dtype=torch.float64)
    torch.testing.assert_close(rate["F"][0, :, :, 0], sums, rtol=1e-8, atol=1e-12)


def test_a_row_that_moves_alone_counts_with_its_own_constants():
    """Two hidden numbers of which one moves by a: its bend |act''(z_0)| a^2 and adjoint |lambda_0| make the rates."""
    torch.manual_seed(0)
    model = build_model("mlp", d_in=1, width=2, depth=0, n_classes=1, activation="gelu", bias=True).double()
    x, y, a = torch.tensor([[1.3]], dtype=torch.float64), torch.tensor([0]), 0.7
    direction = {name: torch.zeros(1, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    direction["layers.0.bias"][0, 0] = a
    system = comparison_system(model, x, y, "mse", directions=direction)
    act, last = (next(z for z, s in enumerate(system.steps) if s.output == name) for name in ("layers.0.G", "f"))
    (z,), rate = model.layers[0](x).detach(), system.named(system.rates(system.start))
    bend = calculus.activation_derivatives("gelu", z)[1].abs()
    assert float(rate["F"][0, 1, last, 0]) == pytest.approx(float(bend[0]) * a**2)
    assert float(rate["ways"][0][0, 0]) == pytest.approx(a) and float(rate["ways"][0][0, 1]) == 0
    lam = (2 * (model(x) - 1) * model.layers[1].weight).detach()[0].abs()
    weak = (system.weak[act][0, :, 0] * bend).max()  # the other row's adjoint moves too
    third = bounds.ACTIVATION_THIRD["gelu"] * float(lam[0]) * a**3
    product = float(torch.minimum(weak, system.L[0, act + 1, 0] * bend[0])) * a**2
    assert float(rate["L"][0, 0, 0]) == pytest.approx(third + 3 * product)


def unknowns_at(system, r):
    """All unknowns after r, by enclosing each step with the whole state: many small steps, nothing else."""
    u, steps = system.start, 12
    for _ in range(steps):
        guess = system.rates(u)
        for _ in range(3):
            v = u + r / steps * guess * 1.1
            guess = torch.maximum(guess, system.rates(v))
        assert (u + r / steps * system.rates(v) <= v).all()
        u = u + r / steps * system.rates(v)
    return system.named(u)


@SETTINGS
@given(**cases)
def test_every_unknown_on_the_ball(seed, scale, loss, sizes):
    """F, L, adjoints and ways at points of the ball, measured anew there, against the unknowns of its radius."""
    model = small_vit(seed, scale, **sizes)
    x, y = samples(seed, n=1)
    system = comparison_system(model, x, y, loss)
    R = 0.5 * float(hessian_norm_on_ball(model, x, y, 0.0, loss, factors=(3.0,)).reach)
    above = unknowns_at(system, R)
    generator = torch.Generator().manual_seed(seed)
    for share in (1.0, 1.0, 0.4):
        step = torch.randn(flat(model).shape, generator=generator, dtype=torch.float64)
        there = comparison_system(moved(model, share * R * step / step.norm()), x, y, loss)
        assert (there.L <= above["L"] * SLACK + 1e-12).all()
        assert (there.F[:, 1:] <= above["F"][:, 1:] * SLACK + 1e-12).all()
        assert (there.adjoint <= above["adjoint"] * SLACK + 1e-12).all()
        ways = iter(above["ways"])
        for z, rows in enumerate(system.rows):
            if rows is None:
                continue
            assert (there.F[:, 0, z] <= above["F"][:, 0, z] * SLACK + 1e-12).all()
            grown = (
                (above["F"][:, 0, z] - system.F[:, 0, z])[:, None],
                (above["adjoint"] - system.adjoint)[:, z : z + 1],
            )
            for centre, now, more in zip(rows[:2], there.rows[z][:2], grown):  # row by row
                assert (now <= (centre + more) * SLACK + 1e-12).all()
            way = next(ways)
            if isinstance(system.steps[z].node, calculus.Normalisation):  # rho from below
                assert (there.rows[z][2] >= rows[2] - way / math.sqrt(system.d) - 1e-12).all()


# --- final numbers --------------------------------------------------------------------------------------


@SETTINGS
@given(**cases, subset=st.sampled_from(["all", "head", "last block", "scaled", "directions", "whole"]))
def test_the_bound_on_the_ball(seed, scale, loss, sizes, subset):
    """Never below the exact norm at random points, nor where a projected ascent ends."""
    model = small_vit(seed, scale, **sizes)
    x, y = samples(seed, n=1)
    P, generator, options = flat(model).numel(), torch.Generator().manual_seed(seed), {}
    names = [name for name, _ in model.named_parameters()]
    U = V = torch.eye(P, dtype=torch.float64)
    if subset in ("head", "last block"):
        pattern = "head.*" if subset == "head" else f"blocks.{sizes['depth'] - 1}.*"
        options["parameters"] = [pattern]
        U = V = V[:, selected(model, [n for n in names if n.startswith(pattern[:-1])])]
    if subset == "scaled":
        options["scales"] = {"blocks.*": 0.1, "head.*": 3.0, "pos": 0.0}
        scales = [0.1 if n.startswith("blocks") else 3.0 if n.startswith("head") else float(n != "pos") for n in names]
        U = V = torch.diag(
            torch.cat([torch.full((p.numel(),), s) for s, p in zip(scales, model.parameters())]).double()
        )
    if subset in ("directions", "whole"):
        U = torch.randn(P, 3, generator=generator, dtype=torch.float64) / math.sqrt(P)
        rows = [unflat(model, u) for u in U.T]
        options["directions"] = {n: torch.stack([row[n] for row in rows]) for n in names}
        options["whole"] = subset == "whole"
        V = U if subset == "directions" else V
    factors = (1.5, 5.0)
    bound = hessian_norm_on_ball(model, x, y, [0.0], loss, factors=factors, **options)
    radii = bound.reach[0].clamp(max=3.0).tolist()
    values = hessian_norm_on_ball(model, x, y, [0.0, *radii], loss, factors=(), **options).values[0]
    assert (values.diff() >= 0).all()
    exact = norm2(V.T @ hessian_at(model, x[0], y[0], loss, flat(model)) @ V)
    assert float(values[0]) == pytest.approx(exact, rel=1e-7, abs=1e-12) and float(values[0]) >= exact * (1 - 1e-9)
    for R, value, factor in zip(radii, values[1:], factors):
        assert value <= factor * values[0] * SLACK
        for _ in range(3):
            c = torch.randn(U.shape[1], generator=generator, dtype=torch.float64)
            H = hessian_at(model, x[0], y[0], loss, flat(model) + U @ (R * c / c.norm()))
            assert norm2(V.T @ H @ V) <= value * SLACK + 1e-12
        assert ascent(model, x[0], y[0], loss, U, V, R) <= value * SLACK + 1e-12


def test_the_bound_can_fail():
    """The bound of a smaller ball lies below what the ascent finds in a larger one: the comparison is not vacuous."""
    model = small_vit(5, 1.0)
    x, y = samples(5, n=1)
    reach = hessian_norm_on_ball(model, x, y, 0.0, factors=(2.0,)).reach[0]
    small, large = hessian_norm_on_ball(model, x, y, [float(reach[0]), 0.5], factors=()).values[0]
    U = torch.eye(flat(model).numel(), dtype=torch.float64)
    assert small < ascent(model, x[0], y[0], "cross_entropy", U, U, 0.5, steps=10) <= large


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_a_multilayer_perceptron(activation):
    torch.manual_seed(0)
    model = build_model("mlp", d_in=5, width=4, depth=1, n_classes=3, activation=activation, bias=True).double()
    x, y = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 2])
    bound = hessian_norm_on_ball(model, x, y, [0.0, 1e-2], factors=())
    U = torch.eye(flat(model).numel(), dtype=torch.float64)
    for i in range(2):
        assert float(bound.centre[i]) == pytest.approx(
            norm2(hessian_at(model, x[i], y[i], "cross_entropy", flat(model)))
        )
        assert ascent(model, x[i], y[i], "cross_entropy", U, U, 1e-2) <= float(bound.values[i, 1])


def test_key_biases_have_no_influence():
    model = small_vit(4)
    x, y = samples(4, n=2)
    assert (
        hessian_norm_on_ball(model, x, y, 0.5, parameters=["blocks.0.attention.key.bias"], factors=()).values.max()
        < 1e-12
    )


@pytest.mark.parametrize("sizes", [dict(pool="mean"), dict(norm="post")])
def test_adjoints_move_with_pushes(sizes):
    """d/de of dl/dz for a push e of each value, upstream and downstream of z, by automatic differentiation."""
    model = small_vit(0, 1.5, depth=2, **sizes)
    x, y = samples(3, n=1)
    chain = [*calculus.steps_of(model), calculus.Step(calculus.CrossEntropy(y), ("f",), "loss")]
    point = {n: p.detach() for n, p in model.named_parameters()}
    walks = comparison._Walks(chain, point, calculus.data_of(model, x), set(point), 1)
    names = [step.output for step in chain[:-1]]

    def loss(pushes):
        values = point | {"x": calculus.data_of(model, x)}
        for step in chain:
            values[step.output] = step.node.forward(*(values[n] for n in step.inputs))[0] + pushes.get(step.output, 0)
        return values["loss"].sum()

    zero, generator = {n: torch.zeros_like(walks.values[n]) for n in names}, torch.Generator().manual_seed(0)
    for name in names:
        push = torch.randn(zero[name].shape, generator=generator, dtype=torch.float64)
        still = {n: torch.zeros_like(t) for n, t in zero.items()} | {name: push}
        _, expected = jvp(grad(loss), (zero,), (still,))
        got = walks.adjoint_tangents(walks.tangents({name: push}))
        for n in names:
            torch.testing.assert_close(got.get(n, zero[n]), expected[n], rtol=1e-8, atol=1e-10)


def test_chunks_change_nothing():
    model = small_vit(2)
    x, y = samples(2, n=1)
    a, b = (comparison_system(model, x, y, chunk=chunk) for chunk in (7, 1000))
    torch.testing.assert_close(a.start, b.start, rtol=1e-8, atol=1e-12)


# --- paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tube", [False, True])
def test_a_certified_path(tube):
    """The balls cover both segments, and no point of them has a larger norm than certified."""
    model = small_vit(1, 0.5)
    x, y = samples(1, n=2)
    start, names = flat(model), [n for n, _ in model.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    size = 0.005 if tube else 0.02
    ends = [start + size * torch.randn(start.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    points = [{n: t.clone() for n, t in unflat(model, w).items()} for w in (start, *ends)]
    parameters = [n for n in names if n != "pos"] if not tube else None
    if not tube:
        points = [{n: t for n, t in point.items() if n != "pos"} for point in points]
    found = certified_path(model, x, y, points, factor=3.0, parameters=parameters, tube=tube, most=400)
    assert found.covered == pytest.approx(found.length) and found.measured >= len(found.radii) > 1
    low, high = found.positions - found.radii, found.positions + found.radii
    assert low[0] <= 0 and high[-1] >= found.length and (low[1:] <= high[:-1] * SLACK).all()  # no gap between the balls
    names_of = list(points[0])
    first = math.sqrt(sum(float((points[1][n] - points[0][n]).square().sum()) for n in names_of))
    at = int((found.positions <= first).sum()) // 2  # some centre on the first segment, measured anew
    share = float(found.positions[at]) / first
    there = {n: (1 - share) * points[0][n] + share * points[1][n] for n in names_of}
    here = unflat(model, start) | there
    twin = moved(model, torch.cat([here[n].flatten() for n in names]) - start)
    where = {"directions": {n: ((points[1][n] - points[0][n]) / first)[None] for n in names_of}, "whole": True}
    system = comparison_system(twin, x, y, parameters=parameters, **({} if tube else where))
    reach = integrate(system.rates, system.start, [], system.norm_at, (3.0,))[1].min()
    assert float(found.radii[at]) == pytest.approx(float(reach), rel=1e-6)
    keep = selected(model, parameters or names)
    for a, b in itertools.pairwise(points):
        for share in torch.linspace(0, 1, 12).tolist():
            here = unflat(model, start) | {n: (1 - share) * a[n] + share * b[n] for n in a}
            w = torch.cat([here[n].flatten() for n in names])
            for i in range(2):
                H = hessian_at(model, x[i], y[i], "cross_entropy", w)[keep][:, keep]
                assert norm2(H) <= float(found.largest[i]) * SLACK
    few = certified_path(model, x, y, points, factor=3.0, parameters=parameters, tube=tube, most=1)
    assert few.measured == 1 and few.covered < few.length


# --- refusals -------------------------------------------------------------------------------------------


def test_what_is_refused():
    model, (x, y) = small_vit(0), samples(0)
    refused(lambda: hessian_norm_on_ball(small_vit(0, activation="relu"), x, y, 0.1), "ReLU")
    refused(lambda: hessian_norm_on_ball(torch.nn.Linear(2, 2), x, y, 0.1), "Linear")
    refused(lambda: hessian_norm_on_ball(small_vit(0, eps=0.0), x, y, 0.1), "eps")
    refused(lambda: hessian_norm_on_ball(model, x, y, -1.0), "radius")
    refused(lambda: hessian_norm_on_ball(model, x, y, []), "radius")
    refused(lambda: hessian_norm_on_ball(model, x, y, math.inf), "radius")
    refused(lambda: hessian_norm_on_ball(model, x, y, 0.1, "hinge"), "hinge")
    refused(lambda: hessian_norm_on_ball(model, x, y.double(), 0.1), "class")
    refused(lambda: hessian_norm_on_ball(model, x, y, 0.1, parameters=["nothing"]), "nothing")
    refused(lambda: hessian_norm_on_ball(model, x, y, 0.1, whole=True), "directions")
    refused(lambda: hessian_norm_on_ball(model, x, y, 0.1, scales={"head.*": -1.0}), "scales")
    refused(lambda: hessian_norm_on_ball(model, x, y, 0.1, directions={"head.bias": torch.zeros(2)}), "directions")
    refused(lambda: hessian_norm_on_ball(model, x * math.nan, y, 0.1), "NaN")
    refused(lambda: hessian_norm_on_ball(model, x, y, 0.1, scales={"hed.*": 5.0}), "hed")
    refused(lambda: hessian_norm_on_ball(model, x, y + 7, 0.1), "classes")
    refused(lambda: hessian_norm_on_ball(model, x[..., None, :, :, 0], y, 0.1), "shape")
    refused(lambda: hessian_norm_on_ball(model, x, y, 0.1, factors=(0.5,)), "factors")
    line = {"head.bias": torch.ones(1, 3)}
    refused(lambda: hessian_norm_on_ball(model, x, y, 0.1, parameters=["head.*"], directions=line), "parameters")
    refused(
        lambda: hessian_norm_on_ball(model, x, y, 0.1, directions={"head.bias": math.nan * torch.ones(1, 3)}), "finite"
    )
    bias = {"head.bias": torch.ones(3)}
    refused(lambda: certified_path(model, x, y, [{}, {}]), "length")
    refused(lambda: certified_path(model, x, y, [{}, {"head.bias": math.nan * torch.ones(3)}]), "length")
    refused(lambda: certified_path(model, x, y, [{}, bias], parameters=["blocks.*"], tube=True), "tube")
    refused(lambda: certified_path(model, x, y, [{}, {}], factor=1.0), "factor")
    refused(lambda: certified_path(model, x, y, [{}, {"nothing": x}]), "named_parameters")
