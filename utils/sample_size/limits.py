"""Limits of a spread from a pilot (Proposition (prop:pilot)).

A spread is the mean of some Y >= 0 over pairs of examples, such as Y = (l - l')^2/2, whose mean is
the variance of the losses. No sample excludes a rare huge loss, so an upper limit needs an
assumption: a ceiling of Y, or E Y^2 <= kurtosis (E Y)^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from utils.surface.identities import as_rows

CAUTION = 2.0  # times a pilot's own kurtosis, before it is held against the assumed one
SHARES = np.geomspace(0.005, 0.5, 60)  # of delta, tried by `budget`


@dataclass(frozen=True)
class Spread:
    """A pilot's estimate of E Y, Y >= 0, with limits that each hold with a stated probability.

    estimate           the mean over all pairs
    lower, upper       its limits; upper is inf where the pilot is too small
    pairs              how many independent pairs the limits count on
    kurtosis           the ratio E Y^2 / (E Y)^2 that the limits allow for
    observed_kurtosis  the pilot's own ratio
    """

    estimate: float
    lower: float
    upper: float
    pairs: int
    kurtosis: float
    observed_kurtosis: float


def pair_moments(X: ArrayLike) -> tuple[float, float]:
    """Means of Y and Y^2, Y = |x - x'|^2/2, over all pairs of the rows of X.

    X  (n, d), an array or a tensor on the CPU

    The mean of Y is the trace of the sample covariance. Raises ValueError for fewer than 4 rows.
    Source: (eq:pilot-pairs).

    >>> pair_moments([[0.0], [0.0], [2.0], [2.0]])[0]  # the sample variance
    1.3333333333333333
    """
    X = np.asarray(X, dtype=np.float64)
    n, d = X.shape
    if n < 4:
        raise ValueError(f"The pilot has {n} samples: give at least 4.")
    X = X - X.mean(0)
    squares = (X**2).sum(1)
    gram = X.T @ X if d < n else X @ X.T
    total = n * (squares**2).sum() + squares.sum() ** 2 + 2 * (gram**2).sum()
    return float(squares.sum() / (n - 1)), float(total / (2 * n * (n - 1)))


def _divergence(q: float, p: float) -> float:
    """kl(q, p) of two coins."""
    heads = q * math.log(q / p) if q > 0 else 0.0
    return heads + (1 - q) * (math.log1p(-q) - math.log1p(-p))


def inflation(pairs: int, kurtosis: float, failure: float) -> float:
    """What a mean is multiplied by to become an upper limit, inf if no number does.

    The result is 1/x with Pr(mean of Y <= x E Y) <= failure for every Y >= 0 with E Y^2 <= kurtosis
    (E Y)^2. The worst Y is kurtosis E Y times a coin of probability 1/kurtosis, so that Chernoff's
    bound is the binomial one, exp(-pairs kl(x/kurtosis, 1/kurtosis)).

    pairs    independent copies of Y
    failure  probability that the limit may fail

    Source: Proposition (prop:pilot), (ii).

    >>> round(inflation(pairs=200, kurtosis=20.0, failure=0.05), 2)
    2.9
    """
    p = 1 / max(kurtosis, 1.0)
    needed = math.log(1 / failure) / pairs
    if p == 1:
        return 1.0
    if _divergence(0.0, p) <= needed:
        return math.inf
    return p / brentq(lambda q: _divergence(q, p) - needed, 0.0, p, xtol=1e-15 * p)


def bounded_upper(mean: float, ceiling: float, pairs: int, failure: float) -> float:
    """Upper limit of E Y of independent Y in [0, ceiling].

    mean     of the Y
    ceiling  no Y exceeds it
    pairs    copies of Y
    failure  probability that the limit may fail

    The worst Y is a coin, so the binomial Chernoff bound is inverted: pairs kl(mean/ceiling, E
    Y/ceiling) <= ln(1/failure). Source: Proposition (prop:pilot), (i).

    >>> round(bounded_upper(0.0, ceiling=1.0, pairs=100, failure=0.05), 3)  # nothing seen
    0.03
    """
    q = min(1.0, mean / ceiling)
    needed = math.log(1 / failure) / pairs
    top = 1 - 1e-12
    if q >= top or _divergence(q, top) <= needed:
        return ceiling * 1.0
    p = brentq(lambda p: _divergence(q, p) - needed, max(q, 1e-300), top, xtol=1e-15)
    return ceiling * p


def limits(
    mean: float,
    square: float,
    pairs: int,
    kurtosis: float,
    failure: float,
    failure_lower: float | None = None,
    ceiling: float | None = None,
) -> Spread:
    """The limits of E Y.

    mean, square   means of Y and Y^2 over all pairs of a pilot of 2 `pairs` examples, or over
                   disjoint ones
    kurtosis       the assumption E Y^2 <= kurtosis (E Y)^2, which no pilot can check. Where twice
                   the pilot's own ratio is larger it is taken instead: a ratio falls short of the
                   population's the more, the heavier its tail.
    failure        probability that the upper limit may fail
    failure_lower  the lower one's, the same by default
    ceiling        if known, of Y; the upper limit then needs no assumption, and the kurtosis is at
                   most ceiling / E Y

    Source: Proposition (prop:pilot), (i) or (ii) above, (iii) below.

    >>> spread = limits(mean=0.4, square=0.8, pairs=200, kurtosis=20.0, failure=0.05)
    >>> spread.lower < 0.4 < spread.upper, round(spread.observed_kurtosis, 6)
    (True, 5.0)
    """
    if failure_lower is None:
        failure_lower = failure
    observed = square / mean**2 if mean > 0 else 1.0
    kurtosis = max(kurtosis, CAUTION * observed)
    lower = mean / (1 + math.sqrt((kurtosis - 1) * (1 / failure_lower - 1) / pairs))
    if ceiling is not None:
        upper = bounded_upper(mean, ceiling, pairs, failure)
        kurtosis = max(1.0, ceiling / upper)
    else:
        factor = inflation(pairs, kurtosis, failure)
        upper = mean * factor if math.isfinite(factor) else math.inf  # of a mean of 0 too
    return Spread(mean, lower, upper, pairs, kurtosis, observed)


def spread_limits(
    losses: ArrayLike,
    kurtosis: float,
    failure: float,
    failure_lower: float | None = None,
    ceiling: float | None = None,
    distinct: int | None = None,
) -> Spread:
    """The squared spread S_mu^2 of the losses at the probe weights, with its limits.

    losses    (n,) or (m_probes, n), of a pilot; Y is the mean over the probes of (l - l')^2/2
    kurtosis  the assumption, see `limits`, as for failure and failure_lower
    ceiling   with 0 <= l <= ceiling, if one is known
    distinct  how many of the n examples are no copies, n by default

    Raises ValueError for fewer than 4 examples. Source: Proposition (prop:pilot).

    >>> losses = np.random.default_rng(0).exponential(size=400)
    >>> spread = spread_limits(losses, kurtosis=20.0, failure=0.05)
    >>> spread.lower < 1 < spread.upper  # the variance of the population
    True
    """
    losses = as_rows(losses)
    n_probes, n = losses.shape
    mean, square = pair_moments(losses.T / math.sqrt(n_probes))
    pairs = max(1, (distinct or n) // 2)
    largest = None if ceiling is None else ceiling**2 / 2
    return limits(mean, square, pairs, kurtosis, failure, failure_lower, largest)


def budget(pairs: int, kurtosis: float, delta: float, spreads: int = 1) -> float:
    """The part of delta, at most half, that is spent on the upper limits of the spreads.

    It makes the answer least, and is a function of the pilot's size and of the assumption alone, so
    that it may be chosen with the pilot at hand.

    pairs, kurtosis  see `limits`
    delta            the probability that the whole answer may fail
    spreads          how many upper limits share it

    >>> budget(2000, 20.0, 0.1) < budget(120, 20.0, 0.1)  # a large pilot needs little
    True
    """
    shares = delta * SHARES
    inflations = np.array([inflation(pairs, kurtosis, share / spreads) for share in shares])
    sizes = inflations / np.sqrt(delta - shares)
    return float(shares[int(np.argmin(sizes))])


def least_pilot(kurtosis: float, failure: float) -> int:
    """Examples from which on a pilot's `inflation` with this kurtosis and failure is finite.

    >>> n = least_pilot(20.0, 0.05)
    >>> math.isinf(inflation(n // 2 - 1, 20.0, 0.05)), math.isinf(inflation(n // 2, 20.0, 0.05))
    (True, False)
    """
    if kurtosis <= 1:
        return 4
    pairs = -math.log(1 / failure) / math.log1p(-1 / kurtosis)
    return 2 * math.floor(pairs + 1)
