"""How many samples are enough: k_step and k_surface, from a pilot, with limits, a verdict and a check.

k_surface(tau, R, delta) is the smallest k such that, with probability 1 - delta over the order of the
samples, |L_k' - L| stays below tau for every k' >= k, in mean square over a neighbourhood of radius R
(at R = 0: at the weights). k_step(tau) is the smallest k after which no single sample can change the
surface by more than tau: the papers' quantity, and a different question (prop:two-questions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from utils import bounds
from utils.curvature import Losses

VERDICTS = ("enough", "need", "cannot tell")


@dataclass(frozen=True)
class SampleSize:
    """The answer to one question (criterion, tolerance, radius, confidence).

    k          plug-in: the theorem's k with the pilot's own spread, no allowance for the pilot being a sample
    lower      surface: fewer are too few, asymptotically (normal quantile at the spread's lower limit);
               step: fewer are too few on the pilot itself (exact worst order)
    upper      that many are enough at the stated confidence under the stated assumption; inf if the pilot cannot tell
    verdict    "enough", "need" or "cannot tell"; `sentence` says it in words
    statement  what population the numbers speak of
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


@dataclass(frozen=True)
class Spread:
    """A pilot's estimate of S^2 with its limits; each limit holds with probability 1 - failure under `kurtosis`."""

    estimate: float
    lower: float
    upper: float
    pairs: int
    kurtosis: float
    observed_kurtosis: float


def spread_limits(losses, kurtosis: float, failure: float, seed: int = 0) -> Spread:
    """S_mu^2 from the losses (m_probes, n) of a pilot at the probe weights, by floor(n/2) disjoint random pairs.

    Y_j = mean over the probes of (l - l')^2/2 is iid and nonnegative with mean S_mu^2. Assumption, not
    checkable from the pilot: E Y^2 <= kurtosis (E Y)^2 (a pilot whose own ratio is larger contradicts the
    assumption, and its ratio is taken instead). Then each of
    upper = Ybar / (1 - sqrt(2 kurtosis ln(1/failure)/pairs))          (inf where the root reaches 1) and
    lower = Ybar / (1 + sqrt((kurtosis - 1)(1/failure - 1)/pairs))
    holds with probability 1 - failure. Source: (prop:pilot). `observed_kurtosis` is the pilot's own ratio.
    """
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    order = np.random.default_rng([seed, 13]).permutation(losses.shape[1])
    pairs = losses.shape[1] // 2
    if pairs < 2:
        raise ValueError(f"The pilot has {losses.shape[1]} samples: give at least 4.")
    a, b = losses[:, order[:pairs]], losses[:, order[pairs : 2 * pairs]]
    Y = ((a - b) ** 2 / 2).mean(0)
    mean = Y.mean()
    observed = (Y**2).mean() / mean**2 if mean > 0 else 1.0
    kurtosis = max(kurtosis, observed)
    root = math.sqrt(2 * kurtosis * math.log(1 / failure) / pairs)
    lower = mean / (1 + math.sqrt((kurtosis - 1) * (1 / failure - 1) / pairs))
    return Spread(mean, lower, mean / (1 - root) if root < 1 else math.inf, pairs, kurtosis, observed)


def k_surface(variance: float, tolerance: float, confidence: float, n: float = math.inf) -> float:
    """ceil(1 / (1/n + delta tau^2 / S_mu^2)): enough for every k' >= k at once. Source: Theorem (thm:neighbourhood).

    variance is S_mu^2 (divisor n - 1 in a pool of n); n = inf for the population. inf for an infinite variance and n.
    """
    if variance == 0:
        return 1
    rate = 1 / n + (1 - confidence) * tolerance**2 / variance
    return math.inf if rate == 0 else max(1, min(n, math.ceil(1 / rate)))


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


def worst_range(losses: Losses, radius: float, model=None) -> dict[str, float]:
    """D_R = max|l_i - l_j| + R max|grad_i - grad_j| + R^2 max_i M_i(R) and its parts. Source: Theorem (thm:k-step).

    At R > 0 the curvature part takes the prior rung of the bounds on the ball, which knows the
    networks of `utils.models.ViT` only and is astronomically loose; ValueError for other modules.
    """
    values = losses.values()
    parts = {"value": (values.max() - values.min()).item(), "gradient": 0.0, "curvature": 0.0}
    if radius > 0:
        g = losses.sample_gradients()
        distances = torch.cdist(g, g, compute_mode="donot_use_mm_for_euclid_dist")  # the fast way cancels
        parts["gradient"] = radius * distances.max().item()
        bound = bounds.hessian_norm_bounds(model, losses.x, losses.y, losses.loss, rung="prior", radius=radius)
        parts["curvature"] = radius**2 * bound.values.max().item()
    return parts | {"D": sum(parts.values())}


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
    n_probes: int = 8,
    seed: int = 0,
    **options,
) -> SampleSize:
    """How many samples until more data change the surface around the model by less than `tolerance`.

    x (m, ...), y (m,)  the pilot; it must not have been used for the weights. `fitted_on` are the inputs
                        that were: if one of the pilot's is among them the answer is labelled a pool statement.
    tolerance           tau, in units of the loss; radius: R, Euclidean, absolute.
    confidence          1 - delta; for "surface" half of delta pays for the order of the samples (Doob), a
                        quarter for each limit of the pilot's spread.
    kurtosis            the assumption behind those limits, see `spread_limits`.
    Raises ValueError for an unknown criterion and for values out of range.
    """
    if not 0 < tolerance < math.inf or not 0 <= radius < math.inf or not 0 < confidence < 1 or n_probes < 1:
        raise ValueError(
            f"tolerance {tolerance}, radius {radius}, confidence {confidence}, n_probes {n_probes}: "
            "give tolerance > 0, radius >= 0, confidence between 0 and 1 and n_probes >= 1."
        )
    losses = Losses(model, x, y, loss, **options)
    statement = "population statement: the pilot did not fit the weights"
    if fitted_on is not None and not _rows(x).isdisjoint(_rows(fitted_on)):
        statement = "pool statement: about the training loss"
    shared = {
        "criterion": criterion,
        "tolerance": tolerance,
        "radius": radius,
        "confidence": confidence,
        "statement": statement,
    }
    if criterion == "surface":
        return _surface(losses, shared, kurtosis, n_probes, seed)
    if criterion == "step":
        return _step(model, losses, shared)
    raise ValueError(f"criterion is {criterion!r}: choose surface or step.")


def _rows(x: Tensor) -> set[bytes]:
    """The samples by value: two precisions of one number, and 0 and -0, are the same."""
    return {row.contiguous().numpy().tobytes() for row in x.detach().cpu().double() + 0.0}


def _surface(losses: Losses, shared: dict, kurtosis: float, n_probes: int, seed: int) -> SampleSize:
    tolerance, delta = shared["tolerance"], 1 - shared["confidence"]
    values = probe_losses(losses, neighbourhood(losses.w, shared["radius"], n_probes, seed))
    spread = spread_limits(values, kurtosis, delta / 4, seed)
    variance = values.var(1, ddof=1).mean()
    k = k_surface(variance, tolerance, shared["confidence"])
    upper = k_surface(spread.upper, tolerance, 1 - delta / 2)
    lower = max(1, math.ceil((norm.ppf(1 - delta / 2) / tolerance) ** 2 * spread.lower))
    needed = 2 * math.ceil(2 * spread.kurtosis * math.log(4 / delta)) + 2
    if math.isinf(upper):
        verdict, words = "cannot tell", f"cannot tell from this pilot: at least {needed - losses.n} more first"
    elif upper <= losses.n:
        verdict, words = "enough", f"enough: {upper} suffice and the pilot has {losses.n}"
    else:
        verdict, words = "need", f"need k in [{lower}, {upper}]"
    terms = {
        "S": math.sqrt(variance),
        "S_lower": math.sqrt(spread.lower),
        "S_upper": math.sqrt(spread.upper),
        "pairs": spread.pairs,
        "kurtosis": spread.kurtosis,
        "observed_kurtosis": spread.observed_kurtosis,
        "pilot": losses.n,
        "price_of_doob": 1 / (delta * norm.ppf(1 - delta / 2) ** 2),
    }
    return SampleSize(k=k, lower=lower, upper=upper, verdict=verdict, sentence=words, terms=terms, **shared)


def _step(model, losses: Losses, shared: dict) -> SampleSize:
    tolerance, radius = shared["tolerance"], shared["radius"]
    parts = worst_range(losses, radius, model)
    ceiling = math.inf
    if losses.loss == "cross_entropy":
        try:
            ceiling = bounds.loss_upper_bound(model, radius)
        except ValueError:  # not one of our networks: no a-priori bound
            pass
    k = max(1, math.ceil(parts["D"] / tolerance) - 1)
    upper = math.inf if math.isinf(ceiling) else max(1, math.ceil(ceiling / tolerance) - 1)
    lower = k_step(losses.values().numpy(), tolerance)
    if math.isinf(upper):
        inside = f"{k} inside it" if k < losses.n else "not reached inside it"
        verdict, words = "cannot tell", f"cannot tell beyond this pilot ({inside}): the loss has no known ceiling"
    elif upper <= losses.n:
        verdict, words = "enough", f"enough: no sample can move the surface by {tolerance} after {upper}"
    else:
        verdict, words = "need", f"need k in [{lower}, {upper}]"
    return SampleSize(
        k=k,
        lower=lower,
        upper=upper,
        verdict=verdict,
        sentence=words,
        terms=parts | {"ceiling": ceiling, "pilot": losses.n},
        **shared,
    )


def exceedance(values: np.ndarray, k: int, tolerance: float, orders: np.ndarray) -> tuple[float, float, float]:
    """Share of orders in which Z_k' > tau for some k' >= k, with its 95 % Clopper-Pearson interval.

    values (n_probes, n) are held-out losses at the probes, Z_k the root mean square over the probes of
    L_k - L_n. This is the event whose probability Theorem (thm:neighbourhood) bounds by delta.
    """
    from scipy.stats import beta

    squares = np.zeros(orders.shape)
    for row in np.atleast_2d(values):
        mean = np.cumsum(row[orders], axis=1) / np.arange(1, orders.shape[1] + 1)
        squares += (mean - mean[:, -1:]) ** 2 / len(np.atleast_2d(values))
    hits = int((np.sqrt(squares[:, k - 1 :]).max(1) > tolerance).sum())
    n = len(orders)
    low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
    return hits / n, float(low), float(high)
