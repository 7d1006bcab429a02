"""How many examples until the surface settles on a whole ball: spreads, sizes, a forecast.

The ball criterion: the supremum over the ball of radius R of |L_k' - L| is at most tau for every
later k', with probability 1 - delta (thm:surface-ball); to second order in the distance, or with a
bound of each example's Hessian norm on the ball. Excess risk: a minimiser over the ball is then
within 2 tau of the best (prop:excess-risk).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.hessian import Losses
from utils.hessian.losses import SampleHessians
from utils.run.streams import generator, numpy_generator
from utils.sample_size.answer import conclude
from utils.sample_size.limits import Spread, budget, least_pilot, limits, pair_moments
from utils.sample_size.surface import k_surface

Moments = tuple[float, float]  # means of Y and of Y^2


def k_ball(
    fluctuation: float,
    tolerance: float,
    confidence: float,
    remainder: float = 0.0,
    moment: float = 0.0,
    kurtosis: float | None = None,
) -> float:
    """Examples that are enough for the supremum over the ball, for every k' >= k at once.

    fluctuation  B = S + R sqrt(tr Sigma_g) [+ (R^2/2) sqrt(tr Sigma_H)], the part that falls like
                 k^(-1/2)
    tolerance    tau
    confidence   1 - delta
    remainder    xi = (R^3/3) sup Lip_i, if the curvature is in B; the size is inf unless it is
                 below the tolerance
    moment       R^2 sqrt(E M_i^2), in place of the curvature, which does not fall; inf unless below
                 sqrt(delta) tau
    kurtosis     of the pairs of every term, allows the fourth moments of `k_surface`; not with
                 `moment`

    Source: Theorem (thm:surface-ball), Corollary (cor:ball-sizes).

    >>> k_ball(fluctuation=2.0, tolerance=0.1, confidence=0.75)
    1600
    >>> k_ball(fluctuation=2.0, tolerance=0.1, confidence=0.75, moment=0.05)
    inf
    """
    left = tolerance - remainder - moment / math.sqrt(1 - confidence)
    if left <= 0:
        return math.inf
    if moment > 0:
        kurtosis = None
    return k_surface(fluctuation**2, left, confidence, kurtosis=kurtosis)


def curvature_moments(losses: Losses, seed: int = 0) -> Moments:
    """Means of Y and Y^2, Y = |(H - H')v|^2/2 over disjoint random pairs, of mean tr Sigma_H.

    losses  of n examples
    seed    of the pairs and of v, fresh independent signs for each pair: the noise of the probe is
            in the pair's

    Source: (eq:pilot-pairs).

    >>> from utils.networks import build_model
    >>> network = build_model("mlp", d_in=2, width=2, depth=1, n_classes=3)
    >>> losses = Losses(network, torch.ones(6, 2), torch.zeros(6).long())
    >>> curvature_moments(losses)[0] < 1e-20  # equal examples: equal Hessians
    True
    """
    half = losses.n // 2
    order = torch.from_numpy(numpy_generator("pairs of a pilot", seed).permutation(losses.n))
    stream = generator("signs of a pilot", seed)
    signs = torch.randint(0, 2, (half, losses.P), generator=stream).to(losses.w) * 2 - 1
    first = SampleHessians(losses, order[:half])(signs)
    second = SampleHessians(losses, order[half : 2 * half])(signs)
    Y = (first - second).double().square().sum(1) / 2
    return Y.mean().item(), Y.square().mean().item()


def gradient_moments(losses: Losses) -> Moments:
    """Means of Y and Y^2, Y = |g - g'|^2/2 over all pairs, of mean tr Sigma_g.

    losses  of n examples, at least 4 or ValueError

    Source: (eq:pilot-pairs).

    >>> from utils.networks import build_model
    >>> network = build_model("mlp", d_in=2, width=2, depth=1, n_classes=3)
    >>> losses = Losses(network, torch.ones(6, 2), torch.zeros(6).long())
    >>> gradient_moments(losses)[0] < 1e-20  # equal examples: equal gradients
    True
    """
    return pair_moments(losses.sample_gradients().cpu())


def _norm_limits(
    norms: Tensor, pairs: int, kurtosis: float, failure: float
) -> tuple[float, Spread]:
    """A unit, and the limits of E (M/unit)^2: the fourth power of a bound may be no double."""
    unit = norms.max().item() or 1.0
    squares = (norms / unit) ** 2
    mean = squares.mean().item()
    return unit, limits(mean, squares.square().mean().item(), pairs, kurtosis, failure)


def _size(
    roots: dict[str, float], radius: float, tolerance: float, confidence: float, **more: float
) -> float:
    """`k_ball` from the roots of the spreads by name."""
    moment = radius**2 * roots["moment"] if "moment" in roots else 0.0
    factors = {"S": 1.0, "gradient": radius, "curvature": radius**2 / 2}
    fluctuation = sum(factor * roots[name] for name, factor in factors.items() if name in roots)
    if tolerance <= 0 or math.isinf(fluctuation) or math.isinf(moment):
        return math.inf
    return k_ball(fluctuation, tolerance, confidence, moment=moment, **more)


def ball_forecast(
    moments: dict[str, Moments],
    n: int,
    tolerance: float,
    radius: float,
    confidence: float,
    kurtosis: float = 20.0,
    distinct: int | None = None,
    norms: Tensor | None = None,
    remainder: float = 0.0,
) -> dict:
    """The ball answer from what a pilot measures: the fields of `SampleSize` by name.

    moments     of "S", at radius > 0 also of "gradient" and, if no norms are given, "curvature"
    n           examples in the pilot
    tolerance   tau; nothing is enough if it is not positive
    radius      R
    confidence  1 - delta
    kurtosis    the assumption, see `limits.limits`
    distinct    how many of the n are no copies
    norms       bounds (n,) of sup over the ball of each Hessian's norm
    remainder   see `k_ball`

    Source: Theorem (thm:surface-ball), Proposition (prop:pilot).

    >>> moments = {"S": (0.4, 0.5), "gradient": (3.0, 40.0), "curvature": (100.0, 5e4)}
    >>> answer = ball_forecast(moments, 400, tolerance=0.1, radius=0.01, confidence=0.9)
    >>> answer["verdict"], answer["k"] < answer["upper"]
    ('need', True)
    """
    delta = 1 - confidence
    pairs = max(1, (distinct or n) // 2)
    n_spreads = len(moments) + (norms is not None)
    share = budget(pairs, kurtosis, delta, n_spreads)
    failure = share / n_spreads
    spreads: dict[str, tuple[float, Spread]] = {
        name: (1.0, limits(*both, pairs, kurtosis, failure)) for name, both in moments.items()
    }
    unbounded = norms is not None and not bool(norms.isfinite().all())
    if norms is not None and not unbounded:
        spreads["moment"] = _norm_limits(norms, 2 * pairs, kurtosis, failure)
    worst = max(spread.kurtosis for _, spread in spreads.values())
    central = {name: unit * math.sqrt(s.estimate) for name, (unit, s) in spreads.items()}
    upper = {name: unit * math.sqrt(s.upper) for name, (unit, s) in spreads.items()}
    terms = central | {f"{name}_upper": root for name, root in upper.items()}
    terms |= {"pairs": pairs, "kurtosis": worst, "pilot_failure": share, "remainder": remainder}
    if unbounded:
        central["moment"] = upper["moment"] = math.inf
    more = {"remainder": remainder, "kurtosis": worst}
    k = _size(central, radius, tolerance, confidence, **more)
    enough = _size(upper, radius, tolerance, 1 - (delta - share), **more)
    # no pilot helps where what does not fall with k is above the tolerance
    least = math.inf if math.isinf(k) else least_pilot(worst, failure)
    return conclude(k, 1, enough, n, least, terms)
