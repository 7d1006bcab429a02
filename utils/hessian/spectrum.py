"""The trace of a Hessian and its spectral density, from products with random vectors.

`options` are those of `Losses`: parameters, dtype, device, chunk_size, memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from utils.hessian import pyhessian
from utils.hessian.coordinates import Operator
from utils.hessian.differentiation import refuse_not_finite
from utils.hessian.lanczos import lanczos, uniform_start
from utils.hessian.losses import Losses

LEAST = {"hutchinson": 2, "pyhessian": 2, "hutch++": 6}  # probes that a standard error needs


def hessian_trace(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    *,
    estimator: str = "hutchinson",
    probes: int = 32,
    seed: int = 0,
    part: str = "full",
    **options: Any,
) -> tuple[float, float]:
    """An estimate of the trace of H_k, and its standard error, from `probes` products.

    model, x, y, loss  the network, inputs (k, ...), labels (k,) and the loss's name
    estimator          "hutchinson": the mean of v^T H v over Rademacher v (Hutchinson 1990)
                       "hutch++": a third of the products finds the range Q of H on random signs, a
                       third takes the trace of Q^T H Q, a third is Hutchinson's on the rest; the
                       standard error is that of the rest, given Q (Meyer, Musco, Musco,
                       Woodruff 2021)
                       "pyhessian": PyHessian's own probes without its stopping rule
    probes             products, fixed beforehand: a rule on the running mean biases the estimate
    seed               of the random signs
    part               "full", "gauss_newton" or "functional"
    options            of `Losses`, which says what is refused

    Raises ValueError for fewer than 2 probes (hutch++: 6).

    >>> model, x = torch.nn.Linear(2, 3), torch.ones(4, 2)
    >>> value, error = hessian_trace(model, x, [0, 1, 2, 0], probes=4)
    >>> value > 0, error >= 0
    (True, True)
    """
    if estimator not in LEAST:
        raise ValueError(f"estimator is {estimator!r}: choose hutchinson, hutch++ or pyhessian.")
    if probes < LEAST[estimator]:
        raise ValueError(
            f"{estimator} with {probes} probes has no standard error: "
            f"give at least {LEAST[estimator]}."
        )
    if estimator == "pyhessian" and part != "full":
        raise ValueError(
            f"PyHessian knows the whole Hessian only, not the {part} part: "
            "take estimator hutchinson."
        )
    losses = Losses(model, x, y, loss, **options)
    if estimator == "pyhessian":
        return pyhessian.trace(losses, probes=probes, seed=seed)[:2]
    product = losses.hessian(part=part)
    signs = torch.sign(uniform_start((probes, losses.P), losses, seed))
    known = 0.0
    if estimator == "hutch++":
        third = min(probes // 3, losses.P)
        images = torch.stack([product(v) for v in signs[:third]], 1)
        Q = torch.linalg.qr(images).Q  # (P, third)
        known = sum((q @ product(q)).item() for q in Q.T)
        signs = signs[2 * third :]
        signs = signs - (signs @ Q) @ Q.T
    values = torch.stack([v @ product(v) for v in signs])
    refuse_not_finite(values)
    error = values.std() / math.sqrt(len(values))
    return known + values.mean().item(), error.item()


@dataclass(frozen=True)
class SpectralDensity:
    """Stochastic Lanczos quadrature: for each probe the weight above t estimates a share.

    nodes    (probes, steps) Ritz values [loss/weight^2]
    weights  (probes, steps), each row of sum 1: that above t estimates the share of the P
             eigenvalues above t
    P        how many eigenvalues there are
    """

    nodes: np.ndarray
    weights: np.ndarray
    P: int

    def count(
        self, thresholds: Sequence[float], sign: int = 1
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many eigenvalues have sign * value > t, for each t: mean, low and high.

        thresholds  the t
        sign        1, or -1 for the negative eigenvalues

        The 95 % band (t quantile) is that of the probes; the quadrature's own error falls with the
        steps. Near one eigenvalue, whose weight is 1/P, a count is noise.
        """
        above = sign * self.nodes[:, :, None] > np.asarray(thresholds)
        counts = self.P * (self.weights[:, :, None] * above).sum(1)  # (probes, thresholds)
        quantile = student.ppf(0.975, len(counts) - 1)
        error = counts.std(0, ddof=1) / math.sqrt(len(counts)) * quantile
        mean = counts.mean(0)
        return mean, mean - error, mean + error

    def rows(self, thresholds: Sequence[float]) -> list[dict]:
        """One row for each sign and each of the thresholds: sign, threshold, count, low, high."""
        found = []
        for sign in (1, -1):
            for t, count, low, high in zip(thresholds, *self.count(thresholds, sign)):
                found.append(
                    {"sign": sign, "threshold": t, "count": count, "low": low, "high": high}
                )
        return found

    def moment(self, power: int) -> tuple[float, float]:
        """tr H^power and its standard error; exact in the quadrature up to power 2 steps - 1."""
        values = self.P * (self.weights * self.nodes**power).sum(1)
        return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


def spectral_density(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    *,
    probes: int = 8,
    steps: int = 40,
    seed: int = 0,
    part: str = "full",
    **options: Any,
) -> SpectralDensity:
    """The spectrum of H_k by stochastic Lanczos quadrature.

    model, x, y, loss  the network, inputs (k, ...), labels (k,) and the loss's name
    probes             uniform starts
    steps              products for each of them
    seed               of the starts
    part               "full", "gauss_newton" or "functional"
    options            of `Losses`, which says what is refused

    Full reorthogonalisation; memory steps x P. Raises ValueError for fewer than 2 probes, which
    have no band. Source: Golub, Welsch (1969); Ubaru, Chen, Saad (2017).

    >>> model, x = torch.nn.Linear(2, 3), torch.ones(4, 2)
    >>> spectral_density(model, x, [0, 1, 2, 0], probes=2, steps=3).nodes.shape
    (2, 3)
    """
    if probes < 2 or steps < 1:
        raise ValueError(
            f"There are {probes} probes and {steps} steps: give at least 2 probes and 1 step."
        )
    losses = Losses(model, x, y, loss, **options)
    H = losses.hessian(part=part)
    steps = min(steps, losses.P)
    rules = [_quadrature(H, v, steps) for v in uniform_start((probes, losses.P), losses, seed)]
    nodes, weights = (np.stack(column) for column in zip(*rules, strict=True))
    return SpectralDensity(nodes, weights, losses.P)


def _quadrature(H: Operator, start: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (steps,) from one start; an exhausted space repeats a node at weight 0."""
    ritz = lanczos(
        lambda V, rows, out: H(V[0])[None],
        start[None],
        max_steps=steps,
        done=lambda ritz, j: ritz.exhausted,
    )
    spent = int(ritz.steps)
    alpha = ritz.alpha[0, :spent].double().cpu().numpy()
    beta = ritz.beta[0, : spent - 1].double().cpu().numpy()
    theta, s = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
    pad = steps - spent
    nodes = np.r_[theta, np.full(pad, theta[0])]
    return nodes, np.r_[s[0] ** 2, np.zeros(pad)]
