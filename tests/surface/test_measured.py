"""Tables of what was measured over orders, beside the theory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.surface.identities import (
    expected_distance,
    expected_rms,
    expected_steps,
    loss_steps,
    running_means,
)
from utils.surface.intervals import log_log_slope
from utils.surface.measured import (
    measure_distance,
    measure_halves,
    measure_steps,
    measure_steps_as_distance,
    rms_of,
    share_in_bracket,
    table_of,
)
from utils.surface.orders import log_grid, random_orders, typical_first_orders

NUMBERS = st.one_of(
    st.integers(-(10**6), 10**6).map(lambda i: i / 1000), st.sampled_from([0.0, 1.0, -1.0, 1e-6])
)


@settings(max_examples=30)
@given(
    st.lists(st.lists(NUMBERS, min_size=5, max_size=5), min_size=1, max_size=3),
    st.integers(0, 2**32 - 1),
)
@pytest.mark.slow
def test_averages_over_weights_by_enumeration(all_orders, rows, seed):
    """Losses at m weights: the mean square over them obeys the exact expressions, and the mean
    its bracket."""
    losses, orders, k = np.array(rows), all_orders(5), np.array([1, 2, 3, 4])
    unit = np.abs(losses).max() or 1.0
    with np.errstate(all="ignore"):  # equal losses have no slope
        steps = measure_steps(losses, orders, k[:3], seed)
    rms = steps[steps["quantity"] == "rms"]
    np.testing.assert_allclose(rms["value"] / unit, rms["theory_low"] / unit, rtol=1e-9, atol=1e-10)
    mean = steps[steps["quantity"] == "mean"]
    assert (mean["value"] >= mean["theory_low"] - 1e-10 * unit).all()
    assert (mean["value"] <= mean["theory_high"] + 1e-10 * unit).all()
    for target in (None, 0.5, np.arange(len(losses))):
        with np.errstate(all="ignore"):
            rms = measure_distance(losses, orders, k, target, seed).query("quantity == 'rms'")
        scale = max(unit, 0.5 if target is None else np.max(target))
        np.testing.assert_allclose(
            rms["value"] / scale, rms["theory_low"] / scale, rtol=1e-9, atol=1e-9
        )


def test_halves_by_enumeration(all_orders):
    """Two means of k losses that share half: mean square S^2/k, whatever n; not the rate of a
    step."""
    losses = np.random.default_rng(0).lognormal(size=6)
    table = measure_halves(losses, all_orders(6), np.array([2, 4]))
    rms = table[table["quantity"] == "rms"]
    np.testing.assert_allclose(rms["value"], losses.std(ddof=1) / np.sqrt([2, 4]), rtol=1e-12)
    np.testing.assert_allclose(rms["value"], rms["theory_low"], rtol=1e-12)
    assert table.iloc[-1]["value"] == pytest.approx(-0.5, rel=1e-9)


def test_measured_steps_beside_the_theory():
    """The tables of the notebook: each number by its definition, and beside it what (prop:rate)
    says."""
    losses, k = np.random.default_rng(0).lognormal(size=120), np.array([2, 10, 40, 119])
    orders = random_orders(120, 400)
    table = measure_steps(losses, orders, k)
    assert list(table.columns) == [
        "k",
        "quantity",
        "value",
        "low",
        "high",
        "theory_low",
        "theory_high",
    ]
    assert list(table.quantity) == ["mean"] * 4 + ["rms"] * 4 + ["slope"]
    expected, exact, steps = (
        expected_steps(losses),
        expected_rms(losses),
        loss_steps(losses, orders)[:, k - 1],
    )
    for quantity, value, low, high in (
        ("mean", np.abs(steps).mean(0), expected.mean_low, expected.mean_high),
        ("rms", np.sqrt((steps**2).mean(0)), exact, exact),
    ):
        rows = table[table.quantity == quantity]
        assert rows.k.tolist() == k.tolist()
        np.testing.assert_allclose(rows.value, value, rtol=1e-12)
        np.testing.assert_allclose(rows.theory_low, low[k - 1], rtol=1e-12)
        np.testing.assert_allclose(rows.theory_high, high[k - 1], rtol=1e-12)
        assert ((rows.low < rows.value) & (rows.value < rows.high)).all()
    slope = table.iloc[-1]
    assert (
        slope.k == 0
        and slope.low < slope.value < slope.high
        and slope.theory_low == slope.theory_high
    )
    truth = np.polyfit(np.log(k), np.log(exact[k - 1]), 1)[0]
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
        np.testing.assert_allclose(
            rows.theory_low, expected_distance(losses, target)[k - 1], rtol=1e-12
        )
        assert (rows.theory_low == rows.theory_high).all() and (rows.low <= rows.high).all()
        assert len(table) == (5 if target is None else 4)
    slope = measure_distance(losses, orders, k).iloc[-1]
    assert slope.quantity == "slope" and slope.theory_low == slope.theory_high == 0.5
    assert slope.low <= 0.5 <= slope.high


def test_the_fit_of_the_distance_tells_it_from_a_step():
    """On k up to n/2 the law of the step does not pass for that of the distance; on k up to n - 1
    it nearly does."""
    n = 1079
    for high, slope in ((n // 2, 0.9), (n - 1, 0.52)):
        k = log_grid(5, high, 20)
        found = log_log_slope(1 / k - 1 / n, (1 / (k * (k + 1.0)))[None], root=True)[0]
        assert found == pytest.approx(slope, abs=0.02)
    losses, orders, k = (
        np.random.default_rng(0).lognormal(size=n),
        random_orders(n, 200),
        log_grid(5, n // 2, 20),
    )
    step = log_log_slope(1 / k - 1 / n, loss_steps(losses, orders)[:, k - 1] ** 2, root=True)
    assert step[1] > 0.6 and measure_distance(losses, orders, k).iloc[-1].high < 0.6


def test_rms_and_its_place_in_the_bracket():
    losses, k = np.random.default_rng(0).lognormal(size=60), np.array([2, 10, 40])
    orders = random_orders(60, 400)
    table = measure_steps(losses, orders, k)
    rms = rms_of(table)
    assert list(rms["k"]) == [2, 10, 40] and rms["inside"].all()
    np.testing.assert_allclose(rms["ratio"], rms["value"] / expected_rms(losses)[k - 1])
    assert share_in_bracket(table, 400) == 1.0
    early = typical_first_orders(losses, 400)  # the control that leaves it
    assert share_in_bracket(measure_steps(losses, early, k), 400) < 1.0


def test_steps_through_the_fit_of_the_distance():
    losses, k = np.random.default_rng(0).lognormal(size=(2, 60)), np.array([2, 10, 30])
    orders = random_orders(60, 150)
    table = measure_steps_as_distance(losses, orders, k)
    squares = np.mean([loss_steps(row, orders)[:, k - 1] ** 2 for row in losses], axis=0)
    np.testing.assert_allclose(rms_of(table)["value"], np.sqrt(squares.mean(0)), rtol=1e-12)
    slope = log_log_slope(1 / k - 1 / 60, squares, root=True)
    assert tuple(table.iloc[-1][["value", "low", "high"]]) == slope
    assert table.iloc[-1]["theory_low"] == 0.5


def test_a_table_of_other_estimates():
    rms = np.array([3.0, 1.0]), np.array([2.0, 0.5]), np.array([4.0, 2.0])
    table = table_of(np.array([5, 9]), rms, (-1.0, -1.1, -0.9, -0.98), np.array([8.0, 7.0]))
    assert list(table["k"]) == [5, 9, 0] and list(table["theory_high"]) == [8.0, 7.0, -0.98]
    assert table["theory_low"].isna().tolist() == [True, True, False]
