"""What was measured over random orders, beside what theory says: one table a measurement.

Each table has the columns k, quantity, value, low, high, theory_low and theory_high. Its rows are
the mean or the root mean square (rms) over the orders at each k, with a 95 % bootstrap interval,
and, at k = 0, the slope of the rms in logarithms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from utils.surface import identities
from utils.surface.identities import as_pool
from utils.surface.intervals import Estimate, Estimates, bootstrap_mean, log_log_slope

COLUMNS = ["k", "quantity", "value", "low", "high", "theory_low", "theory_high"]


def _rows(
    k: ArrayLike, quantity: str, values: Any, theory_low: Any, theory_high: Any
) -> pd.DataFrame:
    value, low, high = values
    columns = k, quantity, value, low, high, theory_low, theory_high
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def _rms(k: np.ndarray, squares: np.ndarray, exact: np.ndarray, seed: int) -> pd.DataFrame:
    return _rows(k, "rms", map(np.sqrt, bootstrap_mean(squares, seed)), exact, exact)


def _slope(slope: Estimate, exact: float) -> pd.DataFrame:
    return _rows([0], "slope", slope, exact, exact)


def _with_slope(
    table: pd.DataFrame, x: np.ndarray, squares: np.ndarray, exact: float, seed: int
) -> pd.DataFrame:
    """The table and the slope of the rms against x."""
    slope = _slope(log_log_slope(x, squares, seed, root=True), exact)
    return pd.concat([table, slope], ignore_index=True)


def measure_steps(
    losses: ArrayLike,
    orders: np.ndarray,
    k: np.ndarray,
    seed: int = 0,
    batch: int = 1,
    level: float = 0.95,
) -> pd.DataFrame:
    """|L_{k+b} - L_k| over the orders: its mean beside the bracket, its rms, and the rms' slope.

    A batch b > 1 has no bracket and so no mean. Source: (prop:rate), (eq:rate-batch).

    losses  (n,) or (m, n) [nat]
    orders  (n_orders, n) integers
    k       (points,) sizes, at most n - b [examples]
    seed    of the bootstrap
    batch   b, how many arrive together [examples]
    level   of the interval of the slope [1]

    Raises ValueError where there are fewer than 3 losses.

    >>> orders = np.array([[0, 1, 2], [2, 0, 1]])
    >>> measure_steps([1.0, 2.0, 4.0], orders, np.array([1, 2]))["quantity"].tolist()
    ['mean', 'mean', 'rms', 'rms', 'slope']
    """
    pool = as_pool(losses)
    steps = [identities.loss_steps(row, orders, batch)[:, k - 1] for row in pool]
    squares = np.mean(np.square(steps), axis=0)
    exact = identities.expected_rms(pool, batch)[k - 1]
    tables = []
    if batch == 1:
        bracket = identities.expected_steps(pool)
        mean = bootstrap_mean(np.mean(np.abs(steps), axis=0), seed)
        tables.append(_rows(k, "mean", mean, bracket.mean_low[k - 1], bracket.mean_high[k - 1]))
    tables.append(_rms(k, squares, exact, seed))
    theory = log_log_slope(k, exact[None] ** 2, seed, root=True)[0]
    tables.append(_slope(log_log_slope(k, squares, seed, level, root=True), theory))
    return pd.concat(tables, ignore_index=True)


def measure_distance(
    losses: ArrayLike,
    orders: np.ndarray,
    k: np.ndarray,
    target: ArrayLike | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Rms over the orders of L_k - target; without a target (L_n) also its slope.

    The slope is against 1/k - 1/n, 1/2 in theory. Source: (prop:two-questions).

    losses  (n,) or (m, n) [nat]
    orders  (n_orders, n) integers
    k       (points,) sizes, below n [examples]
    target  a number, or (m,) for m weights [nat]
    seed    of the bootstrap

    Raises ValueError where there are fewer than 3 losses.

    >>> orders = np.array([[0, 1, 2], [2, 0, 1]])
    >>> measure_distance([1.0, 2.0, 4.0], orders, np.array([1, 2]))["quantity"].tolist()
    ['rms', 'rms', 'slope']
    """
    pool = as_pool(losses)
    aims = np.broadcast_to(pool.mean(1) if target is None else target, len(pool))
    means = [identities.running_means(row, orders)[:, k - 1] for row in pool]
    squares = np.mean([(m - aim) ** 2 for m, aim in zip(means, aims, strict=True)], axis=0)
    table = _rms(k, squares, identities.expected_distance(pool, target)[k - 1], seed)
    if target is not None:
        return table
    return _with_slope(table, 1 / k - 1 / pool.shape[1], squares, 0.5, seed)


def measure_steps_as_distance(
    losses: ArrayLike, orders: np.ndarray, k: np.ndarray, seed: int = 0
) -> pd.DataFrame:
    """The control of `measure_distance`: steps of the same orders through the same fit.

    losses  (n,) or (m, n) [nat]
    orders  (n_orders, n) integers
    k       (points,) sizes, below n [examples]
    seed    of the bootstrap

    Raises ValueError where there are fewer than 3 losses.

    >>> orders = np.array([[0, 1, 2], [2, 0, 1]])
    >>> measure_steps_as_distance([1.0, 2.0, 4.0], orders, np.array([1, 2])).theory_low.tolist()[-1]
    0.5
    """
    pool = as_pool(losses)
    steps = [identities.loss_steps(row, orders)[:, k - 1] for row in pool]
    squares = np.mean(np.square(steps), axis=0)
    table = _rms(k, squares, identities.expected_rms(pool)[k - 1], seed)
    return _with_slope(table, 1 / k - 1 / pool.shape[1], squares, 0.5, seed)


def measure_halves(
    losses: ArrayLike, orders: np.ndarray, k: np.ndarray, seed: int = 0
) -> pd.DataFrame:
    """Rms of the difference of two means of k losses that share half of them: S/sqrt(k), exact.

    It stands in for L_{k+1} - L_k in published procedures; the step's rate is that of one example,
    this one's that of a subsample. Source: (rem:subsamples).

    losses  (n,) or (m, n) [nat]
    orders  (n_orders, n) integers
    k       (points,) even sizes with 3k/2 <= n [examples]
    seed    of the bootstrap

    Raises ValueError where there are fewer than 3 losses.

    >>> orders = np.array([[0, 1, 2], [2, 0, 1]])
    >>> measure_halves([1.0, 2.0, 4.0], orders, np.array([2]))["k"].tolist()
    [2, 0]
    """
    pool = as_pool(losses)
    half = np.asarray(k) // 2
    squares = np.zeros(1)
    for row in pool:
        sums = np.pad(np.cumsum(row[orders], axis=1), ((0, 0), (1, 0)))
        others = sums[:, 3 * half] - sums[:, 2 * half]
        difference = (sums[:, half] - others) / (2 * half)
        squares = squares + difference**2 / len(pool)
    exact = np.sqrt(pool.var(1, ddof=1).mean() / (2 * half))
    table = _rms(2 * half, squares, exact, seed)
    return _with_slope(table, 2 * half, squares, -0.5, seed)


def table_of(
    k: np.ndarray,
    rms: Estimates,
    slope: tuple[float, float, float, float],
    upper: ArrayLike = np.nan,
) -> pd.DataFrame:
    """A table of rms values and of their slope that were estimated otherwise.

    k      (points,) sizes [examples]
    rms    value, low and high, each (points,)
    slope  value, low, high and exact
    upper  (points,) bound on the rms

    >>> nan = np.full(1, np.nan)
    >>> table_of(np.array([5]), (nan, nan, nan), (1.0, 0.9, 1.1, 1.0))["quantity"].tolist()
    ['rms', 'slope']
    """
    tables = [_rows(k, "rms", rms, np.nan, upper), _slope(slope[:3], slope[3])]
    return pd.concat(tables, ignore_index=True)


def rms_of(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the rms, with two columns more: `ratio` to the exact value, and `inside`.

    table  as `measure_steps` returns it; `inside` says whether the exact value lies in the interval

    >>> row = {"k": 5, "quantity": "rms", "value": 2.0, "low": 1.0, "high": 3.0}
    >>> rms_of(pd.DataFrame([row | {"theory_low": 4.0, "theory_high": 4.0}])).ratio.item()
    0.5
    """
    rms = table[table["quantity"] == "rms"]
    inside = rms["theory_low"].between(rms["low"], rms["high"])
    return rms.assign(ratio=rms["value"] / rms["theory_low"], inside=inside)


def share_in_bracket(table: pd.DataFrame, n_orders: int) -> float:
    """Share of the k at which the mean step meets its bracket, give or take its standard error.

    The error is wide enough that of means inside the bracket one in 1000 tables has a miss.

    table     of `measure_steps` with batch 1
    n_orders  over which the mean was taken [1]

    >>> orders = np.array([[0, 1, 2], [2, 0, 1]])
    >>> share_in_bracket(measure_steps([1.0, 2.0, 4.0], orders, np.array([1, 2])), 2).item()
    1.0
    """
    mean = table[table["quantity"] == "mean"].set_index("k")
    rms = table[table["quantity"] == "rms"].set_index("k")
    variance = rms["theory_low"] ** 2 - mean["theory_low"] ** 2
    error = stats.norm.ppf(1 - 0.0005 / len(mean)) * np.sqrt(variance / n_orders)
    reaches = mean["value"] + error >= mean["theory_low"]
    return (reaches & (mean["value"] - error <= mean["theory_high"])).mean()
