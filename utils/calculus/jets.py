"""Majorant jets: bounds of the first and second derivatives of a value in groups of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.calculus.lemmas import Number, outer


def scaled(c: Number, t: Tensor) -> Tensor:
    """c t for a constant c, a float or (n,), and t (n, ...); 0 where t is 0, however large c is.

    >>> scaled(float("inf"), torch.tensor([0.0, 1.0]))
    tensor([0., inf])
    """
    if isinstance(c, Tensor) and c.ndim:
        c = c.reshape(c.shape + (1,) * (t.ndim - 1))
    return (c * t).masked_fill(t == 0, 0.0)


Pairs = dict[tuple[int, int], Number]


@dataclass(frozen=True)
class Jet:
    """a[i, g] >= ||dz/dw_g||, B[i, g, g'] >= ||d^2 z/dw_g dw_g'|| of a map z of the weights.

    a (n, m), B (n, m, m) for n examples and m groups of weights, or n = 1 where the examples do not
    matter; both norms are those of (multi)linear maps in Euclidean norms. Numbers handed to the
    rules are floats or tensors (n,). Source: Theorem 1 (thm:jet).

    >>> x = Jet.parameter(0, 1, torch.zeros(1))  # z = 3 x^2 at x = 2: slope 12, curvature 6
    >>> z = x.smooth(2 * 2.0, 2.0).linear(3.0)
    >>> z.a.item(), z.B.item()
    (12.0, 6.0)
    """

    a: Tensor
    B: Tensor

    @staticmethod
    def parameter(group: int, groups: int, like: Tensor) -> Jet:
        """The jet of group number `group` itself, one of `groups`, in the dtype and on the device
        of `like`."""
        a = like.new_zeros(1, groups)
        a[:, group] = 1.0
        return Jet(a, like.new_zeros(1, groups, groups))

    @staticmethod
    def constant(groups: int, like: Tensor) -> Jet:
        """The jet of what does not depend on the weights, of `groups` groups, alike `like`."""
        return Jet(like.new_zeros(1, groups), like.new_zeros(1, groups, groups))

    @property
    def moves(self) -> bool:
        """Whether anything moves it."""
        return bool(self.movers)

    @property
    def movers(self) -> list[int]:
        """The groups that move it, be it to second order alone, as a weight behind a weight of 0
        does."""
        moved = self.a.any(0) | self.B.flatten(0, 1).any(0)
        return moved.nonzero()[:, 0].tolist()

    def __add__(self, other: Jet) -> Jet:
        return Jet(self.a + other.a, self.B + other.B)

    def linear(self, c: Number) -> Jet:
        """The jet after a linear map of norm <= c."""
        return Jet(scaled(c, self.a), scaled(c, self.B))

    def smooth(self, first: Number, second: Number) -> Jet:
        """The jet after a map with ||D|| <= first, ||D^2|| <= second."""
        curved = scaled(second, outer(self.a, self.a))
        return Jet(scaled(first, self.a), scaled(first, self.B) + curved)

    def beside(self, other: Jet) -> Jet:
        """The jet of two values one after the other."""
        return Jet(torch.hypot(self.a, other.a), torch.hypot(self.B, other.B))

    @staticmethod
    def of(inputs: list[Jet], first: list[Number], second: Pairs) -> Jet:
        """The jet of a map of several inputs: `first` bounds its partial, `second` its second
        partial derivatives, (i, j) and (j, i) given once."""
        parts = [jet.linear(c) for jet, c in zip(inputs, first, strict=True)]
        a = sum(part.a for part in parts)
        B = sum(part.B for part in parts)
        for (i, j), c in second.items():
            cross = outer(inputs[i].a, inputs[j].a)
            B = B + scaled(c, cross if i == j else cross + cross.mT)
        return Jet(a, B)

    def times(self, other: Jet, norm_self: Number, norm_other: Number) -> Jet:
        """The jet of a bilinear z(X, Y) with |z(X, Y)| <= |X| |Y|, X = self, Y = other.

        |z(X, dY)| <= norm_self |dY|, |z(dX, Y)| <= norm_other |dX|. Source: Lemma 5 (lem:bilinear).
        """
        return Jet.of([self, other], [norm_other, norm_self], {(0, 1): 1.0})

    def least(self, other: Jet, groups: list[int]) -> Jet:
        """The smaller entries of two jets of one map, where `other` leaves the parts of `groups`
        out."""
        rest = torch.ones(self.a.shape[-1], dtype=torch.bool, device=self.a.device)
        rest[groups] = False
        a = torch.where(rest, torch.fmin(self.a, other.a), self.a)
        return Jet(a, torch.where(rest & rest[:, None], torch.fmin(self.B, other.B), self.B))
