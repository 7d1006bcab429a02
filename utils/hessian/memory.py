"""How much memory an example takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from utils.networks.contract import second_order_mode

MEMORY = 2**31  # default budget of an estimator's working arrays [bytes]
WALK = 6  # arrays for each activation of a forward pass that a product holds while it runs
KEPT = 3  # the same between the products with one operator


def activation_numbers(model: nn.Module, x: Tensor) -> int:
    """Numbers in the activations of all modules of `model`, from one forward pass of x (1, ...).

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    >>> activation_numbers(model, torch.ones(1, 2))  # 3 of the layer, 3 of tanh, 3 of the whole
    9
    """
    sizes = []

    def count(_: Any, __: Any, out: Any) -> None:
        sizes.append(out.numel() if isinstance(out, Tensor) else 0)

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    with torch.no_grad(), second_order_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return sum(sizes)
