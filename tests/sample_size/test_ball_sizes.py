"""Sizes for a ball: formulas, spreads of gradients and Hessians, promises by simulation."""

import math

import numpy as np
import pytest
import torch
from networks import linear_pilot, vit_pilot

from utils.bounds import hessian_bounds
from utils.hessian import Losses, per_sample_gradients
from utils.sample_size import k_surface, pilot, required_samples
from utils.sample_size.ball import ball_forecast, curvature_moments, gradient_moments, k_ball
from utils.surface.probes import neighbourhood, probe_losses


def test_ball_sizes_by_formula():
    assert (
        k_ball(2.0, 0.1, 0.9)
        == k_surface(4.0, 0.1, 0.9)
        == math.ceil(4 / (0.1 * 0.01) * (1 - 1e-12))
    )
    assert k_ball(2.0, 0.1, 0.9, kurtosis=20.0) == k_surface(4.0, 0.1, 0.9, kurtosis=20.0)
    assert k_ball(2.0, 0.1, 0.9, remainder=0.04) == k_surface(4.0, 0.06, 0.9)
    moment = 0.5 * math.sqrt(0.1) * 0.1
    k = k_ball(2.0, 0.1, 0.9, moment=moment, kurtosis=20.0)
    assert (
        (2 / math.sqrt(k) + moment) ** 2 / 0.01 <= 0.1 < (2 / math.sqrt(k - 2) + moment) ** 2 / 0.01
    )
    assert k_ball(2.0, 0.1, 0.9, remainder=0.1) == k_ball(2.0, 0.1, 0.9, moment=0.04) == math.inf


def test_ball_moments_are_the_spreads():
    """Unbiased for the pilot's covariances: gradients exactly, Hessians over many pairings."""
    model, x, y = linear_pilot(12)
    losses = Losses(model, x, y)
    g = per_sample_gradients(model, x, y)
    assert gradient_moments(losses)[0] == pytest.approx(float(g.var(0).sum()), rel=1e-10)
    units = torch.eye(losses.P, dtype=torch.float64)
    H = torch.stack([losses.sample_products(e.expand(12, -1)) for e in units], 2)  # (n, P, P)
    means = [curvature_moments(losses, seed)[0] for seed in range(400)]
    error = np.std(means) / math.sqrt(400)
    assert abs(np.mean(means) - float(H.var(0).sum())) <= 4 * error


def test_ball_and_excess_answers():
    """Twice the tolerance and a gap: the excess size is the ball's at half of what is left."""
    model, x, y = linear_pilot(400)
    ball = required_samples(model, x, y, 0.1, 0.05, 0.9, "ball", seed=2)
    excess = required_samples(model, x, y, 0.25, 0.05, 0.9, "excess", gap=0.05, seed=2)
    assert (excess.k, excess.upper) == (ball.k, ball.upper) and "second order" in ball.statement
    assert ball.upper >= ball.k > required_samples(model, x, y, 0.1, 0.0, 0.9).k
    assert (
        required_samples(model, x, y, 0.1, 0.05, 0.9, "ball", remainder=0.02, seed=2).upper
        > ball.upper
    )
    assert (
        required_samples(model, x, y, 0.1, 0.05, 0.9, "ball", remainder=0.1).verdict
        == "cannot tell"
    )
    assert required_samples(model, x, y, 0.1, 0.05, 0.9, "excess", gap=0.1).verdict == "cannot tell"
    # by a rung: no remainder, a term that does not fall
    vit, u, v = vit_pilot(300, eps=0.1)
    sure = required_samples(vit, u, v, 1.0, 1e-4, 0.9, "ball", rung="activations")
    M = hessian_bounds(vit, u, v, rung="activations", radius=1e-4).values
    assert sure.terms["moment"] == pytest.approx(float(M.square().mean().sqrt()), rel=1e-9)
    assert "second order" not in sure.statement and sure.upper < math.inf
    assert (
        required_samples(vit, u, v, 1e-3, 1.0, 0.9, "ball", rung="prior").verdict == "cannot tell"
    )


def test_a_ball_answer_is_enough():
    """Logistic regression on a ball: after k samples the sup strays as rarely as promised."""
    model, x, y = linear_pilot(400)
    losses, tau, R = Losses(model, x, y), 0.3, 0.1
    k = required_samples(model, x, y, tau, R, 0.8, "ball").upper
    generator, probes = torch.Generator().manual_seed(0), neighbourhood(losses.w, R, 40)
    values = probe_losses(losses, probes)
    strays = 0
    for _ in range(200):
        rows = torch.randint(400, (int(k),), generator=generator).numpy()
        strays += np.abs(values[:, rows].mean(1) - values.mean(1)).max() > tau
    assert strays <= 0.2 * 200


@pytest.mark.parametrize("scale", [1e100, 1e200])
def test_a_bound_whose_square_is_no_double_still_gives_an_answer(scale):
    model, x, y = linear_pilot(400)
    measured = pilot(model, x, y)
    values = {"S": (float(measured.values.var(ddof=1)), 1.0), "gradient": (1.0, 2.0)}
    drawn = 1 + torch.rand(len(x), dtype=torch.float64)
    sure = ball_forecast(values, len(x), 1.0, 1e-4, 0.9, norms=scale * drawn)
    root = float(drawn.square().mean().sqrt())
    assert sure["terms"]["moment"] == pytest.approx(scale * root, rel=1e-12)
    assert math.isfinite(sure["terms"]["moment_upper"])
    assert sure["verdict"] == "cannot tell" and math.isinf(sure["k"])
    no_bound = ball_forecast(values, len(x), 1.0, 1e-4, 0.9, norms=math.inf * drawn)
    assert "moment" not in no_bound["terms"] and math.isinf(no_bound["k"])
