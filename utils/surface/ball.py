"""The worst case over a ball around the weights, searched, beside its Taylor terms at the centre.

f is (mean loss of some examples) - (mean loss of others). One step: the new example against the
first k, and L_{k+1} - L_k = f/(k+1). Distance to the limit: the first k against the rest, and
L_k - L_n = (1 - k/n) f. Source: (thm:one-step-ball), (thm:surface-ball).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from utils.hessian import Losses
from utils.hessian.coordinates import Operator
from utils.hessian.norms import operator_norm
from utils.run.streams import generator
from utils.surface.identities import running_means


def onto_ball(w: Tensor, centre: Tensor, radius: float) -> Tensor:
    """The point of the ball nearest to w.

    w       (P,)
    centre  (P,)
    radius  of the ball [units of weight]

    >>> onto_ball(torch.tensor([3.0, 4.0]), torch.zeros(2), 1.0)
    tensor([0.6000, 0.8000])
    """
    distance = (w - centre).norm().item()
    return w if distance <= radius else centre + (w - centre) * (radius / distance)


def worst_in_ball(
    value_and_gradient: Callable[[Tensor], tuple[float, Tensor]],
    centre: Tensor,
    radius: float,
    starts: Iterable[Tensor],
    steps: int,
) -> tuple[float, Tensor]:
    """Largest |f| that projected gradient ascent finds: a lower estimate of the supremum.

    From every start f is followed up where it is positive and down where it is negative, in steps
    along the gradient, back onto the ball, whose length falls from 2 radius to a hundredth of that:
    the first step solves a linear f.

    value_and_gradient  w (P,) -> f(w) and its gradient (P,)
    centre              (P,)
    radius              of the ball [units of weight]
    starts              weights (P,) in the ball
    steps               from each start [1]

    Returns |f|, and the weights (P,) where.

    >>> linear = lambda w: (w.sum().item(), torch.ones(2))
    >>> value, _ = worst_in_ball(linear, torch.zeros(2), 1.0, [torch.zeros(2)], 3)
    >>> round(value, 3)
    1.414
    """
    best, where = -1.0, centre
    for w in starts:
        sign = None
        for t in range(steps + 1):
            value, gradient = value_and_gradient(w)
            if abs(value) > best:
                best, where = abs(value), w
            if sign is None:
                sign = math.copysign(1.0, value)
            length = gradient.norm()
            if t == steps or length == 0:
                break
            step = sign * 2 * radius * 0.01 ** (t / steps) * gradient / length
            w = onto_ball(w + step, centre, radius)
    return best, where


@dataclass(frozen=True)
class OnBall:
    """f over |w - w0| <= radius beside its Taylor terms at w0 [nat].

    radius     r [units of weight]
    found      largest |f| by kind of probe: "random", "gradient" (both directions), "eigenspace",
               "worst" (ascent)
    value      |f(w0)|
    gradient   r |grad f(w0)|
    curvature  (r^2/2) ||Hess f(w0)||, by Lanczos: a lower estimate, residual below 1e-3 of it
    remainder  largest |f(w) - its quadratic Taylor polynomial| over the probes
    """

    radius: float
    found: dict[str, float]
    value: float
    gradient: float
    curvature: float
    remainder: float

    @property
    def measured(self) -> float:
        """The largest |f| found: a lower estimate of the supremum."""
        return max(self.found.values())

    @property
    def second_form(self) -> float:
        """(eq:one-step-ball-b) times k + 1, without its third-order remainder."""
        return self.value + self.gradient + self.curvature

    def first_form(self, curvature: float, gradient: bool = True) -> float:
        """(eq:one-step-ball-a) times k + 1.

        curvature  sum of the two Hessian norms in it [nat/w^2]; a bound if they are suprema over
                   the ball
        gradient   with the gradient term, which the published inequality lacks
        """
        slope = self.gradient if gradient else 0.0
        return self.value + slope + self.radius**2 / 2 * curvature


class Difference:
    """f as a function of the weights.

    losses  of all examples
    plus    whose mean loss counts
    minus   whose mean loss is taken away

    >>> losses = Losses(torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 0]))
    >>> f = Difference(losses, [0], [1])
    >>> f.value(losses.w) == f.value_and_gradient(losses.w)[0]
    True
    """

    def __init__(self, losses: Losses, plus: ArrayLike, minus: ArrayLike):
        self.losses = losses
        self.plus = torch.as_tensor(plus)
        self.minus = torch.as_tensor(minus)
        sizes = torch.tensor([len(self.plus), -len(self.minus)])
        self.rows = torch.cat([self.plus, self.minus])
        self.weights = (1 / sizes.double()).repeat_interleave(sizes.abs())

    def value(self, w: Tensor) -> float:
        """f(w) [nat]."""
        return (self.losses.values(w, self.rows) @ self.weights.to(w)).item()

    def value_and_gradient(self, w: Tensor) -> tuple[float, Tensor]:
        """f(w) and its gradient (P,), in one pass."""
        value, gradient = self.losses.value_and_gradient(w, self.rows, self.weights)
        return value.item(), gradient

    def gradient(self) -> Tensor:
        """At the weights of the losses (P,)."""
        return self.losses.gradient(rows=self.plus) - self.losses.gradient(rows=self.minus)

    def hessian(self) -> Operator:
        """v (P,) -> Hess f v at the weights of the losses."""
        return self.losses.hessian(rows=self.rows, weights=self.weights)

    def stream(self, seed: int) -> int:
        """A seed of torch that depends on the examples: other ones, other directions."""
        words = [seed, len(self.plus), *self.plus.tolist(), *self.minus.tolist()]
        return int(np.random.SeedSequence(words).generate_state(1)[0])


@dataclass(frozen=True)
class _Direction:
    """A direction from w0 in which f is looked at: its Taylor coefficients there."""

    kind: str
    vector: Tensor
    slope: float
    bend: float

    def taylor(self, value: float, r: float) -> float:
        return value + r * self.slope + r * r / 2 * self.bend


def difference_on_ball(
    losses: Losses,
    plus: ArrayLike,
    minus: ArrayLike,
    radii: Sequence[float],
    *,
    basis: Tensor | None = None,
    n_random: int = 2,
    steps: int | Sequence[int] = 8,
    restarts: int = 2,
    seed: int = 0,
) -> list[OnBall]:
    """f on balls around the weights: at probes of each radius, then by ascent from the best.

    Probes: both directions of grad f, some at random, some at random in the span of a basis.
    Source: (thm:one-step-ball), (thm:surface-ball).

    losses    of n examples, as a function of the P weights
    plus      examples whose mean loss counts
    minus     examples whose mean loss is taken away
    radii     of the balls [units of weight]
    basis     (D, P), orthonormal
    n_random  directions at random, and as many in the span of the basis [1]
    steps     of ascent, one number or one a radius [1]
    restarts  probes from which ascent starts [1]
    seed      of the directions, which depend on the examples as well

    Returns one `OnBall` a radius.

    >>> losses = Losses(torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 0]))
    >>> found = difference_on_ball(losses, [0], [1], [0.1, 1.0], steps=2)
    >>> found[0].measured < found[1].measured
    True
    """
    f = Difference(losses, plus, minus)
    w0 = losses.w
    hessian = f.hessian()
    gradient = f.gradient()
    stream = generator("contrast on a ball", f.stream(seed))

    def normal(n: int, size: int) -> Tensor:
        return torch.randn(n, size, generator=stream, dtype=torch.float64).to(w0)

    def along(kind: str, u: Tensor) -> _Direction:
        return _Direction(kind, u, (gradient @ u).item(), (u @ hessian(u)).item())

    noise = normal(n_random + 1, losses.P)
    curvature = operator_norm(hessian, noise[0], tolerance=1e-3, max_steps=60).value
    tiny = torch.finfo(w0.dtype).tiny  # equal examples: no direction, not nan
    unit = gradient / gradient.norm().clamp_min(tiny)
    directions = [along("gradient", unit), along("gradient", -unit)]
    directions += [along("random", u / u.norm()) for u in noise[1:]]
    if basis is not None:
        mixed = normal(n_random, len(basis)) @ basis
        directions += [along("eigenspace", u / u.norm()) for u in mixed]
    curvature = max(curvature, *(abs(d.bend) for d in directions))  # both are lower estimates

    f0 = f.value(w0)
    length = gradient.norm().item()
    ascents = np.broadcast_to(steps, len(radii)).tolist()
    balls = []
    for r, n_ascent in zip(map(float, radii), ascents, strict=True):
        values = [f.value(w0 + r * d.vector) for d in directions]
        rest = [abs(v - d.taylor(f0, r)) for v, d in zip(values, directions, strict=True)]
        best = np.argsort([-abs(v) for v in values], kind="stable")[:restarts]
        starts = [w0 + r * directions[i].vector for i in best]
        _, w = worst_in_ball(f.value_and_gradient, w0, r, starts, n_ascent)
        worst = f.value(w)
        end = along("worst", w - w0)
        rest.append(abs(worst - end.taylor(f0, 1.0)))
        curvature = max(curvature, abs(end.bend) / r**2)
        found: dict[str, float] = {}
        for d, v in zip(directions, values, strict=True):
            found[d.kind] = max(found.get(d.kind, 0.0), abs(v))
        found["worst"] = max(abs(worst), *found.values(), abs(f0))  # the centre is in the ball
        terms = abs(f0), r * length, r * r / 2 * curvature
        balls.append(OnBall(r, found, *terms, max(rest)))
    return balls


def distances_on_ball(
    losses: Losses, orders: np.ndarray, sizes: Sequence[int], radius: float, steps: int = 3
) -> np.ndarray:
    """Largest |L_k - L_n| found in the ball, for k = 1 .. n: lower estimates of the suprema.

    Each order is asked at weights of its own, the same ones at every k: the centre, and where
    ascent from the centre ends for each of some k. Source: (eq:ball-tail).

    losses  of n examples, as a function of the weights
    orders  (n_orders, n) integers
    sizes   the k from which ascent is made [examples]
    radius  of the ball [units of weight]
    steps   of ascent [1]

    Returns (n_orders, n) [nat].

    >>> losses = Losses(torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1]))
    >>> distances_on_ball(losses, np.array([[0, 1]]), [1], 0.1).shape
    (1, 2)
    """
    distances = []
    for order in torch.as_tensor(orders):
        points = [losses.w]
        for k in sizes:
            f = Difference(losses, order[:k], order[k:])
            points.append(
                worst_in_ball(f.value_and_gradient, losses.w, radius, [losses.w], steps)[1]
            )
        values = [losses.values(w).double().cpu().numpy() for w in points]
        means = np.concatenate([running_means(v, order[None].numpy()) for v in values])
        distances.append(np.abs(means - means[:, -1:]).max(0))
    return np.array(distances)
