"""Prior and activations: every jet, size and displacement of every value of the chain against what
it bounds, on networks of every kind.

The bounds are loose by orders of magnitude, so that a slip in one norm cannot show in the final
number: every intermediate quantity is compared.
"""

from __future__ import annotations

import math

import pytest
import torch
from bounded import bilinear_norm, chain_values, columns, norm2
from networks import NETWORKS, flat, random_mlp, random_vit, small_first, uneven_examples
from refusal import refused
from torch.func import jacfwd

from utils.bounds import SLOPES, hessian_bounds, measured_norms
from utils.bounds.subject import subject
from utils.bounds.walk import known_values, still
from utils.calculus.nodes.known import Known, Situation

SLACK = 1 + 1e-9
ROWS = torch.tensor([0])


def known(model, x, y, rung: str, radius: float = 0.0):
    """The chain, the model it is of, and what is known of every value of the first example."""
    of = subject(model, x, y, "cross_entropy")
    with torch.no_grad():
        return of, known_values(of, ROWS, Situation(still(of), radius, rung == "activations"))


def number(value) -> float:
    return float(torch.as_tensor(value).max())


@pytest.mark.parametrize("name", small_first(NETWORKS))
def test_every_first_derivative(name):
    """||dz/dw_g|| <= a_g of both rungs for every value z and group g; where values are used some
    are equal."""
    model = NETWORKS[name]()
    x, y = uneven_examples(1, 7)
    of, data = known(model, x, y, "activations")
    _, prior = known(model, x, y, "prior")
    w = flat(model)
    index = columns(model, of.groups)
    J = jacfwd(lambda w: chain_values(of.chain, model, w, x[0]))(w)
    sharp = []
    for value, jacobian in J.items():
        jacobian = jacobian.reshape(-1, len(w))
        for g, ig in enumerate(index):
            measured = norm2(jacobian[:, ig])
            bounds = [number(rung[value].jet.a[:, g]) for rung in (data, prior)]
            assert min(bounds) >= measured * (1 - 1e-9) - 1e-12, (value, of.groups[g])
            if measured > 1e-12:
                sharp.append(bounds[0] / measured)
    assert min(sharp) < 1 + 1e-6  # the comparison is not idle


CURVED = ["pre mean gelu_tanh", "post mean gelu", "mlp", "heads with a mask", "convolutions"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVED)
def test_every_second_derivative(name):
    """||d2z/dw_g dw_g'|| <= B_gg' of both rungs, for the values that linear maps read and make."""
    model = NETWORKS[name]()
    x, y = uneven_examples(1, 7)
    of, data = known(model, x, y, "activations")
    _, prior = known(model, x, y, "prior")
    w = flat(model)
    index = columns(model, of.groups)
    made = [step.output for step in of.chain.steps if step.place.startswith(("linear", "layer_"))]
    sizes = {value: data[value].value.numel() for value in made}
    made = [value for value in made if sizes[value] <= 24]

    def values(w):
        every = chain_values(of.chain, model, w, x[0])
        return torch.cat([every[value].flatten() for value in made])

    T = jacfwd(jacfwd(values))(w).split([sizes[value] for value in made])
    for value, second in zip(made, T, strict=True):
        for g, ig in enumerate(index):
            for k in range(g, len(index)):
                block = second[:, ig][:, :, index[k]]
                if float(block.norm()) < 1e-12:
                    continue
                measured = bilinear_norm(block, rounds=2)
                for rung in (data, prior):
                    bound = number(rung[value].jet.B[:, g, k])
                    assert bound >= measured * (1 - 1e-9), (value, of.groups[g], of.groups[k])


def sizes_of(t: torch.Tensor) -> dict[str, float]:
    """What the sizes of a `Known` bound, of one value (1, *shape)."""
    rows = t[0].reshape(-1, t.shape[-1]) if t.ndim > 1 else t.reshape(1, 1)
    away = rows - rows.mean(0)
    return {
        "full": float(rows.norm()),
        "row": float(rows.norm(dim=1).max()),
        "centred": float(away.norm()),
    }


def within(known: Known, t: torch.Tensor) -> None:
    """The sizes of a value hold."""
    for name, size in sizes_of(t).items():
        assert size <= number(getattr(known, name)) * SLACK + 1e-12, name
    assert norm2(t[0].reshape(-1, t.shape[-1])) <= number(known.norm()) * SLACK + 1e-12


BALLS = [name for name in NETWORKS if "relu" not in name]


@pytest.mark.parametrize("name", small_first(BALLS))
def test_sizes_and_displacements_on_the_ball(name):
    """At weights of the ball, random and along one parameter alone, every value is as large and as
    far from its centre as stated at most, by both rungs."""
    model = NETWORKS[name]()
    x, y = uneven_examples(1, 3)
    radius = 0.1
    of, data = known(model, x, y, "activations", radius)
    _, prior = known(model, x, y, "prior", radius)
    w = flat(model)
    centre = chain_values(of.chain, model, w, x[0])
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(len(w), generator=generator, dtype=torch.float64) for _ in range(3)]
    for ig in columns(model, of.groups):
        step = torch.zeros_like(w)
        step[ig] = w[ig]
        steps.append(step)
    close = []
    with torch.no_grad():
        for step in steps:
            there = chain_values(of.chain, model, w + radius * step / step.norm(), x[0])
            for value, t in there.items():
                if not t.isfinite().all():  # masked scores
                    continue
                within(data[value], t)
                within(prior[value], t)
                distance = float((t - centre[value]).norm())
                bound = number(data[value].moved)
                assert distance <= bound * SLACK + 1e-12, value
                close.append(distance / max(bound, 1e-300))
    assert max(close) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", small_first(BALLS))
def test_the_ball_of_radius_zero_is_the_point(name):
    """Values tend to those of the point as the radius does, grow with it, and stay below the
    prior's."""
    model = NETWORKS[name]()
    x, y = uneven_examples(2, 1)
    last = hessian_bounds(model, x, y).values
    near = hessian_bounds(model, x, y, radius=1e-13).values
    torch.testing.assert_close(near, last, rtol=1e-6, atol=0)
    for radius in (1e-6, 1e-3, 1e-1, 10.0):
        here = hessian_bounds(model, x, y, radius=radius).values
        prior = hessian_bounds(model, x, y, rung="prior", radius=radius).values
        assert (last <= here * SLACK).all() and (here <= prior * SLACK).all()
        last = here


def test_attention_on_the_ball_leaves_saturation():
    """Rows nearly one-hot, large keys and values: a small move of one query bias opens the rows,
    and the attention's norms grow by orders of magnitude."""
    model = random_vit(0, d_model=2, n_heads=1, pool="mean", eps=1e-3)
    attention = model.blocks[0].attention
    with torch.no_grad():
        for p in attention.parameters():
            p.zero_()
        attention.query.bias[0] = 3.0
        attention.key.weight[0, 0] = attention.value.weight[0, 0] = 8.0
        attention.out.weight[0, 0] = 1.0
    x, y = uneven_examples(1, 2)
    of, ball = known(model, x, y, "activations", 0.3)
    w = flat(model)
    place = [n for n, p in model.named_parameters() for _ in range(p.numel())]
    entry = place.index("blocks.0.attention.query.bias")
    index = columns(model, of.groups)
    with torch.no_grad():
        for sign in (-1.0, -0.5, 0.5, 1.0):
            there = w.clone()
            there[entry] += 0.3 * sign
            for value, t in chain_values(of.chain, model, there, x[0]).items():
                within(ball[value], t)
    there = w.clone()
    there[entry] -= 0.3
    J = jacfwd(lambda w: chain_values(of.chain, model, w, x[0])[of.chain.output])(there)
    for g, ig in enumerate(index):
        assert (
            norm2(J.reshape(-1, len(w))[:, ig]) <= number(ball[of.chain.output].jet.a[:, g]) * SLACK
        )


def test_connected_network_without_biases_in_closed_form():
    """(prop:connected) for ReLU without biases: the two parts as written there bound the walk's,
    which knows the product of neighbouring maps, and the first and last entries are equal."""
    model = random_mlp(3, depth=2, activation="relu", bias=False)
    x, y = uneven_examples(2, 3)
    bound = hessian_bounds(model, x, y, rung="prior")
    W = [norm2(layer.weight.detach()) for layer in model.layers]
    for i in range(2):
        reads = [float(x[i].norm()) * math.prod(W[:p]) for p in range(4)]
        a = torch.tensor([reads[p] * math.prod(W[p + 1 :]) for p in range(4)]).double()
        B = [[0.0 if p == q else math.prod(W) / W[p] / W[q] for q in range(4)] for p in range(4)]
        B = float(x[i].norm()) * torch.tensor(B).double()
        expected = math.sqrt(2) * B + torch.outer(a, a) / 2
        assert (bound.blocks[i] <= expected * (1 + 1e-6)).all()
        torch.testing.assert_close(bound.blocks[i, 2:, 2:], expected[2:, 2:], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_variance_floor():
    """With a floor that holds, the values are smaller; with one below sqrt(eps) they are equal."""
    model = random_vit(3, 1.0, eps=1e-6, depth=2)
    x, y = uneven_examples(2, 3)
    for rung in ("closed_form", "prior"):
        free = hessian_bounds(model, x, y, rung=rung).values
        held = hessian_bounds(model, x, y, rung=rung, variance_floor=0.1).values
        below = hessian_bounds(model, x, y, rung=rung, variance_floor=1e-9).values
        assert (held < free).all()
        torch.testing.assert_close(below, free)


@pytest.mark.parametrize("names", [SLOPES, None, ("first", "A")])
@pytest.mark.parametrize("radius", [0.0, 1e-3])
def test_measured_norms(names, radius):
    """No bound grows with measured norms, and those of the point are the largest of the examples;
    examples that were measured stay bounded by the sharper rung."""
    model = random_vit(4, depth=2, eps=1e-6)
    x, y = uneven_examples(4, 4)
    found = measured_norms(model, x, radius, names)
    data = hessian_bounds(model, x, y, radius=radius)
    for (step, name), value in found.values.items():
        assert value == pytest.approx(float(data.terms[f"{step} {name}"].max()), rel=1e-9)
    for rung in ("prior", "closed_form"):
        free = hessian_bounds(model, x, y, rung=rung, radius=radius).values
        held = hessian_bounds(model, x, y, rung=rung, radius=radius, measured=found).values
        assert (held < free).all()
        assert names is None or (held >= data.values / SLACK).all()
    with pytest.raises(ValueError, match="measure them anew"):
        hessian_bounds(model, x, y, rung="prior", radius=0.1, measured=found)
    with pytest.raises(ValueError, match="takes no measured norms"):
        hessian_bounds(model, x, y, measured=found)


def test_one_token_and_saturated_and_overflow():
    """One token (softmax of one number), rows saturated to one-hot, and numbers beyond float64:
    inf, never NaN."""
    x, y = uneven_examples(2, 0)
    deep = random_vit(0, 3.0, depth=2, d_ff=5, eps=1e-80)
    huge = random_vit(0, 1e120)
    for rung in ("closed_form", "prior"):
        assert (hessian_bounds(deep, x, y, rung=rung).values == math.inf).all()
        refused(lambda r=rung: hessian_bounds(huge, x, y, rung=r), "no finite number")
    assert not hessian_bounds(deep, x, y).values.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("factor", [0.0, 1e3])
def test_each_parameter_alone_large_or_zero(norm, factor):
    """Catches a norm that reads the wrong weights, or forgets a bias or the column of ones."""
    x, y = uneven_examples(1, 4)
    names = [name for name, _ in random_vit(0, norm=norm).named_parameters()]
    for name in names:
        model = random_vit(4, 0.7, norm=norm)
        with torch.no_grad():
            model.get_parameter(name).mul_(factor)
            of, data = known(model, x, y, "activations")
            _, prior = known(model, x, y, "prior")
            values = chain_values(of.chain, model, flat(model), x[0])
            for value, t in values.items():
                within(data[value], t)
                within(prior[value], t)


def test_long_token_is_the_worst_case_of_mixing():
    """Tokens of very different length, and every query on the longest: where |O| <= ||W_V|| |X|
    fails."""
    d, heads = 8, 2
    model = random_vit(0, 0.1, d_model=d, n_heads=heads, pool="mean", eps=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for norm in (model.norm, model.blocks[0].norm1, model.blocks[0].norm2):
            norm.weight.fill_(1e-3)
            norm.weight[0] = 1.0
        model.pos[0, 0] = 50.0  # along coordinate 0, which the gain keeps
        for t in range(1, len(model.pos)):
            model.pos[t, t] = 50.0
            model.pos[t, t + 1] = -50.0
        attention = model.blocks[0].attention
        for h in range(heads):
            attention.query.bias[h * d // heads] = 30.0
            attention.key.weight[h * d // heads, 0] = 30.0
            attention.value.weight[h * d // heads, 0] = 1.0
    x, y = uneven_examples(1, 0)
    of, prior = known(model, x, y, "prior")
    _, data = known(model, x, y, "activations")
    values = chain_values(of.chain, model, flat(model), x[0])
    mixed = next(s for s in of.chain.steps if "softmax" in s.inputs[0]).output
    read = next(s for s in of.chain.steps if "attention.value.weight" in "".join(s.inputs)).inputs[
        0
    ]
    tempting = max(map(norm2, attention.value.weight.detach().view(2, 4, 8)))
    tempting *= norm2(values[read][0, 0])
    size = float(values[mixed].norm())
    assert size > 1.5 * tempting  # the tempting bound is violated here
    assert 0.8 * number(prior[mixed].full) < size <= number(prior[mixed].full) * SLACK
    assert number(data[mixed].full) == pytest.approx(size, rel=1e-9)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("module", ["attention.query", "attention.value", "mlp.fc1", "mlp.fc2"])
def test_displacement_of_a_map_that_is_zero(module, norm):
    """The whole radius in one map that is zero, along the top singular vector of what it reads: its
    value moves by R ||[X 1]||, and the bound is that but for R^2."""
    R = 1e-6
    model = random_vit(2, norm=norm, pool="mean")
    x, y = uneven_examples(1, 2)
    path = f"blocks.0.{module}"
    weights = model.get_submodule(path)
    with torch.no_grad():
        for p in weights.parameters():
            p.zero_()
        of, data = known(model, x, y, "activations", R)
        step = next(s for s in of.chain.steps if f"{path}.weight" in s.inputs)
        values = chain_values(of.chain, model, flat(model), x[0])
        X = values[step.inputs[0]].reshape(-1, weights.weight.shape[1])
        X = torch.cat([X, torch.ones_like(X[:, :1])], 1)
        top = torch.linalg.svd(X).Vh[0]
        weights.weight[0] += R * top[:-1]
        weights.bias[0] += R * top[-1]
        there = chain_values(of.chain, model, flat(model), x[0])
        distance = float((there[step.output] - values[step.output]).norm())
    assert distance == pytest.approx(R * norm2(X), rel=1e-6)
    assert distance <= number(data[step.output].moved) * SLACK
    assert number(data[step.output].moved) <= 1.01 * distance
