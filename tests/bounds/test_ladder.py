"""Every rung above the exact norm, on networks of every kind and on balls; the public face."""

from __future__ import annotations

import math

import pytest
import torch
from bounded import columns, moved, norm2
from exact import exact_norms, norms_of, reference, sample_hessians
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, flat, random_mlp, random_vit, uneven_examples
from torch import nn

from utils.bounds import (
    RUNGS,
    closing_the_curvature_gap,
    hessian_bounds,
    loss_upper_bound,
    unraveling_the_hessian,
)
from utils.bounds.subject import subject
from utils.hessian import per_sample_gradients
from utils.networks.losses import loss_from_logits
from utils.networks.sizes import ACTIVATIONS

SETTINGS = settings(derandomize=True, deadline=None, max_examples=4, database=None)
SLACK = 1 + 1e-9
ROUNDING = 1e-13  # of the dense Hessian: diag(p) - p p^T cancels for a well-fitted example
OPTIONS = {"majorant": {"confidence": 1 - 1e-9, "max_steps": 400}}


def rungs_for(model: nn.Module, loss: str = "cross_entropy") -> tuple[str, ...]:
    """All that apply."""
    config = getattr(model, "config", None)
    closed = loss == "cross_entropy" and getattr(config, "norm", None) == "pre"
    return RUNGS if closed else RUNGS[1:]


def above(bound: float, exact: float, scale: float) -> bool:
    """A bound holds, up to the rounding of a dense Hessian of norm `scale`."""
    return bound >= exact * (1 - 1e-9) - 1e-10 * scale - ROUNDING


LARGER = ("two blocks", "post cls relu", "encoder pre", "encoder post", "fused")
CASES = [(name, "cross_entropy") for name in NETWORKS if name not in LARGER]
CASES += [(name, "mse") for name in ("post mean gelu", "mlp", "heads with a mask")]
CASES += [pytest.param(name, "cross_entropy", marks=pytest.mark.slow) for name in LARGER]


@pytest.mark.parametrize("name, loss", CASES)
def test_every_rung_above_the_exact_norm(name, loss):
    """Values, blocks and subsets against dense Hessians by double backward; prior >=
    activations."""
    model = NETWORKS[name]()
    x, y = uneven_examples(1, len(name))
    H = reference(model, x, y, loss)[2]
    exact = norm2(H)
    index = columns(model, subject(model, x, y, loss).groups)
    pairs = [(g, k) for g in range(len(index)) for k in range(g, len(index))]
    blocks = [norm2(H[index[g]][:, index[k]]) for g, k in pairs]
    values = {}
    for rung in rungs_for(model, loss):
        bound = hessian_bounds(model, x, y, loss, rung, **OPTIONS.get(rung, {}))
        values[rung] = float(bound.values[0])
        assert above(values[rung], exact, exact), rung
        if rung == "majorant":
            assert float(bound.terms["lower"]) <= values[rung] * SLACK
        if bound.blocks is None:
            continue
        for (g, k), block in zip(pairs, blocks):
            assert above(float(bound.blocks[0, g, k]), block, exact), (rung, g, k)
    assert values["activations"] <= values["prior"] * SLACK
    last = bound.groups[-1] + ".*"
    for rung in RUNGS[1:]:
        part = hessian_bounds(model, x, y, loss, rung, parameters=[last], **OPTIONS.get(rung, {}))
        (kept,) = columns(model, part.groups)
        assert above(float(part.values[0]), norm2(H[kept][:, kept]), exact), rung
        assert rung == "majorant" or float(part.values[0]) <= values[rung] * SLACK


SMALL = dict(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.1, 3.0),
    radius=st.sampled_from([0.0, 0.01, 0.3, 2.0]),
    depth=st.integers(0, 1),
    width=st.just((4, 2)),
    eps=st.sampled_from([1e-6, 1e-3, 1e-1]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    norm=st.sampled_from(["pre", "post"]),
    pool=st.sampled_from(["cls", "mean"]),
    loss=st.sampled_from(["cross_entropy", "mse"]),
)
WIDE = SMALL | dict(depth=st.integers(0, 2), width=st.sampled_from([(4, 1), (4, 2), (6, 3)]))


@pytest.mark.slow
@SETTINGS
@given(**SMALL)
def test_transformers_on_the_ball(**drawn):
    holds_on_the_ball(**drawn)


@pytest.mark.slow
@settings(SETTINGS, max_examples=12)
@given(**WIDE)
def test_wider_transformers_on_the_ball(**drawn):
    holds_on_the_ball(**drawn)


def holds_on_the_ball(seed, scale, radius, loss, width, activation, **sizes):
    """At random weights of the ball and along the gradient, for the rungs that hold there."""
    activation = "gelu" if activation == "relu" and radius else activation
    d, heads = width
    model = random_vit(seed, scale, d_model=d, n_heads=heads, activation=activation, **sizes)
    x, y = uneven_examples(1, seed)
    generator = torch.Generator().manual_seed(seed)
    w = flat(model)
    gradient = per_sample_gradients(model, x, y, loss)[0]
    steps = [torch.randn(len(w), generator=generator, dtype=torch.float64), gradient]
    for step in steps:
        step = radius * step / step.norm().clamp_min(1e-30)
        H = reference(moved(model, step), x, y, loss)[2]
        for rung in rungs_for(model, loss)[:-2]:
            bound = float(hessian_bounds(model, x, y, loss, rung, radius).values[0])
            assert above(bound, norm2(H), norm2(H)), rung
            assert bound >= float(hessian_bounds(model, x, y, loss, rung).values[0]) / SLACK


def test_the_head_alone_is_exact():
    """The logits are linear in the head: every analytic rung gives the norm itself."""
    model = random_vit(5)
    x, y = uneven_examples(3, 5)
    exact = norms_of(sample_hessians(model, x, y)[:, -15:, -15:]).tolist()
    for rung in ("activations", "tangents"):
        bound = hessian_bounds(model, x, y, rung=rung, parameters=["head*"])
        assert bound.groups == ["head"]
        assert bound.values.tolist() == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("gap", [3.0, 17.0, 34.0])
@pytest.mark.parametrize("right", [True, False])
def test_saturated_examples_keep_their_curvature(gap, right):
    """Two classes, head alone: ||H|| = 2 p(1-p) (|v|^2+1), to rounding, where 1 - p is below it."""
    model = random_vit(7, n_classes=2)
    x = uneven_examples(1, 7)[0]
    reads = []
    with torch.no_grad():
        f = model(x)[0]
        model.head.bias[0] += gap - (f[0] - f[1])
        handle = model.head.register_forward_hook(lambda _, inputs, __: reads.append(inputs[0][0]))
        f = model(x)[0]
        handle.remove()
    a = (-(f[0] - f[1]).abs()).exp()
    exact = float(2 * a / (1 + a) ** 2 * (reads[0].square().sum() + 1))
    y = torch.tensor([0 if right else 1])
    for rung in ("activations", "tangents"):
        bound = float(hessian_bounds(model, x, y, rung=rung, parameters=["head.*"]).values)
        assert exact * (1 - 1e-12) <= bound <= exact * (1 + 1e-6), rung


def test_batch_dtype_and_model_unchanged():
    model = random_vit(6).float().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = uneven_examples(5, 6)
    x = x.float()
    for rung in RUNGS[:-1]:
        together = hessian_bounds(model, x, y, rung=rung)
        alone = [hessian_bounds(model, x[i : i + 1], y[i : i + 1], rung=rung) for i in range(5)]
        alone = torch.cat([bound.values for bound in alone])
        torch.testing.assert_close(together.values, alone, rtol=1e-9, atol=0)
        assert together.values.shape == (5,) and together.values.dtype == torch.float64
        m = len(together.groups)
        assert rung == "closed_form" or together.blocks.shape == (5, m, m)
        assert "log10" in together.terms and (
            rung == "tangents" or {"D", "E"} <= set(together.terms)
        )
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_one_token_and_saturated_rows():
    x, y = uneven_examples(2, 0)
    for model in (random_vit(0, patch_size=4, pool="mean"), random_vit(0, 60.0)):
        exact = exact_norms(model, x, y)
        for rung in RUNGS:
            bound = hessian_bounds(model, x, y, rung=rung, **OPTIONS.get(rung, {}))
            assert (bound.values >= exact * (1 - 1e-9)).all(), rung


def test_token_logits_and_real_targets():
    """Losses over tokens, labels of -100 left out, and squared error of real targets."""
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 3)).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, -100, 1], [2, 2, 0, 1, -100]])
    for loss, y in (("cross_entropy", labels), ("mse", x[:, :, :3])):
        exact = exact_norms(model, x, y, loss)
        for rung in RUNGS[1:]:
            bound = hessian_bounds(model, x, y, loss, rung, **OPTIONS.get(rung, {})).values
            assert (bound >= exact * (1 - 1e-9)).all(), (loss, rung)


def test_loss_upper_bound():
    for norm in ("pre", "post"):
        model = random_vit(2, 2.0, norm=norm, activation="relu")
        x, y = uneven_examples(50, 2)
        with torch.no_grad():
            worst = float(loss_from_logits(model(25 * x), y).max())
        assert 0 < worst <= loss_upper_bound(model) < loss_upper_bound(model, 1.0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    assert loss_upper_bound(model) == pytest.approx(math.log(3))
    with pytest.raises(ValueError, match=r"utils.networks.ViT"):
        loss_upper_bound(random_mlp(0))


def test_refusals():
    model = random_vit(0)
    x, y = uneven_examples(2, 0)
    relu = random_vit(0, activation="relu")
    post = random_vit(0, norm="post")
    mlp = random_mlp(0, activation="relu")
    cases = [
        (mlp, {"rung": "closed_form"}, "use rung 'prior'"),
        (mlp, {"radius": 0.1}, "ReLU network says nothing about a ball"),
        (post, {"rung": "closed_form"}, "use rung 'prior'"),
        (model, {"rung": "closed_form", "loss": "mse"}, "use rung 'prior'"),
        (model, {"rung": "closed_form", "parameters": ["head*"]}, "use rung 'prior'"),
        (model, {"rung": "majorant", "radius": 0.1}, "use 'activations' or 'prior' for a ball"),
        (model, {"rung": "tangents", "radius": 0.1}, "use 'activations' or 'prior' for a ball"),
        (model, {"rung": "prior", "confidence": 0.9}, "confidence"),
        (model, {"rung": "majorant", "confidence": 1.0}, "between 0 and 1"),
        (relu, {"radius": 0.1}, "ReLU network says nothing about a ball"),
        (relu, {"rung": "prior", "radius": 0.1}, "ReLU network says nothing about a ball"),
        (relu, {"rung": "closed_form", "radius": 0.1}, "ReLU network says nothing about a ball"),
        (model, {"rung": "best"}, "choose one of closed_form, prior, activations"),
        (model, {"loss": "hinge"}, "choose one of cross_entropy, mse"),
        (model, {"radius": -1.0}, "finite number >= 0"),
        (model, {"parameters": ["nothing"]}, "No parameter matches"),
        (model, {"variance_floor": 0.1}, "leave variance_floor out"),
        (model, {"rung": "prior", "variance_floor": -1.0}, "finite number > 0"),
    ]
    for module, options, message in cases:
        with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
            hessian_bounds(module, x, y, **options)
        assert message in str(caught.value)
    for bad_x, bad_y in (
        (x, y[:1]),
        (x, y + 3),
        (x, y.double()),
        (x * math.nan, y),
        (x[:0], y[:0]),
    ):
        with pytest.raises(ValueError):
            hessian_bounds(model, bad_x, bad_y)
    free = random_vit(0, eps=0.0)
    for rung in ("closed_form", "prior"):
        with pytest.raises(ValueError, match="give variance_floor"):
            hessian_bounds(free, x, y, rung=rung)
    held = hessian_bounds(free, x, y, rung="prior", variance_floor=0.1)
    assert held.values.isfinite().all()


# --- published constants ------------------------------------------------------------------------


def attention_hessian(L: int, tau: float) -> tuple[float, float]:
    """The exact norm and the printed constant for d_V = d_K = 1, X = e_1, W_V = 0,
    W_Q = W_K = sqrt(ln(L - 1)), target tau e_1."""
    kappa = math.sqrt(math.log(L - 1))
    X = torch.zeros(L, 1, dtype=torch.float64)
    X[0] = 1.0
    weights = tuple(torch.full((1, 1), k, dtype=torch.float64) for k in (kappa, kappa, 0.0))

    def loss(Q, K, V):
        return ((X @ Q @ (X @ K).T).softmax(-1) @ X @ V - tau * X).square().sum() / L

    blocks = torch.autograd.functional.hessian(loss, weights)
    H = torch.stack([torch.stack([b.reshape(()) for b in row]) for row in blocks])
    return norm2(H), closing_the_curvature_gap(X, *weights, tau * X)


def test_published_constant_for_attention_is_no_bound():
    exact, printed = attention_hessian(64, 1e6)
    assert exact == pytest.approx(22488.97, rel=1e-6)
    assert printed == pytest.approx(5963.29, rel=1e-6)
    exact, printed = attention_hessian(17, 1e9)
    assert printed < exact < 1.01 * printed  # the first length that violates it
    exact, printed = attention_hessian(16, 1e9)
    assert exact < printed  # control: it can hold


def test_published_constant_for_connected_networks_is_no_bound():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    x = x * math.sqrt(10) / x.norm()
    W = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    W = W / norm2(W)
    for size, violated in ((0.0, True), (0.5, True), (3.0, False)):
        net = nn.Linear(6, 2, bias=False).double()
        with torch.no_grad():
            net.weight.copy_(size * W)
        exact = exact_norms(net, x, torch.tensor([0])).item()
        printed = unraveling_the_hessian([size * W], x).item()
        assert (exact > printed) == violated, (size, exact, printed)
    assert unraveling_the_hessian([0.5 * W], x).item() == pytest.approx(3.889, abs=1e-3)
