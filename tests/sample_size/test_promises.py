"""Counting broken promises: the event by hand, the true size by its limit, both tables."""

import itertools
import math

import numpy as np
import pytest
from networks import linear_pilot, vit_pilot
from scipy.stats import beta

from utils.sample_size import baselines, exceedance, k_surface, pilot, true_size
from utils.sample_size.coverage import checks, forecasts
from utils.sample_size.step import k_step
from utils.sample_size.surface import gaussian_factor
from utils.surface import random_orders


def test_exceedance_by_hand():
    """Z_k' is the root mean square over the probes, the event about every k' >= k."""
    values = np.array([[0.0, 1.0, 2.0, 5.0], [1.0, 1.0, 0.0, -2.0]])
    orders = np.array(list(itertools.permutations(range(4))))
    for k in (1, 2, 3, 4):
        for tau in (0.2, 0.9, 1.6):
            hits = 0
            for order in orders:
                Z = [
                    math.sqrt(
                        np.mean([(row[order[:j]].mean() - row.mean()) ** 2 for row in values])
                    )
                    for j in range(k, 5)
                ]
                hits += max(Z) > tau
            share, low, high = exceedance(values, k, tau, orders)
            assert share == hits / 24
            assert low == pytest.approx(
                beta.ppf(0.025, hits, 25 - hits) if hits else 0.0, rel=1e-12
            )
            assert high == pytest.approx(
                beta.ppf(0.975, hits + 1, 24 - hits) if hits < 24 else 1.0, rel=1e-12
            )
    assert exceedance(values, 4, 1e-9, orders) == (
        0.0,
        0.0,
        pytest.approx(beta.ppf(0.975, 1, 24), rel=1e-12),
    )
    assert (
        exceedance(values[0], 1, 1e-9, orders)[0] == 1.0
    )  # one probe as a plain row; no order starts at the mean


def test_true_size_by_the_gaussian_limit():
    pool = np.random.default_rng(1).exponential(size=3000)
    expected = gaussian_factor(pool[None], 0.9) * pool.var() / 0.1**2
    k, low, high = true_size(pool, 0.1, 0.9, streams=600)
    assert k == pytest.approx(expected, rel=0.15) and low <= expected <= high and low < k < high
    assert true_size(pool, 0.1, 0.9, streams=50) == true_size(pool, 0.1, 0.9, streams=50)


def test_tables_of_a_pilot_against_a_held_out_pool():
    """Every row by the function that it is named for."""
    model, x, y = vit_pilot(200)
    _, x_held, y_held = vit_pilot(150, seed=1)
    measured = pilot(model, x, y, radius=0.05, n_probes=2)
    held = pilot(model, x_held, y_held, radius=0.05, n_probes=2).surface_losses
    tau = 0.1
    rows = forecasts(measured, held, [tau, 0.2], 0.9).set_index(["tolerance", "criterion"])
    answer = measured.surface(tau, 0.9)
    assert tuple(rows.loc[tau, "answer"]) == (answer.k, answer.lower, answer.upper)
    assert tuple(rows.loc[tau, "truth on held-out data"]) == true_size(held, tau, 0.9)
    for rule, k in baselines(measured.surface_losses, tau).items():
        assert rows.loc[(tau, rule), "k"] == k
    worst = rows.loc[(tau, "no single sample (k_step)"), "k"]
    assert worst == k_step(measured.surface_losses[0], tau)
    assert len(rows) == 2 * 9

    orders = random_orders(150, 200)
    table = checks(measured, held, [tau, 0.2], 0.9, orders).set_index(["tolerance", "rule"])
    assert len(table) == 2 * 6 and set(table["verdict"]) == {"kept", "broken"}
    variance = held.var(1, ddof=1).mean()
    k = k_surface(variance, tau, 0.9, 150, answer.terms["kurtosis"])
    row = table.loc[(tau, "surface, held-out S")]
    assert row["k"] == k
    assert (row["failures"], row["low"], row["high"]) == exceedance(held, k, tau, orders)
    assert table.loc[(tau, "one step (control)"), "verdict"] == "broken"
    linear, u, v = linear_pilot(60)
    no_ceiling = pilot(linear, u, v)
    rules = checks(no_ceiling, no_ceiling.surface_losses, [tau], 0.9, random_orders(60, 20))
    assert "fixed probes, pilot's S" not in set(rules["rule"])
