"""Identities and rates of the running mean, by enumeration of all orders, and the probes of the ball."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import beta, binomtest
from torch import nn

from utils import training
from utils.convergence import (
    beside_published,
    bootstrap_mean,
    difference_on_ball,
    distances_on_ball,
    expected_distance,
    expected_rms,
    expected_steps,
    first_crossing,
    gaussian_probes,
    hessian_squares,
    log_grid,
    log_log_slope,
    loss_steps,
    measure_distance,
    measure_halves,
    measure_steps,
    over_seeds,
    plane_losses,
    pooled_verdicts,
    projected_descent,
    random_orders,
    ratios_to_first,
    retrain,
    rms_by_ratio,
    running_means,
    shares_over_seeds,
    smoothed,
    spreads,
    top_eigenspace,
    typical_first_orders,
    verdict,
    worst_in_ball,
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


def test_one_loss_has_no_step():
    assert loss_steps([2.0]).shape == (1, 0)


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
    np.testing.assert_allclose(means[:, -1], losses.mean(), rtol=0, atol=1e-13 * scale)
    # without orders: as given
    assert np.array_equal(running_means(losses), running_means(losses, np.arange(len(losses))[None]))
    assert np.array_equal(loss_steps(losses), loss_steps(losses, np.arange(len(losses))[None]))


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


@given(POOLS, st.integers(1, 4))
def test_batches_by_enumeration(pool, batch):
    """E(L_{k+b} - L_k)^2 = S^2 b/(k(k+b)) over all orders; b = n - k is the distance to the pool."""
    losses, orders = np.array(pool), all_orders(len(pool))
    batch = min(batch, len(pool) - 1)
    steps, means = loss_steps(losses, orders, batch), running_means(losses, orders)
    unit = np.ptp(losses) or 1.0
    rounding = 1e-12 + 1e-14 * np.abs(losses).max() / unit
    np.testing.assert_allclose(steps / unit, (means[:, batch:] - means[:, :-batch]) / unit, rtol=0, atol=9 * rounding)
    np.testing.assert_allclose(
        (steps**2).mean(0) / unit**2, (expected_rms(losses, batch) / unit) ** 2, rtol=1e-12, atol=rounding**2
    )
    k = len(pool) - batch
    last = expected_distance(losses)[k - 1] / unit
    assert expected_rms(losses, batch)[k - 1] / unit == pytest.approx(last, rel=1e-12, abs=rounding)


@given(st.lists(st.lists(NUMBERS, min_size=5, max_size=5), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_averages_over_weights_by_enumeration(rows, seed):
    """Losses at m weights: the mean square over them obeys the exact expressions, and the mean its bracket."""
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
        np.testing.assert_allclose(rms["value"] / scale, rms["theory_low"] / scale, rtol=1e-9, atol=1e-9)


def test_halves_by_enumeration():
    """Two means of k losses that share half: mean square S^2/k, whatever n; not the rate of a step."""
    losses = np.random.default_rng(0).lognormal(size=6)
    table = measure_halves(losses, all_orders(6), np.array([2, 4]))
    rms = table[table["quantity"] == "rms"]
    np.testing.assert_allclose(rms["value"], losses.std(ddof=1) / np.sqrt([2, 4]), rtol=1e-12)
    np.testing.assert_allclose(rms["value"], rms["theory_low"], rtol=1e-12)
    assert table.iloc[-1]["value"] == pytest.approx(-0.5, rel=1e-9)


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


def test_verdict():
    assert verdict(-1.1, -0.9, -1.0) == "agrees" and verdict(-0.9, -0.8, -1.0) == "differs"
    assert verdict(0.0, 1.0, 0.9, 2.0) == "agrees" and verdict(0.0, 1.0, 1.1, 2.0) == "differs"
    assert verdict(math.nan, math.nan, 0.0) == verdict(0.0, 1.0, math.nan) == "cannot tell"
    equal = measure_steps(np.full(30, 2.0), random_orders(30, 25), np.array([2, 5, 9])).iloc[-1]  # no slope
    assert verdict(equal["low"], equal["high"], equal["theory_low"]) == "cannot tell"


def test_over_seeds_counts_seeds_and_not_runs():
    values = pd.Series([1.0, 3.0, 2.0, 2.0, 6.0, 6.0])
    mean, low, high = over_seeds(values, pd.Series([0, 0, 1, 1, 2, 2]))  # means 2, 2, 6
    assert mean == pytest.approx(10 / 3) and high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(4.302653 * np.std([2, 2, 6], ddof=1) / math.sqrt(3), rel=1e-6)
    for seeds in ([4] * 6, [0, 0, 0, 1, 1, 1]):  # two seeds have a spread and no interval
        assert all(math.isnan(v) for v in over_seeds(values, pd.Series(seeds))[1:])
    wide = over_seeds(values, pd.Series([0, 0, 1, 1, 2, 2]), 1 - 0.05 / 16)
    assert (wide[2] - mean) / (high - mean) == pytest.approx(17.86 / 4.3027, rel=1e-2)


def test_beside_published_values_covers_one_more_run():
    """Published values drawn from the same log-normal law lie in the interval in 95 % of cases; others do not."""
    random, hits, total = np.random.default_rng(0), 0, 0
    for _ in range(400):
        logs = {depth: 0.2 * random.standard_normal(4) - depth for depth in (1, 2, 3)}
        rows = [{"data": "a", "depth": d, "width": 8, "ours": math.exp(v)} for d, x in logs.items() for v in x[:3]]
        theirs = [{"data": "a", "depth": d, "width": 8, "value": 1.1 * math.exp(x[3])} for d, x in logs.items()]
        found = beside_published(pd.DataFrame(rows), pd.DataFrame(theirs), inflation=1.1)
        hits, total = hits + (found["verdict"] == "agrees").sum(), total + len(found)
        assert (found["low"] < found["ours"]).all() and (found["ours"] < found["high"]).all()
    assert binomtest(int(hits), total, 0.95).pvalue > 1e-3
    far = beside_published(pd.DataFrame(rows), pd.DataFrame(theirs).assign(value=50.0))
    assert (far["verdict"] == "differs").all()
    one = beside_published(pd.DataFrame(rows[:1]), pd.DataFrame([*theirs, theirs[0] | {"data": "b"}]))
    assert list(one["verdict"]) == ["cannot tell"] and list(one["seeds"]) == [1]


def test_typical_losses_first():
    """Drawn in inverse proportion to the rank, without replacement; the one-step slope is flatter for any list."""
    losses = np.array([10.0, 4.0, 5.5, 1.0])  # mean 5.125: ranks 4, 2, 1, 3
    orders, share = typical_first_orders(losses, 20000, seed=1), np.array([1 / 4, 1 / 2, 1, 1 / 3])
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    first = np.bincount(orders[:, 0], minlength=4) / 20000
    np.testing.assert_allclose(first, share / share.sum(), atol=4 * 0.5 / math.sqrt(20000))
    second = (orders[orders[:, 0] == 2, 1] == 1).mean()  # then among those that are left
    assert abs(second - share[1] / (share.sum() - 1)) < 4 * 0.5 / math.sqrt(9000)
    assert np.array_equal(typical_first_orders(losses, 5, 2), typical_first_orders(losses, 5, 2))
    generator, k = np.random.default_rng(0), log_grid(5, 299, 12)
    for values in (generator.exponential(size=300), -generator.exponential(size=300), generator.uniform(size=300)):
        squares = loss_steps(values, typical_first_orders(values, 300))[:, k - 1] ** 2
        assert verdict(*log_log_slope(k, squares, root=True)[1:], -1.0) == "differs"


def test_squares_of_orthogonal_hessians():
    """Diagonal h_i that share no coordinate: every order's Frobenius norms, and their mean over all orders."""
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


def correlated_squares(orders, k, norms, vectors):
    """Squared Frobenius norms of H_k - H_n and of H_{k+1} - H_k for h_i = norm_i v_i v_i^T, by their Gram matrix."""
    gram, n = np.outer(norms, norms) * (vectors @ vectors.T) ** 2, len(norms)
    found = {"H_k - H_n": np.empty((len(orders), len(k))), "H_k+1 - H_k": np.empty((len(orders), len(k)))}
    for i, order in enumerate(orders):
        for j, size in enumerate(k):
            a, b = np.full(n, -1 / n), np.zeros(n)
            a[order[:size]] += 1 / size
            b[order[:size]] -= 1 / size
            b[order[-1]] += 1
            found["H_k - H_n"][i, j], found["H_k+1 - H_k"][i, j] = a @ gram @ a, b @ gram @ b / (size + 1) ** 2
    return found


def test_ratios_cover_where_a_bootstrap_of_few_heavy_tails_does_not():
    """Norms over decades, Hessians that overlap: the exact slopes lie in 95 % of the intervals of 20 orders."""
    generator, k, n, draws = np.random.default_rng(0), np.array([6, 16, 48]), 96, 150
    norms, vectors = generator.lognormal(0, 1.7, n), generator.normal(size=(n, 12))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    hits = dict.fromkeys(("H_k - H_n", "H_k+1 - H_k"), 0)
    for i in range(draws):
        orders = random_orders(n, 20, seed=i)
        squares, sums = correlated_squares(orders, k, norms, vectors), hessian_squares(norms, orders, k)
        for name, at in (("H_k - H_n", 1 / k - 1 / n), ("H_k+1 - H_k", k)):
            exact = log_log_slope(at, sums[name][1][None], root=True)[0]
            (rms, low, high), (slope, lower, upper) = rms_by_ratio(at, squares[name], *sums[name])
            assert (low < rms).all() and (rms < high).all() and lower < slope < upper
            hits[name] += lower <= exact <= upper
    margin = 4 * math.sqrt(0.95 * 0.05 / draws)
    assert all(0.95 - margin <= h / draws < 1 for h in hits.values()), hits
    few = rms_by_ratio(at, squares[name][:19], sums[name][0][:19], sums[name][1])
    assert np.isnan(few[0][1]).all() and np.isnan(few[1][1:]).all() and np.isfinite(few[1][0])


def test_ratios_to_the_first():
    """Two-way: exact ratios without noise whatever the seeds do; with noise the intervals cover and can miss."""
    generator, hits, total = np.random.default_rng(2), 0, 0
    effects, truth = np.array([0.0, 0.3, -1.0, 0.8]), np.exp([0.3, -1.0, 0.8])
    exact = ratios_to_first(pd.DataFrame(effects[:, None] + np.array([5.0, -2.0, 0.1]), index=list("abcd")))
    np.testing.assert_allclose(exact[["ratio", "low", "high"]], np.tile(truth[:, None], 3), rtol=1e-7)
    assert list(exact.index) == list("bcd") and (exact["seeds"] == 3).all()
    for t in range(600):
        logs = pd.DataFrame(effects[:, None] + generator.normal(0, 1, 3) + generator.normal(0, 0.5, (4, 3)))
        if t % 2:  # a seed that two architectures lack
            logs.iloc[[0, 2], 0] = math.nan
        found = ratios_to_first(logs)
        hits, total = hits + ((found["low"] <= truth) & (truth <= found["high"])).sum(), total + 3
    assert abs(hits / total - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 600)
    assert list(found["seeds"]) == [3, 2, 3] and ratios_to_first(logs[[1]])["low"].isna().all()
    more = logs.assign(alone=[7.0, math.nan, math.nan, math.nan])  # a seed of one architecture alone
    pd.testing.assert_frame_equal(ratios_to_first(more), found, rtol=1e-9)
    assert len(ratios_to_first(logs[:1])) == 0
    apart = ratios_to_first(pd.DataFrame([[1.0, 2.0, math.nan], [1.5, 2.4, math.nan], [math.nan, math.nan, 3.0]]))
    assert apart["ratio"].isna().tolist() == [False, True] and apart.loc[1, "ratio"] == pytest.approx(math.exp(0.45))


def test_pooled_verdicts():
    def row(claim, seed, value, verdict, low=-1.2, high=-0.8, theory=-1.0, pooled="seeds", trials=0, failed=True):
        numbers = {"value": value, "low": low, "high": high, "theory_low": theory, "theory_high": theory}
        words = {"claim": claim, "whose": "x", "verdict": verdict, "control": "c", "pooled": pooled, "run": f"r{seed}"}
        return words | numbers | {"seed": seed, "trials": trials, "control_failed": failed}

    nan = math.nan
    rows = [row("slope", 0, -1.0, "agrees"), row("slope", 1, -1.02, "differs"), row("slope", 2, -0.99, "agrees")]
    rows += [row("off", seed, -0.5 + 0.001 * seed, "agrees") for seed in range(3)]
    rows += [row("same", 0, -1.0, "agrees"), row("same", 1, -1.02, "differs", failed=False)]
    rows += [row("same", 2, -0.99, "agrees")]
    rows += [row("alone", 0, 3.0, "agrees"), row("two", 0, -1.0, "agrees"), row("two", 1, -0.9, "agrees")]
    rows += [row("few", seed, -1.0 + 0.01 * seed, "measured", nan, nan) for seed in range(3)]
    rows += [row("bound", 0, 0, "holds"), row("bound", 1, 1, "violated"), row("bound", 2, 0, "no bound")]
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
    assert table.loc["off", "verdict"] == "differs"  # the seeds agree with each other and not with theory
    assert table.loc["same", "verdict"] == "proves nothing"
    assert (table.loc["alone", "low"], table.loc["alone", "high"]) == (-1.2, -0.8)
    assert table.loc["two", "low"] == pytest.approx(-1.2) and table.loc["alone", "control"] == "c"
    assert table.loc["few", "verdict"] == "measured" and table.loc["few", "low"] < -0.99 < table.loc["few", "high"]
    assert table.loc["bound", "verdict"] == "violated" and table.loc["power", "verdict"] == "holds"
    assert table.loc["none", "verdict"] == "no bound, holds"
    assert table.loc["often", "verdict"] == "violated"  # 45 of 60 where the bound is 1/2, which 15 of 20 leave open
    share, exact = table.loc["share"], beta.ppf([0.025, 0.975], [6, 7], [15, 14])  # Clopper and Pearson, 6 of 20
    assert share["value"] == 0.3 and share["trials"] == 20 and share["verdict"] == "violated"
    assert (share["low"], share["high"]) == pytest.approx(tuple(exact))
    assert (table.loc["largest", "value"], table.loc["largest", "high"]) == (0.5, 0.5)
    assert tuple(table.loc["range", ["value", "low", "high"]]) == (1, -1, 6)
    assert table.loc["range", "control"] == "r0: c"
    again = pd.DataFrame(rows).query("claim == 'share'")  # runs of one seed share their orders and count once
    twice = shares_over_seeds(pd.concat([again, again]))
    assert twice == pytest.approx((0.3, *exact))


def test_first_crossing():
    x = np.geomspace(1e-3, 1, 7)
    assert first_crossing(x, 5 * x**2, 5e-4) == pytest.approx(1e-2, rel=1e-9)  # a power law is met exactly
    assert first_crossing(x, x, 2.0) == math.inf and first_crossing(x, x, 1e-4) == x[0]
    assert first_crossing([1, 10, 100], [0.0, 1.0, 0.0], 0.5) == pytest.approx(10, rel=0.01)


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
    assert log_grid(5, 3, 12).tolist() == [3]  # never beyond the end
    with pytest.raises(ValueError, match=r"end at 0: give more samples.*\.$"):
        log_grid(5, 0, 12)


# --- intervals ------------------------------------------------------------------------------------------


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
    assert np.isnan(log_log_slope(k[:1], rows[:, :1])).all() and np.isnan(log_log_slope(k, 0 * rows)).all()


def test_intervals_repeat_and_cover():
    """The same seed, the same interval; over 200 draws the truth lies inside about as often as it should."""
    k, generator = np.array([10.0, 30.0, 100.0]), np.random.default_rng(3)
    hits_mean, hits_slope, n = 0, 0, 200
    for i in range(n):
        rows = np.outer(generator.lognormal(0, 0.5, 100), k**-0.7) * generator.lognormal(0, 0.3, (100, 3))
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
    (_, low, high), (_, lower, higher) = log_log_slope(k, rows), log_log_slope(k, rows, level=1 - 0.05 / 4)
    assert 1.05 < (higher - lower) / (high - low) < 1.6  # 2.5 instead of 1.96 standard errors


def test_measured_steps_beside_the_theory():
    """The tables of the notebook: each number by its definition, and beside it what (prop:rate) says."""
    losses, k = np.random.default_rng(0).lognormal(size=120), np.array([2, 10, 40, 119])
    orders = random_orders(120, 400)
    table = measure_steps(losses, orders, k)
    assert list(table.columns) == ["k", "quantity", "value", "low", "high", "theory_low", "theory_high"]
    assert list(table.quantity) == ["mean"] * 4 + ["rms"] * 4 + ["slope"]
    expected, exact, steps = expected_steps(losses), expected_rms(losses), loss_steps(losses, orders)[:, k - 1]
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
    assert slope.k == 0 and slope.low < slope.value < slope.high and slope.theory_low == slope.theory_high
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
        np.testing.assert_allclose(rows.theory_low, expected_distance(losses, target)[k - 1], rtol=1e-12)
        assert (rows.theory_low == rows.theory_high).all() and (rows.low <= rows.high).all()
        assert len(table) == (5 if target is None else 4)
    slope = measure_distance(losses, orders, k).iloc[-1]
    assert slope.quantity == "slope" and slope.theory_low == slope.theory_high == 0.5
    assert slope.low <= 0.5 <= slope.high


def test_the_fit_of_the_distance_tells_it_from_a_step():
    """On k up to n/2 the law of the step does not pass for that of the distance; on k up to n - 1 it nearly does."""
    n = 1079
    for high, slope in ((n // 2, 0.9), (n - 1, 0.52)):
        k = log_grid(5, high, 20)
        found = log_log_slope(1 / k - 1 / n, (1 / (k * (k + 1.0)))[None], root=True)[0]
        assert found == pytest.approx(slope, abs=0.02)
    losses, orders, k = np.random.default_rng(0).lognormal(size=n), random_orders(n, 200), log_grid(5, n // 2, 20)
    step = log_log_slope(1 / k - 1 / n, loss_steps(losses, orders)[:, k - 1] ** 2, root=True)
    assert step[1] > 0.6 and measure_distance(losses, orders, k).iloc[-1].high < 0.6


# --- neighbourhoods -------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Quadratic in its weights under mse."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x)


def linear_losses(n=12, seed=0):
    torch.manual_seed(seed)
    return Losses(Linear(), torch.randn(n, 3) * torch.rand(n, 1) * 3, torch.randint(0, 2, (n,)), "mse")


def dense_parts(losses):
    """Losses (n,), gradients (n, P) and Hessians (n, P, P), one sample at a time."""
    h = [dense_hessian(losses.model, x[None], y[None], losses.loss) for x, y in zip(losses.x, losses.y)]
    return losses.values(), losses.sample_gradients(), torch.stack(h)


def variance(t):
    """Sum over coordinates of the variance over samples, divisor n - 1."""
    return t.reshape(len(t), -1).var(0).sum().item()


@pytest.mark.parametrize("make", [lambda: vit_losses(7), linear_losses])
def test_spreads_against_dense_hessians(make):
    losses = make()
    value, g, h = dense_parts(losses)
    traces = h.diagonal(dim1=1, dim2=2).sum(1)
    expected = {
        "value": variance(value),
        "gradient": variance(g),
        "hessian": variance(h),
        "trace": variance(traces),
        "cross": torch.cov(torch.stack([value, traces]))[0, 1].item(),
    }
    whole = spreads(losses, basis=torch.eye(losses.P, dtype=torch.float64))  # a basis of everything: exact
    basis = torch.linalg.qr(torch.randn(losses.P, 3, dtype=torch.float64)).Q.T
    inside = basis @ h @ basis.T
    along = spreads(losses, basis=basis)
    assert along.hessian == pytest.approx(variance(inside), rel=1e-9) and along.error == 0
    assert along.gradient == pytest.approx(variance(g @ basis.T), rel=1e-9)
    assert along.trace == pytest.approx(variance(inside.diagonal(dim1=1, dim2=2).sum(1)), rel=1e-9)
    several = [vars(spreads(losses, probes=40, seed=s)) for s in range(12)]
    for name, exact in expected.items():
        assert vars(whole)[name] == pytest.approx(exact, rel=1e-8), name
        found = np.array([s[name] for s in several])
        error = found.std(ddof=1) / math.sqrt(len(found))
        assert abs(found.mean() - exact) <= 5 * error + 1e-9 * abs(exact), name  # unbiased, the square of traces too
    assert 0.3 < np.mean([s["error"] for s in several]) / np.std([s["hessian"] for s in several], ddof=1) < 3
    losses.chunk_size = 3
    assert vars(spreads(losses, probes=40, seed=0)) == pytest.approx(several[0], rel=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        spreads(losses, probes=1)


@pytest.mark.parametrize("sigma", [1e-2, 0.3, 3.0])
def test_gaussian_closed_form_is_exact_for_quadratic_losses(sigma):
    """Along two directions, by Gauss-Hermite quadrature, exact for polynomials of this degree."""
    losses = linear_losses()
    basis = torch.linalg.qr(torch.randn(losses.P, 2, dtype=torch.float64)).Q.T
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    weights = weights / weights.sum()
    exact = sum(
        a * b * losses.values(losses.w + sigma * (s * basis[0] + t * basis[1])).var().item()
        for s, a in zip(nodes, weights)
        for t, b in zip(nodes, weights)
    )
    found = spreads(losses, basis=basis)
    assert found.gaussian(sigma) == pytest.approx(exact, rel=1e-10)
    missing = sigma**2 * found.gradient / exact  # the published form lacks this share
    assert found.gaussian(sigma, gradient=False) == pytest.approx(exact * (1 - missing), rel=1e-9)
    assert missing > 1e-4


def test_gaussian_probes():
    w = torch.arange(5.0, dtype=torch.float64)
    z = (gaussian_probes(w, 0.1, 4000, seed=1) - w) / 0.1
    assert z.shape == (4000, 5) and torch.equal(z, (gaussian_probes(w, 0.1, 4000, seed=1) - w) / 0.1)
    assert z.mean(0).abs().max() < 5 / math.sqrt(4000) and (torch.cov(z.T) - torch.eye(5)).abs().max() < 0.1
    basis = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64)).Q.T
    d = gaussian_probes(w, 0.1, 50, seed=1, basis=basis) - w
    torch.testing.assert_close(d @ basis.T @ basis, d)  # inside the span
    assert 0.05 < (d @ basis.T).std().item() < 0.2


def test_top_eigenspace_against_a_dense_hessian():
    losses = vit_losses(9)
    H = dense_hessian(losses.model, losses.x[:5], losses.y[:5])
    theta = torch.linalg.eigvalsh(H)
    theta = theta[theta.abs().argsort(descending=True)][:4].numpy()
    found = top_eigenspace(losses, 4, torch.arange(5))
    np.testing.assert_allclose(found.values, theta, rtol=1e-5)
    assert (found.residuals <= 1e-5 * np.abs(found.values[0])).all()
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(4, dtype=torch.float64))
    products = found.vectors @ H - torch.as_tensor(found.values)[:, None] * found.vectors
    np.testing.assert_allclose(products.norm(dim=1), found.residuals, atol=1e-9 * np.abs(found.values[0]))


def test_plane_losses_have_rows_and_columns():
    losses = vit_losses(4)
    axes = torch.linalg.qr(torch.randn(losses.P, 2, dtype=torch.float64)).Q.T
    at, values = plane_losses(losses, axes, 0.2, 5)
    assert at.tolist() == pytest.approx([-0.2, -0.1, 0.0, 0.1, 0.2]) and values.shape == (5, 5, 4)
    np.testing.assert_allclose(values[2, 2], losses.values().numpy(), rtol=1e-12)
    expected = losses.values(losses.w + 0.1 * axes[0] - 0.2 * axes[1])
    np.testing.assert_allclose(values[0, 3], expected.numpy(), rtol=1e-12)
    assert not np.allclose(values[3, 0], values[0, 3])


# --- the ball -------------------------------------------------------------------------------------------


def norms(losses):
    return per_sample_hessian_norms(losses.model, losses.x, losses.y, losses.loss).value.numpy()


@pytest.fixture(scope="module")
def vit_and_norms():
    losses = vit_losses(16)
    return losses, norms(losses)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0]), st.sampled_from([1e-3, 1.0, 30.0]))
def test_worst_in_ball(seed, linear, radius):
    """Never outside the ball, never above the supremum; a linear f is solved, a quadratic one nearly."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    A = (1 - linear) * (A + A.T)
    c, b, a = (torch.randn(m, generator=generator, dtype=torch.float64) for m in (4, 4, 1))
    seen = []

    def f(w):
        seen.append((w - c).norm().item())
        return (a + b @ (w - c) + (w - c) @ A @ (w - c) / 2).item(), b + A @ (w - c)

    best, where = worst_in_ball(f, c, radius, [c, c + radius * torch.eye(4, dtype=torch.float64)[0]], 30)
    assert max(seen) <= radius * (1 + 1e-12) and best == pytest.approx(abs(f(where)[0]), rel=1e-12)
    supremum = abs(a.item()) + radius * b.norm().item() + radius**2 / 2 * torch.linalg.eigvalsh(A).abs().max().item()
    assert best <= supremum * (1 + 1e-12)
    u = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    u = radius * u / u.norm(dim=1, keepdim=True)
    sampled = (a + u @ b + (u @ A * u).sum(1) / 2).abs().max().item()
    if linear:
        assert best == pytest.approx(abs(a.item()) + radius * b.norm().item(), rel=1e-9)
    else:
        assert best >= 0.3 * sampled


@pytest.mark.parametrize("k", [1, 10])
def test_one_step_on_the_ball(k, vit_and_norms):
    (losses, each), order = vit_and_norms, np.random.default_rng(k).permutation(16)
    radii = [1e-6, 1e-3, 1e-2, 1.0]
    basis = top_eigenspace(losses, 3).vectors
    first, new = torch.as_tensor(order[:k]), torch.as_tensor(order[k : k + 1])
    found = difference_on_ball(losses, new, first, radii, n_random=3, basis=basis)
    values = losses.values()
    value = abs(float(values[order[k]] - values[first].mean()))
    gradient = float((losses.gradient(rows=new) - losses.gradient(rows=first)).norm())
    difference = dense_hessian(losses.model, losses.x[new], losses.y[new])
    difference = difference - dense_hessian(losses.model, losses.x[first], losses.y[first])
    bend = float(torch.linalg.eigvalsh(difference).abs().max())
    for r, terms in zip(radii, found, strict=True):
        assert terms.radius == r and set(terms.found) == {"gradient", "random", "eigenspace", "worst"}
        assert terms.measured == terms.found["worst"]
        assert terms.value == pytest.approx(value, rel=1e-10)
        assert terms.gradient == pytest.approx(r * gradient, rel=1e-10)
        assert terms.curvature == pytest.approx(r * r / 2 * bend, rel=1e-3)
        assert terms.curvature <= r * r / 2 * bend * (1 + 1e-10)
        assert terms.second_form == terms.value + terms.gradient + terms.curvature
        assert terms.measured <= (terms.second_form + terms.remainder) * (1 + 1e-12)
        norms_here = each[order[k]] + each[order[:k]].mean()
        published = value + r * r / 2 * norms_here
        assert terms.first_form(norms_here, gradient=False) == pytest.approx(published, rel=1e-10)
        assert terms.first_form(norms_here) == pytest.approx(published + r * gradient, rel=1e-10)
        # |Hess e_k| <= |h| + mean |h_i|, norms by Lanczos
        assert terms.second_form <= terms.first_form(norms_here) * (1 + 1e-3)
        # along the gradient the value and the gradient term are reached to first order
        assert terms.measured >= terms.value + terms.gradient - terms.curvature - terms.remainder - 1e-12
        if r <= 1e-3:  # and there is nothing more
            assert terms.found["worst"] <= (value + r * gradient + r * r / 2 * bend) * (1 + 1e-6)
    # as r goes to 0 only the value is left, and the remainder is of third order
    assert found[0].measured == pytest.approx(value + 1e-6 * gradient, abs=1e-10)
    assert 0 < found[1].remainder <= 1.5e-3 * found[2].remainder
    assert value + 1e-12 / 2 * norms_here < found[0].measured  # without the gradient term the form is exceeded
    assert found[-1].found["worst"] > max(v for name, v in found[-1].found.items() if name != "worst")
    again = difference_on_ball(losses, new, first, radii, n_random=3, basis=basis)
    assert again == found
    assert difference_on_ball(losses, new, first, [1.0], n_random=3, seed=1) != found[-1:]


def test_quadratic_model_is_exact():
    """A linear model under mse is quadratic in its weights: no remainder at any radius."""
    losses = linear_losses(20)
    each, radii, order = norms(losses), [1e-3, 1.0, 30.0], np.arange(20)
    for k in (1, 10, 19):
        for terms in difference_on_ball(losses, order[k : k + 1], order[:k], radii):
            assert terms.remainder <= 1e-12 * (terms.measured + terms.second_form)
            assert terms.measured <= terms.second_form * (1 + 1e-12)
            assert terms.measured <= terms.first_form(each[k] + each[:k].mean()) * (1 + 1e-4)
        # far out the curvature along the gradient dominates: the term is needed
        assert terms.measured > terms.value + terms.gradient


@pytest.mark.parametrize("radius", [1e-2, 0.5, 5.0])
def test_worst_case_bound_by_enumeration(radius):
    """E sup over the ball of |L_k - L_n| <= B sqrt(1/k - 1/n) for quadratic losses, over all orders of 5."""
    losses = linear_losses(5, seed=3)
    B = spreads(losses, basis=torch.eye(losses.P, dtype=torch.float64)).ball(radius)
    for k in (1, 2, 4):
        subsets = list(itertools.combinations(range(5), k))  # the supremum does not depend on the order inside
        found = []
        for first in subsets:
            rest = [i for i in range(5) if i not in first]
            found.append((1 - k / 5) * difference_on_ball(losses, first, rest, [radius], steps=25)[0].measured)
        ratio = np.mean(found) / (B * math.sqrt(1 / k - 1 / 5))
        assert 0.3 < ratio <= 1


def test_other_samples_get_other_directions():
    """Two pairs of one k do not share their random probes."""
    losses = linear_losses(20)
    a, b = (difference_on_ball(losses, [new], range(5), [1e-9])[0] for new in (10, 11))
    assert a.found["random"] != a.value and b.found["random"] != b.value
    seen = []
    losses.values, values = lambda w, rows: seen.append(w) or values(w, rows), losses.values
    for new in (10, 11):
        difference_on_ball(losses, [new], range(5), [1.0], steps=0)
    points = torch.stack(seen) - losses.w
    points = points[points.norm(dim=1) > 0]
    assert len(torch.unique((points * 1e6).round(), dim=0)) == 8  # two along the gradient, two at random, twice


@pytest.mark.parametrize("radius", [1e-2, 0.5])
def test_tail_over_the_ball_by_enumeration(radius):
    """At most the share delta of all orders of 5 leaves B sqrt((1/k - 1/n)/delta) at some k' >= k, in a quadratic model
    (eq:ball-tail without remainder); the tolerance of S alone is left more often on the larger ball."""
    losses = linear_losses(5, seed=3)
    spread = spreads(losses, basis=torch.eye(losses.P, dtype=torch.float64))
    found = distances_on_ball(losses, all_orders(5), [1, 2, 3, 4], radius, steps=15)
    assert found.shape == (120, 5) and np.abs(found[:, -1]).max() < 1e-12
    values = running_means(losses.values().numpy(), all_orders(5))
    assert (found >= np.abs(values - values[:, -1:]) - 1e-12).all()  # the centre belongs to the ball
    for k, delta in itertools.product((1, 2, 4), (0.1, 0.5, 0.9)):
        scale, later = math.sqrt((1 / k - 1 / 5) / delta), found[:, k - 1 :].max(1)
        assert (later > spread.ball(radius) * scale).mean() <= delta
        if radius == 0.5 and delta == 0.5:
            assert (later > math.sqrt(spread.value) * scale).mean() > delta


def test_two_equal_samples_do_not_change_the_surface():
    """Gradient and curvature of e_k are exactly zero there: zeros come back, not nan."""
    losses = vit_losses(4)
    twins = Losses(losses.model, losses.x[:1].repeat(3, 1, 1, 1), losses.y[:1].repeat(3))
    for terms in difference_on_ball(twins, [1], [0], [0.5]):
        assert (terms.measured, terms.value, terms.gradient) == (0.0, 0.0, 0.0)
        assert terms.curvature <= 1e-12 and terms.remainder <= 1e-12
        assert terms.first_form(2.0, gradient=False) == 0.25


# --- retraining -----------------------------------------------------------------------------------------


def fresh():
    torch.manual_seed(5)
    sizes = {"image_size": 4, "channels": 1, "patch_size": 2, "n_classes": 3, "depth": 1, "n_heads": 2}
    return build_model("vit", **sizes, d_model=4, d_ff=4)


def test_retraining_is_training_to_the_stationarity_of_the_limit():
    torch.manual_seed(0)
    x, y = torch.randn(30, 1, 4, 4), torch.randint(0, 3, (30,))
    options = {"l2": 0.1, "epochs": 3, "batch_size": 8, "polish_steps": 60, "seed": 2}
    limit, whole = fresh(), fresh()
    training.train(limit, x, y, **options)
    rule = training.stopping_rule(Losses(limit, x, y), Losses(limit, x, y).w)
    done = training.train(whole, x, y, threshold=rule, **options)
    assert done.converged and done.threshold == rule and done.gradient_norm <= rule
    table = retrain(fresh, x, y, [10, 30], limit, x[:5], y[:5], **options)
    part, all_of_it = table.iloc[0], table.iloc[1]
    assert list(table.columns) == [
        "k",
        "excess",
        "held_out",
        "distance",
        "norm",
        "gradient_norm",
        "threshold",
        "converged",
    ]
    assert (table["threshold"] == rule).all()
    assert (table["converged"] == (table["gradient_norm"] <= rule)).all() and bool(all_of_it["converged"])
    means = [Losses(network, x, y).values().mean().item() for network in (whole, limit)]
    assert all_of_it["excess"] == pytest.approx(means[0] - means[1], rel=1e-12)
    w, w_limit = (Losses(network, x, y).w for network in (whole, limit))
    assert all_of_it["distance"] == (w - w_limit).norm().item() and all_of_it["gradient_norm"] == done.gradient_norm
    exact = torch.linalg.eigvalsh(dense_hessian(whole, x, y)).abs().max().item()
    assert all_of_it["norm"] == pytest.approx(exact, rel=1e-3)
    assert all_of_it["held_out"] == pytest.approx(Losses(whole, x[:5], y[:5]).values().mean().item(), rel=1e-12)
    assert part["distance"] > 0 and part["excess"] > 0


@pytest.mark.parametrize("radius", [0.05, 0.5, 50.0])
def test_projected_descent_solves_least_squares_in_a_ball(radius):
    losses = linear_losses(20)
    centre, rows = losses.w, torch.arange(12)
    w = projected_descent(losses, rows, centre, radius, 3000)
    gradient = losses.gradient(w, rows)
    d = w - centre
    assert d.norm() <= radius * (1 + 1e-12)
    if d.norm() < radius * (1 - 1e-9):  # inside: stationary
        assert gradient.norm() < 1e-5
    else:  # on the sphere: the negative gradient points outwards
        torch.testing.assert_close(-gradient / gradient.norm(), d / d.norm(), atol=1e-4, rtol=0)
    value = losses.values(w, rows).mean()
    assert value <= losses.values(centre, rows).mean()
    again = projected_descent(losses, rows, centre, radius, 50, start=w)
    assert losses.values(again, rows).mean() <= value  # it never rises


def test_excess_risk_over_a_ball():
    """Least squares in a ball, where descent finds the minimisers: the excess is below twice a supremum found apart."""
    losses = linear_losses(12)
    w_n = projected_descent(losses, torch.arange(12), losses.w, 0.5, 3000)
    for rows in map(torch.tensor, ([0, 1, 2], [3, 7, 9, 11], [0, 2, 4, 6, 8, 10], [1, 5])):
        others = torch.tensor([i for i in range(12) if i not in rows])
        w_k = projected_descent(losses, rows, losses.w, 0.5, 3000)
        assert losses.values(w_k, rows).mean() <= losses.values(w_n, rows).mean() + 1e-9  # no gap
        sup = difference_on_ball(losses, rows, others, [0.5], steps=30)[0].measured * (1 - len(rows) / 12)
        excess = (losses.values(w_k) - losses.values(w_n)).mean().item()
        assert -1e-9 <= excess <= 2 * sup + 1e-9 and excess > 0.01 * sup
