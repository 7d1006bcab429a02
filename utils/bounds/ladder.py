"""The ladder of bounds, from the loosest and most general rung to the sharpest.

    closed_form   one formula in sizes and norms of the weights      (Theorem 2, thm:closed-form)
    prior         norms of the weights, one row for each group       (Theorem 1, thm:jet)
    activations   the example's own activations                      (Theorem 1, thm:jet)
    tangents      |M_z|^(1/2) X_z' exactly for every node and group  (Theorem, thm:forms)
    majorant      the sum over the nodes z of |M_z| together         (Theorem, thm:majorant)

The first three hold on balls of weights too (cor:ball); the majorant holds with a probability, all
others always. A group of weights is the parameters of one module, weight and bias together.
Everything is float64; sums and products of nonnegative numbers round by a relative 1e-11, which is
covered; the rounding of the measured activations is not. An overflow gives inf, which is still a
bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.bounds import closed_form as formula
from utils.bounds.majorant import majorant
from utils.bounds.subject import ROUNDING, Subject, subject
from utils.bounds.tangents import tangents
from utils.bounds.walk import (
    Measured,
    float64,
    never_nan,
    norm_of_nonnegative,
    products_of_norms,
)
from utils.calculus.nodes.base import Unknown
from utils.run.layout import RUNGS

ON_BALLS = RUNGS[:3]
FROM_WEIGHTS = RUNGS[:2]


@dataclass(frozen=True)
class Bound:
    """Upper bounds of per-example Hessian norms.

    rung    its name
    values  (n,): values[i] >= ||H_i||, float64 on the CPU
    groups  names of the m groups of weights
    blocks  (n, m, m): blocks[i, g, g'] >= ||the (g, g') block of H_i||, and values[i] is at most
            its spectral norm; None for the closed form and the majorant
    terms   the named quantities behind it, float64 tensors: "log10" of the values; of the majorant
            "lower" and "steps" of `majorant`; of the first three "D" and "E" >= the norms of the
            first and second derivative of the logits; of prior and activations "r_hat" and "S_hat"
            >= the norms of the loss's gradient and Hessian in the logits and the number of every
            step of the chain by "step number"; of the closed form "growth" (n, L), the factor of
            each block
    """

    rung: str
    values: Tensor
    groups: list[str]
    blocks: Tensor | None
    terms: dict[str, Tensor]


def hessian_bounds(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    rung: str = "activations",
    radius: float = 0.0,
    parameters: list[str] | None = None,
    variance_floor: float | None = None,
    measured: Measured | None = None,
    **options: Any,
) -> Bound:
    """Bound ||H_i||, the spectral norm of the Hessian in the weights of each example's loss.

    model           any module that can be traced and returns logits, left unchanged; for the closed
                    form a pre-norm `ViT`
    x               inputs (n, ...)
    y               classes (n,), or (n, T) for logits (n, T, K), or real targets for "mse"
    loss            "cross_entropy" [nat] or "mse" (mean over the outputs)
    rung            one of `RUNGS`
    radius          with radius > 0 the values hold for all weights within that Euclidean distance
                    of the model's, all of them moving together (the first three rungs)
    parameters      name patterns (fnmatch) that select the weights; a group counts as a whole if
                    one of its parameters matches, which can only enlarge the bound
    variance_floor  an ASSUMED lower bound of every normalisation's rho = sqrt(variance + eps) at
                    every token of every example and for all weights of the ball (closed_form and
                    prior). Nothing here checks it; without it rho >= sqrt(eps), which always holds.
    measured        numbers of the chain from `measured_norms`, in place of larger ones (closed_form
                    and prior): the values are then bounds for the examples that were measured,
                    within the radius of the measurement
    options         of `majorant`, by name (confidence, max_steps, rounds, seed, memory)

    ReLU: the Hessian exists almost everywhere only, and the values bound it there.

    Raises ValueError for a rung that does not apply, patterns without a match, labels that do not
    fit; Unknown (a ValueError that names operator and module) where a node has no norm;
    Untraceable (a ValueError) where the network cannot be read.
    Source: Theorem 1 (thm:jet), Theorem 2 (thm:closed-form), Theorem (thm:forms), Theorem
    (thm:majorant), Corollary (cor:ball).

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    >>> x = torch.ones(2, 4, dtype=torch.float64)
    >>> bound = hessian_bounds(model, x, torch.tensor([0, 1]))
    >>> bound.groups, bound.values.shape, bound.blocks.shape
    (['0', '2'], torch.Size([2]), torch.Size([2, 2, 2]))
    """
    _check(rung, radius, variance_floor, measured, options)
    if rung == "closed_form":
        formula.check(model, x, y, loss, radius, parameters)
    try:
        of = subject(model, x, y, loss, parameters)
        return _bound(of, rung, radius, variance_floor, measured, options)
    except (torch.OutOfMemoryError, ValueError):
        raise
    except (RuntimeError, IndexError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise Unknown(
            f"Rung {rung!r} met an operator that it cannot bound ({reason}): use the certified "
            "norm, which applies to any network."
        ) from error


def _bound(
    of: Subject,
    rung: str,
    radius: float,
    variance_floor: float | None,
    measured: Measured | None,
    options: dict[str, Any],
) -> Bound:
    """`hessian_bounds` of what has been checked."""
    groups = [of.groups[g] for g in of.kept]
    if rung == "majorant":
        terms = {name: float64(t) for name, t in majorant(of, **options).items()}
        values = terms.pop("M")
        return Bound(rung, values, groups, None, terms | {"log10": values.log10()})
    with torch.no_grad():
        if rung == "closed_form":
            return _closed_form(of, radius, variance_floor, measured)
        if rung == "tangents":
            pairs = [tangents(of, i) for i in range(of.n)]
            values, blocks = (float64(torch.stack(part)) for part in zip(*pairs, strict=True))
            return Bound(rung, values, groups, blocks, {"log10": values.log10()})
        blocks, terms = products_of_norms(of, rung, radius, variance_floor, measured)
    values = norm_of_nonnegative(blocks)
    return Bound(rung, values, groups, blocks, terms | {"log10": values.log10()})


def _closed_form(
    of: Subject, radius: float, floor: float | None, measured: Measured | None
) -> Bound:
    found = formula.closed_form(of.model, of.x, radius, floor, measured)
    terms = {name: float64(value) for name, value in found.items()}
    values = never_nan(terms.pop("M") * ROUNDING)
    terms["growth"] = terms["growth"].expand(len(values), -1)
    return Bound("closed_form", values, of.groups, None, terms | {"log10": values.log10()})


def _check(
    rung: str, radius: float, floor: float | None, measured: Measured | None, options: dict
) -> None:
    if rung not in RUNGS:
        raise ValueError(f"rung is {rung!r}: choose one of {', '.join(RUNGS)}.")
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius is {radius}: give a finite number >= 0.")
    if options and rung != "majorant":
        raise ValueError(
            f"Rung {rung!r} takes no {', '.join(options)}: leave it out or choose the rung "
            "'majorant'."
        )
    if radius > 0 and rung not in ON_BALLS:
        raise ValueError(
            f"Rung {rung!r} holds at one point of weight space: use 'activations' or 'prior' for a "
            "ball."
        )
    if floor is not None and rung not in FROM_WEIGHTS:
        raise ValueError(f"Rung {rung!r} measures rho itself: leave variance_floor out.")
    if floor is not None and not 0 < floor < math.inf:
        raise ValueError(f"variance_floor is {floor}: give a finite number > 0.")
    if measured is not None and rung not in FROM_WEIGHTS:
        raise ValueError(f"Rung {rung!r} takes no measured norms: use 'closed_form' or 'prior'.")
    if measured is not None and radius > measured.radius:
        raise ValueError(
            f"The norms were measured for radius {measured.radius}, not {radius}: measure them "
            "anew."
        )
