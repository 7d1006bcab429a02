"""Verdicts, and the record of what a run claims."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from utils.surface import claims
from utils.surface.claims import Claim
from utils.surface.measured import measure_steps
from utils.surface.orders import random_orders
from utils.surface.verdicts import Record, Slope, in_words, inequality, verdict, with_interval


def test_verdict():
    assert verdict(-1.1, -0.9, -1.0) == "agrees" and verdict(-0.9, -0.8, -1.0) == "differs"
    assert verdict(0.0, 1.0, 0.9, 2.0) == "agrees" and verdict(0.0, 1.0, 1.1, 2.0) == "differs"
    assert verdict(math.nan, math.nan, 0.0) == verdict(0.0, 1.0, math.nan) == "cannot tell"
    equal = measure_steps(np.full(30, 2.0), random_orders(30, 25), np.array([2, 5, 9])).iloc[
        -1
    ]  # no slope
    assert verdict(equal["low"], equal["high"], equal["theory_low"]) == "cannot tell"


def test_a_slope_of_a_table():
    table = measure_steps(np.array([1.0, 2.0, 4.0, 9.0]), random_orders(4, 120), np.array([1, 2]))
    slope = Slope.of(table)
    assert slope == tuple(table.iloc[-1][["value", "low", "high", "theory_low"]])
    assert slope.times(2) == tuple(2 * number for number in slope)
    assert slope.misses(slope.high + 1) and not slope.misses(slope.value)
    few = Slope(-1.0, math.nan, math.nan, -1.0)
    assert not few.misses(5.0) and str(few) == "-1.000 (no interval), exact -1.000"


def test_with_interval():
    assert with_interval(1.23456, 1.0, 2.0, 4) == "1.235 [1, 2]"
    assert with_interval(0.5, math.nan, math.nan) == "0.5"


@pytest.mark.parametrize(
    "broken, known, slack, word",
    [
        (True, True, 1e9, "violated"),
        (False, False, 1e9, "no bound"),
        (False, True, 1e9, "vacuous"),
        (False, True, 1.5, "holds"),
    ],
)
def test_inequality(broken, known, slack, word):
    assert inequality(broken, known, slack) == word


def test_what_holds_without_a_failed_control_proves_nothing(capsys):
    record = Record(100)
    claim = Claim("slope of {name}", "prop:rate", "other: {control}", "range")
    exact, far = Slope(-1.0, -1.1, -0.9, -1.0), Slope(-0.5, -0.6, -0.4, -0.5)
    record.claim_slope(claim, exact, far, name="a")
    record.claim_slope(claim, exact, exact, name="b")
    record.claim_slope(claim, far._replace(exact=-1.0), far, name="c")
    record.claim(claim, 0.0, word="measured", name="d", control="none")
    record.claim_share(claim, 1, 4, 0.0, "holds", False, name="e", control="none")
    table = record.verdicts().set_index("claim")
    words = ["agrees", "proves nothing", "differs", "measured", "proves nothing"]
    assert list(table["verdict"]) == words
    assert list(table.index) == [f"slope of {name}" for name in "abcde"]
    assert list(table["control_failed"]) == [True, False, True, False, False]
    assert table.loc["slope of a", "control"] == f"other: {far}"
    assert (table["pooled"] == "range").all() and table.loc["slope of e", "trials"] == 4
    low, high = binomtest(1, 4).proportion_ci(method="exact")
    assert tuple(table.loc["slope of e", ["low", "high"]]) == (low, high)
    assert len(capsys.readouterr().out.splitlines()) == 5
    shown = in_words(record.verdicts())
    assert shown["measured"].iloc[0] == "-1 [-1.1, -0.9]" and shown["theory"].iloc[3] == ""


def test_measurements_have_every_column():
    record = Record(100)
    record.add(pd.DataFrame({"k": [5], "quantity": "rms", "value": 1.0}), "one step", "trained")
    rows = pd.DataFrame({"k": [7], "quantity": "B", "value": 2.0, "radius": 0.1, "pair": 3})
    record.add(rows, "ball", "trained", radius=9.0, n=1)
    table = record.measurements()
    numbers = ["value", "low", "high", "theory_low", "theory_high"]
    assert set(table) == {"experiment", "weights", "k", "radius", "quantity", *numbers, "n"}
    assert table["radius"].tolist() == [0.0, 0.1] and table["n"].tolist() == [100, 1]
    assert table[numbers[1:]].isna().all(axis=None) and table["k"].dtype.kind == "i"


def test_claims_have_a_source_and_distinct_texts():
    found = [c for c in vars(claims).values() if isinstance(c, Claim)]
    assert len({claim.text for claim in found}) == len(found) > 15
    found += claims.ONE_STEP_BALL.values()
    assert all(claim.whose for claim in found)
    assert {claim.pooled for claim in found} == {"seeds", "counts", "largest", "range"}
