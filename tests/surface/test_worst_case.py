"""The searched worst case over a ball, against its bounds."""

import itertools
import math

import numpy as np
import pytest
import torch
from exact import reference
from hypothesis import given
from hypothesis import strategies as st

from utils.hessian import Losses, per_sample_hessian_norms
from utils.surface.ball import difference_on_ball, distances_on_ball, worst_in_ball
from utils.surface.identities import running_means
from utils.surface.neighbourhood import spreads, top_eigenspace


def norms(losses):
    return per_sample_hessian_norms(losses.model, losses.x, losses.y, losses.loss).value.numpy()


@pytest.fixture(scope="module")
def vit_and_norms(vit_losses):
    losses = vit_losses(16)
    return losses, norms(losses)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0]), st.sampled_from([1e-3, 1.0, 30.0]))
def test_worst_in_ball(seed, linear, radius):
    """Never outside the ball, never above the supremum; a linear f is solved, a quadratic one
    nearly."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    A = (1 - linear) * (A + A.T)
    c, b, a = (torch.randn(m, generator=generator, dtype=torch.float64) for m in (4, 4, 1))
    seen = []

    def f(w):
        seen.append((w - c).norm().item())
        return (a + b @ (w - c) + (w - c) @ A @ (w - c) / 2).item(), b + A @ (w - c)

    best, where = worst_in_ball(
        f, c, radius, [c, c + radius * torch.eye(4, dtype=torch.float64)[0]], 30
    )
    assert max(seen) <= radius * (1 + 1e-12) and best == pytest.approx(abs(f(where)[0]), rel=1e-12)
    supremum = (
        abs(a.item())
        + radius * b.norm().item()
        + radius**2 / 2 * torch.linalg.eigvalsh(A).abs().max().item()
    )
    assert best <= supremum * (1 + 1e-12)
    u = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    u = radius * u / u.norm(dim=1, keepdim=True)
    sampled = (a + u @ b + (u @ A * u).sum(1) / 2).abs().max().item()
    if linear:
        assert best == pytest.approx(abs(a.item()) + radius * b.norm().item(), rel=1e-9)
    else:
        assert best >= 0.3 * sampled


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 10])
def test_one_step_on_the_ball(k, vit_and_norms):
    (losses, each), order = vit_and_norms, np.random.default_rng(k).permutation(16)
    radii = [1e-6, 1e-3, 1e-2, 1.0]
    basis = top_eigenspace(losses, 3).vectors
    first, new = torch.as_tensor(order[:k]), torch.as_tensor(order[k : k + 1])
    found = difference_on_ball(losses, new, first, radii, n_random=3, basis=basis)
    values = losses.values()
    value = abs(float(values[order[k]] - values[first].mean()))
    gradient = float((losses.gradient(rows=new) - losses.gradient(rows=first)).norm())
    hessians = [reference(losses.model, losses.x[i], losses.y[i])[2] for i in (new, first)]
    difference = hessians[0] - hessians[1]
    bend = float(torch.linalg.eigvalsh(difference).abs().max())
    for r, terms in zip(radii, found, strict=True):
        assert terms.radius == r and set(terms.found) == {
            "gradient",
            "random",
            "eigenspace",
            "worst",
        }
        assert terms.measured == terms.found["worst"]
        assert terms.value == pytest.approx(value, rel=1e-10)
        assert terms.gradient == pytest.approx(r * gradient, rel=1e-10)
        assert terms.curvature == pytest.approx(r * r / 2 * bend, rel=1e-3)
        assert terms.curvature <= r * r / 2 * bend * (1 + 1e-10)
        assert terms.second_form == terms.value + terms.gradient + terms.curvature
        assert terms.measured <= (terms.second_form + terms.remainder) * (1 + 1e-12)
        norms_here = each[order[k]] + each[order[:k]].mean()
        published = value + r * r / 2 * norms_here
        assert terms.first_form(norms_here, gradient=False) == pytest.approx(published, rel=1e-10)
        assert terms.first_form(norms_here) == pytest.approx(published + r * gradient, rel=1e-10)
        # |Hess e_k| <= |h| + mean |h_i|, norms by Lanczos
        assert terms.second_form <= terms.first_form(norms_here) * (1 + 1e-3)
        # along the gradient the value and the gradient term are reached to first order
        assert (
            terms.measured
            >= terms.value + terms.gradient - terms.curvature - terms.remainder - 1e-12
        )
        if r <= 1e-3:  # and there is nothing more
            assert terms.found["worst"] <= (value + r * gradient + r * r / 2 * bend) * (1 + 1e-6)
    # as r goes to 0 only the value is left, and the remainder is of third order
    assert found[0].measured == pytest.approx(value + 1e-6 * gradient, abs=1e-10)
    assert 0 < found[1].remainder <= 1.5e-3 * found[2].remainder
    assert (
        value + 1e-12 / 2 * norms_here < found[0].measured
    )  # without the gradient term the form is exceeded
    assert found[-1].found["worst"] > max(
        v for name, v in found[-1].found.items() if name != "worst"
    )
    again = difference_on_ball(losses, new, first, radii, n_random=3, basis=basis)
    assert again == found
    assert difference_on_ball(losses, new, first, [1.0], n_random=3, seed=1) != found[-1:]


def test_quadratic_model_is_exact(linear_losses):
    """A linear model under mse is quadratic in its weights: no remainder at any radius."""
    losses = linear_losses(20)
    each, radii, order = norms(losses), [1e-3, 1.0, 30.0], np.arange(20)
    for k in (1, 10, 19):
        for terms in difference_on_ball(losses, order[k : k + 1], order[:k], radii):
            assert terms.remainder <= 1e-12 * (terms.measured + terms.second_form)
            assert terms.measured <= terms.second_form * (1 + 1e-12)
            assert terms.measured <= terms.first_form(each[k] + each[:k].mean()) * (1 + 1e-4)
        # far out the curvature along the gradient dominates: the term is needed
        assert terms.measured > terms.value + terms.gradient


@pytest.mark.parametrize("radius", [1e-2, 0.5, 5.0])
def test_worst_case_bound_by_enumeration(linear_losses, radius):
    """E sup over the ball of |L_k - L_n| <= B sqrt(1/k - 1/n) for quadratic losses, over all
    orders of 5."""
    losses = linear_losses(5, seed=4)
    B = spreads(losses, basis=torch.eye(losses.P, dtype=torch.float64)).ball(radius)
    for k in (1, 2, 4):
        subsets = list(
            itertools.combinations(range(5), k)
        )  # the supremum does not depend on the order inside
        found = []
        for first in subsets:
            rest = [i for i in range(5) if i not in first]
            found.append(
                (1 - k / 5)
                * difference_on_ball(losses, first, rest, [radius], steps=25)[0].measured
            )
        ratio = np.mean(found) / (B * math.sqrt(1 / k - 1 / 5))
        assert 0.3 < ratio <= 1


def test_other_samples_get_other_directions(linear_losses):
    """Two pairs of one k do not share their random probes."""
    losses = linear_losses(20)
    a, b = (difference_on_ball(losses, [new], range(5), [1e-9])[0] for new in (10, 11))
    assert a.found["random"] != a.value and b.found["random"] != b.value
    seen = []
    losses.values, values = lambda w, rows: seen.append(w) or values(w, rows), losses.values
    for new in (10, 11):
        difference_on_ball(losses, [new], range(5), [1.0], steps=0)
    points = torch.stack(seen) - losses.w
    points = points[points.norm(dim=1) > 0]
    assert (
        len(torch.unique((points * 1e6).round(), dim=0)) == 8
    )  # two along the gradient, two at random, twice


@pytest.mark.slow
@pytest.mark.parametrize("radius", [1e-2, 0.5])
def test_tail_over_the_ball_by_enumeration(linear_losses, all_orders, radius):
    """At most the share delta of all orders of 5 leaves B sqrt((1/k - 1/n)/delta) at some k' >=
    k, in a quadratic model (eq:ball-tail without remainder); the tolerance of S alone is left
    more often on the larger ball."""
    losses = linear_losses(5, seed=4)
    spread = spreads(losses, basis=torch.eye(losses.P, dtype=torch.float64))
    found = distances_on_ball(losses, all_orders(5), [1, 2, 3, 4], radius, steps=8)
    assert found.shape == (120, 5) and np.abs(found[:, -1]).max() < 1e-12
    values = running_means(losses.values().numpy(), all_orders(5))
    assert (
        found >= np.abs(values - values[:, -1:]) - 1e-12
    ).all()  # the centre belongs to the ball
    for k, delta in itertools.product((1, 2, 4), (0.1, 0.5, 0.9)):
        scale, later = math.sqrt((1 / k - 1 / 5) / delta), found[:, k - 1 :].max(1)
        assert (later > spread.ball(radius) * scale).mean() <= delta
        if radius == 0.5 and delta == 0.5:
            assert (later > math.sqrt(spread.value) * scale).mean() > delta


def test_two_equal_samples_do_not_change_the_surface(vit_losses):
    """Gradient and curvature of e_k are exactly zero there: zeros come back, not nan."""
    losses = vit_losses(4)
    twins = Losses(losses.model, losses.x[:1].repeat(3, 1, 1, 1), losses.y[:1].repeat(3))
    for terms in difference_on_ball(twins, [1], [0], [0.5]):
        assert (terms.measured, terms.value, terms.gradient) == (0.0, 0.0, 0.0)
        assert terms.curvature <= 1e-12 and terms.remainder <= 1e-12
        assert terms.first_form(2.0, gradient=False) == 0.25
