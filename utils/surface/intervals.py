"""Intervals of means, slopes and shares.

An interval by bootstrap needs FEWEST rows, one by the ratio to a known mean FEWEST_RATIOS: from
fewer there is none, and no verdict.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest
from scipy.stats import t as student

from utils.run.streams import numpy_generator

FEWEST = 100  # of 20 squares with a heavy tail a bootstrap's "95 %" misses more than 1 in 5
FEWEST_RATIOS = 20  # of `rms_by_ratio`, whose tails the auxiliary takes away


Estimate = tuple[float, float, float]  # value, low and high
Estimates = tuple[np.ndarray, np.ndarray, np.ndarray]  # the same of several, (m,) each


def _resampled(rows: np.ndarray, stream: np.random.Generator, draws: int) -> np.ndarray:
    """Means (draws, m) of rows (r, m) drawn with replacement."""
    r = len(rows)
    counts = stream.multinomial(r, np.full(r, 1 / r), size=draws)
    return counts / r @ rows


def bootstrap_mean(rows: np.ndarray, seed: int = 0, draws: int = 400) -> Estimates:
    """Mean over rows with a 95 % percentile-bootstrap interval over rows.

    rows   (r, m) in any unit
    seed   of the stream "bootstrap of means"
    draws  of the bootstrap [1]

    Returns mean, low and high, each (m,); nan for the ends of fewer than FEWEST rows.

    >>> mean, low, high = bootstrap_mean(np.arange(200.0)[:, None])
    >>> bool(low < mean < high)
    True
    """
    mean = rows.mean(0)
    if len(rows) < FEWEST:
        absent = np.full_like(mean, math.nan)
        return mean, absent, absent
    low, high = np.quantile(
        _resampled(rows, numpy_generator("bootstrap of means", seed), draws), [0.025, 0.975], axis=0
    )
    return mean, low, high


def log_log_slope(
    k: np.ndarray, rows: np.ndarray, seed: int = 0, level: float = 0.95, root: bool = False
) -> Estimate:
    """Least-squares slope of log(mean over rows) against log k, with a bootstrap interval.

    k      (m,) positive
    rows   (r, m), not negative, one row an order
    seed   of the stream "bootstrap of slopes"
    level  of the interval [1]
    root   fit the square root of the mean, a root mean square from squares

    Returns slope, low and high; nan for the ends of fewer than FEWEST rows, and for all three where
    there is no slope (one k, or a mean of zero).

    >>> k = np.array([1.0, 10.0, 100.0])
    >>> print(log_log_slope(k, 1 / k[None])[0].round(9))
    -1.0
    """
    means = rows.mean(0)[None]
    if len(k) < 2 or (means <= 0).any():
        return math.nan, math.nan, math.nan
    if len(rows) >= FEWEST:
        draws = round(20 / (1 - level))  # ten beyond each end
        means = np.vstack(
            [means, _resampled(rows, numpy_generator("bootstrap of slopes", seed), draws)]
        )
    x = np.log(k) - np.log(k).mean()
    power = 0.5 if root else 1.0
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of zeros only: no interval
        slopes = (np.log(means) @ x) / (x @ x) * power
        if len(slopes) == 1:
            return slopes[0], math.nan, math.nan
        low, high = np.quantile(slopes[1:], [(1 - level) / 2, (1 + level) / 2])
    return slopes[0], low, high


def rms_by_ratio(
    k: ArrayLike, squares: np.ndarray, auxiliary: np.ndarray, known: np.ndarray, level: float = 0.95
) -> tuple[Estimates, Estimate]:
    """Root mean square and its log-log slope, from squares of few orders with heavy tails.

    The ratio estimator of survey sampling (Cochran 1977, chapter 6): mean(squares)/mean(auxiliary)
    times the known mean of the auxiliary over all orders. Where the two rise and fall together the
    tails cancel; whatever the auxiliary, the estimate is consistent. Intervals by the jackknife
    over rows with Student's t.

    k          (m,) positive
    squares    (r, m), a row an order
    auxiliary  (r, m), of the same orders
    known      (m,), mean of the auxiliary over all orders
    level      of the intervals [1]

    Returns (rms, low, high), each (m,), and (slope, low, high); nan for the ends of fewer than
    FEWEST_RATIOS rows.

    >>> k, ones = np.array([1.0, 4.0]), np.ones((30, 2))
    >>> (rms, *_), (slope, *_) = rms_by_ratio(k, ones / k**2, ones, np.ones(2))
    >>> print(rms.round(3), round(slope, 3))
    [1.   0.25] -1.0
    """
    x = np.log(k) - np.log(k).mean()
    rows = len(squares)

    def log_rms_and_slope(square: np.ndarray, aux: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_rms = 0.5 * np.log(square / aux * known)
        return log_rms, log_rms @ x / (x @ x)

    found: np.ndarray = np.append(*log_rms_and_slope(squares.mean(0), auxiliary.mean(0)))
    half = np.full_like(found, math.nan)
    if rows >= FEWEST_RATIOS:
        without = squares.sum(0) - squares, auxiliary.sum(0) - auxiliary
        each = np.column_stack(log_rms_and_slope(*without))
        scatter = np.square(each - each.mean(0)).sum(0)
        half = student.ppf((1 + level) / 2, rows - 1) * np.sqrt((rows - 1) / rows * scatter)
    low, high = found - half, found + half
    ends = (np.exp(part[:-1]) for part in (found, low, high))
    rms, rms_low, rms_high = ends
    return (rms, rms_low, rms_high), (float(found[-1]), float(low[-1]), float(high[-1]))


def binomial_interval(hits: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson 1934).

    hits    how many of the trials [1]
    trials  how many in all [1]
    level   of the interval [1]

    >>> low, high = binomial_interval(0, 10)
    >>> low, round(high, 3)
    (0.0, 0.308)
    """
    return tuple(binomtest(int(hits), trials).proportion_ci(level, "exact"))


def mean_gap(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Difference of two independent means, and its standard error.

    values  (n,) in any unit
    others  (m,) in the same unit

    >>> mean_gap(np.array([1.0, 3.0]), np.array([0.0, 2.0]))[0].item()
    1.0
    """
    error = np.sqrt(values.var(ddof=1) / len(values) + others.var(ddof=1) / len(others))
    return values.mean() - others.mean(), error


def first_crossing(x: ArrayLike, y: ArrayLike, level: float) -> float:
    """The x at which y first exceeds a level, interpolated in log x and log y.

    x      (m,) increasing
    y      (m,) values
    level  to exceed, in the unit of y

    Returns x[0] if y exceeds the level at once, inf if never.

    >>> round(first_crossing([1, 10, 100], [1e-4, 1e-2, 1.0], 1e-3), 3)
    3.162
    """
    x = np.asarray(x, dtype=np.float64)
    y = np.asarray(y, dtype=np.float64)
    above = np.flatnonzero(y > level)
    if len(above) == 0:
        return math.inf
    first = above[0]
    if first == 0:
        return float(x[0])
    ends: slice = slice(first - 1, first + 1)
    logs = np.log(np.maximum(y[ends], 1e-300))
    return float(np.exp(np.interp(np.log(level), logs, np.log(x[ends]))))
