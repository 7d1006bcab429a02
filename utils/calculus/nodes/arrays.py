"""Arrays of a chain: one axis for the examples in front, then the shape that the network gives one
example.

Values are (L, *shape) with L = n where they depend on the example and L = 1 where they do not
(parameters, and what is made of parameters alone). Broadcasting does the rest: no node knows
whether an operand is a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from utils.calculus.nodes.base import Maybe, Shape


def aligned(t: Tensor, rank: int) -> Tensor:
    """t (L, *shape) as (L, 1, ..., 1, *shape) with `rank` axes after the first, so that it
    broadcasts.

    >>> aligned(torch.ones(2, 3), 2).shape
    torch.Size([2, 1, 3])
    """
    missing = rank + 1 - t.ndim
    return t.reshape(t.shape[0], *[1] * missing, *t.shape[1:]) if missing else t


def sum_to(t: Tensor, shape: Shape) -> Tensor:
    """The adjoint of broadcasting (n, *shape) to the shape of t.

    >>> sum_to(torch.ones(2, 5, 3), (1, 3))
    tensor([[[5., 5., 5.]],
    <BLANKLINE>
            [[5., 5., 5.]]])
    """
    extra = t.ndim - 1 - len(shape)
    if extra:
        t = t.sum(tuple(range(1, extra + 1)))
    over = tuple(i + 1 for i, size in enumerate(shape) if size == 1 and t.shape[i + 1] != 1)
    return t.sum(over, keepdim=True) if over else t


def plus(a: Tensor | None, b: Tensor | None) -> Maybe:
    """a + b, where None is zero.

    >>> plus(None, torch.ones(1))
    tensor([1.])
    """
    if a is None or b is None:
        return b if a is None else a
    return a + b


def per_example(function: Callable, tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """A function of one example's tensors, applied to tensors (L, *shape)."""
    if all(t.shape[0] == 1 for t in tensors):
        out = function(*(t[0] for t in tensors))
        return tuple(o[None] for o in out) if isinstance(out, tuple | list) else out[None]
    axes = tuple(None if t.shape[0] == 1 else 0 for t in tensors)
    return vmap(function, axes)(*(t[0] if axis is None else t for t, axis in zip(tensors, axes)))


def scaled_by(factor: Tensor, t: Tensor) -> Tensor:
    """factor (n,) times t (n, ...), example by example.

    >>> scaled_by(torch.tensor([2.0, 3.0]), torch.ones(2, 1)).T
    tensor([[2., 3.]])
    """
    return factor.reshape(-1, *[1] * (t.ndim - 1)) * t


def absolute(M: Tensor) -> Tensor:
    """|M| of symmetric matrices (..., m, m): the eigenvalues by their absolute values.

    >>> absolute(torch.tensor([[0.0, 2.0], [2.0, 0.0]])).round()
    tensor([[2., 0.],
            [0., 2.]])
    """
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values.abs()[..., None, :]) @ vectors.mT


def unit(v: Tensor, axis: int) -> Tensor:
    """v / |v| along an axis, 0 for 0; the squares do not underflow.

    >>> unit(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]), 1)
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    tiny = torch.finfo(v.dtype).tiny
    v = v / v.abs().amax(axis, keepdim=True).clamp_min(tiny)
    return v / v.norm(dim=axis, keepdim=True).clamp_min(tiny)
