"""Training anew on the first k examples: freely, and inside one ball."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from utils.hessian import Losses, hessian_norm
from utils.networks.training import stopping_rule, train
from utils.surface.ball import difference_on_ball, onto_ball


def retrain(
    fresh: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    sizes: Sequence[int],
    limit: nn.Module,
    x_test: Tensor,
    y_test: Tensor,
    loss: str = "cross_entropy",
    **options: Any,
) -> pd.DataFrame:
    """Train anew on the first k examples, for each k, by the same rule.

    Each is polished to the gradient norm that the stopping rule asks of the limit,
    0.1 sqrt(tr Sigma_g / n), and not to that of its own k.

    fresh    returns the initial network, the same one at every call
    x        (n, ...) training examples
    y        (n,) labels
    sizes    the k [examples]
    limit    the network trained on all n
    x_test   (m, ...) held-out examples
    y_test   (m,) labels
    loss     its name
    options  of `training.train`

    Returns a row a k: k, excess = L_n(w_k) - L_n(w_n) [nat], held_out, the mean loss at w_k [nat],
    distance = |w_k - w_n|, norm = ||Hess L_k(w_k)|| [nat/w^2], gradient_norm of the objective,
    threshold for it, and converged (is it below).

    >>> x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
    >>> limit = nn.Linear(4, 2)
    >>> options = {"l2": 0.1, "epochs": 1, "batch_size": 2, "polish_steps": 1}
    >>> len(retrain(lambda: nn.Linear(4, 2), x, y, [2, 4], limit, x, y, **options))
    2
    """
    whole = Losses(limit, x, y, loss)
    test = Losses(limit, x_test, y_test, loss)
    threshold = stopping_rule(whole, whole.w)
    rows = []
    for k in sizes:
        network = fresh()
        result = train(network, x[:k], y[:k], loss=loss, threshold=threshold, **options)
        w = Losses(network, x[:k], y[:k], loss).w
        row = {
            "k": k,
            "excess": (whole.values(w).mean() - whole.values().mean()).item(),
            "held_out": test.values(w).mean().item(),
            "distance": (w - whole.w).norm().item(),
            "norm": hessian_norm(network, x[:k], y[:k], loss, tolerance=1e-3).value,
            "gradient_norm": result.gradient_norm,
            "threshold": threshold,
            "converged": result.converged,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def retrain_from_seeds(
    build: Callable[[int], nn.Module],
    seeds: Sequence[int],
    limit: nn.Module,
    converged: bool,
    x: Tensor,
    y: Tensor,
    sizes: Sequence[int],
    x_test: Tensor,
    y_test: Tensor,
    loss: str = "cross_entropy",
    **options: Any,
) -> pd.DataFrame:
    """`retrain` from several initialisations, each with its own limit on all n examples.

    build      returns the initial network of a seed
    seeds      of the initialisations, and of the order of the batches
    limit      the network trained on all n from the first seed; the others are trained here
    converged  whether its training ended by the stopping rule
    x          (n, ...) training examples
    y          (n,) labels
    sizes      the k [examples]
    x_test     (m, ...) held-out examples
    y_test     (m,) labels
    loss       its name
    options    of `training.train`

    Returns the columns of `retrain`, with init (0, 1, ..), limit_converged, and H_n, the norm of
    the Hessian of L_n at the limit [nat/w^2]; empty without sizes.

    >>> x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
    >>> options = {"l2": 0.1, "epochs": 1, "batch_size": 2, "polish_steps": 1}
    >>> make, limit = lambda seed: nn.Linear(4, 2), nn.Linear(4, 2)
    >>> len(retrain_from_seeds(make, [0, 1], limit, True, x, y, [2, 4], x, y, **options))
    4
    """
    tables = []
    for init, seed in enumerate(seeds if sizes else ()):
        if init > 0:
            limit = build(seed)
            converged = train(limit, x, y, loss=loss, seed=seed, **options).converged
        fresh = partial(build, seed)
        table = retrain(fresh, x, y, sizes, limit, x_test, y_test, loss, seed=seed, **options)
        norm = hessian_norm(limit, x, y, loss, tolerance=1e-3).value
        tables.append(table.assign(init=init, limit_converged=converged, H_n=norm))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def projected_descent(
    losses: Losses,
    rows: ArrayLike,
    centre: Tensor,
    radius: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """Weights that projected gradient descent reaches on a mean loss inside a ball.

    Steps are halved until the loss falls by what the projected step promises, and doubled
    afterwards; the loss never rises. The result need not minimise: the gap of (prop:excess-risk)
    is to be stated beside it.

    losses  of n examples, as a function of the P weights
    rows    whose mean loss falls
    centre  (P,)
    radius  of the ball [units of weight]
    steps   at most [1]
    start   (P,); the centre, if there is none

    Returns (P,).

    >>> losses = Losses(nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1]))
    >>> w = projected_descent(losses, [0, 1], losses.w, 0.1, 5)
    >>> (losses.values(w).mean() < losses.values().mean()).item()
    True
    """
    w = centre if start is None else start
    rows = torch.as_tensor(rows)
    length = 1.0
    value, gradient = losses.value_and_gradient(w, rows)
    for _ in range(steps):
        for _ in range(60):
            new = onto_ball(w - length * gradient, centre, radius)
            move = new - w
            new_value, new_gradient = losses.value_and_gradient(new, rows)
            promised = value + gradient @ move + move.square().sum() / (2 * length)
            if new_value <= promised:
                break
            length /= 2
        if new_value >= value:
            break
        w, value, gradient = new, new_value, new_gradient
        length *= 2
    return w


def excess_in_ball(
    losses: Losses,
    order: np.ndarray,
    sizes: Sequence[int],
    radius: float,
    ascent: int,
    descent: int = 40,
) -> pd.DataFrame:
    """Projected training on the first k examples and on all, beside the bound on its excess risk.

    At most twice the largest distance to the limit over the ball, plus the optimisation gap. Both
    points are among those over which the distance is maximised, so here it holds by construction.
    Source: (prop:excess-risk).

    losses   of n examples; its weights are the centre
    order    (n,) integers
    sizes    the k [examples]
    radius   of the ball [units of weight]
    ascent   steps to the largest distance [1]
    descent  steps of training [1]

    Returns a row a k: k, excess [nat], gap [nat], "2 sup + gap" [nat], "|w_k - centre| / R" [1].

    >>> losses = Losses(nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1]))
    >>> table = excess_in_ball(losses, np.array([0, 1]), [1], 0.1, 2)
    >>> (table["excess"] <= table["2 sup + gap"]).all().item()
    True
    """
    n = losses.n
    centre = losses.w

    def trained(rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        w = projected_descent(losses, rows, centre, radius, descent)
        return w, losses.values(w).cpu().numpy()

    _, at_n = trained(np.arange(n))
    table = []
    for k in map(int, sizes):
        first = order[:k]
        w_k, at_k = trained(first)
        on_ball = difference_on_ball(losses, first, order[k:], [radius], steps=ascent)[0]
        points = [abs(v.mean() - v[first].mean()) for v in (at_k, at_n)]
        sup = max((1 - k / n) * on_ball.measured, *points)
        gap = max(0.0, at_k[first].mean() - at_n[first].mean())  # w_n may fit the k better
        row = {"k": k, "excess": at_k.mean() - at_n.mean(), "gap": gap}
        away = (w_k - centre).norm().item() / radius
        table.append(row | {"2 sup + gap": 2 * sup + gap, "|w_k - centre| / R": away})
    return pd.DataFrame(table)
