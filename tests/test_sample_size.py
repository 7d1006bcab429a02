"""Sample sizes: formulas by brute force, the probability statements by simulation, each verdict and its label."""

import itertools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusal import refused
from scipy.stats import beta, binom
from torch import nn

from utils.bounds import hessian_norm_bounds, loss_upper_bound
from utils.convergence import random_orders
from utils.curvature import Losses, per_sample_gradients
from utils.models import build_model
from utils.sample_size import (
    FAMILIES,
    ball_moments,
    baselines,
    bounded_upper,
    budget,
    exceedance,
    fitted_sizes,
    fourth_moment,
    gaussian_factor,
    inflation,
    k_ball,
    k_fixed_probes,
    k_step,
    k_surface,
    label_ceiling,
    least_pilot,
    neighbourhood,
    next_step,
    pair_moments,
    probe_losses,
    required_samples,
    spread_limits,
    surface_forecast,
    true_size,
    worst_range,
)

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = st.one_of(st.integers(-1000, 1000).map(lambda i: i / 64), st.sampled_from([0.0, 1.0, -1.0]))


class Linear(nn.Module):
    def __init__(self, n_classes=3):
        super().__init__()
        self.head = nn.Linear(5, n_classes)

    def forward(self, x):
        return self.head(x)


def linear_pilot(n=60, seed=0):
    torch.manual_seed(seed)
    return Linear(), torch.randn(n, 5), torch.randint(0, 3, (n,))


def tiny_vit(n=12, seed=0, **sizes):
    torch.manual_seed(seed)
    small = dict(image_size=4, channels=1, patch_size=2, n_classes=3, depth=1, n_heads=2, d_model=4, d_ff=4, eps=0.1)
    return build_model("vit", **(small | sizes)), torch.randn(n, 1, 4, 4), torch.randint(0, 3, (n,))


# --- k_step and k_surface -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(NUMBERS, min_size=2, max_size=6), st.sampled_from([0.01, 0.3, 1.0, 4.0]))
@example([0.0, 0.0, 0.0, 1.0], 0.25)
@example([1.0, 1.0, 0.0, 1.0], 0.2)
@example([2.0, 2.0], 0.1)
def test_k_step_by_enumeration(pool, tolerance):
    """Every order of the pool: k is enough, k - 1 is not, and n means not reached inside the pool."""
    exact = [Fraction(l) for l in pool]
    n, limit, worst = len(pool), Fraction(tolerance), {}
    for order in itertools.permutations(exact):
        mean = [sum(order[:k]) / k for k in range(1, n + 1)]
        for k in range(1, n):
            worst[k] = max(worst.get(k, Fraction(0)), abs(mean[k] - mean[k - 1]))
    if any(abs(w - limit) < Fraction(1, 10**9) for w in worst.values()):
        limit, tolerance = limit + Fraction(1, 10**6), tolerance + 1e-6  # not on the edge: rounding would decide
    brute = next(k for k in range(1, n + 1) if all(worst[j] <= limit for j in range(k, n)))
    assert k_step(pool, tolerance) == brute
    assert k_step(np.array(pool), 1e9) == 1


def test_k_surface_formula():
    for variance, tau, confidence, n in [(0.4, 0.05, 0.95, math.inf), (3.0, 0.1, 0.9, 500), (1e-3, 0.5, 0.99, 20)]:
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
        [np.square(X[list(chosen)].mean(0)).sum() ** 2 for chosen in itertools.combinations(range(len(X)), k)]
    )


@pytest.mark.parametrize("n", [4, 5, 8])
def test_fourth_moments_by_enumeration(n):
    """Theorem (thm:fourth), (i): the identity for every subset size, and the bound from the pool's own kurtosis."""
    generator = np.random.default_rng(n)
    pools = [np.eye(n, 1), *(generator.normal(size=(n, d)) for d in (1, 3)), generator.standard_cauchy((n, 2))]
    for X in pools:
        X = X - X.mean(0)
        variance = np.square(X).sum() / (n - 1)
        Y = [np.square(X[i] - X[j]).sum() / 2 for i, j in itertools.combinations(range(n), 2)]
        kurtosis = np.mean(np.square(Y)) / np.mean(Y) ** 2
        a, b, c = np.square(np.square(X).sum(1)).sum(), np.square(X).sum(), np.square(X @ X.T).sum()
        for k in range(1, n + 1):
            p = [math.prod((k - i) / (n - i) for i in range(j)) if k >= j else 0.0 for j in range(5)]
            identity = a * (p[1] - 7 * p[2] + 12 * p[3] - 6 * p[4]) + (b**2 + 2 * c) * (p[2] - 2 * p[3] + p[4])
            exact = fourth_by_enumeration(X, k)
            assert identity / k**4 == pytest.approx(exact, rel=1e-9, abs=1e-12 * variance**2)
            assert fourth_moment(k, kurtosis, n) * variance**2 >= exact * (1 - 1e-9) - 1e-12 * variance**2
        assert np.mean(Y) == pytest.approx(variance, rel=1e-12)
        assert pair_moments(X) == pytest.approx((np.mean(Y), np.mean(np.square(Y))), rel=1e-9)


def test_fourth_moments_of_a_population():
    """(ii) against the exact value for Rademacher and exponential variables; it falls with k, and with n to it."""
    for kurtosis, fourth in ((2.0, 1.0), (6.0, 9.0)):  # E Y^2/(E Y)^2 = (E x^4 + 3)/2 for one dimension
        for k in (1, 2, 7, 100):
            exact = (fourth + 3 * (k - 1)) / k**3
            assert fourth_moment(k, kurtosis) == pytest.approx(exact, rel=1e-12) or k == 1
            assert fourth_moment(k, kurtosis) >= exact * (1 - 1e-12)
            assert fourth_moment(k, kurtosis, 10**9) == pytest.approx(fourth_moment(k, kurtosis), rel=1e-5)
    values = [fourth_moment(k, 20.0, 50) for k in range(1, 51)]
    assert values[-1] == 0 and all(a >= b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("n", [math.inf, 400])
def test_a_kurtosis_makes_the_size_smaller(n):
    for delta in (0.2, 0.05):
        k, plain = k_surface(1.0, 0.1, 1 - delta, n, kurtosis=20.0), k_surface(1.0, 0.1, 1 - delta, n)
        assert k < plain and fourth_moment(k, 20.0, n) <= delta * 1e-4 < fourth_moment(k - 1, 20.0, n)
    assert k_surface(1.0, 0.5, 0.1, n, kurtosis=1e6) <= k_surface(1.0, 0.5, 0.1, n)  # never worse


POOLS = {
    "normal": lambda g: g.normal(size=(1, 300)),
    "lognormal": lambda g: g.lognormal(sigma=1.5, size=(1, 300)),
    "cauchy": lambda g: np.abs(g.standard_cauchy((1, 300))),
    "one-spike": lambda g: np.eye(1, 300) * 40.0,
    "probes": lambda g: g.lognormal(sigma=1.0, size=(1, 300)) * g.uniform(0.2, 2, (5, 1)) + g.normal(size=(5, 300)),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("confidence", [0.7, 0.95])
@pytest.mark.parametrize("fourth", [False, True])
def test_enough_is_enough(name, confidence, fourth):
    """Theorems (thm:neighbourhood), (thm:fourth), simulated: from k on, few orders ever leave the tolerance again."""
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
    """The control: k = S/tau, where single steps fall below tau, leaves the tolerance in most orders."""
    values = POOLS["normal"](np.random.default_rng(2))
    S, orders = math.sqrt(values.var(1, ddof=1).mean()), random_orders(300, 1000, seed=8)
    for tau in (0.1 * S, 0.05 * S):
        _, low, _ = exceedance(values, math.ceil(S / tau), tau, orders)
        assert low > 0.3
        assert exceedance(values, k_surface(S**2, tau, 0.7, 300), tau, orders)[0] < 0.3


def test_exceedance_by_hand():
    """Z_k' is the root mean square over the probes; the event is about every k' >= k; the interval is the exact one."""
    values = np.array([[0.0, 1.0, 2.0, 5.0], [1.0, 1.0, 0.0, -2.0]])
    orders = np.array(list(itertools.permutations(range(4))))
    for k in (1, 2, 3, 4):
        for tau in (0.2, 0.9, 1.6):
            hits = 0
            for order in orders:
                Z = [
                    math.sqrt(np.mean([(row[order[:j]].mean() - row.mean()) ** 2 for row in values]))
                    for j in range(k, 5)
                ]
                hits += max(Z) > tau
            share, low, high = exceedance(values, k, tau, orders)
            assert share == hits / 24
            assert low == pytest.approx(beta.ppf(0.025, hits, 25 - hits) if hits else 0.0, rel=1e-12)
            assert high == pytest.approx(beta.ppf(0.975, hits + 1, 24 - hits) if hits < 24 else 1.0, rel=1e-12)
    assert exceedance(values, 4, 1e-9, orders) == (0.0, 0.0, pytest.approx(beta.ppf(0.975, 1, 24), rel=1e-12))
    assert exceedance(values[0], 1, 1e-9, orders)[0] == 1.0  # one probe as a plain row; no order starts at the mean


# --- the pilot ------------------------------------------------------------------------------------------


def lognormal_kurtosis(sigma):
    """E Y^2 / (E Y)^2 of Y = (l - l')^2/2 for two independent lognormal losses."""
    m = [math.exp(k * k * sigma * sigma / 2) for k in range(5)]
    return (2 * m[4] - 8 * m[3] * m[1] + 6 * m[2] ** 2) / 4 / (m[2] - m[1] ** 2) ** 2


def spike_kurtosis(p):
    return 1 / (2 * p * (1 - p))


DISTRIBUTIONS = {
    "normal": (lambda g, n: g.normal(size=n), 3.0, 1.0),
    "lognormal": (
        lambda g, n: g.lognormal(sigma=0.4, size=n),
        lognormal_kurtosis(0.4),
        math.exp(0.16) * (math.exp(0.16) - 1),
    ),
    "spikes": (lambda g, n: (g.uniform(size=n) < 0.05).astype(float), spike_kurtosis(0.05), 0.05 * 0.95),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("failure", [0.1, 0.025])
def test_limits_cover(name, failure):
    """Proposition (prop:pilot), simulated: with a true kurtosis each limit fails at most as often as it says."""
    draw, kurtosis, variance = DISTRIBUTIONS[name]
    generator, n, finite = np.random.default_rng(6), 1000, 0
    above = below = 0
    for _ in range(n):
        found = spread_limits(draw(generator, 400), kurtosis, failure)
        assert found.lower <= found.estimate <= found.upper and found.pairs == 200
        above, below = above + (found.lower > variance), below + (found.upper < variance)
        finite += math.isfinite(found.upper)
    assert above / n <= failure and below / n <= failure
    assert finite > 0.9 * n


def test_limits_need_their_assumption():
    """The control: rare spikes, which most pilots do not contain, and an assumed kurtosis far below the true one."""
    generator, p, below = np.random.default_rng(6), 0.001, 0
    for _ in range(200):
        losses = (generator.uniform(size=400) < p) + 1e-3 * generator.normal(size=400)
        below += spread_limits(losses, 3.0, 0.025).upper < p * (1 - p)
        assert spread_limits(losses, 3.0, 0.025, ceiling=1.1).upper > p * (1 - p)  # a ceiling takes its place
    assert below > 0.3 * 200
    assert spread_limits(losses, spike_kurtosis(p), 0.025).upper == math.inf  # the true one: no pilot of 400 can tell


@pytest.mark.parametrize("kurtosis", [1.5, 4.0, 20.0])
@pytest.mark.parametrize("pairs", [20, 200])
def test_inflation_by_the_worst_variable(kurtosis, pairs):
    """For the two-point variable the binomial tail itself fails no more than allowed, and not absurdly less."""
    for failure in (0.2, 0.01):
        x = 1 / inflation(pairs, kurtosis, failure)
        if x == 0:
            assert (1 - 1 / kurtosis) ** pairs >= failure  # all zeros are no rarer: nothing can be said
            continue
        tail = binom.cdf(math.floor(x * pairs / kurtosis * (1 + 1e-12)), pairs, 1 / kurtosis)
        assert failure / 200 <= tail <= failure
        assert inflation(pairs, kurtosis + 1, failure) > 1 / x
    assert inflation(pairs, 1.0, 0.01) == 1.0


def test_bounded_upper_by_the_worst_variable():
    for pairs, q, failure in ((50, 0.0, 0.05), (200, 0.03, 0.01), (40, 0.9, 0.1), (10, 1.0, 0.1)):
        p = bounded_upper(3 * q, 3.0, pairs, failure) / 3
        assert q <= p <= 1
        if p < 1:
            assert binom.cdf(round(q * pairs), pairs, p) <= failure * (1 + 1e-9)
    assert bounded_upper(0.0, 3.0, 50, 0.05) == pytest.approx(3 * (1 - 0.05 ** (1 / 50)), rel=1e-9)


def test_budget_is_a_share_of_delta():
    for delta in (0.3, 0.05):
        share = budget(200, 20.0, delta)
        best = [inflation(200, 20.0, s) / math.sqrt(delta - s) for s in delta * np.linspace(0.01, 0.49, 97)]
        assert 0 < share <= delta / 2
        assert inflation(200, 20.0, share) / math.sqrt(delta - share) <= 1.01 * min(best)
    assert budget(2000, 20.0, 0.1) < budget(120, 20.0, 0.1)  # a large pilot needs little


def test_limits_by_formula():
    generator = np.random.default_rng(0)
    losses, failure, kurtosis = generator.normal(size=(3, 501)), 0.03, 30.0
    found = spread_limits(losses, kurtosis, failure)
    Y = [np.mean((losses[:, i] - losses[:, j]) ** 2 / 2) for i, j in itertools.combinations(range(501), 2)]
    mean = np.mean(Y)
    assert found.pairs == 250 and found.kurtosis == kurtosis
    assert found.estimate == pytest.approx(mean, rel=1e-10)
    assert found.observed_kurtosis == pytest.approx(np.mean(np.square(Y)) / mean**2, rel=1e-10)
    assert found.upper == pytest.approx(mean * inflation(250, 30.0, failure), rel=1e-12)
    assert found.lower == pytest.approx(mean / (1 + math.sqrt(29 * (1 / 0.03 - 1) / 250)), rel=1e-10)
    assert spread_limits(losses, kurtosis, failure, 0.2).lower > found.lower
    assert spread_limits(losses, kurtosis, failure, distinct=200).upper > found.upper  # copies count once
    # few pairs: the upper end is infinite and the lower one stands
    few = spread_limits(losses[:, :60], kurtosis, failure)
    assert few.upper == math.inf and 0 < few.lower < few.estimate
    # twice a pilot's own ratio, where it is larger
    spiked = np.zeros(400)
    spiked[:4] = 10.0
    heavy = spread_limits(spiked, 3.0, failure)
    assert heavy.kurtosis == 2 * heavy.observed_kurtosis > 40
    for constant in (np.ones(40), np.zeros(40)):
        flat = spread_limits(constant, 1.0, failure)
        assert (flat.estimate, flat.lower, flat.upper) == (0.0, 0.0, 0.0)
    refused(lambda: spread_limits(np.zeros(3), 3.0, failure), "3", "4")


def test_gaussian_factor():
    """One probe: the quantile of sup |B|, by the first terms of its tail; many: between that and 1."""
    values = np.random.default_rng(0).normal(size=(6, 500))
    assert gaussian_factor(values[:1], 0.95) == pytest.approx(2.2414**2, rel=1e-3)  # 4 (1 - Phi(q)) = 0.05
    assert gaussian_factor(values[:1], 0.99) == pytest.approx(2.8070**2, rel=1e-3)
    same = np.repeat(values[:1], 6, 0) * np.arange(1, 7)[:, None]
    assert gaussian_factor(same, 0.9) == pytest.approx(gaussian_factor(values[:1], 0.9), rel=0.1)
    assert 1 < gaussian_factor(values, 0.9) < 0.8 * gaussian_factor(values[:1], 0.9)
    assert gaussian_factor(np.ones((3, 50)), 0.9) == 1.0


def test_true_size_by_the_gaussian_limit():
    pool = np.random.default_rng(1).exponential(size=3000)
    expected = gaussian_factor(pool[None], 0.9) * pool.var() / 0.1**2
    k, low, high = true_size(pool, 0.1, 0.9, streams=600)
    assert k == pytest.approx(expected, rel=0.15) and low <= expected <= high and low < k < high
    assert true_size(pool, 0.1, 0.9, streams=50) == true_size(pool, 0.1, 0.9, streams=50)


def test_the_interval_covers():
    """At fixed weights, pilots from a pool: the interval holds the true size at least as often as promised."""
    pool, generator = np.random.default_rng(3).exponential(size=(3, 4000)), np.random.default_rng(4)
    (truth, _, _), held, central = true_size(pool, 0.1, 0.9, streams=300), 0, []
    for seed in range(60):
        found = surface_forecast(pool[:, generator.integers(4000, size=300)], 0.1, 0.9, seed=seed)
        held += found["lower"] <= truth <= found["upper"]
        central.append(found["k"])
        assert found["lower"] <= found["k"] <= found["upper"]
    assert held >= 54
    assert abs(math.log(np.median(central) / truth)) < 0.2


# --- the ball, fixed probes, the next sample ----------------------------------------------------------------


def test_ball_sizes_by_formula():
    assert k_ball(2.0, 0.1, 0.9) == k_surface(4.0, 0.1, 0.9) == math.ceil(4 / (0.1 * 0.01) * (1 - 1e-12))
    assert k_ball(2.0, 0.1, 0.9, kurtosis=20.0) == k_surface(4.0, 0.1, 0.9, kurtosis=20.0)
    assert k_ball(2.0, 0.1, 0.9, remainder=0.04) == k_surface(4.0, 0.06, 0.9)
    moment = 0.5 * math.sqrt(0.1) * 0.1
    k = k_ball(2.0, 0.1, 0.9, moment=moment, kurtosis=20.0)
    assert (2 / math.sqrt(k) + moment) ** 2 / 0.01 <= 0.1 < (2 / math.sqrt(k - 2) + moment) ** 2 / 0.01
    assert k_ball(2.0, 0.1, 0.9, remainder=0.1) == k_ball(2.0, 0.1, 0.9, moment=0.04) == math.inf


def test_ball_moments_are_the_spreads():
    """Each is unbiased for a covariance of the pilot: values and gradients exactly, Hessians over many pairings."""
    model, x, y = linear_pilot(12)
    losses = Losses(model, x, y)
    found, g = ball_moments(losses), per_sample_gradients(model, x, y)
    assert found["S"][0] == pytest.approx(float(losses.values().var()), rel=1e-10)
    assert found["gradient"][0] == pytest.approx(float(g.var(0).sum()), rel=1e-10)
    units = torch.eye(losses.P, dtype=torch.float64)
    H = torch.stack([losses.sample_products(e.expand(12, -1)) for e in units], 2)  # (n, P, P)
    means = [ball_moments(losses, seed=seed)["curvature"][0] for seed in range(400)]
    error = np.std(means) / math.sqrt(400)
    assert abs(np.mean(means) - float(H.var(0).sum())) <= 4 * error


def test_ball_and_excess_answers():
    """Twice the tolerance and a gap: the excess size is the ball's at half of what is left."""
    model, x, y = linear_pilot(400)
    ball = required_samples(model, x, y, 0.1, 0.05, 0.9, "ball", seed=2)
    excess = required_samples(model, x, y, 0.25, 0.05, 0.9, "excess", gap=0.05, seed=2)
    assert (excess.k, excess.upper) == (ball.k, ball.upper) and "second order" in ball.statement
    assert ball.upper >= ball.k > required_samples(model, x, y, 0.1, 0.0, 0.9).k
    assert required_samples(model, x, y, 0.1, 0.05, 0.9, "ball", remainder=0.02, seed=2).upper > ball.upper
    assert required_samples(model, x, y, 0.1, 0.05, 0.9, "ball", remainder=0.1).verdict == "cannot tell"
    assert required_samples(model, x, y, 0.1, 0.05, 0.9, "excess", gap=0.1).verdict == "cannot tell"
    # by a rung: no remainder, a term that does not fall
    vit, u, v = tiny_vit(300)
    sure = required_samples(vit, u, v, 1.0, 1e-4, 0.9, "ball", rung="activations")
    M = hessian_norm_bounds(vit, u, v, rung="activations", radius=1e-4).values
    assert sure.terms["moment"] == pytest.approx(float(M.square().mean().sqrt()), rel=1e-9)
    assert "second order" not in sure.statement and sure.upper < math.inf
    assert required_samples(vit, u, v, 1e-3, 1.0, 0.9, "ball", rung="prior").verdict == "cannot tell"


def test_a_ball_answer_is_enough():
    """Logistic regression on a ball: after k samples the sup strays as rarely as promised."""
    model, x, y = linear_pilot(400)
    losses, tau, R = Losses(model, x, y), 0.3, 0.1
    k = required_samples(model, x, y, tau, R, 0.8, "ball").upper
    generator, probes = torch.Generator().manual_seed(0), neighbourhood(losses.w, R, 40)
    values = probe_losses(losses, probes)
    strays = 0
    for _ in range(200):
        rows = torch.randint(400, (int(k),), generator=generator).numpy()
        strays += np.abs(values[:, rows].mean(1) - values.mean(1)).max() > tau
    assert strays <= 0.2 * 200


@pytest.mark.parametrize("scale", [1e100, 1e200])
def test_a_bound_whose_square_is_no_double_still_gives_an_answer(scale, monkeypatch):
    model, x, y = linear_pilot(400)
    drawn = 1 + torch.rand(len(x), dtype=torch.float64)
    monkeypatch.setattr("utils.sample_size.norms_on_ball", lambda *_: scale * drawn)
    sure = required_samples(model, x, y, 1.0, 1e-4, 0.9, "ball", rung="prior")
    assert sure.terms["moment"] == pytest.approx(scale * float(drawn.square().mean().sqrt()), rel=1e-12)
    assert math.isfinite(sure.terms["moment_upper"]) and sure.verdict == "cannot tell" and math.isinf(sure.k)


def test_fixed_probes_by_simulation():
    values, n = np.random.default_rng(5).uniform(size=(4, 3000)), 3000
    k = k_fixed_probes(values[:, :300], 0.1, 0.9, n, ceiling=1.0)
    orders = np.random.default_rng(6).permuted(np.tile(np.arange(n), (300, 1)), axis=1)[:, :k]
    far = np.abs(values[:, orders].mean(2) - values.mean(1, keepdims=True)).max(0) > 0.1
    assert 10 < k < n and far.mean() <= 0.1
    assert k_fixed_probes(values, 1e-6, 0.9, n, ceiling=1.0) == n
    assert k_fixed_probes(values, 0.1, 0.9, n, ceiling=50.0) > k


def test_next_step_covers():
    """Proposition (prop:exchangeable): the step to one more sample, at its promise, and an answer that says so."""
    generator, inside = np.random.default_rng(7), 0
    for _ in range(1000):
        l = generator.exponential(size=41)
        inside += abs(l.mean() - l[:40].mean()) <= next_step(np.abs(l[:40] - l[:40].mean()), 0.8) / 39
    assert inside >= 760  # 3 standard errors of 0.8
    assert next_step(np.ones(8), 0.9) == math.inf and next_step(np.ones(9), 0.9) == 1.0
    model, x, y = linear_pilot(60)
    found = required_samples(model, x, y, 0.5, criterion="next", confidence=0.9)
    assert found.verdict == "enough" and found.upper == 60
    assert required_samples(model, x, y, 1e-3, criterion="next", confidence=0.9).verdict == "cannot tell"
    few = required_samples(model, x[:5], y[:5], 0.5, criterion="next", confidence=0.9)
    assert few.verdict == "cannot tell" and "at least 5 more" in few.sentence


# --- rivals and pathologies -----------------------------------------------------------------------------------


def test_families_find_their_own_curves():
    k = np.geomspace(4, 400, 20)
    for family, (function, parameters) in FAMILIES.items():
        curve = function(k, *parameters)
        target = float(function(np.array([2000.0]), *parameters)[0])
        sizes = fitted_sizes(k, curve, [target, -1e9], family)
        assert sizes[0] == pytest.approx(2000, rel=0.05), family
        assert math.isinf(sizes[1]) or family in ("logarithmic", "algebraic root")


def test_label_ceiling():
    """Every labelling stays below it at every probe, and one attains it."""
    model, x, y = tiny_vit(9)
    losses = Losses(model, x, y)
    probes = neighbourhood(losses.w, 0.3, 3)
    ceiling = label_ceiling(losses, probes, 3)
    every = np.stack([probe_losses(Losses(model, x, torch.full_like(y, c)), probes) for c in range(3)])
    np.testing.assert_allclose(ceiling, every.max((0, 1)), rtol=1e-12)
    assert torch.equal(losses.y, y)


def test_baselines():
    values = np.random.default_rng(8).exponential(size=(1, 600))
    found = baselines(values, 0.05)
    assert set(found) == {"one step", "doubling", *FAMILIES}
    S = values.std(ddof=1)
    assert found["one step"] == math.ceil(S / 0.05)
    law = (S * math.sqrt(2 / math.pi) / 0.05) ** 2  # E|L_k - L| ~ S sqrt(2/(pi k))
    assert found["power law"] == pytest.approx(law, rel=0.5)
    assert baselines(values, 1e-6)["doubling"] == math.inf
    assert np.asarray(baselines(values, 0.05, [0.05, 0.02])["power law"]).shape == (2,)


def test_pilots_that_are_no_random_sample():
    model, x, y = linear_pilot(400)
    order = Losses(model, x, y).values().argsort()
    for criterion in ("surface", "ball", "excess", "next"):
        drifting = required_samples(model, x[order], y[order], 0.5, 0.01, 0.8, criterion)
        assert drifting.verdict == "cannot tell" and "order" in drifting.sentence and drifting.upper == math.inf
    assert required_samples(model, x, y, 0.5, confidence=0.8).verdict != "cannot tell"
    for criterion in ("surface", "ball"):
        copies = required_samples(model, x[:20].repeat(20, 1), y[:20].repeat(20), 0.5, 0.01, 0.8, criterion)
        assert copies.verdict == "cannot tell" and copies.upper == math.inf
    five = required_samples(model, x[:5], y[:5], 0.5, confidence=0.8)
    assert five.verdict == "cannot tell" and "more first" in five.sentence


# --- neighbourhood and worst range ------------------------------------------------------------------------


def test_probes_lie_uniformly_in_the_ball():
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    probes = neighbourhood(w, 0.7, 4000, seed=1)
    length = (probes - w).norm(dim=1)
    assert probes.shape == (4000, 3) and (length <= 0.7 * (1 + 1e-12)).all()
    share = (length / 0.7) ** 3  # the mass within each radius: uniform on [0, 1]
    assert abs(float(share.mean()) - 0.5) <= 4 / math.sqrt(12 * 4000)
    for level in (0.1, 0.5, 0.9):
        assert abs(float((share <= level).double().mean()) - level) <= 4 * math.sqrt(level * (1 - level) / 4000)
    assert ((probes - w).mean(0).abs() <= 4 * 0.7 / math.sqrt(5 * 4000)).all()
    assert torch.equal(probes, neighbourhood(w, 0.7, 4000, seed=1))
    assert not torch.equal(probes, neighbourhood(w, 0.7, 4000, seed=2))
    assert torch.equal(neighbourhood(w, 0.0, 8), w[None])
    many = neighbourhood(torch.zeros(5000, dtype=torch.float64), 2.0, 3)
    assert (many.norm(dim=1) <= 2 * (1 + 1e-12)).all() and (many.norm(dim=1) > 1.99).all()


def test_probe_losses():
    model, x, y = tiny_vit(depth=1)
    losses = Losses(model, x, y)
    probes = neighbourhood(losses.w, 0.5, 3)
    values = probe_losses(losses, probes)
    assert values.shape == (3, 12) and values.dtype == np.float64
    with torch.no_grad():
        for w, row in zip(probes, values, strict=True):
            moved = build_model("vit", **vars(model.config)).double()
            nn.utils.vector_to_parameters(w, moved.parameters())
            direct = nn.functional.cross_entropy(moved(x.double()), y, reduction="none")
            np.testing.assert_allclose(row, direct.numpy(), rtol=1e-10)


@pytest.mark.parametrize("radius", [0.0, 0.02])
def test_worst_range_by_pairs(radius):
    model, x, y = tiny_vit()
    losses = Losses(model, x, y)
    parts, values, g = worst_range(losses, radius, model), losses.values(), per_sample_gradients(model, x, y)
    pairs = list(itertools.combinations(range(12), 2))
    assert parts["value"] == pytest.approx(max(abs(float(values[i] - values[j])) for i, j in pairs), rel=1e-12)
    assert parts["gradient"] == pytest.approx(radius * max(float((g[i] - g[j]).norm()) for i, j in pairs), rel=1e-9)
    if radius == 0:
        assert parts["gradient"] == parts["curvature"] == 0
    else:
        prior = hessian_norm_bounds(model, x, y, rung="prior", radius=radius).values
        assert parts["curvature"] == pytest.approx(radius**2 * float(prior.max()), rel=1e-12)
    assert parts["D"] == pytest.approx(parts["value"] + parts["gradient"] + parts["curvature"], rel=1e-12)
    # what it bounds: (k+1)|L_{k+1} - L_k| at any weights of the ball, for any order
    for row in probe_losses(losses, neighbourhood(losses.w, radius, 20)):
        assert np.ptp(row) <= parts["D"]
    if radius:
        linear, x, y = linear_pilot(6)
        refused(lambda: worst_range(Losses(linear, x, y), radius, linear), "ViT")


def test_worst_range_of_nearly_equal_gradients():
    """Gradients far from zero that differ little: their distance is not lost to cancellation."""
    model, x, y = tiny_vit(40)
    g = 1e6 + 1e-3 * torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = SimpleNamespace(
        values=lambda: torch.ones(40), sample_gradients=lambda: g, x=x.double(), y=y, loss="cross_entropy"
    )
    exact = max(float((a - b).norm()) for a, b in itertools.combinations(g, 2))
    assert worst_range(losses, 0.1, model)["gradient"] == pytest.approx(0.1 * exact, rel=1e-6)


# --- the answer -----------------------------------------------------------------------------------------


def test_surface_answer_by_formula():
    model, x, y = linear_pilot(400)
    tau, confidence = 0.1, 0.9
    for radius, n_probes in ((0.0, 8), (0.7, 4)):
        found = required_samples(model, x, y, tau, radius, confidence, kurtosis=8.0, n_probes=n_probes, seed=3)
        losses = Losses(model, x, y)
        values = probe_losses(losses, neighbourhood(losses.w, radius, n_probes, seed=3))
        assert values.shape == (n_probes if radius else 1, 400)
        share, factor = budget(200, 8.0, 0.1), gaussian_factor(values, 0.9, seed=3)
        variance, spread = values.var(1, ddof=1).mean(), spread_limits(values, 8.0, share, 0.05)
        assert found.k == math.ceil(factor * variance / tau**2)
        assert found.upper == k_surface(spread.upper, tau, 1 - (0.1 - share), kurtosis=spread.kurtosis)
        assert found.lower == math.floor(factor * spread.lower / tau**2)
        assert found.lower <= found.k <= found.upper < math.inf
        assert found.terms["S"] == pytest.approx(math.sqrt(variance)) and found.terms["pilot"] == 400
        assert found.terms["S_lower"] <= found.terms["S"] <= found.terms["S_upper"]
        prices = found.terms["price_of_theorem"] * found.terms["price_of_pilot"]
        assert prices == pytest.approx(found.upper / found.k, rel=1e-12)
        assert (found.criterion, found.tolerance, found.radius, found.confidence) == ("surface", tau, radius, 0.9)
        again = required_samples(model, x, y, tau, radius, confidence, kurtosis=8.0, n_probes=n_probes, seed=3)
        assert again == found
    bounded = required_samples(model, x, y, tau, 0.0, confidence, ceiling=20.0)
    share = budget(200, 20.0, 0.1)
    upper = bounded_upper(float(losses.values().var()), 200.0, 200, share)
    assert bounded.terms["S_upper"] == pytest.approx(math.sqrt(upper), rel=1e-9)


def test_surface_verdicts():
    model, x, y = linear_pilot(400)
    enough = required_samples(model, x, y, 1.0, confidence=0.8)
    assert enough.verdict == "enough" and enough.upper <= 400 and "400" in enough.sentence
    need = required_samples(model, x, y, 0.01, confidence=0.8)
    assert need.verdict == "need" and 400 < need.upper < math.inf and str(need.upper) in need.sentence
    few = required_samples(model, x[:30], y[:30], 1.0, confidence=0.8)
    assert few.verdict == "cannot tell" and few.upper == math.inf and few.k < math.inf and few.lower >= 1
    # what it asks for first is what makes the upper end finite
    more = int(few.sentence.split("at least ")[1].split()[0])
    share = few.terms["pilot_failure"]
    assert 30 + more == least_pilot(few.terms["kurtosis"], share)
    assert inflation((30 + more) // 2, few.terms["kurtosis"], share) < math.inf
    assert inflation((30 + more) // 2 - 1, few.terms["kurtosis"], share) == math.inf
    # the pilot's own kurtosis overrides an assumption that it contradicts
    heavy = required_samples(model, x, y, 1.0, confidence=0.8, kurtosis=1.5)
    assert heavy.terms["kurtosis"] == 2 * heavy.terms["observed_kurtosis"] > 1.5


def test_step_verdicts_and_ceiling():
    model, x, y = tiny_vit(60)
    losses = Losses(model, x, y)
    values = losses.values().numpy()
    for radius in (0.0, 0.01):
        ceiling, D = loss_upper_bound(model, radius), worst_range(losses, radius, model)["D"]
        for tau, verdict in ((1.0, "enough"), (0.01, "need")):
            found = required_samples(model, x, y, tau, radius, criterion="step")
            assert found.verdict == verdict
            assert found.k == max(1, math.ceil(D / tau) - 1) and found.lower == k_step(values, tau)
            assert found.upper == max(1, math.ceil(ceiling / tau) - 1) and found.terms["ceiling"] == ceiling
            assert (found.upper <= 60) == (verdict == "enough")
            assert found.lower <= max(found.k, 1)
    # a module without a known ceiling, and a loss without one: nothing is said beyond the pilot
    linear, u, v = linear_pilot(60)
    for found in (
        required_samples(linear, u, v, 1.0, criterion="step"),
        required_samples(model, x, y, 1.0, criterion="step", loss="mse"),
    ):
        assert found.verdict == "cannot tell" and found.upper == found.terms["ceiling"] == math.inf
        assert found.k < math.inf
    refused(lambda: required_samples(linear, u, v, 1.0, radius=0.1, criterion="step"), "ViT")


def test_upper_end_of_the_step_holds_for_samples_not_in_the_pilot():
    """With large logits: no image, however it looks, moves the mean of k images by more than the ceiling / (k + 1)."""
    model, x, y = tiny_vit(30, pool="mean")
    with torch.no_grad():
        model.head.weight *= 8
    new, labels = 50 * torch.randn(500, 1, 4, 4), torch.arange(500) % 3
    tau = 0.5
    found = required_samples(model, x, y, tau, criterion="step")
    values = Losses(model, new, labels).values().numpy()
    assert k_step(values, tau) <= found.upper
    assert k_step(values, tau) > found.k  # the pilot's own answer does not hold beyond it


def test_pool_statement():
    model, x, y = linear_pilot(40)
    torch.manual_seed(9)
    other = torch.randn(50, 5)
    for fitted_on, pool in (
        (None, False),
        (other, False),
        (x, True),
        (torch.cat([other, x[7:8]]), True),
        (torch.cat([other, x[7:8]]).double(), True),  # the same row in another precision
    ):
        found = required_samples(model, x, y, 1.0, fitted_on=fitted_on)
        assert found.statement.startswith("pool statement" if pool else "population statement")
        step = required_samples(model, x, y, 1.0, criterion="step", fitted_on=fitted_on)
        assert step.statement == found.statement
    zeros = torch.zeros(1, 5)
    found = required_samples(model, torch.cat([x, -zeros]), torch.cat([y, y[:1]]), 1.0, fitted_on=zeros)
    assert found.statement.startswith("pool statement")  # -0 is 0


def test_bad_arguments():
    model, x, y = linear_pilot(20)
    for wrong in (
        dict(tolerance=0.0),
        dict(tolerance=-1.0),
        dict(tolerance=math.nan),
        dict(radius=-0.1),
        dict(radius=math.nan),
        dict(radius=math.inf),
        dict(confidence=0.0),
        dict(confidence=1.0),
        dict(confidence=95),
    ):
        (name,) = wrong
        refused(lambda w=wrong: required_samples(model, x, y, **({"tolerance": 0.1} | w)), name)
    refused(lambda: required_samples(model, x, y, 0.1, criterion="both"), "both", "surface", "excess", "step")
    refused(lambda: required_samples(model, x[:3], y[:3], 0.1), "3")
    refused(lambda: required_samples(model, x, y, 0.1, radius=0.1, n_probes=0), "n_probes")
    refused(lambda: required_samples(model, x, y[:4], 0.1), "20", "4")


def test_model_is_left_alone():
    model, x, y = tiny_vit()
    model.train()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    required_samples(model, x, y, 0.1, radius=0.1)
    for criterion in ("step", "ball", "excess", "next"):
        required_samples(model, x, y, 0.1, radius=0.1, criterion=criterion)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# --- the study of coverage -----------------------------------------------------------------------------------


def test_ten_pilots_of_the_study(tmp_path):
    """`make coverage`, ten pilots a cell on the data that need no download: same truths as committed, promises kept."""
    script = [sys.executable, "-m", "workflow.experiments.coverage", "--pilots", "10", "--parts", "fixed", "--out", str(tmp_path)]
    done = subprocess.run(script, cwd=ROOT, env=os.environ | {"DATA_ROOT": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, committed = (pd.read_csv(f / "fixed.csv") for f in (tmp_path, ROOT / "data/results/coverage"))
    cells = ["dataset", "model", "radius", "tolerance", "pilot"]
    both = found[found["rule"] == "interval"].merge(committed[committed["rule"] == "interval"], on=cells)
    assert len(both) == 24 and (both["covered_x"] >= 0.8).all()
    assert np.allclose(both["truth_x"], both["truth_y"], rtol=0.1)
    assert both["ratio_median_x"].between(both["ratio_median_y"] / 2, both["ratio_median_y"] * 2).all()
    control = found[found["rule"] == "one step"]
    assert (control["covered"] == 0).all()  # the rule of the papers never reaches the truth
