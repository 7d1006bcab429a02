"""How the empirical loss surface settles: at fixed weights, over neighbourhoods and balls, and by retraining.

L_k(w) is the mean of the first k of n per-sample losses in a random order, S their standard deviation
(divisor n - 1), MAD their mean absolute deviation. At fixed weights L_{k+1} - L_k = (l_{k+1} - L_k)/(k+1)
is an identity (prop:identity): its rate 1/k holds for every list of numbers and tests nothing.

An interval by bootstrap needs FEWEST rows, one by the ratio to a known mean FEWEST_RATIOS: from fewer there is none,
and no verdict.

Losses come as (n,) at one weight or as (m, n) at m weights: then squares and absolute values are averaged over the
weights, and every exact statement holds for that average too (thm:neighbourhood).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.signal import lfilter
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.stats import beta
from scipy.stats import t as student
from torch import Tensor, nn

from utils import training
from utils.curvature import Losses, SampleHessians, hessian_norm, operator_norm

FEWEST = 100  # rows of a bootstrap: of 20 squares with a heavy tail its "95 %" misses more than 1 in 5
FEWEST_RATIOS = 20  # rows of `rms_by_ratio`, whose tails the auxiliary takes away


def random_orders(n: int, n_orders: int, seed: int = 0) -> np.ndarray:
    """`n_orders` independent uniform permutations of 0 .. n-1, as (n_orders, n) int."""
    generator = np.random.default_rng([seed, 5])
    return np.stack([generator.permutation(n) for _ in range(n_orders)])


def typical_first_orders(losses, n_orders: int, seed: int = 0) -> np.ndarray:
    """`n_orders` random orders (n_orders, n) in which losses near the mean tend to come first.

    The next sample is drawn in inverse proportion to the rank of |l - mean| among all. The control of statements on
    uniform orders: as random as those, but later samples differ more, whatever the shape of the list.
    """
    losses = np.asarray(losses, dtype=np.float64)
    rank = np.argsort(np.argsort(np.abs(losses - losses.mean()))) + 1
    return np.argsort(np.random.default_rng([seed, 23]).exponential(size=(n_orders, len(losses))) * rank, axis=1)


def running_means(losses, orders=None) -> np.ndarray:
    """L_k, k = 1 .. n, as (n_orders, n), from the losses (n,) in each order (default: as given)."""
    losses = np.asarray(losses, dtype=np.float64)
    ordered = losses[np.arange(len(losses))[None] if orders is None else orders]
    return np.cumsum(ordered, axis=1) / np.arange(1, ordered.shape[1] + 1)


def loss_steps(losses, orders=None, batch: int = 1) -> np.ndarray:
    """L_{k+b} - L_k, k = 1 .. n-b, as (n_orders, n-b), from the losses (n,) in each order (default: as given).

    Computed as b/(k+b) times (the mean of the next b losses - L_k): the difference of two running means cancels.
    Source: (prop:identity), (eq:rate-batch).
    """
    losses = np.asarray(losses, dtype=np.float64)
    ordered = losses[np.arange(len(losses))[None] if orders is None else orders]
    coming = ordered[:, 1:]  # one by one; a single loss has no step
    if batch > 1:
        coming = np.lib.stride_tricks.sliding_window_view(coming, batch, axis=1).mean(-1)
    k = np.arange(1, ordered.shape[1] - batch + 1)
    return (coming - running_means(losses, orders)[:, : len(k)]) * (batch / (k + batch))


@dataclass(frozen=True)
class ExpectedSteps:
    """The bracket [mean_low, mean_high] of E|L_{k+1} - L_k| over random orders, for k = 1 .. n-1 (arrays).

    One loss that differs from the rest attains the lower end at every k; the two ends meet at k = n-1.
    """

    k: np.ndarray
    mean_low: np.ndarray
    mean_high: np.ndarray


def _pool(losses) -> np.ndarray:  # (n,) or (m, n) -> (m, n)
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    if losses.shape[1] < 3:
        raise ValueError(f"There are {losses.shape[1]} losses: at least 3 are needed for a rate.")
    return losses


def expected_rms(losses, batch: int = 1) -> np.ndarray:
    """Root mean square over random orders of L_{k+b} - L_k, k = 1 .. n-b: S sqrt(b/(k(k+b))), exact.

    Source: (eq:rate-batch); for losses (m, n) at m weights S^2 is their mean (thm:neighbourhood).
    """
    losses = _pool(losses)
    k = np.arange(1, losses.shape[1] - batch + 1)
    return np.sqrt(losses.var(1, ddof=1).mean() * batch / (k * (k + float(batch))))


def expected_steps(losses) -> ExpectedSteps:
    """The bracket of E|L_{k+1}-L_k|, for a uniform order of a pool of n losses.

    Source: Proposition (prop:rate). Any pool, random numbers included.
    """
    losses = _pool(losses)
    n = losses.shape[1]
    k, S = np.arange(1, n), losses.std(1, ddof=1).mean()
    mad = n / (n - 1) * np.abs(losses - losses.mean(1, keepdims=True)).mean()
    high = (mad + S * np.sqrt(1 / k - 1 / (n - 1))) / (k + 1.0)
    return ExpectedSteps(k, mad / (k + 1.0), high)


def expected_distance(losses, target=None) -> np.ndarray:
    """Root mean square over random orders of L_k - target, k = 1 .. n; the target is L_n unless another is given.

    sqrt(S^2 (1/k - 1/n) + (L_n - target)^2), exact for a target that does not depend on the order: no
    k removes the second term. A target is a number, or (m,) for m weights. Source: (prop:two-questions).
    """
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    n = losses.shape[1]
    gap = 0.0 if target is None else ((losses.mean(1) - target) ** 2).mean()
    return np.sqrt(losses.var(1, ddof=1).mean() * (1 / np.arange(1, n + 1) - 1 / n) + gap)


def smoothed(values, factor: float) -> np.ndarray:
    """s_1 = x_1, s_k = factor s_{k-1} + (1 - factor) x_k: the exponential smoothing of published curves.

    Of a falling curve it keeps factor^{k-1} x_1, long after x_k is smaller than that. Source: (rem:smoothing).
    """
    values = np.asarray(values, dtype=np.float64)
    return lfilter([1 - factor], [1, -factor], values, zi=[factor * values[0]])[0]


def log_grid(low: int, high: int, points: int) -> np.ndarray:
    """About `points` distinct integers from low (or from high, if that is smaller) to high, equally spaced in log k."""
    if high < 1:
        raise ValueError(f"The sizes k end at {high}: give more samples, or a batch smaller than their number.")
    return np.unique(np.round(np.geomspace(min(low, high), high, points)).astype(int))


def _weights(rows: np.ndarray, seed: list[int], draws: int) -> np.ndarray:  # (draws, r): how often a row is drawn / r
    return np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws) / len(rows)


def bootstrap_mean(rows: np.ndarray, seed: int = 0, draws: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over rows (r, m) with a 95 % percentile-bootstrap interval over rows: three arrays (m,).

    nan for both ends where there are fewer than FEWEST rows.
    """
    mean = rows.mean(0)
    if len(rows) < FEWEST:
        return mean, np.full_like(mean, math.nan), np.full_like(mean, math.nan)
    low, high = np.quantile(_weights(rows, [seed, 7], draws) @ rows, [0.025, 0.975], axis=0)
    return mean, low, high


def log_log_slope(k: np.ndarray, rows: np.ndarray, seed: int = 0, level: float = 0.95, root: bool = False):
    """Least-squares slope of log(mean over rows) against log k, with a bootstrap interval over rows.

    rows (r, m) are not negative, one row an order; with `root` the square root of the mean is fitted (a root mean
    square from squares). Returns (slope, low, high): nan for the ends where there are fewer than FEWEST rows, for all
    three where there is no slope (one k, or a mean of zero).
    """
    if len(k) < 2 or (rows.mean(0) <= 0).any():
        return math.nan, math.nan, math.nan
    means = rows.mean(0)[None]
    if len(rows) >= FEWEST:  # ten draws beyond each end
        means = np.vstack([means, _weights(rows, [seed, 11], round(20 / (1 - level))) @ rows])
    x = np.log(k) - np.log(k).mean()
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of zeros only: no interval
        slopes = (np.log(means) @ x) / (x @ x) * (0.5 if root else 1.0)
        ends = np.quantile(slopes[1:], [(1 - level) / 2, (1 + level) / 2]) if len(slopes) > 1 else (math.nan, math.nan)
    return slopes[0], *ends


def hessian_squares(norms, orders: np.ndarray, k) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """|H_k - H_n|^2 and |H_{k+1} - H_k|^2 as they would be if the h_i were orthogonal with the given norms (n,).

    By name ("H_k - H_n", "H_k+1 - H_k") the squares (orders, len(k)) and their mean over all orders (len(k),), which
    (prop:rate) gives exactly. The sample that arrives after k is the last of its order, the same at every k.
    """
    q, k = np.asarray(norms, dtype=np.float64) ** 2, np.asarray(k)
    n, ordered = len(q), (np.asarray(norms, dtype=np.float64) ** 2)[orders]
    first = np.cumsum(ordered, axis=1)[:, k - 1]
    limit = first * (1 / k - 2 / n) / k + q.sum() / n**2
    step = (ordered[:, -1:] + first / k**2) / (k + 1.0) ** 2
    return {
        "H_k - H_n": (limit, q.mean() * (1 / k - 1 / n)),
        "H_k+1 - H_k": (step, q.mean() / (k * (k + 1.0))),
    }


def rms_by_ratio(k, squares: np.ndarray, auxiliary: np.ndarray, known: np.ndarray, level: float = 0.95):
    """Root mean square at each k and its log-log slope against k, from squares (r, m) of few orders with heavy tails.

    The ratio estimator of survey sampling: mean(squares)/mean(auxiliary) times `known` (m,), the mean of the auxiliary
    (r, m) over all orders. Where the two rise and fall together the tails cancel; whatever the auxiliary, the estimate
    is consistent. Intervals by the jackknife over rows with Student's t. Returns (rms, low, high), each (m,), and
    (slope, low, high), with nan for the ends where there are fewer than FEWEST_RATIOS rows.
    """
    r, x = len(squares), np.log(k) - np.log(k).mean()

    def logs(a, b):
        return 0.5 * np.log(a / b * known)

    whole, ends = logs(squares.mean(0), auxiliary.mean(0)), np.full((2, len(x) + 1), math.nan)
    found = np.append(whole, whole @ x / (x @ x))
    if r >= FEWEST_RATIOS:
        less = logs(squares.sum(0) - squares, auxiliary.sum(0) - auxiliary)
        each = np.column_stack([less, less @ x / (x @ x)])
        half = student.ppf((1 + level) / 2, r - 1) * np.sqrt((r - 1) / r * np.square(each - each.mean(0)).sum(0))
        ends = np.array([found - half, found + half])
    return tuple(np.exp([found[:-1], *ends[:, :-1]])), (found[-1], *ends[:, -1])


COLUMNS = ["k", "quantity", "value", "low", "high", "theory_low", "theory_high"]


def measure_steps(
    losses, orders: np.ndarray, k: np.ndarray, seed: int = 0, batch: int = 1, level: float = 0.95
) -> pd.DataFrame:
    """|L_{k+b} - L_k| over the orders at each k: its mean, its rms, and (k = 0) the log-log slope of the rms.

    Every value with its 95 % bootstrap interval over orders (of the slope at `level`) and, in theory_low and
    theory_high, what (prop:rate) says: the bracket of the mean, the exact rms, the slope of the exact rms on these k.
    A batch b > 1 has no bracket and so no mean.
    """
    losses = _pool(losses)
    steps = [loss_steps(row, orders, batch)[:, k - 1] for row in losses]
    squares = np.mean([s**2 for s in steps], axis=0)
    exact = expected_rms(losses, batch)[k - 1]
    rows = []
    if batch == 1:
        bracket, mean = expected_steps(losses), bootstrap_mean(np.mean(np.abs(steps), axis=0), seed)
        ends = bracket.mean_low[k - 1], bracket.mean_high[k - 1]
        rows += [(at, "mean", *values) for at, *values in zip(k, *mean, *ends)]
    square = bootstrap_mean(squares, seed)
    rows += [(at, "rms", *values) for at, *values in zip(k, *map(np.sqrt, square), exact, exact)]
    theory = log_log_slope(k, exact[None] ** 2, seed, root=True)[0]
    rows.append((0, "slope", *log_log_slope(k, squares, seed, level, root=True), theory, theory))
    return pd.DataFrame(rows, columns=COLUMNS)


def measure_distance(losses, orders: np.ndarray, k: np.ndarray, target=None, seed: int = 0) -> pd.DataFrame:
    """Rms over the orders of L_k - target at each k < n, beside `expected_distance`; without a target (L_n) also
    the slope (k = 0) against 1/k - 1/n, 1/2 in theory. Columns and intervals as in `measure_steps`."""
    losses = _pool(losses)
    aims = np.broadcast_to(losses.mean(1) if target is None else target, len(losses))
    squares = np.mean(
        [(running_means(row, orders)[:, k - 1] - aim) ** 2 for row, aim in zip(losses, aims, strict=True)], axis=0
    )
    exact = expected_distance(losses, target)[k - 1]
    rows = [(at, "rms", *values) for at, *values in zip(k, *map(np.sqrt, bootstrap_mean(squares, seed)), exact, exact)]
    if target is None:
        rows.append((0, "slope", *log_log_slope(1 / k - 1 / losses.shape[1], squares, seed, root=True), 0.5, 0.5))
    return pd.DataFrame(rows, columns=COLUMNS)


def measure_halves(losses, orders: np.ndarray, k: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Rms of the difference of two means of k losses that share k/2 of them (k even, 3k/2 <= n), in place of
    L_{k+1} - L_k: S/sqrt(k), exact. The step's rate is that of one sample, this one's that of a subsample.
    Source: (rem:subsamples). Columns and intervals as in `measure_steps`.
    """
    losses, half = _pool(losses), np.asarray(k) // 2
    squares = 0.0
    for row in losses:
        total = np.pad(np.cumsum(row[orders], axis=1), ((0, 0), (1, 0)))
        own, other = total[:, half], total[:, 3 * half] - total[:, 2 * half]
        squares = squares + ((own - other) / (2 * half)) ** 2 / len(losses)
    exact = np.sqrt(losses.var(1, ddof=1).mean() / (2 * half))
    square = bootstrap_mean(squares, seed)
    rows = [(at, "rms", *values) for at, *values in zip(2 * half, *map(np.sqrt, square), exact, exact)]
    rows.append((0, "slope", *log_log_slope(2 * half, squares, seed, root=True), -0.5, -0.5))
    return pd.DataFrame(rows, columns=COLUMNS)


def verdict(low: float, high: float, theory_low: float, theory_high: float | None = None) -> str:
    """Whether the measured interval meets the value, or the interval, of theory: "agrees" or "differs".

    "cannot tell" where one of them is not there.
    """
    theory_high = theory_low if theory_high is None else theory_high
    if np.isnan([low, high, theory_low, theory_high]).any():
        return "cannot tell"
    return "agrees" if low <= theory_high and theory_low <= high else "differs"


def over_seeds(values: pd.Series, seeds: pd.Series, level: float = 0.95) -> tuple[float, float, float]:
    """Mean over seeds with its t interval, none for fewer than 3; runs that share a seed share their random orders
    and count as one."""
    means = values.groupby(seeds.to_numpy()).mean()
    if len(means) < 3:
        return means.mean(), math.nan, math.nan
    width = student.ppf((1 + level) / 2, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
    return means.mean(), means.mean() - width, means.mean() + width


def ratios_to_first(logs: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Ratio of each row to the first, from logarithms (rows: architectures, columns: seeds), with its t interval.

    Least squares with an effect of each row and of each seed and one residual variance for all: few seeds of one
    architecture say little about its variance alone. A row may lack seeds (nan); a seed that one row alone has tells
    nothing. Of one seed there is no interval, and no ratio of rows that no seed connects. Columns: ratio, low, high,
    seeds (of that row).
    """
    rows, columns = logs.shape
    row, column = np.nonzero(logs.notna().to_numpy())  # one entry a run
    runs, y = np.arange(len(row)), logs.to_numpy()[row, column]
    design, contrast = np.zeros((len(runs), rows + columns)), np.eye(rows - 1, rows + columns, 1)
    design[runs, row] = design[runs, rows + column] = 1
    contrast[:, 0] = -1
    gram = design.T @ design
    inverse, freedom, half = np.linalg.pinv(gram), len(runs) - np.linalg.matrix_rank(design), math.nan
    fitted = inverse @ (design.T @ y)
    if freedom > 0:
        variance = np.square(y - design @ fitted).sum() / freedom
        errors = np.sqrt(variance * np.einsum("ij,jk,ik->i", contrast, inverse, contrast))
        half = student.ppf((1 + level) / 2, freedom) * errors
    known = np.abs(contrast @ inverse @ gram - contrast).max(1, initial=0) < 1e-9
    difference = np.where(known, contrast @ fitted, math.nan)
    ends = {"ratio": difference, "low": difference - half, "high": difference + half}
    return np.exp(pd.DataFrame(ends, logs.index[1:])).assign(seeds=logs.notna().sum(axis=1)[1:])


def beside_published(ours: pd.DataFrame, published: pd.DataFrame, inflation: float = 1.0) -> pd.DataFrame:
    """One row a published value of one run: ours (geometric mean over seeds), its interval for one more run, verdict.

    `ours` has a row a run (data, depth, width, ours), `published` a row a value (data, depth, width, value), which is
    divided by `inflation`. The 95 % prediction interval takes log(ours) as normal with one variance for all
    architectures of a data set: exp(mean +- t s sqrt(1 + 1/seeds)). Assumes at least two seeds of some architecture,
    else there is no interval and the verdict is "cannot tell".
    """
    keys, rows = ["data", "depth", "width"], []
    logs = ours.assign(log=np.log(ours["ours"])).groupby(keys)["log"].agg(["mean", "count", "var"])
    for row in published.itertuples():
        if (row.data, row.depth, row.width) not in logs.index:
            continue
        mean, seeds, _ = logs.loc[(row.data, row.depth, row.width)]
        alike = logs.loc[row.data]
        freedom = (alike["count"] - 1).sum()
        half = math.nan
        if freedom > 0:
            spread = math.sqrt((alike["var"].fillna(0) * (alike["count"] - 1)).sum() / freedom)
            half = student.ppf(0.975, freedom) * spread * math.sqrt(1 + 1 / seeds)
        low, value, high = np.exp([mean - half, mean, mean + half]).tolist()
        theirs = row.value / inflation
        entry = {"data": row.data, "depth": row.depth, "width": row.width, "seeds": int(seeds), "ours": value}
        rows.append(entry | {"low": low, "high": high, "published": theirs, "verdict": verdict(low, high, theirs)})
    return pd.DataFrame(rows)


def pooled_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """The verdicts of many runs (the rows of verdicts.csv with a column `seed`) as one row a claim; `runs` counts.

    Its column `pooled` says how. "seeds": `over_seeds` (of fewer than 3 seeds the mean interval) and the verdict taken
    anew; "proves nothing" unless the control failed in every run. "counts": `shares_over_seeds`. "largest": the largest
    value. "range": the median, from the least low to the greatest high. A bound violated in one run is violated, a
    share whose interval lies above its bound too; a bound kept in all runs holds if its control failed in one. Other
    verdicts are listed.
    """
    rows = []
    for text, t in table.groupby("claim", sort=False):
        how, given = t["pooled"].iloc[0], list(dict.fromkeys(t["verdict"]))
        theory, trials = (t["theory_low"].mean(), t["theory_high"].mean()), int(t["trials"].sum())
        value, low, high = over_seeds(t["value"], t["seed"])
        if how == "counts":
            value, low, high = shares_over_seeds(t)
        elif how in ("largest", "range"):
            value, low, high = (
                t["value"].max() if how == "largest" else t["value"].median(),
                t["low"].min(),
                t["high"].max(),
            )
        elif math.isnan(low):
            low, high = t["low"].mean(), t["high"].mean()
        word = ", ".join(w for w in given if w != "proves nothing" or "holds" not in given)
        if "violated" in given or (how == "counts" and low > theory[1]):
            word = "violated"
        elif how == "seeds" and set(given) <= {"agrees", "differs", "proves nothing", "cannot tell"}:
            word = verdict(low, high, *theory)
            word = "proves nothing" if word == "agrees" and not t["control_failed"].all() else word
        entry = {"claim": text, "whose": t["whose"].iloc[0], "value": value, "low": low, "high": high}
        entry |= {"theory_low": theory[0], "theory_high": theory[1], "verdict": word, "trials": trials, "runs": len(t)}
        first = t["control"].iloc[0]
        rows.append(entry | {"control": f"{t['run'].iloc[0]}: {first}" if first and len(t) > 1 else first})
    return pd.DataFrame(rows)


def shares_over_seeds(t: pd.DataFrame) -> tuple[float, float, float]:
    """Share of hits over runs (columns value, trials, seed) with the 95 % binomial interval of Clopper and Pearson.

    Runs of one seed share their orders, so together they count as one: hits and trials are means over them (fractions,
    which beta quantiles take).
    """
    counts = t.assign(hits=t["value"] * t["trials"]).groupby("seed")[["hits", "trials"]].mean().sum()
    hits, misses = counts["hits"], counts["trials"] - counts["hits"]
    low = beta.ppf(0.025, hits, misses + 1) if hits > 0 else 0.0
    high = beta.ppf(0.975, hits + 1, misses) if misses > 0 else 1.0
    return hits / counts["trials"], low, high


def first_crossing(x, y, level: float) -> float:
    """The x at which y (both (m,), x increasing) first exceeds `level`, interpolated in log x and log y; x[0] if it
    does so at once, inf if never."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    above = np.flatnonzero(y > level)
    if len(above) == 0 or above[0] == 0:
        return math.inf if len(above) == 0 else float(x[0])
    ends = slice(above[0] - 1, above[0] + 1)
    return float(np.exp(np.interp(np.log(level), np.log(np.maximum(y[ends], 1e-300)), np.log(x[ends]))))


# --- neighbourhoods: Gaussian, in all coordinates or in an eigenspace -------------------------------------


@dataclass(frozen=True)
class Eigenspace:
    """The D eigenvalues (D,) of largest magnitude, descending, with unit vectors (D, P) and |H v - theta v| (D,)."""

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray


def top_eigenspace(losses: Losses, D: int, rows: Tensor | None = None, seed: int = 0) -> Eigenspace:
    """Of the Hessian of the mean loss over `rows`, by implicitly restarted Lanczos (ARPACK). D < P."""
    product = losses.hessian(rows=rows)

    def apply(v: np.ndarray) -> np.ndarray:
        return product(torch.as_tensor(v.ravel().copy()).to(losses.w)).double().cpu().numpy()

    start = np.random.default_rng([seed, 17]).normal(size=losses.P)
    operator = LinearOperator((losses.P, losses.P), matvec=apply, dtype=np.float64)
    theta, v = eigsh(operator, k=D, which="LM", v0=start, tol=1e-6)
    order = np.argsort(-np.abs(theta))
    theta, v = theta[order], v[:, order]
    residuals = [np.linalg.norm(apply(u) - t * u) for t, u in zip(theta, v.T, strict=True)]
    return Eigenspace(theta, torch.as_tensor(np.ascontiguousarray(v.T)).to(losses.w), np.array(residuals))


def gaussian_probes(w: Tensor, sigma: float, n_probes: int, seed: int = 0, basis: Tensor | None = None) -> Tensor:
    """Weights (n_probes, P) from N(w, sigma^2 I), or from N(w, sigma^2 U^T U) for a basis U (D, P)."""
    generator = torch.Generator().manual_seed(0x6A55 + seed)
    size = len(w) if basis is None else len(basis)
    z = sigma * torch.randn(n_probes, size, generator=generator, dtype=torch.float64).to(w)
    return w + (z if basis is None else z @ basis)


@dataclass(frozen=True)
class Spreads:
    """How samples differ at w0 up to second order (divisor n - 1), in all P coordinates or along a basis.

    value     S^2 of the losses; gradient tr Sigma_g; hessian tr Sigma_H
    trace     variance of the traces tr h_i; cross their covariance with the losses
    error     standard error over the probes of hessian, 0 along a basis (exact)
    """

    value: float
    gradient: float
    hessian: float
    trace: float
    cross: float
    error: float

    def gaussian(self, sigma: float, gradient: bool = True) -> float:
        """S_mu^2 for mu = N(w0, sigma^2 I), exact for losses that are quadratic in w: (prop:gaussian).

        Var(l + sigma^2/2 tr h) + sigma^2 tr Sigma_g + sigma^4/2 tr Sigma_H; the published form has no gradient term.
        """
        flat = self.value + sigma**2 * self.cross + sigma**4 / 4 * self.trace + sigma**4 / 2 * self.hessian
        return flat + (sigma**2 * self.gradient if gradient else 0.0)

    def ball(self, R: float) -> float:
        """B = S + R sqrt(tr Sigma_g) + (R^2/2) sqrt(tr Sigma_H) of (eq:ball-spread)."""
        return math.sqrt(self.value) + R * math.sqrt(self.gradient) + R * R / 2 * math.sqrt(self.hessian)


def spreads(losses: Losses, probes: int = 16, basis: Tensor | None = None, seed: int = 0) -> Spreads:
    """`Spreads` of the samples of `losses`: by random signs v (Hutchinson), or exact along an orthonormal basis (D, P).

    tr Sigma_H is the mean over v of the spread of h_i v; products of the variance of traces come from different v, so
    that every estimate but its square roots is unbiased. Cost: one product a sample and probe, or a sample and D.
    Raises ValueError for fewer than 2 probes.
    """
    if basis is None and probes < 2:
        raise ValueError(f"There are {probes} probes: give at least 2, one alone has no error.")
    n, w = losses.n, losses.w
    generator = torch.Generator().manual_seed(0x5163 + seed)
    signs = torch.randint(0, 2, (probes, losses.P), generator=generator) * 2 - 1
    V = signs.to(w) if basis is None else basis
    forms, squares = w.new_zeros(len(V), n), w.new_zeros(len(V))  # v^T h_i v; sums of |h_i v|^2, of (U h_i v)^2
    sums = w.new_zeros(len(V), losses.P)
    gradient_square, gradient_sum = 0.0, torch.zeros_like(w if basis is None else w[: len(V)])
    for rows in torch.arange(n, device=w.device).split(losses.chunk(5)):
        products = SampleHessians(losses, rows)
        g = products.gradients() if basis is None else products.gradients() @ basis.T
        gradient_square, gradient_sum = gradient_square + g.square().sum(), gradient_sum + g.sum(0)
        for j, v in enumerate(V):
            hv = products(v.expand(len(rows), -1))
            forms[j, rows] = hv @ v
            sums[j] += hv.sum(0)
            squares[j] += (hv if basis is None else hv @ basis.T).square().sum()
    if basis is not None:
        sums = sums @ basis.T
    each = ((squares - sums.square().sum(1) / n) / (n - 1)).double().cpu()  # one a probe, or a column of U h U^T
    values, forms = losses.values().double(), forms.double()
    centred, parts = values - values.mean(), forms - forms.mean(1, keepdim=True)
    if basis is None:
        of_pairs = parts.sum(0).square().sum() - parts.square().sum()  # v and v' different: no variance of their own
        trace, whole = of_pairs / (len(V) * (len(V) - 1)), parts.mean(0)
    else:
        whole = parts.sum(0)
        trace = whole.square().sum()
    spread = (gradient_square - gradient_sum.square().sum() / n) / (n - 1)
    return Spreads(
        value=(centred.square().sum() / (n - 1)).item(),
        gradient=spread.item(),
        hessian=(each.mean() if basis is None else each.sum()).item(),
        trace=trace.item() / (n - 1),
        cross=(centred @ whole).item() / (n - 1),
        error=each.std().item() / math.sqrt(len(V)) if basis is None else 0.0,
    )


def plane_losses(losses: Losses, axes: Tensor, extent: float, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (points,) from -extent to extent, and the losses (points, points, n) at w0 + s axes[0] + t axes[1].

    The first index is t, the second s, as a picture has rows and columns. Axes (2, P) of unit length.
    """
    at = np.linspace(-extent, extent, points)
    grid = [[losses.values(losses.w + s * axes[0] + t * axes[1]).double().cpu().numpy() for s in at] for t in at]
    return at, np.array(grid)


# --- the worst case over a ball ---------------------------------------------------------------------------


def worst_in_ball(value_and_gradient: Callable, centre: Tensor, radius: float, starts, steps: int):
    """Largest |f| that projected gradient ascent finds in the ball, and where: a lower estimate of the supremum.

    From every start f is followed up where it is positive and down where it is negative, in steps along the gradient,
    back onto the ball, whose length falls from 2 radius to a hundredth of that: the first step solves a linear f.
    """
    best, where = -1.0, centre
    for w in starts:
        sign = None
        for t in range(steps + 1):
            value, gradient = value_and_gradient(w)
            if abs(value) > best:
                best, where = abs(value), w
            sign = math.copysign(1.0, value) if sign is None else sign
            length = gradient.norm()
            if t == steps or length == 0:
                break
            w = _projected(w + sign * 2 * radius * 0.01 ** (t / steps) * gradient / length, centre, radius)
    return best, where


def _projected(w: Tensor, centre: Tensor, radius: float) -> Tensor:
    distance = (w - centre).norm().item()
    return w if distance <= radius else centre + (w - centre) * (radius / distance)


@dataclass(frozen=True)
class OnBall:
    """f = (mean loss of some samples) - (mean loss of others) over |w - w0| <= radius, beside its Taylor terms at w0.

    found      largest |f| by kind of probe: "random", "gradient" (both directions), "eigenspace", "worst" (ascent)
    value      |f(w0)|
    gradient   r |grad f(w0)|
    curvature  (r^2/2) ||Hess f(w0)||, by Lanczos (a lower estimate, residual below 1e-3 of it)
    remainder  largest |f(w) - its quadratic Taylor polynomial| over the probes
    """

    radius: float
    found: dict[str, float]
    value: float
    gradient: float
    curvature: float
    remainder: float

    @property
    def measured(self) -> float:
        """The largest |f| found: a lower estimate of the supremum."""
        return max(self.found.values())

    @property
    def second_form(self) -> float:
        """Value, gradient and curvature: (eq:one-step-ball-b) times k + 1, without its third-order remainder."""
        return self.value + self.gradient + self.curvature

    def first_form(self, curvature: float, gradient: bool = True) -> float:
        """(eq:one-step-ball-a) times k + 1; `curvature` is the sum of the two Hessian norms in it.

        A bound if they are suprema over the ball; the published inequality is the one without the gradient term.
        """
        return self.value + (self.gradient if gradient else 0.0) + self.radius**2 / 2 * curvature


def _contrast(plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and weights whose weighted sum of losses is (mean loss over `plus` - mean loss over `minus`)."""
    sizes = torch.tensor([len(plus), -len(minus)])
    return torch.cat([plus, minus]), (1 / sizes.double()).repeat_interleave(sizes.abs())


def _difference(losses: Losses, plus: Tensor, minus: Tensor) -> Callable:
    """w -> (mean loss over `plus` - mean loss over `minus`, its gradient), in one pass."""
    rows, weights = _contrast(plus, minus)

    def value_and_gradient(w):
        value, gradient = losses.value_and_gradient(w, rows, weights)
        return value.item(), gradient

    return value_and_gradient


def difference_on_ball(
    losses: Losses, plus, minus, radii, *, basis: Tensor | None = None, n_random=2, steps=8, restarts=2, seed=0
) -> list[OnBall]:
    """f = mean over the samples `plus` - mean over `minus`, on balls of the given Euclidean radii around the weights.

    One step: plus = the new sample, minus = the first k, and L_{k+1} - L_k = f/(k+1). Distance to the limit: plus =
    the first k, minus = the rest, and L_k - L_n = (1 - k/n) f. Probes at each radius: both directions of grad f,
    `n_random` at random, `n_random` in the span of `basis` (D, P), then ascent from the `restarts` best of them, in
    `steps` steps (one number, or one a radius). Other samples, other random directions.
    Source: Theorems (thm:one-step-ball), (thm:surface-ball).
    """
    plus, minus = torch.as_tensor(plus), torch.as_tensor(minus)
    rows, weights = _contrast(plus, minus)
    bend, value_and_gradient = losses.hessian(rows=rows, weights=weights), _difference(losses, plus, minus)

    def f(w):
        return (losses.values(w, rows) @ weights.to(losses.w)).item()

    w0, gradient = losses.w, losses.gradient(rows=plus) - losses.gradient(rows=minus)
    stream = np.random.SeedSequence([seed, len(plus), *plus.tolist(), *minus.tolist()]).generate_state(1)
    generator = torch.Generator().manual_seed(int(stream[0]))
    noise = torch.randn(n_random + 1, losses.P, generator=generator, dtype=torch.float64).to(w0)
    curvature = operator_norm(bend, noise[0], tolerance=1e-3, max_steps=60).value
    along = gradient / gradient.norm().clamp_min(torch.finfo(w0.dtype).tiny)  # equal samples: no direction, not nan
    directions = [("gradient", along), ("gradient", -along), *(("random", u / u.norm()) for u in noise[1:])]
    if basis is not None:
        mixed = torch.randn(n_random, len(basis), generator=generator, dtype=torch.float64).to(w0) @ basis
        directions += [("eigenspace", u / u.norm()) for u in mixed]
    taylor = [(u, (gradient @ u).item(), (u @ bend(u)).item()) for _, u in directions]
    curvature = max(curvature, *(abs(b) for *_, b in taylor))  # both are lower estimates of the norm
    f0, out = f(w0), []
    for r, n_ascent in zip(map(float, radii), np.broadcast_to(steps, len(radii)).tolist(), strict=True):
        values = [f(w0 + r * u) for u, *_ in taylor]
        rest = [abs(v - (f0 + r * s + r * r / 2 * b)) for v, (_, s, b) in zip(values, taylor, strict=True)]
        best = np.argsort([-abs(v) for v in values], kind="stable")[:restarts]
        w = worst_in_ball(value_and_gradient, w0, r, [w0 + r * taylor[i][0] for i in best], n_ascent)[1]
        d, worst = w - w0, f(w)
        s, b = (gradient @ d).item(), (d @ bend(d)).item()
        curvature = max(curvature, abs(b) / r**2)
        rest.append(abs(worst - (f0 + s + b / 2)))
        found: dict[str, float] = {}
        for (kind, _), v in zip(directions, values, strict=True):
            found[kind] = max(found.get(kind, 0.0), abs(v))
        found["worst"] = max(abs(worst), *found.values(), abs(f0))  # the centre belongs to the ball
        out.append(OnBall(r, found, abs(f0), r * gradient.norm().item(), r * r / 2 * curvature, max(rest)))
    return out


def distances_on_ball(losses: Losses, orders: np.ndarray, sizes, radius: float, steps: int = 3) -> np.ndarray:
    """Largest |L_k - L_n| found in the ball, k = 1 .. n, in each order: (n_orders, n), lower estimates of the suprema.

    Each order is asked at weights of its own, the same ones at every k: the centre, and where ascent from the centre
    ends for each k of `sizes`. Source: (eq:ball-tail).
    """
    out = []
    for order in torch.as_tensor(orders):
        found = [losses.w]
        for k in sizes:
            f = _difference(losses, order[:k], order[k:])
            found.append(worst_in_ball(f, losses.w, radius, [losses.w], steps)[1])
        values = np.stack([losses.values(w).double().cpu().numpy() for w in found])
        means = np.concatenate([running_means(v, order[None].numpy()) for v in values])
        out.append(np.abs(means - means[:, -1:]).max(0))
    return np.array(out)


# --- retraining -------------------------------------------------------------------------------------------


def retrain(
    fresh: Callable[[], nn.Module], x, y, sizes, limit: nn.Module, x_test, y_test, loss="cross_entropy", **options
) -> pd.DataFrame:
    """Train anew on the first k of the n samples, for each k of `sizes`, by the same rule; one row a k.

    Each is polished to the gradient norm that the stopping rule asks of the limit, 0.1 sqrt(tr Sigma_g / n), and not
    to that of its own k.

    `fresh` returns the initial network, the same one at every call; `limit` is the one trained on all n; `options` go
    to `training.train`. Columns: k, excess = L_n(w_k) - L_n(w_n), held_out = mean loss of (x_test, y_test) at w_k,
    distance = |w_k - w_n|, norm = ||Hess L_k(w_k)||, gradient_norm (of the objective), threshold (for
    it), converged (is it below).
    """
    whole, test = Losses(limit, x, y, loss), Losses(limit, x_test, y_test, loss)
    threshold, rows = training.stopping_rule(whole, whole.w), []
    for k in sizes:
        network = fresh()
        result = training.train(network, x[:k], y[:k], loss=loss, threshold=threshold, **options)
        w = Losses(network, x[:k], y[:k], loss).w
        rows.append(
            {
                "k": k,
                "excess": (whole.values(w).mean() - whole.values().mean()).item(),
                "held_out": test.values(w).mean().item(),
                "distance": (w - whole.w).norm().item(),
                "norm": hessian_norm(network, x[:k], y[:k], loss, tolerance=1e-3).value,
                "gradient_norm": result.gradient_norm,
                "threshold": threshold,
                "converged": result.converged,
            }
        )
    return pd.DataFrame(rows)


def projected_descent(losses: Losses, rows, centre: Tensor, radius: float, steps: int, start: Tensor | None = None):
    """Weights (P,) that projected gradient descent reaches on the mean loss over `rows` in the ball around `centre`.

    Steps are halved until the loss falls by what the projected step promises, and doubled afterwards; the loss never
    rises. The result need not minimise: the gap of (prop:excess-risk) is to be stated beside it.
    """
    w, rows, length = centre if start is None else start, torch.as_tensor(rows), 1.0
    value, gradient = losses.value_and_gradient(w, rows)
    for _ in range(steps):
        for _ in range(60):
            new = _projected(w - length * gradient, centre, radius)
            move = new - w
            found = losses.value_and_gradient(new, rows)
            if found[0] <= value + gradient @ move + move.square().sum() / (2 * length):
                break
            length /= 2
        if found[0] >= value:
            break
        w, (value, gradient), length = new, found, 2 * length
    return w
