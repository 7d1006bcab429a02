"""The inequalities over a ball, one row a pair of an order and a k, at one radius.

The searched change stands beside the forms that should exceed it: the published one, ours with the
gradient term, the second-order one, and the one that is proved over the ball.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from utils.bounds import hessian_bounds
from utils.hessian import Losses
from utils.surface.ball import OnBall, difference_on_ball
from utils.surface.intervals import binomial_interval
from utils.surface.neighbourhood import Spreads

TERMS = ("value", "gradient", "curvature", "remainder")
FORMS = ("published", "as printed", "first form", "second form", "with remainder", "proved")


def _entry(on_ball: OnBall, norms_at_centre: float) -> dict[str, float]:
    entry = {"r": on_ball.radius, "measured": on_ball.measured}
    entry |= {f"found {kind}": size for kind, size in on_ball.found.items()}
    entry |= {term: getattr(on_ball, term) for term in TERMS}
    return entry | {
        "published": on_ball.first_form(norms_at_centre, gradient=False),
        "first form": on_ball.first_form(norms_at_centre),
        "second form": on_ball.second_form,
        "with remainder": on_ball.second_form + on_ball.remainder,
    }


def two_questions(order: Sequence[int], k: int) -> dict[str, tuple]:
    """Whose mean losses differ, for the two statements over a ball.

    order  of the pool (n,)
    k      size of the sample [examples]

    Returns by experiment, "ball" (one step) and "distance on ball": the examples that count, and
    those whose mean is taken away.

    >>> two_questions([2, 0, 1], 1)
    {'ball': ([0], [2]), 'distance on ball': ([2], [0, 1])}
    """
    return {
        "ball": (order[k : k + 1], order[:k]),
        "distance on ball": (order[:k], order[k:]),
    }


def pairs_on_balls(
    losses: Losses,
    norms: np.ndarray,
    orders: np.ndarray,
    sizes: Sequence[int],
    fractions: Sequence[float],
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both differences over balls, for each order with the next k of some sizes.

    losses     of n examples, as a function of the weights w0
    norms      (n,) of their Hessians at w0 [nat/w^2]
    orders     (pairs, n) integers
    sizes      the k, taken in turn [examples]
    fractions  radii [fraction of |w0|]
    options    of `difference_on_ball`

    Returns one table for the step (times k + 1), one for the distance (over 1 - k/n), a row a pair
    and radius: k, pair, r [units of weight], fraction, measured, "found" by kind of probe, the
    terms and the forms, with norms at w0 [nat].

    >>> import torch
    >>> losses = Losses(torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1]))
    >>> step, distance = pairs_on_balls(losses, np.ones(2), np.array([[0, 1]]), [1], [0.1])
    >>> len(step), len(distance)
    (1, 1)
    """
    length = losses.w.norm().item()
    radii = [fraction * length for fraction in fractions]
    tables: dict[str, list[dict]] = {"ball": [], "distance on ball": []}
    for pair, order in enumerate(tqdm(orders, "balls", mininterval=5)):
        k = int(sizes[pair % len(sizes)])
        for experiment, (plus, minus) in two_questions(order, k).items():
            at_centre = norms[plus].mean() + norms[minus].mean()
            balls = difference_on_ball(losses, plus, minus, radii, **options)
            for fraction, on_ball in zip(fractions, balls, strict=True):
                entry = {"k": k, "pair": pair, "fraction": fraction}
                tables[experiment].append(entry | _entry(on_ball, at_centre))
    return pd.DataFrame(tables["ball"]), pd.DataFrame(tables["distance on ball"])


def largest_norm_on_ball(model: nn.Module, x: Tensor, y: Tensor, loss: str, radius: float) -> float:
    """Largest Hessian norm of an example on the ball, proved by the activations rung [nat/w^2].

    model   the network
    x       (n, ...) examples
    y       (n,) labels
    loss    its name
    radius  of the ball [units of weight]

    Returns inf where the rung overflows or does not know the network.

    >>> import torch
    >>> x, y = torch.eye(2), torch.tensor([0, 1])  # the Hessian is z z^T, z = (x, 1)
    >>> round(largest_norm_on_ball(torch.nn.Linear(2, 2), x, y, "mse", 0.1), 6)
    2.0
    """
    try:
        with np.errstate(over="ignore"):
            found = hessian_bounds(model, x, y, loss, rung="activations", radius=radius)
    except ValueError:
        return np.inf
    return found.values.max().item()


def violations(table: pd.DataFrame, forms: Iterable[str] = FORMS) -> pd.DataFrame:
    """Where the measured change exceeds a form: a bool a row and form.

    table  with a column `measured` and one a form
    forms  their names

    >>> table = pd.DataFrame({"measured": [1.0, 2.0], "published": [1.5, 1.5]})
    >>> violations(table, ["published"])["published"].tolist()
    [False, True]
    """
    return pd.DataFrame({form: table["measured"] > table[form] * (1 + 1e-9) for form in forms})


def add_distance_forms(
    table: pd.DataFrame, n: int, spread: Spreads, largest: ArrayLike
) -> pd.DataFrame:
    """The distance to the limit beside its worst-case forms [nat].

    Source: (thm:surface-ball), the remainder bounded by (1 - k/n) R^2 times the largest norm.

    table    the second of `pairs_on_balls`
    n        size of the pool [examples]
    spread   of its examples at w0
    largest  (rows,) largest Hessian norm on the ball of each row [nat/w^2]

    Returns the table with `scale` = sqrt(1/k - 1/n), `sup` (found), `B` and `S alone` (without
    remainder), `bound` (proved).

    >>> flat = Spreads(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    >>> table = pd.DataFrame({"k": [1], "r": [0.1], "measured": [1.0]})
    >>> add_distance_forms(table, 2, flat, [0.0])[["sup", "bound"]].round(3).values.tolist()
    [[0.5, 0.707]]
    """
    shrink = 1 - table["k"] / n
    scale = np.sqrt(1 / table["k"] - 1 / n)
    r = table["r"]
    flat = spread.value**0.5 + r * spread.gradient**0.5
    return table.assign(
        scale=scale,
        sup=shrink * table["measured"],
        B=r.map(spread.ball) * scale,
        bound=flat * scale + shrink * r**2 * largest,
    ).assign(**{"S alone": spread.value**0.5 * scale})


def mean_exceeds(table: pd.DataFrame, form: str) -> list[float]:
    """Radii at which the mean excess of the distance over a form is above 0.

    One-sided t tests at 5 % for all radii together, of the excess in units of sqrt(1/k - 1/n).

    table  of `add_distance_forms`, several pairs a radius
    form   its column

    >>> rows = {"sup": [1.0, 1.1], "B": [0.5, 0.5], "scale": 1.0, "fraction": 0.1}
    >>> mean_exceeds(pd.DataFrame(rows), "B")
    [0.1]
    """
    excess = (table["sup"] - table[form]) / table["scale"]
    groups = excess.groupby(table["fraction"])
    pairs = len(table) // groups.ngroups
    quantile = stats.t.ppf(1 - 0.05 / groups.ngroups, pairs - 1)
    low = groups.mean() - quantile * groups.sem()
    return list(low.index[low > 0])


def straying_orders(
    later: np.ndarray, constants: dict[str, float], root: float, deltas: Sequence[float]
) -> pd.DataFrame:
    """Share of orders that leave the tolerance constant sqrt((1/k - 1/n)/delta) at some later k.

    Source: (eq:ball-tail), without its remainder.

    later      (n_orders,) largest |L_k' - L_n| over the ball and over k' >= k [nat]
    constants  by name, in place of B [nat]
    root       sqrt(1/k - 1/n) [1]
    deltas     the shares allowed [1]

    Returns a row a delta: bound, and by constant the tolerance "tau", the "share" and its exact
    binomial interval "low", "high", which hold for all deltas together.

    >>> table = straying_orders(np.array([0.5, 2.0]), {"B": 1.0}, 1.0, [0.5])
    >>> table["share, B"].item()
    0.5
    """
    n_orders = len(later)
    rows = []
    for delta in deltas:
        row = {"bound": delta}
        for name, constant in constants.items():
            tau = constant * root / np.sqrt(delta)
            strays = later > tau
            low, high = binomial_interval(strays.sum(), n_orders, 1 - 0.05 / len(deltas))
            row |= {f"tau, {name}": tau, f"share, {name}": strays.mean()}
            row |= {f"{name}, low": low, f"{name}, high": high}
        rows.append(row)
    return pd.DataFrame(rows)
