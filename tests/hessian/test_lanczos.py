"""Lanczos, its certificate and its starts, on known spectra."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from exact import F64, norms_of, sample_hessians
from networks import Hidden, examples

from utils.hessian import Losses, per_sample_hessian_norms
from utils.hessian.lanczos import certified_upper, lanczos, lanczos_epsilon, uniform_start
from utils.hessian.norms import operator_norm


def diagonal(values):
    values = torch.as_tensor(values, dtype=F64)
    return lambda v, rows, out: v * values


def never(ritz, steps):
    return torch.zeros_like(ritz.value, dtype=torch.bool)


@pytest.mark.parametrize(
    "P, table",
    [(1_000, {40: 6.17, 60: 2.87, 100: 1.08}), (1_000_000, {40: 8.27, 60: 3.86, 100: 1.45})],
)
def test_lanczos_epsilon(P, table):
    """The table of Theorem (thm:lanczos) in percent, the equation itself, and what few steps
    say."""
    for steps, percent in table.items():
        eps = lanczos_epsilon(steps, P, 1e-6)
        assert round(100 * eps, 2) == percent
        left = math.sqrt((1 - eps) / eps) / math.cosh(2 * (steps - 1) * math.atanh(math.sqrt(eps)))
        assert left == pytest.approx(0.5e-6 / math.sqrt(2 * P / math.pi), rel=1e-9)
    eps = [lanczos_epsilon(q, P, 1e-6) for q in range(1, 200)]
    assert eps[:3] == [0.5] * 3 and min(eps) > 0
    assert all(a >= b for a, b in itertools.pairwise(eps))
    assert lanczos_epsilon(50, P, 1e-6) > lanczos_epsilon(50, P, 1e-2)


def test_a_chosen_start_certifies_nothing():
    """A start orthogonal to the top eigenvector converges, and the formula's upper end lies below
    the norm.
    """
    values = torch.cat([torch.linspace(-0.4, 0.5, 99, dtype=F64), torch.tensor([1.0], dtype=F64)])
    blind, fair = (
        torch.ones(1, 100, dtype=F64),
        uniform_start((1, 100), SimpleNamespace(w=values), 0),
    )
    blind[0, -1] = 0.0
    found = {}
    for name, start in (("blind", blind), ("fair", fair)):
        ritz = lanczos(diagonal(values), start, max_steps=40, done=never)
        found[name] = ritz.value.item(), certified_upper(ritz, 100, 1e-3).item()
        assert ritz.residual.item() < 1e-3 * ritz.value.item() and not ritz.exhausted.any()
    assert (
        found["blind"][0] < 0.51 and found["blind"][1] < 0.6
    )  # the norm is 1: nothing was certified
    assert found["fair"][0] <= 1 + 1e-12 and 1 <= found["fair"][1] < 1.1
    # the same on a network: the gradient is blind, and only the random start of `certify` is
    # allowed an upper end
    model, (x, y) = Hidden().double(), examples(3)
    exact = norms_of(sample_hessians(model, x, y))
    losses = Losses(model, x, y)
    ritz = lanczos(
        lambda v, rows, out: losses.sample_products(v, rows),
        losses.sample_gradients(),
        max_steps=40,
        done=never,
    )
    assert (ritz.value < 0.1 * exact).all() and (ritz.residual <= 1e-10 * exact).all()
    certified = per_sample_hessian_norms(model, x, y, certify=True)
    assert (certified.lower <= exact * (1 + 1e-12)).all() and (
        exact <= certified.upper * (1 + 1e-12)
    ).all()


@pytest.mark.parametrize("failure", [0.3, 0.05])
def test_certificate_holds_as_often_as_it_says(failure):
    """A hard spectrum (one eigenvalue just above a bulk of Chebyshev nodes), 2000 starts, few
    steps.
    """
    P, steps = 40, 8
    eps = lanczos_epsilon(steps, P, failure)
    assert eps < 0.5
    nodes = (1 + torch.cos(math.pi * (torch.arange(P - 1, dtype=F64) + 0.5) / (P - 1))) / 2
    for gap in (eps, eps / 2, 0.9):
        values = torch.cat([(1 - gap) * nodes, torch.tensor([1.0], dtype=F64)]) - 0.3
        start = torch.randn(2000, P, dtype=F64, generator=torch.Generator().manual_seed(9))
        ritz = lanczos(diagonal(values), start, max_steps=steps, done=never)
        upper = certified_upper(ritz, P, failure)
        assert (ritz.value <= 0.7 * (1 + 1e-12)).all()
        assert (upper < 0.7).double().mean() <= failure
        assert upper.isfinite().all()


def test_lanczos_on_a_known_spectrum():
    """Ritz values, residuals and the end of a Krylov space, with finished rows leaving the
    batch."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 12, 12, generator=generator, dtype=F64)
    A = A + A.mT
    A[1] = torch.diag(
        torch.tensor([2.0, -5.0, *[0.0] * 10], dtype=F64)
    )  # three distinct eigenvalues: three steps
    start = torch.randn(3, 12, generator=generator, dtype=F64)
    seen = []

    def product(v, rows, out):
        seen.append(len(rows))
        return torch.einsum("mij,mj->mi", A[rows], v)

    ritz = lanczos(product, start, max_steps=99, done=never)
    assert ritz.steps.tolist() == [12, 3, 12] and bool(ritz.exhausted[1])
    assert seen == [3] * 3 + [2] * 9
    spectrum = torch.linalg.eigvalsh(A)
    torch.testing.assert_close(ritz.low, spectrum[:, 0])
    torch.testing.assert_close(ritz.high, spectrum[:, -1])
    assert (ritz.residual <= 1e-10).all()
    # after 5 steps: the residual is that of the Ritz vector, computed here from the Krylov basis
    ritz = lanczos(product, start, max_steps=5, done=never)
    for i in (0, 2):
        Q = torch.linalg.qr(
            torch.stack([torch.linalg.matrix_power(A[i], j) @ start[i] for j in range(5)], 1)
        ).Q
        theta, s = torch.linalg.eigh(Q.T @ A[i] @ Q)
        top = int(theta.abs().argmax())
        v = Q @ s[:, top]
        assert ritz.value[i].item() == pytest.approx(theta[top].abs().item(), rel=1e-9)
        assert ritz.residual[i].item() == pytest.approx(
            (A[i] @ v - theta[top] * v).norm().item(), rel=1e-7
        )


def test_operator_norm_reports_what_it_did():
    values = torch.linspace(-3, 2, 50, dtype=F64)
    start = torch.randn(50, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = operator_norm(lambda v: values * v, start, tolerance=1e-5, max_steps=50)
    assert (
        found.value == pytest.approx(3.0, rel=1e-9)
        and found.residual <= 1e-5 * found.value
        and found.converged
    )
    short = operator_norm(lambda v: values * v, start, tolerance=1e-5, max_steps=4)
    assert short.iterations == 4 and not short.converged and short.value < 3.0
    assert operator_norm(lambda v: 0 * v, start, tolerance=1e-5, max_steps=50).value == 0.0


def test_starts_come_from_a_stream_of_their_own():
    """Weights drawn with any seed are not the vector that the same seed gives a certificate."""
    losses = SimpleNamespace(w=torch.zeros(1, dtype=F64))
    for seed in (0, 1, 7):
        start = uniform_start((64,), losses, seed)
        drawn = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=F64)
        assert abs(torch.corrcoef(torch.stack([start, drawn]))[0, 1]) < 0.5
        assert torch.equal(start, uniform_start((64,), losses, seed))
    assert not torch.equal(uniform_start((64,), losses, 0), uniform_start((64,), losses, 1))
