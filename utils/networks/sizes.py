"""What the configurations of the networks share: activations, checks of sizes and choices."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def check_sizes(config: object) -> None:
    """Raise ValueError where an integer field of `config` is below 1; a `depth` may be 0.

    >>> from types import SimpleNamespace
    >>> check_sizes(SimpleNamespace(depth=0, width=3))
    """
    for name, size in vars(config).items():
        least = 0 if name == "depth" else 1
        if type(size) is int and size < least:
            raise ValueError(f"{name} is {size}: give {least} or more.")


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ValueError where the `value` of the field `name` is not one of `allowed`.

    >>> check_choice("norm", "pre", ("pre", "post"))
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}.")
