"""Spectral norms of Hessians, each with its residual, and with a certificate where asked for.

`options` are those of `Losses`: parameters, dtype, device, chunk_size, memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from utils.hessian import pyhessian
from utils.hessian.coordinates import Operator
from utils.hessian.differentiation import refuse_not_finite
from utils.hessian.lanczos import Ritz, certified_upper, lanczos, normalise, uniform_start
from utils.hessian.losses import Losses, SampleHessians
from utils.hessian.verification import derivatives_hold

LEAST = 8  # Lanczos steps before an estimate may be taken for settled
UNORTHOGONAL = 20  # Lanczos steps that need no reorthogonalisation at a tolerance of 1e-4
RANDOM = 4  # length of the random part of a start, beside a gradient of length 1
CLOSE = 0.7  # ends of a spectrum whose ratio is above this may change places


Numbers = Any  # a number of one operator, or n of them as a tensor


@dataclass(frozen=True)
class NormEstimate:
    """A spectral norm (floats) or n of them (float64 tensors of length n).

    value       the estimate [loss/weight^2]
    lower       rigorous: the norm is at least this (Rayleigh quotients lie inside the spectrum)
    upper       at most this with the stated probability (Theorem (thm:lanczos)); nan if not asked
    residual    |H v - theta v| of the unit vector v behind the value: some eigenvalue lies there
    iterations  Hessian-vector products spent
    converged   residual within the tolerance asked for (certified: the interval within it), and the
                derivatives are the loss's (`derivatives_hold`)
    engine      where the products come from (`Losses.engine`)
    """

    value: Numbers
    lower: Numbers
    upper: Numbers
    residual: Numbers
    iterations: Numbers
    converged: Numbers
    engine: str = ""

    def columns(self) -> dict:
        """The numbers by name, for a table: all but the engine."""
        return {name: value for name, value in vars(self).items() if name != "engine"}


def per_sample_hessian_norms(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    *,
    certify: bool = False,
    confidence: float = 0.95,
    tolerance: float = 1e-4,
    max_steps: int = 80,
    seed: int = 0,
    part: str = "full",
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> NormEstimate:
    """Spectral norms of the n Hessians h_i of the examples by batched Lanczos.

    model, x, y, loss  the network, inputs (n, ...), labels (n,) and the loss's name
    certify            whether `upper` is asked for
    confidence         that all n upper ends hold, together and at every step, over the start, for
                       Hessians that do not depend on it
    tolerance          of the residual, relative to the value
    max_steps          products for each example at most
    seed               of the random starts
    part               "full", "gauss_newton" or "functional"
    progress           called with the number of examples done since the last call
    options            of `Losses`, which says what is refused

    Without `certify` the start is the example's gradient, of length 1, plus a random vector of
    length 4: fast, and not blind where the gradient lies in an invariant subspace. It certifies
    nothing: `upper` is nan. A second, random start, fully orthogonalised, follows where the two
    ends of the spectrum are within 30 % of each other or 20 steps were not enough. An example is
    done when the other end, with its own residual, cannot overtake it any more.
    With `certify` the start is uniform and runs until the interval is narrower than `tolerance` (at
    least 5 %) of the value; `upper` is inf while nothing can be said. Rounding is not covered.
    Cost: 8 to 15 products an example, with `certify` about 35. Source: Theorem (thm:lanczos).

    >>> model = torch.nn.Linear(2, 3, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)  # the Hessian of a loss is (1/K - 1/K^2) x x^T ...
    >>> per_sample_hessian_norms(model, torch.tensor([[3.0, 4.0]]), [0]).value  # |x|^2 / K
    tensor([8.3333], dtype=torch.float64)
    """
    losses = Losses(model, x, y, loss, **options)
    size = losses.chunk(max_steps + 4 if certify else 6)
    if certify:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence}: give a number between 0 and 1.")
        failure = (1 - confidence) / losses.n
        measure = partial(_certified_norms, failure=failure, width=max(tolerance, 0.05))
    else:
        room = losses.w.new_empty(3, min(size, losses.n), losses.P)
        measure = partial(_settled_norms, tolerance=tolerance, room=room)
    columns = []
    for rows in torch.arange(losses.n, device=losses.x.device).split(size):
        ritz, upper, converged = measure(SampleHessians(losses, rows, part), max_steps, seed)
        columns.append((ritz.value, upper, ritz.residual, ritz.steps, converged))
        if progress is not None:
            progress(len(rows))
    joined = (torch.cat(column).cpu() for column in zip(*columns, strict=True))
    value, upper, residual, steps, converged = joined
    converged = converged & derivatives_hold(losses)
    return NormEstimate(value, value, upper, residual, steps, converged, losses.engine)


def _certified_norms(
    operator: SampleHessians, max_steps: int, seed: int, failure: float, width: float
) -> tuple[Ritz, Tensor, Tensor]:
    losses, rows = operator.losses, operator.rows

    def narrow(ritz: Ritz, j: int) -> Tensor:
        return certified_upper(ritz, losses.P, failure) - ritz.value <= width * ritz.value

    # one direction serves all examples: the event of the theorem is about each of them
    start = uniform_start((1, losses.P), losses, seed).expand(len(rows), -1)
    ritz = lanczos(operator, start, max_steps=max_steps, done=narrow)
    return ritz, certified_upper(ritz, losses.P, failure), narrow(ritz, max_steps)


def _settled_norms(
    operator: SampleHessians, max_steps: int, seed: int, tolerance: float, room: Tensor
) -> tuple[Ritz, Tensor, Tensor]:
    losses, rows = operator.losses, operator.rows

    def settled(ritz: Ritz, j: int) -> Tensor:
        near = tolerance * ritz.value
        other = (ritz.opposite <= ritz.value) | (ritz.other <= near)
        return (ritz.residual <= near) & other & (j >= LEAST)

    few = min(max_steps, UNORTHOGONAL)
    start = operator.gradients()
    normalise(start, out=start)
    random = normalise(uniform_start((1, losses.P), losses, seed))
    start.add_(random, alpha=RANDOM)
    ritz = lanczos(operator, start, max_steps=few, done=settled, orthogonal=False, room=room)
    ends = torch.minimum(ritz.low.abs(), ritz.high.abs())
    doubtful = ends > CLOSE * ritz.value
    doubtful |= (ritz.steps < LEAST) | ~(ritz.exhausted | settled(ritz, few))
    for again in doubtful.nonzero()[:, 0].split(losses.chunk(max_steps + 4)):
        if len(again) == 0:
            continue
        second = SampleHessians(losses, rows[again], operator.part)
        start = uniform_start((len(again), losses.P), losses, seed)
        ritz.merge(again, lanczos(second, start, max_steps=max_steps, done=settled))
    converged = ritz.residual <= tolerance * ritz.value
    return ritz, torch.full_like(ritz.value, torch.nan), converged


def operator_norm(
    product: Operator,
    start: Tensor,
    *,
    tolerance: float,
    max_steps: int,
    failure: float | None = None,
    least: int = LEAST,
    engine: str = "",
) -> NormEstimate:
    """The norm of one symmetric operator v -> A v on vectors (P,), by Lanczos.

    product    the operator
    start      (P,), not zero
    tolerance  of the residual, relative to the value
    max_steps  products at most
    failure    with it the upper end holds with probability 1 - failure over a uniform start, and
               the run goes on until it is within 5 % of the value
    least      products at least
    engine     where the products come from, for the report

    Source: Theorem (thm:lanczos).

    >>> values = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)
    >>> start = torch.ones(3, dtype=torch.float64)
    >>> norm = operator_norm(lambda v: values * v, start, tolerance=1e-6, max_steps=9)
    >>> round(norm.value, 9), norm.iterations
    (3.0, 3)
    """
    P = len(start)

    def upper(ritz: Ritz) -> Tensor:
        if failure is None:
            return torch.full_like(ritz.value, torch.nan)
        return certified_upper(ritz, P, failure)

    def done(ritz: Ritz, j: int) -> Tensor:
        settled = (ritz.residual <= tolerance * ritz.value) & (ritz.opposite <= ritz.value)
        settled &= j >= least
        return settled if failure is None else settled & (upper(ritz) <= 1.05 * ritz.value)

    one = start[None]
    ritz = lanczos(lambda V, rows, out: product(V[0])[None], one, max_steps=max_steps, done=done)
    value, residual = ritz.value.item(), ritz.residual.item()
    converged = residual <= tolerance * value
    steps = int(ritz.steps)
    return NormEstimate(value, value, upper(ritz).item(), residual, steps, converged, engine)


def hessian_norm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    *,
    estimator: str = "lanczos",
    certify: bool = False,
    confidence: float = 0.95,
    tolerance: float = 1e-4,
    max_steps: int = 80,
    seed: int = 0,
    part: str = "full",
    **options: Any,
) -> NormEstimate:
    """Spectral norm of the Hessian H_k of the mean loss over the k examples given.

    model, x, y, loss  the network, inputs (k, ...), labels (k,) and the loss's name
    estimator          "lanczos": random start, until the residual is `tolerance` of the value
                       "pyhessian": its power iteration behind `utils.hessian.pyhessian`
                       "exact": a dense eigenvalue decomposition, P products and P x P numbers
    certify            (lanczos) whether `upper` is asked for: Theorem (thm:lanczos)
    confidence         of the upper end
    tolerance          of the residual, relative to the value
    max_steps          (lanczos) products at most
    seed               of the random starts
    part               "full", "gauss_newton" or "functional"
    options            of `Losses`, which says what is refused

    Raises ValueError for an unknown estimator, and where PyHessian is asked for a part.

    >>> model = torch.nn.Linear(2, 3, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> round(hessian_norm(model, torch.tensor([[3.0, 4.0]]), [0], certify=True).upper, 4)
    8.3333
    """
    if estimator not in ("lanczos", "pyhessian", "exact"):
        raise ValueError(f"estimator is {estimator!r}: choose lanczos, pyhessian or exact.")
    losses = Losses(model, x, y, loss, **options)
    norm = _norm(losses, estimator, part, tolerance, max_steps, certify, confidence, seed)
    return replace(norm, converged=norm.converged and derivatives_hold(losses))


def _norm(
    losses: Losses,
    estimator: str,
    part: str,
    tolerance: float,
    max_steps: int,
    certify: bool,
    confidence: float,
    seed: int,
) -> NormEstimate:
    if estimator == "exact":
        return _exact_norm(losses, part, tolerance)
    if estimator == "pyhessian":
        if part != "full":
            raise ValueError(
                f"PyHessian knows the whole Hessian only, not the {part} part: "
                "take estimator lanczos."
            )
        e = pyhessian.eigenvalue(losses, seed=seed)
        converged = e.residual <= tolerance * e.value
        return NormEstimate(
            e.value, e.value, math.nan, e.residual, e.iterations, converged, "double backward"
        )
    return operator_norm(
        losses.hessian(part=part),
        uniform_start((losses.P,), losses, seed),
        tolerance=tolerance,
        max_steps=max_steps,
        failure=1 - confidence if certify else None,
        engine=losses.engine,
    )


def _exact_norm(losses: Losses, part: str, tolerance: float) -> NormEstimate:
    """By the eigenvalues of the symmetric part, with the residual of the product itself."""
    H = losses.dense(part)
    refuse_not_finite(H)
    values, vectors = torch.linalg.eigh((H + H.T) / 2)
    top = int(values.abs().argmax())
    v = vectors[:, top]
    value = values[top].abs().item()
    residual = (losses.product(v, part=part) - values[top] * v).norm().item()
    converged = residual <= tolerance * value
    lower = max(value - residual, 0.0)
    return NormEstimate(
        value, lower, value + residual, residual, losses.P, converged, losses.engine
    )
