"""Does a size keep its promise? Counted on examples that the rule has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import binom

from utils.run.streams import numpy_generator
from utils.sample_size.measurement import Pilot
from utils.sample_size.ranges import check_ranges, finite_rows
from utils.sample_size.rivals import baselines
from utils.sample_size.step import k_step
from utils.sample_size.surface import gaussian_factor, k_fixed_probes, k_surface
from utils.surface.intervals import Estimate, binomial_interval


def exceedance(values: np.ndarray, k: int, tolerance: float, orders: np.ndarray) -> Estimate:
    """Share of orders in which Z_k' > tau for some k' >= k, with its exact 95 % interval.

    values     held-out losses (n,) or (n_probes, n)
    k          size
    tolerance  tau
    orders     permutations (n_orders, n)

    Z_k is the root mean square over the probes of L_k - L_n. This is the event whose probability
    Theorem (thm:neighbourhood) bounds by delta; the interval is Clopper and Pearson's.

    >>> orders = np.array([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
    >>> exceedance(np.array([0.0, 0.0, 3.0]), 2, 0.8, orders)[0]  # the mean of two is 0, not 1
    0.3333333333333333
    """
    check_ranges(tolerance=tolerance, k=k)
    values = finite_rows(values)
    counts = np.arange(1, orders.shape[1] + 1)
    squares = np.zeros(orders.shape)
    for row in values:
        mean = np.cumsum(row[orders], axis=1) / counts
        squares += (mean - mean[:, -1:]) ** 2 / len(values)
    worst = np.sqrt(squares[:, k - 1 :]).max(1)
    hits = int((worst > tolerance).sum())
    return hits / len(orders), *binomial_interval(hits, len(orders))


def true_size(
    values: ArrayLike, tolerance: float, confidence: float, streams: int = 400, seed: int = 0
) -> tuple[int, int, int]:
    """The least k with Pr(some k' >= k has Z_k' > tau) <= delta, and its 95 % interval.

    values      losses (N,) or (m_probes, N) of a whole pool, which samples are drawn from with
                replacement; L is the pool's mean
    tolerance   tau
    confidence  1 - delta
    streams     simulated samples, as long as 40 times the Gaussian size, after which the event has
                a probability below 2e-3 (fourth moments, q >= 1)
    seed        of the draws

    The result is the quantile over the streams, with its interval by order statistics.

    >>> k, low, high = true_size([0.0, 1.0], 0.2, 0.9, streams=100)
    >>> low <= k <= high
    True
    """
    check_ranges(tolerance=tolerance, confidence=confidence, streams=streams)
    values = finite_rows(values)
    values = values - values.mean(1, keepdims=True)
    factor = gaussian_factor(values, confidence, seed)
    length = 40 * math.ceil(factor * values.var(1).mean() / tolerance**2)
    counts = np.arange(1, length + 1)
    generator = numpy_generator("true size", seed)
    settled: np.ndarray = np.zeros(streams, dtype=int)
    for stream in range(streams):
        draws = generator.integers(values.shape[1], size=length)
        squares = np.zeros(length)
        for row in values:
            squares += (row[draws].cumsum() / counts) ** 2 / len(values)
        outside = np.flatnonzero(squares > tolerance**2)
        settled[stream] = outside[-1] + 2 if len(outside) else 1
    settled = np.sort(settled)
    low, high = binom.ppf([0.025, 0.975], streams, confidence)
    ranks = (math.ceil(confidence * streams), int(low), int(high) + 1)
    k, low, high = (int(settled[min(streams, max(1, rank)) - 1]) for rank in ranks)
    return k, low, high


def forecasts(
    pilot: Pilot, held: np.ndarray, tolerances: Iterable[float], confidence: float
) -> pd.DataFrame:
    """The pilot's surface answer, the truth on a held-out pool and the rivals, by tolerance.

    pilot       measured
    held        losses (n_probes, n) of the pool at the same weights
    tolerances  taus
    confidence  1 - delta

    Columns tolerance, criterion, k, lower, upper; rivals have k alone.

    >>> import torch
    >>> from utils.sample_size import pilot
    >>> _ = torch.manual_seed(0)
    >>> measured = pilot(torch.nn.Linear(2, 3), torch.randn(99, 2), torch.arange(99) % 3)
    >>> table = forecasts(measured, measured.surface_losses, [0.5], 0.9)
    >>> list(table["criterion"][:3])
    ['answer', 'truth on held-out data', 'one step']
    """
    interval = ("k", "lower", "upper")
    rows = []
    for tolerance in tolerances:
        answer = pilot.surface(tolerance, confidence)
        truth = true_size(held, tolerance, confidence, seed=pilot.seed)
        sizes = {
            "answer": {name: getattr(answer, name) for name in interval},
            "truth on held-out data": dict(zip(interval, truth, strict=True)),
        }
        rules = baselines(pilot.surface_losses, tolerance, seed=pilot.seed)
        rules["no single sample (k_step)"] = k_step(pilot.surface_losses[0], tolerance)
        sizes |= {rule: {"k": k} for rule, k in rules.items()}
        rows += [{"tolerance": tolerance, "criterion": rule} | k for rule, k in sizes.items()]
    return pd.DataFrame(rows)


def checks(
    pilot: Pilot,
    held: np.ndarray,
    tolerances: Iterable[float],
    confidence: float,
    orders: np.ndarray,
) -> pd.DataFrame:
    """Does each rule, asked by the pilot about a held-out pool's own mean, keep its promise there?

    pilot       measured
    held        losses (n_probes, n) of the pool at the same weights
    tolerances  taus
    confidence  1 - delta
    orders      permutations (n_orders, n) of the pool

    Columns tolerance, rule, k, failures (`exceedance`) with its interval low and high, promised,
    and verdict: "broken" where the interval lies above the promise. The two controls are single
    steps.

    >>> import torch
    >>> from utils.sample_size import pilot
    >>> _ = torch.manual_seed(0)
    >>> measured = pilot(torch.nn.Linear(2, 3), torch.randn(99, 2), torch.arange(99) % 3)
    >>> orders = np.stack([np.random.default_rng(i).permutation(99) for i in range(50)])
    >>> table = checks(measured, measured.surface_losses, [0.5], 0.9, orders)
    >>> table["rule"][4], table["verdict"][1]
    ('worst step (control)', 'kept')
    """
    n = held.shape[1]
    ceiling = pilot.loss_ceiling(pilot.radius)
    rows = []
    for tolerance in tolerances:
        terms = pilot.surface(tolerance, confidence).terms
        spreads = {"pilot's S": terms["S"], "upper limit of S": terms["S_upper"]}
        spreads["held-out S"] = held.var(1, ddof=1).mean() ** 0.5
        sizes = {
            f"surface, {name}": k_surface(S**2, tolerance, confidence, n, terms["kurtosis"])
            for name, S in spreads.items()
        }
        if math.isfinite(ceiling):
            probed = k_fixed_probes(pilot.surface_losses, tolerance, confidence, n, ceiling)
            sizes["fixed probes, pilot's S"] = probed
        typical = math.ceil(terms["S"] / tolerance)
        sizes["one step (control)"] = min(n, max(1, typical))
        sizes["worst step (control)"] = min(n, pilot.step(tolerance, confidence).k)
        for rule, k in sizes.items():
            counted = exceedance(held, int(k), tolerance, orders)
            rows.append((tolerance, rule, int(k), *counted))
    columns = ["tolerance", "rule", "k", "failures", "low", "high"]
    table = pd.DataFrame(rows, columns=columns).assign(promised=1 - confidence)
    verdict = np.where(table["low"] > table["promised"], "broken", "kept")
    return table.assign(verdict=verdict)
