"""Bilinear maps phi(x, y) + b: the kinds whose second derivative couples two inputs. Source: Lemma
5 (lem:bilinear).

    D [x', y', b']  =  phi(x', y) + phi(x, y') + b'
    D^T lam         =  (left(lam, y), right(lam, x), lam)
    < lam, D^2 phi > =  (left(lam, y'), right(lam, x'), 0)

left and right are the adjoints of phi in x and in y. With lam as a matrix C between the entries of
x and of y, and C = U S V^T, the majorant of 2 < x', C y' > has the halves U S U^T on x' and V S V^T
on y'.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.calculus.nodes.arrays import aligned, plus, sum_to
from utils.calculus.nodes.base import Form, Node, Parts

Shapes = Sequence[Sequence[int]]


class Bilinear(Node):
    """phi(x, y), or phi(x, y) + b. Subclasses give `product`, `left`, `right` and `halves`."""

    couples = True

    def __init__(self, shape: Sequence[int], inner: Shapes):
        self.shape = tuple(shape)
        self.inner = [tuple(s) for s in inner]

    @abstractmethod
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """phi(x, y)."""

    @abstractmethod
    def left(self, lam: Tensor, y: Tensor) -> Tensor:
        """The adjoint of x -> phi(x, y)."""

    @abstractmethod
    def right(self, lam: Tensor, x: Tensor, summed: bool = False) -> Tensor:
        """The adjoint of y -> phi(x, y)."""

    @abstractmethod
    def halves(self, lam: Tensor) -> Form:
        """The map (dz, dout) -> (U S U^T x', V S V^T y')."""

    def forward(self, *z: Tensor) -> tuple[Tensor, object]:
        out = self.product(z[0], z[1])
        if len(z) == 3:
            out = out + aligned(z[2], len(self.shape))
        return out, (z[0], z[1])

    def tangent(self, saved: tuple, dz: Parts) -> Tensor | None:
        x, y = saved
        out = None
        if dz[0] is not None:
            out = self.product(dz[0], y)
        if dz[1] is not None:
            out = plus(out, self.product(x, dz[1]))
        if len(dz) == 3 and dz[2] is not None:
            bias = aligned(dz[2], len(self.shape))
            out = bias.expand(-1, *self.shape) if out is None else out + bias
        return out

    def adjoint(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Parts:
        x, y = saved
        parts = [None] * len(wanted)
        if wanted[0]:
            parts[0] = self.left(lam, y)
        if wanted[1]:
            parts[1] = self.right(lam, x, wanted[1] == 2)
        if len(wanted) == 3 and wanted[2]:
            parts[2] = sum_to(lam, self.inner[2])
        return tuple(parts)

    def second_order(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form | None:
        if not (wanted[0] and wanted[1]):
            return None
        rest = (None,) * (len(wanted) - 2)

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            x = None if dz[1] is None else self.left(lam, dz[1])
            y = None if dz[0] is None else self.right(lam, dz[0], wanted[1] == 2)
            return (x, y, *rest)

        return form

    def majorant(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form | None:
        if not (wanted[0] and wanted[1]):
            return None
        halves = self.halves(lam)
        rest = (None,) * (len(wanted) - 2)

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            if dz[0] is None or dz[1] is None:  # what does not move is coupled with nothing
                return (None,) * len(wanted)
            return (*halves(dz, dout), *rest)

        return form


class Linear(Bilinear):
    """x W^T + b on every token: x (..., in), W (out, in) or, `turned`, (in, out), b (out,) -> (...,
    out)."""

    def __init__(self, shape: Sequence[int], inner: Shapes, turned: bool = False):
        super().__init__(shape, inner)
        self.turned = turned

    def forward(self, *z: Tensor) -> tuple[Tensor, object]:
        x, W, *bias = z
        if W.shape[0] > 1 or (bias and bias[0].shape[0] > 1):
            return super().forward(*z)
        W = W[0].mT if self.turned else W[0]
        return F.linear(x, W, bias[0][0].reshape(-1) if bias else None), (x, z[1])

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        W = y if self.turned else y.mT
        if W.shape[0] == 1:
            return x @ W[0]
        return (x.flatten(1, -2) @ W).reshape(len(W), *self.shape)

    def tangent(self, saved: tuple, dz: Parts) -> Tensor | None:
        x = saved[0]
        if dz[0] is None or dz[1] is None or len(dz[1]) == 1 or len(x) == 1:
            return super().tangent(saved, dz)
        moved = self.product(dz[0], saved[1]).flatten(1, -2)  # one pass adds X W'^T to X' W^T
        out = torch.baddbmm(moved, x.flatten(1, -2), dz[1] if self.turned else dz[1].mT)
        out = out.reshape(len(out), *self.shape)
        if len(dz) == 3 and dz[2] is not None:
            out = out.add_(aligned(dz[2], len(self.shape)))
        return out

    def left(self, lam: Tensor, y: Tensor) -> Tensor:
        W = y.mT if self.turned else y
        if W.shape[0] == 1:
            return lam @ W[0]
        return (lam.flatten(1, -2) @ W).reshape(len(W), *self.inner[0])

    def right(self, lam: Tensor, x: Tensor, summed: bool = False) -> Tensor:
        x = x.flatten(1, -2)
        lam = lam.flatten(1, -2)
        if summed and len(x) == len(lam):
            x = x.flatten(0, 1)[None]
            lam = lam.flatten(0, 1)[None]
        return x.mT @ lam if self.turned else lam.mT @ x

    def halves(self, lam: Tensor) -> Form:
        U, S, Vh = torch.linalg.svd(lam.flatten(1, -2), full_matrices=False)  # tokens by outputs
        S = S[..., None]

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            x = dz[0].flatten(1, -2)
            W = dz[1].mT if self.turned else dz[1]
            x = (U @ (S * (U.mT @ x))).reshape(dz[0].shape)
            W = Vh.mT @ (S * (Vh @ W))
            return x, W.mT if self.turned else W

        return form


class Matmul(Bilinear):
    """x y over the last two axes, the axes before broadcast: scores Q K^T and mixing A V of
    attention."""

    def __init__(self, shape: Sequence[int], inner: Shapes):
        super().__init__(shape, inner)
        self.rank = max(len(s) for s in self.inner[:2])

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return aligned(x, self.rank) @ aligned(y, self.rank)

    def left(self, lam: Tensor, y: Tensor) -> Tensor:
        return sum_to(lam @ aligned(y, self.rank).mT, self.inner[0])

    def right(self, lam: Tensor, x: Tensor, summed: bool = False) -> Tensor:
        return sum_to(aligned(x, self.rank).mT @ lam, self.inner[1])

    def halves(self, lam: Tensor) -> Form:
        """Head by head; an operand that is broadcast over heads adds their majorants up."""
        U, S, Vh = torch.linalg.svd(lam, full_matrices=False)

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            x = aligned(dz[0], self.rank)
            y = aligned(dz[1], self.rank)
            x = U @ (S[..., None] * (U.mT @ x))
            y = ((y @ Vh.mT) * S[..., None, :]) @ Vh
            return sum_to(x, self.inner[0]), sum_to(y, self.inner[1])

        return form


class Product(Bilinear):
    """x o y + b entry by entry, broadcast to one shape: the gain of a normalisation, a gate, a
    scale."""

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        rank = len(self.shape)
        return aligned(x, rank) * aligned(y, rank)

    def left(self, lam: Tensor, y: Tensor) -> Tensor:
        return sum_to(lam * aligned(y, len(self.shape)), self.inner[0])

    def right(self, lam: Tensor, x: Tensor, summed: bool = False) -> Tensor:
        return sum_to(lam * aligned(x, len(self.shape)), self.inner[1])

    def halves(self, lam: Tensor) -> Form:
        """lam as matrices between the axes that only x has (rows) and those that only y has
        (columns)."""
        rank = len(self.shape)
        padded = [(1,) * (rank - len(s)) + s for s in self.inner[:2]]
        of_x = [i for i in range(rank) if padded[1][i] == 1 and padded[0][i] > 1]
        of_y = [i for i in range(rank) if padded[0][i] == 1 and padded[1][i] > 1]
        shared = [i for i in range(rank) if i not in of_x + of_y]
        order = [0, *(i + 1 for i in (*shared, *of_x, *of_y))]
        back = sorted(range(rank + 1), key=order.__getitem__)

        def matrices(t: Tensor) -> Tensor:
            """(n, shared, rows, columns) of an array that broadcasts to the output's shape."""
            t = aligned(t, rank).permute(order)
            rows = t.shape[1 + len(shared) : 1 + len(shared) + len(of_x)]
            columns = t.shape[1 + len(shared) + len(of_x) :]
            return t.reshape(*t.shape[: 1 + len(shared)], math.prod(rows), math.prod(columns))

        def restored(t: Tensor, k: int) -> Tensor:
            shape = [t.shape[0], *(padded[k][i] for i in (*shared, *of_x, *of_y))]
            return t.reshape(shape).permute(back).reshape(t.shape[0], *self.inner[k])

        U, S, Vh = torch.linalg.svd(matrices(lam), full_matrices=False)

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            x = U @ (S[..., None] * (U.mT @ matrices(dz[0])))
            y = ((matrices(dz[1]) @ Vh.mT) * S[..., None, :]) @ Vh
            return restored(x, 0), restored(y, 1)

        return form
