"""How the empirical loss surface settles: one-step changes, distance to the limit, the ball, null controls.

L_k(w) is the mean of the first k of n per-sample losses in a random order, S their standard deviation
(divisor n - 1), MAD their mean absolute deviation. At fixed weights L_{k+1} - L_k = (l_{k+1} - L_k)/(k+1)
is an identity (prop:identity): its rate 1/k holds for every list of numbers and tests nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from utils.curvature import Losses, operator_norm


def random_orders(n: int, n_orders: int, seed: int = 0) -> np.ndarray:
    """`n_orders` independent uniform permutations of 0 .. n-1, as (n_orders, n) int."""
    generator = np.random.default_rng([seed, 5])
    return np.stack([generator.permutation(n) for _ in range(n_orders)])


def running_means(losses, orders=None) -> np.ndarray:
    """L_k, k = 1 .. n, as (n_orders, n), from the losses (n,) in each order (default: as given)."""
    losses = np.asarray(losses, dtype=np.float64)
    ordered = losses[np.arange(len(losses))[None] if orders is None else orders]
    return np.cumsum(ordered, axis=1) / np.arange(1, ordered.shape[1] + 1)


def loss_steps(losses, orders=None) -> np.ndarray:
    """L_{k+1} - L_k, k = 1 .. n-1, as (n_orders, n-1), from the losses (n,) in each order (default: as given).

    Computed as (l_{k+1} - L_k)/(k+1): the difference of two running means cancels. Source: (prop:identity).
    """
    losses = np.asarray(losses, dtype=np.float64)
    ordered = losses[np.arange(len(losses))[None] if orders is None else orders]
    return (ordered[:, 1:] - running_means(losses, orders)[:, :-1]) / np.arange(2, ordered.shape[1] + 1)


def distance_to_limit(losses, orders=None) -> np.ndarray:
    """L_k - L_n, k = 1 .. n, as (n_orders, n); the last column is 0 by definition."""
    mean = running_means(losses, orders)
    return mean - mean[:, -1:]


@dataclass(frozen=True)
class ExpectedSteps:
    """Exact statements about |L_{k+1} - L_k| over random orders, for k = 1 .. n-1 (arrays of length n-1).

    rms is exact; the mean lies in [mean_low, mean_high]. One loss that differs from the rest attains the
    lower end at every k; the two ends meet at k = n-1.
    """

    k: np.ndarray
    rms: np.ndarray
    mean_low: np.ndarray
    mean_high: np.ndarray


def expected_steps(losses) -> ExpectedSteps:
    """E(L_{k+1}-L_k)^2 = S^2/(k(k+1)) and the bracket of E|L_{k+1}-L_k|, for a uniform order of a pool of n losses.

    Source: Proposition (prop:rate). Any pool, random numbers included.
    """
    losses = np.asarray(losses, dtype=np.float64)
    n = len(losses)
    if n < 3:
        raise ValueError(f"There are {n} losses: at least 3 are needed for a rate.")
    k = np.arange(1, n)
    S, mad = losses.std(ddof=1), n / (n - 1) * np.abs(losses - losses.mean()).mean()
    return ExpectedSteps(
        k, S / np.sqrt(k * (k + 1.0)), mad / (k + 1.0), (mad + S * np.sqrt(1 / k - 1 / (n - 1))) / (k + 1.0)
    )


def expected_distance(losses, target: float | None = None) -> np.ndarray:
    """Root mean square over random orders of L_k - target, k = 1 .. n; the target is L_n unless another is given.

    sqrt(S^2 (1/k - 1/n) + (L_n - target)^2), exact for a target that does not depend on the order: no
    k removes the second term. Source: (prop:two-questions).
    """
    losses = np.asarray(losses, dtype=np.float64)
    n = len(losses)
    gap = 0.0 if target is None else losses.mean() - target
    return np.sqrt(losses.var(ddof=1) * (1 / np.arange(1, n + 1) - 1 / n) + gap**2)


def log_grid(low: int, high: int, points: int) -> np.ndarray:
    """About `points` distinct integers from low to high, equally spaced in log k."""
    return np.unique(np.round(np.geomspace(low, high, points)).astype(int))


def bootstrap_mean(rows: np.ndarray, seed: int = 0, draws: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over rows (r, m) with a 95 % percentile-bootstrap interval over rows: three arrays (m,)."""
    generator = np.random.default_rng([seed, 7])
    weights = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws) / len(rows)
    low, high = np.quantile(weights @ rows, [0.025, 0.975], axis=0)
    return rows.mean(0), low, high


def log_log_slope(k: np.ndarray, rows: np.ndarray, seed: int = 0, draws: int = 400, root: bool = False):
    """Least-squares slope of log(mean over rows) against log k, with a 95 % bootstrap interval over rows.

    rows (r, m) are positive, one row an order; with `root` the square root of the mean is fitted (a
    root mean square from squares). Returns (slope, low, high).
    """
    generator = np.random.default_rng([seed, 11])
    weights = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws) / len(rows)
    means = np.vstack([rows.mean(0), weights @ rows])
    x = np.log(k) - np.log(k).mean()
    slopes = (np.log(means) @ x) / (x @ x) * (0.5 if root else 1.0)
    low, high = np.quantile(slopes[1:], [0.025, 0.975])
    return slopes[0], low, high


COLUMNS = ["k", "quantity", "value", "low", "high", "theory_low", "theory_high"]


def measure_steps(losses, orders: np.ndarray, k: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """|L_{k+1} - L_k| over the orders at each k: its mean, its rms, and (k = 0) the log-log slope of the rms.

    Every value with its 95 % bootstrap interval over orders and, in theory_low and theory_high, what
    (prop:rate) says: the bracket of the mean, the exact rms, the slope of the exact rms on the same k.
    """
    squares, exact = loss_steps(losses, orders)[:, k - 1] ** 2, expected_steps(losses)
    mean, square = bootstrap_mean(np.sqrt(squares), seed), bootstrap_mean(squares, seed)
    rms = exact.rms[k - 1]
    rows = [(at, "mean", *values) for at, *values in zip(k, *mean, exact.mean_low[k - 1], exact.mean_high[k - 1])]
    rows += [(at, "rms", *values) for at, *values in zip(k, *map(np.sqrt, square), rms, rms)]
    theory = log_log_slope(k, rms[None] ** 2, seed, root=True)[0]
    rows.append((0, "slope", *log_log_slope(k, squares, seed, root=True), theory, theory))
    return pd.DataFrame(rows, columns=COLUMNS)


def measure_distance(losses, orders: np.ndarray, k: np.ndarray, target: float | None = None, seed: int = 0):
    """Rms over the orders of L_k - target at each k < n, beside `expected_distance`; without a target (L_n) also
    the slope (k = 0) against 1/k - 1/n, 1/2 in theory. Columns and intervals as in `measure_steps`."""
    losses = np.asarray(losses, dtype=np.float64)
    aim = losses.mean() if target is None else target
    squares = (running_means(losses, orders)[:, k - 1] - aim) ** 2
    exact = expected_distance(losses, target)[k - 1]
    values = zip(k, *map(np.sqrt, bootstrap_mean(squares, seed)), exact, exact)
    rows = [(at, "rms", *row) for at, *row in values]
    if target is None:
        rows.append((0, "slope", *log_log_slope(1 / k - 1 / len(losses), squares, seed, root=True), 0.5, 0.5))
    return pd.DataFrame(rows, columns=COLUMNS)


@dataclass(frozen=True)
class OneStepOnBall:
    """|L_{k+1}(w) - L_k(w)| at one distance r = |w - w0| from w0, beside theorem 9's terms, all times k + 1.

    measured       largest |e_k(w)| over the probed directions, e_k = l_{k+1} - L_k
    value          |e_k(w0)|
    gradient       r |grad e_k(w0)|
    curvature      (r^2/2) ||Hess e_k(w0)||, by Lanczos (a lower estimate, residual below 1e-3 of it)
    remainder      largest |e_k(w) - its quadratic Taylor polynomial| over the probes
    published      value + (r^2/2)(||h_{k+1}|| + mean ||h_i||) with the norms at w0: no gradient term
    """

    k: int
    radius: float
    measured: float
    value: float
    gradient: float
    curvature: float
    remainder: float
    published: float

    @property
    def first_form(self) -> float:
        """(eq:one-step-ball-a) with the norms at w0 in place of their suprema over the ball."""
        return self.published + self.gradient

    @property
    def second_form(self) -> float:
        """(eq:one-step-ball-b) without its third-order remainder."""
        return self.value + self.gradient + self.curvature


def one_step_on_ball(
    losses: Losses, norms: np.ndarray, order: np.ndarray, k: int, radii, *, n_random: int = 2, seed: int = 0
) -> list[OneStepOnBall]:
    """The change of the surface by sample order[k] after the first k, at distance r along ± grad e_k and at random.

    losses   the samples as functions of the weights; norms (n,) their Hessians' spectral norms at w0.
    radii    Euclidean distances. Cost: 2 + n_random forward passes over k + 1 samples a radius, one Lanczos run.
    Source: Theorem (thm:one-step-ball); the published form assumes a common minimum (rem:common-minimum).
    """
    first, new = torch.as_tensor(order[:k]), torch.as_tensor(order[k : k + 1])

    def e(w):  # e_k at the flat weights w
        return (losses.values(w, new)[0] - losses.values(w, first).mean()).item()

    of_new, of_first = losses.hessian(rows=new), losses.hessian(rows=first)

    def bend(v):  # Hess e_k v
        return of_new(v) - of_first(v)

    w0, gradient = losses.w, losses.gradient(rows=new) - losses.gradient(rows=first)
    generator = torch.Generator().manual_seed(100_003 * seed + k)
    noise = torch.randn(n_random + 1, losses.P, generator=generator, dtype=w0.dtype).to(w0.device)
    curvature = operator_norm(bend, noise[0], tolerance=1e-3, max_steps=60).value
    along = gradient / gradient.norm().clamp_min(torch.finfo(w0.dtype).tiny)  # equal samples: no direction, not nan
    directions = [along, -along, *(u / u.norm() for u in noise[1:])]
    slopes, bends = [(gradient @ u).item() for u in directions], [(u @ bend(u)).item() for u in directions]
    curvature = max(curvature, *map(abs, bends))  # both are lower estimates of the norm
    e0, mean_norm = e(w0), float(norms[order[k]] + norms[order[:k]].mean())
    found = []
    for r in map(float, radii):
        values = [e(w0 + r * u) for u in directions]
        remainder = max(
            abs(value - (e0 + r * s + r * r / 2 * b)) for value, s, b in zip(values, slopes, bends, strict=True)
        )
        found.append(
            OneStepOnBall(
                k,
                r,
                max(map(abs, values)),
                abs(e0),
                r * gradient.norm().item(),
                r * r / 2 * curvature,
                remainder,
                abs(e0) + r * r / 2 * mean_norm,
            )
        )
    return found
