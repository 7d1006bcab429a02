"""Sizes for the surface: fourth moments by enumeration, promises by simulation, the forecast."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.sample_size import exceedance, k_surface, surface_forecast, true_size
from utils.sample_size.limits import pair_moments
from utils.sample_size.surface import fourth_moment, gaussian_factor, k_fixed_probes
from utils.surface import random_orders


def test_k_surface_formula():
    for variance, tau, confidence, n in [
        (0.4, 0.05, 0.95, math.inf),
        (3.0, 0.1, 0.9, 500),
        (1e-3, 0.5, 0.99, 20),
    ]:
        rate = 1 / Fraction(n) if n < math.inf else Fraction(0)
        exact = 1 / (rate + (1 - Fraction(confidence)) * Fraction(tau) ** 2 / Fraction(variance))
        assert k_surface(variance, tau, confidence, n) == max(1, math.ceil(exact))
    assert k_surface(0.0, 0.1, 0.95) == k_surface(0.0, 0.1, 0.95, 7) == 1
    assert k_surface(math.inf, 0.1, 0.95) == math.inf
    assert k_surface(1e9, 1e-9, 0.95, 33) == k_surface(math.inf, 0.1, 0.95, 33) == 33
    # the whole pool is always enough: rounding never asks for more than there are
    assert all(k_surface(1e30, 1e-3, 0.95, n) <= n for n in range(1, 3000))


@given(
    st.floats(1e-3, 1e3),
    st.floats(1e-2, 10),
    st.floats(0.5, 0.999),
    st.one_of(st.just(math.inf), st.integers(1, 10**6)),
)
def test_k_surface_is_monotone(variance, tau, confidence, n):
    k = k_surface(variance, tau, confidence, n)
    assert 1 <= k <= n
    assert k_surface(2 * variance, tau, confidence, n) >= k
    assert k_surface(variance, 2 * tau, confidence, n) <= k
    assert k_surface(variance, tau, 1 - (1 - confidence) / 2, n) >= k
    assert k_surface(variance, tau, confidence, 2 * n) >= k
    # enough by the theorem, and one fewer is not
    bound = (1 / k - 1 / n) * variance / tau**2
    assert bound <= (1 - confidence) * (1 + 1e-9)
    if k > 1:
        assert (1 / (k - 1) - 1 / n) * variance / tau**2 >= (1 - confidence) * (1 - 1e-9)


def fourth_by_enumeration(X, k):
    return np.mean(
        [
            np.square(X[list(chosen)].mean(0)).sum() ** 2
            for chosen in itertools.combinations(range(len(X)), k)
        ]
    )


@pytest.mark.parametrize("n", [4, 5, 8])
def test_fourth_moments_by_enumeration(n):
    """(thm:fourth), (i): the identity for every size, the bound from the pool's own kurtosis."""
    generator = np.random.default_rng(n)
    pools = [
        np.eye(n, 1),
        *(generator.normal(size=(n, d)) for d in (1, 3)),
        generator.standard_cauchy((n, 2)),
    ]
    for X in pools:
        X = X - X.mean(0)
        variance = np.square(X).sum() / (n - 1)
        Y = [np.square(X[i] - X[j]).sum() / 2 for i, j in itertools.combinations(range(n), 2)]
        kurtosis = np.mean(np.square(Y)) / np.mean(Y) ** 2
        a, b, c = np.square(np.square(X).sum(1)).sum(), np.square(X).sum(), np.square(X @ X.T).sum()
        for k in range(1, n + 1):
            p = [
                math.prod((k - i) / (n - i) for i in range(j)) if k >= j else 0.0 for j in range(5)
            ]
            identity = a * (p[1] - 7 * p[2] + 12 * p[3] - 6 * p[4]) + (b**2 + 2 * c) * (
                p[2] - 2 * p[3] + p[4]
            )
            exact = fourth_by_enumeration(X, k)
            assert identity / k**4 == pytest.approx(exact, rel=1e-9, abs=1e-12 * variance**2)
            assert (
                fourth_moment(k, kurtosis, n) * variance**2
                >= exact * (1 - 1e-9) - 1e-12 * variance**2
            )
        assert np.mean(Y) == pytest.approx(variance, rel=1e-12)
        assert pair_moments(X) == pytest.approx((np.mean(Y), np.mean(np.square(Y))), rel=1e-9)


def test_fourth_moments_of_a_population():
    """(ii) against the exact value for signs and exponentials; it falls with k, with n to it."""
    for kurtosis, fourth in (
        (2.0, 1.0),
        (6.0, 9.0),
    ):  # E Y^2/(E Y)^2 = (E x^4 + 3)/2 for one dimension
        for k in (1, 2, 7, 100):
            exact = (fourth + 3 * (k - 1)) / k**3
            assert fourth_moment(k, kurtosis) == pytest.approx(exact, rel=1e-12) or k == 1
            assert fourth_moment(k, kurtosis) >= exact * (1 - 1e-12)
            assert fourth_moment(k, kurtosis, 10**9) == pytest.approx(
                fourth_moment(k, kurtosis), rel=1e-5
            )
    values = [fourth_moment(k, 20.0, 50) for k in range(1, 51)]
    assert values[-1] == 0 and all(a >= b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("n", [math.inf, 400])
def test_a_kurtosis_makes_the_size_smaller(n):
    for delta in (0.2, 0.05):
        k, plain = (
            k_surface(1.0, 0.1, 1 - delta, n, kurtosis=20.0),
            k_surface(1.0, 0.1, 1 - delta, n),
        )
        assert k < plain and fourth_moment(k, 20.0, n) <= delta * 1e-4 < fourth_moment(
            k - 1, 20.0, n
        )
    assert k_surface(1.0, 0.5, 0.1, n, kurtosis=1e6) <= k_surface(1.0, 0.5, 0.1, n)  # never worse


POOLS = {
    "normal": lambda g: g.normal(size=(1, 300)),
    "lognormal": lambda g: g.lognormal(sigma=1.5, size=(1, 300)),
    "cauchy": lambda g: np.abs(g.standard_cauchy((1, 300))),
    "one-spike": lambda g: np.eye(1, 300) * 40.0,
    "probes": lambda g: (
        g.lognormal(sigma=1.0, size=(1, 300)) * g.uniform(0.2, 2, (5, 1)) + g.normal(size=(5, 300))
    ),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("confidence", [0.7, 0.95])
@pytest.mark.parametrize("fourth", [False, True])
def test_enough_is_enough(name, confidence, fourth):
    """(thm:neighbourhood), (thm:fourth), simulated: few orders ever leave again from k on."""
    values = POOLS[name](np.random.default_rng(2))
    variance, n = values.var(1, ddof=1).mean(), values.shape[1]
    orders = random_orders(n, 3000, seed=8)
    mean, square = pair_moments(values.T)
    for fraction in (0.1, 0.3):
        tau = fraction * math.sqrt(variance)
        k = k_surface(variance, tau, confidence, n, square / mean**2 if fourth else None)
        share, low, high = exceedance(values, k, tau, orders)
        assert low <= share <= high and share <= 1 - confidence
        assert k < n  # or nothing would have been tested


def test_one_step_rule_is_not_enough():
    """The control: k = S/tau, where single steps fall below tau, fails in most orders."""
    values = POOLS["normal"](np.random.default_rng(2))
    S, orders = math.sqrt(values.var(1, ddof=1).mean()), random_orders(300, 1000, seed=8)
    for tau in (0.1 * S, 0.05 * S):
        _, low, _ = exceedance(values, math.ceil(S / tau), tau, orders)
        assert low > 0.3
        assert exceedance(values, k_surface(S**2, tau, 0.7, 300), tau, orders)[0] < 0.3


def test_gaussian_factor():
    """One probe: the quantile of sup |B|, by its tail's first terms; many: between it and 1."""
    values = np.random.default_rng(0).normal(size=(6, 500))
    assert gaussian_factor(values[:1], 0.95) == pytest.approx(
        2.2414**2, rel=1e-3
    )  # 4 (1 - Phi(q)) = 0.05
    assert gaussian_factor(values[:1], 0.99) == pytest.approx(2.8070**2, rel=1e-3)
    same = np.repeat(values[:1], 6, 0) * np.arange(1, 7)[:, None]
    assert gaussian_factor(same, 0.9) == pytest.approx(gaussian_factor(values[:1], 0.9), rel=0.1)
    assert 1 < gaussian_factor(values, 0.9) < 0.8 * gaussian_factor(values[:1], 0.9)
    assert gaussian_factor(np.ones((3, 50)), 0.9) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("pilots", [10, 60])
def test_the_interval_covers(pilots):
    """Pilots from a pool: the interval holds the true size as often as promised."""
    pool, generator = np.random.default_rng(3).exponential(size=(3, 4000)), np.random.default_rng(4)
    (truth, _, _), held, central = true_size(pool, 0.1, 0.9, streams=300), 0, []
    for seed in range(pilots):
        found = surface_forecast(pool[:, generator.integers(4000, size=300)], 0.1, 0.9, seed=seed)
        held += found["lower"] <= truth <= found["upper"]
        central.append(found["k"])
        assert found["lower"] <= found["k"] <= found["upper"]
    assert held >= 0.9 * pilots
    assert abs(math.log(np.median(central) / truth)) < 0.2


def test_fixed_probes_by_simulation():
    values, n = np.random.default_rng(5).uniform(size=(4, 3000)), 3000
    k = k_fixed_probes(values[:, :300], 0.1, 0.9, n, ceiling=1.0)
    orders = np.random.default_rng(6).permuted(np.tile(np.arange(n), (300, 1)), axis=1)[:, :k]
    far = np.abs(values[:, orders].mean(2) - values.mean(1, keepdims=True)).max(0) > 0.1
    assert 10 < k < n and far.mean() <= 0.1
    assert k_fixed_probes(values, 1e-6, 0.9, n, ceiling=1.0) == n
    assert k_fixed_probes(values, 0.1, 0.9, n, ceiling=50.0) > k
