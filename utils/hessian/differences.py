"""Norms of the Hessian of a mean as examples arrive: of itself, its steps, its way to the limit.

`options` are those of `Losses`: parameters, dtype, device, chunk_size, memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.hessian.lanczos import uniform_start
from utils.hessian.losses import Losses
from utils.hessian.norms import NormEstimate, operator_norm


@dataclass(frozen=True)
class DifferenceNorms:
    """Norms for each k of `sizes`: of H_k, H_{k+1} - H_k and H_k - H_n, as NormEstimates.

    sizes  the k [examples]
    mean   of H_k
    step   of H_{k+1} - H_k
    limit  of H_k - H_n
    """

    sizes: list[int]
    mean: list[NormEstimate]
    step: list[NormEstimate]
    limit: list[NormEstimate]

    def rows(self) -> list[dict]:
        """One row for each norm: matrix ("H_k", "H_k - H_n", "H_k+1 - H_k"), k and its columns."""
        matrices = {"H_k": self.mean, "H_k - H_n": self.limit, "H_k+1 - H_k": self.step}
        return [
            {"matrix": matrix, "k": k} | e.columns()
            for matrix, norms in matrices.items()
            for k, e in zip(self.sizes, norms, strict=True)
        ]


def hessian_difference_norms(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    sizes: list[int],
    order: Tensor | None = None,
    loss: str = "cross_entropy",
    *,
    arriving: int | None = None,
    tolerance: float = 1e-3,
    max_steps: int = 60,
    seed: int = 0,
    **options: Any,
) -> DifferenceNorms:
    """Norms of H_k and of the exact differences H_{k+1} - H_k = (h_{k+1} - H_k)/(k+1), H_k - H_n.

    model, x, y, loss  the network, inputs (n, ...), labels (n,) and the loss's name
    sizes              the k, from 1 to n - 1 [examples]
    order              (n,) in which the examples come, as they stand if None
    arriving           index of the example that comes after every k; the order's own if None
    tolerance          of the residuals, relative to the values
    max_steps          products for each norm at most
    seed               of the random start
    options            of `Losses`, which says what is refused

    Each difference is the Hessian of one weighted sum of losses, never of a subsample. Cost of one
    size: 8 to 20 products over k, over k + 1 and over n examples.
    Raises ValueError for sizes outside 1 to n - 1, an order that is no permutation, and an example
    that arrives twice.

    >>> model, x = torch.nn.Linear(2, 3), torch.eye(2).repeat(3, 1)
    >>> norms = hessian_difference_norms(model, x, [0, 1, 2, 0, 1, 2], [2, 4])
    >>> [e.value < 1e-12 for e in norms.limit]  # H_2 and H_4 are H_6 here
    [True, True]
    """
    losses = Losses(model, x, y, loss, **options)
    n = losses.n
    order = torch.arange(n) if order is None else torch.as_tensor(order)
    order = order.to(losses.x.device)
    if not all(1 <= k < n for k in sizes):
        raise ValueError(
            f"sizes {list(sizes)} have to lie between 1 and n - 1 = {n - 1}: choose such k."
        )
    if not torch.equal(order.sort().values, torch.arange(n, device=order.device)):
        raise ValueError(f"The order is no permutation of the {n} examples: give each index once.")
    later = order[max(sizes) :].tolist()
    if arriving is not None and int(arriving) not in later:
        raise ValueError(
            f"Example {arriving} cannot arrive after the first {max(sizes)}: give one from the "
            "rest of the order."
        )
    start = uniform_start((losses.P,), losses, seed)
    ones = losses.w.new_ones(n)

    def norm(rows: Tensor, weights: Tensor) -> NormEstimate:
        H = losses.hessian(rows=rows, weights=weights)
        return operator_norm(
            H, start, tolerance=tolerance, max_steps=max_steps, engine=losses.engine
        )

    norms = DifferenceNorms(list(sizes), [], [], [])
    for k in sizes:
        first = order[:k]
        new = order[k : k + 1] if arriving is None else order.new_tensor([int(arriving)])
        mean = ones[:k] / k
        norms.mean.append(norm(first, mean))
        norms.step.append(norm(torch.cat([first, new]), torch.cat([-mean, ones[:1]]) / (k + 1)))
        norms.limit.append(norm(order, torch.cat([mean, 0 * ones[k:]]) - ones / n))
    return norms
