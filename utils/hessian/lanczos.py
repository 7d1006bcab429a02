"""Lanczos on symmetric operators: extreme eigenvalues, their residuals, a certificate, quadrature.

One recurrence serves everything: the Hessians of many examples side by side, the Hessian of a mean,
the blocks of one, and the quadrature of a spectrum. Operators of any size are right down to the
smallest normal numbers: what would under- or overflow when squared is rescaled by powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from scipy.optimize import brentq
from torch import Tensor

from utils.hessian.coordinates import Coordinates
from utils.hessian.differentiation import refuse_not_finite
from utils.run.streams import generator


@dataclass
class Ritz:
    """Extreme Ritz values of m operators, each field (m,).

    low, high    the ends: both lie inside the spectrum
    residual     |A v - theta v| of the end larger in magnitude, v its unit vector
    other        the same of the opposite end
    steps        products spent
    exhausted    whether the Krylov space was: then every eigenvalue in which the start has a share
                 is among the Ritz values
    alpha, beta  (m, q) the tridiagonal matrices: diagonals, and what follows each entry of them
    """

    low: Tensor
    high: Tensor
    residual: Tensor
    other: Tensor
    steps: Tensor
    exhausted: Tensor
    alpha: Tensor
    beta: Tensor

    @property
    def value(self) -> Tensor:
        """The larger magnitude of the two ends."""
        return torch.maximum(self.high.abs(), self.low.abs())

    @property
    def opposite(self) -> Tensor:
        """How far the end of the smaller magnitude reaches beyond zero, with its residual."""
        return torch.minimum(self.high.clamp_min(0), (-self.low).clamp_min(0)) + self.other

    def rows(self, which: Tensor) -> Ritz:
        """The operators `which` (indices) alone."""
        return Ritz(*(getattr(self, f.name)[which] for f in fields(self)))

    def merge(self, which: Tensor, again: Ritz) -> None:
        """A second run, `again`, on the operators `which`: wider ends, the residual of the larger
        value."""
        before = self.rows(which)
        first = before.value >= again.value
        self.low[which] = torch.minimum(before.low, again.low)
        self.high[which] = torch.maximum(before.high, again.high)
        self.residual[which] = torch.where(first, before.residual, again.residual)
        self.other[which] = torch.where(first, before.other, again.other)
        self.steps[which] += again.steps
        self.exhausted[which] &= again.exhausted


class _Basis:
    """The Krylov vectors (m, P): all of them, or the three that the recurrence needs."""

    def __init__(self, start: Tensor, steps: int, orthogonal: bool, room: Tensor | None):
        m, P = start.shape
        self.orthogonal = orthogonal
        if orthogonal:
            self.Q = start.new_empty(m, steps + 1, P)
        else:
            self.Q = start.new_empty(3, m, P) if room is None else room[:, :m]

    def vector(self, i: int) -> Tensor:
        """The i-th vector (m, P)."""
        return self.Q[:, i] if self.orthogonal else self.Q[i % 3]

    def keep(self, rows: Tensor, last: int) -> None:
        """Only the operators `rows` (m,) stay; `last` is the newest vector."""
        left = int(rows.sum())
        for i in range(0 if self.orthogonal else last - 1, last + 1):
            self.vector(i)[:left] = self.vector(i)[rows]
        self.Q = self.Q[:left] if self.orthogonal else self.Q[:, :left]

    def orthogonalise(self, z: Tensor, j: int) -> None:
        """z (m, P) <- z minus its part along the first j vectors, in place."""
        if self.orthogonal:
            orthogonalise(z, self.Q[:, :j])


def lanczos(
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor,
    *,
    max_steps: int,
    done: Callable[[Ritz, int], Tensor],
    orthogonal: bool = True,
    room: Tensor | None = None,
) -> Ritz:
    """Lanczos on m symmetric operators side by side.

    product     product(V, rows, out) applies operator rows[j] to V[j], into `out` (m, P) or anew
    start       (m, P), not zero
    max_steps   products at most, P if more
    done        done(ritz, steps) -> (m,) bool: which may end. They leave the batch, as those do
                whose Krylov space is exhausted, once they make up a quarter of it
    orthogonal  every vector is orthogonalised against all before it, which takes memory for
                max_steps vectors; without, three are kept, good for about 20 steps at a tolerance
                of 1e-4
    room        (3, at least m, P), memory for these three: fresh memory costs as much as a pass

    Raises ValueError where a product is not finite, or none is allowed.
    Source: Golub, Van Loan, Matrix Computations, section 10.1.

    >>> values = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)
    >>> ritz = lanczos(lambda v, rows, out: values * v, torch.ones(1, 3, dtype=torch.float64),
    ...                max_steps=3, done=lambda ritz, j: ritz.exhausted)
    >>> round(ritz.low.item(), 9), round(ritz.high.item(), 9)
    (-3.0, 2.0)
    """
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: give at least 1 product.")
    m, P = start.shape
    max_steps = min(max_steps, P)
    rows = torch.arange(m, device=start.device)  # operators at work, in the order of the vectors
    alpha = start.new_zeros(m, max_steps)
    beta = start.new_zeros(m, max_steps)
    ends = start.new_zeros(4, m)
    result = Ritz(ends[0], ends[1], ends[2], ends[3], rows * 0, rows < 0, alpha, beta)
    eps = torch.finfo(start.dtype).eps
    tiny = 500 * eps if orthogonal else max(1e-9, 16 * eps)
    basis = _Basis(start, max_steps, orthogonal, room)
    length = start.new_zeros(m)
    unit = None  # (m,) powers of two by which the operators are divided; None: none needs it
    normalise(start, out=basis.vector(0))
    for j in range(1, max_steps + 1):
        v, z = basis.vector(j - 1), basis.vector(j)
        image = product(v, rows, z)
        if image.data_ptr() != z.data_ptr():
            z.copy_(image)
        if j == 1:
            unit = power_of_two(z)
        if unit is not None:
            z.div_(unit[rows, None])
        diagonal = _dots(v, z)
        if j > 1:
            z.addcmul_(basis.vector(j - 2), length[:, None], value=-1)
        z.addcmul_(v, diagonal[:, None], value=-1)
        basis.orthogonalise(z, j)
        length = z.norm(dim=1)
        alpha[rows, j - 1] = diagonal
        beta[rows, j - 1] = length
        size = torch.cat([alpha[rows, :j].abs(), beta[rows, : j - 1]], 1).amax(1)
        exhausted = length <= tiny * size
        found = _ritz(alpha[rows, :j], beta[rows, :j], exhausted)
        keep = ~(exhausted | done(found, j))
        _store(result, rows, found, unit)
        if j == max_steps or not keep.any():
            break
        if exhausted.any() or keep.sum() <= 0.75 * len(rows):
            basis.keep(keep, j)
            rows, length = rows[keep], length[keep]
        basis.vector(j).div_(length[:, None])
    if unit is not None:
        alpha.mul_(unit[:, None])
        beta.mul_(unit[:, None])
    return result


def _store(result: Ritz, rows: Tensor, found: Ritz, unit: Tensor | None) -> None:
    for name in ("low", "high", "residual", "other"):
        value = getattr(found, name)
        getattr(result, name)[rows] = value if unit is None else value * unit[rows]
    result.steps[rows] = found.steps
    result.exhausted[rows] = found.exhausted


def _ritz(alpha: Tensor, beta: Tensor, exhausted: Tensor) -> Ritz:
    """Extreme eigenvalues of tridiagonal matrices alpha, beta (m, j); the last beta leads out."""
    refuse_not_finite(alpha + beta)
    below = torch.diag_embed(beta[:, :-1], -1)  # eigh reads the lower triangle
    theta, s = torch.linalg.eigh(torch.diag_embed(alpha) + below)
    tail = beta[:, -1:] * s[:, -1, [0, -1]].abs()  # residuals of the two ends
    top = (theta[:, -1].abs() >= theta[:, 0].abs()).long()[:, None]
    residual = tail.gather(1, top)[:, 0]
    other = tail.gather(1, 1 - top)[:, 0]
    steps = torch.full_like(top[:, 0], alpha.shape[1])
    return Ritz(theta[:, 0], theta[:, -1], residual, other, steps, exhausted, alpha, beta)


def power_of_two(z: Tensor) -> Tensor | None:
    """Powers of two (m,) near the largest entries of the rows of z (m, P) where squares would
    leave the range, else None.

    >>> power_of_two(torch.tensor([[2.0**-70, 0.0]])).log2()
    tensor([-69.])
    """
    if in_range(z.norm(dim=1)):
        return None
    largest = z.abs().amax(1)
    exponent = torch.frexp(largest).exponent
    limit = -math.frexp(torch.finfo(z.dtype).tiny)[1]
    far = exponent.abs() > limit // 4
    if not far.any():
        return None
    exponent = torch.where(far, exponent, 0).clamp(2 - limit, limit - 2)
    return torch.ldexp(torch.ones_like(largest), exponent)


def in_range(length: Tensor) -> bool:
    """Whether the squares of all numbers that make up rows of this length (m,) are normal
    numbers.

    >>> in_range(torch.tensor([1.0])), in_range(torch.tensor([1e-20]))
    (True, False)
    """
    least = torch.finfo(length.dtype).tiny ** 0.25
    return bool(((length > least) & (length < 1 / least)).all())


def normalise(V: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows of V (m, P) at length 1, into `out` if given; rows of zeros stay.

    >>> normalise(torch.tensor([[3e-200, 4e-200], [0.0, 0.0]], dtype=torch.float64)).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    length = V.norm(dim=1, keepdim=True)
    if in_range(length):
        return torch.div(V, length, out=out)
    unit = power_of_two(V)
    V = V if unit is None else V / unit[:, None]
    length = V.norm(dim=1, keepdim=True)
    return torch.div(V, torch.where(length == 0, 1.0, length), out=out)


def _dots(u: Tensor, v: Tensor) -> Tensor:
    """Row by row u.v, (m, P) -> (m,); on a CPU one BLAS call a row is fastest, by a factor of 3."""
    if u.device.type == "cpu":
        return torch.stack([torch.dot(a, b) for a, b in zip(u, v)])
    return (u * v).sum(1)


def orthogonalise(z: Tensor, Q: Tensor) -> None:
    """z (m, P) <- z - Q^T Q z in place, Q (m, j, P) with orthonormal rows.

    >>> z = torch.tensor([[3.0, 4.0]])
    >>> orthogonalise(z, torch.tensor([[[1.0, 0.0]]]))
    >>> z.tolist()
    [[0.0, 4.0]]
    """
    if z.device.type == "cpu":
        for row, B in zip(z, Q):
            row.addmv_(B.T, B @ row, alpha=-1)
    else:
        z -= (Q.mT @ (Q @ z[:, :, None]))[:, :, 0]


# --- starts, and what a uniform one certifies -----------------------------------------------------


def uniform_start(shape: tuple[int, ...], losses: Coordinates, seed: int) -> Tensor:
    """Uniform directions (*shape) from a stream of their own, so independent of any weights.

    shape   of the result, coordinates last
    losses  `Losses`, or any object whose `w` has the dtype and the device
    seed    of the stream

    >>> from types import SimpleNamespace
    >>> uniform_start((2, 5), SimpleNamespace(w=torch.zeros(5)), 0).shape
    torch.Size([2, 5])
    """
    stream = generator("lanczos start", seed)
    return torch.randn(*shape, generator=stream, dtype=torch.float64).to(losses.w)


def lanczos_epsilon(steps: int, P: int, failure: float) -> float:
    """The gap eps of Theorem (thm:lanczos), 0.5 if nothing can be said.

    steps    q, products spent
    P        dimension
    failure  probability, over the start, with which the statement may fail

    With probability 1 - failure the spectrum of width W of a symmetric P x P matrix exceeds the
    Ritz interval after q steps by at most eps W at each end, where eps solves
    sqrt((1-eps)/eps) / cosh(2 (q-1) artanh sqrt eps) = (failure/2) / sqrt(2 P/pi). The start must
    be uniform on the sphere and independent of the matrix; a chosen start certifies nothing.

    Raises ValueError unless failure lies between 0 and 1. Source: Theorem (thm:lanczos).

    >>> round(lanczos_epsilon(40, 1000, 1e-6), 4)
    0.0617
    """
    if not 0 < failure < 1:
        raise ValueError("The confidence asked for is not between 0 and 1: give one such as 0.95.")
    goal = math.log(failure / 2) - 0.5 * math.log(2 * P / math.pi)

    def excess(eps: float) -> float:
        angle = 2 * (steps - 1) * math.atanh(math.sqrt(eps))
        log_cosh = angle + math.log1p(math.exp(-2 * angle)) - math.log(2)
        return 0.5 * math.log((1 - eps) / eps) - log_cosh - goal

    return 0.5 if excess(0.5) > 0 else brentq(excess, 1e-12, 0.5)


def certified_upper(ritz: Ritz, P: int, failure: float) -> Tensor:
    """Upper ends (m,) of the norms from uniform starts: inf while nothing can be said.

    ritz     of the operators
    P        dimension
    failure  of each statement

    Where the Krylov space is exhausted the value is exact. Source: Theorem (thm:lanczos).

    >>> values = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)
    >>> ritz = lanczos(lambda v, rows, out: values * v, torch.ones(1, 3, dtype=torch.float64),
    ...                max_steps=3, done=lambda ritz, j: ritz.exhausted)
    >>> round(certified_upper(ritz, 3, 0.05).item(), 9)
    3.0
    """
    steps = ritz.steps.tolist()
    gaps = {q: lanczos_epsilon(q, P, failure) for q in set(steps)}
    eps = torch.tensor([gaps[q] for q in steps], dtype=torch.float64, device=ritz.low.device)
    eps = torch.where(ritz.exhausted, 0.0, eps)
    upper = ritz.value + eps * (ritz.high - ritz.low) / (1 - 2 * eps)
    return torch.where(eps < 0.5, upper, torch.inf)
