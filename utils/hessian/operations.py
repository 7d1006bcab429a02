"""Floating-point operations of a call, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Counter(TorchDispatchMode):
    """torch's count of every matrix product, without the bookkeeping by module of its own mode."""

    total = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        count = flop_registry.get(operator.overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


def operations(function: Callable, *inputs: Any, **options: Any) -> tuple[Any, int]:
    """What the function returns for these inputs, and the floating-point operations it took.

    function         any callable of torch
    inputs, options  what it is called with

    Matrix products and convolutions count, as torch counts them; element-wise work and eigenvalue
    problems do not.

    >>> import torch
    >>> operations(torch.mm, torch.ones(2, 3), torch.ones(3, 5))[1]
    60
    """
    with _Counter() as counter:
        result = function(*inputs, **options)
    return result, counter.total
