"""How many samples are enough: sizes by theorem, limits from a pilot, a forecast with a verdict, and the rivals.

Four questions, four sizes; a number for one is no answer to another (prop:two-questions):

    surface  |L_k' - L| <= tau for every later k', in mean square over a neighbourhood of radius R (at R = 0: at the
             weights). Forward passes alone. Theorem (thm:neighbourhood).
    ball     the same for the supremum over the ball of radius R, to second order or with a bound of ||H_i|| on the
             ball. Theorem (thm:surface-ball). "excess": a minimiser over the ball is then within 2 tau of the best.
    next     one more sample of the same kind changes the pilot's mean by at most tau. Proposition (prop:exchangeable).
    step     no single sample whatsoever can: the papers' quantity. Theorem (thm:k-step).

All but the last hold with probability 1 - delta over the samples; `required_samples` answers each from a pilot.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import OptimizeWarning, brentq, curve_fit
from scipy.stats import beta, binom, spearmanr
from torch import Tensor

from utils import bounds
from utils.curvature import Losses, SampleHessians

CAUTION = 2.0  # what a pilot's own kurtosis is multiplied by before it is held against the assumed one
DRIFT = 1e-3  # p-value of the rank correlation between loss and place below which a pilot is not taken as random
CRITERIA = ("surface", "ball", "excess", "next", "step")


@dataclass(frozen=True)
class SampleSize:
    """The answer to one question (criterion, tolerance, radius, confidence).

    k          a central value without guarantee: surface, the Gaussian limit at the pilot's own spread; ball and
               excess, the theorem's size at the pilot's own spreads; next and step, the pilot's own size
    lower      fewer are too few: surface, Gaussian limit at the lower limit of the spread (asymptotic); step, the
               exact worst order of the pilot; 1 where nothing is claimed
    upper      that many are enough at the stated confidence under the stated assumption; inf if the pilot cannot tell
    verdict    "enough", "need" or "cannot tell"; `sentence` says it in words
    statement  what population the numbers speak of, and what they leave out
    terms      the measured quantities by name
    """

    criterion: str
    tolerance: float
    radius: float
    confidence: float
    k: float
    lower: float
    upper: float
    verdict: str
    sentence: str
    statement: str
    terms: dict[str, float] = field(default_factory=dict)


# --- limits from a pilot (Proposition (prop:pilot)) ---------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A pilot's estimate of the mean of Y >= 0 with its limits, each of which holds with its stated probability."""

    estimate: float
    lower: float
    upper: float
    pairs: int
    kurtosis: float
    observed_kurtosis: float


def pair_moments(X) -> tuple[float, float]:
    """Means of Y and Y^2, Y = |x - x'|^2/2, over all pairs of the rows of X (n, d): the mean of Y is the trace of the
    sample covariance. ValueError for fewer than 4 rows."""
    X = np.asarray(X, dtype=np.float64)
    n = len(X)
    if n < 4:
        raise ValueError(f"The pilot has {n} samples: give at least 4.")
    X = X - X.mean(0)
    squares, gram = (X**2).sum(1), X.T @ X if X.shape[1] < n else X @ X.T
    square = (n * (squares**2).sum() + squares.sum() ** 2 + 2 * (gram**2).sum()) / (2 * n * (n - 1))
    return float(squares.sum() / (n - 1)), float(square)


def inflation(pairs: int, kurtosis: float, failure: float) -> float:
    """1/x with Pr(mean of Y <= x E Y) <= failure for every Y >= 0 with E Y^2 <= kurtosis (E Y)^2; inf if there is none.

    The worst Y is kurtosis E Y times a coin of probability 1/kurtosis, so Chernoff's bound is the binomial one,
    exp(-pairs kl(x/kurtosis, 1/kurtosis)). Source: Proposition (prop:pilot), part (ii).
    """
    p, needed = 1 / max(kurtosis, 1.0), math.log(1 / failure) / pairs
    if p == 1:
        return 1.0

    def excess(q):  # kl(q, p) - needed, decreasing on [0, p]
        return (q * math.log(q / p) if q > 0 else 0.0) + (1 - q) * (math.log1p(-q) - math.log1p(-p)) - needed

    return math.inf if excess(0.0) <= 0 else p / brentq(excess, 0.0, p, xtol=1e-15 * p)


def bounded_upper(mean: float, ceiling: float, pairs: int, failure: float) -> float:
    """Upper limit of E Y of iid Y in [0, ceiling] by their mean: the worst Y is a coin, so that the binomial Chernoff
    bound, pairs kl(mean/ceiling, E Y/ceiling) <= ln(1/failure), is inverted. Source: Proposition (prop:pilot), (i)."""
    q, needed = min(1.0, mean / ceiling), math.log(1 / failure) / pairs

    def excess(p):  # kl(q, p) - needed, increasing on [q, 1)
        return (q * math.log(q / p) if q > 0 else 0.0) + (1 - q) * (math.log1p(-q) - math.log1p(-p)) - needed

    top = 1 - 1e-12
    return ceiling * (1.0 if q >= top or excess(top) <= 0 else brentq(excess, max(q, 1e-300), top, xtol=1e-15))


def limits(mean, square, pairs: int, kurtosis: float, failure: float, failure_lower=None, ceiling=None) -> Spread:
    """E Y from the means of Y and Y^2, over all pairs of a pilot of 2 pairs samples or over disjoint ones.

    Each limit fails with its stated probability, the lower with that of the upper if it has none of its own.
    Assumption, not checkable from the pilot: E Y^2 <= kurtosis (E Y)^2. Where twice the pilot's own ratio is larger it
    is taken instead: a ratio falls short of the population's the more, the heavier its tail. With Y <= `ceiling`
    known, the upper limit needs no assumption, and the kurtosis is at most ceiling / E Y.
    Source: Proposition (prop:pilot): parts (i) or (ii) above, (iii) below.
    """
    low = failure if failure_lower is None else failure_lower
    observed = square / mean**2 if mean > 0 else 1.0
    kurtosis = max(kurtosis, CAUTION * observed)
    lower = mean / (1 + math.sqrt((kurtosis - 1) * (1 / low - 1) / pairs))
    if ceiling is None:
        upper = mean * inflation(pairs, kurtosis, failure) if mean > 0 else 0.0
    else:
        upper = bounded_upper(mean, ceiling, pairs, failure)
        kurtosis = max(1.0, ceiling / upper)
    return Spread(mean, lower, upper, pairs, kurtosis, observed)


def spread_limits(losses, kurtosis: float, failure: float, failure_lower=None, ceiling=None, distinct=None) -> Spread:
    """S_mu^2 from the losses (m_probes, n) of a pilot at the probe weights, with its limits.

    Y is the mean over the probes of (l - l')^2/2, of mean S_mu^2; 0 <= l <= ceiling, if one is known. distinct: how
    many of the n samples are, if some are copies. Source: Proposition (prop:pilot).
    """
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    mean, square = pair_moments(losses.T / math.sqrt(len(losses)))
    pairs, most = (distinct or losses.shape[1]) // 2, None if ceiling is None else ceiling**2 / 2
    return limits(mean, square, max(1, pairs), kurtosis, failure, failure_lower, most)


def budget(pairs: int, kurtosis: float, delta: float, spreads: int = 1) -> float:
    """The part of delta for the upper limits of `spreads` spreads, at most half: it makes the answer least.

    A function of the pilot's size and of the assumption alone, so that it may be chosen with the pilot at hand.
    """
    shares = delta * np.geomspace(0.005, 0.5, 60)
    size = [inflation(pairs, kurtosis, s / spreads) / math.sqrt(delta - s) for s in shares]
    return float(shares[int(np.argmin(size))])


# --- sizes ------------------------------------------------------------------------------------------------


def fourth_moment(k: int, kurtosis: float, n: float = math.inf) -> float:
    """>= E |mean_k - mean_n|^4 / (trace of the covariance)^2 of vectors x in random order, if pairs have the kurtosis.

    For Y = |x - x'|^2/2 of two samples, E Y^2 <= kurtosis (E Y)^2. Exact in the fourth moment and in the
    Hilbert-Schmidt norm of the covariance; both take their worst values. Source: Theorem (thm:fourth).
    """
    kurtosis = max(kurtosis, 1.0)
    if math.isinf(n):
        return max(2 * kurtosis - 1 - 2 * h + (k - 1) * (1 + 2 * h) for h in (0.0, min(1.0, kurtosis - 1))) / k**3
    if k >= n:
        return 0.0
    p = np.cumprod([(k - i) / (n - i) if n > i else 0.0 for i in range(4)])  # that 1, 2, 3, 4 samples are all chosen
    of_a, of_b = p[0] - 7 * p[1] + 12 * p[2] - 6 * p[3], p[1] - 2 * p[2] + p[3]
    slack = 2 * kurtosis * n / (n - 1) - 1  # a = sum |x|^4 / (sum |x|^2)^2 lies in [1/n, (slack - 2h)/n], 0 <= h <= 1
    h = min(1.0, max(0.0, (slack - 1) / 2))
    worst = max(a * of_a + (1 + 2 * b) * of_b for b in (0.0, h) for a in (1 / n, max(1.0, slack - 2 * b) / n))
    return (n - 1) ** 2 * worst / k**4


def k_surface(variance: float, tolerance: float, confidence: float, n: float = math.inf, kurtosis: float | None = None):
    """Enough for every k' >= k at once: the smaller of two sizes by Doob's inequality.

    By second moments ceil(1 / (1/n + delta tau^2 / S_mu^2)); with a kurtosis also the least k whose `fourth_moment`
    is at most delta (tau / S_mu)^4. variance: S_mu^2 (divisor n - 1 in a pool of n); n = inf for the population.
    Source: Theorem (thm:neighbourhood), Theorem (thm:fourth).
    """
    if variance == 0:
        return 1
    delta, scale = 1 - confidence, tolerance**2 / variance
    rate = 1 / n + delta * scale
    if rate == 0:
        return math.inf
    high = max(1, min(n, math.ceil(1 / rate)))
    if kurtosis is None or math.isinf(high) or fourth_moment(high, kurtosis, n) > delta * scale**2:
        return high
    low = 0  # fourth moments fall with k
    while high - low > 1:
        k = (low + high) // 2
        low, high = (low, k) if fourth_moment(k, kurtosis, n) <= delta * scale**2 else (k, high)
    return high


def gaussian_factor(losses, confidence: float, seed: int = 0, paths: int = 4000, steps: int = 400) -> float:
    """q^2 with k ~ q^2 S_mu^2 / tau^2 for large k: the quantile of sup over s <= 1 of |B(s)|^2, |.| over the probes.

    k (L_k - L) at the probes tends to a Brownian motion with the covariance of the losses (m_probes, n), here scaled
    to trace 1, and sup_{k' >= k} |L_k' - L|, by inversion of time, to its supremum over s <= 1 divided by sqrt(k).
    At one probe by the series of its distribution, at more by simulation (low by a few per cent: a grid in time).
    """
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    if len(losses) == 1:
        odd = 2 * np.arange(50) + 1

        def above(q):
            return 1 - 4 / math.pi * float(((-1.0) ** (odd // 2) / odd * np.exp(-((odd * math.pi / q) ** 2) / 8)).sum())

        return brentq(lambda q: above(q) - (1 - confidence), 0.2, 40) ** 2
    weights = np.linalg.eigvalsh(np.cov(losses)).clip(0)
    if weights.max() == 0:
        return 1.0
    weights = weights[weights > 1e-3 * weights.max()]
    squares, generator = np.zeros((paths, steps)), np.random.default_rng([seed, 17])
    for weight in weights / weights.sum():
        squares += weight * generator.standard_normal((paths, steps)).cumsum(1) ** 2 / steps
    return float(np.quantile(squares.max(1), confidence))


def k_ball(fluctuation: float, tolerance: float, confidence: float, remainder=0.0, moment=0.0, kurtosis=None) -> float:
    """Enough for sup over the ball, for every k' >= k at once, in the population.

    fluctuation  B = S + R sqrt(tr Sigma_g) [+ (R^2/2) sqrt(tr Sigma_H)], the part that falls like k^(-1/2)
    remainder    xi = (R^3/3) sup Lip_i, if the curvature is in B; inf unless it is below the tolerance
    moment       R^2 sqrt(E M_i(R)^2), in place of the curvature: does not fall; inf unless below sqrt(delta) tau
    kurtosis     of the pairs of every term: allows the fourth moments of `k_surface`; not with `moment`
    Source: Theorem (thm:surface-ball), Corollary (cor:ball-sizes).
    """
    left = tolerance - remainder - moment / math.sqrt(1 - confidence)
    if left <= 0:
        return math.inf
    return k_surface(fluctuation**2, left, confidence, kurtosis=kurtosis if moment == 0 else None)


def k_fixed_probes(losses, tolerance: float, confidence: float, n: int, ceiling: float) -> int:
    """Least k <= n with |L_k - L_n| <= tau at all probes at once, for that one k, by the empirical Bernstein bound.

    losses (m_probes, m) of a pilot give the deviations sigma (plug-in: the theorem's are those of the k samples);
    ceiling >= all losses. n - 1 is answered by n. Source: Bardenet and Maillard (2015), Theorem 4.3, two-sided, a
    union over the probes.
    """
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    sigma, c = losses.std(1).max(), math.log(10 * len(losses) / (1 - confidence))

    def width(k):
        rho = 1 - (k - 1) / n if k <= n / 2 else (1 - k / n) * (1 + 1 / k)
        return sigma * math.sqrt(2 * rho * c / k) + (7 / 3 + 3 / math.sqrt(2)) * ceiling * c / k

    low, high = 0, int(n)  # at k = n the mean is exact
    while high - low > 1:
        k = (low + high) // 2
        low, high = (low, k) if width(k) <= tolerance else (k, high)
    return high


def k_step(losses, tolerance: float) -> int:
    """Exact worst order at fixed weights: smallest k with |L_{k'+1} - L_k'| <= tau for all k' >= k and all orders.

    For each k' the largest change adds the largest loss to the k' smallest, or the reverse. n if even the
    last step of the pool exceeds tau ("not reached inside the pool"). Source: the definition of k_step, at R = 0.
    """
    ordered = np.sort(np.asarray(losses, dtype=np.float64))
    n = len(ordered)
    k = np.arange(1, n)
    low, high = np.cumsum(ordered)[:-1] / k, np.cumsum(ordered[::-1])[:-1] / k  # means of the k smallest, largest
    worst = np.maximum(ordered[-1] - low, high - ordered[0]) / (k + 1)
    above = np.flatnonzero(worst > tolerance)
    return 1 if len(above) == 0 else int(above[-1]) + 2


def next_step(scores, confidence: float) -> float:
    """Q with |L_{k+1} - L_k| <= Q/(k - 1) with the given probability, k samples and the next being exchangeable.

    scores (k,): nu(z_i - mean of z), of losses their distance to the mean. inf if k + 1 < 1/delta.
    Source: Proposition (prop:exchangeable).
    """
    scores = np.sort(np.asarray(scores, dtype=np.float64))
    m = math.ceil(confidence * (len(scores) + 1) - 1e-9)
    return float(scores[m - 1]) if m <= len(scores) else math.inf


def norms_on_ball(model, losses: Losses, radius: float, rung: str) -> Tensor:
    """Bounds of M_i(R) = sup over the ball of ||H_i||, (n,), by a rung of `bounds.hessian_norm_bounds` that holds on
    balls. ValueError for networks that it does not know."""
    return bounds.hessian_norm_bounds(model, losses.x, losses.y, losses.loss, rung, radius=radius).values.double()


def worst_range(losses: Losses, radius: float, model=None, rung: str = "prior") -> dict[str, float]:
    """D_R = max|l_i - l_j| + R max|grad_i - grad_j| + R^2 max_i M_i(R) and its parts. Source: Theorem (thm:k-step).

    At R > 0 the curvature part takes a rung on the ball (`norms_on_ball`), which knows the networks of `utils.models`
    only; ValueError for other modules.
    """
    values = losses.values()
    parts = {"value": (values.max() - values.min()).item(), "gradient": 0.0, "curvature": 0.0}
    if radius > 0:
        g = losses.sample_gradients()
        distances = torch.cdist(g, g, compute_mode="donot_use_mm_for_euclid_dist")  # the fast way cancels
        parts["gradient"] = radius * distances.max().item()
        parts["curvature"] = radius**2 * norms_on_ball(model, losses, radius, rung).max().item()
    return parts | {"D": sum(parts.values())}


# --- the pilot's measurements -------------------------------------------------------------------------------


def neighbourhood(w: Tensor, radius: float, n_probes: int, seed: int = 0) -> Tensor:
    """Probe weights (n_probes, P), uniform in the ball around w (P,); w itself (1, P) at radius 0.

    mu is the uniform distribution on these points: fixed before the samples are looked at, so Theorem
    (thm:neighbourhood) holds for it exactly.
    """
    if radius == 0:
        return w[None]
    generator = torch.Generator().manual_seed(0xBA11 + seed)
    u = torch.randn(n_probes, len(w), generator=generator, dtype=torch.float64).to(w)
    length = radius * torch.rand(n_probes, 1, generator=generator, dtype=torch.float64).to(w) ** (1 / len(w))
    return w + length * u / u.norm(dim=1, keepdim=True)


def probe_losses(losses: Losses, probes: Tensor) -> np.ndarray:
    """Per-sample losses (n_probes, n) at each probe: a loop over weights, batches over samples."""
    return np.stack([losses.values(w).double().cpu().numpy() for w in probes])


def label_ceiling(losses: Losses, probes: Tensor, n_classes: int) -> np.ndarray:
    """The largest loss that any of the labels would give each sample at any of the probes, (n,).

    Its maximum over a pilot is a `ceiling` for every labelling of inputs like the pilot's, wrong labels included: an
    assumption on the inputs alone. For all inputs there is `bounds.loss_upper_bound`, which is larger.
    """
    found = []
    for label in range(n_classes):
        relabelled = copy.copy(losses)
        relabelled.y = torch.full_like(losses.y, label)
        found.append(probe_losses(relabelled, probes).max(0))
    return np.max(found, 0)


def ball_moments(losses: Losses, curvature: bool = True, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Means of Y and Y^2 of (l - l')^2/2, |g - g'|^2/2 and |(H - H')v|^2/2, of means S^2, tr Sigma_g, tr Sigma_H.

    The last over disjoint random pairs, v with fresh iid signs for each: the noise of the probe is in the pair's.
    Source: (eq:pilot-pairs).
    """
    found = {
        "S": pair_moments(losses.values().cpu()[:, None]),
        "gradient": pair_moments(losses.sample_gradients().cpu()),
    }
    if curvature:
        order, half = torch.from_numpy(np.random.default_rng([seed, 13]).permutation(losses.n)), losses.n // 2
        generator = torch.Generator().manual_seed(0xFA12 + seed)
        signs = torch.randint(0, 2, (half, losses.P), generator=generator).to(losses.w) * 2 - 1
        Hv, other = (SampleHessians(losses, rows)(signs) for rows in (order[:half], order[half : 2 * half]))
        Y = (Hv - other).double().square().sum(1) / 2
        found["curvature"] = Y.mean().item(), Y.square().mean().item()
    return found


# --- the answer ---------------------------------------------------------------------------------------------


def required_samples(
    model,
    x,
    y,
    tolerance: float,
    radius: float = 0.0,
    confidence: float = 0.95,
    criterion: str = "surface",
    fitted_on: Tensor | None = None,
    loss: str = "cross_entropy",
    *,
    kurtosis: float = 20.0,
    ceiling: float | None = None,
    n_probes: int = 8,
    seed: int = 0,
    rung: str | None = None,
    remainder: float = 0.0,
    gap: float = 0.0,
    **options,
) -> SampleSize:
    """How many samples until more data change the surface around the model by less than `tolerance`.

    x (m, ...), y (m,)  the pilot; it must not have been used for the weights. `fitted_on` are the inputs
                        that were: if one of the pilot's is among them the answer is labelled a pool statement.
    tolerance           tau, in units of the loss; for "excess" the acceptable L(w_k) - min over the ball of L.
    radius              R, Euclidean, absolute.
    confidence          1 - delta. surface, ball, excess: a part of delta, see `budget`, pays for the pilot's upper
                        limits, the rest for the order of the samples (Doob).
    criterion           see the head of this module.
    kurtosis            the assumption behind those limits, see `limits`.
    ceiling             surface: a number that no loss of any sample exceeds at any weights of the neighbourhood:
                        takes the place of the assumption. See `label_ceiling` and `bounds.loss_upper_bound`.
    rung                ball, excess, step: where the curvature on the ball comes from. None: the measured spread of
                        the Hessians at the centre, and `remainder` is what the caller knows of xi (step: prior).
                        A rung of `bounds.hessian_norm_bounds`: M_i(R), see `norms_on_ball`.
    gap                 excess: how far above its minimum on the ball the training objective is left.
    Raises ValueError for an unknown criterion and for values out of range.
    """
    if not 0 < tolerance < math.inf or not 0 <= radius < math.inf or not 0 < confidence < 1 or n_probes < 1:
        raise ValueError(
            f"tolerance {tolerance}, radius {radius}, confidence {confidence}, n_probes {n_probes}: "
            "give tolerance > 0, radius >= 0, confidence between 0 and 1 and n_probes >= 1."
        )
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}: choose one of {', '.join(CRITERIA)}.")
    losses = Losses(model, x, y, loss, **options)
    statement = "population statement: the pilot did not fit the weights"
    if fitted_on is not None and not _rows(x).isdisjoint(_rows(fitted_on)):
        statement = "pool statement: about the training loss"
    asked = {"tolerance": tolerance, "radius": radius, "confidence": confidence, "criterion": criterion}
    if criterion == "surface":
        values = probe_losses(losses, neighbourhood(losses.w, radius, n_probes, seed))
        found = surface_forecast(values, tolerance, confidence, kurtosis, seed, ceiling, len(_rows(losses.x)))
    elif criterion in ("ball", "excess"):
        reach = tolerance if criterion == "ball" else (tolerance - gap) / 2
        found = _ball(losses, reach, radius, confidence, kurtosis, seed, model, rung, remainder)
        found |= _drift(losses.values().double().cpu().numpy())
        statement += "" if rung or remainder or radius == 0 else ", to second order in the distance"
    elif criterion == "next":
        found = _next(losses, tolerance, confidence) | _drift(losses.values().double().cpu().numpy())
    else:  # any order, any samples
        found = _step(model, losses, tolerance, radius, rung or "prior")
    return SampleSize(**(asked | found), statement=statement)


def _drift(values: np.ndarray) -> dict:
    """What to say instead if the losses (n,) follow the pilot's order: such a pilot is no random sample."""
    found = spearmanr(np.arange(len(values)), values) if np.ptp(values) > 0 else None
    if found is None or not found.pvalue < DRIFT:
        return {}
    words = (
        f"cannot tell: the losses follow the pilot's order (rank correlation {found.statistic:.2f}); if the order "
        "means nothing, shuffle the pilot, and if it is time, the mean need not settle at all"
    )
    return {"upper": math.inf, "verdict": "cannot tell", "sentence": words}


def _rows(x: Tensor) -> set[bytes]:
    """The samples by value: two precisions of one number, and 0 and -0, are the same."""
    return {row.contiguous().numpy().tobytes() for row in x.detach().cpu().double() + 0.0}


def _said(k: float, lower: float, upper: float, n: int, needed: float, terms: dict) -> dict:
    """The verdict on k in [lower, upper] from a pilot of n; `needed` is the least pilot that can tell."""
    if math.isinf(upper):
        first = f": at least {needed - n:.0f} more first" if needed > n and not math.isinf(needed) else ""
        verdict, words = "cannot tell", f"cannot tell from this pilot{first}"
    elif upper <= n:
        verdict, words = "enough", f"enough: {upper} suffice and the pilot has {n}"
    else:
        verdict, words = "need", f"need k in [{lower}, {upper}]"
    return {
        "k": k, "lower": lower, "upper": upper, "verdict": verdict, "sentence": words, "terms": terms | {"pilot": n}
    }  # fmt: skip


def least_pilot(kurtosis: float, failure: float) -> int:
    """Samples of a pilot from which `inflation` is finite on."""
    return 2 * math.floor(-math.log(1 / failure) / math.log1p(-1 / kurtosis) + 1) if kurtosis > 1 else 4


def surface_forecast(
    values, tolerance: float, confidence: float, kurtosis=20.0, seed=0, ceiling=None, distinct=None
) -> dict:
    """The surface answer from the losses (m_probes, n) of a pilot alone: what `required_samples` says, by field.

    The interval [lower, upper] holds the true size with probability 1 - delta: half of delta at most for the upper
    limit of S_mu, half for the lower one, which is asymptotic in k. distinct: how many of the samples are no copies.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    delta, n = 1 - confidence, values.shape[1]
    share = budget(max(1, n // 2), kurtosis, delta)
    spread = spread_limits(values, kurtosis, share, delta / 2, ceiling, distinct)
    variance = float(values.var(1, ddof=1).mean())
    factor = gaussian_factor(values, confidence, seed)
    k = max(1, math.ceil(factor * variance / tolerance**2))
    upper = k_surface(spread.upper, tolerance, 1 - (delta - share), kurtosis=spread.kurtosis)
    lower = max(1, math.floor(factor * spread.lower / tolerance**2))
    by_theorem = k_surface(variance, tolerance, confidence, kurtosis=spread.kurtosis)
    terms = {
        "S": math.sqrt(variance),
        "S_lower": math.sqrt(spread.lower),
        "S_upper": math.sqrt(spread.upper),
        "pairs": spread.pairs,
        "kurtosis": spread.kurtosis,
        "observed_kurtosis": spread.observed_kurtosis,
        "pilot_failure": share,
        "price_of_theorem": by_theorem / k,
        "price_of_pilot": upper / by_theorem,
    }
    found = _said(k, min(lower, k), upper, n, least_pilot(spread.kurtosis, share), terms)
    return found | _drift(values.mean(0))


def _ball(losses, tolerance, radius, confidence, kurtosis, seed, model, rung, remainder) -> dict:
    delta, n, R = 1 - confidence, losses.n, radius
    if R > 0:
        Y = ball_moments(losses, rung is None, seed)
    else:
        Y = {"S": pair_moments(losses.values().cpu()[:, None])}
    spreads, norms, unit = len(Y), None, 1.0
    if R > 0 and rung is not None:
        norms, spreads = norms_on_ball(model, losses, R, rung), spreads + 1
    pairs = max(1, len(_rows(losses.x)) // 2)  # copies count once
    share = budget(pairs, kurtosis, delta, spreads)
    found = {name: limits(*both, pairs, kurtosis, share / spreads) for name, both in Y.items()}
    if norms is not None and bool(norms.isfinite().all()):
        unit = norms.max().item() or 1.0  # the fourth power of an a-priori bound may be no double
        squares = (norms / unit) ** 2
        mean, square = squares.mean().item(), squares.square().mean().item()
        found["moment"] = limits(mean, square, 2 * pairs, kurtosis, share / spreads)
    at = {"S": 1.0, "gradient": R, "curvature": R**2 / 2}
    worst = max(s.kurtosis for s in found.values())

    def size(which, budgeted):
        B = sum(at[name] * math.sqrt(getattr(found[name], which)) for name in Y)
        moment = 0.0 if norms is None else math.inf
        if "moment" in found:
            moment = R**2 * unit * math.sqrt(getattr(found["moment"], which))
        if tolerance <= 0 or math.isinf(B) or math.isinf(moment):
            return math.inf
        return k_ball(B, tolerance, 1 - budgeted, remainder, moment, worst)

    k, upper = size("estimate", delta), size("upper", delta - share)
    units = dict.fromkeys(Y, 1.0) | {"moment": unit}
    terms = {name: units[name] * math.sqrt(s.estimate) for name, s in found.items()}
    terms |= {f"{name}_upper": units[name] * math.sqrt(s.upper) for name, s in found.items()}
    terms |= {"pairs": pairs, "kurtosis": worst, "pilot_failure": share, "remainder": remainder}
    out_of_reach = math.isinf(k)  # no pilot helps: what does not fall with k is above the tolerance
    return _said(k, 1, upper, n, math.inf if out_of_reach else least_pilot(worst, share / spreads), terms)


def _next(losses: Losses, tolerance: float, confidence: float) -> dict:
    """The proposition speaks of the pilot and one more: `upper` is the pilot's size where that step is small enough."""
    values, n = losses.values().double().cpu().numpy(), losses.n
    Q = next_step(np.abs(values - values.mean()), confidence)
    k, step = 1 + (Q if math.isinf(Q) else math.ceil(Q / tolerance)), Q / (n - 1)
    found = _said(k, 1, n if step <= tolerance else math.inf, n, math.ceil(1 / (1 - confidence) - 1e-9), {"Q": Q})
    if not math.isinf(Q):
        verdict = "enough" if step <= tolerance else "cannot tell"
        found["sentence"] = f"{verdict}: the next sample moves the mean by {step:.3g} at most (plug-in k = {k})"
    return found


def _step(model, losses: Losses, tolerance: float, radius: float, rung: str) -> dict:
    parts, ceiling = worst_range(losses, radius, model, rung), math.inf
    if losses.loss == "cross_entropy":
        try:
            ceiling = bounds.loss_upper_bound(model, radius)
        except ValueError:  # not one of our networks: no a-priori bound
            pass
    k = max(1, math.ceil(parts["D"] / tolerance) - 1)
    upper = math.inf if math.isinf(ceiling) else max(1, math.ceil(ceiling / tolerance) - 1)
    lower = k_step(losses.values().double().cpu().numpy(), tolerance)
    found = _said(k, lower, upper, losses.n, math.inf, parts | {"ceiling": ceiling})
    if math.isinf(upper):
        inside = f"{k} inside it" if k < losses.n else "not reached inside it"
        found["sentence"] = f"cannot tell beyond this pilot ({inside}): the loss has no known ceiling"
    elif upper <= losses.n:
        found["sentence"] = f"enough: no sample can move the surface by {tolerance} after {upper}"
    return found


# --- what one would do without a theorem ----------------------------------------------------------------------

# Curves v(k) of the learning-curve literature: name -> (function of k and parameters, starting values). They are stated
# for an accuracy in per cent that grows; here for a distance that falls, so the arctan has a free height.
FAMILIES = {
    "power law": (lambda k, a, b, c: a * k ** -abs(b) + c, (1.0, 0.5, 0.0)),
    "logarithmic": (lambda k, a, b, c: c - a * np.log(k + abs(b)), (0.1, 1.0, 1.0)),
    "arctan": (lambda k, a, b, c: c - a * np.arctan(abs(b) * k), (1.0, 0.01, 1.0)),
    "algebraic root": (lambda k, a, b, c: c - k / (1 + abs(a * k) ** abs(b)) ** (1 / abs(b)), (1.0, 0.5, 1.0)),
}


def fitted_sizes(k, curve, targets, family: str, most: float = 1e9) -> np.ndarray:
    """The k at which a family, fitted to (k, curve) by least squares, falls to each target; inf where it never does.

    Source: Mahmood et al., How much more data do I need?, arXiv 2207.01725: fit, extrapolate, solve for the target.
    """
    (function, start), targets = FAMILIES[family], np.atleast_1d(np.asarray(targets, dtype=np.float64))
    k, curve, grid = np.asarray(k, dtype=np.float64), np.asarray(curve, dtype=np.float64), np.geomspace(1, most, 2000)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", OptimizeWarning)
            parameters, _ = curve_fit(function, k, curve, p0=start, maxfev=5000)
            below = function(grid, *parameters)[None] <= targets[:, None]
    except (RuntimeError, TypeError, ValueError):  # no fit
        return np.full(len(targets), math.inf)
    return np.where(below.any(1), grid[below.argmax(1)], math.inf)


def settling_curve(values, k, n_orders: int = 200, seed: int = 0) -> np.ndarray:
    """Mean over random orders of a pilot of Z_k = |L_k - L_m| over its probes, for every k < m: (len(k),)."""
    values, k = np.atleast_2d(np.asarray(values, dtype=np.float64)), np.asarray(k)
    n, generator, total = values.shape[1], np.random.default_rng([seed, 19]), np.zeros(len(k))
    for _ in range(n_orders):
        mean = values[:, generator.permutation(n)].cumsum(1)[:, k - 1] / k
        total += np.sqrt(((mean - values.mean(1, keepdims=True)) ** 2).mean(0))
    return total / n_orders


def baselines(values, tolerance: float, targets=None, seed: int = 0) -> dict:
    """Sizes from the same pilot, losses (m_probes, m), by rules without guarantee; inf where a rule refuses.

    Families: fitted to `settling_curve` on k from 4 to m/2 (nearer to m it bends to 0 by construction) and solved for
    the targets, (len(targets),) each; the tolerance alone if there are none: a number each. "one step": S/tau, where a
    typical step falls below tau, the papers' reading. "doubling": double from 8 on until two means in a row differ by
    less than tau; inf if the pilot ends first.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    m = values.shape[1]
    S = math.sqrt(values.var(1, ddof=1).mean())
    found = {"one step": max(1.0, math.ceil(S / tolerance)), "doubling": math.inf}
    order, k = np.random.default_rng([seed, 23]).permutation(m), 8
    while 2 * k <= m and math.isinf(found["doubling"]):
        difference = values[:, order[:k]].mean(1) - values[:, order[: 2 * k]].mean(1)
        k *= 2
        if math.sqrt((difference**2).mean()) < tolerance:
            found["doubling"] = float(k)
    grid = np.unique(np.geomspace(min(4, m // 2), m // 2, 20).astype(int))
    curve = settling_curve(values, grid, seed=seed)
    for family in FAMILIES:
        sizes = fitted_sizes(grid, curve, tolerance if targets is None else targets, family)
        found[family] = float(sizes[0]) if targets is None else sizes
    return found


# --- the check ------------------------------------------------------------------------------------------------


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a binomial probability."""
    side = (1 - level) / 2
    low = beta.ppf(side, hits, n - hits + 1) if hits else 0.0
    return float(low), float(beta.ppf(1 - side, hits + 1, n - hits)) if hits < n else 1.0


def exceedance(values: np.ndarray, k: int, tolerance: float, orders: np.ndarray) -> tuple[float, float, float]:
    """Share of orders in which Z_k' > tau for some k' >= k, with its 95 % Clopper-Pearson interval.

    values (n_probes, n) are held-out losses at the probes, Z_k the root mean square over the probes of
    L_k - L_n. This is the event whose probability Theorem (thm:neighbourhood) bounds by delta.
    """
    squares = np.zeros(orders.shape)
    for row in np.atleast_2d(values):
        mean = np.cumsum(row[orders], axis=1) / np.arange(1, orders.shape[1] + 1)
        squares += (mean - mean[:, -1:]) ** 2 / len(np.atleast_2d(values))
    hits = int((np.sqrt(squares[:, k - 1 :]).max(1) > tolerance).sum())
    return hits / len(orders), *clopper_pearson(hits, len(orders))


def true_size(values, tolerance: float, confidence: float, streams: int = 400, seed: int = 0) -> tuple[int, int, int]:
    """The least k with Pr(some k' >= k has Z_k' > tau) <= delta for samples drawn with replacement from a pool.

    values (m_probes, N): losses of the whole pool at the probes; L is the pool's mean. By simulation of streams as
    long as 40 times the Gaussian size, after which the event has a probability below 2e-3 (fourth moments, q >= 1).
    Returns the quantile over the streams and its 95 % interval by order statistics.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    values = values - values.mean(1, keepdims=True)
    length = 40 * math.ceil(gaussian_factor(values, confidence, seed) * values.var(1).mean() / tolerance**2)
    generator, last = np.random.default_rng([seed, 29]), np.zeros(streams, dtype=int)
    for stream in range(streams):
        squares, draws = np.zeros(length), generator.integers(values.shape[1], size=length)
        for row in values:
            squares += (row[draws].cumsum() / np.arange(1, length + 1)) ** 2 / len(values)
        outside = np.flatnonzero(squares > tolerance**2)
        last[stream] = outside[-1] + 1 if len(outside) else 0
    last = np.sort(last) + 1
    ranks = (math.ceil(confidence * streams), *binom.ppf([0.025, 0.975], streams, confidence))
    k, low, high = (int(last[min(streams, max(1, int(r) + (i == 2))) - 1]) for i, r in enumerate(ranks))
    return k, low, high
