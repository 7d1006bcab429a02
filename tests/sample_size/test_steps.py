"""One more example: the worst order by enumeration, the worst range by pairs, coverage."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import linear_pilot, vit_pilot
from refusal import refused
from torch import nn

from utils.bounds import hessian_bounds, loss_upper_bound
from utils.hessian import Losses, per_sample_gradients
from utils.sample_size import pilot, required_samples
from utils.sample_size.step import gradient_distance, k_step, next_step, worst_range
from utils.surface.probes import neighbourhood, probe_losses


class Summed(nn.Module):
    """With an operator that no bound knows."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x).exp().cumsum(-1).cumprod(-1)


FRACTIONS = st.integers(-1000, 1000).map(lambda i: i / 64)
NUMBERS = st.one_of(FRACTIONS, st.sampled_from([0.0, 1.0, -1.0]))


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(NUMBERS, min_size=2, max_size=6), st.sampled_from([0.01, 0.3, 1.0, 4.0]))
@example([0.0, 0.0, 0.0, 1.0], 0.25)
@example([1.0, 1.0, 0.0, 1.0], 0.2)
@example([2.0, 2.0], 0.1)
def test_k_step_by_enumeration(pool, tolerance):
    """Every order of the pool: k is enough, k - 1 is not, n means not reached inside it."""
    exact = [Fraction(l) for l in pool]
    n, limit, worst = len(pool), Fraction(tolerance), {}
    for order in itertools.permutations(exact):
        mean = [sum(order[:k]) / k for k in range(1, n + 1)]
        for k in range(1, n):
            worst[k] = max(worst.get(k, Fraction(0)), abs(mean[k] - mean[k - 1]))
    if any(abs(w - limit) < Fraction(1, 10**9) for w in worst.values()):
        limit += Fraction(1, 10**6)  # not on the edge: rounding would decide
        tolerance += 1e-6
    brute = next(k for k in range(1, n + 1) if all(worst[j] <= limit for j in range(k, n)))
    assert k_step(pool, tolerance) == brute
    assert k_step(np.array(pool), 1e9) == 1


def test_next_step_covers():
    """(prop:exchangeable): the step to one more example, at its promise, and its answer."""
    generator, inside = np.random.default_rng(7), 0
    for _ in range(1000):
        l = generator.exponential(size=41)
        inside += (
            abs(l.mean() - l[:40].mean()) <= next_step(np.abs(l[:40] - l[:40].mean()), 0.8) / 39
        )
    assert inside >= 760  # 3 standard errors of 0.8
    assert next_step(np.ones(8), 0.9) == math.inf and next_step(np.ones(9), 0.9) == 1.0
    model, x, y = linear_pilot(60)
    found = required_samples(model, x, y, 0.5, criterion="next", confidence=0.9)
    assert found.verdict == "enough" and found.upper == 60
    assert (
        required_samples(model, x, y, 1e-3, criterion="next", confidence=0.9).verdict
        == "cannot tell"
    )
    few = required_samples(model, x[:5], y[:5], 0.5, criterion="next", confidence=0.9)
    assert few.verdict == "cannot tell" and "at least 5 more" in few.sentence


def range_at(model, x, y, radius):
    measured = pilot(model, x, y)
    if radius == 0:
        return worst_range(measured.values)
    norms = measured.hessian_norms("prior", radius)
    return worst_range(measured.values, radius, gradient_distance(measured.losses), norms)


@pytest.mark.parametrize("radius", [0.0, 0.02])
def test_worst_range_by_pairs(radius):
    model, x, y = vit_pilot()
    losses = Losses(model, x, y)
    values, g = losses.values(), per_sample_gradients(model, x, y)
    parts = range_at(model, x, y, radius)
    pairs = list(itertools.combinations(range(12), 2))
    assert parts["value"] == pytest.approx(
        max(abs(float(values[i] - values[j])) for i, j in pairs), rel=1e-12
    )
    assert parts["gradient"] == pytest.approx(
        radius * max(float((g[i] - g[j]).norm()) for i, j in pairs), rel=1e-9
    )
    if radius == 0:
        assert parts["gradient"] == parts["curvature"] == 0
    else:
        prior = hessian_bounds(model, x, y, rung="prior", radius=radius).values
        assert parts["curvature"] == pytest.approx(radius**2 * float(prior.max()), rel=1e-12)
    assert parts["D"] == pytest.approx(
        parts["value"] + parts["gradient"] + parts["curvature"], rel=1e-12
    )
    # what it bounds: (k+1)|L_{k+1} - L_k| at any weights of the ball, for any order
    for row in probe_losses(losses, neighbourhood(losses.w, radius, 20)):
        assert np.ptp(row) <= parts["D"]
    if radius:
        _, x, y = linear_pilot(6)
        refused(lambda: pilot(Summed(), x, y).step(1.0, radius=radius), "exp of the network")


def test_worst_range_of_nearly_equal_gradients():
    """Gradients far from zero that differ little: their distance is not lost to cancellation."""
    g = 1e6 + 1e-3 * torch.randn(
        40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    losses = SimpleNamespace(sample_gradients=lambda: g)
    exact = max(float((a - b).norm()) for a, b in itertools.combinations(g, 2))
    assert gradient_distance(losses) == pytest.approx(exact, rel=1e-6)


def test_step_verdicts_and_ceiling():
    model, x, y = vit_pilot(60)
    losses = Losses(model, x, y)
    values = losses.values().numpy()
    for radius in (0.0, 0.01):
        ceiling, D = loss_upper_bound(model, radius), range_at(model, x, y, radius)["D"]
        for tau, verdict in ((1.0, "enough"), (0.01, "need")):
            found = required_samples(model, x, y, tau, radius, criterion="step")
            assert found.verdict == verdict
            assert found.k == max(1, math.ceil(D / tau) - 1) and found.lower == k_step(values, tau)
            assert (
                found.upper == max(1, math.ceil(ceiling / tau) - 1)
                and found.terms["ceiling"] == ceiling
            )
            assert (found.upper <= 60) == (verdict == "enough")
            assert found.lower <= max(found.k, 1)
    # a module without a known ceiling, and a loss without one: nothing is said beyond the pilot
    linear, u, v = linear_pilot(60)
    for found in (
        required_samples(linear, u, v, 1.0, criterion="step"),
        required_samples(model, x, y, 1.0, criterion="step", loss="mse"),
    ):
        assert found.verdict == "cannot tell" and found.upper == found.terms["ceiling"] == math.inf
        assert found.k < math.inf
    refused(
        lambda: required_samples(Summed(), u, v, 1.0, radius=0.1, criterion="step"),
        "exp of the network",
    )


def test_upper_end_of_the_step_holds_for_samples_not_in_the_pilot():
    """Large logits: no image moves the mean of k images by more than ceiling / (k + 1)."""
    model, x, y = vit_pilot(30, seed=2, pool="mean")
    with torch.no_grad():
        model.head.weight *= 8
    new, labels = 50 * torch.randn(500, 1, 4, 4), torch.arange(500) % 3
    tau = 0.5
    found = required_samples(model, x, y, tau, criterion="step")
    values = Losses(model, new, labels).values().numpy()
    assert k_step(values, tau) <= found.upper
    assert k_step(values, tau) > found.k  # the pilot's own answer does not hold beyond it
