"""The rung majorant: the absolute forms of all nodes together, their largest eigenvalue by
products.

No products of norms: tangents and adjoints are exact, only the signs of the nodes' second-order
forms are lost. Source: Theorem (thm:majorant), Theorem (thm:lanczos) for positive semidefinite
matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.bounds.subject import ROUNDING, Subject
from utils.calculus.nodes.arrays import unit
from utils.calculus.tape import Named, Tape
from utils.hessian.coordinates import Coordinates
from utils.hessian.lanczos import lanczos, lanczos_epsilon
from utils.run.streams import generator

MEMORY = 2**31  # of the working arrays [bytes]
ACTIVATIONS = 6  # arrays for each value during a walk
SHARE = 0.1  # of a random direction in those that the couplings are balanced along
MOST = 64  # examples at a time: their vectors stay near the caches of a CPU


def majorant(
    of: Subject,
    confidence: float = 0.95,
    max_steps: int = 60,
    rounds: int = 16,
    seed: int = 0,
    memory: int = MEMORY,
) -> dict[str, Tensor]:
    """lambda_max(Q_i) >= ||H_i|| for Q_i = J^T S J + sum over nodes of |M_z| on the tangents.

    The couplings are balanced once along a random direction, then in `rounds` power steps on Q_i
    from the gradient and that direction; then Lanczos runs `max_steps` products from a uniform
    start of a stream of its own. "lower" (n,) <= lambda_max(Q_i) always; "M" (n,) >=
    lambda_max(Q_i) for all examples together with probability `confidence` over that start (inf
    while too few steps say nothing).

    of          the network and its examples
    confidence  that every "M" holds, over the start, between 0 and 1
    max_steps   products of Lanczos for each example at most
    rounds      power steps that balance the couplings
    seed        of both directions
    memory      budget of the working arrays [bytes]

    Raises ValueError for a confidence outside (0, 1), Unknown for a node without a majorant.
    Source: Theorem (thm:majorant), Theorem (thm:lanczos).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a number between 0 and 1.")
    failure = (1 - confidence) / of.n
    first = Majorants(of, torch.arange(1))
    each = 8 * ((max_steps + 4) * first.P + ACTIVATIONS * of.total)
    size = max(1, min(MOST, memory // each))
    parts = []
    for rows in torch.arange(of.n, device=of.x.device).split(size):
        operator = Majorants(of, rows)
        operator.balance(uniform(first.P, "majorant balance", seed, rows), rounds)
        start = uniform(first.P, "lanczos start", seed, rows)
        ritz = lanczos(operator, start, max_steps=max_steps, done=lambda ritz, j: ritz.exhausted)
        parts.append((operator.unscaled(ritz.high), ritz.steps, ritz.exhausted))
    high, steps, exhausted = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    worst = min(2 * failure, 0.999)
    gaps = {q: lanczos_epsilon(q, first.P, worst) for q in set(steps.tolist())}
    gap = torch.tensor([gaps[q] for q in steps.tolist()], dtype=torch.float64)
    certified = torch.where(gap < 0.5, high / (1 - gap), torch.inf)
    return {"lower": high, "M": torch.where(exhausted, high, certified) * ROUNDING, "steps": steps}


def uniform(P: int, name: str, seed: int, rows: Tensor) -> Tensor:
    """A direction (m, P), uniform on the sphere and the same for all m `rows`.

    P           coordinates
    name, seed  of its stream: Lanczos' start must not have met the matrix before
    """
    stream = generator(name, seed)
    one = torch.randn(1, P, generator=stream, dtype=torch.float64)
    return one.to(rows.device).expand(len(rows), -1)


class Majorants(Coordinates):
    """The matrices Q_i of the examples in `rows`, times powers of two that keep their products near
    1, as maps on vectors (m, P), one for each example."""

    def __init__(self, of: Subject, rows: Tensor):
        self.of = of
        self.rows = rows
        self.tape = of.tape(rows)
        self.here = torch.arange(len(rows), device=of.x.device)
        self.sigma: Named = {}
        self.exponent = torch.zeros(len(rows), dtype=torch.int32, device=of.x.device)
        self.move(dict(of.model.named_parameters()), of.names)

    def tape_of(self, local: Tensor) -> Tape:
        """The tape of the examples rows[local]."""
        if not torch.equal(self.here, local):
            self.here = local
            self.tape = self.of.tape(self.rows[local])
            self.tape.sigma = {name: t[local] for name, t in self.sigma.items()}
        return self.tape

    @torch.no_grad()
    def __call__(self, V: Tensor, local: Tensor, out: Tensor | None = None) -> Tensor:
        """2^e Q_i V_j (m, P), i = rows[local[j]]."""
        product = self.tape_of(local).product(self.unflatten(V), "majorant")
        return torch.ldexp(self.flatten(product, (len(V),)), self.exponent[local, None])

    def unscaled(self, values: Tensor) -> Tensor:
        """The values (m,), eigenvalues of the maps, as those of the Q_i."""
        return torch.ldexp(values, -self.exponent)

    @torch.no_grad()
    def balance(self, start: Tensor, rounds: int) -> None:
        """Weigh the couplings: the order of magnitude along `start` (m, P), in which everything
        moves, then `rounds` steps of descent at the leading eigenvector, which the gradient is
        near. A share of `start` stays in, so that no coupling is weighed by rounding errors
        alone."""
        everyone = self.here
        start = unit(start, 1)
        self.tape.balance(self.unflatten(start), whole=True)
        gradient = self.flatten(self.tape.gradient(), (len(start),))
        v = unit(unit(gradient, 1) + start, 1)
        for _ in range(rounds):
            self.tape.balance(self.unflatten(v))
            v = self(v, everyone)
            size = v.abs().amax(1)
            self.exponent -= torch.where(size > 0, torch.frexp(size).exponent, 0)
            v = unit(unit(v, 1) + SHARE * start, 1)
        self.sigma = dict(self.tape.sigma)
