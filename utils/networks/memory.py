"""How much memory an example takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.networks.copies import second_order_mode

MEMORY = 2**31  # default budget of an estimator's working arrays [bytes]
WALK = 6  # arrays for each activation of a forward pass that a product holds while it runs
KEPT = 3  # the same between the products with one operator


class _Count(TorchDispatchMode):
    """Counts the numbers that operators make, views aside: attention's scores too, which no module
    owns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.numbers += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def activation_numbers(model: nn.Module, x: Tensor) -> int:
    """Numbers that a forward pass of `model` on x (1, ...) computes.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    >>> activation_numbers(model, torch.ones(1, 2))  # 3 of the layer, 3 of tanh
    6
    """
    with torch.no_grad(), second_order_mode(), _Count() as count:
        model(x)
    return count.numbers
