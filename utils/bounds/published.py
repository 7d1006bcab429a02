"""Two constants that were printed as bounds and are none, for comparison."""

from __future__ import annotations

import math

from torch import Tensor

from utils.calculus.lemmas import spectral


def closing_the_curvature_gap(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, target: Tensor
) -> float:
    """The constant of Petrov et al., arXiv 2510.16927, theorem 1, as printed: NOT a bound.

    Single-head attention softmax(X W_Q W_K^T X^T / sqrt(d_K)) X W_V, X (L, d_V), loss
    |F - target|^2 / (L d_V), parameters W_Q, W_K (d_V, d_K), W_V (d_V, d_V). Its proof takes 1/L
    for the norm of the softmax's Jacobian, which holds for uniform attention only. Counterexample:
    Remark (rem:published).

    >>> import torch
    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> closing_the_curvature_gap(one, one, one, one, 0 * one)
    72.0
    """
    L, d_V = X.shape
    d_K = W_K.shape[1]
    x, q, k, v = (float(spectral(M)) for M in (X, W_Q, W_K, W_V))
    rho = L * x * v + float(spectral(target))
    m = math.sqrt(min(L, d_V))
    root = math.sqrt(d_K)
    VV = 2 * L / d_V * x**2
    QQ = 8 / (L**3 * d_V * d_K) * k**2 * v**2 * x**6
    QQ += 12 / (d_V * d_K) * m * rho * v * k**2 * x**5
    VQ = 4 / (L * d_V * root) * v * k * x**4 + 4 * m / (L**2 * root) * rho * k * x**3
    QK = 8 / (L**3 * d_V * d_K) * k * q * v**2 * x**6
    QK += 4 * m * rho / (L * d_V * root) * v * (3 * L * k * q * x**5 + d_V / L * x**3)
    return 3 * max(VV, QQ, VQ, QK)


def unraveling_the_hessian(weights: list[Tensor], x: Tensor) -> Tensor:
    """The constant (n,) of Kiselev, Grabovoy, arXiv 2409.11995, theorem 1, as printed: NOT a bound.

    ReLU network without biases with the weight matrices `weights`, inputs x (n, d), cross-entropy.
    It leaves the functional part out and has a factor ||W|| too many, so that it falls to 0 with
    the weights while the norm does not. Counterexample: Remark (rem:published).

    >>> import torch
    >>> unraveling_the_hessian([torch.zeros(2, 3)], torch.ones(1, 3))
    tensor([0.])
    """
    depth = len(weights)
    largest = max(float(spectral(W)) for W in weights)
    powers = sum(largest ** (2 * p) for p in range(depth))  # (M_W^{2L} - 1) / (M_W^2 - 1)
    inputs = depth * x.flatten(1).square().sum(1) * largest ** (2 * depth)
    return math.sqrt(2) * (inputs + largest**2 * powers)
