"""A pilot's answers: by formula, each verdict and its label, each part measured once."""

import math

import numpy as np
import pytest
import torch
from networks import linear_pilot, vit_pilot
from refusal import refused

from utils.hessian import Losses
from utils.sample_size import (
    CRITERIA,
    exceedance,
    k_surface,
    pilot,
    required_samples,
    surface_forecast,
    true_size,
)
from utils.sample_size.limits import bounded_upper, budget, inflation, least_pilot, spread_limits
from utils.sample_size.surface import gaussian_factor
from utils.surface.probes import neighbourhood, probe_losses


def test_surface_answer_by_formula():
    model, x, y = linear_pilot(400)
    tau, confidence = 0.1, 0.9
    for radius, n_probes in ((0.0, 8), (0.7, 4)):
        found = required_samples(
            model, x, y, tau, radius, confidence, kurtosis=8.0, n_probes=n_probes, seed=3
        )
        losses = Losses(model, x, y)
        values = probe_losses(losses, neighbourhood(losses.w, radius, n_probes, seed=3))
        assert values.shape == (n_probes if radius else 1, 400)
        share, factor = budget(200, 8.0, 0.1), gaussian_factor(values, 0.9, seed=3)
        variance, spread = values.var(1, ddof=1).mean(), spread_limits(values, 8.0, share, 0.05)
        assert found.k == math.ceil(factor * variance / tau**2)
        assert found.upper == k_surface(
            spread.upper, tau, 1 - (0.1 - share), kurtosis=spread.kurtosis
        )
        assert found.lower == math.floor(factor * spread.lower / tau**2)
        assert found.lower <= found.k <= found.upper < math.inf
        assert (
            found.terms["S"] == pytest.approx(math.sqrt(variance)) and found.terms["pilot"] == 400
        )
        assert found.terms["S_lower"] <= found.terms["S"] <= found.terms["S_upper"]
        prices = found.terms["price_of_theorem"] * found.terms["price_of_pilot"]
        assert prices == pytest.approx(found.upper / found.k, rel=1e-12)
        assert (found.criterion, found.tolerance, found.radius, found.confidence) == (
            "surface",
            tau,
            radius,
            0.9,
        )
        again = required_samples(
            model, x, y, tau, radius, confidence, kurtosis=8.0, n_probes=n_probes, seed=3
        )
        assert again == found
    bounded = required_samples(model, x, y, tau, 0.0, confidence, ceiling=20.0)
    share = budget(200, 20.0, 0.1)
    upper = bounded_upper(float(losses.values().var()), 200.0, 200, share)
    assert bounded.terms["S_upper"] == pytest.approx(math.sqrt(upper), rel=1e-9)


def test_surface_verdicts():
    model, x, y = linear_pilot(400)
    enough = required_samples(model, x, y, 1.0, confidence=0.8)
    assert enough.verdict == "enough" and enough.upper <= 400 and "400" in enough.sentence
    need = required_samples(model, x, y, 0.01, confidence=0.8)
    assert (
        need.verdict == "need" and 400 < need.upper < math.inf and str(need.upper) in need.sentence
    )
    few = required_samples(model, x[:30], y[:30], 1.0, confidence=0.8)
    assert (
        few.verdict == "cannot tell"
        and few.upper == math.inf
        and few.k < math.inf
        and few.lower >= 1
    )
    # what it asks for first is what makes the upper end finite
    more = int(few.sentence.split("at least ")[1].split()[0])
    share = few.terms["pilot_failure"]
    assert 30 + more == least_pilot(few.terms["kurtosis"], share)
    assert inflation((30 + more) // 2, few.terms["kurtosis"], share) < math.inf
    assert inflation((30 + more) // 2 - 1, few.terms["kurtosis"], share) == math.inf
    # the pilot's own kurtosis overrides an assumption that it contradicts
    heavy = required_samples(model, x, y, 1.0, confidence=0.8, kurtosis=1.5)
    assert heavy.terms["kurtosis"] == 2 * heavy.terms["observed_kurtosis"] > 1.5


def test_pilots_that_are_no_random_sample():
    model, x, y = linear_pilot(400)
    order = Losses(model, x, y).values().argsort()
    for criterion in ("surface", "ball", "excess", "next"):
        radius = 0.0 if criterion == "next" else 0.01
        drifting = required_samples(model, x[order], y[order], 0.5, radius, 0.8, criterion)
        assert (
            drifting.verdict == "cannot tell"
            and "order" in drifting.sentence
            and drifting.upper == math.inf
        )
    assert required_samples(model, x, y, 0.5, confidence=0.8).verdict != "cannot tell"
    for criterion in ("surface", "ball"):
        copies = required_samples(
            model, x[:20].repeat(20, 1), y[:20].repeat(20), 0.5, 0.01, 0.8, criterion
        )
        assert copies.verdict == "cannot tell" and copies.upper == math.inf
    five = required_samples(model, x[:5], y[:5], 0.5, confidence=0.8)
    assert five.verdict == "cannot tell" and "more first" in five.sentence


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
    found = required_samples(
        model, torch.cat([x, -zeros]), torch.cat([y, y[:1]]), 1.0, fitted_on=zeros
    )
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
    refused(
        lambda: required_samples(model, x, y, 0.1, criterion="both"),
        "both",
        "surface",
        "excess",
        "step",
    )
    refused(lambda: required_samples(model, x[:3], y[:3], 0.1), "3")
    refused(lambda: required_samples(model, x, y, 0.1, radius=0.1, n_probes=0), "n_probes")
    refused(lambda: required_samples(model, x, y[:4], 0.1), "20", "4")


def test_model_is_left_alone():
    model, x, y = vit_pilot()
    model.train()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    required_samples(model, x, y, 0.1, radius=0.1)
    for criterion in ("step", "ball", "excess"):
        required_samples(model, x, y, 0.1, radius=0.1, criterion=criterion)
    required_samples(model, x, y, 0.1, criterion="next")
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_each_part_is_measured_once(monkeypatch):
    """Questions after the first cost no forward pass, gradient, product or bound."""
    model, x, y = vit_pilot(40)
    measured = pilot(model, x, y, radius=0.05, ball=0.01, n_probes=3)
    taus = (0.1, 1.0)

    def ask():
        answers = [getattr(measured, criterion)(tau, 0.9) for criterion in CRITERIA for tau in taus]
        answers += [measured.ball(tau, 0.9, rung="activations") for tau in taus]
        return [*answers, *(measured.step(tau, radius=0.02) for tau in taus)]

    first = ask()
    monkeypatch.setattr(measured, "losses", None)
    with pytest.raises(AttributeError):
        measured.loss_ceiling()
    monkeypatch.undo()
    for name in ("values", "sample_gradients"):
        monkeypatch.setattr(measured.losses, name, None)
    monkeypatch.setattr(measured.losses, "chain", None)
    assert ask() == first


def test_a_pilot_answers_as_required_samples_does():
    model, x, y = vit_pilot(40)
    settings = {"fitted_on": x[:1], "kurtosis": 6.0, "n_probes": 3, "seed": 2}
    measured = pilot(model, x, y, radius=0.05, ball=0.05, **settings)
    more = {"excess": {"gap": 0.01, "remainder": 0.02}, "surface": {"ceiling": 30.0}}
    for criterion in CRITERIA:
        for tolerance, confidence in ((0.1, 0.8), (1.0, 0.95)):
            options = more.get(criterion, {})
            asked = (tolerance, 0.0 if criterion == "next" else 0.05, confidence, criterion)
            answer = required_samples(model, x, y, *asked, **settings, **options)
            if criterion == "step":
                options = {"radius": 0.05}
            assert answer == getattr(measured, criterion)(tolerance, confidence, **options)
            assert answer.criterion == criterion and answer.statement.startswith("pool")
    measured.kurtosis = 60.0  # an assumption, not a measurement
    assert measured.surface(1.0, 0.5).terms["kurtosis"] == 60.0


SENSELESS = {
    "tolerance": (0.0, -0.1, math.nan, math.inf, 1e-200, 1e200),
    "confidence": (0.0, 1.0, -1.0, 90.0, math.nan, 1 - 1e-12),
    "kurtosis": (0.0, -5.0, math.nan, math.inf),
    "radius": (-0.1, math.nan, math.inf),
    "ceiling": (-1.0, math.nan, math.inf, 1e-3),
    "n_probes": (0, -3),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_arguments_out_of_range_are_refused(name):
    model, x, y = linear_pilot(40)
    for value in SENSELESS[name]:
        asked = {"tolerance": 0.1, "confidence": 0.9} | {name: value}
        refused(lambda a=asked: required_samples(model, x, y, **a), f"{name} is ")


def test_options_of_another_criterion_are_refused():
    model, x, y = linear_pilot(40)
    for criterion, option in {
        "surface": {"gap": 0.1},
        "ball": {"gap": 0.1},
        "excess": {"ceiling": 3.0},
        "next": {"radius": 0.3},
        "step": {"ceiling": 3.0},
    }.items():
        asked = {"tolerance": 0.1, "criterion": criterion} | option
        refused(lambda a=asked: required_samples(model, x, y, **a), "leave it out")
    for criterion in ("ball", "excess", "step"):
        asked = {"tolerance": 0.1, "criterion": criterion, "rung": "foo"}
        refused(lambda a=asked: required_samples(model, x, y, **a), "rung is 'foo'")
    measured = pilot(model, x, y, ball=0.1)
    refused(lambda: measured.ball(0.1, remainder=-10.0), "remainder is")
    refused(lambda: measured.excess(0.1, gap=-5.0), "gap is")
    refused(lambda: measured.step(0.1, radius=-1.0), "radius is")
    assert pilot(model, x, y, radius=0.3).next(0.1).radius == 0.0


def test_sizes_of_losses_alone_check_their_arguments():
    losses = np.random.default_rng(0).exponential(size=40)
    for call in (
        lambda: k_surface(0.25, 0.1, 90),
        lambda: k_surface(-1.0, 0.1, 0.9),
        lambda: k_surface(0.25, -0.1, 0.9),
        lambda: k_surface(0.25, 0.1, 0.9, n=-5),
        lambda: surface_forecast(losses, -0.1, 0.9),
        lambda: surface_forecast([*losses, math.nan], 0.1, 0.9),
        lambda: true_size(losses, -0.1, 0.9),
        lambda: exceedance(losses, 0, 0.1, np.arange(40)[None]),
        lambda: exceedance([*losses, math.inf], 3, 0.1, np.arange(41)[None]),
    ):
        refused(call)
