"""Losses, gradients and Hessian products of a model by one call each.

`options` are those of `Losses`: parameters, dtype, device, chunk_size, memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from utils.hessian.losses import Losses


def per_sample_losses(
    model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy", **options: Any
) -> Tensor:
    """Losses l_i(w) of the examples as (n,) float64 on the CPU [nat].

    model, x, y, loss  the network, inputs (n, ...), labels (n,) and the loss's name
    options            of `Losses`, which says what is refused

    >>> model = torch.nn.Linear(2, 3)
    >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    >>> per_sample_losses(model, torch.ones(1, 2), [0]).exp().round().item()
    3.0
    """
    return Losses(model, x, y, loss, **options).values().double().cpu()


def per_sample_gradients(
    model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy", **options: Any
) -> Tensor:
    """Gradients (n, P) of the examples' losses.

    model, x, y, loss  the network, inputs (n, ...), labels (n,) and the loss's name
    options            of `Losses`, which says what is refused

    >>> per_sample_gradients(torch.nn.Linear(2, 3), torch.ones(4, 2), [0, 1, 2, 0]).shape
    torch.Size([4, 9])
    """
    return Losses(model, x, y, loss, **options).sample_gradients()


def hessian_vector_product(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    loss: str = "cross_entropy",
    *,
    part: str = "full",
    **options: Any,
) -> Tensor:
    """H v (P,), H the Hessian of the mean loss of the examples.

    model, x, y, loss  the network, inputs (n, ...), labels (n,) and the loss's name
    v                  (P,)
    part               "full", "gauss_newton" or "functional"
    options            of `Losses`, which says what is refused

    Source: Theorem (thm:adjoint).

    >>> x, v = torch.ones(4, 2), torch.ones(9)
    >>> hessian_vector_product(torch.nn.Linear(2, 3), x, [0, 1, 2, 0], v).abs().max() < 1e-12
    tensor(True)
    """
    losses = Losses(model, x, y, loss, **options)
    return losses.product(torch.as_tensor(v).to(losses.w), part=part)


def per_sample_hessian_vector_product(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    loss: str = "cross_entropy",
    *,
    part: str = "full",
    **options: Any,
) -> Tensor:
    """h_i v_i (n, P), the Hessian of every example times a vector of its own.

    model, x, y, loss  the network, inputs (n, ...), labels (n,) and the loss's name
    v                  (n, P)
    part               "full", "gauss_newton" or "functional"
    options            of `Losses`, which says what is refused

    >>> model, x = torch.nn.Linear(2, 3), torch.ones(4, 2)
    >>> per_sample_hessian_vector_product(model, x, [0, 1, 2, 0], torch.ones(4, 9)).shape
    torch.Size([4, 9])
    """
    losses = Losses(model, x, y, loss, **options)
    return losses.sample_products(torch.as_tensor(v).to(losses.w), part=part)


def dense_hessian(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    *,
    part: str = "full",
    **options: Any,
) -> Tensor:
    """The Hessian (P, P) of the mean loss, by P products: for small networks and tests.

    model, x, y, loss  the network, inputs (n, ...), labels (n,) and the loss's name
    part               "full", "gauss_newton" or "functional"
    options            of `Losses`, which says what is refused

    >>> dense_hessian(torch.nn.Linear(2, 3), torch.ones(4, 2), [0, 1, 2, 0]).shape
    torch.Size([9, 9])
    """
    return Losses(model, x, y, loss, **options).dense(part)
