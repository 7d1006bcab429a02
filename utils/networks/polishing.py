"""Polishing: from good weights towards a stationary point of the objective, on all examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from utils.hessian import Losses
from utils.hessian.coordinates import Operator
from utils.hessian.norms import operator_norm

ROUND = 60  # L-BFGS iterations of a round
LBFGS = {"maxiter": ROUND, "maxfun": 3 * ROUND, "maxcor": 20, "ftol": 0.0, "gtol": 0.0}


@dataclass
class Objective:
    """w (P,) -> L_n(w) + (l2/2)|w - centre|^2 and its gradient, in the dtype and device of w.

    losses  L_n, which computes in its own dtype and on its own device
    centre  (P,), in the dtype and on the device of the w that will be given
    l2      weight of the penalty [1]

    Source: (eq:objective).

    >>> losses = Losses(torch.nn.Linear(2, 2), torch.ones(3, 2), torch.tensor([0, 1, 1]))
    >>> objective = Objective(losses, losses.w, l2=0.1)
    >>> objective(losses.w)[1].shape
    torch.Size([6])
    """

    losses: Losses
    centre: Tensor
    l2: float

    def __call__(self, w: Tensor, rows: Tensor | None = None) -> tuple[float, Tensor]:
        """The value and the gradient (P,) at `w`, over the examples `rows` (default: all)."""
        loss, gradient = self.losses.value_and_gradient(w.to(self.losses.w), rows)
        move = w - self.centre
        penalty = 0.5 * self.l2 * move.square().sum()
        return loss.item() + penalty.item(), gradient.to(w) + self.l2 * move

    def hessian(self, w: Tensor, rows: Tensor) -> Operator:
        """The map v (P,) -> (H + l2) v, H the Hessian at `w` of the mean loss over `rows`."""
        curvature = self.losses.hessian(w.to(self.losses.w), rows)
        return lambda v: curvature(v.to(self.losses.w)).to(v) + self.l2 * v


def stopping_rule(losses: Losses, w: Tensor) -> float:
    """A tenth of the standard error of the mean gradient, 0.1 sqrt(tr Sigma_g / n).

    Sigma_g is the covariance (divisor n - 1) at the weights `w` (P,) of the gradients of the n
    examples of `losses`: what is closer to a stationary point cannot be told from one.
    Source: (eq:objective).

    >>> losses = Losses(torch.nn.Linear(2, 2), torch.ones(3, 2), torch.tensor([1, 1, 1]))
    >>> stopping_rule(losses, losses.w) < 1e-8  # three equal examples
    True
    """
    w = w.to(losses.w)
    squares = 0.0
    total = torch.zeros_like(w)
    for rows in torch.arange(losses.n).split(losses.chunk(3)):
        gradients = losses.sample_gradients(w, rows)
        squares += gradients.square().sum().item()
        total += gradients.sum(0)
    trace = (squares - total.square().sum().item() / losses.n) / max(losses.n - 1, 1)
    return 0.1 * math.sqrt(max(trace, 0.0) / losses.n)


@dataclass
class Polishing:
    """Full-batch descent in the precision of one objective's losses.

    Rounds of L-BFGS, which follows the flat directions, each followed by gradient steps of length
    1/||Hessian||, which settle the steep ones that the line search leaves jittering.

    objective  what is made stationary, of weights in float64 on the CPU
    rule       losses, weights -> the norm of the gradient at which to stop
    steps      iterations left: every one of them is noted
    note       called with the phase, the value and the gradient of an iteration
    limit      what the rule said last
    gradient   (P,) at the weights evaluated last, None before
    """

    objective: Objective
    rule: Callable[[Losses, Tensor], float]
    steps: int
    note: Callable[[str, float, Tensor], None]
    limit: float = math.inf
    gradient: Any = None

    def run(self, w: Tensor) -> Tensor:
        """From `w` (P,) until the rule holds or no step is left; returns the weights there.

        Raises ValueError where the objective is not finite at `w`.
        """
        value = self._evaluate(w)
        if not math.isfinite(value):
            raise ValueError(
                f"The objective is {value} before polishing: "
                "lower learning_rate and look at the inputs."
            )
        while not self._done(w):
            w = self._lbfgs(w)
            self._evaluate(w)
            self.limit = math.inf  # so that the rule is asked anew
            if self._done(w):  # the gradient may be exactly 0, and no direction for what follows
                break
            w = self._settle(w)
        return w

    def _lbfgs(self, w: Tensor) -> Tensor:
        def value_and_gradient(w: np.ndarray) -> tuple[float, np.ndarray]:
            value = self._evaluate(torch.from_numpy(w.copy()))
            return value, self.gradient.numpy()

        # SciPy calls it after evaluating this iterate
        def callback(intermediate_result: OptimizeResult) -> None:
            self._took("l-bfgs", intermediate_result.fun)
            if self._done(torch.from_numpy(intermediate_result.x.copy())):
                raise StopIteration

        options = {"jac": True, "method": "L-BFGS-B", "callback": callback, "options": LBFGS}
        return torch.from_numpy(minimize(value_and_gradient, w.numpy(), **options).x.copy())

    def _settle(self, w: Tensor) -> Tensor:
        # a step of 1/norm is stable up to a norm twice too small: some of the examples are enough
        some = torch.arange(min(256, self.objective.losses.n))
        hessian = self.objective.hessian(w, some)
        norm = operator_norm(hessian, self.gradient, tolerance=1e-2, max_steps=12).value
        for _ in range(ROUND // 2):
            if self._done(w):
                break
            w = w - self.gradient / norm
            self._took("settle", self._evaluate(w))
        return w

    def _evaluate(self, w: Tensor) -> float:
        value, self.gradient = self.objective(w)
        return value

    def _took(self, phase: str, value: float) -> None:
        self.steps -= 1
        self.note(phase, float(value), self.gradient)

    def _done(self, w: Tensor) -> bool:
        """The rule moves with the weights: it is asked anew only where the gradient is near it."""
        norm = self.gradient.norm().item()
        if norm <= 1.05 * self.limit:
            self.limit = self.rule(self.objective.losses, w)
        return norm <= self.limit or self.steps <= 0
