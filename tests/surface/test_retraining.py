"""Training anew, freely and inside a ball."""

import numpy as np
import pandas as pd
import pytest
import torch
from networks import tiny_vit

from utils.hessian import Losses
from utils.hessian.derivatives import dense_hessian
from utils.networks.training import stopping_rule, train
from utils.surface.ball import difference_on_ball
from utils.surface.retraining import excess_in_ball, projected_descent, retrain, retrain_from_seeds


def fresh():
    return tiny_vit(5).float()


@pytest.mark.slow
def test_retraining_is_training_to_the_stationarity_of_the_limit():
    torch.manual_seed(0)
    x, y = torch.randn(30, 1, 4, 4), torch.randint(0, 3, (30,))
    options = {"l2": 0.1, "epochs": 3, "batch_size": 8, "polish_steps": 60, "seed": 2}
    limit, whole = fresh(), fresh()
    train(limit, x, y, **options)
    rule = stopping_rule(Losses(limit, x, y), Losses(limit, x, y).w)
    done = train(whole, x, y, threshold=rule, **options)
    assert done.converged and done.threshold == rule and done.gradient_norm <= rule
    table = retrain(fresh, x, y, [10, 30], limit, x[:5], y[:5], **options)
    part, all_of_it = table.iloc[0], table.iloc[1]
    assert list(table.columns) == [
        "k",
        "excess",
        "held_out",
        "distance",
        "norm",
        "gradient_norm",
        "threshold",
        "converged",
    ]
    assert (table["threshold"] == rule).all()
    assert (table["converged"] == (table["gradient_norm"] <= rule)).all() and bool(
        all_of_it["converged"]
    )
    means = [Losses(network, x, y).values().mean().item() for network in (whole, limit)]
    assert all_of_it["excess"] == pytest.approx(means[0] - means[1], rel=1e-12)
    w, w_limit = (Losses(network, x, y).w for network in (whole, limit))
    assert (
        all_of_it["distance"] == (w - w_limit).norm().item()
        and all_of_it["gradient_norm"] == done.gradient_norm
    )
    exact = torch.linalg.eigvalsh(dense_hessian(whole, x, y)).abs().max().item()
    assert all_of_it["norm"] == pytest.approx(exact, rel=1e-3)
    assert all_of_it["held_out"] == pytest.approx(
        Losses(whole, x[:5], y[:5]).values().mean().item(), rel=1e-12
    )
    assert part["distance"] > 0 and part["excess"] > 0


@pytest.mark.parametrize("radius", [0.05, 0.5, 50.0])
def test_projected_descent_solves_least_squares_in_a_ball(linear_losses, radius):
    losses = linear_losses(20)
    centre, rows = losses.w, torch.arange(12)
    w = projected_descent(losses, rows, centre, radius, 3000)
    gradient = losses.gradient(w, rows)
    d = w - centre
    assert d.norm() <= radius * (1 + 1e-12)
    if d.norm() < radius * (1 - 1e-9):  # inside: stationary
        assert gradient.norm() < 1e-5
    else:  # on the sphere: the negative gradient points outwards
        torch.testing.assert_close(-gradient / gradient.norm(), d / d.norm(), atol=1e-4, rtol=0)
    value = losses.values(w, rows).mean()
    assert value <= losses.values(centre, rows).mean()
    again = projected_descent(losses, rows, centre, radius, 50, start=w)
    assert losses.values(again, rows).mean() <= value  # it never rises


def test_excess_risk_over_a_ball(linear_losses):
    """Least squares in a ball, where descent finds the minimisers: the excess is below twice a
    supremum found apart."""
    losses = linear_losses(12)
    w_n = projected_descent(losses, torch.arange(12), losses.w, 0.5, 3000)
    for rows in map(torch.tensor, ([0, 1, 2], [3, 7, 9, 11], [0, 2, 4, 6, 8, 10], [1, 5])):
        others = torch.tensor([i for i in range(12) if i not in rows])
        w_k = projected_descent(losses, rows, losses.w, 0.5, 3000)
        assert losses.values(w_k, rows).mean() <= losses.values(w_n, rows).mean() + 1e-9  # no gap
        sup = difference_on_ball(losses, rows, others, [0.5], steps=30)[0].measured * (
            1 - len(rows) / 12
        )
        excess = (losses.values(w_k) - losses.values(w_n)).mean().item()
        assert -1e-9 <= excess <= 2 * sup + 1e-9 and excess > 0.01 * sup


@pytest.mark.slow
def test_retraining_from_several_initialisations():
    torch.manual_seed(0)
    x, y = torch.randn(12, 1, 4, 4), torch.randint(0, 3, (12,))
    options = {"l2": 0.1, "epochs": 1, "batch_size": 6, "polish_steps": 2}
    inputs = x, y, [4, 8], x[:5], y[:5], "cross_entropy"
    limit = fresh()
    table = retrain_from_seeds(lambda seed: fresh(), [3, 4], limit, True, *inputs, **options)
    assert list(table["init"]) == [0, 0, 1, 1] and list(table["k"]) == [4, 8, 4, 8]
    first = retrain(fresh, x, y, [4, 8], limit, x[:5], y[:5], seed=3, **options)
    pd.testing.assert_frame_equal(table.iloc[:2][list(first)], first)
    assert table["limit_converged"].iloc[:2].all() and table["H_n"].nunique() == 2
    none = x, y, [], x[:5], y[:5]
    assert retrain_from_seeds(lambda seed: fresh(), [3], limit, True, *none, **options).empty


def test_the_excess_in_a_ball_beside_its_bound(linear_losses):
    losses = linear_losses(12)
    order = np.random.default_rng(0).permutation(12)
    table = excess_in_ball(losses, order, [3, 8], 0.5, ascent=10)
    assert list(table["k"]) == [3, 8] and (table["excess"] <= table["2 sup + gap"]).all()
    assert (table["|w_k - centre| / R"] <= 1 + 1e-12).all() and (table["gap"] >= 0).all()
