"""Limits of a spread from a pilot: formulas, worst cases, and coverage by simulation."""

import itertools
import math

import numpy as np
import pytest
from refusal import refused
from scipy.stats import binom

from utils.sample_size.limits import bounded_upper, budget, inflation, spread_limits


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
    "spikes": (
        lambda g, n: (g.uniform(size=n) < 0.05).astype(float),
        spike_kurtosis(0.05),
        0.05 * 0.95,
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("failure", [0.1, 0.025])
def test_limits_cover(name, failure):
    """(prop:pilot), simulated: with a true kurtosis no limit fails more often than it says."""
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
    """The control: spikes that most pilots miss, and a kurtosis far below the true one."""
    generator, p, below = np.random.default_rng(6), 0.001, 0
    for _ in range(200):
        losses = (generator.uniform(size=400) < p) + 1e-3 * generator.normal(size=400)
        below += spread_limits(losses, 3.0, 0.025).upper < p * (1 - p)
        assert spread_limits(losses, 3.0, 0.025, ceiling=1.1).upper > p * (
            1 - p
        )  # a ceiling takes its place
    assert below > 0.3 * 200
    assert (
        spread_limits(losses, spike_kurtosis(p), 0.025).upper == math.inf
    )  # the true one: no pilot of 400 can tell


@pytest.mark.parametrize("kurtosis", [1.5, 4.0, 20.0])
@pytest.mark.parametrize("pairs", [20, 200])
def test_inflation_by_the_worst_variable(kurtosis, pairs):
    """For a coin the binomial tail itself fails no more than allowed, and not absurdly less."""
    for failure in (0.2, 0.01):
        x = 1 / inflation(pairs, kurtosis, failure)
        if x == 0:
            assert (
                1 - 1 / kurtosis
            ) ** pairs >= failure  # all zeros are no rarer: nothing can be said
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
        best = [
            inflation(200, 20.0, s) / math.sqrt(delta - s)
            for s in delta * np.linspace(0.01, 0.49, 97)
        ]
        assert 0 < share <= delta / 2
        assert inflation(200, 20.0, share) / math.sqrt(delta - share) <= 1.01 * min(best)
    assert budget(2000, 20.0, 0.1) < budget(120, 20.0, 0.1)  # a large pilot needs little


def test_limits_by_formula():
    generator = np.random.default_rng(0)
    losses, failure, kurtosis = generator.normal(size=(3, 501)), 0.03, 30.0
    found = spread_limits(losses, kurtosis, failure)
    Y = [
        np.mean((losses[:, i] - losses[:, j]) ** 2 / 2)
        for i, j in itertools.combinations(range(501), 2)
    ]
    mean = np.mean(Y)
    assert found.pairs == 250 and found.kurtosis == kurtosis
    assert found.estimate == pytest.approx(mean, rel=1e-10)
    assert found.observed_kurtosis == pytest.approx(np.mean(np.square(Y)) / mean**2, rel=1e-10)
    assert found.upper == pytest.approx(mean * inflation(250, 30.0, failure), rel=1e-12)
    assert found.lower == pytest.approx(
        mean / (1 + math.sqrt(29 * (1 / 0.03 - 1) / 250)), rel=1e-10
    )
    assert spread_limits(losses, kurtosis, failure, 0.2).lower > found.lower
    assert (
        spread_limits(losses, kurtosis, failure, distinct=200).upper > found.upper
    )  # copies count once
    # few pairs: the upper end is infinite and the lower one stands
    few = spread_limits(losses[:, :60], kurtosis, failure)
    assert few.upper == math.inf and 0 < few.lower < few.estimate
    # equal losses are no proof that all are equal
    assert spread_limits(np.ones((1, 60)), kurtosis, failure).upper == math.inf
    assert spread_limits(np.ones((1, 501)), kurtosis, failure).upper == 0.0
    # twice a pilot's own ratio, where it is larger
    spiked = np.zeros(400)
    spiked[:4] = 10.0
    heavy = spread_limits(spiked, 3.0, failure)
    assert heavy.kurtosis == 2 * heavy.observed_kurtosis > 40
    for constant in (np.ones(40), np.zeros(40)):
        flat = spread_limits(constant, 1.0, failure)
        assert (flat.estimate, flat.lower, flat.upper) == (0.0, 0.0, 0.0)
    refused(lambda: spread_limits(np.zeros(3), 3.0, failure), "3", "4")
