"""Training: L_n(w) + (l2/2)|w - w_init|^2 by Adam, then polished on the whole training part.

Polishing goes towards a stationary point. Without a penalty separable cross-entropy has no
minimiser: the training losses and Hessians go to zero and every later answer is empty. The penalty
is centred at the initial weights, not at zero, because LayerNorm makes the loss nearly invariant to
the scale of the residual stream: a penalty on |w|^2 shrinks that scale without end, and the
curvature grows as it shrinks, until only LayerNorm's eps stops it. It cancels in L_{k+1} - L_k, and
its centre does not depend on the sample. Source: (eq:objective).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from utils.data import Dataset
from utils.hessian import Losses, per_sample_losses
from utils.networks.contract import admit, refuse_other_training
from utils.networks.copies import second_order_mode, to_precision
from utils.networks.losses import logits
from utils.networks.polishing import Objective, Polishing, stopping_rule
from utils.run.streams import generator


@dataclass
class Training:
    """What training did, and the gradients it ended with.

    history             a row an epoch of Adam, or an iteration of polishing
    gradient_norm       |grad of the objective|
    gradient_norm_loss  |grad L_n|: l2 |w - w_init| at an exact minimum
    threshold           of `stopping_rule`, or the one given
    distance            |w - w_init|
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
    loss: str = "cross_entropy",
    l2: float = 1e-2,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    schedule: str = "cosine",
    polish_steps: int = 200,
    threshold: float | None = None,
    seed: int = 0,
    progress: Callable[[str], object] = lambda line: None,
) -> Training:
    """Train the `model` in place, from the weights it has (w_init); it ends in float64.

    Adam in float32, then full-batch polishing (float32, then float64) until the stopping rule holds
    or its budget is spent, which is in iterations, not seconds, so that two runs agree. Parameters
    that do not require a gradient stay as they are; `epochs=0, polish_steps=0` leaves all of them.

    x, y           inputs (n, ...) and labels (n,)
    loss           "cross_entropy", "mse" or "bce"
    l2             weight of the penalty |w - w_init|^2 / 2 [1]
    epochs         of Adam, in batches of `batch_size` examples
    learning_rate  of Adam at the start of the `schedule`, "cosine" (down to 0) or "constant"
    polish_steps   iterations of polishing, at most
    threshold      of the gradient's norm, in place of `stopping_rule`
    seed           of the order of the examples
    progress       called with a line of text an epoch or an iteration

    Raises ValueError for a random or batch-dependent model, for one without a parameter that moves,
    and where the objective stops being finite. Source: (eq:objective).

    >>> x = torch.eye(4).repeat(3, 1)
    >>> result = train(nn.Linear(4, 2), x, torch.arange(12) % 2, epochs=1, polish_steps=50)
    >>> result.converged, len(result.history) < 51
    (True, True)
    """
    result = Training()
    twin, x, y = admit(model, x, y, loss)
    refuse_other_training(twin, x)
    to_precision(model, torch.float32 if epochs else torch.float64).eval()
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not moving:
        raise ValueError(
            "No parameter of the model requires a gradient: unfreeze some and run again."
        )
    centre = torch.cat([p.detach().double().reshape(-1) for p in moving.values()]).cpu()

    def losses_in(dtype: torch.dtype) -> Losses:
        return Losses(model, x, y, loss, parameters=list(moving), dtype=dtype)

    def note(phase: str, objective: float, gradient: Tensor) -> None:
        step = len(result.history) + 1
        norm = gradient.norm().item()
        row = {"step": step, "phase": phase, "objective": objective, "gradient_norm": norm}
        result.history.append(row)
        progress(f"{phase} {step}: objective {objective:.6f}, |gradient| {norm:.2e}")

    if epochs:
        single = losses_in(torch.float32)
        objective = Objective(single, centre.to(single.w), l2)
        order = generator("batches", seed)
        permutations = [torch.randperm(len(x), generator=order) for _ in range(epochs)]
        batches = [rows.split(batch_size) for rows in permutations]
        _put(model, single.unflatten(_adam(objective, batches, learning_rate, schedule, note)))
    to_precision(model, torch.float64)
    losses = losses_in(torch.float64)
    w = losses.w.cpu()  # the optimiser works on the CPU, the losses where they are
    rule = stopping_rule if threshold is None else lambda losses, w: threshold
    # single precision goes most of the way at half the cost; double precision has the last word
    for dtype in (torch.float32, torch.float64):
        if polish_steps > 0:
            polishing = Polishing(Objective(losses_in(dtype), centre, l2), rule, polish_steps, note)
            w = polishing.run(w)
            polish_steps = polishing.steps
    _put(model, losses.unflatten(w))
    gradient = losses.gradient(w.to(losses.w)).cpu()
    result.threshold = rule(losses, w)
    result.gradient_norm = (gradient + l2 * (w - centre)).norm().item()
    result.gradient_norm_loss = gradient.norm().item()
    result.distance = (w - centre).norm().item()
    if not math.isfinite(result.gradient_norm):
        raise ValueError(
            "The gradient of the objective is not finite: "
            "lower learning_rate and look at the inputs."
        )
    result.converged = result.gradient_norm <= result.threshold
    return result


def _put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in tensors.items():
            model.get_parameter(name).copy_(value)


def _adam(
    objective: Objective,
    batches: list,
    learning_rate: float,
    schedule: str,
    note: Callable[[str, float, Tensor], None],
) -> Tensor:
    """From the objective's centre through `batches`, their rows by epoch; returns weights (P,)."""
    w = objective.centre.clone()
    optimizer = torch.optim.Adam([w], lr=learning_rate)
    if schedule == "cosine":
        rate = lr_scheduler.CosineAnnealingLR(optimizer, sum(map(len, batches)))
    else:
        rate = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    for epoch, rows_of_batches in enumerate(batches, 1):
        total = 0.0
        for rows in rows_of_batches:
            value, w.grad = objective(w, rows)
            total += value * len(rows) / objective.losses.n
            optimizer.step()
            rate.step()
        if not math.isfinite(total):
            raise ValueError(
                f"The objective became {total} in epoch {epoch}: lower learning_rate and run again."
            )
        note("adam", total, w.grad)
    return w


def accuracy(model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy") -> float:
    """Share of the examples `x` (n, ...) whose largest logit in the model is that of `y` (n,); with
    the `loss` "bce" of those whose one logit has the sign of their class.

    >>> accuracy(nn.Linear(2, 1), torch.ones(3, 2), torch.zeros(3))
    1.0
    """
    with torch.no_grad(), second_order_mode():
        weights = next(model.parameters())
        x = x.to(weights) if x.is_floating_point() else x.to(weights.device)
        f = logits(model, x)
        chosen = (f[..., 0] > 0).long() if loss == "bce" else f.argmax(-1)
        right = chosen == y.to(x.device)
        return right.double().mean().item()


def evaluate(model: nn.Module, dataset: Dataset, loss: str = "cross_entropy") -> pd.DataFrame:
    """What the `model` has learned, a row for each part of the `dataset`.

    Columns: examples, accuracy and its standard error, mean, standard deviation ("spread S") and
    largest of the examples' losses, `loss` by name [nat for "cross_entropy"].

    >>> from types import SimpleNamespace as Parts
    >>> x, y = torch.ones(3, 2), torch.zeros(3, dtype=torch.long)
    >>> parts = Parts(x_train=x, y_train=y, x_calibration=x, y_calibration=y, x_test=x, y_test=y)
    >>> evaluate(nn.Linear(2, 1), parts)["accuracy"].to_dict()
    {'training': 1.0, 'calibration': 1.0, 'held-out': 1.0}
    """
    rows = {}
    names = {"train": "training", "calibration": "calibration", "test": "held-out"}
    for part, name in names.items():
        x = getattr(dataset, f"x_{part}")
        y = getattr(dataset, f"y_{part}")
        losses = per_sample_losses(model, x, y, loss)
        right = accuracy(model, x, y, loss)
        rows[name] = {
            "examples": len(x),
            "accuracy": right,
            "± s.e.": (right * (1 - right) / len(x)) ** 0.5,
            "mean loss": losses.mean().item(),
            "spread S": losses.std().item(),
            "largest loss": losses.max().item(),
        }
    return pd.DataFrame(rows).T.astype({"examples": int})
