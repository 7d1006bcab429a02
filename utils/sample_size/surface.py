"""How many examples until the mean loss settles: sizes by theorem, the Gaussian limit, a forecast.

The surface criterion: |L_k' - L| <= tau for every later k', in mean square over a neighbourhood of
the weights (or at the weights alone), with probability 1 - delta. Forward passes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from utils.run.streams import numpy_generator
from utils.sample_size.answer import conclude, drift
from utils.sample_size.limits import budget, least_pilot, spread_limits
from utils.sample_size.ranges import check_ranges, finite_rows
from utils.surface.identities import as_rows

TERMS: np.ndarray = 2 * np.arange(50) + 1  # of the series for one probe


def fourth_moment(k: int, kurtosis: float, n: float = math.inf) -> float:
    """A bound of E |mean_k - mean_n|^4 / (trace of the covariance)^2 of vectors in random order.

    k         vectors in the first mean
    kurtosis  E Y^2 <= kurtosis (E Y)^2 for Y = |x - x'|^2/2 of two of them
    n         size of the pool, inf for a population

    Exact in the fourth moment and in the Hilbert-Schmidt norm of the covariance; both take their
    worst values. Source: Theorem (thm:fourth).

    >>> fourth_moment(100, kurtosis=2.0)  # a sign at random: (1 + 3 * 99) / 100**3
    0.000298
    """
    kurtosis = max(kurtosis, 1.0)
    if math.isinf(n):
        brackets = [_bracket(k, kurtosis, h) for h in (0.0, min(1.0, kurtosis - 1))]
        return max(brackets) / k**3
    if k >= n:
        return 0.0
    # probabilities that 1, 2, 3 and 4 given members of the pool are all among the first k
    p = np.cumprod([(k - i) / (n - i) if n > i else 0.0 for i in range(4)])
    of_fourth = p[0] - 7 * p[1] + 12 * p[2] - 6 * p[3]
    of_square = p[1] - 2 * p[2] + p[3]
    slack = 2 * kurtosis * n / (n - 1) - 1
    most = min(1.0, max(0.0, (slack - 1) / 2))
    bounds = []
    for h in (0.0, most):  # sum |x|^4 / (sum |x|^2)^2 lies in [1/n, (slack - 2h)/n]
        for fourth in (1 / n, max(1.0, slack - 2 * h) / n):
            bounds.append(fourth * of_fourth + (1 + 2 * h) * of_square)
    return (n - 1) ** 2 * max(bounds) / k**4


def _bracket(k: int, kurtosis: float, h: float) -> float:
    return 2 * kurtosis - 1 - 2 * h + (k - 1) * (1 + 2 * h)


def _least(enough: Callable[[int], bool], high: int) -> int:
    """The least k <= high that is enough, if high is and more never hurt."""
    low = 0
    while high - low > 1:
        k = (low + high) // 2
        if enough(k):
            high = k
        else:
            low = k
    return high


def k_surface(
    variance: float,
    tolerance: float,
    confidence: float,
    n: float = math.inf,
    kurtosis: float | None = None,
) -> float:
    """Examples that are enough for every k' >= k at once, by Doob's inequality.

    variance    S_mu^2, with divisor n - 1 in a pool of n
    tolerance   tau, in units of the loss
    confidence  1 - delta
    n           size of the pool whose mean is the limit; inf for the population
    kurtosis    of the pairs, if one is known or assumed

    The smaller of two sizes: by second moments ceil(1 / (1/n + delta tau^2 / S_mu^2)); with a
    kurtosis also the least k whose `fourth_moment` is at most delta (tau / S_mu)^4. Source: Theorem
    (thm:neighbourhood), Theorem (thm:fourth).

    >>> k_surface(variance=0.25, tolerance=0.1, confidence=0.75)
    100
    >>> k_surface(variance=0.25, tolerance=0.1, confidence=0.75, n=300)  # of a pool of 300
    75
    """
    check_ranges(variance=variance, tolerance=tolerance, confidence=confidence, n=n)
    if variance == 0:
        return 1
    delta = 1 - confidence
    scale = tolerance**2 / variance
    rate = 1 / n + delta * scale
    if rate == 0:
        return math.inf
    by_second = int(max(1, min(n, math.ceil(1 / rate))))
    if kurtosis is None:
        return by_second
    allowed = delta * scale**2
    if fourth_moment(by_second, kurtosis, n) > allowed:
        return by_second
    return _least(lambda k: fourth_moment(k, kurtosis, n) <= allowed, by_second)


def k_fixed_probes(
    losses: ArrayLike, tolerance: float, confidence: float, n: int, ceiling: float
) -> int:
    """Least k <= n with |L_k - L_n| <= tau at all probes, for that one k: empirical Bernstein.

    losses      (m_probes, m) of a pilot, which give the deviations (plug-in: the theorem's are
                those of the k examples)
    tolerance   tau
    confidence  1 - delta
    n           size of the pool
    ceiling     at least all losses. n - 1 is answered by n, where the mean is exact.

    Source: Bardenet and Maillard (2015), Theorem 4.3, two-sided, a union over the probes.

    >>> k_fixed_probes(np.linspace(0, 1, 200), 0.1, 0.9, n=3000, ceiling=1.0)
    363
    """
    losses = as_rows(losses)
    deviation = losses.std(1).max()
    logarithm = math.log(10 * len(losses) / (1 - confidence))
    range_factor = (7 / 3 + 3 / math.sqrt(2)) * ceiling

    def width(k: int) -> float:
        rho = 1 - (k - 1) / n if k <= n / 2 else (1 - k / n) * (1 + 1 / k)
        return deviation * math.sqrt(2 * rho * logarithm / k) + range_factor * logarithm / k

    return _least(lambda k: width(k) <= tolerance, int(n))


def gaussian_factor(
    losses: ArrayLike, confidence: float, seed: int = 0, paths: int = 4000, steps: int = 400
) -> float:
    """q^2 with k ~ q^2 S_mu^2 / tau^2 for large k, a quantile of sup over s <= 1 of |B(s)|^2.

    losses              (n,) or (m_probes, n)
    confidence          of the quantile
    seed, paths, steps  of the simulation

    k (L_k - L) at the probes tends to a Brownian motion B with the covariance of the losses, here
    scaled to trace 1, and sup over k' >= k of |L_k' - L|, by inversion of time, to its supremum
    over s <= 1 divided by sqrt(k). At one probe by the series of its distribution, at more by
    simulation (low by a few per cent: a grid in time).

    >>> round(gaussian_factor([0.0, 1.0, 3.0], 0.95) ** 0.5, 2)
    2.24
    """
    losses = as_rows(losses)
    if len(losses) == 1:
        return brentq(lambda q: 1 - _stays_below(q) - (1 - confidence), 0.2, 40) ** 2
    weights = np.linalg.eigvalsh(np.cov(losses)).clip(0)
    if weights.max() == 0:
        return 1.0
    weights = weights[weights > 1e-3 * weights.max()]
    weights = weights / weights.sum()
    suprema = _suprema(tuple(weights.tolist()), seed, paths, steps)
    return float(np.quantile(suprema, confidence))


def _stays_below(q: float) -> float:
    """Pr(|B(s)| < q for all s <= 1) of a standard Brownian motion."""
    decay = np.exp(-((TERMS * math.pi / q) ** 2) / 8)
    return 4 / math.pi * float(((-1.0) ** (TERMS // 2) / TERMS * decay).sum())


@lru_cache(maxsize=16)
def _suprema(weights: tuple[float, ...], seed: int, paths: int, steps: int) -> np.ndarray:
    """sup |B|^2 of simulated paths, (paths,), B with independent parts of these variances."""
    squares = np.zeros((paths, steps))
    generator = numpy_generator("gaussian factor", seed)
    for weight in weights:
        walk = generator.standard_normal((paths, steps)).cumsum(1)
        squares += weight * walk**2 / steps
    return squares.max(1)


def surface_forecast(
    values: ArrayLike,
    tolerance: float,
    confidence: float,
    kurtosis: float = 20.0,
    seed: int = 0,
    ceiling: float | None = None,
    distinct: int | None = None,
) -> dict:
    """The surface answer from the losses of a pilot alone: the fields of `SampleSize` by name.

    values                       losses (n,) or (m_probes, n)
    tolerance                    tau
    confidence                   1 - delta
    kurtosis, ceiling, distinct  see `limits.spread_limits`
    seed                         of `gaussian_factor`

    The interval [lower, upper] holds the true size with probability 1 - delta: half of delta at
    most for the upper limit of S_mu, half for the lower one, which is asymptotic in k. Raises
    ValueError for fewer than 4 examples. Source: Theorem (thm:fourth), Proposition (prop:pilot).

    >>> losses = np.random.default_rng(0).exponential(size=400)
    >>> forecast = surface_forecast(losses, tolerance=0.1, confidence=0.9)
    >>> forecast["lower"] < forecast["k"] < forecast["upper"]
    True
    """
    check_ranges(tolerance=tolerance, confidence=confidence, kurtosis=kurtosis, ceiling=ceiling)
    values = finite_rows(values)
    if ceiling is not None and values.max() > ceiling:
        raise ValueError(
            f"ceiling is {ceiling:g} and a loss of the pilot is {values.max():g}: give a number "
            "that no loss exceeds."
        )
    delta = 1 - confidence
    n = values.shape[1]
    share = budget(max(1, n // 2), kurtosis, delta)
    spread = spread_limits(values, kurtosis, share, delta / 2, ceiling, distinct)
    variance = float(values.var(1, ddof=1).mean())
    factor = gaussian_factor(values, confidence, seed)
    central = max(1, math.ceil(factor * variance / tolerance**2))
    lower = max(1, math.floor(factor * spread.lower / tolerance**2))
    upper = k_surface(spread.upper, tolerance, 1 - (delta - share), kurtosis=spread.kurtosis)
    by_theorem = k_surface(variance, tolerance, confidence, kurtosis=spread.kurtosis)
    terms = {
        "S": math.sqrt(variance),
        "S_lower": math.sqrt(spread.lower),
        "S_upper": math.sqrt(spread.upper),
        "pairs": spread.pairs,
        "kurtosis": spread.kurtosis,
        "observed_kurtosis": spread.observed_kurtosis,
        "pilot_failure": share,
        "price_of_theorem": by_theorem / central,
        "price_of_pilot": upper / by_theorem,
    }
    least = least_pilot(spread.kurtosis, share)
    answer = conclude(central, min(lower, central), upper, n, least, terms)
    return answer | drift(values.mean(0))
