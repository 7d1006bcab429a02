"""Rungs from the second-order forms: roots of every node, tangents, traces, and each bound against exact Hessians."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused
from test_bounds import (
    ROUNDING,
    SETTINGS,
    VITS,
    drawn,
    exact_hessian,
    group_indices,
    norm2,
    samples,
    small_vit,
)

from utils import curvature, forms
from utils.bounds import hessian_norm_bounds
from utils.curvature import Losses, SampleHessians
from utils.models import build_model

F64 = torch.float64
SUBSETS = [None, ["blocks.0.*"], ["*.query.*", "head.*"]]


def mlp(seed, activation="gelu", bias=True, depth=2):
    torch.manual_seed(seed)
    return build_model(
        "mlp", d_in=16, width=5, depth=depth, n_classes=3, activation=activation, bias=bias
    ).double()


def walk_of(model, x, y, loss="cross_entropy", parameters=None):
    losses = Losses(model, x, y, loss, parameters=parameters)
    return losses, forms.Walk(losses, 0, list(dict.fromkeys(map(forms.group_of, losses.point))))


def dense(operator, m, P):
    units = torch.eye(P, dtype=F64)[:, None].expand(-1, m, -1)
    return torch.stack([operator(e.contiguous()) for e in units], 2)


# --- nodes ------------------------------------------------------------------------------------------------


NETWORKS = {
    "pre cls": lambda: small_vit(1, depth=2, n_heads=2, d_model=4, d_ff=5),
    "post mean tanh": lambda: small_vit(
        2, depth=2, norm="post", pool="mean", activation="gelu_tanh"
    ),
    "pre mean relu": lambda: small_vit(
        3, depth=1, pool="mean", activation="relu", n_heads=1, d_model=3
    ),
    "mlp": lambda: mlp(4),
    "mlp without bias": lambda: mlp(5, "relu", bias=False),
}


def test_spectral_norm_of_large_matrices(monkeypatch):
    """At or just above the largest singular value, also where ARPACK's estimate is too low or there is none."""
    generator = torch.Generator().manual_seed(1)
    M = torch.randn(300, 420, generator=generator, dtype=F64)
    Q = torch.linalg.qr(M.T).Q.T  # every singular value is 1
    cases = (M, M.T, 1e-180 * M, 1e150 * M, M - M.mean(0), Q, torch.outer(M[0], M[1, :300]), 0 * M)
    exact = [torch.linalg.matrix_norm(m, 2).item() for m in cases]
    found = [forms.spectral(m).item() for m in cases]
    assert found == pytest.approx(exact, rel=1e-9) and found[-1] == 0
    assert all(f >= e * (1 - 1e-13) for f, e in zip(found, exact))
    listed, eigsh = [], forms.eigsh
    monkeypatch.setattr(forms, "eigsh", lambda G, *a, **k: 0.9999 * eigsh(G, *a, **k))
    assert [forms.spectral(m).item() for m in cases[:6]] == pytest.approx(
        exact[:6], rel=1e-12
    )  # refused: all of them
    eigenvalues = torch.linalg.eigvalsh
    monkeypatch.setattr(forms, "eigsh", eigsh)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda G: listed.append(len(G)) or eigenvalues(G))
    forms.spectral(M)
    assert listed == []  # the estimate was certified
    forms.spectral(M[:200])
    assert listed == [200]


@pytest.mark.parametrize("name", NETWORKS)
def test_roots_of_every_node(name):
    """One input: R^T R = |M|.  Two values: R_x^T R_x = |C^T|, R_y^T R_y = |C|.  A parameter: R x' is its gradient."""
    model, (x, y) = NETWORKS[name](), samples(1, 1)
    _, walk = walk_of(model, x, y)
    seen = 0
    for i, step in enumerate(walk.steps):
        lam = walk.tape.adjoints.get(step.output)
        if step.node.second_order is None or lam is None:
            continue
        found = {k: build() for k, _, build in forms.roots(step, walk.saved[i], lam)}
        for k, norm, _ in forms.roots(step, walk.saved[i], lam):
            assert norm.item() == pytest.approx(norm2(found[k].flatten(1)), rel=1e-9)
        form = step.node.second_order(walk.saved[i], lam)
        if isinstance(step.node, (forms.Linear, forms.Affine)):
            E = forms.units(walk.values[step.inputs[0]])
            gradients = form((E, None, None)[: len(step.inputs)], None)[1].flatten(
                1
            )  # (D, numbers in W)
            torch.testing.assert_close(
                gradients @ gradients.mT, _gram(found[0]), rtol=1e-10, atol=1e-12
            )
        elif len(step.inputs) == 1:
            E = forms.units(walk.values[step.inputs[0]])
            M = form((E,), step.node.tangent(walk.saved[i], (E,)))[0]
            if M is None:  # relu
                assert not found[0].any()
                continue
            torch.testing.assert_close(
                _absolute(M.flatten(1)), _gram(found[0]), rtol=1e-9, atol=1e-12
            )
        else:
            E = forms.units(walk.values[step.inputs[0]])
            C = form((E, None), None)[1].flatten(1)  # (numbers in x, numbers in y)
            U, s, Vh = torch.linalg.svd(C, full_matrices=False)
            torch.testing.assert_close((U * s) @ U.mT, _gram(found[0]), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close((Vh.mT * s) @ Vh, _gram(found[1]), rtol=1e-9, atol=1e-12)
        seen += 1
    assert seen >= 2


def _gram(R):
    return R.flatten(1).mT @ R.flatten(1)


def _absolute(M):
    values, vectors = torch.linalg.eigh((M + M.mT) / 2)
    return (vectors * values.abs()) @ vectors.mT


# --- tangents -----------------------------------------------------------------------------------------------


def tangents_of(walk, losses):
    """dz/dw (numbers in z, P) of every value, by one tangent walk for each weight."""
    columns = {}
    for e in torch.eye(losses.P, dtype=F64):
        for name, t in walk.tape.tangents(losses.unflatten(e[None])).items():
            if name in walk.values and name not in losses.point and t is not None:
                columns.setdefault(name, []).append(t.reshape(-1))
    return {name: torch.stack(c, 1) for name, c in columns.items() if len(c) == losses.P}


@pytest.mark.parametrize("name", ["pre cls", "post mean tanh", "mlp"])
def test_every_norm_in_the_chain(name):
    """jets >= every ||dz/dw_g||; walks back measure them exactly; G exactly; block by block of the functional part."""
    model, (x, y) = NETWORKS[name](), samples(2, 1)
    losses, walk = walk_of(model, x, y)
    index, at = {}, 0
    for parameter, t in losses.point.items():
        index.setdefault(forms.group_of(parameter), []).extend(range(at, at + t.numel()))
        at += t.numel()
    columns = [torch.tensor(index[g]) for g in walk.groups]
    jets, exact = forms.jets(walk), tangents_of(walk, losses)
    assert len(exact) > 5
    for value, J in exact.items():
        shown = J
        if value.endswith(
            ".T"
        ):  # softmax ignores what moves a whole row: keys are centred in the jets
            T = J.reshape(*walk.values[value].shape[1:], -1)
            shown = (T - T.mean(-2, keepdim=True)).reshape(J.shape)
        norms = torch.tensor([norm2(shown[:, c]) for c in columns], dtype=F64)
        assert (jets[value] >= norms * (1 - 1e-9) - 1e-12).all(), value
        place = next(i for i, step in enumerate(walk.steps) if step.output == value) + 1
        R = torch.randn(4, *walk.values[value].shape[1:], dtype=F64)
        measured = walk.zeros

        def visit(g, matrix, measured=measured):
            measured[g] = forms.spectral(matrix)

        walk.back(R, value, place, 0, visit)
        expected = torch.tensor([norm2(R.flatten(1) @ J[:, c]) for c in columns], dtype=F64)
        torch.testing.assert_close(measured, expected, rtol=1e-9, atol=1e-11)
    G = dense(SampleHessians(losses, torch.tensor([0]), "gauss_newton"), 1, losses.P)[0]
    whole, blocks = forms.gauss_newton(walk)
    assert whole.item() == pytest.approx(norm2(G), rel=1e-9)
    expected = torch.tensor([[norm2(G[a][:, b]) for b in columns] for a in columns], dtype=F64)
    torch.testing.assert_close(blocks, expected, rtol=1e-7, atol=1e-9 * norm2(G))
    F = dense(SampleHessians(losses, torch.tensor([0]), "functional"), 1, losses.P)[0]
    expected = torch.tensor([[norm2(F[a][:, b]) for b in columns] for a in columns], dtype=F64)
    for whole in (True, False):
        assert (
            forms.measured_tangents(walk, whole) >= expected * (1 - 1e-9) - 1e-10 * norm2(F)
        ).all()


# --- the rungs ------------------------------------------------------------------------------------------------


@settings(SETTINGS, max_examples=24)
@given(**VITS)
def test_small_matrices_above_exact(seed, scale, depth, width, eps, activation, norm, pool, loss):
    """Every rung >= ||H||, every entry >= its block, subsets too; tangents at most blocks, entry by entry."""
    model = drawn(seed, scale, depth, width, eps, activation, norm, pool)
    x, y = samples(seed, 1)
    Hess = exact_hessian(model, x[0], y[0], loss)
    exact, found = norm2(Hess), {}
    for rung in forms.SMALL_MATRIX:
        bound = found[rung] = hessian_norm_bounds(model, x, y, loss, rung)
        assert float(bound.values[0]) >= exact * (1 - 1e-9) - 1e-10 * exact - ROUNDING, rung
        index = group_indices(model, bound.groups)
        for g, ig in enumerate(index):
            for k in range(g, len(index)):
                block = norm2(Hess[ig][:, index[k]])
                assert (
                    float(bound.blocks[0, g, k]) >= block * (1 - 1e-9) - 1e-10 * exact - ROUNDING
                ), (rung, g, k)
        part = hessian_norm_bounds(
            model, x, y, loss, rung, parameters=[f"blocks.{depth - 1}.*", "head.weight"]
        )
        kept = torch.cat(
            [i for name, i in zip(bound.groups, index, strict=True) if name in part.groups]
        )
        assert "head" in part.groups and "embed" not in part.groups
        assert (
            float(part.values[0])
            >= norm2(Hess[kept][:, kept]) * (1 - 1e-9) - 1e-10 * exact - ROUNDING
        ), rung
    larger = found["blocks"].blocks * (1 + 1e-9) + 1e-10 * exact + ROUNDING
    assert (found["tangents"].blocks <= larger).all()


BY_PRODUCTS = dict(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 0.5, 1.0, 2.0]),
    depth=st.integers(1, 2),
    eps=st.sampled_from([1e-5, 1e-2]),
    activation=st.sampled_from(["gelu", "gelu_tanh", "relu"]),
    norm=st.sampled_from(["pre", "post"]),
    pool=st.sampled_from(["cls", "mean"]),
    loss=st.sampled_from(["cross_entropy", "mse"]),
    subset=st.sampled_from(SUBSETS),
)


@SETTINGS
@given(**BY_PRODUCTS)
def test_majorant_above_exact(seed, scale, depth, eps, activation, norm, pool, loss, subset):
    model = small_vit(
        seed, scale, depth=depth, eps=eps, activation=activation, norm=norm, pool=pool
    )
    x, y = samples(seed, n=2)
    exact = curvature.per_sample_hessian_norms(
        model, x, y, loss, parameters=subset, certify=True, max_steps=400
    )
    found = forms.majorant(model, x, y, loss, parameters=subset, confidence=0.999999, max_steps=400)
    assert (found["M"] >= exact.value * (1 - 1e-9)).all()
    assert (
        found["lower"] >= exact.value * (1 - 1e-6) - 1e-12
    ).all()  # all steps: lambda_max(Q) itself, at least ||H||
    assert (found["lower"] <= found["M"]).all()


@settings(SETTINGS, max_examples=40)
@given(products=st.sampled_from([1, 3, 10, 1000]), **BY_PRODUCTS)
def test_deflated_above_exact(
    products, seed, scale, depth, eps, activation, norm, pool, loss, subset
):
    """lower <= ||H|| <= M, for any number of products."""
    model = small_vit(
        seed, scale, depth=depth, eps=eps, activation=activation, norm=norm, pool=pool
    )
    x, y = samples(seed, n=2)
    losses = Losses(model, x, y, loss, parameters=subset)
    exact = torch.linalg.matrix_norm(dense(SampleHessians(losses, torch.arange(2)), 2, losses.P), 2)
    found = forms.deflated(model, x, y, loss, products=products, parameters=subset)
    assert (found["M"] >= exact * (1 - 1e-9) - ROUNDING).all()
    assert (found["lower"] <= exact * (1 + 1e-9) + ROUNDING).all()
    assert (found["rest"] <= found["trace"] * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_ridge_and_its_trace(name):
    """-Q - mu <= H <= Q + mu for any mu and sigma, and the walk gives tr Q to rounding."""
    model, (x, y) = NETWORKS[name](), samples(3, 3)
    for subset in SUBSETS if "blocks" in " ".join(dict(model.named_parameters())) else (None,):
        losses, rows = Losses(model, x, y, parameters=subset), torch.arange(3)
        generator = torch.Generator().manual_seed(7)
        operator = SampleHessians(losses, rows, "ridge")
        operator.mu = torch.tensor([0.01, 1.0, 100.0], dtype=F64)
        operator.balance(torch.randn(3, losses.P, generator=generator, dtype=F64))
        Q, H = dense(operator, 3, losses.P), dense(SampleHessians(losses, rows), 3, losses.P)
        torch.testing.assert_close(Q, Q.mT, rtol=1e-9, atol=1e-11)
        mu, norms = (
            operator.mu[:, None, None] * torch.eye(losses.P, dtype=F64),
            torch.linalg.matrix_norm(Q, 2),
        )
        for difference in (Q + mu - H, Q + mu + H):
            assert (
                torch.linalg.eigvalsh((difference + difference.mT) / 2)[:, 0] >= -1e-12 * norms
            ).all()
        for j in range(3):
            walk = forms.Walk(losses, j, [])
            walk.tape.mu, walk.tape.sigma = (
                operator.mu[j : j + 1],
                {i: s[j : j + 1] for i, s in operator.sigma.items()},
            )
            assert forms.ridge_trace(walk).item() == pytest.approx(Q[j].trace().item(), rel=1e-10)


def test_deflated_reaches_the_norm():
    """A bound with enough products is the norm itself where the rest of the trace is small; one product is not."""
    model, (x, y) = small_vit(11, 0.7, depth=1), samples(11, 4)
    losses = Losses(model, x, y)
    exact = torch.linalg.matrix_norm(dense(SampleHessians(losses, torch.arange(4)), 4, losses.P), 2)
    ratios = [
        (forms.deflated(model, x, y, products=q)["M"] / exact).median().item() for q in (1, 8, 64)
    ]
    assert ratios[0] > ratios[1] > ratios[2] >= 1 - 1e-9 and ratios[2] < 1.3


@pytest.mark.parametrize("decades", [2, 8, 14])
def test_krylov_spaces_are_orthonormal(decades):
    """However fast the eigenvalues fall: the bound takes V^T V = 1 for granted. Exhausted spaces end in zeros."""
    torch.manual_seed(0)
    values = torch.logspace(0, -decades, 40, dtype=F64)
    U = torch.linalg.qr(torch.randn(2, 60, 60, dtype=F64)).Q[:, :, :40]
    V, inside = forms._krylov(
        lambda u: (U @ (values[:, None] * (U.mT @ u[..., None])))[..., 0], U.sum(2), 60
    )
    gram, used = V @ V.mT, V.norm(dim=2) > 0
    assert (gram - torch.diag_embed(used.double())).abs().max() < 1e-13
    assert (inside - values.sum()).abs().max() < 1e-8 and used.sum(1).max() < 60


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_networks_of_linear_layers(activation, bias):
    """The same functions on the MLP of utils.models."""
    model, (x, y) = mlp(6, activation, bias), samples(6, 3)
    losses = Losses(model, x, y)
    exact = torch.linalg.matrix_norm(dense(SampleHessians(losses, torch.arange(3)), 3, losses.P), 2)
    groups = list(dict.fromkeys(map(forms.group_of, losses.point)))
    for rung in forms.SMALL_MATRIX:
        with torch.no_grad():
            values = torch.stack([forms.small_matrix(losses, i, groups, rung)[0] for i in range(3)])
        assert (values >= exact * (1 - 1e-9)).all(), rung
    assert (forms.deflated(model, x, y)["M"] >= exact * (1 - 1e-9)).all()
    assert (
        forms.majorant(model, x, y, confidence=0.999999, max_steps=300)["M"] >= exact * (1 - 1e-9)
    ).all()


def test_refusals_and_the_public_face():
    """The rung is the function; too few steps certify nothing; networks of unknown nodes and balls are refused."""
    model, (x, y) = small_vit(3, depth=2), samples(3)
    for rung, function, option in (
        ("majorant", forms.majorant, {"confidence": 0.9}),
        ("deflated", forms.deflated, {"products": 5}),
    ):
        bound = hessian_norm_bounds(model, x, y, rung=rung, **option)
        assert (
            torch.equal(bound.values, function(model, x, y, **option)["M"]) and bound.blocks is None
        )
        refused(lambda rung=rung: hessian_norm_bounds(model, x, y, rung=rung, radius=0.1), "ball")
    assert hessian_norm_bounds(model, x, y, rung="majorant", max_steps=2).values.isinf().all()
    refused(lambda: hessian_norm_bounds(model, x, y, rung="prior", confidence=0.9), "confidence")
    refused(lambda: hessian_norm_bounds(model, x, y, rung="blocks", variance_floor=0.1), "rho")
    model.register_forward_hook(lambda *_: None)
    for rung in forms.BY_PRODUCTS:
        refused(lambda rung=rung: getattr(forms, rung)(model, x, y), rung)
    for rung in (*forms.SMALL_MATRIX, *forms.BY_PRODUCTS):
        refused(lambda rung=rung: hessian_norm_bounds(model, x, y, rung=rung), "ViT")


@pytest.mark.parametrize("size", [1e-150, 1e-300])
def test_adjoints_whose_squares_underflow(size):
    """Where nothing moves the loss the bounds are tiny, finite and not below the norm."""
    model, (x, y) = small_vit(5, pool="mean"), samples(5, 2)
    with torch.no_grad():
        model.head.weight.mul_(size)
        model.head.bias.mul_(0)
    for rung in (*forms.SMALL_MATRIX, "deflated"):
        values = hessian_norm_bounds(model, x, y, rung=rung).values
        norms = curvature.per_sample_hessian_norms(model, x, y).value
        assert (
            values.isfinite().all()
            and (values >= norms * (1 - 1e-9)).all()
            and math.isfinite(values.sum())
        ), rung


@pytest.mark.parametrize("gap", [3.0, 17.0, 34.0])
@pytest.mark.parametrize("right", [True, False])
def test_saturated_samples_keep_their_curvature(gap, right):
    """Two classes, head alone: ||H|| = 2 p(1-p) (|v|^2+1), to rounding, where 1 - p is far below it too."""
    model = small_vit(7, depth=1, n_classes=2)
    x = samples(7, 1)[0]
    with torch.no_grad():
        f = model(x)[0]
        model.head.bias[0] += gap - (f[0] - f[1])
        v = []
        handle = model.head.register_forward_hook(lambda _, inputs, __: v.append(inputs[0][0]))
        f = model(x)[0]
        handle.remove()
    a = (-(f[0] - f[1]).abs()).exp()
    exact = float(2 * a / (1 + a) ** 2 * (v[0].square().sum() + 1))
    y = torch.tensor([0 if right else 1])
    for rung in ("adjoint", "blocks", "tangents", "deflated"):
        bound = float(hessian_norm_bounds(model, x, y, rung=rung, parameters=["head.*"]).values)
        assert exact * (1 - 1e-12) <= bound <= exact * (1 + 1e-6), rung
