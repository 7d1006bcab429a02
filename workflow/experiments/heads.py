"""Heads trained in a ball on features of a fixed body, as often as one likes."""

from __future__ import annotations

import math

import numpy as np
import torch

from utils.data import synthetic_draw
from utils.hessian import Losses
from utils.networks.training import train
from utils.report.over_runs import share_interval
from utils.sample_size.ball import k_ball
from utils.surface.retraining import projected_descent
from workflow.experiments.populations import CONFIDENCE, PILOT, network


class AtOnce:
    """`Losses.value_and_gradient` of a small model in one pass, where memory allows it."""

    def __init__(self, losses: Losses):
        self.losses = losses

    def value_and_gradient(self, w, rows):
        w = w.detach().requires_grad_()
        f = torch.func.functional_call(
            self.losses.model, self.losses.unflatten(w), (self.losses.x[rows],)
        )
        value = torch.nn.functional.cross_entropy(f, self.losses.y[rows])
        return value.detach(), torch.autograd.grad(value, w)[0]


class Heads:
    """Heads on the fixed features of a trained body: training in the ball around a head that has
    seen nothing.

    pool: 40 000 samples, the population that trainings draw from; held: 20 000 others, on which
    errors are taken, above the pool's own best head in the ball."""

    steps, radius = 60, 1.0

    def __init__(self, kind: str):
        x, y = synthetic_draw(600, 1)
        self.body = network(kind, x, int(y.max()) + 1, seed=0, width=8)
        train(self.body, x, y, l2=1e-2, epochs=15, polish_steps=0)
        torch.manual_seed(1)
        self.centre = torch.nn.Linear(8, int(y.max()) + 1).double()
        if kind == "vit":
            self.body.head = torch.nn.Identity()
        else:
            self.body.layers[-1] = torch.nn.Identity()
        self.pool, self.held, self.pilot = (
            self.sample(40000, 2),
            self.sample(20000, 4),
            self.sample(PILOT, 3),
        )
        self.whole, self.best = AtOnce(self.pool), 0.0
        self.best = self.error(self.trained(range(self.pool.n), 4 * self.steps))
        self.gain = self.error(self.pool.w)

    def sample(self, n: int, seed: int) -> Losses:
        x, y = synthetic_draw(n, seed)
        with torch.no_grad():
            return Losses(self.centre, self.body(x.double()), y)

    def trained(self, rows, steps: int, start=None):
        return projected_descent(self.whole, rows, self.pool.w, self.radius, steps, start)

    def error(self, w) -> float:
        return self.held.values(w).mean().item() - self.best

    def meets(self, k: int, acceptable: float, pilots: int, seed: int) -> tuple[int, float]:
        """Of `pilots` trainings on k samples those with an acceptable error; the largest
        optimisation gap of five."""
        hits, gaps, generator = 0, [], np.random.default_rng(seed)
        for i in range(pilots):
            rows = generator.integers(self.pool.n, size=k)
            w = self.trained(rows, self.steps)
            hits += self.error(w) <= acceptable
            if i < 5:
                first, last = (
                    self.whole.value_and_gradient(v, rows)[0]
                    for v in (w, self.trained(rows, self.steps, w))
                )
                gaps.append((first - last).item())
        return hits, max(gaps)

    def least(self, acceptable: float, pilots: int, most: float) -> tuple[float, float, float]:
        """The least size from which on trainings keep the promise, between the last that surely
        fails and the first that surely keeps it, by the exact intervals of the shares."""
        sizes, met = [1], []
        while sizes[-1] < most and [m == pilots for m in met[-4:]] != [True] * 4:
            met.append(self.meets(sizes[-1], acceptable, pilots, 5000 + sizes[-1])[0])
            sizes.append(math.ceil(1.5 * sizes[-1]))
        ends = [share_interval(m, pilots) for m in met]
        last_miss, last_fail, last_doubt = (
            max([-1, *(i for i, missed in enumerate(kind) if missed)])
            for kind in (
                [m < CONFIDENCE * pilots for m in met],
                [high < CONFIDENCE for _, high in ends],
                [low < CONFIDENCE for low, _ in ends],
            )
        )
        return sizes[last_miss + 1], sizes[max(last_fail, 0)], sizes[last_doubt + 1]


def a_priori(heads: Heads, tolerance: float) -> float:
    """The ball size with S, |grad l| and |H|_F at their largest over all inputs, for the head of a
    pre-norm ViT.

    LayerNorm bounds the features v; a loss in [0, C] has S <= C/2, |p - e_y| <= sqrt 2, and |diag p
    - p p^T|_F^2 = q - 2 sum p^3 + q^2 <= q - q^2 <= 1/4 with q = sum p^2, because sum p^3 >= q^2.
    """
    norm, head = heads.body.norm, heads.centre
    longest = (
        norm.weight.abs().max().item() * math.sqrt(heads.body.config.d_model)
        + norm.bias.norm().item()
    )
    squared = longest**2 + 1  # >= |[v 1]|^2
    size = torch.linalg.matrix_norm(torch.cat([head.weight, head.bias[:, None]], 1), 2).item()
    loss = math.log(len(head.bias)) + math.sqrt(2 * squared) * size
    B = loss / 2 + heads.radius * math.sqrt(2 * squared) + heads.radius**2 / 2 * squared / 2
    return k_ball(B, tolerance, CONFIDENCE)
