"""What one would do without a theorem: rules of thumb and fitted learning curves."""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import OptimizeWarning, curve_fit

from utils.run.streams import numpy_generator
from utils.surface.identities import as_rows


def power_law(k: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """a k^-|b| + c."""
    return a * k ** -abs(b) + c


def logarithmic(k: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """c - a ln(k + |b|)."""
    return c - a * np.log(k + abs(b))


def arctan(k: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """c - a arctan(|b| k)."""
    return c - a * np.arctan(abs(b) * k)


def algebraic_root(k: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """c - k / (1 + |a k|^|b|)^(1/|b|)."""
    return c - k / (1 + abs(a * k) ** abs(b)) ** (1 / abs(b))


# Curves v(k) of the learning-curve literature: name -> (function, starting values). They are stated
# for an accuracy in per cent that grows; here for a distance that falls, so that the arctan has a
# free height.
FAMILIES = {
    "power law": (power_law, (1.0, 0.5, 0.0)),
    "logarithmic": (logarithmic, (0.1, 1.0, 1.0)),
    "arctan": (arctan, (1.0, 0.01, 1.0)),
    "algebraic root": (algebraic_root, (1.0, 0.5, 1.0)),
}


def fitted_sizes(
    k: ArrayLike, curve: ArrayLike, targets: ArrayLike, family: str, most: float = 1e9
) -> np.ndarray:
    """The sizes at which a fitted curve falls to each target, (len(targets),); inf where never.

    k, curve  the points (m,) that a family is fitted to, by least squares
    targets   heights
    family    a name in FAMILIES
    most      sizes beyond are not tried

    Source: Mahmood et al., How much more data do I need?, arXiv 2207.01725.

    >>> k = np.geomspace(4, 400, 20)
    >>> int(fitted_sizes(k, k**-0.5, [0.1], "power law")[0])
    100
    """
    function, start = FAMILIES[family]
    targets = np.atleast_1d(np.asarray(targets, dtype=np.float64))
    k = np.asarray(k, dtype=np.float64)
    curve = np.asarray(curve, dtype=np.float64)
    grid = np.geomspace(1, most, 2000)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", OptimizeWarning)
            parameters, _ = curve_fit(function, k, curve, p0=start, maxfev=5000)
            below = function(grid, *parameters)[None] <= targets[:, None]
    except (RuntimeError, TypeError, ValueError):  # no fit
        return np.full(len(targets), math.inf)
    return np.where(below.any(1), grid[below.argmax(1)], math.inf)


def settling_curve(
    values: ArrayLike, k: ArrayLike, n_orders: int = 200, seed: int = 0
) -> np.ndarray:
    """The mean over random orders of a pilot of Z_k = |L_k - L_m| over its probes, (len(k),).

    values          losses (m,) or (m_probes, m)
    k               sizes up to m
    n_orders, seed  of the orders

    >>> curve = settling_curve(np.arange(50.0), [5, 20, 50])
    >>> bool(curve[0] > curve[1] > curve[2])
    True
    """
    values = as_rows(values)
    k = np.asarray(k)
    limit = values.mean(1, keepdims=True)
    generator = numpy_generator("settling curve", seed)
    total = np.zeros(len(k))
    for _ in range(n_orders):
        order = generator.permutation(values.shape[1])
        means = values[:, order].cumsum(1)[:, k - 1] / k
        total += np.sqrt(((means - limit) ** 2).mean(0))
    return total / n_orders


def doubling(values: np.ndarray, tolerance: float, seed: int = 0) -> float:
    """Double from 8 on until two means in a row differ by less than tau; inf if the pilot ends.

    values     losses (m_probes, m)
    tolerance  tau
    seed       of the order

    >>> doubling(np.ones((1, 100)), 0.1), doubling(np.ones((1, 10)), 0.1)
    (16.0, inf)
    """
    m = values.shape[1]
    order = numpy_generator("doubling", seed).permutation(m)
    k = 8
    while 2 * k <= m:
        difference = values[:, order[:k]].mean(1) - values[:, order[: 2 * k]].mean(1)
        k *= 2
        if math.sqrt((difference**2).mean()) < tolerance:
            return float(k)
    return math.inf


def baselines(
    values: ArrayLike, tolerance: float, targets: ArrayLike | None = None, seed: int = 0
) -> dict:
    """Sizes from the same pilot by rules without guarantee, by name; inf where a rule refuses.

    values     losses (m,) or (m_probes, m) of a pilot
    tolerance  tau
    targets    heights that the families of curves are solved for, an array of sizes each; the
               tolerance alone, a number each, if there are none
    seed       of the orders

    The families are fitted to `settling_curve` on k from 4 to m/2 (nearer to m it bends to 0 by
    construction). "one step": S/tau, where a typical step falls below tau, the papers' reading.
    "doubling": see there.

    >>> sizes = baselines(np.random.default_rng(0).normal(size=400), 0.1)
    >>> sizes["one step"], sorted(sizes)[:3]
    (10, ['algebraic root', 'arctan', 'doubling'])
    """
    values = as_rows(values)
    m = values.shape[1]
    S = math.sqrt(values.var(1, ddof=1).mean())
    sizes: dict = {"one step": max(1.0, math.ceil(S / tolerance))}
    sizes["doubling"] = doubling(values, tolerance, seed)
    k = np.unique(np.geomspace(min(4, m // 2), m // 2, 20).astype(int))
    curve = settling_curve(values, k, seed=seed)
    for family in FAMILIES:
        solved = fitted_sizes(k, curve, tolerance if targets is None else targets, family)
        sizes[family] = float(solved[0]) if targets is None else solved
    return sizes
