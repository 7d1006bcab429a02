"""Sample sizes: formulas by brute force, the probability statements by simulation, each verdict and its label."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusal import refused
from scipy.stats import beta, norm
from torch import nn

from utils.bounds import hessian_norm_bounds, loss_upper_bound
from utils.convergence import random_orders
from utils.curvature import Losses, per_sample_gradients
from utils.models import build_model
from utils.sample_size import (
    exceedance,
    k_step,
    k_surface,
    neighbourhood,
    probe_losses,
    required_samples,
    spread_limits,
    worst_range,
)

NUMBERS = st.one_of(st.integers(-1000, 1000).map(lambda i: i / 64), st.sampled_from([0.0, 1.0, -1.0]))


class Linear(nn.Module):
    def __init__(self, n_classes=3):
        super().__init__()
        self.head = nn.Linear(5, n_classes)

    def forward(self, x):
        return self.head(x)


def linear_pilot(n=60, seed=0):
    torch.manual_seed(seed)
    return Linear(), torch.randn(n, 5), torch.randint(0, 3, (n,))


def tiny_vit(n=12, seed=0, **sizes):
    torch.manual_seed(seed)
    small = dict(image_size=4, channels=1, patch_size=2, n_classes=3, depth=1, n_heads=2, d_model=4, d_ff=4, eps=0.1)
    return build_model("vit", **(small | sizes)), torch.randn(n, 1, 4, 4), torch.randint(0, 3, (n,))


# --- k_step and k_surface -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(NUMBERS, min_size=2, max_size=6), st.sampled_from([0.01, 0.3, 1.0, 4.0]))
@example([0.0, 0.0, 0.0, 1.0], 0.25)
@example([1.0, 1.0, 0.0, 1.0], 0.2)
@example([2.0, 2.0], 0.1)
def test_k_step_by_enumeration(pool, tolerance):
    """Every order of the pool: k is enough, k - 1 is not, and n means not reached inside the pool."""
    exact = [Fraction(l) for l in pool]
    n, limit, worst = len(pool), Fraction(tolerance), {}
    for order in itertools.permutations(exact):
        mean = [sum(order[:k]) / k for k in range(1, n + 1)]
        for k in range(1, n):
            worst[k] = max(worst.get(k, Fraction(0)), abs(mean[k] - mean[k - 1]))
    if any(abs(w - limit) < Fraction(1, 10**9) for w in worst.values()):
        limit, tolerance = limit + Fraction(1, 10**6), tolerance + 1e-6  # not on the edge: rounding would decide
    brute = next(k for k in range(1, n + 1) if all(worst[j] <= limit for j in range(k, n)))
    assert k_step(pool, tolerance) == brute
    assert k_step(np.array(pool), 1e9) == 1


def test_k_surface_formula():
    for variance, tau, confidence, n in [(0.4, 0.05, 0.95, math.inf), (3.0, 0.1, 0.9, 500), (1e-3, 0.5, 0.99, 20)]:
        rate = 1 / Fraction(n) if n < math.inf else Fraction(0)
        exact = 1 / (rate + (1 - Fraction(confidence)) * Fraction(tau) ** 2 / Fraction(variance))
        assert k_surface(variance, tau, confidence, n) == max(1, math.ceil(exact))
    assert k_surface(0.0, 0.1, 0.95) == k_surface(0.0, 0.1, 0.95, 7) == 1
    assert k_surface(math.inf, 0.1, 0.95) == math.inf
    assert k_surface(1e9, 1e-9, 0.95, 33) == k_surface(math.inf, 0.1, 0.95, 33) == 33
    # the whole pool is always enough: rounding never asks for more than there are
    assert all(k_surface(1e30, 1e-3, 0.95, n) <= n for n in range(1, 3000))


@given(
    st.floats(1e-3, 1e3),
    st.floats(1e-2, 10),
    st.floats(0.5, 0.999),
    st.one_of(st.just(math.inf), st.integers(1, 10**6)),
)
def test_k_surface_is_monotone(variance, tau, confidence, n):
    k = k_surface(variance, tau, confidence, n)
    assert 1 <= k <= n
    assert k_surface(2 * variance, tau, confidence, n) >= k
    assert k_surface(variance, 2 * tau, confidence, n) <= k
    assert k_surface(variance, tau, 1 - (1 - confidence) / 2, n) >= k
    assert k_surface(variance, tau, confidence, 2 * n) >= k
    # enough by the theorem, and one fewer is not
    bound = (1 / k - 1 / n) * variance / tau**2
    assert bound <= (1 - confidence) * (1 + 1e-9)
    if k > 1:
        assert (1 / (k - 1) - 1 / n) * variance / tau**2 >= (1 - confidence) * (1 - 1e-9)


POOLS = {
    "normal": lambda g: g.normal(size=(1, 300)),
    "lognormal": lambda g: g.lognormal(sigma=1.5, size=(1, 300)),
    "cauchy": lambda g: np.abs(g.standard_cauchy((1, 300))),
    "one-spike": lambda g: np.eye(1, 300) * 40.0,
    "probes": lambda g: g.lognormal(sigma=1.0, size=(1, 300)) * g.uniform(0.2, 2, (5, 1)) + g.normal(size=(5, 300)),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("confidence", [0.7, 0.95])
def test_enough_is_enough(name, confidence):
    """Theorem (thm:neighbourhood), simulated: from k_surface on, few orders ever leave the tolerance again."""
    values = POOLS[name](np.random.default_rng(2))
    variance, n = values.var(1, ddof=1).mean(), values.shape[1]
    orders = random_orders(n, 3000, seed=8)
    for fraction in (0.1, 0.3):
        tau = fraction * math.sqrt(variance)
        k = k_surface(variance, tau, confidence, n)
        share, low, high = exceedance(values, k, tau, orders)
        assert low <= share <= high and share <= 1 - confidence
        assert k < n  # or nothing would have been tested


def test_one_step_rule_is_not_enough():
    """The control: k = S/tau, where single steps fall below tau, leaves the tolerance in most orders."""
    values = POOLS["normal"](np.random.default_rng(2))
    S, orders = math.sqrt(values.var(1, ddof=1).mean()), random_orders(300, 1000, seed=8)
    for tau in (0.1 * S, 0.05 * S):
        _, low, _ = exceedance(values, math.ceil(S / tau), tau, orders)
        assert low > 0.3
        assert exceedance(values, k_surface(S**2, tau, 0.7, 300), tau, orders)[0] < 0.3


def test_exceedance_by_hand():
    """Z_k' is the root mean square over the probes; the event is about every k' >= k; the interval is the exact one."""
    values = np.array([[0.0, 1.0, 2.0, 5.0], [1.0, 1.0, 0.0, -2.0]])
    orders = np.array(list(itertools.permutations(range(4))))
    for k in (1, 2, 3, 4):
        for tau in (0.2, 0.9, 1.6):
            hits = 0
            for order in orders:
                Z = [
                    math.sqrt(np.mean([(row[order[:j]].mean() - row.mean()) ** 2 for row in values]))
                    for j in range(k, 5)
                ]
                hits += max(Z) > tau
            share, low, high = exceedance(values, k, tau, orders)
            assert share == hits / 24
            assert low == (beta.ppf(0.025, hits, 25 - hits) if hits else 0.0)
            assert high == (beta.ppf(0.975, hits + 1, 24 - hits) if hits < 24 else 1.0)
    assert exceedance(values, 4, 1e-9, orders) == (0.0, 0.0, beta.ppf(0.975, 1, 24))
    assert exceedance(values[0], 1, 1e-9, orders)[0] == 1.0  # one probe as a plain row; no order starts at the mean


# --- the pilot ------------------------------------------------------------------------------------------


def lognormal_kurtosis(sigma):
    """E Y^2 / (E Y)^2 of Y = (l - l')^2/2 for two independent lognormal losses."""
    m = [math.exp(k * k * sigma * sigma / 2) for k in range(5)]
    return (2 * m[4] - 8 * m[3] * m[1] + 6 * m[2] ** 2) / 4 / (m[2] - m[1] ** 2) ** 2


def spike_kurtosis(p):
    return 1 / (2 * p * (1 - p))


DISTRIBUTIONS = {
    "normal": (lambda g, n: g.normal(size=n), 3.0, 1.0),
    "lognormal": (
        lambda g, n: g.lognormal(sigma=0.4, size=n),
        lognormal_kurtosis(0.4),
        math.exp(0.16) * (math.exp(0.16) - 1),
    ),
    "spikes": (lambda g, n: (g.uniform(size=n) < 0.05).astype(float), spike_kurtosis(0.05), 0.05 * 0.95),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("failure", [0.1, 0.025])
def test_limits_cover(name, failure):
    """Proposition (prop:pilot), simulated: with a true kurtosis each limit fails at most as often as it says."""
    draw, kurtosis, variance = DISTRIBUTIONS[name]
    generator, n, finite = np.random.default_rng(6), 1000, 0
    above = below = 0
    for i in range(n):
        found = spread_limits(draw(generator, 400), kurtosis, failure, seed=i)
        assert found.lower <= found.estimate <= found.upper and found.pairs == 200
        above, below = above + (found.lower > variance), below + (found.upper < variance)
        finite += math.isfinite(found.upper)
    assert above / n <= failure and below / n <= failure
    assert finite > 0.9 * n


def test_limits_need_their_assumption():
    """The control: rare spikes, which most pilots do not contain, and an assumed kurtosis far below the true one."""
    generator, p, below = np.random.default_rng(6), 0.001, 0
    for i in range(200):
        losses = (generator.uniform(size=400) < p) + 1e-3 * generator.normal(size=400)
        below += spread_limits(losses, 3.0, 0.025, seed=i).upper < p * (1 - p)
    assert below > 0.3 * 200
    assert spread_limits(losses, spike_kurtosis(p), 0.025).upper == math.inf  # the true one: no pilot of 400 can tell


def test_limits_by_formula():
    generator = np.random.default_rng(0)
    losses, failure, kurtosis = generator.normal(size=(3, 501)), 0.03, 30.0
    found = spread_limits(losses, kurtosis, failure, seed=5)
    order = np.random.default_rng([5, 13]).permutation(501)
    Y = [np.mean([(row[order[j]] - row[order[250 + j]]) ** 2 / 2 for row in losses]) for j in range(250)]
    mean = math.fsum(Y) / 250
    assert found.pairs == 250 and found.kurtosis == kurtosis
    assert found.estimate == pytest.approx(mean, rel=1e-12)
    assert found.observed_kurtosis == pytest.approx(np.mean(np.square(Y)) / mean**2, rel=1e-12)
    assert found.upper == pytest.approx(mean / (1 - math.sqrt(2 * 30 * math.log(1 / 0.03) / 250)), rel=1e-12)
    assert found.lower == pytest.approx(mean / (1 + math.sqrt(29 * (1 / 0.03 - 1) / 250)), rel=1e-12)
    assert found == spread_limits(losses, kurtosis, failure, seed=5)
    assert found != spread_limits(losses, kurtosis, failure, seed=6)
    # few pairs: the upper end is infinite and the lower one stands
    few = spread_limits(losses[:, :60], kurtosis, failure)
    assert few.upper == math.inf and 0 < few.lower < few.estimate
    # a pilot whose own ratio is larger contradicts the assumption
    spiked = np.zeros(400)
    spiked[:4] = 10.0
    heavy = spread_limits(spiked, 3.0, failure)
    assert heavy.kurtosis == heavy.observed_kurtosis > 20
    assert heavy.lower == pytest.approx(
        heavy.estimate / (1 + math.sqrt((heavy.kurtosis - 1) * (1 / 0.03 - 1) / 200)), rel=1e-12
    )
    for constant in (np.ones(40), np.zeros(40)):
        flat = spread_limits(constant, 1.0, failure)
        assert (flat.estimate, flat.lower, flat.upper) == (0.0, 0.0, 0.0)
    refused(lambda: spread_limits(np.zeros(3), 3.0, failure), "3", "4")


# --- neighbourhood and worst range ------------------------------------------------------------------------


def test_probes_lie_uniformly_in_the_ball():
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    probes = neighbourhood(w, 0.7, 4000, seed=1)
    length = (probes - w).norm(dim=1)
    assert probes.shape == (4000, 3) and (length <= 0.7 * (1 + 1e-12)).all()
    share = (length / 0.7) ** 3  # the mass within each radius: uniform on [0, 1]
    assert abs(float(share.mean()) - 0.5) <= 4 / math.sqrt(12 * 4000)
    for level in (0.1, 0.5, 0.9):
        assert abs(float((share <= level).double().mean()) - level) <= 4 * math.sqrt(level * (1 - level) / 4000)
    assert ((probes - w).mean(0).abs() <= 4 * 0.7 / math.sqrt(5 * 4000)).all()
    assert torch.equal(probes, neighbourhood(w, 0.7, 4000, seed=1))
    assert not torch.equal(probes, neighbourhood(w, 0.7, 4000, seed=2))
    assert torch.equal(neighbourhood(w, 0.0, 8), w[None])
    many = neighbourhood(torch.zeros(5000, dtype=torch.float64), 2.0, 3)
    assert (many.norm(dim=1) <= 2 * (1 + 1e-12)).all() and (many.norm(dim=1) > 1.99).all()


def test_probe_losses():
    model, x, y = tiny_vit(depth=1)
    losses = Losses(model, x, y)
    probes = neighbourhood(losses.w, 0.5, 3)
    values = probe_losses(losses, probes)
    assert values.shape == (3, 12) and values.dtype == np.float64
    with torch.no_grad():
        for w, row in zip(probes, values, strict=True):
            moved = build_model("vit", **vars(model.config)).double()
            nn.utils.vector_to_parameters(w, moved.parameters())
            direct = nn.functional.cross_entropy(moved(x.double()), y, reduction="none")
            np.testing.assert_allclose(row, direct.numpy(), rtol=1e-10)


@pytest.mark.parametrize("radius", [0.0, 0.02])
def test_worst_range_by_pairs(radius):
    model, x, y = tiny_vit()
    losses = Losses(model, x, y)
    parts, values, g = worst_range(losses, radius, model), losses.values(), per_sample_gradients(model, x, y)
    pairs = list(itertools.combinations(range(12), 2))
    assert parts["value"] == pytest.approx(max(abs(float(values[i] - values[j])) for i, j in pairs), rel=1e-12)
    assert parts["gradient"] == pytest.approx(radius * max(float((g[i] - g[j]).norm()) for i, j in pairs), rel=1e-9)
    if radius == 0:
        assert parts["gradient"] == parts["curvature"] == 0
    else:
        prior = hessian_norm_bounds(model, x, y, rung="prior", radius=radius).values
        assert parts["curvature"] == pytest.approx(radius**2 * float(prior.max()), rel=1e-12)
    assert parts["D"] == pytest.approx(parts["value"] + parts["gradient"] + parts["curvature"], rel=1e-12)
    # what it bounds: (k+1)|L_{k+1} - L_k| at any weights of the ball, for any order
    for row in probe_losses(losses, neighbourhood(losses.w, radius, 20)):
        assert np.ptp(row) <= parts["D"]
    if radius:
        linear, x, y = linear_pilot(6)
        refused(lambda: worst_range(Losses(linear, x, y), radius, linear), "ViT")


def test_worst_range_of_nearly_equal_gradients():
    """Gradients far from zero that differ little: their distance is not lost to cancellation."""
    model, x, y = tiny_vit(40)
    g = 1e6 + 1e-3 * torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = SimpleNamespace(
        values=lambda: torch.ones(40), sample_gradients=lambda: g, x=x.double(), y=y, loss="cross_entropy"
    )
    exact = max(float((a - b).norm()) for a, b in itertools.combinations(g, 2))
    assert worst_range(losses, 0.1, model)["gradient"] == pytest.approx(0.1 * exact, rel=1e-6)


# --- the answer -----------------------------------------------------------------------------------------


def test_surface_answer_by_formula():
    model, x, y = linear_pilot(400)
    tau, confidence = 0.1, 0.9
    for radius, n_probes in ((0.0, 8), (0.7, 4)):
        found = required_samples(model, x, y, tau, radius, confidence, kurtosis=8.0, n_probes=n_probes, seed=3)
        losses = Losses(model, x, y)
        values = probe_losses(losses, neighbourhood(losses.w, radius, n_probes, seed=3))
        assert values.shape == (n_probes if radius else 1, 400)
        variance, spread = values.var(1, ddof=1).mean(), spread_limits(values, 8.0, 0.025, seed=3)
        assert found.k == k_surface(variance, tau, 0.9)
        assert found.upper == k_surface(spread.upper, tau, 0.95)
        assert found.lower == math.ceil((norm.ppf(0.95) / tau) ** 2 * spread.lower)
        assert found.lower <= found.k <= found.upper < math.inf
        assert found.terms["S"] == pytest.approx(math.sqrt(variance)) and found.terms["pilot"] == 400
        assert found.terms["S_lower"] <= found.terms["S"] <= found.terms["S_upper"]
        assert (found.criterion, found.tolerance, found.radius, found.confidence) == ("surface", tau, radius, 0.9)
        again = required_samples(model, x, y, tau, radius, confidence, kurtosis=8.0, n_probes=n_probes, seed=3)
        assert again == found


def test_surface_verdicts():
    model, x, y = linear_pilot(400)
    enough = required_samples(model, x, y, 1.0, confidence=0.8)
    assert enough.verdict == "enough" and enough.upper <= 400 and "400" in enough.sentence
    need = required_samples(model, x, y, 0.01, confidence=0.8)
    assert need.verdict == "need" and 400 < need.upper < math.inf and str(need.upper) in need.sentence
    few = required_samples(model, x[:30], y[:30], 1.0, confidence=0.8)
    assert few.verdict == "cannot tell" and few.upper == math.inf and few.k < math.inf and few.lower >= 1
    # what it asks for first is what makes the upper end finite
    more = int(few.sentence.split("at least ")[1].split()[0])
    kurtosis, delta = few.terms["kurtosis"], 0.2
    assert 2 * kurtosis * math.log(4 / delta) < (30 + more) // 2 <= 2 * kurtosis * math.log(4 / delta) + 2
    longer = torch.cat([x] * 2)[: 30 + more], torch.cat([y] * 2)[: 30 + more]
    assert required_samples(model, *longer, 1.0, confidence=0.8).upper < math.inf
    # the pilot's own kurtosis overrides an assumption that it contradicts
    heavy = required_samples(model, x, y, 1.0, confidence=0.8, kurtosis=1.0)
    assert heavy.terms["kurtosis"] == heavy.terms["observed_kurtosis"] > 1


def test_step_verdicts_and_ceiling():
    model, x, y = tiny_vit(60)
    losses = Losses(model, x, y)
    values = losses.values().numpy()
    for radius in (0.0, 0.01):
        ceiling, D = loss_upper_bound(model, radius), worst_range(losses, radius, model)["D"]
        for tau, verdict in ((1.0, "enough"), (0.01, "need")):
            found = required_samples(model, x, y, tau, radius, criterion="step")
            assert found.verdict == verdict
            assert found.k == max(1, math.ceil(D / tau) - 1) and found.lower == k_step(values, tau)
            assert found.upper == max(1, math.ceil(ceiling / tau) - 1) and found.terms["ceiling"] == ceiling
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
    refused(lambda: required_samples(linear, u, v, 1.0, radius=0.1, criterion="step"), "ViT")


def test_upper_end_of_the_step_holds_for_samples_not_in_the_pilot():
    """With large logits: no image, however it looks, moves the mean of k images by more than the ceiling / (k + 1)."""
    model, x, y = tiny_vit(30, pool="mean")
    with torch.no_grad():
        model.head.weight *= 8
    new, labels = 50 * torch.randn(500, 1, 4, 4), torch.arange(500) % 3
    tau = 0.5
    found = required_samples(model, x, y, tau, criterion="step")
    values = Losses(model, new, labels).values().numpy()
    assert k_step(values, tau) <= found.upper
    assert k_step(values, tau) > found.k  # the pilot's own answer does not hold beyond it


def test_pool_statement():
    model, x, y = linear_pilot(40)
    torch.manual_seed(9)
    other = torch.randn(50, 5)
    for fitted_on, pool in (
        (None, False),
        (other, False),
        (x, True),
        (torch.cat([other, x[7:8]]), True),
        (torch.cat([other, x[7:8]]).double(), True),  # the same row in another precision
    ):
        found = required_samples(model, x, y, 1.0, fitted_on=fitted_on)
        assert found.statement.startswith("pool statement" if pool else "population statement")
        step = required_samples(model, x, y, 1.0, criterion="step", fitted_on=fitted_on)
        assert step.statement == found.statement
    zeros = torch.zeros(1, 5)
    found = required_samples(model, torch.cat([x, -zeros]), torch.cat([y, y[:1]]), 1.0, fitted_on=zeros)
    assert found.statement.startswith("pool statement")  # -0 is 0


def test_bad_arguments():
    model, x, y = linear_pilot(20)
    for wrong in (
        dict(tolerance=0.0),
        dict(tolerance=-1.0),
        dict(tolerance=math.nan),
        dict(radius=-0.1),
        dict(radius=math.nan),
        dict(radius=math.inf),
        dict(confidence=0.0),
        dict(confidence=1.0),
        dict(confidence=95),
    ):
        (name,) = wrong
        refused(lambda w=wrong: required_samples(model, x, y, **({"tolerance": 0.1} | w)), name)
    refused(lambda: required_samples(model, x, y, 0.1, criterion="both"), "both", "surface", "step")
    refused(lambda: required_samples(model, x[:3], y[:3], 0.1), "3")
    refused(lambda: required_samples(model, x, y, 0.1, radius=0.1, n_probes=0), "n_probes")
    refused(lambda: required_samples(model, x, y[:4], 0.1), "20", "4")


def test_model_is_left_alone():
    model, x, y = tiny_vit()
    model.train()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    required_samples(model, x, y, 0.1, radius=0.1)
    required_samples(model, x, y, 0.1, radius=0.1, criterion="step")
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
