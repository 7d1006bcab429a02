"""Many runs as one row a claim: what counts are seeds."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, binomtest

from utils.report.over_runs import (
    beside_published,
    over_seeds,
    pooled_verdicts,
    ratios_to_first,
    shares_over_seeds,
)


def test_over_seeds_counts_seeds_and_not_runs():
    values = pd.Series([1.0, 3.0, 2.0, 2.0, 6.0, 6.0])
    mean, low, high = over_seeds(values, pd.Series([0, 0, 1, 1, 2, 2]))  # means 2, 2, 6
    assert mean == pytest.approx(10 / 3) and high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(
        4.302653 * np.std([2, 2, 6], ddof=1) / math.sqrt(3), rel=1e-6
    )
    for seeds in ([4] * 6, [0, 0, 0, 1, 1, 1]):  # two seeds have a spread and no interval
        assert all(math.isnan(v) for v in over_seeds(values, pd.Series(seeds))[1:])
    wide = over_seeds(values, pd.Series([0, 0, 1, 1, 2, 2]), 1 - 0.05 / 16)
    assert (wide[2] - mean) / (high - mean) == pytest.approx(17.86 / 4.3027, rel=1e-2)


@pytest.mark.parametrize("trials", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_beside_published_values_covers_one_more_run(trials):
    """Published values drawn from the same log-normal law lie in the interval in 95 % of cases;
    others do not."""
    random, hits, total = np.random.default_rng(0), 0, 0
    for _ in range(trials):
        logs = {depth: 0.2 * random.standard_normal(4) - depth for depth in (1, 2, 3)}
        rows = [
            {"data": "a", "depth": d, "width": 8, "ours": math.exp(v)}
            for d, x in logs.items()
            for v in x[:3]
        ]
        theirs = [
            {"data": "a", "depth": d, "width": 8, "value": 1.1 * math.exp(x[3])}
            for d, x in logs.items()
        ]
        found = beside_published(pd.DataFrame(rows), pd.DataFrame(theirs), inflation=1.1)
        hits, total = hits + (found["verdict"] == "agrees").sum(), total + len(found)
        assert (found["low"] < found["ours"]).all() and (found["ours"] < found["high"]).all()
    assert binomtest(int(hits), total, 0.95).pvalue > 1e-3
    far = beside_published(pd.DataFrame(rows), pd.DataFrame(theirs).assign(value=50.0))
    assert (far["verdict"] == "differs").all()
    one = beside_published(
        pd.DataFrame(rows[:1]), pd.DataFrame([*theirs, theirs[0] | {"data": "b"}])
    )
    assert list(one["verdict"]) == ["cannot tell"] and list(one["seeds"]) == [1]


def test_ratios_to_the_first():
    """Two-way: exact ratios without noise whatever the seeds do; with noise the intervals cover
    and can miss."""
    generator, hits, total = np.random.default_rng(2), 0, 0
    effects, truth = np.array([0.0, 0.3, -1.0, 0.8]), np.exp([0.3, -1.0, 0.8])
    exact = ratios_to_first(
        pd.DataFrame(effects[:, None] + np.array([5.0, -2.0, 0.1]), index=list("abcd"))
    )
    np.testing.assert_allclose(
        exact[["ratio", "low", "high"]], np.tile(truth[:, None], 3), rtol=1e-7
    )
    assert list(exact.index) == list("bcd") and (exact["seeds"] == 3).all()
    for t in range(600):
        logs = pd.DataFrame(
            effects[:, None] + generator.normal(0, 1, 3) + generator.normal(0, 0.5, (4, 3))
        )
        if t % 2:  # a seed that two architectures lack
            logs.iloc[[0, 2], 0] = math.nan
        found = ratios_to_first(logs)
        hits, total = hits + ((found["low"] <= truth) & (truth <= found["high"])).sum(), total + 3
    assert abs(hits / total - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 600)
    assert list(found["seeds"]) == [3, 2, 3] and ratios_to_first(logs[[1]])["low"].isna().all()
    more = logs.assign(
        alone=[7.0, math.nan, math.nan, math.nan]
    )  # a seed of one architecture alone
    pd.testing.assert_frame_equal(ratios_to_first(more), found, rtol=1e-9)
    assert len(ratios_to_first(logs[:1])) == 0
    apart = ratios_to_first(
        pd.DataFrame([[1.0, 2.0, math.nan], [1.5, 2.4, math.nan], [math.nan, math.nan, 3.0]])
    )
    assert apart["ratio"].isna().tolist() == [False, True] and apart.loc[
        1, "ratio"
    ] == pytest.approx(math.exp(0.45))


def test_pooled_verdicts():
    def row(
        claim,
        seed,
        value,
        verdict,
        low=-1.2,
        high=-0.8,
        theory=-1.0,
        pooled="seeds",
        trials=0,
        failed=True,
    ):
        numbers = {
            "value": value,
            "low": low,
            "high": high,
            "theory_low": theory,
            "theory_high": theory,
        }
        words = {
            "claim": claim,
            "whose": "x",
            "verdict": verdict,
            "control": "c",
            "pooled": pooled,
            "run": f"r{seed}",
        }
        return words | numbers | {"seed": seed, "trials": trials, "control_failed": failed}

    nan = math.nan
    rows = [
        row("slope", 0, -1.0, "agrees"),
        row("slope", 1, -1.02, "differs"),
        row("slope", 2, -0.99, "agrees"),
    ]
    rows += [row("off", seed, -0.5 + 0.001 * seed, "agrees") for seed in range(3)]
    rows += [row("same", 0, -1.0, "agrees"), row("same", 1, -1.02, "differs", failed=False)]
    rows += [row("same", 2, -0.99, "agrees")]
    rows += [
        row("alone", 0, 3.0, "agrees"),
        row("two", 0, -1.0, "agrees"),
        row("two", 1, -0.9, "agrees"),
    ]
    rows += [row("few", seed, -1.0 + 0.01 * seed, "measured", nan, nan) for seed in range(3)]
    rows += [
        row("bound", 0, 0, "holds"),
        row("bound", 1, 1, "violated"),
        row("bound", 2, 0, "no bound"),
    ]
    rows += [row("power", 0, 0, "proves nothing"), row("power", 1, 0, "holds")]
    rows += [row("none", 0, 0, "no bound"), row("none", 1, 0, "holds")]
    for seed, (hits, trials) in enumerate([(5, 16), (0, 2), (1, 2)]):
        word = "violated" if hits else "no violation seen"
        rows.append(row("share", seed, hits / trials, word, pooled="counts", trials=trials))
        rows.append(row("often", seed, 0.75, "holds", theory=0.5, pooled="counts", trials=20))
        rows.append(row("largest", seed, hits / 10, "holds", 0.0, hits / 10, pooled="largest"))
        rows.append(row("range", seed, hits, "measured", hits - 1.0, hits + 1.0, nan, "range"))
    table = pooled_verdicts(pd.DataFrame(rows)).set_index("claim")
    assert table.loc["slope", "verdict"] == "agrees" and table.loc["slope", "runs"] == 3
    assert (
        table.loc["off", "verdict"] == "differs"
    )  # the seeds agree with each other and not with theory
    assert table.loc["same", "verdict"] == "proves nothing"
    assert (table.loc["alone", "low"], table.loc["alone", "high"]) == (-1.2, -0.8)
    assert table.loc["two", "low"] == pytest.approx(-1.2) and table.loc["alone", "control"] == "c"
    assert (
        table.loc["few", "verdict"] == "measured"
        and table.loc["few", "low"] < -0.99 < table.loc["few", "high"]
    )
    assert table.loc["bound", "verdict"] == "violated" and table.loc["power", "verdict"] == "holds"
    assert table.loc["none", "verdict"] == "no bound, holds"
    assert (
        table.loc["often", "verdict"] == "violated"
    )  # 45 of 60 where the bound is 1/2, which 15 of 20 leave open
    share, exact = (
        table.loc["share"],
        beta.ppf([0.025, 0.975], [6, 7], [15, 14]),
    )  # Clopper and Pearson, 6 of 20
    assert share["value"] == 0.3 and share["trials"] == 20 and share["verdict"] == "violated"
    assert (share["low"], share["high"]) == pytest.approx(tuple(exact))
    assert (table.loc["largest", "value"], table.loc["largest", "high"]) == (0.5, 0.5)
    assert tuple(table.loc["range", ["value", "low", "high"]]) == (1, -1, 6)
    assert table.loc["range", "control"] == "r0: c"
    again = pd.DataFrame(rows).query(
        "claim == 'share'"
    )  # runs of one seed share their orders and count once
    twice = shares_over_seeds(pd.concat([again, again]))
    assert twice == pytest.approx((0.3, *exact))
