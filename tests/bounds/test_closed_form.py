"""The closed form: every constant against the joint derivatives that it bounds, and once more by
the rules of jets."""

from __future__ import annotations

import math

import pytest
import torch
from bounded import bilinear_norm, by_name, norm2
from networks import flat, random_vit, uneven_examples
from torch.func import functional_call, jacfwd

from utils.bounds import hessian_bounds, loss_upper_bound, measured_norms
from utils.bounds.closed_form import closed_form
from utils.calculus.jets import Jet
from utils.networks.sizes import ACTIVATIONS

SLACK = 1 + 1e-9


def blocks_of(model, w, x, stop=None):
    """h after the embedding and each block, X = LN1 h0 and the logits, at the flat weights w."""
    weights = by_name(model, w)

    def at(prefix):
        return {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}

    h = functional_call(model.embed, at("embed."), (model.patches(x[None]),))
    if model.config.pool == "cls":
        h = torch.cat([weights["cls"].expand(1, 1, -1), h], 1)
    h = h + weights["pos"]
    out = {"h0": h, "X": functional_call(model.blocks[0].norm1, at("blocks.0.norm1."), (h,))}
    for i, block in enumerate(model.blocks):
        h = out[f"h{i + 1}"] = functional_call(block, at(f"blocks.{i}."), (h,))
    v = h[:, 0] if model.config.pool == "cls" else h.mean(1)
    v = functional_call(model.norm, at("norm."), (v,))
    return out | {"f": functional_call(model.head, at("head."), (v,))}


@pytest.mark.parametrize(
    "activation, seed, scale",
    [
        pytest.param("gelu", 1, 2.5, marks=pytest.mark.slow),
        ("gelu_tanh", 2, 1.0),
        pytest.param("gelu", 0, 0.3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_constants_of_the_closed_form(activation, seed, scale):
    """t1, t2, o1, ... m2, x1, x2, P, D and E against the joint derivatives that they bound."""
    model = random_vit(seed, scale, activation=activation, pool="mean", d_model=4, d_ff=3)
    x, _ = uneven_examples(1, seed)
    form = {k: torch.as_tensor(v).flatten().tolist() for k, v in closed_form(model, x).items()}
    form = {k: v[0] for k, v in form.items()}
    c = {k.removeprefix("blocks.0."): v for k, v in form.items()}
    block, w = model.blocks[0], flat(model)
    X = blocks_of(model, w, x[0])["X"][0]

    def flat_map(module, X, node):
        """node of (X, the module's weights), both flattened into one vector."""

        def run(z):
            p = by_name(module, z[X.numel() :])
            return node(z[: X.numel()].view(X.shape), p).flatten()

        return run, torch.cat([X.detach().flatten(), flat(module)])

    def attention(name):
        def node(X, p):
            names = ("query", "key", "value")
            Q, K, V = (
                torch.stack((X @ p[f"{k}.weight"].T + p[f"{k}.bias"]).split(2, -1)) for k in names
            )
            T = Q @ K.mT / math.sqrt(2)
            mixed = torch.cat(list(T.softmax(-1) @ V), -1)
            return {"t": T, "o": mixed, "y": mixed @ p["out.weight"].T + p["out.bias"]}[name]

        return node

    def mlp(name):
        def node(X, p):
            Z = X @ p["fc1.weight"].T + p["fc1.bias"]
            G = ACTIVATIONS[activation](Z)
            return {"z": Z, "g": G, "m": G @ p["fc2.weight"].T + p["fc2.bias"]}[name]

        return node

    for module, make, names in ((block.attention, attention, "toy"), (block.mlp, mlp, "zgm")):
        for name in names:
            run, z = flat_map(module, X, make(name))
            J, T = jacfwd(run)(z), jacfwd(jacfwd(run))(z)
            assert norm2(J) <= c[f"{name}1"] * SLACK, name
            if name != "z":
                assert bilinear_norm(T) <= c[f"{name}2"] * SLACK, name
            if name in "ym":  # the residual path: Lambda l1 = P - 1
                path = (c["P_att"] if name == "y" else c["P_mlp"]) - 1
                assert norm2(J[:, : X.numel()]) * form["l1"] <= path * SLACK
    h = blocks_of(model, w, x[0])["h0"][0]
    run, z = flat_map(block.norm1, h, lambda h, p: functional_call(block.norm1, p, (h,)))
    J, T = jacfwd(run)(z), jacfwd(jacfwd(run))(z)
    assert norm2(J) <= form["x1"] * SLACK and bilinear_norm(T) <= form["x2"] * SLACK

    # the running node and the logits, jointly in all weights
    def node(name):
        return lambda w: blocks_of(model, w, x[0])[name].flatten()

    assert norm2(jacfwd(node("h0"))(w)) <= form["D0"] * SLACK
    for name, prefix in (("h1", "blocks.0."), ("f", "")):
        J, T = jacfwd(node(name))(w), jacfwd(jacfwd(node(name)))(w)
        assert norm2(J) <= form[f"{prefix}D"] * SLACK
        assert bilinear_norm(T, rounds=3) <= form[f"{prefix}E"] * SLACK


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_closed_form_follows_from_the_jet_rules(pool):
    """Each constant again by the rules of Jet, with X and the sublayer's own weights as one joint
    variable.

    Orthogonal parts of the variable add in squares where a linear map adds its own weights: [X 1]
    [W b]^T has first derivative sqrt(W^2 a^2 + |[X 1]|^2) and second W B + a.
    """
    model = random_vit(1, 1.3, d_model=6, n_heads=3, d_ff=5, depth=2, pool=pool)
    with (
        torch.no_grad()
    ):  # in the second block the last map's own weights dominate: |[O 1]|, |[G 1]|
        for last in (model.blocks[1].attention.out, model.blocks[1].mlp.fc2):
            last.weight.mul_(1e-7)
            last.bias.mul_(1e-7)
    x, _ = uneven_examples(1, 1)
    form = {k: v for k, v in closed_form(model, x).items() if k != "growth"}
    form = {
        k: float(torch.as_tensor(v)[..., 0] if torch.as_tensor(v).ndim else v)
        for k, v in form.items()
    }
    N, d, H = len(model.pos), 6, 3
    scalar = torch.ones(1, 1, dtype=torch.float64)

    def jet(a, B):
        return Jet(a * scalar, B * scalar[None])

    def numbers(j):
        return float(j.a), float(j.B)

    def joint(z, ones, W):  # z -> [z 1] [W b]^T in (z, W, b)
        a, B = numbers(z)
        return jet(math.hypot(W * a, ones), W * B + a)

    def omega(m):
        return norm2(torch.cat([m.weight, m.bias[:, None]], 1).detach())

    norms = [m for m in model.modules() if type(m).__name__ == "LayerNorm"]
    Gamma = max(float(m.weight.detach().abs().max()) for m in norms)
    beta = max(float(m.bias.detach().norm()) for m in norms)
    chi = math.sqrt(N * ((Gamma * math.sqrt(d) + beta) ** 2 + 1))
    assert form["chi"] == pytest.approx(chi)
    rho = math.sqrt(1e-2)  # D^2 n <= 48 / (25 sqrt 5) / (sqrt d eps) is the smaller of the two
    l1, l2 = Gamma / rho, Gamma * 48 / (25 * math.sqrt(5)) / math.sqrt(d) / 1e-2
    patches = model.patches(x)[0]
    D, E = math.sqrt(float(patches.square().sum()) + len(patches) + 1), 0.0
    assert form["D0"] == pytest.approx(D)

    def after(D, E, Y, path, rows):
        """h + Y(LN(h; own), own): Jet of the sublayer in (h, own), then the chain rule with Dh."""
        y1, y2 = Y
        x1, x2 = math.hypot(l1, math.sqrt(rows * d)), l2 + 1 / rho
        C = y2 * max(x1, 1) ** 2 + y1 * x2
        P = 1 + path * l1
        return math.hypot(P * D, y1 * math.sqrt(rows * d)), P * E + C * max(1.0, D) ** 2

    for i, block in enumerate(model.blocks):
        a, m, p = block.attention, block.mlp, f"blocks.{i}."
        X = jet(1.0, 0.0)
        wQ, wK, wV, wO = (omega(w) for w in (a.query, a.key, a.value, a.out))
        Q, K, V = (joint(X, chi, w) for w in (wQ, wK, wV))
        T = Q.times(K, wQ * chi, wK * chi).linear(1 / math.sqrt(d / H))
        mixed = T.smooth(0.5, math.sqrt(6) / 9).times(V, math.sqrt(N), wV * chi)
        Y = joint(mixed, math.hypot(math.sqrt(H) * wV * chi, math.sqrt(N)), wO)
        w1, w2 = omega(m.fc1), omega(m.fc2)
        Z = joint(X, chi, w1)
        G = Z.smooth(1.128904145185, 0.7978845608)
        W = joint(G, math.hypot(w1 * chi, math.sqrt(N)), w2)
        for name, j in (("t", T), ("o", mixed), ("y", Y), ("g", G), ("m", W)):
            assert (form[f"{p}{name}1"], form[f"{p}{name}2"]) == pytest.approx(
                numbers(j), rel=3e-5
            ), name
        # with fixed weights: the same rules without the weights' own parts
        plain = (
            jet(wQ, 0.0)
            .times(jet(wK, 0.0), wQ * chi, wK * chi)
            .linear(1 / math.sqrt(d / H))
            .smooth(0.5, 0.0)
        )
        att = float(plain.times(jet(wV, 0.0), math.sqrt(N), wV * chi).a) * wO
        mlp = 1.128904145185 * w1 * w2
        assert form[f"{p}P_att"] == pytest.approx(1 + att * l1, rel=3e-5)
        assert form[f"{p}P_mlp"] == pytest.approx(1 + mlp * l1, rel=3e-5)
        D, E = after(D, E, numbers(Y), att, N)
        D, E = after(D, E, numbers(W), mlp, N)
        assert (form[f"{p}D"], form[f"{p}E"]) == pytest.approx((D, E), rel=1e-3)
    if pool == "mean":
        D, E = D / math.sqrt(N), E / math.sqrt(N)
    D, E = math.hypot(l1 * D, math.sqrt(d)), l1 * E + (l2 + 1 / rho) * max(1, D) ** 2
    w = omega(model.head)
    D, E = math.hypot(w * D, chi / math.sqrt(N)), w * E + D
    assert (form["D"], form["E"]) == pytest.approx((D, E), rel=1e-3)
    assert form["M"] == pytest.approx(D**2 / 2 + math.sqrt(2) * E, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_measured_closed_form_constants(pool):
    """D and E of every block with measured norms against the joint derivatives, LayerNorms of
    different size."""
    model = random_vit(3, 0.8, pool=pool, d_ff=3, depth=2)
    with torch.no_grad():
        model.blocks[1].norm1.weight.mul_(3.0)
        model.norm.weight.mul_(0.3)
    x, _ = uneven_examples(1, 3)
    form = closed_form(model, x, measured=measured_norms(model, x, names=None))
    free = closed_form(model, x)
    for name, prefix in (("h2", "blocks.1."), ("f", "")):

        def node(w, name=name):
            return blocks_of(model, w, x[0])[name].flatten()

        J = jacfwd(node)(flat(model))
        T = jacfwd(jacfwd(node))(flat(model))
        assert norm2(J) <= float(form[f"{prefix}D"]) * SLACK
        assert bilinear_norm(T, rounds=2) <= float(form[f"{prefix}E"]) * SLACK
        assert float(form[f"{prefix}D"]) < float(free[f"{prefix}D"])


def test_growth_bounds_the_block_jacobian():
    model = random_vit(1, 1.0, pool="mean", depth=2)
    x, y = uneven_examples(1, 1)
    h = blocks_of(model, flat(model), x[0])
    growth = hessian_bounds(model, x, y, rung="closed_form").terms["growth"]
    for i, block in enumerate(model.blocks):
        J = jacfwd(lambda z, block=block: block(z.view(1, 4, 4)).flatten())(h[f"h{i}"].flatten())
        assert norm2(J) <= float(growth[0, i]) * SLACK


def test_the_ball_covers_radial_moves():
    """The whole radius spent on one tensor along itself: every quantity at the moved weights is
    within that of the ball. Weights of rank one, where the worst direction adds R exactly."""
    model = random_vit(0, 0.5)
    radius = 0.7
    x, _ = uneven_examples(1, 3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.outer(module.bias, module.weight[0]))
    enlarged = closed_form(model, x, radius)
    for name, p in model.named_parameters():
        twin = random_vit(0, 0.5)
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            twin.get_parameter(name).add_(radius * p / p.norm())
        for key, value in closed_form(twin, x).items():
            limit = torch.as_tensor(enlarged[key]) * SLACK
            assert (torch.as_tensor(value) <= limit).all(), (key, name)
        assert loss_upper_bound(twin) <= loss_upper_bound(model, radius) * SLACK
