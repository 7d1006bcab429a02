"""Identities and rates of the running mean, by enumeration of all orders."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from utils.surface.identities import (
    expected_distance,
    expected_rms,
    expected_steps,
    hessian_squares,
    loss_steps,
    running_means,
    smoothed,
)
from utils.surface.intervals import log_log_slope
from utils.surface.orders import log_grid, random_orders, typical_first_orders
from utils.surface.verdicts import verdict

NUMBERS = st.one_of(
    st.integers(-(10**6), 10**6).map(lambda i: i / 1000), st.sampled_from([0.0, 1.0, -1.0, 1e-6])
)
POOLS = st.lists(NUMBERS, min_size=3, max_size=6)


def test_one_loss_has_no_step():
    assert loss_steps([2.0]).shape == (1, 0)


@pytest.mark.parametrize("source", ["vit", "random", "heavy"])
def test_identity(vit_losses, source):
    """L_{k+1} - L_k = (l_{k+1} - L_k)/(k+1) to rounding, for a network's losses and for any list
    of numbers."""
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
            assert steps[row, k - 1] == pytest.approx(
                (losses[order[k]] - direct) / (k + 1), rel=1e-9, abs=1e-15
            )
    np.testing.assert_allclose(steps, np.diff(means, axis=1), rtol=0, atol=1e-14 * scale)
    np.testing.assert_allclose(means[:, -1], losses.mean(), rtol=0, atol=1e-13 * scale)
    # without orders: as given
    assert np.array_equal(
        running_means(losses), running_means(losses, np.arange(len(losses))[None])
    )
    assert np.array_equal(loss_steps(losses), loss_steps(losses, np.arange(len(losses))[None]))


def test_steps_do_not_cancel():
    """Losses with a large offset: the identity keeps the digits that the difference of means
    loses."""
    losses = np.random.default_rng(0).uniform(size=400)
    steps, shifted = loss_steps(losses), loss_steps(losses + 1e9)
    np.testing.assert_allclose(shifted[:, 300:], steps[:, 300:], rtol=0, atol=2e-9)
    exact = [(losses[k] - math.fsum(losses[:k]) / k) / (k + 1) for k in range(1, 400)]
    np.testing.assert_allclose(steps[0], exact, rtol=1e-9, atol=1e-17)


@pytest.mark.slow
@given(POOLS)
@example([0.0, 0.0, 0.0, 1.0])
@example([0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
@example([-1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
@example([0.0, 1e-6, 1e3])
@example([2.0, 2.0, 2.0])
def test_rate_by_enumeration(all_orders, pool):
    """All n! orders: the second moment is exact, the mean lies in its bracket, and so does the
    distance's square."""
    losses, orders = np.array(pool), all_orders(len(pool))
    steps, expected = loss_steps(losses, orders), expected_steps(losses)
    assert expected.k.tolist() == list(range(1, len(pool)))
    unit = np.ptp(losses) or 1.0
    rounding = (
        1e-12 + 1e-14 * np.abs(losses).max() / unit
    )  # of the pool's offset, in units of its range
    exact = expected_rms(losses) / unit
    np.testing.assert_allclose((steps**2).mean(0) / unit**2, exact**2, rtol=1e-12, atol=rounding**2)
    mean = np.abs(steps).mean(0) / unit
    assert (mean >= expected.mean_low / unit * (1 - 1e-12) - rounding).all()
    assert (mean <= expected.mean_high / unit * (1 + 1e-12) + rounding).all()
    distance = ((running_means(losses, orders) - losses.mean()) ** 2).mean(0)
    np.testing.assert_allclose(
        distance / unit**2, (expected_distance(losses) / unit) ** 2, rtol=1e-12, atol=rounding**2
    )


@pytest.mark.parametrize("n", [3, 5, 6])
def test_ends_of_the_bracket(all_orders, n):
    """One loss apart from the rest attains the lower end at every k; at k = n - 1 the ends meet."""
    mean = np.abs(loss_steps(np.array([7.0] + [2.0] * (n - 1)), all_orders(n))).mean(0)
    np.testing.assert_allclose(mean, expected_steps([7.0] + [2.0] * (n - 1)).mean_low, rtol=1e-12)
    pool = np.random.default_rng(n).normal(size=n)
    expected, mean = expected_steps(pool), np.abs(loss_steps(pool, all_orders(n))).mean(0)
    assert expected.mean_low[-1] == expected.mean_high[-1] == pytest.approx(mean[-1], rel=1e-12)
    assert (expected.mean_low[:-1] < expected.mean_high[:-1]).all()


def test_the_bracket_needs_its_finite_pool_factor(all_orders):
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
def test_distance_by_enumeration(all_orders, pool, target):
    """A target that does not depend on the order adds (L_n - target)^2, which no k removes."""
    losses, orders = np.array(pool), all_orders(len(pool))
    limit = losses.mean() if target is None else target
    exact = ((running_means(losses, orders) - limit) ** 2).mean(0)
    scale = max(np.abs(losses).max(), abs(limit), 1e-300)
    np.testing.assert_allclose(
        expected_distance(losses, target) ** 2, exact, rtol=1e-12, atol=1e-13 * scale**2
    )
    assert expected_distance(losses, target)[-1] == pytest.approx(
        abs(losses.mean() - limit), abs=1e-12 * scale
    )


@given(POOLS, st.integers(1, 4))
def test_batches_by_enumeration(all_orders, pool, batch):
    """E(L_{k+b} - L_k)^2 = S^2 b/(k(k+b)) over all orders; b = n - k is the distance to the
    pool."""
    losses, orders = np.array(pool), all_orders(len(pool))
    batch = min(batch, len(pool) - 1)
    steps, means = loss_steps(losses, orders, batch), running_means(losses, orders)
    unit = np.ptp(losses) or 1.0
    rounding = 1e-12 + 1e-14 * np.abs(losses).max() / unit
    np.testing.assert_allclose(
        steps / unit, (means[:, batch:] - means[:, :-batch]) / unit, rtol=0, atol=9 * rounding
    )
    np.testing.assert_allclose(
        (steps**2).mean(0) / unit**2,
        (expected_rms(losses, batch) / unit) ** 2,
        rtol=1e-12,
        atol=rounding**2,
    )
    k = len(pool) - batch
    last = expected_distance(losses)[k - 1] / unit
    assert expected_rms(losses, batch)[k - 1] / unit == pytest.approx(last, rel=1e-12, abs=rounding)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.99])
def test_smoothing_of_a_pure_power(factor):
    x = 1 / np.arange(2, 402)
    expected = [x[0]]
    for value in x[1:]:
        expected.append(factor * expected[-1] + (1 - factor) * value)
    s = smoothed(x, factor)
    np.testing.assert_allclose(s, expected, rtol=1e-12)
    assert (s >= x * (1 - 1e-12)).all()  # of a falling curve nothing is taken away
    assert (s >= factor ** np.arange(400) * x[0] * (1 - 1e-12)).all()


def test_squares_of_orthogonal_hessians(all_orders):
    """Diagonal h_i that share no coordinate: every order's Frobenius norms, and their mean over
    all orders."""
    norms, k = np.array([3.0, 0.5, 1.0, 2.0, 0.0]), np.array([1, 2, 3])
    h, orders = np.diag(norms), all_orders(5)  # a row a sample
    found = hessian_squares(norms, orders, k)
    for j, size in enumerate(k):
        first = h[orders[:, :size]].mean(1)
        for name, square in (
            ("H_k - H_n", np.square(first - h.mean(0)).sum(1)),
            ("H_k+1 - H_k", np.square((h[orders[:, -1]] - first) / (size + 1)).sum(1)),
        ):
            np.testing.assert_allclose(found[name][0][:, j], square, rtol=1e-12, atol=1e-12)
            assert found[name][1][j] == pytest.approx(square.mean(), rel=1e-12)


def test_random_orders():
    orders = random_orders(30, 50, seed=4)
    assert orders.shape == (50, 30) and (np.sort(orders, axis=1) == np.arange(30)).all()
    assert np.array_equal(orders, random_orders(30, 50, seed=4))
    assert not np.array_equal(orders, random_orders(30, 50, seed=5))
    assert len({tuple(row) for row in orders}) == 50
    # uniform: each sample stands first about equally often
    first = np.bincount(random_orders(4, 4000)[:, 0], minlength=4)
    assert (np.abs(first - 1000) <= 5 * math.sqrt(4000 * 0.25 * 0.75)).all()


def test_typical_losses_first():
    """Drawn in inverse proportion to the rank, without replacement; the one-step slope is flatter
    for any list."""
    losses = np.array([10.0, 4.0, 5.5, 1.0])  # mean 5.125: ranks 4, 2, 1, 3
    orders, share = typical_first_orders(losses, 20000, seed=1), np.array([1 / 4, 1 / 2, 1, 1 / 3])
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    first = np.bincount(orders[:, 0], minlength=4) / 20000
    np.testing.assert_allclose(first, share / share.sum(), atol=4 * 0.5 / math.sqrt(20000))
    second = (orders[orders[:, 0] == 2, 1] == 1).mean()  # then among those that are left
    assert abs(second - share[1] / (share.sum() - 1)) < 4 * 0.5 / math.sqrt(9000)
    assert np.array_equal(typical_first_orders(losses, 5, 2), typical_first_orders(losses, 5, 2))
    generator, k = np.random.default_rng(0), log_grid(5, 299, 12)
    for values in (
        generator.exponential(size=300),
        -generator.exponential(size=300),
        generator.uniform(size=300),
    ):
        squares = loss_steps(values, typical_first_orders(values, 300))[:, k - 1] ** 2
        assert verdict(*log_log_slope(k, squares, root=True)[1:], -1.0) == "differs"


def test_log_grid():
    grid = log_grid(5, 5000, 12)
    assert (
        grid[0] == 5 and grid[-1] == 5000 and (np.diff(grid) > 0).all() and grid.dtype.kind == "i"
    )
    assert len(grid) == 12 and np.ptp(np.diff(np.log(grid))) < 0.2
    assert log_grid(1, 4, 50).tolist() == [1, 2, 3, 4]
    assert log_grid(5, 3, 12).tolist() == [3]  # never beyond the end
    with pytest.raises(ValueError, match=r"end at 0: give more samples.*\.$"):
        log_grid(5, 0, 12)
