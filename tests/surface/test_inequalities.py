"""Pairs of an order and a k over balls, and the inequalities that should hold there."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from utils.hessian import per_sample_hessian_norms
from utils.surface.ball import difference_on_ball
from utils.surface.inequalities import (
    FORMS,
    add_distance_forms,
    largest_norm_on_ball,
    mean_exceeds,
    pairs_on_balls,
    straying_orders,
    two_questions,
    violations,
)
from utils.surface.neighbourhood import Spreads, spreads
from utils.surface.orders import random_orders


@pytest.fixture(scope="module")
def pairs(linear_losses):
    """A linear network's losses, two orders, and both tables."""
    losses, orders = linear_losses(12), random_orders(12, 2, seed=1)
    inputs = losses.model, losses.x, losses.y, losses.loss
    norms = per_sample_hessian_norms(*inputs).value.numpy()
    tables = pairs_on_balls(losses, norms, orders, [3, 6], [0.01, 0.1], steps=3)
    return losses, norms, orders, tables


def test_each_pair_has_its_own_k_and_both_questions(pairs):
    losses, norms, orders, (step, distance) = pairs
    assert list(step["k"]) == [3, 3, 6, 6] and list(step["fraction"]) == [0.01, 0.1] * 2
    for table, name in ((step, "ball"), (distance, "distance on ball")):
        plus, minus = two_questions(orders[1], 6)[name]
        radius = 0.1 * losses.w.norm().item()
        expected = difference_on_ball(losses, plus, minus, [0.1 * radius, radius], steps=3)[1]
        row = table.iloc[3]
        assert row["measured"] == expected.measured and row["r"] == expected.radius
        assert row["second form"] == expected.second_form
        at_centre = norms[plus].mean() + norms[minus].mean()
        assert row["published"] == expected.first_form(at_centre, gradient=False)
        assert row["with remainder"] == expected.second_form + expected.remainder


def test_a_quadratic_model_violates_no_form_with_its_gradient(pairs):
    step = pairs[-1][0]
    found = violations(step, ["published", "first form", "second form", "with remainder"])
    assert found["published"].any()  # the control: without the gradient term it fails
    assert not found[["first form", "second form", "with remainder"]].any(axis=None)
    assert FORMS[-1] == "proved"


def test_the_distance_beside_its_worst_case(pairs):
    losses, norms, _, (_, distance) = pairs
    spread = spreads(losses, basis=torch.eye(losses.P, dtype=torch.float64))
    table = add_distance_forms(distance, 12, spread, norms.max())
    scale = np.sqrt(1 / table["k"] - 1 / 12)
    np.testing.assert_allclose(table["B"], [spread.ball(r) for r in table["r"]] * scale)
    np.testing.assert_allclose(table["sup"], (1 - table["k"] / 12) * table["measured"])
    remainder = (1 - table["k"] / 12) * table["r"] ** 2 * norms.max()
    flat = (spread.value**0.5 + table["r"] * spread.gradient**0.5) * scale
    np.testing.assert_allclose(table["bound"], flat + remainder)
    assert table["S alone"].tolist() == (spread.value**0.5 * scale).tolist()


def test_the_mean_over_pairs_is_what_exceeds():
    """One-sided t test at 5 % over all radii together."""
    excess = np.array([0.5, -0.1, 0.4, 0.6])
    rows = {"fraction": 0.1, "sup": 1 + excess, "B": 1.0, "scale": 0.5}
    table = pd.DataFrame(rows)
    calm = table.assign(fraction=1.0, sup=[2.0, 0.0, 2.0, 0.0])
    pvalue = stats.ttest_1samp(excess, 0, alternative="greater").pvalue
    assert (mean_exceeds(table, "B") == [0.1]) == (pvalue < 0.05)
    assert mean_exceeds(pd.concat([table, calm]), "B") == ([0.1] if pvalue < 0.025 else [])
    assert mean_exceeds(table.assign(B=3.0), "B") == []


def test_straying_orders():
    later = np.array([0.1, 0.5, 0.9, 3.0])
    table = straying_orders(later, {"B": 1.0, "S alone": 0.2}, 0.5, (0.5, 0.25))
    np.testing.assert_allclose(table["tau, B"], [0.5 / np.sqrt(0.5), 1.0])
    assert list(table["share, B"]) == [0.5, 0.25]
    assert list(table["share, S alone"]) == [0.75, 0.75]
    interval = stats.binomtest(2, 4).proportion_ci(1 - 0.05 / 2, "exact")
    assert tuple(table.loc[0, ["B, low", "B, high"]]) == tuple(interval)


class Running(nn.Module):
    """An operator that no bound knows."""

    def forward(self, z):
        return z.exp().cumprod(-1)


def test_the_largest_norm_on_a_ball_is_a_bound_or_infinite(vit_losses):
    losses = vit_losses(6)
    inputs = losses.model, losses.x, losses.y, losses.loss
    exact = per_sample_hessian_norms(*inputs).value.max()
    found = [largest_norm_on_ball(*inputs, r) for r in (0.0, 0.1)]
    assert exact <= found[0] <= found[1] < np.inf
    unknown = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), Running())
    assert largest_norm_on_ball(unknown, *inputs[1:], 0.1) == np.inf


def test_flat_losses_have_no_worst_case():
    flat = Spreads(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    table = pd.DataFrame({"k": [1, 2], "r": [0.1, 0.1], "measured": [0.0, 0.0]})
    assert (add_distance_forms(table, 4, flat, 0.0)[["sup", "B", "bound"]] == 0).all(axis=None)
