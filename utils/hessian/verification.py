"""Whether gradient and product are the derivatives of the loss, by central differences.

Automatic differentiation can be right about the operators it is shown and wrong about the loss: a
padding row without gradient, a rounding with the gradient of another function, a value that is
detached. What is computed then is still what PyTorch says, but no curvature of the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.hessian.losses import Losses
from utils.run.streams import generator

FEW = 8  # examples
STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-3)  # in units of the weights' length: one is enough
RELATIVE = 1e-3
ROUNDING = 1e4  # allowed, in units of the precision over the step


def derivatives_hold(losses: Losses) -> bool:
    """Compare along one random direction, over the first examples.

    The slope of the mean loss with the gradient, and that of the gradient with the product; in
    float64 alone, elsewhere nothing is said and True returned. A kink that lies between two points
    spoils a step, so that one of several has to agree. Cost: from two gradients on.

    >>> derivatives_hold(Losses(torch.nn.Linear(2, 3), torch.ones(4, 2), [0, 1, 2, 0]))
    True
    """
    if losses.w.dtype != torch.float64:
        return True
    rows = torch.arange(min(FEW, losses.n), device=losses.x.device)
    w = losses.w
    stream = generator("derivatives", 0)
    v = torch.randn(losses.P, generator=stream, dtype=torch.float64).to(w)
    v *= w.norm().clamp_min(1.0) / v.norm()
    gradient = losses.gradient(rows=rows)
    product = losses.product(v, rows=rows)
    size = losses.values(rows=rows).abs().mean() + gradient.norm() + product.norm()
    return any(_agree(losses, rows, t * v, gradient @ v, product, size / t, t) for t in STEPS)


def _agree(
    losses: Losses,
    rows: Tensor,
    step: Tensor,
    expected: Tensor,
    product: Tensor,
    size: Tensor,
    t: float,
) -> bool:
    """Both at a step, t times the direction; `size` of what is rounded, over t."""
    above = losses.w + step
    below = losses.w - step
    slope = (losses.values(above, rows).mean() - losses.values(below, rows).mean()) / (2 * t)
    bend = (losses.gradient(above, rows) - losses.gradient(below, rows)) / (2 * t)
    noise = ROUNDING * torch.finfo(torch.float64).eps * size
    if not (slope - expected).abs() <= RELATIVE * expected.abs() + noise:
        return False
    return bool((bend - product).norm() <= RELATIVE * product.norm() + noise)
