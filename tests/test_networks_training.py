"""Training: its report is recomputed here, stopping rule and penalty by their definitions."""

import math
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import torch
from networks import flat, tiny_linear, tiny_vit
from refusal import refused
from torch import nn
from torch.nn import functional as F

from utils.networks.training import accuracy, evaluate, train

F64 = torch.float64


def random_data(n=30, seed=0):
    """Images in single precision, and labels that nothing explains."""
    generator = torch.Generator().manual_seed(seed)
    return networks.images(n, seed=seed).float(), torch.randint(0, 3, (n,), generator=generator)


def test_frozen_parameters_stay():
    model, (x, y) = tiny_vit(), random_data()
    model.embed.weight.requires_grad_(False)
    before = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    train(model, x, y, epochs=1, polish_steps=3)
    moved = {
        name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])
    }
    assert "embed.weight" not in moved and "head.weight" in moved


def sample_losses(model, x, y, loss="cross_entropy"):
    out = model(x.double())
    if loss == "cross_entropy":
        return F.cross_entropy(out, y, reduction="none")
    return F.mse_loss(out, F.one_hot(y, 3).double(), reduction="none").mean(1)


def gradient(model, value):
    return torch.cat(
        [
            g.reshape(-1)
            for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        ]
    )


@pytest.mark.parametrize("loss, l2, norm", [("cross_entropy", 1e-2, "pre"), ("mse", 1e-3, "post")])
def test_report_is_what_autograd_says(loss, l2, norm):
    model, (x, y) = tiny_vit(norm=norm), random_data()
    start, lines = flat(model), []
    result = train(
        model,
        x,
        y,
        loss=loss,
        l2=l2,
        epochs=2,
        batch_size=8,
        polish_steps=9,
        learning_rate=1e-2,
        progress=lines.append,
    )
    assert all(p.dtype == F64 and p.grad is None for p in model.parameters())
    move, losses = flat(model) - start, sample_losses(model, x, y, loss)
    g = gradient(model, losses.mean())
    assert result.distance == pytest.approx(move.norm().item(), rel=1e-9) and result.distance > 0.05
    assert result.gradient_norm_loss == pytest.approx(g.norm().item(), rel=1e-8)
    assert result.gradient_norm == pytest.approx((g + l2 * move).norm().item(), rel=1e-8)
    # the stopping rule from the covariance of the samples' gradients, divisor n - 1
    each = torch.stack([gradient(model, value) for value in losses])
    trace = np.trace(np.cov(each.numpy(), rowvar=False))
    assert result.threshold == pytest.approx(0.1 * math.sqrt(trace / 30), rel=1e-8)
    assert result.converged == (result.gradient_norm <= result.threshold)
    # a row an epoch and a row an iteration, within the budget, and a line said about each
    assert [row["step"] for row in result.history] == list(range(1, len(result.history) + 1))
    phases = [row["phase"] for row in result.history]
    assert phases[:2] == ["adam", "adam"] and "adam" not in phases[2:] and 2 < len(phases) <= 11
    assert len(lines) == len(result.history)
    assert all(
        math.isfinite(row["objective"]) and row["gradient_norm"] >= 0 for row in result.history
    )
    # the last row of the polishing is the objective at the weights that came back
    objective = losses.mean().item() + l2 / 2 * move.square().sum().item()
    assert result.history[-1]["objective"] == pytest.approx(objective, rel=1e-6)
    assert result.history[-1]["gradient_norm"] == pytest.approx(result.gradient_norm, rel=1e-3)
    assert objective < result.history[0]["objective"]


def test_same_seed_same_weights():
    x, y = random_data()
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = tiny_vit()
        torch.manual_seed(noise)  # the global generator does not matter, and is not used
        state = torch.get_rng_state()
        result = train(model, x, y, epochs=2, batch_size=8, polish_steps=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append((flat(model), result))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not torch.equal(runs[0][0], runs[2][0])


def test_a_constant_rate_is_plain_adam():
    """Batches drawn as `train` draws them, torch's Adam at one rate; a cosine ends elsewhere."""
    x, y = random_data()
    model = tiny_vit()
    plain = tiny_vit().float()
    train(
        model,
        x,
        y,
        l2=0.0,
        epochs=2,
        batch_size=8,
        learning_rate=1e-2,
        schedule="constant",
        polish_steps=0,
        seed=3,
    )
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        for rows in torch.randperm(len(x), generator=generator).split(8):
            optimizer.zero_grad()
            F.cross_entropy(plain(x[rows]), y[rows]).backward()
            optimizer.step()
    for (name, found), expected in zip(
        model.named_parameters(), plain.double().parameters(), strict=True
    ):
        if not name.endswith(
            "key.bias"
        ):  # its gradient is zero but for rounding, which Adam makes large
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    cosine = tiny_vit()
    train(cosine, x, y, l2=0.0, epochs=2, batch_size=8, learning_rate=1e-2, polish_steps=0, seed=3)
    assert (flat(cosine) - flat(model)).norm() > 1e-2


def test_no_steps_leave_the_weights_alone():
    model, (x, y) = tiny_vit(), random_data()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    result = train(model, x, y, epochs=0, polish_steps=0)
    assert all(torch.equal(t, before[n].double()) for n, t in model.state_dict().items())
    assert result.history == [] and result.distance == 0.0
    assert result.gradient_norm == result.gradient_norm_loss
    assert result.gradient_norm == pytest.approx(
        gradient(model, sample_losses(model, x, y).mean()).norm().item()
    )
    assert result.threshold > 0
    # epochs alone and polishing alone move them
    for budget in (dict(epochs=1, polish_steps=0), dict(epochs=0, polish_steps=1)):
        other = tiny_vit()
        assert len(train(other, x, y, **budget).history) == 1
        assert (flat(other) - flat(model)).norm() > 1e-4


def newton(model, x, y, l2, start):
    """The minimiser of the strictly convex objective, by Newton's method on dense matrices."""
    design = torch.cat([x.double().flatten(1), torch.ones(len(x), 1, dtype=F64)], 1)
    target = F.one_hot(y, 3).double()
    W0 = torch.cat([start[:-3].reshape(3, -1), start[-3:, None]], 1)
    W = W0.clone()
    for _ in range(30):
        p = (design @ W.T).softmax(1)
        g = (p - target).T @ design / len(x) + l2 * (W - W0)
        S = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        H = torch.einsum("nab,ni,nj->aibj", S, design, design).reshape(g.numel(), -1) / len(x)
        W = W - torch.linalg.solve(H + l2 * torch.eye(g.numel(), dtype=F64), g.reshape(-1)).reshape(
            W.shape
        )
    return torch.cat([W[:, :-1].reshape(-1), W[:, -1]])


@pytest.mark.parametrize("epochs", [0, 3])
def test_convex_problem_is_polished(epochs):
    """The rule is met, and |w - w*| <= |g|/l2, as strong convexity says of the minimiser w*."""
    model, (x, y), l2 = tiny_linear(), random_data(60), 0.02
    start = flat(model)
    result = train(model, x, y, l2=l2, epochs=epochs, polish_steps=200)
    assert result.converged and result.gradient_norm <= result.threshold
    assert len(result.history) < 200 + epochs  # it stopped because of the rule
    best = newton(model, x, y, l2, start)
    assert (flat(model) - best).norm().item() <= result.gradient_norm / l2 * (1 + 1e-6)
    assert (best - start).norm() > 3 * (flat(model) - best).norm()
    # at the minimiser l2 |w - w_init| is the gradient of the loss
    assert abs(result.gradient_norm_loss - l2 * result.distance) <= result.gradient_norm * (
        1 + 1e-9
    )


def test_separable_data_have_a_minimiser():
    """Labels that a linear map separates: without the penalty the weights would grow for ever."""
    model, (x, _) = tiny_linear(), random_data(40)
    y = (x.flatten(1) @ networks.images(3, seed=1).float().flatten(1).T).argmax(1)
    result = train(model, x, y, epochs=0, l2=1e-2, polish_steps=300)
    assert result.converged and accuracy(model, x, y) == 1.0
    assert result.distance < 20


def test_penalty_is_centred_at_the_initial_weights():
    """A penalty that outweighs the loss holds the weights where they were, far from zero."""
    model, (x, y) = tiny_linear().float(), random_data()
    with torch.no_grad():
        model.head.weight += 3.0
    start, l2 = flat(model), 1e4
    result = train(model, x, y, l2=l2, epochs=2, polish_steps=100)
    assert start.norm() > 10 and (flat(model) - start).norm() < 1e-3
    g = gradient(model, sample_losses(model, x, y).mean())
    assert (g + l2 * (flat(model) - start)).norm().item() == pytest.approx(
        result.gradient_norm, rel=1e-6, abs=1e-12
    )
    assert result.converged
    torch.testing.assert_close(
        l2 * (start - flat(model)), g, rtol=0, atol=result.gradient_norm + 1e-9
    )
    # Adam alone: the objective begins as the loss, and 40 steps do not drift towards zero
    with torch.no_grad():
        nn.utils.vector_to_parameters(start.clone(), model.parameters())
    value = sample_losses(model, x, y).mean().item()
    result = train(model, x, y, l2=l2, epochs=40, batch_size=30, polish_steps=0)
    assert result.history[0]["objective"] == pytest.approx(value, rel=1e-5)
    assert result.distance < 0.05


def test_identical_samples():
    """Gradients without spread make the rule zero: the budget ends the run, nothing breaks."""
    model, (x, y) = tiny_linear(), random_data(1)
    result = train(model, x.repeat(6, 1, 1, 1), y.repeat(6), epochs=1, polish_steps=80, loss="mse")
    assert result.threshold <= 1e-8 and len(result.history) <= 81
    assert result.gradient_norm <= 1e-6 and math.isfinite(result.distance)


def test_a_minimum_that_is_hit_exactly():
    """(a - 1)^2/2 from a = 0: the first step of L-BFGS ends at gradient 0: no direction is left."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return torch.cat([self.a * x, self.b.sum() * x * 0], 1)

    model = One()
    result = train(
        model, torch.ones(4, 1), torch.zeros(4, dtype=torch.long), epochs=0, l2=0.0, loss="mse"
    )
    assert result.gradient_norm == 0 and result.converged and model.a.item() == 1.0


def test_inputs_in_double_precision():
    x, y = random_data()
    single, double = tiny_vit(), tiny_vit()
    train(single, x, y, epochs=1, polish_steps=3)
    train(double, x.double(), y, epochs=1, polish_steps=3)
    assert torch.equal(flat(single), flat(double))


def test_accuracy():
    model = tiny_linear(d_in=3).float()
    x = torch.eye(3)
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(3))
        model.head.bias.zero_()
    assert accuracy(model, x, torch.tensor([0, 1, 2])) == 1.0
    assert accuracy(model.double(), x, torch.tensor([0, 2, 2])) == pytest.approx(2 / 3)


def test_evaluate():
    """A row for each part, from the examples' losses and accuracies."""
    model = tiny_linear()
    parts = SimpleNamespace()
    for seed, part in enumerate(("train", "calibration", "test")):
        x, y = random_data(10 + seed, seed)
        setattr(parts, f"x_{part}", x)
        setattr(parts, f"y_{part}", y)
    table = evaluate(model, parts)
    assert table.index.tolist() == ["training", "calibration", "held-out"]
    assert table["examples"].tolist() == [10, 11, 12]
    losses = sample_losses(model, parts.x_test, parts.y_test)
    right = accuracy(model, parts.x_test, parts.y_test)
    expected = {
        "accuracy": right,
        "± s.e.": math.sqrt(right * (1 - right) / 12),
        "mean loss": losses.mean().item(),
        "spread S": losses.std().item(),
        "largest loss": losses.max().item(),
    }
    assert table.loc["held-out"].drop("examples").to_dict() == pytest.approx(expected)


def test_refusals():
    x, y = random_data()
    refused(
        lambda: train(nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3)), x, y),
        "training mode",
    )
    refused(
        lambda: train(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)), x, y),
        "batch normalisation",
    )
    refused(lambda: train(tiny_vit(), x, y, epochs=1, loss="hinge"), "hinge")


@pytest.mark.parametrize(
    "epochs, polish_steps, size, said",
    [
        (2, 5, 1e25, "no finite number"),
        (0, 5, 1e25, "no finite number"),
        (0, 0, 1e200, "no finite number"),
        (0, 5, 1e200, "no finite number"),
    ],
)
def test_objective_that_is_not_finite(epochs, polish_steps, size, said):
    """Outputs that overflow, or whose squares do, in the precision of the stage."""
    (x, y), broken, budget = (
        random_data(),
        tiny_vit(),
        dict(epochs=epochs, polish_steps=polish_steps),
    )
    refused(lambda: train(tiny_linear(), size * x.double(), y, loss="mse", **budget), said)
    with torch.no_grad():
        broken.pos[0] = math.nan
    refused(lambda: train(broken, x, y, **budget), "pos hold NaN")
