"""Identities and rates of the running mean, by enumeration of all orders, and the probes of the ball."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from utils.convergence import (
    OneStepOnBall,
    bootstrap_mean,
    distance_to_limit,
    expected_distance,
    expected_steps,
    log_grid,
    log_log_slope,
    loss_steps,
    measure_distance,
    measure_steps,
    one_step_on_ball,
    random_orders,
    running_means,
)
from utils.curvature import Losses, dense_hessian, per_sample_hessian_norms
from utils.models import build_model

NUMBERS = st.one_of(st.integers(-(10**6), 10**6).map(lambda i: i / 1000), st.sampled_from([0.0, 1.0, -1.0, 1e-6]))
POOLS = st.lists(NUMBERS, min_size=3, max_size=6)


def all_orders(n):
    return np.array(list(itertools.permutations(range(n))))


def vit_losses(n=40, seed=0):
    """A tiny ViT's per-sample losses as functions of its weights."""
    torch.manual_seed(seed)
    model = build_model(
        "vit", image_size=4, channels=1, patch_size=2, n_classes=3, depth=1, n_heads=2, d_model=4, d_ff=4
    )
    return Losses(model, torch.randn(n, 1, 4, 4), torch.randint(0, 3, (n,)))


@pytest.mark.parametrize("source", ["vit", "random", "heavy"])
def test_identity(source):
    """L_{k+1} - L_k = (l_{k+1} - L_k)/(k+1) to rounding, for a network's losses and for any list of numbers."""
    generator = np.random.default_rng(0)
    losses = {
        "vit": lambda: vit_losses().values().numpy(),
        "random": lambda: generator.uniform(size=300),
        "heavy": lambda: generator.standard_cauchy(300),
    }[source]()
    orders = random_orders(len(losses), 5, seed=1)
    means, steps = running_means(losses, orders), loss_steps(losses, orders)
    assert means.shape == (5, len(losses)) and steps.shape == (5, len(losses) - 1)
    scale = np.abs(losses).max()
    for row, order in enumerate(orders):
        for k in (1, 2, len(losses) // 2, len(losses) - 1):
            direct = losses[order[:k]].mean()
            assert means[row, k - 1] == pytest.approx(direct, rel=1e-12, abs=1e-15 * scale)
            assert steps[row, k - 1] == pytest.approx((losses[order[k]] - direct) / (k + 1), rel=1e-9, abs=1e-15)
    np.testing.assert_allclose(steps, np.diff(means, axis=1), rtol=0, atol=1e-14 * scale)
    distance = distance_to_limit(losses, orders)
    assert (distance[:, -1] == 0).all()
    np.testing.assert_allclose(distance, means - losses.mean(), rtol=0, atol=1e-13 * scale)
    # without orders: as given
    assert np.array_equal(running_means(losses), running_means(losses, np.arange(len(losses))[None]))
    assert np.array_equal(loss_steps(losses), loss_steps(losses, np.arange(len(losses))[None]))
    assert np.array_equal(distance_to_limit(losses), distance_to_limit(losses, np.arange(len(losses))[None]))


def test_steps_do_not_cancel():
    """Losses with a large offset: the identity keeps the digits that the difference of means loses."""
    losses = np.random.default_rng(0).uniform(size=400)
    steps, shifted = loss_steps(losses), loss_steps(losses + 1e9)
    np.testing.assert_allclose(shifted[:, 300:], steps[:, 300:], rtol=0, atol=2e-9)
    exact = [(losses[k] - math.fsum(losses[:k]) / k) / (k + 1) for k in range(1, 400)]
    np.testing.assert_allclose(steps[0], exact, rtol=1e-9, atol=1e-17)


@given(POOLS)
@example([0.0, 0.0, 0.0, 1.0])
@example([0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
@example([-1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
@example([0.0, 1e-6, 1e3])
@example([2.0, 2.0, 2.0])
def test_rate_by_enumeration(pool):
    """All n! orders: the second moment is exact, the mean lies in its bracket, and so does the distance's square."""
    losses, orders = np.array(pool), all_orders(len(pool))
    steps, expected = loss_steps(losses, orders), expected_steps(losses)
    assert expected.k.tolist() == list(range(1, len(pool)))
    unit = np.ptp(losses) or 1.0
    rounding = 1e-12 + 1e-14 * np.abs(losses).max() / unit  # of the pool's offset, in units of its range
    np.testing.assert_allclose((steps**2).mean(0) / unit**2, (expected.rms / unit) ** 2, rtol=1e-12, atol=rounding**2)
    mean = np.abs(steps).mean(0) / unit
    assert (mean >= expected.mean_low / unit * (1 - 1e-12) - rounding).all()
    assert (mean <= expected.mean_high / unit * (1 + 1e-12) + rounding).all()
    distance = (distance_to_limit(losses, orders) ** 2).mean(0)
    np.testing.assert_allclose(
        distance / unit**2, (expected_distance(losses) / unit) ** 2, rtol=1e-12, atol=rounding**2
    )


@pytest.mark.parametrize("n", [3, 5, 6])
def test_ends_of_the_bracket(n):
    """One loss apart from the rest attains the lower end at every k; at k = n - 1 the ends meet."""
    mean = np.abs(loss_steps(np.array([7.0] + [2.0] * (n - 1)), all_orders(n))).mean(0)
    np.testing.assert_allclose(mean, expected_steps([7.0] + [2.0] * (n - 1)).mean_low, rtol=1e-12)
    pool = np.random.default_rng(n).normal(size=n)
    expected, mean = expected_steps(pool), np.abs(loss_steps(pool, all_orders(n))).mean(0)
    assert expected.mean_low[-1] == expected.mean_high[-1] == pytest.approx(mean[-1], rel=1e-12)
    assert (expected.mean_low[:-1] < expected.mean_high[:-1]).all()


def test_the_bracket_needs_its_finite_pool_factor():
    """A control that could have failed: without n/(n-1) the bracket is crossed."""
    losses = np.array([0.0, 1.0, 5.0, 2.0])
    mean = np.abs(loss_steps(losses, all_orders(4))).mean(0)
    expected = expected_steps(losses)
    assert mean[-1] == pytest.approx(expected.mean_high[-1], rel=1e-12)
    assert mean[-1] > expected.mean_high[-1] * 3 / 4 * 1.1


def test_expected_steps_refuses_two_losses():
    for losses in ([], [1.0], [1.0, 2.0]):
        with pytest.raises(ValueError, match="at least 3") as error:
            expected_steps(losses)
        assert str(error.value).endswith(".")


@given(POOLS, st.one_of(st.none(), NUMBERS))
def test_distance_by_enumeration(pool, target):
    """A target that does not depend on the order adds (L_n - target)^2, which no k removes."""
    losses, orders = np.array(pool), all_orders(len(pool))
    limit = losses.mean() if target is None else target
    exact = ((running_means(losses, orders) - limit) ** 2).mean(0)
    scale = max(np.abs(losses).max(), abs(limit), 1e-300)
    np.testing.assert_allclose(expected_distance(losses, target) ** 2, exact, rtol=1e-12, atol=1e-13 * scale**2)
    assert expected_distance(losses, target)[-1] == pytest.approx(abs(losses.mean() - limit), abs=1e-12 * scale)


def test_random_orders():
    orders = random_orders(30, 50, seed=4)
    assert orders.shape == (50, 30) and (np.sort(orders, axis=1) == np.arange(30)).all()
    assert np.array_equal(orders, random_orders(30, 50, seed=4))
    assert not np.array_equal(orders, random_orders(30, 50, seed=5))
    assert len({tuple(row) for row in orders}) == 50
    # uniform: each sample stands first about equally often
    first = np.bincount(random_orders(4, 4000)[:, 0], minlength=4)
    assert (np.abs(first - 1000) <= 5 * math.sqrt(4000 * 0.25 * 0.75)).all()


def test_log_grid():
    grid = log_grid(5, 5000, 12)
    assert grid[0] == 5 and grid[-1] == 5000 and (np.diff(grid) > 0).all() and grid.dtype.kind == "i"
    assert len(grid) == 12 and np.ptp(np.diff(np.log(grid))) < 0.2
    assert log_grid(1, 4, 50).tolist() == [1, 2, 3, 4]


# --- intervals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [-1.0, -0.5, 0.3])
def test_slope_of_an_exact_power_law(slope):
    k = log_grid(3, 3000, 15)
    rows = np.outer([1.0, 2.0, 5.0], k**slope)
    for root, factor in ((False, 1.0), (True, 0.5)):
        found = log_log_slope(k, rows, root=root)
        np.testing.assert_allclose(found, factor * slope, rtol=1e-10)  # value and both ends


def test_intervals_repeat_and_cover():
    """The same seed, the same interval; over 200 draws the truth lies inside about as often as it should."""
    k, generator = np.array([10.0, 30.0, 100.0]), np.random.default_rng(3)
    hits_mean, hits_slope, n = 0, 0, 200
    for i in range(n):
        rows = np.outer(generator.lognormal(0, 0.5, 60), k**-0.7) * generator.lognormal(0, 0.3, (60, 3))
        mean, low, high = bootstrap_mean(rows, seed=i)
        assert mean.shape == low.shape == high.shape == (3,) and (low < mean).all() and (mean < high).all()
        truth = np.exp(0.125 + 0.045) * k**-0.7
        hits_mean += (low[0] <= truth[0]) & (truth[0] <= high[0])
        slope, low, high = log_log_slope(k, rows, seed=i)
        assert low < slope < high
        hits_slope += low <= -0.7 <= high
    margin = 4 * math.sqrt(0.95 * 0.05 / n)
    assert 0.95 - margin <= hits_mean / n <= 1 and 0.95 - margin <= hits_slope / n <= 1
    assert hits_mean < n and hits_slope < n  # an interval that always covers is too wide
    for function in (lambda s: bootstrap_mean(rows, seed=s), lambda s: log_log_slope(k, rows, seed=s)):
        assert all(np.array_equal(a, b) for a, b in zip(function(1), function(1), strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(function(1), function(2), strict=True))
    np.testing.assert_allclose(log_log_slope(k, rows**2, root=True)[0], -0.7, atol=0.15)


def test_measured_steps_beside_the_theory():
    """The tables of the notebook: each number by its definition, and beside it what (prop:rate) says."""
    losses, k = np.random.default_rng(0).lognormal(size=120), np.array([2, 10, 40, 119])
    orders = random_orders(120, 400)
    table = measure_steps(losses, orders, k)
    assert list(table.columns) == ["k", "quantity", "value", "low", "high", "theory_low", "theory_high"]
    assert list(table.quantity) == ["mean"] * 4 + ["rms"] * 4 + ["slope"]
    expected, steps = expected_steps(losses), loss_steps(losses, orders)[:, k - 1]
    for quantity, value, low, high in (
        ("mean", np.abs(steps).mean(0), expected.mean_low, expected.mean_high),
        ("rms", np.sqrt((steps**2).mean(0)), expected.rms, expected.rms),
    ):
        rows = table[table.quantity == quantity]
        assert rows.k.tolist() == k.tolist()
        np.testing.assert_allclose(rows.value, value, rtol=1e-12)
        np.testing.assert_allclose(rows.theory_low, low[k - 1], rtol=1e-12)
        np.testing.assert_allclose(rows.theory_high, high[k - 1], rtol=1e-12)
        assert ((rows.low < rows.value) & (rows.value < rows.high)).all()
    slope = table.iloc[-1]
    assert slope.k == 0 and slope.low < slope.value < slope.high and slope.theory_low == slope.theory_high
    truth = np.polyfit(np.log(k), np.log(expected.rms[k - 1]), 1)[0]
    assert slope.theory_low == pytest.approx(truth, rel=1e-9) and slope.low <= truth <= slope.high
    # the control: random numbers obey it as well as any losses, so the slope is evidence of nothing
    noise = measure_steps(np.random.default_rng(1).uniform(size=120), orders, k).iloc[-1]
    assert noise.theory_low == pytest.approx(truth, rel=1e-9) and noise.low <= truth <= noise.high


def test_measured_distance_beside_the_theory():
    losses, k = np.random.default_rng(0).lognormal(size=120), np.array([2, 10, 40, 119])
    orders = random_orders(120, 400)
    for target in (None, 3.0):
        table = measure_distance(losses, orders, k, target)
        rows = table[table.quantity == "rms"]
        aim = losses.mean() if target is None else target
        exact = np.sqrt(((running_means(losses, orders)[:, k - 1] - aim) ** 2).mean(0))
        np.testing.assert_allclose(rows.value, exact, rtol=1e-12)
        np.testing.assert_allclose(rows.theory_low, expected_distance(losses, target)[k - 1], rtol=1e-12)
        assert (rows.theory_low == rows.theory_high).all() and (rows.low <= rows.high).all()
        assert len(table) == (5 if target is None else 4)
    slope = measure_distance(losses, orders, k).iloc[-1]
    assert slope.quantity == "slope" and slope.theory_low == slope.theory_high == 0.5
    assert slope.low <= 0.5 <= slope.high


# --- the ball -------------------------------------------------------------------------------------------


def norms(losses):
    return per_sample_hessian_norms(losses.model, losses.x, losses.y, losses.loss).value.numpy()


@pytest.fixture(scope="module")
def vit_and_norms():
    losses = vit_losses(16)
    return losses, norms(losses)


@pytest.mark.parametrize("k", [1, 10])
def test_one_step_on_the_ball(k, vit_and_norms):
    (losses, each), order = vit_and_norms, np.random.default_rng(k).permutation(16)
    radii = [1e-6, 1e-3, 1e-2, 1.0]
    found = one_step_on_ball(losses, each, order, k, radii, n_random=3)
    first, new = torch.as_tensor(order[:k]), torch.as_tensor(order[k : k + 1])
    values = losses.values()
    value = abs(float(values[order[k]] - values[first].mean()))
    gradient = float((losses.gradient(rows=new) - losses.gradient(rows=first)).norm())
    difference = dense_hessian(losses.model, losses.x[new], losses.y[new])
    difference = difference - dense_hessian(losses.model, losses.x[first], losses.y[first])
    bend = float(torch.linalg.eigvalsh(difference).abs().max())
    for r, terms in zip(radii, found, strict=True):
        assert isinstance(terms, OneStepOnBall) and terms.k == k and terms.radius == r
        assert terms.value == pytest.approx(value, rel=1e-10)
        assert terms.gradient == pytest.approx(r * gradient, rel=1e-10)
        assert terms.curvature == pytest.approx(r * r / 2 * bend, rel=1e-3)
        assert terms.curvature <= r * r / 2 * bend * (1 + 1e-10)
        assert terms.second_form == terms.value + terms.gradient + terms.curvature
        assert terms.measured <= (terms.second_form + terms.remainder) * (1 + 1e-12)
        published = value + r * r / 2 * (each[order[k]] + each[order[:k]].mean())
        assert terms.published == pytest.approx(published, rel=1e-10)
        assert terms.first_form == pytest.approx(published + r * gradient, rel=1e-10)
        assert terms.second_form <= terms.first_form * (1 + 1e-3)  # |Hess e_k| <= |h| + mean |h_i|, norms by Lanczos
        # along the gradient the value and the gradient term are reached to first order
        assert terms.measured >= terms.value + terms.gradient - terms.curvature - terms.remainder - 1e-12
    # as r goes to 0 only the value is left, and the remainder is of third order
    assert found[0].measured == pytest.approx(value + 1e-6 * gradient, abs=1e-10)
    assert found[0].measured == pytest.approx(found[0].published, rel=1e-4)
    assert 0 < found[1].remainder <= 1.5e-3 * found[2].remainder
    assert found[0].published < found[0].measured  # without the gradient term the published form is exceeded
    again = one_step_on_ball(losses, each, order, k, radii, n_random=3)
    assert again == found
    assert one_step_on_ball(losses, each, order, k, [1.0], n_random=3, seed=1) != found[-1:]


def test_quadratic_model_is_exact():
    """A linear model under mse is quadratic in its weights: no remainder at any radius."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x)

    torch.manual_seed(0)
    losses = Losses(Linear(), torch.randn(20, 5), torch.randint(0, 3, (20,)), "mse")
    each, radii = norms(losses), [1e-3, 1.0, 30.0]
    for k in (1, 10, 19):
        for terms in one_step_on_ball(losses, each, np.arange(20), k, radii):
            assert terms.remainder <= 1e-12 * (terms.measured + terms.second_form)
            assert terms.measured <= terms.second_form * (1 + 1e-12)
        # far out the curvature along the gradient dominates: the term is needed
        assert terms.measured > terms.value + terms.gradient


def test_two_equal_samples_do_not_change_the_surface():
    """Gradient and curvature of e_k are exactly zero there: zeros come back, not nan."""
    losses = vit_losses(4)
    twins = Losses(losses.model, losses.x[:1].repeat(3, 1, 1, 1), losses.y[:1].repeat(3))
    for terms in one_step_on_ball(twins, np.ones(3), np.arange(3), 1, [0.5]):
        assert (terms.measured, terms.value, terms.gradient) == (0.0, 0.0, 0.0)
        assert terms.curvature <= 1e-12 and terms.remainder <= 1e-12 and terms.published == 0.25
