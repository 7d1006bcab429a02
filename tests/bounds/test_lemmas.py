"""The lemmas of single nodes: each constant never passed and attained, each norm exact or above."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bounded import bilinear_norm, norm2
from networks import small_first
from torch.func import grad, jacfwd, jvp, vmap

from utils.calculus import lemmas
from utils.calculus.jets import Jet
from utils.calculus.nodes import elementwise
from utils.calculus.nodes.elementwise import SLOPES
from utils.networks.sizes import ACTIVATIONS

SLACK = 1 + 1e-9
FUNCTIONS = (
    ACTIVATIONS
    | {name: getattr(torch, name) for name in ("tanh", "sigmoid", "sin", "cos")}
    | {"silu": torch.nn.functional.silu}
)


def test_softmax_constants():
    """1/2 and sqrt(6)/9 are never passed and are attained."""
    generator = torch.Generator().manual_seed(0)
    t = 4 * torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    s = t.softmax(-1)
    exact = torch.linalg.eigvalsh(torch.diag_embed(s) - s[:, :, None] * s[:, None, :])[:, -1]
    torch.testing.assert_close(lemmas.softmax_first(s), exact, rtol=1e-9, atol=1e-12)
    assert (lemmas.softmax_first(s) >= exact - 1e-15).all()
    assert exact.max() <= lemmas.SOFTMAX_FIRST
    assert float(lemmas.softmax_first(torch.tensor([[0.5, 0.5, 0.0]]).double())) == pytest.approx(
        0.5, rel=1e-11
    )
    # saturated rows: s = (1 - 3e, 2e, e), largest eigenvalue of order e, no cancellation
    e = 1e-30
    row = torch.tensor([[1.0, 2 * e, e]], dtype=torch.float64)
    limit = torch.linalg.eigvalsh(
        torch.tensor([[3.0, -2, -1], [-2, 2, 0], [-1, 0, 1]], dtype=torch.float64)
    )
    assert float(lemmas.softmax_first(row)) == pytest.approx(e * float(limit[-1]), rel=1e-10)
    assert float(lemmas.softmax_first(torch.tensor([[1.0, 0, 0]]).double())) == 0.0
    assert float(lemmas.softmax_first(torch.ones(1, 1).double())) == 0.0
    # second derivative: third central moments E(u - Eu)^3, |u| = 1, by ascent over the row and the
    # direction
    z = torch.randn(60, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.05)
    for step in range(120):
        s, u = z[:, 0].softmax(-1), z[:, 1] / z[:, 1].norm(dim=-1, keepdim=True)
        moment = (s * (u - (s * u).sum(-1, keepdim=True)) ** 3).sum(-1).abs()
        assert moment.detach().max() <= lemmas.SOFTMAX_SECOND
        if step % 20 == 0:
            assert (moment <= lemmas.softmax_second(lemmas.softmax_first(s.detach())) * SLACK).all()
        optimiser.zero_grad()
        (-moment.sum()).backward()
        optimiser.step()
    assert moment.detach().max() > 0.99 * lemmas.SOFTMAX_SECOND
    m, half = (1 - 1 / math.sqrt(3)) / 2, math.sqrt(0.5)
    s, u = np.array([m, 1 - m]), np.array([half, -half])
    assert 0.999999 * lemmas.SOFTMAX_SECOND < (s * (u - s @ u) ** 3).sum() <= lemmas.SOFTMAX_SECOND
    assert math.sqrt(6) / 9 <= lemmas.SOFTMAX_SECOND < math.sqrt(6) / 9 * (1 + 1e-6)


def layer_norm_form(d, eps):
    """z = (x, u) -> |<D^2 n(x)[u, u], u>| for unit u, with sqrt(d) rho^2 and with sqrt(d) eps in
    front."""

    def n(x):
        y = x - x.mean()
        return y / (y.square().mean() + eps).sqrt()

    def form(z):
        x, u = math.sqrt(eps) * z[:d], z[d:] / z[d:].norm()
        zero = torch.zeros((), dtype=z.dtype)
        one = torch.ones_like(zero)

        def first(t):
            return jvp(lambda s: n(x + s * u), (t,), (one,))[1]

        second = jvp(first, (zero,), (one,))[1]
        rho2 = (x - x.mean()).square().mean() + eps
        return math.sqrt(d) * (second @ u).abs() * torch.stack([rho2, torch.full_like(rho2, eps)])

    return form


def softmax_forms(z):
    """z = (logits / 4, u) -> Var_s(u), |E_s(u - E u)^3| for unit u."""
    s, u = (4 * z[: len(z) // 2]).softmax(-1), z[len(z) // 2 :] / z[len(z) // 2 :].norm()
    away = u - s @ u
    return torch.stack([s @ away**2, (s @ away**3).abs()])


def cross_entropy_forms(z):
    """logits / 4 -> |p - e_0|, ||diag p - p p^T||."""
    p = (4 * z).softmax(-1)
    r = torch.cat([p[1:].sum()[None], p[1:]])
    return torch.stack([r.norm(), torch.linalg.eigvalsh(torch.diag(p) - p[:, None] * p)[-1]])


def activation_forms(name):
    one, two = grad(FUNCTIONS[name]), grad(grad(FUNCTIONS[name]))
    return lambda z: torch.stack([one(z[0]).abs(), two(z[0]).abs(), grad(two)(z[0]).abs()])


CONSTANTS = {
    "softmax": (softmax_forms, 8, (lemmas.SOFTMAX_FIRST, lemmas.SOFTMAX_SECOND)),
    "cross-entropy": (
        cross_entropy_forms,
        4,
        (lemmas.CROSS_ENTROPY_FIRST, lemmas.CROSS_ENTROPY_SECOND),
    ),
    "layer-norm": (
        layer_norm_form(4, 0.1),
        8,
        (lemmas.LAYER_NORM_SECOND, lemmas.LAYER_NORM_UNIFORM),
    ),
    "layer-norm-wide": (
        layer_norm_form(9, 1e-4),
        18,
        (lemmas.LAYER_NORM_SECOND, lemmas.LAYER_NORM_UNIFORM),
    ),
} | {
    name: (activation_forms(name), 1, (SLOPES[name].first, SLOPES[name].second, SLOPES[name].third))
    for name in FUNCTIONS
    if name != "relu"
}


@pytest.mark.parametrize("case", small_first(CONSTANTS, ("layer-norm-wide",)))
def test_constants_by_ascent(case):
    """Each constant of the lemmas by maximisation: never passed on the way, and reached within
    1e-4."""
    form, size, constants = CONSTANTS[case]
    generator = torch.Generator().manual_seed(0)
    limits = torch.tensor(constants, dtype=torch.float64)
    own = torch.arange(len(limits))
    # ten starts for each constant, all in one product
    z = torch.randn(len(limits), 10, size, generator=generator, dtype=torch.float64)
    z = z.requires_grad_()
    best = torch.zeros_like(limits)
    optimiser = torch.optim.Adam([z], lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.97)
    for _ in range(200):
        optimiser.zero_grad()
        values = vmap(vmap(form))(z)[own, :, own]
        largest = values.detach().amax(1)
        assert (largest <= limits).all(), (case, largest)
        best = torch.maximum(best, largest)
        (-values.sum()).backward()
        optimiser.step()
        schedule.step()
    assert (best >= limits * (1 - 1e-4)).all(), (case, best, limits)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slopes_of_functions(name):
    """The derivatives against automatic differentiation; low, high and the rest hold everywhere."""
    z = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    function = FUNCTIONS[name]
    limits = SLOPES[name]
    slope = vmap(grad(function))(z)
    bend = vmap(grad(grad(function)))(z)
    if hasattr(elementwise, name):
        first, second = getattr(elementwise, name)(z)
        smooth = z != 0 if name == "relu" else z == z
        torch.testing.assert_close(first[smooth], slope[smooth], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(second[smooth], bend[smooth], rtol=1e-9, atol=1e-12)
    assert limits.low <= float(slope.min()) and float(slope.max()) <= limits.high
    assert float(bend.abs().max()) <= limits.second <= float(bend.abs().max()) * (1 + 1e-3) + 1e-12
    values = function(z).abs()
    assert (values <= limits.largest).all()
    if limits.shrinks:
        assert (values <= z.abs()).all()


def test_cross_entropy_norms():
    generator = torch.Generator().manual_seed(1)
    f = 5 * torch.randn(500, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (500,), generator=generator)
    r, S = lemmas.cross_entropy_norms(f, y)
    p, e = f.softmax(-1), torch.nn.functional.one_hot(y, 4)
    torch.testing.assert_close(r, (p - e).norm(dim=-1), rtol=1e-9, atol=1e-14)
    exact = torch.linalg.matrix_norm(torch.diag_embed(p) - p[:, :, None] * p[:, None, :], 2)
    torch.testing.assert_close(S, exact, rtol=1e-8, atol=1e-13)
    q = 1 - p.gather(1, y[:, None])[:, 0]
    assert (r <= math.sqrt(2) * q * SLACK + 1e-14).all() and (
        S <= (2 * q).clamp(max=0.5) * SLACK + 1e-14
    ).all()
    assert math.sqrt(2) <= lemmas.CROSS_ENTROPY_FIRST < 1.4142137
    wrong = torch.tensor([[40.0, 0, 0]], dtype=torch.float64)
    assert float(lemmas.cross_entropy_norms(wrong, torch.tensor([1]))[0]) == pytest.approx(
        math.sqrt(2)
    )
    # a sample fitted to 1e-40 keeps its relative accuracy
    tiny = lemmas.cross_entropy_norms(
        torch.tensor([[92.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    )
    assert float(tiny[0]) == pytest.approx(math.sqrt(2) * math.exp(-92)) and float(
        tiny[1]
    ) == pytest.approx(2 * math.exp(-92))


@pytest.mark.parametrize("d", [3, 5, 16])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_layer_norm_constants(d, eps):
    """D n and D^2 n by ascent over the input and the direction, against both constants, which are
    attained."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(80, d, generator=generator, dtype=torch.float64)
    x = x * math.sqrt(eps) * torch.logspace(-2, 2, 80, dtype=torch.float64)[:, None]

    def n(x):
        y = x - x.mean()
        return y / (y.square().mean() + eps).sqrt()

    D2 = vmap(jacfwd(jacfwd(n)))(x)
    var = (x - x.mean(-1, keepdim=True)).square().mean(-1)
    rho = (var + eps).sqrt()
    u = torch.randn(80, d, generator=generator, dtype=torch.float64)
    mean_free = x - x.mean(-1, keepdim=True)
    best = torch.zeros(80, dtype=torch.float64)
    for start in (u, mean_free, u + mean_free / mean_free.norm(dim=-1, keepdim=True)):
        v = start / start.norm(dim=-1, keepdim=True)
        for _ in range(100):  # alternating maximisation of the symmetric trilinear form
            image = torch.einsum("bzpq,bp,bq->bz", D2, v, v)
            best = torch.maximum(best, image.norm(dim=-1))
            sign = torch.sign((image * v).sum(-1, keepdim=True))
            v = v + 2 * sign * image / image.norm(dim=-1, keepdim=True)
            v = v / v.norm(dim=-1, keepdim=True)
    assert (best <= lemmas.LAYER_NORM_SECOND / (math.sqrt(d) * rho**2) * SLACK).all()
    assert (best <= lemmas.LAYER_NORM_UNIFORM / (math.sqrt(d) * eps) * SLACK).all()
    assert (best * math.sqrt(d) * rho**2).max() > 0.9999 * lemmas.LAYER_NORM_SECOND
    assert (best * math.sqrt(d) * eps).max() > 0.97 * lemmas.LAYER_NORM_UNIFORM
    at = x / var.sqrt()[:, None] * math.sqrt(eps / 4)  # tau = 1/5
    T = jacfwd(jacfwd(n))(at[0])
    t_star = (at[0] - at[0].mean()) / (at[0] - at[0].mean()).norm()
    attained = torch.einsum("zpq,p,q->z", T, t_star, t_star).norm() * math.sqrt(d) * eps
    assert 0.999999 * lemmas.LAYER_NORM_UNIFORM < float(attained) <= lemmas.LAYER_NORM_UNIFORM
    got = lemmas.gained_norms(
        (x - x.mean(-1, keepdim=True))[:, None], torch.ones(d).double(), eps, means=True
    )
    torch.testing.assert_close(got["first"], 1 / rho, rtol=1e-9, atol=0)
    assert (best <= got["second"] * SLACK).all()
    torch.testing.assert_close(best, got["second"], rtol=0.05, atol=0)


@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_norms_of_a_normalisation_with_its_gain(seed, means):
    """Every number of gained_norms against the Jacobians, for LayerNorm and RMSNorm."""
    generator = torch.Generator().manual_seed(seed)
    gamma = 1 + torch.randn(4, generator=generator, dtype=torch.float64)
    h = torch.randn(1, 5, 4, generator=generator, dtype=torch.float64) * (0.1 + seed)

    def centre(h):
        return h - means * h.mean(-1, keepdim=True)

    def joint(w):
        y = centre(w[8:].view(5, 4))
        n = y / (y.square().mean(-1, keepdim=True) + 0.05).sqrt()
        return (w[:4] * n + w[4:8]).flatten()

    got = {k: float(v) for k, v in lemmas.gained_norms(centre(h), gamma, 0.05, means).items()}
    w = torch.cat([gamma, torch.zeros(4).double(), h.flatten()])
    J = jacfwd(joint)(w)
    T = jacfwd(jacfwd(joint))(w)
    assert got["first"] == pytest.approx(norm2(J[:, 8:]), rel=1e-9)
    assert got["own"] == pytest.approx(norm2(J[:, :8]), rel=1e-9)
    second = bilinear_norm(T[:, 8:, 8:])
    mixed = bilinear_norm(T[:, :8, 8:])
    assert 0.2 * got["second"] < second <= got["second"] * SLACK
    assert 0.9 * got["mixed"] < mixed <= got["mixed"] * SLACK
    rho, bend = lemmas.normalisation_floor(0.05, None)
    Gamma = float(gamma.abs().max())
    prior = {"first": Gamma / rho, "second": Gamma * bend / 2, "own": 20**0.5, "mixed": 1 / rho}
    assert all(prior[name] >= got[name] for name in got)


def test_jet_rules():
    """x^2 y for groups x, y: first and second derivatives bounded, and equal where every rule is
    sharp."""
    like = torch.zeros(1, 1, dtype=torch.float64)
    x, y = (Jet.parameter(g, 2, like) for g in (0, 1))
    value = {"x": 1.5, "y": 0.5}
    square = x.smooth(2 * value["x"], 2.0)
    z = square.times(y, value["x"] ** 2, value["y"]).linear(3.0)
    assert z.a[0].tolist() == pytest.approx([3 * 2 * 1.5 * 0.5, 3 * 2.25])
    assert z.B[0].flatten().tolist() == pytest.approx([3 * 2 * 0.5, 3 * 2 * 1.5, 3 * 2 * 1.5, 0.0])
    assert (z + z).a.tolist() == (2 * z.a).tolist()


@pytest.mark.parametrize("d_h, N, size", [(2, 4, 1.0), (3, 5, 3.0), (1, 3, 0.3), (2, 6, 8.0)])
def test_mixing_as_covariance(d_h, N, size):
    """The partial derivatives of (Q, K, V) -> softmax(Q K^T / sqrt(d_h)) V against each bound and
    both kinds."""
    generator, sharp = torch.Generator().manual_seed(N), []
    H = 2
    for _ in range(6):
        Q, K, V = (
            size * torch.randn(H, N, d_h, generator=generator, dtype=torch.float64)
            for _ in range(3)
        )
        K = K - K.mean(1, keepdim=True)
        shape = Q.shape

        def mix(q, k, v, shape=shape):
            A = (q.view(shape) @ k.view(shape).mT / math.sqrt(d_h)).softmax(-1)
            return (A @ v.view(shape)).flatten()

        z = tuple(t.flatten() for t in (Q, K, V))
        A = (Q @ K.mT / math.sqrt(d_h)).softmax(-1)
        sigma_K, sigma_V, covariance = (
            float(t) for t in lemmas.covariances(A[None], K[None], V[None])
        )
        first = float(lemmas.softmax_first(A).max())
        sizes = {
            "Q": max(map(norm2, Q)),
            "K": max(map(norm2, K)),
            "V": max(map(norm2, V - V.mean(1, keepdim=True))),
            "A": max(map(norm2, A)),
            "softmax1": first,
            "softmax2": min(math.sqrt(2) * first, lemmas.SOFTMAX_SECOND),
        }
        moments = {
            "columns": float(A.sum(1).max()),
            "q": float(Q.norm(dim=-1).max()),
            "sigma_K": sigma_K,
            "sigma_V": sigma_V,
            "covariance": covariance,
            "reach": float((V[:, None] - (A @ V)[:, :, None]).norm(dim=-1).max()),
        }
        unknown_moments, unknown_sizes = (
            {k: math.inf for k in group} for group in (moments, sizes)
        )
        kinds = [
            sizes | moments,
            sizes | unknown_moments,
            unknown_sizes | moments | {"A": sizes["A"]},
        ]
        J = torch.autograd.functional.jacobian(mix, z)
        T = [
            jacfwd(jacfwd(mix, argnums=j), argnums=i)(*z)
            for i, j in ((0, 0), (1, 1), (0, 1), (0, 2), (1, 2))
        ]
        for kind in kinds:
            ones, twos = lemmas.mixing(kind, 1 / math.sqrt(d_h))
            for i in range(3):
                assert norm2(J[i]) <= ones[i] * SLACK, i
            for tensor, (pair, bound) in zip(T, twos.items(), strict=True):
                assert bilinear_norm(tensor) <= bound * SLACK, pair
        sharp.append(norm2(J[0]) / ones[0])
    assert max(sharp) > 0.99  # dQ: attained, a row at a time


def test_the_product_of_two_maps_past_a_function():
    """||W_2 diag(f') W_1|| over slopes in the range of each function."""
    generator = torch.Generator().manual_seed(0)
    for limits in SLOPES.values():
        for seed in range(4):
            W_1 = torch.randn(6, 4, generator=generator, dtype=torch.float64)
            W_2 = torch.randn(4, 6, generator=generator, dtype=torch.float64)
            if seed == 3:  # one slope everywhere attains the bound of factors
                W_2 = W_1.T
            product = norm2(W_2 @ W_1)
            factors = norm2(W_2) * norm2(W_1)
            path = lemmas.through(product, factors, limits.first, limits.low, limits.high)
            assert path <= factors * limits.first * SLACK
            for _ in range(100):
                high = (torch.rand(6, generator=generator) < 0.5).double()
                slopes = limits.low + (limits.high - limits.low) * high
                assert norm2(W_2 * slopes @ W_1) <= float(path) * SLACK
            if seed == 3:
                top = norm2(limits.first * W_2 @ W_1)
                assert top == pytest.approx(float(path), rel=1e-9)


def test_spectral_norm_of_large_matrices(monkeypatch):
    """At or just above the largest singular value, also where ARPACK's estimate is too low or there
    is none."""
    generator = torch.Generator().manual_seed(1)
    M = torch.randn(300, 420, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(M.T).Q.T  # every singular value is 1
    cases = (M, M.T, 1e-180 * M, 1e150 * M, M - M.mean(0), Q, torch.outer(M[0], M[1, :300]), 0 * M)
    exact = [torch.linalg.matrix_norm(m, 2).item() for m in cases]
    found = [lemmas.spectral(m).item() for m in cases]
    assert found == pytest.approx(exact, rel=1e-9) and found[-1] == 0
    assert all(f >= e * (1 - 1e-13) for f, e in zip(found, exact))
    listed, eigsh = [], lemmas.eigsh
    monkeypatch.setattr(lemmas, "eigsh", lambda G, *a, **k: 0.9999 * eigsh(G, *a, **k))
    assert [lemmas.spectral(m).item() for m in cases[:6]] == pytest.approx(
        exact[:6], rel=1e-12
    )  # refused: all of them
    eigenvalues = torch.linalg.eigvalsh
    monkeypatch.setattr(lemmas, "eigsh", eigsh)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda G: listed.append(len(G)) or eigenvalues(G))
    lemmas.spectral(M)
    assert listed == []  # the estimate was certified
    lemmas.spectral(M[:200])
    assert listed == [200]
