"""What arithmetic says of the mean of the first k losses, exactly, for every list of numbers.

L_k is the mean of the first k of n losses in a random order, S their standard deviation (divisor
n - 1). At fixed weights L_{k+1} - L_k = (l_{k+1} - L_k)/(k+1) is an identity (prop:identity): its
rate 1/k holds for random numbers too, and tests nothing.

Losses come as (n,) at one weight or as (m, n) at m weights: then squares and absolute values are
averaged over the weights, and every exact statement holds for that average (thm:neighbourhood).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.signal import lfilter


def as_rows(losses: ArrayLike) -> np.ndarray:
    """The losses (n,) or (m, n) as (m, n) of float64.

    >>> as_rows([1, 2]).shape
    (1, 2)
    """
    return np.atleast_2d(np.asarray(losses, dtype=np.float64))


def as_pool(losses: ArrayLike) -> np.ndarray:
    """As `as_rows`, of losses that have a rate.

    losses  (n,) at one weight, or (m, n) at m weights [nat]

    Raises ValueError for fewer than 3 losses, which have no rate.

    >>> as_pool([1.0, 2.0, 4.0]).shape
    (1, 3)
    """
    pool = as_rows(losses)
    if pool.shape[1] < 3:
        raise ValueError(f"There are {pool.shape[1]} losses: at least 3 are needed for a rate.")
    return pool


def _ordered(losses: ArrayLike, orders: np.ndarray | None) -> np.ndarray:
    losses = np.asarray(losses, dtype=np.float64)
    return losses[None] if orders is None else losses[orders]


def running_means(losses: ArrayLike, orders: np.ndarray | None = None) -> np.ndarray:
    """L_k for k = 1 .. n.

    losses  (n,) [nat]
    orders  (n_orders, n) integers; without them one order, as given

    Returns (n_orders, n) [nat].

    >>> running_means([1.0, 3.0, 8.0])
    array([[1., 2., 4.]])
    """
    ordered = _ordered(losses, orders)
    return np.cumsum(ordered, axis=1) / np.arange(1, ordered.shape[1] + 1)


def loss_steps(losses: ArrayLike, orders: np.ndarray | None = None, batch: int = 1) -> np.ndarray:
    """L_{k+b} - L_k for k = 1 .. n - b.

    Computed as b/(k+b) times (the mean of the next b losses - L_k): the difference of two running
    means cancels. Source: (prop:identity), (eq:rate-batch).

    losses  (n,) [nat]
    orders  (n_orders, n) integers; without them one order, as given
    batch   b, how many arrive together [examples]

    Returns (n_orders, n - b) [nat].

    >>> loss_steps([1.0, 3.0, 8.0])
    array([[1., 2.]])
    """
    coming = _ordered(losses, orders)[:, 1:]
    if batch > 1:
        windows = np.lib.stride_tricks.sliding_window_view(coming, batch, axis=1)
        coming = windows.mean(-1)
    k = np.arange(1, coming.shape[1] + 1)
    means = running_means(losses, orders)[:, : len(k)]
    return (coming - means) * (batch / (k + batch))


@dataclass(frozen=True)
class ExpectedSteps:
    """The bracket of E|L_{k+1} - L_k| over random orders.

    One loss that differs from the rest attains the lower end at every k; the ends meet at n - 1.

    k          (n - 1,) sizes 1 .. n - 1 [examples].
    mean_low   (n - 1,) lower end [nat]
    mean_high  (n - 1,) upper end [nat]
    """

    k: np.ndarray
    mean_low: np.ndarray
    mean_high: np.ndarray


def expected_steps(losses: ArrayLike) -> ExpectedSteps:
    """The bracket of E|L_{k+1} - L_k| for a uniform order of the pool, random numbers included.

    Source: (prop:rate).

    losses  (n,) or (m, n) [nat]

    Raises ValueError where there are fewer than 3 losses.

    >>> bracket = expected_steps([0.0, 0.0, 3.0])
    >>> bool(bracket.mean_low[-1] == bracket.mean_high[-1])
    True
    """
    pool = as_pool(losses)
    n = pool.shape[1]
    k = np.arange(1, n)
    spread = pool.std(1, ddof=1).mean()
    deviations = np.abs(pool - pool.mean(1, keepdims=True))
    mad = n / (n - 1) * deviations.mean()
    high = (mad + spread * np.sqrt(1 / k - 1 / (n - 1))) / (k + 1.0)
    return ExpectedSteps(k, mad / (k + 1.0), high)


def expected_rms(losses: ArrayLike, batch: int = 1) -> np.ndarray:
    """Root mean square over random orders of L_{k+b} - L_k: S sqrt(b/(k(k+b))), exact.

    Source: (eq:rate-batch); at m weights S^2 is the mean over them (thm:neighbourhood).

    losses  (n,) or (m, n) [nat]
    batch   b, how many arrive together [examples]

    Returns (n - b,), one value for each k = 1 .. n - b [nat].

    Raises ValueError where there are fewer than 3 losses.

    >>> expected_rms([0.0, 1.0, 2.0]).round(3)
    array([0.707, 0.408])
    """
    pool = as_pool(losses)
    k = np.arange(1, pool.shape[1] - batch + 1)
    variance = pool.var(1, ddof=1).mean()
    return np.sqrt(variance * batch / (k * (k + float(batch))))


def expected_distance(losses: ArrayLike, target: ArrayLike | None = None) -> np.ndarray:
    """Root mean square over random orders of L_k - target: sqrt(S^2 (1/k - 1/n) + gap^2), exact.

    The gap is L_n - target, for a target that does not depend on the order; no k removes it.
    Source: (prop:two-questions).

    losses  (n,) or (m, n) [nat]
    target  a number, or (m,) for m weights [nat]; L_n if there is none

    Returns (n,), one value for each k = 1 .. n [nat].

    >>> expected_distance([0.0, 2.0])
    array([1., 0.])
    """
    pool = as_rows(losses)
    n = pool.shape[1]
    gap = 0.0
    if target is not None:
        gap = ((pool.mean(1) - target) ** 2).mean()
    variance = pool.var(1, ddof=1).mean()
    return np.sqrt(variance * (1 / np.arange(1, n + 1) - 1 / n) + gap)


def smoothed(values: ArrayLike, factor: float) -> np.ndarray:
    """s_1 = x_1, s_k = factor s_{k-1} + (1 - factor) x_k: the smoothing of published curves.

    Of a falling curve it keeps factor^{k-1} x_1, long after x_k is smaller.
    Source: (rem:smoothing).

    values  (n,) in any unit
    factor  weight of the past, in [0, 1) [1]

    Returns (n,) in the unit of `values`.

    >>> smoothed([1.0, 0.0, 0.0], 0.5)
    array([1.  , 0.5 , 0.25])
    """
    values = np.asarray(values, dtype=np.float64)
    start = [factor * values[0]]
    return lfilter([1 - factor], [1, -factor], values, zi=start)[0]


def hessian_squares(
    norms: ArrayLike, orders: np.ndarray, k: ArrayLike
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """|H_k - H_n|^2 and |H_{k+1} - H_k|^2 as if the h_i were orthogonal, of the given norms.

    The example that arrives after k is the last of its order, the same at every k.
    Source: (prop:rate), in Frobenius norm.

    norms   (n,) norms of the examples' Hessians [nat/w^2]
    orders  (n_orders, n) integers
    k       (m,) sizes [examples]

    Returns by name, "H_k - H_n" and "H_k+1 - H_k": the squares (n_orders, m), and their mean over
    all orders (m,).

    >>> squares, mean = hessian_squares([1.0, 2.0], np.array([[0, 1]]), [1])["H_k - H_n"]
    >>> squares, mean
    (array([[1.25]]), array([1.25]))
    """
    square = np.asarray(norms, dtype=np.float64) ** 2
    k = np.asarray(k)
    n = len(square)
    ordered = square[orders]
    first = np.cumsum(ordered, axis=1)[:, k - 1]
    limit = first * (1 / k - 2 / n) / k + square.sum() / n**2
    step = (ordered[:, -1:] + first / k**2) / (k + 1.0) ** 2
    return {
        "H_k - H_n": (limit, square.mean() * (1 / k - 1 / n)),
        "H_k+1 - H_k": (step, square.mean() / (k * (k + 1.0))),
    }
