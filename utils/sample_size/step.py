"""One more example: after how many can no single one move the mean loss by more than tau?

The step criterion is the papers' quantity, for any order and any example (thm:k-step). The next
criterion asks about one more example of the same kind, with probability 1 - delta
(prop:exchangeable).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from utils.hessian import Losses
from utils.sample_size.answer import conclude


def k_step(losses: ArrayLike, tolerance: float) -> int:
    """The exact worst order at fixed weights: least k with |L_{k'+1} - L_k'| <= tau from k on.

    losses     (n,), of a pool
    tolerance  tau

    For each k' the largest change adds the largest loss to the k' smallest, or the reverse. The
    result is n if even the last step of the pool exceeds tau ("not reached inside the pool").
    Source: (def:k-step), at R = 0.

    >>> k_step([0.0, 0.0, 0.0, 1.0], tolerance=0.3)
    3
    """
    ordered = np.sort(np.asarray(losses, dtype=np.float64))
    k = np.arange(1, len(ordered))
    mean_of_smallest = np.cumsum(ordered)[:-1] / k
    mean_of_largest = np.cumsum(ordered[::-1])[:-1] / k
    rise = ordered[-1] - mean_of_smallest
    fall = mean_of_largest - ordered[0]
    above = np.flatnonzero(np.maximum(rise, fall) / (k + 1) > tolerance)
    return int(above[-1]) + 2 if len(above) else 1


def next_step(scores: ArrayLike, confidence: float) -> float:
    """Q with |L_{k+1} - L_k| <= Q/(k - 1) with the given probability, for exchangeable examples.

    scores      (k,), of losses their distances to the mean
    confidence  1 - delta; inf if k + 1 < 1/delta

    Source: Proposition (prop:exchangeable).

    >>> next_step([0.1, 0.2, 0.3, 0.4], confidence=0.6), next_step([0.1, 0.2], confidence=0.9)
    (0.3, inf)
    """
    scores = np.sort(np.asarray(scores, dtype=np.float64))
    rank = math.ceil(confidence * (len(scores) + 1) - 1e-9)
    return float(scores[rank - 1]) if rank <= len(scores) else math.inf


def gradient_distance(losses: Losses) -> float:
    """max |grad l_i - grad l_j| over the pairs of examples of `losses`.

    >>> from utils.networks import build_model
    >>> network = build_model("mlp", d_in=2, width=2, depth=1, n_classes=3)
    >>> losses = Losses(network, torch.ones(6, 2), torch.zeros(6).long())
    >>> gradient_distance(losses)  # equal examples: equal gradients
    0.0
    """
    gradients = losses.sample_gradients()
    exact = "donot_use_mm_for_euclid_dist"  # the fast way cancels
    return torch.cdist(gradients, gradients, compute_mode=exact).max().item()


def worst_range(
    values: np.ndarray,
    radius: float = 0.0,
    distance: float = 0.0,
    norms: Tensor | None = None,
) -> dict[str, float]:
    """D_R = max|l_i - l_j| + R max|grad_i - grad_j| + R^2 max_i M_i(R), "D", and its parts by name.

    values    losses (n,)
    radius    R
    distance  `gradient_distance`
    norms     bounds (n,) of M_i(R) = sup over the ball of each Hessian's norm; both are needed at R
              > 0 only

    Source: Theorem (thm:k-step).

    >>> worst_range(np.array([0.0, 0.5, 2.0]))["D"]
    2.0
    """
    parts = {"value": float(values.max() - values.min()), "gradient": 0.0, "curvature": 0.0}
    if norms is not None:
        parts["gradient"] = radius * distance
        parts["curvature"] = radius**2 * norms.max().item()
    return parts | {"D": sum(parts.values())}


def next_forecast(values: np.ndarray, tolerance: float, confidence: float) -> dict:
    """The next answer from the losses (n,) of a pilot: the fields of `SampleSize` by name.

    values      losses (n,)
    tolerance   tau
    confidence  1 - delta

    The proposition speaks of the pilot and one more: `upper` is the pilot's size where that step is
    small enough.

    >>> next_forecast(np.linspace(0, 1, 60), 0.1, 0.9)["sentence"]
    'enough: the next sample moves the mean by 0.0079 at most (plug-in k = 6)'
    """
    n = len(values)
    Q = next_step(np.abs(values - values.mean()), confidence)
    least = math.ceil(1 / (1 - confidence) - 1e-9)
    if math.isinf(Q):
        return conclude(math.inf, 1, math.inf, n, least, {"Q": Q})
    step = Q / (n - 1)
    k = 1 + math.ceil(Q / tolerance)
    small = step <= tolerance
    answer = conclude(k, 1, n if small else math.inf, n, least, {"Q": Q})
    verdict = "enough" if small else "cannot tell"
    words = f"the next sample moves the mean by {step:.3g} at most (plug-in k = {k})"
    return answer | {"sentence": f"{verdict}: {words}"}


def step_forecast(
    values: np.ndarray, parts: dict[str, float], ceiling: float, tolerance: float
) -> dict:
    """The step answer from the losses (n,) of a pilot: the fields of `SampleSize` by name.

    values     losses (n,)
    parts      of `worst_range`
    ceiling    of the loss of any example at any weights of the ball, inf if none is known
    tolerance  tau

    Source: Theorem (thm:k-step).

    >>> values = np.linspace(0, 1, 60)
    >>> step_forecast(values, worst_range(values), ceiling=4.0, tolerance=0.1)["sentence"]
    'enough: no sample can move the surface by 0.1 after 39'
    """
    n = len(values)
    k = max(1, math.ceil(parts["D"] / tolerance) - 1)
    lower = k_step(values, tolerance)
    if math.isinf(ceiling):
        answer = conclude(k, lower, math.inf, n, math.inf, parts | {"ceiling": ceiling})
        inside = f"{k} inside it" if k < n else "not reached inside it"
        words = f"cannot tell beyond this pilot ({inside}): the loss has no known ceiling"
        return answer | {"sentence": words}
    upper = max(1, math.ceil(ceiling / tolerance) - 1)
    answer = conclude(k, lower, upper, n, math.inf, parts | {"ceiling": ceiling})
    if upper <= n:
        words = f"enough: no sample can move the surface by {tolerance} after {upper}"
        answer |= {"sentence": words}
    return answer
