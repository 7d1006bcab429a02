"""Intervals of means and slopes cover what they should."""

import math

import numpy as np
import pytest

from utils.surface.identities import hessian_squares
from utils.surface.intervals import bootstrap_mean, first_crossing, log_log_slope, rms_by_ratio
from utils.surface.orders import log_grid, random_orders


@pytest.mark.parametrize("slope", [-1.0, -0.5, 0.3])
def test_slope_of_an_exact_power_law(slope):
    k = log_grid(3, 3000, 15)
    rows = np.outer([1.0, 2.0, 5.0] * 34, k**slope)
    for root, factor in ((False, 1.0), (True, 0.5)):
        found = log_log_slope(k, rows, root=root)
        np.testing.assert_allclose(found, factor * slope, rtol=1e-10)  # value and both ends
    few = log_log_slope(k, rows[:99])  # too few for an interval
    assert few[0] == pytest.approx(slope, rel=1e-10) and np.isnan(few[1:]).all()
    mean, *ends = bootstrap_mean(rows[:99])
    np.testing.assert_allclose(mean, rows[:99].mean(0), rtol=1e-12)
    assert np.isnan(ends).all()
    assert (
        np.isnan(log_log_slope(k[:1], rows[:, :1])).all()
        and np.isnan(log_log_slope(k, 0 * rows)).all()
    )


@pytest.mark.slow
def test_intervals_repeat_and_cover():
    """The same seed, the same interval; over 200 draws the truth lies inside about as often as it
    should."""
    k, generator = np.array([10.0, 30.0, 100.0]), np.random.default_rng(3)
    hits_mean, hits_slope, n = 0, 0, 200
    for i in range(n):
        rows = np.outer(generator.lognormal(0, 0.5, 100), k**-0.7) * generator.lognormal(
            0, 0.3, (100, 3)
        )
        mean, low, high = bootstrap_mean(rows, seed=i)
        assert (
            mean.shape == low.shape == high.shape == (3,)
            and (low < mean).all()
            and (mean < high).all()
        )
        truth = np.exp(0.125 + 0.045) * k**-0.7
        hits_mean += (low[0] <= truth[0]) & (truth[0] <= high[0])
        slope, low, high = log_log_slope(k, rows, seed=i)
        assert low < slope < high
        hits_slope += low <= -0.7 <= high
    margin = 4 * math.sqrt(0.95 * 0.05 / n)
    assert 0.95 - margin <= hits_mean / n <= 1 and 0.95 - margin <= hits_slope / n <= 1
    assert hits_mean < n and hits_slope < n  # an interval that always covers is too wide
    for function in (
        lambda s: bootstrap_mean(rows, seed=s),
        lambda s: log_log_slope(k, rows, seed=s),
    ):
        assert all(np.array_equal(a, b) for a, b in zip(function(1), function(1), strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(function(1), function(2), strict=True))
    np.testing.assert_allclose(log_log_slope(k, rows**2, root=True)[0], -0.7, atol=0.15)
    (_, low, high), (_, lower, higher) = (
        log_log_slope(k, rows),
        log_log_slope(k, rows, level=1 - 0.05 / 4),
    )
    assert 1.05 < (higher - lower) / (high - low) < 1.6  # 2.5 instead of 1.96 standard errors


def correlated_squares(orders, k, norms, vectors):
    """Squared Frobenius norms of H_k - H_n and of H_{k+1} - H_k for h_i = norm_i v_i v_i^T, by
    their Gram matrix."""
    gram, n = np.outer(norms, norms) * (vectors @ vectors.T) ** 2, len(norms)
    found = {
        "H_k - H_n": np.empty((len(orders), len(k))),
        "H_k+1 - H_k": np.empty((len(orders), len(k))),
    }
    for i, order in enumerate(orders):
        for j, size in enumerate(k):
            a, b = np.full(n, -1 / n), np.zeros(n)
            a[order[:size]] += 1 / size
            b[order[:size]] -= 1 / size
            b[order[-1]] += 1
            found["H_k - H_n"][i, j], found["H_k+1 - H_k"][i, j] = (
                a @ gram @ a,
                b @ gram @ b / (size + 1) ** 2,
            )
    return found


def test_ratios_cover_where_a_bootstrap_of_few_heavy_tails_does_not():
    """Norms over decades, Hessians that overlap: the exact slopes lie in 95 % of the intervals of
    20 orders."""
    generator, k, n, draws = np.random.default_rng(0), np.array([6, 16, 48]), 96, 150
    norms, vectors = generator.lognormal(0, 1.7, n), generator.normal(size=(n, 12))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    hits = dict.fromkeys(("H_k - H_n", "H_k+1 - H_k"), 0)
    for i in range(draws):
        orders = random_orders(n, 20, seed=i)
        squares, sums = (
            correlated_squares(orders, k, norms, vectors),
            hessian_squares(norms, orders, k),
        )
        for name, at in (("H_k - H_n", 1 / k - 1 / n), ("H_k+1 - H_k", k)):
            exact = log_log_slope(at, sums[name][1][None], root=True)[0]
            (rms, low, high), (slope, lower, upper) = rms_by_ratio(at, squares[name], *sums[name])
            assert (low < rms).all() and (rms < high).all() and lower < slope < upper
            hits[name] += lower <= exact <= upper
    margin = 4 * math.sqrt(0.95 * 0.05 / draws)
    assert all(0.95 - margin <= h / draws < 1 for h in hits.values()), hits
    few = rms_by_ratio(at, squares[name][:19], sums[name][0][:19], sums[name][1])
    assert np.isnan(few[0][1]).all() and np.isnan(few[1][1:]).all() and np.isfinite(few[1][0])


def test_first_crossing():
    x = np.geomspace(1e-3, 1, 7)
    assert first_crossing(x, 5 * x**2, 5e-4) == pytest.approx(
        1e-2, rel=1e-9
    )  # a power law is met exactly
    assert first_crossing(x, x, 2.0) == math.inf and first_crossing(x, x, 1e-4) == x[0]
    assert first_crossing([1, 10, 100], [0.0, 1.0, 0.0], 0.5) == pytest.approx(10, rel=0.01)
