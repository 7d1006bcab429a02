"""Inequalities for single nodes: norms of the first and second derivatives of softmax,
cross-entropy, normalisations and attention.

Everything is float64 tensors; ||.|| is the spectral norm, |.| the Euclidean one. Decimal constants
are rounded up. An overflow gives inf, which is still a bound.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import TypeAlias

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

from utils.run.streams import numpy_generator

SOFTMAX_FIRST = 0.5  # >= ||Ds||, attained at (1/2, 1/2, 0, ...). Source: Lemma 1 (lem:softmax)
SOFTMAX_SECOND = 0.2721656  # >= ||D^2 s||, sqrt(6)/9, attained. Source: Lemma 1 (lem:softmax)
CROSS_ENTROPY_FIRST = 1.4142136  # >= |p - e_y|, a supremum. Source: Lemma 2 (lem:cross-entropy)
CROSS_ENTROPY_SECOND = 0.5  # >= ||diag p - p p^T||, attained. Source: Lemma 2 (lem:cross-entropy)
LAYER_NORM_SECOND = (
    1.1547006  # >= sqrt(d) rho^2 ||D^2 n||, attained. Source: Lemma 3 (lem:layernorm)
)
LAYER_NORM_UNIFORM = (
    0.8586502  # >= sqrt(d) eps ||D^2 n||, attained. Source: Lemma 3 (lem:layernorm)
)
LARGE = 256  # rows of a matrix for which a factorisation is cheaper than all its eigenvalues

Number: TypeAlias = float | Tensor  # a tensor (n,), one number an example


# --- arithmetic of bounds -----------------------------------------------------------------------


def _alike(*values: Number) -> list[Tensor]:
    """Tensors of the dtype and device of the one with most axes."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    like = max(tensors, key=lambda t: t.ndim, default=torch.ones((), dtype=torch.float64))
    return [torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in values]


def least(*values: Number) -> Tensor:
    """The smallest of the values (floats or tensors that broadcast); a NaN (0 times inf: nothing
    known) gives way.

    >>> least(torch.tensor([1.0, math.nan]), 2.0)
    tensor([1., 2.])
    """
    return reduce(torch.fmin, _alike(*values))


def largest(u: Number, v: Number) -> Tensor:
    """The larger of u and v, floats or tensors that broadcast; NaN where one is.

    >>> largest(torch.tensor([1.0, 3.0]), 2.0)
    tensor([2., 3.])
    """
    return torch.maximum(*_alike(u, v))


def hypot(u: Number, v: Number) -> Tensor:
    """sqrt(u^2 + v^2) of floats or tensors that broadcast, without overflow in between.

    >>> hypot(torch.tensor([3.0]), 4.0)
    tensor([5.])
    """
    return torch.hypot(*_alike(u, v))


def with_ones(X: Tensor) -> Tensor:
    """[X 1] for X (..., N, d).

    >>> with_ones(torch.zeros(1, 2))
    tensor([[0., 0., 1.]])
    """
    return torch.cat([X, torch.ones_like(X[..., :1])], -1)


def centred(X: Tensor) -> Tensor:
    """X (..., N, d) minus its mean over the rows.

    >>> centred(torch.tensor([[1.0], [3.0]])).T
    tensor([[-1.,  1.]])
    """
    return X - X.mean(-2, keepdim=True)


def outer(u: Tensor, v: Tensor) -> Tensor:
    """u v^T for vectors u (..., a) and v (..., b).

    >>> outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0]))
    tensor([[3.],
            [6.]])
    """
    return u[..., :, None] * v[..., None, :]


# --- spectral norms -------------------------------------------------------------------------------


def spectral(M: Tensor) -> Tensor:
    """||M|| for M (..., a, b); 0 for an empty matrix.

    By the smaller Gram matrix of M, scaled to entries <= 1.

    >>> spectral(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    tensor(4.)
    """
    if 0 in M.shape[-2:]:
        return M.new_zeros(M.shape[:-2])
    scale = M.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
    M = M / scale
    gram = M @ M.mT if M.shape[-2] < M.shape[-1] else M.mT @ M
    return largest_eigenvalue(gram).clamp(min=0).sqrt() * scale[..., 0, 0]


def largest_eigenvalue(G: Tensor) -> Tensor:
    """Largest eigenvalue of the symmetric matrices G (..., n, n), never below it but for rounding.

    Of a large one it is t = (1 + 1e-9) times ARPACK's estimate from below, where a Cholesky
    factorisation shows that t - G is positive definite; otherwise the last of all its eigenvalues.

    >>> largest_eigenvalue(torch.diag(torch.tensor([1.0, -3.0])))
    tensor(1.)
    """
    if G.ndim == 2 and len(G) >= LARGE and G.device.type == "cpu":
        start = numpy_generator("gram start", 0).normal(size=len(G))
        try:
            below = eigsh(G.numpy(), 1, which="LA", v0=start, tol=1e-5, return_eigenvectors=False)
        except ArpackError:  # a matrix of zeros, or one that has not converged
            below = np.zeros(1)
        t = G.new_tensor((1 + 1e-9) * below[0])
        if torch.linalg.cholesky_ex(torch.diag(t.expand(len(G))) - G).info == 0:
            return t
    return torch.linalg.eigvalsh(G)[..., -1]


# --- softmax and cross-entropy --------------------------------------------------------------------


def softmax_first(s: Tensor) -> Tensor:
    """||Ds|| = largest eigenvalue of diag(s) - s s^T for rows of probabilities s: (..., N) ->
    (...).

    The eigenvalue is the root in (s_2, s_1), the largest two entries, of
    s_1/(s_1 - t) = sum_{i>1} s_i/(t - s_i): the secular equation, divided by t with the help of
    sum s = 1, so that nothing cancels in a saturated row. Bisection keeps the upper end: never
    below the eigenvalue, 1e-12 above it at most (relative). Source: Lemma 1 (lem:softmax), part
    (i).

    >>> round(softmax_first(torch.tensor([0.5, 0.5, 0.0])).item(), 6)
    0.5
    """
    s = s.sort(-1, descending=True).values
    first = s[..., 0]
    rest = s[..., 1:]
    if rest.shape[-1] == 0:
        return torch.zeros_like(first)
    others = rest.sum(-1)  # 1 - s_1 without cancellation
    low = rest[..., 0]
    gershgorin = 2 * torch.maximum(first * others, low * (1 - low))
    high = torch.minimum(torch.minimum(first, gershgorin.clamp(max=0.5)), 2 * others)
    high = torch.maximum(high, low)
    for _ in range(60):
        middle = (low + high) / 2
        rising = (rest / (middle[..., None] - rest)).nan_to_num(nan=0.0).sum(-1)
        above = first / (first - middle) >= rising
        low = torch.where(above, low, middle)
        high = torch.where(above, middle, high)
    return high * (1 + 1e-12)


def softmax_second(first: Tensor) -> Tensor:
    """A bound of ||D^2 s|| from `first` = ||Ds||: min(sqrt(6)/9, sqrt(2) ||Ds||).

    Source: Lemma 1 (lem:softmax), part (ii).

    >>> softmax_second(torch.tensor([0.1, 0.5]))
    tensor([0.1414, 0.2722])
    """
    return (math.sqrt(2) * first).clamp(max=SOFTMAX_SECOND)


def softmax_moved(first: Tensor, moved: Tensor) -> Tensor:
    """>= ||Ds|| at logits within `moved` of those where it is `first`.

    Source: Lemma 1 (lem:softmax), part (iii).

    >>> softmax_moved(torch.tensor(0.1), torch.tensor([0.0, 9.0]))
    tensor([0.1000, 0.5000])
    """
    near = least(first + SOFTMAX_SECOND * moved, first * (math.sqrt(2) * moved).exp())
    return near.nan_to_num(nan=math.inf).clamp(max=SOFTMAX_FIRST)


def cross_entropy_norms(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(|p - e_y|, ||diag p - p p^T||) of logits f (..., K) and labels y (...), exact and accurate
    for well-fitted examples.

    Source: Lemma 2 (lem:cross-entropy).

    >>> gradient, hessian = cross_entropy_norms(torch.zeros(1, 2), torch.tensor([0]))
    >>> gradient, hessian.round(decimals=6)
    (tensor([0.7071]), tensor([0.5000]))
    """
    p = f.log_softmax(-1).exp()
    wrong = p.scatter(-1, y[..., None], 0.0)
    return (wrong.sum(-1).square() + wrong.square().sum(-1)).sqrt(), softmax_first(p)


# --- normalisations -------------------------------------------------------------------------------


def normalisation_second(variance: Tensor, eps: float) -> Tensor:
    """sqrt(d) ||D^2 n|| at rows of the given `variance`; it rises up to eps/4 and falls from there.

    Source: Lemma 3 (lem:layernorm), part (ii).

    >>> normalisation_second(torch.tensor([0.0, 1.0]), 1e-5)
    tensor([0.0000, 1.1547])
    """
    rho2 = variance + eps
    tau = variance / rho2
    shape = torch.where(tau <= 1 / 3, 1 - tau, 2 / (3 * (3 * tau).clamp(min=1).sqrt()))
    return 3 * tau.sqrt() * shape / rho2


def normalisation_floor(eps: float, floor: float | None) -> tuple[float, float]:
    """(lower bound of rho, upper bound of sqrt(d) ||D^2 n||) for every input; (0, inf) where there
    is none.

    eps    of the layer
    floor  an assumed bound of rho

    Source: Lemma 3 (lem:layernorm).
    """
    rho = max(math.sqrt(eps), floor or 0.0)
    if rho == 0:
        return 0.0, math.inf
    return rho, min(LAYER_NORM_SECOND / rho**2, LAYER_NORM_UNIFORM / eps if eps > 0 else math.inf)


def gained_norms(y: Tensor, gamma: Tensor, eps: float, means: bool) -> dict[str, Tensor]:
    """Norms of the derivatives of gamma n + beta, n = y / rho, at the rows y (n, N, d), each (n,).

    y           rows, their means taken off where `means` (LayerNorm)
    gamma, eps  (d,), the gain, and what is added to the variance

    `first` = max_t ||diag(gamma) Dn_t|| (exact), `second` >= max_t ||diag(gamma) D^2 n_t||, `own`
    the norm of (dgamma, dbeta) -> dX (exact), `mixed` the norm of (dgamma, dh) -> dgamma * Dn[dh]
    (exact). Source: Lemma 3 (lem:layernorm), with Dn Dn^T = (P - (2 - tau) y y^T / (d rho^2)) /
    rho^2.
    """
    N, d = y.shape[-2:]
    variance = y.square().mean(-1)
    rho2 = variance + eps  # (n, N)
    lost = (2 - variance / rho2) / (d * rho2)
    # diag(gamma) Dn Dn^T diag(gamma), (n, N, d, d): symmetric, one eigenvalue problem a token
    kept = torch.diag(gamma**2) - means * torch.outer(gamma, gamma) / d
    gram = kept - lost[..., None, None] * outer(gamma * y, gamma * y)
    first = (torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0) / rho2).sqrt().amax(-1)
    second = gamma.abs().max() * normalisation_second(variance, eps).amax(-1) / math.sqrt(d)
    n = y / rho2.sqrt()[..., None]
    squares = n.square().sum(1)  # of each column
    own = (squares + N) / 2 + (((squares - N) / 2).square() + n.sum(1).square()).sqrt()
    rows = (1 - means / d - lost[..., None] * y.square()).amax(-1)
    mixed = (rows.clamp(min=0) / rho2).sqrt().amax(-1)
    return {"first": first, "second": second, "own": own.amax(-1).sqrt(), "mixed": mixed}


# --- attention ------------------------------------------------------------------------------------


def covariances(A: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max over heads and rows t of ||Cov_t K||^(1/2), ||Cov_t V||^(1/2), ||Cov_t(V, K)|| under row
    t of A, each (n,).

    A (n, H, N_q, N), K and V (n, H, N, d_h). Raised by what the difference E x y - E x E y can lose
    to rounding. Source: Lemma (lem:covariance).
    """

    def covariance(X: Tensor, Y: Tensor) -> Tensor:
        X = centred(X)
        Y = centred(Y)
        moment = (A @ outer(X, Y).flatten(-2)).unflatten(-1, (X.shape[-1], Y.shape[-1]))
        longest = X.norm(dim=-1).amax((1, 2)) * Y.norm(dim=-1).amax((1, 2))
        return spectral(moment - outer(A @ X, A @ Y)).amax((1, 2)) + 1e-14 * longest

    return covariance(K, K).sqrt(), covariance(V, V).sqrt(), covariance(V, K)


def mixing(k: dict[str, Number], scale: float) -> tuple[tuple, dict[tuple[int, int], Number]]:
    """Bounds of the partial derivatives of (Q, K, V) -> O = softmax(scale Q K^T) V: first, and
    second by pair.

    k  norms of the heads: "Q", "K", "V" of the matrices, K and V centred, "A", its largest sum of a
       column "columns", the longest query "q", "sigma_K", "sigma_V", "covariance" of `covariances`,
       the longest deviation of a value "reach", "softmax1", "softmax2" of the rows

    Each bound is the smaller of two: along scores and rows (V softmax1 ...), or as covariances
    under the rows, which know that a row of A is a probability. Source: Lemma 5 (lem:bilinear),
    Lemma (lem:covariance).
    """
    Q = scale * k["Q"]
    K = scale * k["K"]
    V = k["V"]
    one = k["softmax1"]
    two = k["softmax2"]
    longest = scale * k["q"]
    root = k["columns"] ** 0.5
    sigma_K = scale * k["sigma_K"]
    sigma_V = k["sigma_V"]
    reach = k["reach"]
    of_Q = least(V * one * K, scale * k["covariance"])
    of_K = least(V * one * Q, longest * sigma_V * root)
    scores = two * Q * K + scale * one
    pairs = {
        (0, 0): least(V * two * K * K, reach * sigma_K * sigma_K),
        (1, 1): least(V * two * Q * Q, reach * longest * longest * root),
        (0, 1): least(V * scores, scale * sigma_V + reach * longest * sigma_K),
        (0, 2): least(one * K, sigma_K),
        (1, 2): least(one * Q, longest * root),
    }
    return (of_Q, of_K, k["A"]), pairs


def through(product: Number, factors: Number, slope: Number, low: float, high: float) -> Tensor:
    """>= ||W_2 diag(s) W_1|| for slopes s in [low, high] and |s| <= slope.

    product >= ||W_2 W_1||, factors >= ||W_2|| ||W_1||. The slopes are within (high - low)/2 of
    their middle. Source: Lemma 4 (lem:activations), Lemma 5 (lem:bilinear).
    """
    middle = (high + low) / 2
    return least(factors * slope, abs(middle) * product + (high - low) / 2 * factors)
