"""Measure a sample once, ask about sample sizes often.

Five questions, five sizes; a number for one is no answer to another (prop:two-questions):

    surface  |L_k' - L| <= tau for every later k', in mean square over a neighbourhood of the
             weights (or at the weights). Forward passes alone. Theorem (thm:neighbourhood).
    ball     the same for the supremum over a ball, to second order or with a bound of each
             Hessian's norm on the ball. Theorem (thm:surface-ball).
    excess   a minimiser over that ball is within tau of the best. Proposition (prop:excess-risk).
    next     one more example of the same kind changes the pilot's mean by at most tau.
             Proposition (prop:exchangeable).
    step     no single example whatsoever can: the papers' quantity. Theorem (thm:k-step).

All but the last hold with probability 1 - delta over the examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.bounds import hessian_bounds, loss_upper_bound
from utils.hessian import Losses
from utils.sample_size.answer import SampleSize, drift
from utils.sample_size.ball import Moments, ball_forecast, curvature_moments, gradient_moments
from utils.sample_size.limits import pair_moments
from utils.sample_size.ranges import check_ranges, check_rung
from utils.sample_size.step import gradient_distance, next_forecast, step_forecast, worst_range
from utils.sample_size.surface import surface_forecast
from utils.surface.probes import neighbourhood, probe_losses

CRITERIA = ("surface", "ball", "excess", "next", "step")
POPULATION = "population statement: the pilot did not fit the weights"
POOL = "pool statement: about the training loss"


@dataclass(eq=False)
class Pilot:
    """A sample from which sizes are forecast; made by `pilot`, whose arguments it has.

    Each part is measured when a question first needs it, and once: `values`, losses (n,) at the
    weights; `surface_losses` (n_probes, n) in the neighbourhood; the spreads of gradients and
    Hessians; the bounds of Hessian norms by rung and radius. `losses` computes, `distinct` says how
    many of the n examples are no copies, `statement` what population the answers speak of.
    """

    losses: Losses
    statement: str
    distinct: int
    radius: float = 0.0
    ball_radius: float = 0.0
    kurtosis: float = 20.0
    n_probes: int = 8
    seed: int = 0
    _norms: dict[tuple[str, float], Tensor] = field(default_factory=dict)

    # --- measured, each once ------------------------------------------------------------------

    @cached_property
    def values(self) -> np.ndarray:
        """Losses (n,) at the weights."""
        return self.losses.values().double().cpu().numpy()

    @cached_property
    def surface_losses(self) -> np.ndarray:
        """Losses (n_probes, n) at the weights that stand for the neighbourhood; (1, n) at R = 0."""
        if self.radius == 0:
            return self.values[None]
        probes = neighbourhood(self.losses.w, self.radius, self.n_probes, self.seed)
        return probe_losses(self.losses, probes)

    @cached_property
    def _gradient_moments(self) -> Moments:
        return gradient_moments(self.losses)

    @cached_property
    def _curvature_moments(self) -> Moments:
        return curvature_moments(self.losses, self.seed)

    @cached_property
    def _gradient_distance(self) -> float:
        return gradient_distance(self.losses)

    def hessian_norms(self, rung: str, radius: float) -> Tensor:
        """Bounds (n,) of the supremum of each example's Hessian norm over the ball.

        rung    of `bounds.hessian_bounds`, one that holds on balls
        radius  of the ball

        Raises ValueError for networks that the rung does not know.
        """
        if (rung, radius) not in self._norms:
            at = self.losses
            bound = hessian_bounds(at.model, at.x, at.y, at.loss, rung, radius=radius)
            self._norms[rung, radius] = bound.values.double()
        return self._norms[rung, radius]

    def loss_ceiling(self, radius: float = 0.0) -> float:
        """A number that no loss of any example exceeds within `radius` of the weights, inf if
        none is known. Source: (eq:loss-bound)."""
        if self.losses.loss != "cross_entropy":
            return math.inf
        try:
            return loss_upper_bound(self.losses.model, radius)
        except ValueError:  # not one of our networks
            return math.inf

    # --- asked, as often as wanted ------------------------------------------------------------

    def surface(
        self, tolerance: float, confidence: float = 0.95, *, ceiling: float | None = None
    ) -> SampleSize:
        """After how many examples does the mean loss stay within `tolerance`?

        tolerance   tau > 0, in units of the loss
        confidence  1 - delta
        ceiling     a number that no loss of any example exceeds in the neighbourhood, which takes
                    the place of the assumption on the kurtosis; see `label_ceiling` and
                    `loss_ceiling`

        Raises ValueError out of range. Source: Theorem (thm:neighbourhood).

        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(400, 2), torch.arange(400) % 3
        >>> pilot(torch.nn.Linear(2, 3), x, y).surface(tolerance=5.0).verdict
        'enough'
        """
        check_ranges(tolerance=tolerance, confidence=confidence, ceiling=ceiling)
        fields = surface_forecast(
            self.surface_losses,
            tolerance,
            confidence,
            self.kurtosis,
            self.seed,
            ceiling,
            self.distinct,
        )
        return self._answer("surface", tolerance, self.radius, confidence, fields)

    def ball(
        self,
        tolerance: float,
        confidence: float = 0.95,
        *,
        rung: str | None = None,
        remainder: float = 0.0,
    ) -> SampleSize:
        """After how many examples does the worst of the ball stay within `tolerance`?

        tolerance   tau > 0
        confidence  1 - delta
        rung        where the curvature on the ball comes from, see `hessian_norms`; None for the
                    measured spread of the Hessians at the centre, which is a statement to second
                    order
        remainder   what the caller knows of the rest, see `ball.k_ball`

        Raises ValueError out of range and for networks that the rung does not know. Source: Theorem
        (thm:surface-ball), Corollary (cor:ball-sizes).

        >>> from utils.networks import build_model
        >>> _ = torch.manual_seed(0)
        >>> network = build_model("mlp", d_in=2, width=2, depth=1, n_classes=3)
        >>> x, y = torch.randn(400, 2), torch.arange(400) % 3
        >>> pilot(network, x, y, ball=0.01).ball(tolerance=5.0).verdict
        'enough'
        """
        check_ranges(tolerance=tolerance, confidence=confidence, remainder=remainder)
        return self._ball("ball", tolerance, tolerance, confidence, rung, remainder)

    def excess(
        self,
        tolerance: float,
        confidence: float = 0.95,
        *,
        gap: float = 0.0,
        rung: str | None = None,
        remainder: float = 0.0,
    ) -> SampleSize:
        """After how many examples is a model trained in the ball within `tolerance` of the best?

        tolerance  the acceptable L(w_k) - min over the ball of L
        gap        how far above its minimum over the ball the training objective is left

        The rest (confidence, rung, remainder) as for `ball`.
        Source: Proposition (prop:excess-risk).

        >>> from utils.networks import build_model
        >>> _ = torch.manual_seed(0)
        >>> network = build_model("mlp", d_in=2, width=2, depth=1, n_classes=3)
        >>> x, y = torch.randn(400, 2), torch.arange(400) % 3
        >>> measured = pilot(network, x, y, ball=0.01)
        >>> measured.excess(0.2).k == measured.ball(0.1).k
        True
        """
        check_ranges(tolerance=tolerance, confidence=confidence, remainder=remainder, gap=gap)
        reach = (tolerance - gap) / 2
        return self._ball("excess", tolerance, reach, confidence, rung, remainder)

    def next(self, tolerance: float, confidence: float = 0.95) -> SampleSize:
        """Does one more example of the same kind move the pilot's mean by `tolerance` at most?

        tolerance   tau > 0
        confidence  1 - delta

        Raises ValueError out of range. Source: Proposition (prop:exchangeable).

        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 2), torch.arange(60) % 3
        >>> pilot(torch.nn.Linear(2, 3), x, y).next(tolerance=1.0).verdict
        'enough'
        """
        check_ranges(tolerance=tolerance, confidence=confidence)
        fields = next_forecast(self.values, tolerance, confidence) | drift(self.values)
        return self._answer("next", tolerance, 0.0, confidence, fields)

    def step(
        self,
        tolerance: float,
        confidence: float = 0.95,
        *,
        radius: float = 0.0,
        rung: str | None = None,
    ) -> SampleSize:
        """After how many examples can no single one whatsoever move the mean loss by `tolerance`?

        tolerance   tau > 0
        confidence  recorded; the answer holds always
        radius      of the ball whose weights are all meant, 0 for the weights alone
        rung        see `hessian_norms`, "prior" if None

        Raises ValueError out of range and, at radius > 0, for networks that the rung does not know.
        Source: Theorem (thm:k-step).

        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 2), torch.arange(60) % 3
        >>> pilot(torch.nn.Linear(2, 3), x, y).step(tolerance=1.0).verdict  # no known ceiling
        'cannot tell'
        """
        check_ranges(tolerance=tolerance, confidence=confidence, radius=radius)
        check_rung(rung)
        parts = worst_range(self.values)
        if radius > 0:
            norms = self.hessian_norms(rung or "prior", radius)
            parts = worst_range(self.values, radius, self._gradient_distance, norms)
        fields = step_forecast(self.values, parts, self.loss_ceiling(radius), tolerance)
        return self._answer("step", tolerance, radius, confidence, fields)

    def _ball(
        self,
        criterion: str,
        tolerance: float,
        reach: float,
        confidence: float,
        rung: str | None,
        remainder: float,
    ) -> SampleSize:
        check_rung(rung)
        radius = self.ball_radius
        moments = {"S": pair_moments(self.values[:, None])}
        norms = None
        if radius > 0:
            moments["gradient"] = self._gradient_moments
            if rung is None:
                moments["curvature"] = self._curvature_moments
            else:
                norms = self.hessian_norms(rung, radius)
        fields = ball_forecast(
            moments,
            self.losses.n,
            reach,
            radius,
            confidence,
            self.kurtosis,
            self.distinct,
            norms,
            remainder,
        )
        to_second_order = radius > 0 and rung is None and remainder == 0
        caveat = ", to second order in the distance" if to_second_order else ""
        fields |= drift(self.values)
        return self._answer(criterion, tolerance, radius, confidence, fields, caveat)

    def _answer(
        self,
        criterion: str,
        tolerance: float,
        radius: float,
        confidence: float,
        fields: dict,
        caveat: str = "",
    ) -> SampleSize:
        asked: dict[str, Any] = {"criterion": criterion, "tolerance": tolerance, "radius": radius}
        asked |= {"confidence": confidence, "statement": self.statement + caveat}
        return SampleSize(**(asked | fields))


def pilot(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    radius: float = 0.0,
    ball: float = 0.0,
    fitted_on: Tensor | None = None,
    loss: str = "cross_entropy",
    kurtosis: float = 20.0,
    n_probes: int = 8,
    seed: int = 0,
    **options: Any,
) -> Pilot:
    """Measure a sample once; sizes are then asked of it in milliseconds.

    model      from inputs to logits, left unchanged
    x, y       (n, ...) and (n,), the pilot; it must not have been used for the weights
    radius     of the neighbourhood of `Pilot.surface`, Euclidean, absolute
    ball       radius of the ball of `Pilot.ball` and `Pilot.excess`
    fitted_on  the inputs that the weights were fitted to: if one of the pilot's is among them the
               answers are labelled pool statements
    loss       "cross_entropy", "mse" or "bce"
    kurtosis   the assumption on rare losses behind the upper limits, see `limits.limits`;
               `Pilot.kurtosis` may be changed between questions
    n_probes   weights that stand for the neighbourhood
    seed       of probes and pairs
    options    of `hessian.Losses`

    Raises ValueError for values out of range and what `Losses` refuses.

    >>> measured = pilot(torch.nn.Linear(2, 3), torch.ones(400, 2), torch.arange(400) % 3)
    >>> [measured.surface(tau).criterion for tau in (0.1, 0.2)]
    ['surface', 'surface']
    """
    check_ranges(radius=radius, ball=ball, n_probes=n_probes, kurtosis=kurtosis)
    losses = Losses(model, x, y, loss, **options)
    examples = _rows(x)
    among_fitted = fitted_on is not None and not examples.isdisjoint(_rows(fitted_on))
    statement = POOL if among_fitted else POPULATION
    return Pilot(losses, statement, len(examples), radius, ball, kurtosis, n_probes, seed)


def _rows(x: Tensor) -> set[bytes]:
    """The examples by value: two precisions of one number, and 0 and -0, are the same."""
    rows = torch.as_tensor(x).detach().cpu().double() + 0.0
    return {row.tobytes() for row in rows.numpy()}
