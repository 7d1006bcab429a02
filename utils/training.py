"""Training: L_n(w) + (l2/2)|w - w_init|^2 by Adam, then polished on the whole part towards a stationary point.

Without a penalty separable cross-entropy has no minimiser: the training losses and Hessians go to zero
and every later answer is empty. The penalty is centred at the initial weights, not at zero, because
LayerNorm makes the loss nearly invariant to the scale of the residual stream: a penalty on |w|^2 shrinks
that scale without end, and the curvature grows as it shrinks, until only LayerNorm's eps stops it.
It cancels in L_{k+1} - L_k, and its centre does not depend on the sample. Source: (eq:objective).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from utils.curvature import Losses, operator_norm
from utils.models import (
    logits,
    prepared_copy,
    refuse_random_or_batch_dependent,
    second_order_mode,
)

ROUND = 60  # L-BFGS iterations of a polishing round


@dataclass
class Training:
    """What training did: a row of `history` an epoch or an iteration, and the gradients it ended with.

    gradient_norm       |grad of the objective|
    gradient_norm_loss  |grad L_n|: l2 |w - w_init| at an exact minimum
    threshold           0.1 sqrt(tr Sigma_g / n): a tenth of the standard error of the mean gradient, or the one given
    converged           gradient_norm <= threshold
    """

    history: list[dict] = field(default_factory=list)
    gradient_norm: float = math.nan
    gradient_norm_loss: float = math.nan
    threshold: float = math.nan
    distance: float = math.nan
    converged: bool = False


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss="cross_entropy",
    l2=1e-2,
    epochs=60,
    batch_size=64,
    learning_rate=3e-3,
    schedule="cosine",
    polish_steps=200,
    threshold=None,
    seed=0,
    progress=lambda line: None,
) -> Training:
    """Train the model in place on x (n, ...), y (n,), from the weights it has (w_init); it ends in float64.

    Parameters that do not require a gradient stay as they are.

    Adam in float32 with a "cosine" or "constant" `schedule` of the learning rate, then full-batch polishing (float32,
    then float64) until the stopping rule of (eq:objective) holds, or the gradient's norm is at most a `threshold` that
    is given, or `polish_steps` iterations are spent (a budget in iterations, not seconds, so that two runs agree).
    `epochs=0` and `polish_steps=0` leave the weights as they are.
    Raises ValueError for a random or batch-dependent model, or where the objective stops being finite.
    """
    result, device = Training(), next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    refuse_random_or_batch_dependent(prepared_copy(model), x.double() if x.is_floating_point() else x)
    model.to(torch.float32 if epochs else torch.float64).eval()
    moving = [name for name, p in model.named_parameters() if p.requires_grad]
    if not moving:
        raise ValueError("No parameter of the model requires a gradient: unfreeze some and run again.")
    centre = torch.cat([model.get_parameter(name).detach().double().reshape(-1) for name in moving]).cpu()
    if epochs:
        adam = epochs, batch_size, learning_rate, schedule
        _adam(model, moving, x, y, loss, l2, *adam, seed, result, progress)
    model.to(torch.float64)
    _polish(model, moving, centre, x, y, loss, l2, polish_steps, threshold, result, progress)
    return result


def _adam(model, moving, x, y, loss, l2, epochs, batch_size, learning_rate, schedule, seed, result, progress):
    generator = torch.Generator().manual_seed(seed)
    losses = Losses(model, x, y, loss, parameters=moving, dtype=torch.float32)
    w, centre = losses.w, losses.w.clone()
    optimizer = torch.optim.Adam([w], lr=learning_rate)
    steps, rates = epochs * math.ceil(len(x) / batch_size), torch.optim.lr_scheduler
    cosine = schedule == "cosine"
    rate = rates.CosineAnnealingLR(optimizer, steps) if cosine else rates.ConstantLR(optimizer, factor=1.0)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            value, gradient = losses.value_and_gradient(w, rows)
            total += (value + 0.5 * l2 * (w - centre).square().sum()).item() * len(rows) / len(x)
            w.grad = gradient + l2 * (w - centre)
            optimizer.step()
            rate.step()
        if not math.isfinite(total):
            raise ValueError(f"The objective became {total} in epoch {epoch}: lower learning_rate and run again.")
        norm = w.grad.norm().item()
        result.history.append({"step": epoch, "phase": "adam", "objective": total, "gradient_norm": norm})
        progress(f"epoch {epoch}/{epochs}: objective {total:.4f}")
    _put(model, losses.unflatten(w))


def _put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in tensors.items():
            model.get_parameter(name).copy_(value)


def _polish(model, moving, centre, x, y, loss, l2, steps, threshold, result, progress):
    def rule(losses, w):
        return stopping_rule(losses, w.to(losses.w)) if threshold is None else threshold

    losses = Losses(model, x, y, loss, parameters=moving)
    w, budget = losses.w.cpu(), len(result.history) + steps  # the optimiser works on the CPU, the losses where they are
    # single precision goes most of the way at half the cost; double precision has the last word
    for dtype in (torch.float32, torch.float64):
        if len(result.history) < budget:
            single = Losses(model, x, y, loss, parameters=moving, dtype=dtype)
            w = _descend(single, w, centre, l2, budget, rule, result, progress)
    _put(model, losses.unflatten(w))
    result.threshold, gradient = rule(losses, w), losses.gradient(w.to(losses.w)).cpu()
    result.gradient_norm = (gradient + l2 * (w - centre)).norm().item()
    result.gradient_norm_loss = gradient.norm().item()
    result.distance = (w - centre).norm().item()
    if not math.isfinite(result.gradient_norm):
        raise ValueError("The gradient of the objective is not finite: lower learning_rate and look at the inputs.")
    result.converged = result.gradient_norm <= result.threshold


def _descend(losses, w, centre, l2, budget, rule, result, progress) -> Tensor:
    """From w (P,) until the stopping rule holds or the history has `budget` rows; returns w in float64.

    Rounds of L-BFGS, which follows the flat directions, each followed by gradient steps of length
    1/||Hessian||, which settle the steep ones that the line search leaves jittering.
    """
    seen = {}

    def objective(w: Tensor) -> tuple[float, Tensor]:
        value, gradient = losses.value_and_gradient(w.to(losses.w))
        seen["gradient"] = gradient.double().cpu() + l2 * (w - centre)
        return value.item() + 0.5 * l2 * (w - centre).square().sum().item(), seen["gradient"]

    def note(phase, value) -> None:
        norm = seen["gradient"].norm().item()
        result.history.append(
            {"step": len(result.history) + 1, "phase": phase, "objective": float(value), "gradient_norm": norm}
        )
        progress(f"{phase} {len(result.history)}: objective {value:.6f}, |gradient| {norm:.2e}")

    def settled(w: Tensor) -> bool:
        """The rule moves with the weights: it is taken anew only where the gradient is near the last one."""
        if seen["gradient"].norm().item() > 1.05 * result.threshold:
            return False
        result.threshold = rule(losses, w)
        return seen["gradient"].norm().item() <= result.threshold

    def scipy_objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(torch.from_numpy(w.copy()))
        return value, gradient.numpy()

    def callback(intermediate_result) -> None:  # SciPy calls it after the evaluation at this iterate
        note("l-bfgs", intermediate_result.fun)
        if len(result.history) >= budget or settled(torch.from_numpy(intermediate_result.x.copy())):
            raise StopIteration

    value = objective(w)[0]
    if not math.isfinite(value):
        raise ValueError(f"The objective is {value} before polishing: lower learning_rate and look at the inputs.")
    result.threshold = rule(losses, w)
    while not settled(w) and len(result.history) < budget:
        options = {"maxiter": ROUND, "maxfun": 3 * ROUND, "maxcor": 20, "ftol": 0.0, "gtol": 0.0}
        found = minimize(scipy_objective, w.numpy(), jac=True, method="L-BFGS-B", callback=callback, options=options)
        w = torch.from_numpy(found.x.copy())
        result.threshold, gradient = rule(losses, w), objective(w)[1]
        if settled(w):  # here the gradient may be exactly 0, and no direction for what follows
            break
        some = torch.arange(min(256, losses.n))  # a step of 1/norm is stable up to a norm twice too small

        curvature = losses.hessian(w.to(losses.w), some)

        def bend(v, curvature=curvature):
            return curvature(v.to(losses.w)).double().cpu() + l2 * v

        steepest = operator_norm(bend, gradient, tolerance=1e-2, max_steps=12)
        for _ in range(ROUND // 2):
            if settled(w) or len(result.history) >= budget:
                break
            w = w - seen["gradient"] / steepest.value
            note("settle", objective(w)[0])
    return w


def stopping_rule(losses: Losses, w: Tensor) -> float:
    """0.1 sqrt(tr Sigma_g / n), Sigma_g the covariance (divisor n - 1) of the per-sample gradients at w."""
    squares, total = 0.0, torch.zeros_like(w)
    for rows in torch.arange(losses.n).split(losses.chunk(3)):
        g = losses.sample_gradients(w, rows)
        squares, total = squares + g.square().sum().item(), total + g.sum(0)
    trace = (squares - total.square().sum().item() / losses.n) / max(losses.n - 1, 1)
    return 0.1 * math.sqrt(max(trace, 0.0) / losses.n)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of samples whose largest logit is the label's."""
    with torch.no_grad(), second_order_mode():
        weights = next(model.parameters())
        x = x.to(weights) if x.is_floating_point() else x.to(weights.device)
        return (logits(model, x).argmax(-1) == y.to(x.device)).double().mean().item()
