"""Weights around the trained ones: where they are drawn, and how losses differ there.

Streams: `gaussian_probes` is torch's 0x6A55 + seed, `spreads` torch's 0x5163 + seed,
`top_eigenspace` NumPy's `[seed, 17]`, which the Gaussian factor of `sample_size` draws from too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from utils.hessian import Losses
from utils.hessian.losses import SampleHessians
from utils.run.streams import generator, numpy_generator


@dataclass(frozen=True)
class Eigenspace:
    """Leading eigenvectors of a Hessian.

    values     (D,) of largest magnitude, descending [nat/w^2]
    vectors    (D, P) of unit length
    residuals  (D,) |H v - theta v| [nat/w^2]
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray


def top_eigenspace(losses: Losses, D: int, rows: Tensor | None = None, seed: int = 0) -> Eigenspace:
    """The D leading eigenvectors of the Hessian of a mean loss, by ARPACK (restarted Lanczos).

    losses  of n examples, as a function of the P weights
    D       how many, below P [1]
    rows    of the mean loss; all examples, if there are none
    seed    of the starting vector, stream `[seed, 17]`

    >>> losses = Losses(torch.nn.Linear(2, 2), torch.ones(3, 2), torch.tensor([0, 1, 0]))
    >>> top_eigenspace(losses, 2).vectors.shape
    torch.Size([2, 6])
    """
    product = losses.hessian(rows=rows)

    def apply(v: np.ndarray) -> np.ndarray:
        v = torch.as_tensor(v.ravel().copy()).to(losses.w)
        return product(v).double().cpu().numpy()

    start = numpy_generator("eigenspace start", seed).normal(size=losses.P)
    operator = LinearOperator((losses.P, losses.P), matvec=apply, dtype=np.float64)
    theta, vectors = eigsh(operator, k=D, which="LM", v0=start, tol=1e-6)
    order = np.argsort(-np.abs(theta))
    theta = theta[order]
    vectors = np.ascontiguousarray(vectors[:, order].T)
    residuals = [np.linalg.norm(apply(v) - t * v) for t, v in zip(theta, vectors, strict=True)]
    return Eigenspace(theta, torch.as_tensor(vectors).to(losses.w), np.array(residuals))


def gaussian_probes(
    w: Tensor, sigma: float, n_probes: int, seed: int = 0, basis: Tensor | None = None
) -> Tensor:
    """Weights from N(w, sigma^2 I), or from N(w, sigma^2 U^T U) for a basis U.

    w         (P,) centre
    sigma     of every coordinate [units of weight]
    n_probes  how many weights [1]
    seed      of torch's stream 0x6A55 + seed
    basis     U (D, P), orthonormal

    Returns (n_probes, P).

    >>> gaussian_probes(torch.zeros(3), 0.1, 5).shape
    torch.Size([5, 3])
    """
    stream = generator("gaussian probes", seed)
    size = len(w) if basis is None else len(basis)
    normal = torch.randn(n_probes, size, generator=stream, dtype=torch.float64).to(w)
    z = sigma * normal
    return w + (z if basis is None else z @ basis)


@dataclass(frozen=True)
class Spreads:
    """How examples differ at w0 up to second order (divisor n - 1), in all P coordinates or along
    a basis.

    value     S^2 of the losses [nat^2]
    gradient  tr Sigma_g [nat^2/w^2]
    hessian   tr Sigma_H [nat^2/w^4]
    trace     variance of the traces tr h_i [nat^2/w^4]
    cross     covariance of the traces with the losses [nat^2/w^2]
    error     standard error over the probes of `hessian`, 0 along a basis (exact)
    """

    value: float
    gradient: float
    hessian: float
    trace: float
    cross: float
    error: float

    def gaussian(self, sigma: float, gradient: bool = True) -> float:
        """S_mu^2 for mu = N(w0, sigma^2 I), exact for losses that are quadratic in w.

        Var(l + sigma^2/2 tr h) + sigma^2 tr Sigma_g + sigma^4/2 tr Sigma_H (prop:gaussian).

        sigma     of every coordinate [units of weight]
        gradient  with the gradient term, which the published form lacks
        """
        variance = self.value + sigma**2 * self.cross + sigma**4 / 4 * self.trace
        flat = variance + sigma**4 / 2 * self.hessian
        return flat + (sigma**2 * self.gradient if gradient else 0.0)

    def ball(self, R: float) -> float:
        """B = S + R sqrt(tr Sigma_g) + (R^2/2) sqrt(tr Sigma_H) of (eq:ball-spread) [nat].

        R  radius [units of weight]
        """
        second = R * R / 2 * math.sqrt(self.hessian)
        return math.sqrt(self.value) + R * math.sqrt(self.gradient) + second

    def table(self, largest_norm: float) -> pd.DataFrame:
        """The constants of the statements: columns quantity, value, low, high.

        The interval of the Hessian spread is two standard errors over the probes.

        largest_norm  M, of an example's Hessian [nat/w^2]
        """
        ends = [self.hessian, self.hessian - 2 * self.error, self.hessian + 2 * self.error]
        middle, low, high = np.sqrt(np.maximum(ends, 0.0))
        rows = [
            ("S", self.value**0.5, math.nan, math.nan),
            ("gradient spread", self.gradient**0.5, math.nan, math.nan),
            ("Hessian spread", middle, low, high),
            ("M", largest_norm, math.nan, math.nan),
        ]
        return pd.DataFrame(rows, columns=["quantity", "value", "low", "high"])


def _variance(sums: Tensor, squares: Tensor, n: int) -> Tensor:
    """Variance, summed over coordinates, from sums (..., P) and from sums of squares (...)."""
    return (squares - sums.square().sum(-1) / n) / (n - 1)


def spreads(
    losses: Losses, probes: int = 16, basis: Tensor | None = None, seed: int = 0
) -> Spreads:
    """`Spreads` by random signs v (Hutchinson 1990), or exact along an orthonormal basis.

    tr Sigma_H is the mean over v of the spread of h_i v; products of the variance of traces come
    from different v, so that every estimate but its square roots is unbiased. Cost: one product an
    example and probe, or an example and basis vector.

    losses  of n examples, as a function of the P weights
    probes  how many sign vectors, without a basis [1]
    basis   U (D, P), orthonormal
    seed    of torch's stream 0x5163 + seed

    Raises ValueError where there are fewer than 2 probes.

    >>> losses = Losses(torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1]), "mse")
    >>> spreads(losses, basis=torch.eye(6, dtype=torch.float64)).error
    0.0
    """
    if basis is None and probes < 2:
        raise ValueError(f"There are {probes} probes: give at least 2, one alone has no error.")
    n, w = losses.n, losses.w
    stream = generator("signs of spreads", seed)
    signs = torch.randint(0, 2, (probes, losses.P), generator=stream) * 2 - 1
    V = signs.to(w) if basis is None else basis  # (D, P)
    forms = w.new_zeros(len(V), n)  # v^T h_i v
    squares = w.new_zeros(len(V))  # sums over i of |h_i v|^2, or of |U h_i v|^2
    sums = w.new_zeros(len(V), losses.P)  # over i of h_i v
    gradient_square = 0.0
    gradient_sum = torch.zeros_like(w if basis is None else w[: len(V)])

    def seen(vectors: Tensor) -> Tensor:
        return vectors if basis is None else vectors @ basis.T

    for rows in torch.arange(n, device=w.device).split(losses.chunk(5)):
        products = SampleHessians(losses, rows)
        gradients = seen(products.gradients())
        gradient_square = gradient_square + gradients.square().sum()
        gradient_sum = gradient_sum + gradients.sum(0)
        for j, v in enumerate(V):
            hv = products(v.expand(len(rows), -1))
            forms[j, rows] = hv @ v
            sums[j] += hv.sum(0)
            squares[j] += seen(hv).square().sum()
    each = _variance(seen(sums), squares, n).double().cpu()  # one a probe, or a basis vector
    values = losses.values().double()
    centred = values - values.mean()
    traces, trace = _traces(forms.double(), exact=basis is not None)
    return Spreads(
        value=(centred.square().sum() / (n - 1)).item(),
        gradient=_variance(gradient_sum, gradient_square, n).item(),
        hessian=(each.mean() if basis is None else each.sum()).item(),
        trace=trace.item() / (n - 1),
        cross=(centred @ traces).item() / (n - 1),
        error=each.std().item() / math.sqrt(len(V)) if basis is None else 0.0,
    )


def _traces(forms: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Traces tr h_i less their mean (n,), and the sum of their squares, from v^T h_i v (D, n)."""
    parts = forms - forms.mean(1, keepdim=True)
    if exact:
        traces = parts.sum(0)
        return traces, traces.square().sum()
    pairs = len(parts) * (len(parts) - 1)  # v and v' different: no variance of their own
    of_pairs = parts.sum(0).square().sum() - parts.square().sum()
    return parts.mean(0), of_pairs / pairs


def closed_form_ratios(spread: Spreads, sigma: float, values: ArrayLike) -> dict[str, float]:
    """The closed form for quadratic losses over what forward passes give at drawn weights.

    Source: (prop:gaussian).

    spread  at the centre, of the same examples
    sigma   of the Gaussian [units of weight]
    values  (m, n) losses at m weights drawn from it [nat]

    Returns sigma; `with` and `without` the gradient term, 1 where the losses are quadratic;
    `error`, of 95 %, of the weights and of the probes together.

    >>> flat = Spreads(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    >>> closed_form_ratios(flat, 0.1, np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]))["with"].item()
    1.0
    """
    variance = values.var(1, ddof=1)
    truth = variance.mean()
    sampling = 1.96 * variance.std(ddof=1) / len(variance) ** 0.5 / truth
    return {
        "sigma": sigma,
        "error": np.hypot(sampling, sigma**4 * spread.error / truth),  # two errors, halved
        "with": spread.gaussian(sigma) / truth,
        "without": spread.gaussian(sigma, gradient=False) / truth,
    }


def radii_between(radii: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """Three more radii where a closed form first leaves the truth by more than 10 %.

    radii   increasing, in any unit
    ratios  form over truth at each [1]

    Returns none where it is off at the first radius, or at no radius.

    >>> radii_between([1.0, 16.0], [1.0, 2.0])
    array([2., 4., 8.])
    """
    off = [abs(ratio - 1) > 0.1 for ratio in ratios]
    if off[0] or not any(off):
        return np.array([])
    first = off.index(True)
    return np.geomspace(radii[first - 1], radii[first], 5)[1:-1]


def closed_forms(
    spread: Spreads,
    length: float,
    P: int,
    values: Mapping[float, np.ndarray],
    draw: Callable[[float], np.ndarray],
) -> pd.DataFrame:
    """`closed_form_ratios` at some radii, and at three more where the closed form first fails.

    spread  at the centre
    length  |w0| [units of weight]
    P       how many weights [1]
    values  by radius f [fraction of |w0|], increasing, losses (m, n) at m weights drawn with sigma
            = f |w0| / sqrt(P) [nat]
    draw    such losses for any other radius

    Returns a row a radius, increasing: radius, and what `closed_form_ratios` returns.

    >>> flat = Spreads(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    >>> values = {0.1: np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])}
    >>> closed_forms(flat, 1.0, 4, values, None)["sigma"].tolist()
    [0.05]
    """

    def row(radius: float, losses: np.ndarray) -> dict[str, float]:
        sigma = radius * length / P**0.5
        return {"radius": radius} | closed_form_ratios(spread, sigma, losses)

    rows = {radius: row(radius, losses) for radius, losses in values.items()}
    ratios = [found["with"] for found in rows.values()]
    for radius in radii_between(list(rows), ratios):
        rows[radius] = row(radius, draw(radius))
    return pd.DataFrame([rows[radius] for radius in sorted(rows)])


def range_within(table: pd.DataFrame, column: str, tolerance: float = 0.1) -> tuple[int, int]:
    """Up to where a closed form is near the truth: places in (0, sigma_1, .., sigma_m, inf).

    table      rows of `closed_form_ratios`, sigma increasing
    column     "with" or "without"
    tolerance  of the ratio, and of its error [1]

    Returns the last up to which form and error are within the tolerance, and the first beyond at
    which the form is off by more than tolerance and error.

    >>> range_within(pd.DataFrame({"with": [1.0, 1.5], "error": [0.01, 0.01]}), "with")
    (1, 2)
    """
    off = (table[column] - 1).abs()
    near = (off <= tolerance) & (table["error"] <= tolerance)
    inside = int(near.cumprod().sum())
    beyond = np.flatnonzero(off > np.maximum(tolerance, table["error"]))
    beyond = beyond[beyond >= inside]
    return inside, int(beyond[0]) + 1 if len(beyond) else len(table) + 1
