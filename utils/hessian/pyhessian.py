"""PyHessian 0.1 (Yao, Gholami, Keutzer, Mahoney 2020) with its errors repaired.

Every function takes a `losses` object as `utils.hessian.losses.Losses` is one: the model in eval
mode, x (n, ...) and labels y (n,), the loss's name, `point` (the chosen parameters by name), their
number P, the flat weights w (P,) and product(v) = H v, H (P, P) the Hessian of the mean loss. All n
examples go through one graph. What PyHessian alone does wrong, and what is done about it here:

 1. `eigenvalues` stops when its estimate stops changing and returns the one before, without a
    residual: we ask for a tight tolerance from several starts, and take Rayleigh quotient and
    residual of its vector ourselves.
 2. Floors of 1e-6 in normalisation and stopping: the loss is multiplied by a power of two, undone
    exactly.
 3. `density` calls `torch.eig`, which torch removed: a stand-in takes its place during the call.
 4. `trace` divides by its running mean, sign and all, and so stops once that is negative: no
    stopping rule.
 5. Gradients left in `.grad` are added to its own: it gets parameters of its own.
 6. `backward(create_graph=True)` makes a cycle of `.grad` and graph that is never freed: `.grad` is
    cleared.
 7. Parameters that the loss or its gradient does not depend on: a term that is zero with all its
    derivatives.
 8. Fused attention has no second derivative: it runs in `second_order_mode`.
 9. `density` adds in place to products H v, two of which may share memory, as those of a and b in
    a + b do: the term of trap 7 makes each a tensor of its own.
10. Start vectors and T take torch's default dtype and its global generator: both are set, and
    restored afterwards.
11. Lanczos goes on when its space is exhausted, on noise: T ends there, or nodes lie far outside
    the spectrum.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pyhessian import hessian
from torch import Tensor, nn
from torch.func import functional_call

from utils.hessian.losses import Losses
from utils.networks.copies import second_order_mode
from utils.networks.losses import logits, loss_from_logits
from utils.run.streams import generator, torch_seed

SIZE = 40  # PyHessian sees a norm of about 2^SIZE, beside which floors of 1e-6 are rounding
DEFAULTS: dict[str, Any] = {  # its own
    "tolerance": 1e-3,
    "max_iterations": 100,
    "starts": 1,
    "rescale": False,
}


@dataclass(frozen=True)
class Eigenvalue:
    """The eigenvalue of H of the largest magnitude, as power iteration found it.

    value      |v^T H v| of PyHessian's vector v, |v| = 1: rigorous, the norm of H is at least this
    reported   what PyHessian returned, signed, the rescaling undone
    residual   |H v - (v^T H v) v|: some eigenvalue lies that near v^T H v
    iterations products that PyHessian spent, all starts together
    """

    value: float
    reported: float
    residual: float
    iterations: int


def eigenvalue(
    losses: Losses,
    *,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
    starts: int = 3,
    rescale: bool = True,
    seed: int = 0,
) -> Eigenvalue:
    """The largest |v^T H v| over several power iterations.

    losses          of the batch
    tolerance       relative change of the estimate at which an iteration stops
    max_iterations  of each start
    starts          iterations, of which the largest value counts
    rescale         whether the operator is brought to a size that suits PyHessian
    seed            of the starts

    With `DEFAULTS` this is PyHessian as it comes. Ends of the spectrum near lambda and -lambda mix
    in the vector and stop the rule early: a large residual says so. `reported` is 2e-6 (relative)
    low at best, as PyHessian's vectors have length 1/(1 + 1e-6), at any scale.
    Raises ValueError for less than one start or iteration.

    >>> model = nn.Linear(2, 3, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> round(eigenvalue(Losses(model, torch.tensor([[3.0, 4.0]]), [0])).value, 6)
    8.333333
    """
    if starts < 1 or max_iterations < 1:
        raise ValueError(
            f"There are {starts} starts of {max_iterations} iterations: give at least one of each."
        )
    scale = _scale(losses, seed) if rescale else 1.0
    with prepared(losses, scale, seed) as (theirs, surface):
        runs = [theirs.eigenvalues(maxIter=max_iterations, tol=tolerance) for _ in range(starts)]
    found = []
    for (reported,), (vector,) in runs:
        v = torch.cat([t.reshape(-1) for t in vector])
        if not v.any():  # H v = 0 on the way: any other vector gives a bound, too
            v = torch.ones_like(v)
        v = v / v.norm()
        Hv = losses.product(v)
        theta = v @ Hv
        found.append((theta.abs().item(), reported / scale, (Hv - theta * v).norm().item()))
    return Eigenvalue(*max(found), surface.products)


def trace(losses: Losses, *, probes: int, seed: int = 0) -> tuple[float, float, int]:
    """Mean of v^T H v over Rademacher vectors v, its standard error, and the probes spent: all.

    losses  of the batch
    probes  how many vectors
    seed    of them

    Raises ValueError for fewer than 2 probes.

    >>> losses = Losses(nn.Linear(2, 3), torch.ones(4, 2), [0, 1, 2, 0])
    >>> value, error, spent = trace(losses, probes=4)
    >>> value > 0, spent
    (True, 4)
    """
    if probes < 2:
        raise ValueError(f"A trace from {probes} probes has no standard error: give at least 2.")
    with prepared(losses, 1.0, seed) as (theirs, _):
        values = np.array(theirs.trace(maxIter=probes, tol=-math.inf))
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)), len(values)


def density(
    losses: Losses, *, probes: int, steps: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (probes, min(steps, P)) of stochastic Lanczos quadrature.

    losses  of the batch
    probes  Rademacher vectors v of length 1, for a seed those of `trace`
    steps   products for each
    seed    of the probes

    A row of weights sums to 1, and sum_j weights_j nodes_j^q = v^T H^q v for q < 2 steps. PyHessian
    reorthogonalises once; memory: P min(steps, P). Raises ValueError for no probe or no step.

    >>> losses = Losses(nn.Linear(2, 3), torch.ones(4, 2), [0, 1, 2, 0])
    >>> density(losses, probes=1, steps=3)[0].shape
    (1, 3)
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"There are {probes} probes of {steps} steps: give at least one of each.")
    scale = _scale(losses, seed)
    with (
        prepared(losses, scale, seed) as (theirs, _),
        patch.object(torch, "eig", _eig, create=True),
    ):
        nodes, weights = theirs.density(iter=min(steps, losses.P), n_v=probes)
    return np.array(nodes, dtype=float) / scale, np.array(weights, dtype=float)


def _eig(T: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    """What `torch.eig` gave, for symmetric tridiagonal T (q, q): values (q, 2), vectors (q, q).

    The values are real and imaginary parts. T is cut where a coupling beta is sqrt(eps) of it (trap
    11): the quadrature changes by beta^2. The first node, with weight 0, fills up.
    """
    small = T.diagonal(1).abs() <= math.sqrt(torch.finfo(T.dtype).eps) * T.abs().max()
    q = int(small.nonzero()[0]) + 1 if small.any() else len(T)
    found, basis = torch.linalg.eigh(T[:q, :q])
    values, vectors = found[:1].repeat(len(T)), torch.zeros_like(T)
    values[:q], vectors[:q, :q] = found, basis
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def _scale(losses: Losses, seed: int) -> float:
    """The power of two that brings the norm of H to about 2^SIZE, by two products."""
    stream = generator("pyhessian", seed)
    u = torch.randn(losses.P, generator=stream, dtype=torch.float64).to(losses.w)
    for _ in range(2):
        u = losses.product(u / u.norm())  # H = 0 ends in nan, of exponent 0: any scale does
    exponent = SIZE - math.frexp(u.norm().item())[1]
    return 2.0 ** max(-100, min(exponent, 100))  # finite in single precision, too


class _Surface(nn.Module):
    """Weights -> logits, for the chosen parameters alone: copies that are PyHessian's own."""

    def __init__(self, losses: Losses):
        super().__init__()
        self.losses, self.products = losses, 0
        self.chosen = nn.ParameterList(
            nn.Parameter(t.detach().clone()) for t in losses.point.values()
        )

    def forward(self, x: Tensor) -> Tensor:  # (n, ...) -> (n, K)
        point = dict(zip(self.losses.point, self.chosen, strict=True))
        return logits(lambda z: functional_call(self.losses.model, point, (z,)), x)

    def nothing(self) -> Tensor:
        """Zero, with a gradient and a Hessian of zeros in every parameter."""
        return sum((0 * p).square().sum() for p in self.chosen)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """PyHessian calls this once before each product: that is how they are counted."""
        self.products += 1
        super().zero_grad(set_to_none)


@contextmanager
def prepared(losses: Losses, scale: float, seed: int) -> Iterator[tuple[hessian, _Surface]]:
    """PyHessian's object for `scale` times the mean loss of `losses`, its generators set by `seed`,
    and its parameters; all is put back afterwards."""
    surface = _Surface(losses)
    dtype = torch.get_default_dtype()
    device = losses.x.device
    cuda = device.type == "cuda"

    def criterion(f: Tensor, y: Tensor) -> Tensor:
        return scale * loss_from_logits(f, y, losses.loss).mean() + surface.nothing()

    with (
        torch.random.fork_rng(devices=[device] if cuda else []),
        torch.cuda.device(device) if cuda else nullcontext(),
        torch.enable_grad(),
        second_order_mode(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore", r"Using backward\(\) with create_graph=True"
        )  # .grad is cleared below
        # torch.manual_seed would seed devices that are not restored
        torch.default_generator.manual_seed(torch_seed("pyhessian", seed))
        if cuda:
            torch.cuda.manual_seed(torch_seed("pyhessian", seed))
        try:
            torch.set_default_dtype(losses.w.dtype)
            yield (
                hessian(surface, criterion, data=(losses.x.detach(), losses.y), cuda=cuda),
                surface,
            )
        finally:
            torch.set_default_dtype(dtype)
            for p in surface.chosen:
                p.grad = None
