"""PyHessian's traps: for each, PyHessian alone falling into it and the adapter not, against dense
Hessians in float64.

`alone` runs PyHessian as its manual says, on the model itself; where a trap would hide another one
it is given a default dtype of float64 and a `torch.eig`.
"""

import gc
import importlib
import math
import warnings
import weakref
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from exact import F64
from networks import Fused, examples, random_mlp, random_vit, randomised, tiny_encoder
from pyhessian import hessian
from refusal import refused
from torch import nn

from utils.hessian import Losses
from utils.hessian import pyhessian as adapter
from utils.hessian.derivatives import dense_hessian
from utils.networks.losses import logits, loss_from_logits
from utils.run.streams import torch_seed

DEFAULTS = dict(
    tolerance=1e-3, max_iterations=100, starts=1, rescale=False
)  # what PyHessian takes by itself


class Unused(nn.Module):
    """A linear classifier with a parameter out of use."""

    def __init__(self):
        super().__init__()
        self.idle, self.head = nn.Parameter(torch.zeros(2, 3)), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(x.flatten(1))


class Sum(nn.Module):
    """The weights of a linear classifier as a sum: the products H v of its terms are one and the
    same tensor.
    """

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(16, 3)), nn.Parameter(torch.zeros(16, 3))

    def forward(self, x):
        return x.flatten(1) @ (self.a + self.b)


class Flat(nn.Module):
    """Parameters that enter by their sum alone: their products H v are expanded scalars."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        f = (self.a.sum() * self.b.sum() * x.flatten(1).mean(1))[:, None]
        return torch.cat([f, 0 * f, 0 * f], 1)


class Watched(nn.Module):
    """A network whose graphs can be watched: `graphs` holds a weak reference to a hook that each
    graph keeps alive.
    """

    graphs: list = []  # noqa: RUF012

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        f = self.net(x)
        if f.requires_grad:
            hook = type("Hook", (), {"__call__": lambda self, g: None})()
            f.register_hook(hook)
            self.graphs.append(weakref.ref(hook))
        return f

    @classmethod
    def alive(cls):
        gc.collect()
        return [graph() is not None for graph in cls.graphs]


OWN_SEED = torch_seed("pyhessian", 0)


@contextmanager
def alone(dtype=F64, eig=None, seed=OWN_SEED):
    """A place to run PyHessian: default dtype, seed and perhaps a `torch.eig`, put back
    afterwards."""
    default = torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        patch.object(torch, "eig", eig or torch.eig),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


@contextmanager
def warned_always():
    """torch gives each of its warnings every time, not once a process."""
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(False)


def pyhessian(model, x, y, loss="cross_entropy"):
    def criterion(out, y):
        return loss_from_logits(logits(lambda _: out, None), y, loss).mean()

    return hessian(model, criterion, data=(x, y), cuda=False)


def plain_eig(T, eigenvectors):
    """`torch.eig` as it was, for a symmetric T."""
    values, vectors = torch.linalg.eigh(T)
    return torch.stack([values, 0 * values], 1), vectors


def spectrum(H):
    return torch.linalg.eigvalsh((H + H.T) / 2)


def norm_of(H):
    return spectrum(H).abs().max().item()


def rademacher(losses, probes, seed=0):
    """The probes (probes, P) that PyHessian draws for the parameters of `losses`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed("pyhessian", seed))
        signs = [
            [torch.randint_like(t, high=2) * 2 - 1 for t in losses.point.values()]
            for _ in range(probes)
        ]
    return torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in signs])


def check(model, x, y, loss="cross_entropy", parameters=None, seed=0):
    """All three functions against the dense Hessian, for a spectrum on which power iteration
    converges.
    """
    losses = Losses(model, x, y, loss, parameters=parameters)
    H = dense_hessian(model, x, y, loss, parameters=parameters)
    norm = norm_of(H)

    e = adapter.eigenvalue(losses, seed=seed)
    assert e.value == pytest.approx(norm, rel=1e-8) and e.value <= norm * (1 + 1e-12)
    assert e.residual <= 1e-4 * norm and e.iterations >= 6

    V = rademacher(losses, 4, seed)
    values = ((V @ H) * V).sum(1)
    mean, error, spent = adapter.trace(losses, probes=4, seed=seed)
    assert spent == 4
    assert mean == pytest.approx(values.mean().item(), rel=1e-10, abs=1e-12 * norm * losses.P)
    assert error == pytest.approx(values.std().item() / 2, rel=1e-9, abs=1e-12 * norm * losses.P)

    nodes, weights = adapter.density(losses, probes=2, steps=6, seed=seed)
    assert nodes.shape == weights.shape == (2, min(6, losses.P))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-13)
    U = V[:2] / math.sqrt(losses.P)
    for power in range(1, 2 * nodes.shape[1]):
        exact = ((U @ torch.linalg.matrix_power(H, power)) * U).sum(1)
        # the first vector has length 1 - d, d = 1e-6 / sqrt(P): alpha_1 is 2 d short and
        # beta_1 d, T at most 3 d |T|
        slack = 3 * power * 1e-6 / math.sqrt(losses.P) * norm**power
        np.testing.assert_allclose((weights * nodes**power).sum(1), exact, rtol=0, atol=slack)


@pytest.mark.parametrize(
    "make, loss",
    [
        (random_vit, "cross_entropy"),
        (random_mlp, "cross_entropy"),
        (random_mlp, "mse"),
        pytest.param(random_vit, "mse", marks=pytest.mark.slow),
    ],
)
def test_against_dense_hessians(make, loss):
    model, (x, y) = make(1), examples()
    check(model, x, y, loss)
    check(model, x, y, loss, seed=5)


# --- the traps
# ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trap_1_eigenvalues_stop_early_and_say_nothing():
    """On single samples the default rule leaves errors beyond its tolerance; the adapter's residual
    tells them.
    """
    model, (x, y) = random_vit(1, depth=2), examples(8, 4)
    internals, product = importlib.import_module("pyhessian.hessian"), "hessian_vector_product"
    for i in (4, 7):
        one = x[i : i + 1], y[i : i + 1]
        H = dense_hessian(model, *one)
        norm, losses = norm_of(H), Losses(model, *one)
        with alone(), patch.object(internals, product, wraps=getattr(internals, product)) as spy:
            (reported,), (vector,) = pyhessian(model, *one).eigenvalues()
        v = torch.cat([t.reshape(-1) for t in vector])
        v = v / v.norm()
        theta = v @ H @ v
        assert abs(reported) < norm * (1 - 1e-3)
        # the value returned is not that of the vector returned, which went on for two products
        assert abs(reported) < theta.abs() * (1 - 1e-6)
        # the adapter at the same settings: the same run, with the Rayleigh quotient and
        # residual of its vector
        same = adapter.eigenvalue(losses, **DEFAULTS)
        assert same.reported == pytest.approx(reported, rel=1e-9)
        assert same.value == pytest.approx(theta.abs().item(), rel=1e-10)
        assert same.residual == pytest.approx((H @ v - theta * v).norm().item(), rel=1e-6)
        assert (spectrum(H).abs() - same.value).abs().min() <= same.residual
        assert same.iterations == spy.call_count >= 2

        found = adapter.eigenvalue(losses)
        assert found.value == pytest.approx(norm, rel=1e-8) and found.residual <= 1e-4 * norm
        assert found.iterations > same.iterations
        assert abs(found.reported) == pytest.approx(
            norm * (1 - 2e-6), rel=1e-8
        )  # vectors of length 1/(1 + 1e-6)


def test_trap_1_opposite_ends():
    """Ends near lambda and -lambda stop the rule at a mixture, far below the norm: the residual
    says so.
    """
    model = randomised(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 6, bias=False), nn.Linear(6, 3, bias=False)),
        7,
        1e-2,
    )
    x, y = examples()
    H = dense_hessian(model, x, y)
    ends = spectrum(H)[[0, -1]]
    assert (ends.sum() / ends[1]).abs() < 0.05
    with alone(seed=torch_seed("pyhessian", 2)):
        theirs = pyhessian(model, x, y)
        values, vectors = zip(*(theirs.eigenvalues() for _ in range(5)))
    assert abs(values[0][0]) < 0.9 * norm_of(H)
    losses = Losses(model, x, y)
    found = adapter.eigenvalue(losses, **DEFAULTS, seed=2)
    assert found.residual > 0.1 * norm_of(H)
    # of several starts the largest is kept, with what belongs to it
    found = adapter.eigenvalue(losses, **DEFAULTS | {"starts": 5}, seed=2)
    V = torch.stack([torch.cat([t.reshape(-1) for t in vector]) for (vector,) in vectors])
    V = V / V.norm(dim=1, keepdim=True)
    theta = ((V @ H) * V).sum(1)
    best = int(theta.abs().argmax())
    assert best == 2 and found.value == pytest.approx(theta[best].abs().item(), rel=1e-8)
    assert found.reported == pytest.approx(values[best][0], rel=1e-8)
    assert found.residual == pytest.approx(
        (V[best] @ H - theta[best] * V[best]).norm().item(), rel=1e-6
    )
    assert found.value <= norm_of(H) * (1 + 1e-12)


@pytest.mark.parametrize(
    "scale, rule, share", [(1e-4, {}, 0.97), (1e-6, dict(tol=1e-10, maxIter=1000), 0.6)]
)
def test_trap_2_absolute_floors(scale, rule, share):
    """Inputs of size `scale` give a Hessian of size scale^2: 1e-8, and 1e-12."""
    model = randomised(nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False)), 1)
    x, y = examples(n_classes=2)
    H = dense_hessian(model, scale * x, y)
    assert 0.1 < norm_of(H) / scale**2 < 10
    with alone():
        (reported,), _ = pyhessian(model, scale * x, y).eigenvalues(**rule)
        (unscaled,), _ = pyhessian(model, x, y).eigenvalues(**rule)
    assert reported < share * norm_of(H)
    assert unscaled > 0.99 * norm_of(
        dense_hessian(model, x, y)
    )  # the rule is good enough at size 1
    check(model, scale * x, y)
    assert adapter.eigenvalue(Losses(model, scale * x, y)).reported == pytest.approx(
        norm_of(H) * (1 - 2e-6), rel=1e-7
    )


def test_trap_2_floors_in_the_quadrature():
    """A short Lanczos vector for each small beta: moments off by 1e-5, on an operator of norm 1."""
    model, (x, y) = random_vit(1), examples()
    losses, H = Losses(model, x, y), dense_hessian(model, x, y)
    factor = 2.0 ** -math.frexp(norm_of(H))[1]
    with alone(eig=plain_eig):
        theirs = hessian(
            model, lambda f, y: factor * loss_from_logits(f, y).mean(), data=(x, y), cuda=False
        )
        nodes, weights = map(np.array, theirs.density(iter=20))
    v = rademacher(losses, 1)[0] / math.sqrt(losses.P)
    exact = (v @ torch.linalg.matrix_power(H, 6) @ v).item()
    assert abs((weights * (nodes / factor) ** 6).sum() / exact - 1) > 1e-5
    nodes, weights = adapter.density(losses, probes=1, steps=20)
    assert abs((weights * nodes**6).sum() / exact - 1) < 1e-6


def test_trap_3_torch_eig_is_gone():
    model, (x, y) = random_vit(1), examples()
    with alone(), pytest.raises(RuntimeError, match="removed"):
        pyhessian(model, x, y).density(iter=5)
    removed, losses = torch.eig, Losses(model, x, y)
    adapter.density(losses, probes=1, steps=5)
    assert torch.eig is removed
    with patch.object(torch, "eig"):  # a torch that has forgotten the name
        del torch.eig
        adapter.density(losses, probes=1, steps=5)
        assert not hasattr(torch, "eig")


@pytest.mark.slow
def test_trap_4_a_negative_trace_stops_at_two_probes():
    model, (x, y) = random_vit(4), examples()
    losses, exact = Losses(model, x, y), dense_hessian(model, x, y).trace().item()
    assert exact < 0
    with alone():
        values = pyhessian(model, x, y).trace(maxIter=200)
    assert len(values) == 2
    mean, error, spent = adapter.trace(losses, probes=200)
    assert spent == 200 and abs(mean - exact) <= 3 * error
    assert abs(np.mean(values) - exact) > 3 * error


@pytest.mark.slow
def test_trap_5_gradients_left_behind_are_added():
    """The object of a second batch has the sum of both batches' Hessians."""
    model, (x, y) = random_vit(1, pool="mean"), examples(6)
    H = [dense_hessian(model, x[i : i + 2], y[i : i + 2]) for i in (0, 2)]
    with alone():
        first = pyhessian(model, x[:2], y[:2])
        second = pyhessian(model, x[2:4], y[2:4])
        (reported,), _ = second.eigenvalues(tol=1e-12, maxIter=1000)
        (fine,), _ = first.eigenvalues(tol=1e-12, maxIter=1000)
    assert abs(reported) == pytest.approx(norm_of(H[0] + H[1]), rel=1e-5)
    assert abs(reported) > 1.5 * norm_of(H[1])
    assert abs(fine) == pytest.approx(norm_of(H[0]), rel=1e-5)
    # the same on a model that holds such a gradient, in our hands
    losses = Losses(model, x[2:4], y[2:4])
    losses.model.requires_grad_(True)
    with alone():
        pyhessian(losses.model, x[:2], y[:2])
    left = {n: p.grad for n, p in losses.model.named_parameters()}
    assert all(g is not None and g.requires_grad for g in left.values())
    assert adapter.eigenvalue(losses).value == pytest.approx(norm_of(H[1]), rel=1e-8)
    assert all(p.grad is left[n] for n, p in losses.model.named_parameters())
    losses.model.zero_grad()


@pytest.mark.slow
def test_trap_6_the_graph_is_kept():
    """Built and dropped, PyHessian leaves its graph in a cycle with .grad; not even the model's end
    frees it.
    """
    model, (x, y) = Watched(random_vit(1)), examples()
    Watched.graphs.clear()
    with alone():
        pyhessian(model, x, y)
    assert Watched.alive() == [True]
    model.zero_grad()
    assert Watched.alive() == [False]
    Watched.graphs.clear()
    with alone():
        pyhessian(model, x, y)
    del model
    assert Watched.alive() == [True]

    losses = Losses(Watched(random_vit(1)), x, y)
    Watched.graphs.clear()
    with warnings.catch_warnings(), warned_always():
        warnings.simplefilter(
            "error"
        )  # torch warns of the cycle, and of the adapter it has nothing to say
        with pytest.raises(UserWarning, match="create_graph=True"):
            pyhessian(random_vit(1), x, y)
        adapter.eigenvalue(losses)
        adapter.trace(losses, probes=2)
        adapter.density(losses, probes=1, steps=3)
        with adapter.prepared(losses, 1.0, 0):  # built and not used
            assert any(Watched.alive())
        with pytest.raises(KeyError), adapter.prepared(losses, 1.0, 0):
            raise KeyError
    alive = Watched.alive()
    assert len(alive) >= 5 and not any(alive)


def test_trap_7_parameters_without_influence():
    model, (x, y) = randomised(Unused(), 2), examples()
    with alone(), pytest.raises(AssertionError, match="Expected output to be a"):
        pyhessian(model, x, y).eigenvalues()
    check(model, x, y)


@pytest.mark.parametrize("make", [Fused, tiny_encoder])
def test_trap_8_fused_attention(make):
    model, (x, y) = randomised(make(), 1), examples()
    with alone(), pytest.raises(RuntimeError, match=r"derivative .* not implemented"):
        pyhessian(model, x, y).eigenvalues()
    check(model, x, y)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_trap_9_products_that_share_memory():
    x, y = examples()
    model = randomised(Sum(), 1)
    with alone(eig=plain_eig):
        nodes, _ = pyhessian(model, x, y).density(iter=8)
    assert np.max(nodes) > 3 * norm_of(dense_hessian(model, x, y))
    check(model, x, y)
    model = randomised(Flat(), 1)
    with alone(eig=plain_eig), pytest.raises(RuntimeError, match="single memory location"):
        pyhessian(model, x, y).density(iter=3)
    check(model, x, y)


@pytest.mark.slow
def test_trap_10_default_dtype_and_global_generator():
    model, (x, y) = random_vit(1), examples()
    with alone(dtype=torch.float32, eig=plain_eig):
        theirs = pyhessian(model, x, y)
        states = [torch.get_rng_state()]
        rounded = theirs.density(iter=5)[0]
        states.append(torch.get_rng_state())
        first, second = theirs.trace(maxIter=2), theirs.trace(maxIter=2)
    assert rounded[0][0].dtype == np.float32
    assert not torch.equal(*states) and first != second
    losses, nodes = Losses(model, x, y), []
    for dtype, draws in ((torch.float32, 0), (F64, 3)):
        with alone(dtype=dtype):
            torch.rand(draws)
            state = torch.get_rng_state()
            nodes.append(adapter.density(losses, probes=1, steps=5)[0])
            assert adapter.trace(losses, probes=2) == adapter.trace(losses, probes=2)
            assert adapter.eigenvalue(losses) == adapter.eigenvalue(losses)
            assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == dtype
    assert nodes[0].dtype == np.float64 and np.array_equal(*nodes)
    assert 1e-10 < np.abs(nodes[0] / np.sort(rounded) - 1).max()
    assert adapter.trace(losses, probes=2, seed=1) != adapter.trace(losses, probes=2)


def test_trap_11_lanczos_goes_on_in_an_exhausted_space():
    """Nodes outside the spectrum, of weight zero; the adapter has none."""
    model, (x, y) = random_mlp(2, bias=False), examples(1)
    losses, ends = Losses(model, x, y), spectrum(dense_hessian(model, x, y))[[0, -1]]
    with alone(eig=plain_eig):
        nodes, weights = map(np.array, pyhessian(model, x, y).density(iter=losses.P))
    outside = (nodes < 1.1 * ends[0].item()) | (nodes > 1.1 * ends[1].item())
    assert outside.any() and weights[outside].max() < 1e-12
    nodes, weights = adapter.density(losses, probes=2, steps=10**6)
    assert nodes.shape == (2, losses.P)
    for found, exact in zip((nodes.min(), nodes.max()), ends, strict=True):
        assert found == pytest.approx(exact.item(), abs=1e-6 * ends.abs().max().item())
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)


# --- what stands still
# --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_subset_of_the_parameters():
    model, (x, y) = random_vit(1, depth=2), examples()
    for patterns in (["head.*"], ["*.query.*", "pos"], ["blocks.1.mlp.fc2.bias"]):
        check(model, x, y, parameters=patterns)


def test_no_curvature():
    """A Hessian of zeros: value and residual are 0, and all the weight is at 0."""
    losses = Losses(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)), 0 * examples()[0], examples()[1]
    )
    for options in ({}, DEFAULTS):
        found = adapter.eigenvalue(losses, **options)
        assert (found.value, found.reported, found.residual) == (0.0, 0.0, 0.0)
    assert adapter.trace(losses, probes=3) == (0.0, 0.0, 3)
    nodes, weights = adapter.density(losses, probes=2, steps=3)
    assert not nodes.any() and weights.tolist() == [[1.0, 0.0, 0.0]] * 2


@pytest.mark.parametrize("fails", [None, "eigenvalues", "trace", "density", "__init__"])
def test_everything_is_put_back(fails, monkeypatch):
    model, (x, y) = random_vit(1), examples()
    losses = Losses(model, x.requires_grad_(), y, parameters=["head.*", "blocks.*"])
    for p in losses.model.parameters():
        p.grad = torch.full_like(p, 3.0)

    def seen():
        named = losses.model.named_parameters()
        weights = [(n, p.tolist(), p.grad.tolist(), p.requires_grad) for n, p in named]
        flags = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
        default = torch.get_default_dtype(), torch.get_rng_state().tolist(), torch.is_grad_enabled()
        return (
            weights,
            flags,
            default,
            torch.eig,
            warnings.filters[:],
            x.grad,
            losses.model.training,
        )

    if fails is not None:
        monkeypatch.setattr(hessian, fails, lambda *_, **__: 1 / 0)
    calls = {
        "eigenvalues": lambda: adapter.eigenvalue(losses, starts=1, max_iterations=3),
        "trace": lambda: adapter.trace(losses, probes=2),
        "density": lambda: adapter.density(losses, probes=1, steps=3),
    }
    for name, call in calls.items():
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                before = seen()
                if fails in (name, "__init__"):
                    with pytest.raises(ZeroDivisionError):
                        call()
                else:
                    call()
                assert seen() == before


@pytest.mark.slow
def test_single_precision():
    """A model in float32 is worked on in float32."""
    model, (x, y) = random_vit(1), examples()
    losses, H = Losses(model, x, y, dtype=torch.float32), dense_hessian(model, x, y)
    found = adapter.eigenvalue(losses)
    assert found.value == pytest.approx(norm_of(H), rel=1e-4) and found.value != norm_of(H)
    nodes, weights = adapter.density(losses, probes=2, steps=30)
    assert np.abs(nodes).max() == pytest.approx(norm_of(H), rel=1e-4)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)


def test_arguments_that_make_no_sense():
    losses = Losses(random_mlp(1, bias=False), *examples())
    refused(lambda: adapter.eigenvalue(losses, starts=0), "0 starts")
    refused(lambda: adapter.eigenvalue(losses, max_iterations=0), "0 iterations")
    refused(lambda: adapter.trace(losses, probes=1), "1 probes")
    refused(lambda: adapter.density(losses, probes=0, steps=3), "0 probes")
    refused(lambda: adapter.density(losses, probes=2, steps=0), "0 steps")
